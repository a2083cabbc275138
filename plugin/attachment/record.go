package attachment

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"time"
	"unicode/utf8"
)

// Version is the record format that this package writes.
//
// Every later format keeps the fields version, network, containerID, ifName,
// cgroupID and status with their present types, so that a DEL by an older
// binary can undo what a newer one recorded.
const Version = 1

// maxRecord is the size in bytes of the longest record that is written or
// read. It bounds what a foreign file in the directory can cost.
const maxRecord = 1 << 20

// Key names one attachment: a container's interface on a network. It is the
// triple by which CNI itself identifies an attachment; a cgroup or a pod's UID
// would not tell a late DEL of an old sandbox from the new one.
type Key struct {
	Network     string `json:"network"`
	ContainerID string `json:"containerID"`
	IfName      string `json:"ifName"`
}

// FileName is the name of the key's record: the SHA-256 of its parts, each
// preceded by its length, and ".json". It is a safe file name whatever the
// parts contain.
func (k Key) FileName() string {
	h := sha256.New()
	for _, part := range []string{k.Network, k.ContainerID, k.IfName} {
		var n [8]byte
		binary.BigEndian.PutUint64(n[:], uint64(len(part)))
		h.Write(n[:])
		h.Write([]byte(part))
	}
	return hex.EncodeToString(h.Sum(nil)) + recordSuffix
}

// describe is the key for error messages: quoted, and cut where it is long.
func (k Key) describe() string {
	return fmt.Sprintf("network %.64q, container %.64q, interface %.64q", k.Network, k.ContainerID, k.IfName)
}

// Status says how far an attachment got.
type Status string

const (
	// Attaching: ADD has begun, and has neither finished nor given up.
	Attaching Status = "attaching"
	// Attached: the pod's cgroup carries the program.
	Attached Status = "attached"
	// Skipped: the pod has plain networking; Record.Reason says why.
	Skipped Status = "skipped"
)

// Record is what is remembered of an attachment between ADD and DEL.
//
// Strings other than those of the Key are stored as JSON stores them: bytes
// that are not UTF-8 come back as U+FFFD.
type Record struct {
	// Version is set by Store.Put. A record read from disk may have a newer
	// one: then only Key, CgroupID and Status are sure to be there.
	Version int `json:"version"`
	Key
	PodNamespace string `json:"podNamespace,omitempty"`
	PodName      string `json:"podName,omitempty"`
	PodUID       string `json:"podUID,omitempty"`
	Status       Status `json:"status"`
	// Reason says why the attachment was skipped, and is empty otherwise.
	Reason string `json:"reason,omitempty"`
	// CgroupID is the id of the pod's cgroup, 0 if the attachment was skipped
	// before the cgroup was found.
	CgroupID   uint64 `json:"cgroupID"`
	CgroupPath string `json:"cgroupPath,omitempty"`
	// BPFFSDev is the st_dev of the bpffs that holds the attachment's link, and
	// MountNS the inode of the mount namespace that this bpffs was seen in.
	BPFFSDev uint64 `json:"bpffsDev,omitempty"`
	MountNS  uint64 `json:"mountNS,omitempty"`
	NetNS    string `json:"netNS,omitempty"`
	// Settings are the CNI verbs' own; this package does not look into them.
	Settings json.RawMessage `json:"settings,omitempty"`
	Created  time.Time       `json:"created"`
	// Pending is what a skipped attachment was to be, had there been time. The
	// record has no part in that cgroup until somebody makes it so.
	Pending *Pending `json:"pending,omitempty"`
	// Stale tells of a record that was read: it was written before the node was
	// booted. What it speaks of is gone, and its cgroup's id may be another's.
	Stale bool `json:"-"`

	boot string // see wire
}

// wire is the JSON form of a record.
type wire struct {
	Record
	BootID string `json:"bootID,omitempty"` // of the boot in which it was written
}

// Pending is an attachment that can still be made. Its fields are those of [Record].
type Pending struct {
	CgroupID   uint64          `json:"cgroupID"`
	CgroupPath string          `json:"cgroupPath"`
	Settings   json.RawMessage `json:"settings,omitempty"`
}

func (s Status) valid() bool {
	return s == Attaching || s == Attached || s == Skipped
}

// encode returns the record in the present format. It refuses what could not
// be read back.
func (r Record) encode() ([]byte, error) {
	if r.Version > Version {
		return nil, fmt.Errorf("%w: %d, this binary writes %d", ErrNewerVersion, r.Version, Version)
	}
	r.Version = Version
	if !r.Status.valid() {
		return nil, fmt.Errorf("%w: unknown status %q", ErrInvalid, r.Status)
	}
	for _, part := range []string{r.Network, r.ContainerID, r.IfName} {
		// JSON would replace the bytes, and the key would be another one.
		if !utf8.ValidString(part) {
			return nil, fmt.Errorf("%w: key part %.64q is not UTF-8", ErrInvalid, part)
		}
	}
	data, err := json.Marshal(wire{r, r.boot})
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	if len(data)+1 > maxRecord {
		return nil, fmt.Errorf("%w: %d bytes long, the limit is %d", ErrInvalid, len(data)+1, maxRecord)
	}
	return append(data, '\n'), nil
}

// decode is the reverse of encode. Of a record in a newer format it takes
// what every format has, and of the rest what it understands.
func decode(data []byte) (Record, error) {
	var always struct {
		Version int `json:"version"`
		Key
		CgroupID uint64 `json:"cgroupID"`
		Status   Status `json:"status"`
	}
	if err := json.Unmarshal(data, &always); err != nil {
		return Record{}, fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	if always.Version < 1 {
		return Record{}, fmt.Errorf("%w: no format version", ErrCorrupt)
	}
	if always.Version > Version {
		r := Record{Version: always.Version, Key: always.Key, CgroupID: always.CgroupID, Status: always.Status}
		r.decodeKnown(data)
		return r, nil
	}
	var w wire
	if err := json.Unmarshal(data, &w); err != nil {
		return Record{}, fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	if !w.Status.valid() {
		return Record{}, fmt.Errorf("%w: unknown status %.64q", ErrCorrupt, w.Status)
	}
	w.boot = w.BootID
	return w.Record, nil
}

// decodeKnown sets those descriptive fields of a newer record that still have
// the present type; they are only shown to people.
func (r *Record) decodeKnown(data []byte) {
	var fields map[string]json.RawMessage
	if json.Unmarshal(data, &fields) != nil {
		return
	}
	for name, field := range map[string]any{
		"podNamespace": &r.PodNamespace, "podName": &r.PodName, "podUID": &r.PodUID, "reason": &r.Reason,
		"cgroupPath": &r.CgroupPath, "bpffsDev": &r.BPFFSDev, "mountNS": &r.MountNS, "netNS": &r.NetNS,
		"created": &r.Created, "bootID": &r.boot,
	} {
		if raw, ok := fields[name]; ok {
			// A field of another type stays zero.
			_ = json.Unmarshal(raw, field)
		}
	}
}
