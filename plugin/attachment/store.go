// Package attachment keeps the plugin's state on disk: the node-wide lock, a
// record for each attachment, and how many attachments share a cgroup.
//
// Below the run directory lie
//
//	lock                          flock(2) file, holds the holder's pid
//	attachments/<key's hash>.json one record
//	attachments/.tmp-<nonce>      a record that is being written
//	cgroups/<id>/<hash>.<nonce>   index: a hard link to a record of that cgroup
//
// # Consistency
//
// [Store.Put] writes a temporary file, links it into the index and renames it
// to the record; [Store.Delete] removes the record, then the link. Therefore a
// process killed at any point leaves no record without its index entry, only
// index entries without a record, and temporary files. Readers compare an
// index entry with the record, so that they do not see the former, and remove
// what is stale.
//
// A writer holds an flock on its file until it is renamed, and every name with
// a nonce is used once only. So whoever finds a stale name and gets the lock
// knows that its writer is done or dead and can remove the name, however late,
// without hitting another's. No operation but [Store.Lock] ever waits for
// another process, and none needs the lock for its own consistency. The lock
// is for decisions that take several steps, such as "remove the link of the
// cgroup if nobody else uses it".
//
// Nothing is synced to disk. A rename is atomic for other processes without
// it; it would only matter after a power failure, and then the pods, the
// cgroups and the BPF links that the records speak of are gone too. Where the
// run directory outlives that, [Record.Stale] tells.
//
// Put, Get, Delete and ByCgroup cost as much with a thousand attachments as
// with one. List, ListNetwork and Repair read all of them.
package attachment

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// DefaultRunDir is the run directory where none is configured.
const DefaultRunDir = "/run/skipstack"

var (
	// ErrBusy is returned by [Store.Lock] when the lock was not to be had in
	// time.
	ErrBusy = errors.New("another process holds the lock")
	// ErrNotFound is returned by [Store.Get] for an attachment without record.
	ErrNotFound = errors.New("no such attachment")
	// ErrCorrupt is returned by [Store.Get], [Store.List], [Store.ListNetwork]
	// and [Store.ByCgroup] for a file that is no record, or not that of its
	// name.
	ErrCorrupt = errors.New("corrupt attachment record")
	// ErrNewerVersion is returned by [Store.Put] instead of overwriting a
	// record that a newer version wrote.
	ErrNewerVersion = errors.New("record format of a newer version")
	// ErrInvalid is returned by [Store.Put] for a record that could not be
	// read back.
	ErrInvalid = errors.New("invalid attachment record")
	// ErrUnsafe is returned by all operations when others could have written
	// to the run directory; the message says what to do.
	ErrUnsafe = errors.New("unsafe run directory")
)

const (
	lockFile       = "lock"
	attachmentsDir = "attachments"
	cgroupsDir     = "cgroups"
	recordSuffix   = ".json"
	tempPrefix     = ".tmp-"
	hashLen        = 64 // hexadecimal digits
	nonceLen       = 16
)

// Store is the state below one run directory. Its methods may be called by
// several goroutines and processes at once.
type Store struct {
	dir  string
	boot func() string     // the id of this boot, "" where it is not to be had
	hook func(step string) // called after each change to the directory; set by tests
}

// NewStore returns the store below runDir, by default [DefaultRunDir]. It
// touches nothing yet; what writes creates the directory.
func NewStore(runDir string) *Store {
	if runDir == "" {
		runDir = DefaultRunDir
	}
	return &Store{dir: filepath.Clean(runDir), boot: sync.OnceValue(func() string {
		id, _ := BootID() // nothing is stale without it
		return id
	})}
}

func (s *Store) did(step string) {
	if s.hook != nil {
		s.hook(step)
	}
}

// Put writes the record and replaces one with the same key. Other processes
// see the old record or the new one. If the CgroupID changed, ByCgroup finds
// the record under the new one only.
//
// The error wraps [ErrNewerVersion], [ErrInvalid], [ErrUnsafe], or says why
// the file system refused; then the old record, if any, is still there.
func (s *Store) Put(r Record) error { return s.record(r, (*tree).rename) }

// Replace is Put where there is a record of that key. If there is none, because
// somebody has deleted it, the error wraps [ErrNotFound]. That needs no lock.
func (s *Store) Replace(r Record) error { return s.record(r, (*tree).exchange) }

