// Package podcgroup finds the pod-level cgroup v2 directory of a CNI ADD: the
// one whose children are the cgroups of the pod's containers, so that a BPF
// program attached to it covers all of them, also those not yet created.
//
// Three ways are tried in this order, because each knows less than the one
// before:
//
//  1. runtimeConfig.cgroupPath. containerd 1.7.0 and later pass the kubelet's
//     path verbatim (containerd, internal/cri/server/sandbox_run.go,
//     cniNamespaceOpts). CRI-O 1.28 and later pass what their cgroup manager
//     made of it (CRI-O, server/sandbox_network.go, newPodNetwork): verbatim
//     with cgroupfs, only the last component, such as
//     kubepods-burstable-podX.slice, with systemd (CRI-O,
//     internal/config/cgmgr/systemd_linux.go, SandboxCgroupPath). That name is
//     expanded as systemd does it.
//  2. K8S_POD_UID: a directory at exactly the depth where the kubelet makes pod
//     cgroups. Containers' cgroups may be writable by their tenants, so nothing
//     below a pod is ever looked at.
//  3. CNI_NETNS: the cgroup of a process in that network namespace. Runtimes
//     that run CNI from an OCI hook have one: nerdctl passes /proc/PID/ns/net
//     of the container's first process (nerdctl, pkg/ocihook/ocihook.go,
//     getNetNSPath), which runc and crun have put into its cgroup before the
//     createRuntime hooks run. Under Kubernetes no process exists at ADD.
//
// Whatever a caller passes, a directory is returned only if it is on cgroup2,
// lies below the root, is reached without a symbolic link, a mount point or
// "..", and is not one that other pods or this process share.
package podcgroup

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

var (
	// ErrNoCgroup2 is returned by [FindRoot] and [Finder.Find] where no cgroup v2
	// hierarchy is mounted.
	ErrNoCgroup2 = errors.New("no cgroup v2 hierarchy")
	// ErrNotFound is returned by [Finder.Find] if no cgroup answers the request.
	ErrNotFound = errors.New("pod cgroup not found")
	// ErrAmbiguous is returned by [Finder.Find] if more than one cgroup does.
	ErrAmbiguous = errors.New("more than one pod cgroup found")
	// ErrRefused is returned by [Finder.Find] for a request that is malformed, or
	// that leads to a directory which is not one pod's own cgroup.
	ErrRefused = errors.New("pod cgroup refused")
)

// Request is what a CNI ADD knows of a pod. An empty field is not known.
type Request struct {
	Path   string // runtimeConfig.cgroupPath
	PodUID string // K8S_POD_UID
	NetNS  string // CNI_NETNS
}

// Pod is an open pod-level cgroup directory. The caller closes Dir.
type Pod struct {
	Dir *os.File
	// ID is the cgroup id, as bpf_get_current_cgroup_id returns it: the inode
	// number of the directory (64 bits since Linux 5.5).
	ID     uint64
	Path   string // relative to the cgroup root, begins with "/"
	Source string // "cgroupPath", "podUID" or "netns"
}

// Values of [Pod.Source].
const (
	sourcePath  = "cgroupPath"
	sourceUID   = "podUID"
	sourceNetNS = "netns"
)

// Finder looks for pod cgroups. It keeps no state and may be used by many
// goroutines.
type Finder struct {
	Root string // the cgroup2 mount point, or a directory below it
	Proc string // the procfs mount point, /proc if empty

	// Set by tests only.
	fsType    func(fd int) (int64, error) // nil: fstatfs(2)
	noOpenat2 bool                        // walk by openat(2), as without openat2(2)
}

