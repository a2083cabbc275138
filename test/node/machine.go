package node

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	sysfsCgroup   = "/sys/fs/cgroup"
	defaultBPFFS  = "/sys/fs/bpf"
	defaultRunDir = "/run/skipstack"
	// nodesDir holds one directory for each node; /run is private here.
	nodesDir = "/run/skipstack-nodes"
	// initCgroup holds the isolated program itself, away from the pods.
	initCgroup = "init"
)

// Machine is what [Isolate] gives a program: a place with nothing in it.
type Machine struct {
	// Patience is how long Leftovers waits for things that the kernel takes down by and
	// by; Prepare sets half a minute, for machines that stand still now and then.
	Patience time.Duration

	// What was there after Prepare.
	mounts []string
	links  []string
	files  []string // in /run and /sys/fs/bpf, where some kernels put preloaded iterators
}

// Prepare makes the namespaces that [Isolate] gave this process habitable:
// /proc, a private /run, a private bpffs on /sys/fs/bpf, the process's own cgroup
// as root of the cgroup2 mount, lo up. The cgroup2 mount is where the machine has its,
// beside those of version 1, or see [Command.UnifiedCgroups]. Call it once, before anything else.
func Prepare() (*Machine, error) {
	if !Isolated() {
		return nil, errors.New("prepare a private machine: the process was not started by Isolate")
	}
	cgroups, err := cgroupRoot()
	if err != nil {
		return nil, err
	}
	if os.Getenv(unifiedEnv) != "" {
		cgroups = sysfsCgroup
	}
	// The same file system is not mounted twice on one directory. What is mounted
	// below it goes, too.
	if err := unix.Unmount(cgroups, unix.MNT_DETACH); err != nil {
		return nil, fmt.Errorf("unmount %s: %w", cgroups, err)
	}
	for _, m := range []struct {
		fsType, dir, data string
		flags             uintptr
	}{
		{"proc", "/proc", "", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC},
		{"tmpfs", "/run", "mode=0755", unix.MS_NOSUID | unix.MS_NODEV},
		{"bpf", defaultBPFFS, "mode=0700", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC},
		{"cgroup2", cgroups, "", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC},
	} {
		if err := unix.Mount(m.fsType, m.dir, m.fsType, m.flags, m.data); err != nil {
			return nil, fmt.Errorf("mount %s on %s: %w", m.fsType, m.dir, err)
		}
	}
	self := filepath.Join(cgroups, initCgroup)
	if err := os.Mkdir(self, 0o755); err != nil {
		return nil, fmt.Errorf("make a cgroup: %w", err)
	}
	if err := os.WriteFile(filepath.Join(self, "cgroup.procs"), []byte("0"), 0); err != nil {
		return nil, fmt.Errorf("enter cgroup %s: %w", self, err)
	}
	if err := os.Mkdir(nodesDir, 0o755); err != nil {
		return nil, fmt.Errorf("make a directory for nodes: %w", err)
	}
	if err := loopbackUp(); err != nil {
		return nil, err
	}
	m := &Machine{Patience: 30 * time.Second}
	if m.mounts, err = mounts(); err != nil {
		return nil, err
	}
	if m.links, err = linkNames(); err != nil {
		return nil, err
	}
	m.files, err = privateFiles()
	return m, err
}

// Leftovers says, one line each, what is left of nodes and pods once all nodes
// were closed: processes, mounts, network namespaces, links, cgroups, pins, files.
// It waits for things that go by and by.
func (m *Machine) Leftovers() ([]string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), m.Patience)
	defer cancel()
	for {
		left, err := m.leftovers()
		if err != nil || len(left) == 0 || sleep(ctx, 5*time.Millisecond) != nil {
			return left, err
		}
	}
}

func (m *Machine) leftovers() ([]string, error) {
	var left []string
	mounted, err := mounts()
	if err != nil {
		return nil, err
	}
	for _, line := range mounted {
		if !slices.Contains(m.mounts, line) {
			left = append(left, "mount: "+line)
		}
	}
	links, err := linkNames()
	if err != nil {
		return nil, err
	}
	for _, name := range links {
		if !slices.Contains(m.links, name) {
			left = append(left, "link: "+name)
		}
	}
	files, err := privateFiles()
	if err != nil {
		return nil, err
	}
	for _, path := range files {
		if slices.Contains(m.files, path) {
			continue
		}
		kind := "file: "
		if strings.HasPrefix(path, defaultBPFFS) {
			kind = "pin: "
		}
		left = append(left, kind+path)
	}
	for _, find := range []func() ([]string, error){leftProcesses, leftThreads, leftCgroups} {
		more, err := find()
		if err != nil {
			return nil, err
		}
		left = append(left, more...)
	}
	return left, nil
}