func (s *Store) record(r Record, rename func(t *tree, from, to string) error) error {
	if err := s.put(r, rename); err != nil {
		return fmt.Errorf("record attachment (%s): %w", r.Key.describe(), err)
	}
	return nil
}

func (s *Store) put(r Record, rename func(t *tree, from, to string) error) error {
	r.boot = s.boot()
	data, err := r.encode()
	if err != nil {
		return err
	}
	t, err := s.open(true)
	if err != nil {
		return err
	}
	defer t.close()

	file := r.Key.FileName()
	old, _, err := t.read(file)
	switch {
	case errors.Is(err, ErrNotFound), errors.Is(err, ErrCorrupt):
		old = Record{}
	case err != nil:
		return err
	case old.Version > Version:
		return fmt.Errorf("%w: %d, this binary writes %d: delete the attachment first", ErrNewerVersion, old.Version, Version)
	}

	tmp, nonce, err := t.createTemp()
	if err != nil {
		return err
	}
	defer tmp.Close()
	undo := func(err error) error {
		if r.CgroupID != 0 {
			err = errors.Join(err, t.unlinkEntry(r.CgroupID, entryName(file, nonce)))
		}
		_, uerr := unlinkAt(t.att, tempPrefix+nonce)
		return errors.Join(err, uerr)
	}
	if _, err := tmp.Write(data); err != nil {
		return undo(err)
	}
	s.did("temporary file written")
	if r.CgroupID != 0 {
		if err := t.linkEntry(tempPrefix+nonce, r.CgroupID, entryName(file, nonce)); err != nil {
			return undo(err)
		}
	}
	if err := rename(t, tempPrefix+nonce, file); err != nil {
		return undo(err)
	}
	s.did("record renamed")
	// The lock has protected the index entry until its record was there.
	tmp.Close()

	// The record is written. Index entries that it superseded are ignored by
	// readers, and removed by the next one if that fails here.
	_, _, _ = t.sweepCgroup(r.CgroupID, file)
	if old.CgroupID != r.CgroupID {
		_, _, _ = t.sweepCgroup(old.CgroupID, file)
	}
	return nil
}

// Get reads the record of k. A record that a newer version wrote has its Key,
// CgroupID and Status, and a Version greater than [Version].
//
// The error wraps [ErrNotFound], [ErrCorrupt] or [ErrUnsafe].
func (s *Store) Get(k Key) (Record, error) {
	r, err := s.get(k)
	if err != nil {
		return Record{}, fmt.Errorf("read attachment (%s): %w", k.describe(), err)
	}
	return r, nil
}

func (s *Store) get(k Key) (Record, error) {
	t, err := s.open(false)
	if errors.Is(err, fs.ErrNotExist) {
		return Record{}, ErrNotFound
	}
	if err != nil {
		return Record{}, err
	}
	defer t.close()
	r, _, err := t.read(k.FileName())
	return r, err
}

// Delete removes the record of k, corrupt or not, of whatever version. That
// there is none is no error.
func (s *Store) Delete(k Key) error {
	if err := s.delete(k); err != nil {
		return fmt.Errorf("delete attachment (%s): %w", k.describe(), err)
	}
	return nil
}

func (s *Store) delete(k Key) error {
	t, err := s.open(false)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer t.close()
	file := k.FileName()
	// What cannot be read is removed as well. Its index entry is then found
	// by ByCgroup or Repair.
	r, _, err := t.read(file)
	if errors.Is(err, ErrNotFound) {
		return nil
	}
	if _, err := unlinkAt(t.att, file); err != nil {
		return err
	}
	s.did("record removed")
	_, _, sweepErr := t.sweepCgroup(r.CgroupID, file)
	return sweepErr
}

// List returns the records that can be read, in no useful but a fixed order,
// and a joined error for those that cannot. Without a run directory there are
// none. It removes the temporary files of dead writers.
func (s *Store) List() ([]Record, error) {
	t, err := s.open(false)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list attachments: %w", err)
	}
	defer t.close()
	names, err := readNames(t.att)
	if err != nil {
		return nil, fmt.Errorf("list attachments: %w", err)
	}
	var records []Record
	var errs []error
	for _, name := range names {
		switch {
		case isTemp(name):
			// The list is right without it. Repair reports why it fails.
			_ = t.sweepTemp(name)
		case isRecord(name):
			r, _, err := t.read(name)
			if err == nil {
				records = append(records, r)
			} else if !errors.Is(err, ErrNotFound) { // removed since
				errs = append(errs, err)
			}
		}
	}
	return records, errors.Join(errs...)
}