// Find opens the pod-level cgroup directory of a CNI ADD.
//
// A way of finding it that leads nowhere gives way to the next one; a refusal
// ends the search, since what follows would be a guess. The error wraps one of
// this package's sentinels, ctx.Err() if ctx ended the search, or the errno of a
// system call that failed. The caller closes the returned Pod's Dir.
func (f Finder) Find(ctx context.Context, req Request) (*Pod, error) {
	t, err := f.open()
	if err != nil {
		return nil, err
	}
	defer t.close()

	if err := t.refuseHostNetNS(req.NetNS); err != nil {
		return nil, err
	}
	ways := []struct {
		value string
		find  func(context.Context, Request) (*Pod, error)
	}{
		{req.Path, t.byPath},
		{req.PodUID, t.byUID},
		{req.NetNS, t.byNetNS},
	}
	var misses []string
	for _, way := range ways {
		if way.value == "" {
			continue
		}
		if err := ctx.Err(); err != nil {
			return nil, fmt.Errorf("find pod cgroup below %s: %w", f.Root, err)
		}
		pod, err := way.find(ctx, req)
		if !errors.Is(err, ErrNotFound) {
			return pod, err
		}
		misses = append(misses, strings.TrimPrefix(err.Error(), ErrNotFound.Error()+": "))
	}
	if len(misses) == 0 {
		misses = append(misses, "the runtime passed neither a cgroup path nor K8S_POD_UID nor CNI_NETNS")
	}
	advice := "; check that the kubelet and the runtime use the same cgroup driver, and this cgroup root"
	if req.Path == "" {
		advice = `; let the runtime pass the path: "capabilities": {"cgroupPath": true} in the network configuration, with containerd 1.7, CRI-O 1.28 or later`
	}
	return nil, fmt.Errorf("%w: %s%s", ErrNotFound, strings.Join(misses, "; "), advice)
}

// tree is an open cgroup root. Paths below it are slices of components; the
// root itself is the empty slice.
type tree struct {
	Finder
	fd  int
	dev uint64

	// self is the cgroup of this process, base the directory that Root shows as
	// its own root, both as /proc/self/cgroup and mountinfo spell them.
	self, base       []string
	selfErr, baseErr error

	visited int // directories read by the search for kubepods cgroups
}

func (f Finder) open() (*tree, error) {
	if f.Proc == "" {
		f.Proc = "/proc"
	}
	if f.fsType == nil {
		f.fsType = fstatfsType
	}
	fd, err := openRoot(f.Root, f.fsType)
	if err != nil {
		return nil, err
	}
	t := &tree{Finder: f, fd: fd}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		t.close()
		return nil, fmt.Errorf("stat cgroup root %s: %w", f.Root, err)
	}
	t.dev = st.Dev
	t.base, t.baseErr = mountBase(f.Proc, f.Root)
	t.self, t.selfErr = readCgroup(unix.AT_FDCWD, filepath.Join(f.Proc, "self/cgroup"))
	return t, nil
}

func (t *tree) close() { unix.Close(t.fd) }

// pod makes a Pod of fd, a directory opened below the root, and takes fd over.
func (t *tree) pod(fd int, comps []string, source string) (*Pod, error) {
	p := &Pod{Path: slash(comps), Source: source}
	typ, err := t.fsType(fd)
	if err == nil && typ != unix.CGROUP2_SUPER_MAGIC {
		err = fmt.Errorf("%w: not on cgroup2 (file system type %#x)", ErrRefused, typ)
	}
	var st unix.Stat_t
	if err == nil {
		err = unix.Fstat(fd, &st)
	}
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("check cgroup %s: %w", filepath.Join(t.Root, p.Path), err)
	}
	p.ID = st.Ino
	p.Dir = os.NewFile(uintptr(fd), filepath.Join(t.Root, p.Path))
	return p, nil
}

// refuseShared returns an error if comps is not a cgroup of one pod alone.
func (t *tree) refuseShared(comps []string) error {
	what := ""
	switch {
	case len(comps) == 0:
		what = "it is the cgroup root, which holds everything on the node"
	case t.holdsSelf(comps):
		what = "this process, so the container runtime that started it, runs in it"
	default:
		what = sharedBy(comps)
	}
	if what == "" {
		return nil
	}
	return fmt.Errorf("%w: %s below %s is no pod's own cgroup: %s", ErrRefused, slash(comps), t.Root, what)
}

// holdsSelf reports whether this process is in the cgroup or below it.
func (t *tree) holdsSelf(comps []string) bool {
	self := t.selfBelowRoot()
	return self != nil && hasPrefix(self, comps)
}

// selfBelowRoot returns this process's cgroup relative to the root, nil if it
// is not below the root or not known.
func (t *tree) selfBelowRoot() []string {
	if t.selfErr != nil || t.baseErr != nil || !hasPrefix(t.self, t.base) {
		return nil
	}
	return t.self[len(t.base):]
}

func hasPrefix(path, prefix []string) bool {
	if len(path) < len(prefix) {
		return false
	}
	for i := range prefix {
		if path[i] != prefix[i] {
			return false
		}
	}
	return true
}

func slash(comps []string) string { return "/" + strings.Join(comps, "/") }
