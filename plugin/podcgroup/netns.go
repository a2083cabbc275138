package podcgroup

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// maxProcs bounds how many processes a search looks at: some 0.2 s.
const maxProcs = 65536

// netns identifies a network namespace: device and inode number of its file on
// nsfs, through whichever path it is reached (namespaces(7)).
type netns struct{ dev, ino uint64 }

func statNetNS(dirfd int, path string) (netns, error) {
	var st unix.Stat_t
	if err := unix.Fstatat(dirfd, path, &st, 0); err != nil {
		return netns{}, &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	return netns{st.Dev, st.Ino}, nil
}

// refuseHostNetNS returns an error if CNI_NETNS is this process's network
// namespace or that of process 1. Runtimes do not call CNI for pods on the
// host's network; were one to, the node's own connections would be meant.
func (t *tree) refuseHostNetNS(path string) error {
	if path == "" {
		return nil
	}
	if !filepath.IsAbs(path) || checkText(path) != nil {
		return fmt.Errorf("%w: CNI_NETNS %.256q is not an absolute path", ErrRefused, path)
	}
	ns, err := statNetNS(unix.AT_FDCWD, path)
	if err != nil {
		return nil // only byNetNS needs it
	}
	for _, pid := range []string{"self", "1"} {
		host, err := statNetNS(unix.AT_FDCWD, filepath.Join(t.Proc, pid, "ns/net"))
		if err == nil && host == ns {
			return fmt.Errorf("%w: CNI_NETNS %s is the host's network namespace", ErrRefused, path)
		}
	}
	return nil
}

// byNetNS finds the cgroup of a process in CNI_NETNS.
func (t *tree) byNetNS(ctx context.Context, req Request) (*Pod, error) {
	if t.selfErr != nil {
		return nil, fmt.Errorf("%w: cannot tell a pod's cgroup from the runtime's: %w", ErrRefused, t.selfErr)
	}
	if t.baseErr != nil {
		return nil, fmt.Errorf("%w: cannot tell which cgroups %s shows: %w", ErrRefused, t.Root, t.baseErr)
	}
	ns, err := statNetNS(unix.AT_FDCWD, req.NetNS)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: CNI_NETNS %s does not exist", ErrNotFound, req.NetNS)
	}
	if err != nil {
		return nil, fmt.Errorf("look at CNI_NETNS: %w", err)
	}
	self, err := statNetNS(unix.AT_FDCWD, filepath.Join(t.Proc, "self/ns/net"))
	if err != nil {
		return nil, fmt.Errorf("look at own network namespace: %w", err)
	}
	if ns.dev != self.dev { // nsfs has one device number
		return nil, fmt.Errorf("%w: CNI_NETNS %s is not a network namespace", ErrRefused, req.NetNS)
	}

	var comps []string
	if pid := netnsPID(req.NetNS, t.Proc); pid != "" {
		comps, err = t.process(pid, ns)
		if err == nil && comps == nil {
			err = fmt.Errorf("%w: process %s of CNI_NETNS %s has ended", ErrNotFound, pid, req.NetNS)
		}
	} else {
		comps, err = t.scan(ctx, req.NetNS, ns)
	}
	if err != nil {
		return nil, err
	}
	if err := refuseOtherPod(comps, req.PodUID); err != nil {
		return nil, err
	}
	fd, err := t.openBelow(comps)
	if err != nil {
		return nil, err
	}
	return t.pod(fd, comps, sourceNetNS)
}

// netnsPID returns PID of /proc/PID/ns/net, "" for any other path.
func netnsPID(path, proc string) string {
	for _, prefix := range []string{"/proc", filepath.Clean(proc)} {
		rest, ok := strings.CutPrefix(path, prefix+"/")
		if !ok {
			continue
		}
		if pid, ok := strings.CutSuffix(rest, "/ns/net"); ok && isPID(pid) {
			return pid
		}
	}
	return ""
}

func isPID(s string) bool {
	return s != "" && len(s) <= 10 && s[0] != '0' && strings.Trim(s, "0123456789") == ""
}

// process returns the pod-level cgroup of a process in namespace ns, nil if
// there is no such process.
func (t *tree) process(pid string, ns netns) ([]string, error) {
	// The open directory stays with this process: if it ends, reads fail with
	// ESRCH, even if another process gets its number.
	dir, err := unix.Open(filepath.Join(t.Proc, pid), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, nil
	}
	defer unix.Close(dir)
	if got, err := statNetNS(dir, "ns/net"); err != nil || got != ns {
		return nil, nil
	}
	path, err := readCgroup(dir, "cgroup")
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("%w: cgroup of process %s: %w", ErrRefused, pid, err)
	}
	if !hasPrefix(path, t.base) {
		return nil, fmt.Errorf("%w: process %s is in cgroup %s, which is not below %s", ErrRefused, pid, slash(path), t.Root)
	}
	comps, err := t.podLevel(path[len(t.base):])
	if err == nil {
		err = t.refuseShared(comps)
	}
	if err != nil {
		return nil, fmt.Errorf("process %s: %w", pid, err)
	}
	return comps, nil
}