// ListNetwork is List for one network. What cannot be read could belong to
// it, so the error is that of List.
func (s *Store) ListNetwork(network string) ([]Record, error) {
	records, err := s.List()
	return slices.DeleteFunc(records, func(r Record) bool { return r.Network != network }), err
}

// ByCgroup returns the records with this CgroupID, whatever their status, in
// no useful but a fixed order, and a joined error for those that cannot be
// read: on such an error, more attachments than were returned may use the
// cgroup. It removes stale index entries. Records without cgroup (id 0) are not
// indexed: for them it returns nothing.
//
// Call it with the lock held to decide something by the number of records.
func (s *Store) ByCgroup(id uint64) ([]Record, error) {
	t, err := s.open(false)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("find attachments of cgroup %d: %w", id, err)
	}
	defer t.close()
	// The answer is right even where stale entries cannot be removed.
	records, err, _ := t.sweepCgroup(id, "")
	if err != nil {
		return records, fmt.Errorf("find attachments of cgroup %d: %w", id, err)
	}
	return records, nil
}

// Repair removes what dead processes left behind: temporary files, stale index
// entries, empty index directories. It removes corrupt records, of which
// nothing can be learnt, and makes index entries that somebody removed. It
// reads everything; call it with the lock held.
func (s *Store) Repair() error {
	if err := s.repair(); err != nil {
		return fmt.Errorf("repair run directory %s: %w", s.dir, err)
	}
	return nil
}

func (s *Store) repair() error {
	t, err := s.open(false)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer t.close()
	names, err := readNames(t.att)
	if err != nil {
		return err
	}
	var errs []error
	for _, name := range names {
		switch {
		case isTemp(name):
			errs = append(errs, t.sweepTemp(name))
		case isRecord(name):
			r, _, err := t.read(name)
			switch {
			case errors.Is(err, ErrNotFound): // removed since
			case errors.Is(err, ErrCorrupt):
				_, err := unlinkAt(t.att, name)
				errs = append(errs, err)
			case err != nil:
				errs = append(errs, err)
			default:
				errs = append(errs, t.ensureEntry(r.CgroupID, name))
			}
		}
	}
	ids, err := t.cgroupIDs()
	errs = append(errs, err)
	for _, id := range ids {
		_, readErr, sweepErr := t.sweepCgroup(id, "")
		errs = append(errs, readErr, sweepErr)
	}
	return errors.Join(errs...)
}

// tree is an opened run directory.
type tree struct {
	s   *Store
	run *os.File
	att *os.File // attachments/
}

// open opens the run directory for one operation. Without create, the error
// wraps fs.ErrNotExist where no record was ever written.
func (s *Store) open(create bool) (*tree, error) {
	run, err := OpenRunDir(s.dir, create)
	if err != nil {
		return nil, err
	}
	att, err := openSub(run, attachmentsDir, create)
	if err != nil {
		run.Close()
		return nil, err
	}
	return &tree{s: s, run: run, att: att}, nil
}

func (t *tree) close() {
	t.att.Close()
	t.run.Close()
}

