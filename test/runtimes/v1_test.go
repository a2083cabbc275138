package runtimes_test

import (
	"bufio"
	"bytes"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/test/node"
)

// The private machine of the tests has a cgroup2 tree of its own, but sees the real
// one's hierarchies of cgroup version 1. A runtime makes cgroups there, too. So the
// tests cover them with cgroups of their own, which must be the root of the runtime's
// cgroup namespace: runc compares what it reads there with what is mounted.

const (
	// v1Prefix begins the names of those cgroups.
	v1Prefix   = "skipstack-runtimes-"
	mountV1    = "mount-v1" // worker
	cgroupRoot = "/sys/fs/cgroup"
)

// A hierarchy is a mounted hierarchy of cgroup version 1.
type hierarchy struct {
	dir     string
	options string // of mount(2), which name the hierarchy
}

func hierarchies() ([]hierarchy, error) {
	info, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	var all []hierarchy
	for lines := bufio.NewScanner(bytes.NewReader(info)); lines.Scan(); {
		// proc_pid_mountinfo(5): id, parent, device, root, mount point, ... - type, source, options
		before, after, _ := strings.Cut(lines.Text(), " - ")
		f, super := strings.Fields(before), strings.Fields(after)
		if len(f) < 5 || len(super) < 3 || super[0] != "cgroup" {
			continue
		}
		options := slices.DeleteFunc(strings.Split(super[2], ","), func(o string) bool { return o == "rw" || o == "ro" })
		if slices.ContainsFunc(options, func(o string) bool { return strings.HasPrefix(o, "name=") }) {
			options = append(options, "none")
		}
		all = append(all, hierarchy{f[4], strings.Join(options, ",")})
	}
	return all, nil
}

// ownV1 runs tests with the hierarchies covered.
type ownV1 struct{ *testing.M }

func (o ownV1) Run() int {
	if !node.Isolated() {
		return o.M.Run()
	}
	all, err := hierarchies()
	if err == nil && len(all) > 0 {
		err = makeV1(all, v1Prefix+random())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "cover cgroup version 1:", err)
		return 1
	}
	uncover, err := coverCache()
	if err != nil {
		fmt.Fprintln(os.Stderr, "cover the CNI cache:", err)
		return 1
	}
	exit := o.M.Run()
	if err := uncover(); err != nil {
		fmt.Fprintln(os.Stderr, "uncover the CNI cache:", err)
		exit = max(exit, 1)
	}
	for _, h := range all {
		if err := unix.Unmount(h.dir, unix.MNT_DETACH); err != nil {
			fmt.Fprintf(os.Stderr, "uncover %s: %v\n", h.dir, err)
			exit = max(exit, 1)
		}
	}
	return exit
}

func makeV1(all []hierarchy, name string) error {
	for _, h := range all {
		own := filepath.Join(h.dir, name)
		if err := os.Mkdir(own, 0o755); err != nil {
			return err
		}
		// A new cpuset may use nothing.
		for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
			value, err := os.ReadFile(filepath.Join(h.dir, file))
			if err != nil {
				continue // another hierarchy
			}
			if err := os.WriteFile(filepath.Join(own, file), value, 0); err != nil {
				return err
			}
		}
	}
	if out, err := node.WorkerCommand(mountV1, name).Output(); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
}

// enterV1 lists the files by which a process enters the new roots.
func enterV1() (enter []string, err error) {
	all, err := hierarchies()
	for _, h := range all {
		enter = append(enter, filepath.Join(h.dir, "cgroup.procs"))
	}
	return enter, err
}

// coverV1 is the worker: it makes the cgroups of that name its root, and mounts
// what it sees then.
func coverV1(args []string) int {
	runtime.LockOSThread() // unshare(2) is the thread's
	err := func() error {
		all, err := hierarchies()
		if err != nil {
			return err
		}
		for _, h := range all {
			if err := os.WriteFile(filepath.Join(h.dir, args[0], "cgroup.procs"), []byte("0"), 0); err != nil {
				return err
			}
		}
		if err := unix.Unshare(unix.CLONE_NEWCGROUP); err != nil {
			return fmt.Errorf("unshare the cgroup namespace: %w", err)
		}
		for _, h := range all {
			// A file system is not mounted over itself.
			if err := unix.Unmount(h.dir, unix.MNT_DETACH); err != nil {
				return fmt.Errorf("unmount %s: %w", h.dir, err)
			}
			if err := unix.Mount("cgroup", h.dir, "cgroup", 0, h.options); err != nil {
				return fmt.Errorf("mount %s (%s): %w", h.dir, h.options, err)
			}
		}
		return nil
	}()
	if err != nil {
		fmt.Println(err)
		return 1
	}
	return 0
}

// sweepV1 removes the cgroups that killed tests left. They are empty: processes
// end with the private machine.
func sweepV1() {
	tops, _ := filepath.Glob(filepath.Join(cgroupRoot, "*", v1Prefix+"*"))
	for _, top := range tops {
		removeV1(top)
	}
}

// removeV1 removes a cgroup with those below it.
func removeV1(top string) {
	var dirs []string
	filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			dirs = append(dirs, path)
		}
		return nil
	})
	for _, dir := range slices.Backward(dirs) {
		os.Remove(dir)
	}
}