// scan returns the one pod-level cgroup of all processes in namespace ns.
// Processes whose cgroup is refused, such as the runtime's helpers, count only
// if there is no other.
func (t *tree) scan(ctx context.Context, path string, ns netns) ([]string, error) {
	proc, err := os.Open(t.Proc)
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	defer proc.Close()

	var found []string
	var comps []string
	var refused error
	for seen := 0; ; {
		names, err := proc.Readdirnames(256)
		if err == io.EOF {
			break
		}
		if err != nil {
			return nil, fmt.Errorf("list processes: %w", err)
		}
		for _, pid := range names {
			if !isPID(pid) {
				continue
			}
			if err := ctx.Err(); err != nil {
				return nil, fmt.Errorf("look for a process in CNI_NETNS %s: %w", path, err)
			}
			if seen++; seen > maxProcs {
				return nil, fmt.Errorf("%w: gave up looking for a process in CNI_NETNS %s after %d processes", ErrNotFound, path, maxProcs)
			}
			got, err := statNetNS(unix.AT_FDCWD, filepath.Join(t.Proc, pid, "ns/net"))
			if err != nil || got != ns { // process checks it again, at three times the cost
				continue
			}
			c, err := t.process(pid, ns)
			if err == nil && c != nil && strings.HasSuffix(c[len(c)-1], ".service") {
				// An agent that entered the namespace, such as a DHCP daemon.
				err = fmt.Errorf("%w: process %s in CNI_NETNS %s belongs to system service %s, not to a container", ErrRefused, pid, path, slash(c))
			}
			switch {
			case err != nil:
				if refused == nil {
					refused = err
				}
			case c != nil && !slices.Contains(found, slash(c)):
				found, comps = append(found, slash(c)), c
			}
		}
	}
	switch {
	case len(found) == 1:
		return comps, nil
	case len(found) > 1:
		slices.Sort(found)
		return nil, fmt.Errorf("%w: processes in CNI_NETNS %s are in %s below %s", ErrAmbiguous, path, strings.Join(found, " and "), t.Root)
	case refused != nil:
		return nil, refused
	}
	return nil, fmt.Errorf("%w: no process is in CNI_NETNS %s yet", ErrNotFound, path)
}

// refuseOtherPod returns an error if comps is the cgroup of a Kubernetes pod
// other than uid: whoever is in a pod's namespace need not belong to it.
func refuseOtherPod(comps []string, uid string) error {
	last := len(comps) - 1
	for i := range comps {
		if uid == "" || !kubepodsAt(comps, i) || kubepodsDepth(comps, i) != len(comps) {
			continue
		}
		got, _ := isPodName(comps[last-1], comps[last])
		if strings.ReplaceAll(got, "-", "_") != strings.ReplaceAll(uid, "-", "_") {
			return fmt.Errorf("%w: the process in CNI_NETNS is in %s, not in the cgroup of K8S_POD_UID %s", ErrRefused, slash(comps), uid)
		}
	}
	return nil
}

// readCgroup returns the cgroup v2 path in a /proc/PID/cgroup file: its line
// "0::PATH" (cgroups(7)). The path is relative to the root of this process's
// cgroup namespace; what is outside begins with "/.." (cgroup_namespaces(7))
// and is an error.
func readCgroup(dirfd int, path string) ([]string, error) {
	fd, err := unix.Openat(dirfd, path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	file := os.NewFile(uintptr(fd), path)
	defer file.Close()
	data, err := io.ReadAll(io.LimitReader(file, 1<<16))
	if err != nil {
		return nil, err
	}
	return parseCgroup(string(data))
}

func parseCgroup(data string) ([]string, error) {
	for line := range strings.SplitSeq(data, "\n") {
		path, ok := strings.CutPrefix(line, "0::")
		if !ok {
			continue
		}
		if path == "/.." || strings.HasPrefix(path, "/../") {
			return nil, fmt.Errorf("%.256q is outside this process's cgroup namespace; run the plugin in the host's", path)
		}
		if !strings.HasPrefix(path, "/") {
			return nil, fmt.Errorf("malformed line %.256q", line)
		}
		return splitPath(path)
	}
	return nil, errors.New("no cgroup v2 line (0::)")
}