// leftProcesses reaps what was orphaned, then lists every process but this one.
func leftProcesses() ([]string, error) {
	for {
		if pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil); err != nil || pid <= 0 {
			break
		}
	}
	names, err := entryNames("/proc")
	if err != nil {
		return nil, err
	}
	var left []string
	for _, name := range names {
		pid, err := strconv.Atoi(name)
		if err != nil || pid == os.Getpid() {
			continue
		}
		cmdline, err := os.ReadFile(filepath.Join("/proc", name, "cmdline"))
		if err != nil {
			continue // it has just ended
		}
		left = append(left, fmt.Sprintf("process: %d %s", pid, strings.TrimRight(strings.ReplaceAll(string(cmdline), "\x00", " "), " ")))
	}
	return left, nil
}

// leftThreads lists threads of this process that stayed in a node's network namespace.
func leftThreads() ([]string, error) {
	home, err := os.Readlink("/proc/thread-self/ns/net") // the first thread, /proc/self, may be what is left
	if err != nil {
		return nil, fmt.Errorf("read the network namespace: %w", err)
	}
	tasks, err := entryNames("/proc/self/task")
	if err != nil {
		return nil, err
	}
	var left []string
	for _, tid := range tasks {
		ns, err := os.Readlink(filepath.Join("/proc/self/task", tid, "ns/net"))
		if err == nil && ns != home {
			left = append(left, fmt.Sprintf("network namespace: %s held by thread %s", ns, tid))
		}
	}
	return left, nil
}

func leftCgroups() ([]string, error) {
	root, err := cgroupRoot()
	if err != nil {
		return nil, err
	}
	dirs, err := subCgroups(root)
	if err != nil {
		return nil, err
	}
	var left []string
	for _, dir := range dirs {
		if dir != root && dir != filepath.Join(root, initCgroup) {
			left = append(left, "cgroup: "+dir)
		}
	}
	return left, nil
}

// mounts lists the mounts of this namespace: id, mount point and file system.
func mounts() ([]string, error) {
	info, err := os.ReadFile("/proc/thread-self/mountinfo") // the first thread, /proc/self, may have unshared
	if err != nil {
		return nil, fmt.Errorf("list mounts: %w", err)
	}
	var list []string
	for line := range strings.Lines(string(info)) {
		// proc_pid_mountinfo(5): id, parent, device, root, mount point, ... - type, ...
		before, after, _ := strings.Cut(line, " - ")
		if f, super := strings.Fields(before), strings.Fields(after); len(f) > 4 && len(super) > 0 {
			list = append(list, fmt.Sprintf("%s %s (%s)", f[0], f[4], super[0]))
		}
	}
	return list, nil
}

// privateFiles lists what is in the directories that Prepare made private.
func privateFiles() ([]string, error) {
	files, err := filesBelow("/run")
	if err != nil {
		return nil, err
	}
	pins, err := filesBelow(defaultBPFFS)
	return append(files, pins...), err
}

// filesBelow lists everything below dir; a missing dir has nothing.
func filesBelow(dir string) ([]string, error) {
	var found []string
	err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err == nil && path != dir {
			found = append(found, path)
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("list files: %w", err)
	}
	return found, nil
}

func entryNames(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("list files: %w", err)
	}
	names := make([]string, len(entries))
	for i, e := range entries {
		names[i] = e.Name()
	}
	return names, nil
}

// linkNames lists the links of the calling thread's network namespace.
func linkNames() ([]string, error) {
	links, err := netlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	names := make([]string, len(links))
	for i, l := range links {
		names[i] = l.Attrs().Name
	}
	return names, nil
}

// loopbackUp brings up lo in the calling thread's network namespace.
func loopbackUp() error {
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	if err != nil {
		return fmt.Errorf("bring up lo: %w", err)
	}
	return nil
}
