package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/containernetworking/cni/libcni"
	"golang.org/x/sys/unix"
)

// HereOptions describe what [Here] works with.
type HereOptions struct {
	Dir        string   // has a directory for each caller; made if missing, removed by the last one
	CgroupRoot string   // the cgroup2 mount
	PluginDirs []string // where CNI plugins are
	Log        io.Writer
	// Sweeping is called before each pod is deleted that a killed caller left; nil: not.
	Sweeping func(pod, network string)
}

// Here returns this machine as a node, for pods beside those that it has: they are
// made in this process's namespaces by whatever conflist. The node has a directory and a
// cgroup of its own, and a record of each attachment, from which [SweepHere] deletes what
// a killed caller left. Close removes its pods, its directory and its cgroup, and
// nothing else: BPFFS, RunDir and NetNS are not set.
//
// The error wraps [ErrPrivilege] if the caller lacks the right.
func Here(ctx context.Context, o HereOptions) (*Node, error) {
	if os.Geteuid() != 0 {
		return nil, ErrPrivilege
	}
	if err := SweepHere(ctx, o); err != nil {
		return nil, err
	}
	cgroup, cgroupLock, err := lockedDir(o.CgroupRoot)
	if err != nil {
		return nil, err
	}
	dir, dirLock, err := lockedDirIn(o.Dir)
	if err != nil {
		return nil, errors.Join(err, os.Remove(cgroup), cgroupLock.Close())
	}
	n := &Node{
		Name: filepath.Base(dir), Dir: dir, CgroupRoot: cgroup,
		CacheDir: filepath.Join(dir, "cache"), pluginDirs: o.PluginDirs, log: o.Log,
		ownPaths: true, journal: true, locks: []*os.File{cgroupLock, dirLock},
		cgroups: []string{cgroup},
	}
	if n.log == nil {
		n.log = io.Discard
	}
	if n.thread, err = newThread(func() error { return nil }); err != nil {
		return nil, errors.Join(err, n.Close())
	}
	return n, nil
}

// lockedDirIn makes parent, too. The last of its users removes it, which may be right
// after it was found to be there.
func lockedDirIn(parent string) (string, *os.File, error) {
	for {
		if err := os.MkdirAll(parent, 0o700); err != nil {
			return "", nil, fmt.Errorf("make a directory for pods: %w", err)
		}
		dir, lock, err := lockedDir(parent)
		if !errors.Is(err, fs.ErrNotExist) {
			return dir, lock, err
		}
	}
}

// removeEmpty removes a directory unless it is in use.
func removeEmpty(dir string) error {
	err := os.Remove(dir)
	if errors.Is(err, unix.ENOTEMPTY) {
		return nil
	}
	return ignoreMissing(err)
}

// SweepHere removes what callers of [Here] left when they were killed: attachments
// (with DEL, so that leases and interfaces go), network namespaces, directories,
// cgroups. What a live caller has is not touched. A pod is deleted by the plugins that made
// it, or else by those in PluginDirs; if one of them fails, its record stays for another
// try.
func SweepHere(ctx context.Context, o HereOptions) error {
	err := Sweep(ctx, o.CgroupRoot)
	ctx, cancel := context.WithTimeout(ctx, closeTimeout)
	defer cancel()
	podsErr := sweep(o.Dir, func(dir string) error { return sweepPods(ctx, dir, o) })
	if podsErr == nil {
		podsErr = removeEmpty(o.Dir)
	}
	if _, missing := os.Stat(o.Dir); errors.Is(missing, fs.ErrNotExist) {
		podsErr = nil // there are none, or the last one's caller has just removed it
	}
	return errors.Join(err, podsErr)
}

// sweepPods deletes the pods of a killed caller.
func sweepPods(ctx context.Context, dir string, o HereOptions) error {
	records, err := filepath.Glob(filepath.Join(dir, journalPrefix+"*"))
	if err != nil {
		return err
	}
	own, err := newThread(func() error { return nil })
	if err != nil {
		return err
	}
	var failed []error
	for _, path := range records {
		failed = append(failed, deleteRecorded(ctx, own, path, o))
	}
	failed = append(failed, own.close())
	if err := errors.Join(failed...); err != nil {
		return err // the records stay, for another try
	}
	namespaces, err := filepath.Glob(filepath.Join(dir, "netns-*"))
	if err != nil {
		return err
	}
	for _, path := range namespaces {
		if err := removeNetNS(path); err != nil {
			return err
		}
	}
	return os.RemoveAll(dir)
}

// journalPrefix begins the names of the files that record attachments.
const journalPrefix = "attachment-"

// A record is all that DEL needs.
type record struct {
	Conflist   json.RawMessage
	Runtime    libcni.RuntimeConf
	PluginDirs []string
	CgroupRoot string // has the caller's cgroup
}

func (p *Pod) recordPath(ifName string) string {
	return filepath.Join(p.node.Dir, journalPrefix+p.ID+"-"+strings.ReplaceAll(ifName, "/", "_"))
}

// note records an attachment before ADD, so that whatever ADD has done by the time
// the process is killed can be undone.
func (p *Pod) note(list *libcni.NetworkConfigList, ifName string) error {
	if !p.node.journal {
		return nil
	}
	content, err := json.Marshal(record{list.Bytes, *p.RuntimeConf(ifName), p.node.pluginDirs, filepath.Dir(p.node.CgroupRoot)})
	if err == nil {
		err = os.WriteFile(p.recordPath(ifName), content, 0o600)
	}
	if err != nil {
		return fmt.Errorf("record an attachment: %w", err)
	}
	return nil
}

// forgetNote drops the record after DEL.
func (p *Pod) forgetNote(ifName string) error {
	if !p.node.journal {
		return nil
	}
	return ignoreMissing(os.Remove(p.recordPath(ifName)))
}

// deleteRecorded looks for plugins where ADD found them, and in further directories.
func deleteRecorded(ctx context.Context, own *thread, path string, o HereOptions) error {
	content, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	var r record
	if err := json.Unmarshal(content, &r); err != nil {
		// Written in part: the process was killed before it called ADD.
		return os.Remove(path)
	}
	list, err := libcni.NetworkConfFromBytes(r.Conflist)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	if o.Sweeping != nil {
		o.Sweeping(r.Runtime.ContainerID, list.Name)
	}
	if r.CgroupRoot != "" && r.CgroupRoot != o.CgroupRoot {
		if err := Sweep(ctx, r.CgroupRoot); ignoreMissing(err) != nil {
			return err
		}
	}
	cni := libcni.NewCNIConfigWithCacheDir(append(r.PluginDirs, o.PluginDirs...), filepath.Join(filepath.Dir(path), "cache"), &pluginExec{thread: own, log: io.Discard})
	if err := cni.DelNetworkList(ctx, list, &r.Runtime); err != nil {
		return fmt.Errorf("delete pod %s, which a killed one left in network %s: %w", r.Runtime.ContainerID, list.Name, err)
	}
	return os.Remove(path)
}

// unlock lets go of the directories that [Here] holds.
func (n *Node) unlock() error {
	var failed []error
	for _, lock := range n.locks {
		_ = unix.Flock(int(lock.Fd()), unix.LOCK_UN)
		failed = append(failed, lock.Close())
	}
	n.locks = nil
	return errors.Join(failed...)
}