// read reads the record in attachments/<file>, and what fstat says of it.
func (t *tree) read(file string) (Record, unix.Stat_t, error) {
	var st unix.Stat_t
	f, err := openAt(t.att, file, unix.O_RDONLY, 0)
	switch {
	case errors.Is(err, unix.ENOENT):
		return Record{}, st, ErrNotFound
	case errors.Is(err, unix.ELOOP), errors.Is(err, unix.ENXIO):
		return Record{}, st, fmt.Errorf("%s: %w: not a regular file", filepath.Join(t.att.Name(), file), ErrCorrupt)
	case err != nil:
		return Record{}, st, err
	}
	defer f.Close()
	if err := fstat(f, &st); err != nil {
		return Record{}, st, &fs.PathError{Op: "stat", Path: f.Name(), Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return Record{}, st, fmt.Errorf("%s: %w: not a regular file", f.Name(), ErrCorrupt)
	}
	data, err := io.ReadAll(io.LimitReader(f, maxRecord+1))
	if err != nil {
		return Record{}, st, err
	}
	if len(data) > maxRecord {
		return Record{}, st, fmt.Errorf("%s: %w: longer than %d bytes", f.Name(), ErrCorrupt, maxRecord)
	}
	r, err := decode(data)
	if err != nil {
		return Record{}, st, fmt.Errorf("%s: %w", f.Name(), err)
	}
	if r.Key.FileName() != file {
		return Record{}, st, fmt.Errorf("%s: %w: it is the record of another attachment (%s)", f.Name(), ErrCorrupt, r.Key.describe())
	}
	now := t.s.boot()
	r.Stale = r.boot != "" && now != "" && r.boot != now
	r.boot = ""
	return r, st, nil
}

// createTemp creates attachments/.tmp-<nonce>, locked. The caller closes it,
// which releases the lock.
func (t *tree) createTemp() (f *os.File, nonce string, err error) {
	for range maxTries {
		nonce = newNonce()
		f, err = openAt(t.att, tempPrefix+nonce, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL, 0o600)
		if err != nil {
			return nil, "", err
		}
		t.s.did("temporary file created")
		// A sweeper may have come between: then it has the lock, or has
		// removed the name already.
		locked, err := tryFlock(f)
		var st unix.Stat_t
		if err == nil && locked {
			if err = fstat(f, &st); err == nil && st.Nlink > 0 {
				return f, nonce, nil
			}
		}
		f.Close()
		if _, uerr := unlinkAt(t.att, tempPrefix+nonce); err != nil || uerr != nil {
			return nil, "", errors.Join(err, uerr)
		}
	}
	return nil, "", fmt.Errorf("create temporary file in %s: it is removed again and again", t.att.Name())
}

// newNonce returns digits that no other name has.
func newNonce() string {
	var random [nonceLen / 2]byte
	rand.Read(random[:]) // never fails
	return hex.EncodeToString(random[:])
}

// sweepTemp removes a temporary file whose writer is dead.
func (t *tree) sweepTemp(name string) error {
	f, err := openAt(t.att, name, unix.O_RDONLY, 0)
	switch {
	case errors.Is(err, unix.ENOENT):
		return nil
	case errors.Is(err, unix.ELOOP), errors.Is(err, unix.ENXIO):
		// Not made by createTemp.
	case err != nil:
		return err
	default:
		defer f.Close()
		if locked, err := tryFlock(f); err != nil || !locked {
			return err
		}
	}
	_, err = unlinkAt(t.att, name)
	return err
}

func (t *tree) rename(from, to string) error {
	err := retry(func() error { return unix.Renameat(int(t.att.Fd()), from, int(t.att.Fd()), to) })
	if err != nil {
		return &os.LinkError{Op: "rename", Old: filepath.Join(t.att.Name(), from), New: filepath.Join(t.att.Name(), to), Err: err}
	}
	return nil
}

// exchange renames where there is something to replace, else it returns ErrNotFound.
func (t *tree) exchange(from, to string) error {
	dir := int(t.att.Fd())
	err := retry(func() error { return unix.Renameat2(dir, from, dir, to, unix.RENAME_EXCHANGE) })
	if errors.Is(err, unix.ENOENT) {
		return ErrNotFound
	}
	if err != nil {
		return &os.LinkError{Op: "exchange", Old: filepath.Join(t.att.Name(), from), New: filepath.Join(t.att.Name(), to), Err: err}
	}
	_, _ = unlinkAt(t.att, from) // the old record has the name of a temporary file now
	return nil
}

func isTemp(name string) bool {
	nonce, ok := strings.CutPrefix(name, tempPrefix)
	return ok && isHex(nonce, nonceLen)
}

func isRecord(name string) bool {
	hash, ok := strings.CutSuffix(name, recordSuffix)
	return ok && isHex(hash, hashLen)
}

func isHex(s string, length int) bool {
	return len(s) == length && strings.Trim(s, "0123456789abcdef") == ""
}

// readNames returns the sorted names in dir; none if dir was removed after it
// was opened.
func readNames(dir *os.File) ([]string, error) {
	names, err := dir.Readdirnames(-1)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	slices.Sort(names)
	return names, nil
}

func cgroupName(id uint64) string { return strconv.FormatUint(id, 10) }
