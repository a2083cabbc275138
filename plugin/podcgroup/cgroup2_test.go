package podcgroup

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// realNode makes a cgroup on the machine's cgroup2 mount, removed with all that
// is in it, and returns a Finder for the whole mount and that cgroup's path.
func realNode(t *testing.T) (Finder, string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: making cgroups")
	}
	root, err := FindRoot("/sys/fs/cgroup", "/proc")
	if err != nil {
		t.Skipf("needs cgroup v2: %v", err)
	}
	top, err := os.MkdirTemp(root, "skipstack-podcgroup-")
	if err != nil {
		t.Skipf("needs a writable cgroup v2 mount: %v", err)
	}
	t.Cleanup(func() { removeCgroup(t, top) })
	return Finder{Root: root, Proc: "/proc"}, "/" + filepath.Base(top)
}

// removeCgroup removes a cgroup whose processes have ended. The kernel may
// need a moment until it counts a reaped process as gone.
func removeCgroup(t *testing.T, path string) {
	t.Helper()
	var dirs []string
	err := filepath.WalkDir(path, func(p string, d os.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			dirs = append(dirs, p)
		}
		return err
	})
	if err != nil {
		t.Errorf("list %s: %v", path, err)
	}
	for i := len(dirs) - 1; i >= 0; i-- {
		deadline := time.Now().Add(time.Minute)
		for err = unix.Rmdir(dirs[i]); err == unix.EBUSY && time.Now().Before(deadline); err = unix.Rmdir(dirs[i]) {
			time.Sleep(time.Millisecond)
		}
		if err != nil {
			t.Errorf("remove %s: %v", dirs[i], err)
		}
	}
}

// startIn starts a process in a new network namespace and in the cgroup, which
// it makes. The process ends with the test.
func startIn(t *testing.T, f Finder, cgroup string) (pid int) {
	t.Helper()
	path := filepath.Join(f.Root, cgroup)
	if err := os.MkdirAll(path, 0o755); err != nil {
		t.Fatal(err)
	}
	dir, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	cmd := exec.Command("cat")
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWNET,
		UseCgroupFD: true,
		CgroupFD:    int(dir.Fd()),
		Pdeathsig:   syscall.SIGKILL,
	}
	if err := cmd.Start(); err != nil {
		t.Fatalf("start a process in %s: %v", path, err)
	}
	t.Cleanup(func() {
		stdin.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("process in %s: %v", path, err)
		}
	})
	return cmd.Process.Pid
}

func mustFind(t *testing.T, f Finder, req Request, path, source string) {
	t.Helper()
	for _, f.noOpenat2 = range []bool{false, true} {
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		pod, err := f.Find(ctx, req)
		cancel()
		if err != nil {
			t.Errorf("%+v: %v", req, err)
			return
		}
		if pod.Path != path || pod.Source != source {
			t.Errorf("%+v: got %s by %s, want %s by %s", req, pod.Path, pod.Source, path, source)
		}
		// The kernel's own word for a cgroup's id is its file handle.
		handle, _, err := unix.NameToHandleAt(unix.AT_FDCWD, filepath.Join(f.Root, path), 0)
		if err != nil {
			t.Errorf("file handle of %s: %v", path, err)
		} else if id := binary.NativeEndian.Uint64(handle.Bytes()); id != pod.ID {
			t.Errorf("%s: id %d, the kernel says %d", path, pod.ID, id)
		}
		if err := pod.Dir.Close(); err != nil {
			t.Error(err)
		}
	}
}

func TestCgroup2(t *testing.T) {
	f, top := realNode(t)
	// Another run of this test may look at the same hierarchy.
	var random [16]byte
	rand.Read(random[:])
	uid := fmt.Sprintf("%x-%x-%x-%x-%x", random[:4], random[4:6], random[6:8], random[8:10], random[10:])
	cgroupfs := "/kubepods/burstable/pod" + uid
	systemd := "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + strings.ReplaceAll(uid, "-", "_") + ".slice"
	for _, pod := range []string{cgroupfs, systemd} {
		if err := os.MkdirAll(filepath.Join(f.Root, top, pod, ctrID), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	mustFind(t, f, Request{Path: top + systemd}, top+systemd, "cgroupPath")

	nested := f
	nested.Root += top
	mustFind(t, nested, Request{Path: filepath.Base(systemd)}, systemd, "cgroupPath")
	if _, err := f.Find(context.Background(), Request{PodUID: uid}); !errors.Is(err, ErrAmbiguous) {
		t.Errorf("both drivers' cgroups: got %v, want %v", err, ErrAmbiguous)
	}
	removeCgroup(t, filepath.Join(f.Root, top, cgroupfs))
	mustFind(t, f, Request{PodUID: uid}, top+systemd, "podUID")
	mustFind(t, nested, Request{PodUID: uid}, systemd, "podUID")

	for _, path := range []string{"/cgroup.procs", top + "/cgroup.procs", top + systemd + "/../..", "/"} {
		if _, err := f.Find(context.Background(), Request{Path: path}); !errors.Is(err, ErrRefused) {
			t.Errorf("%s: got %v, want %v", path, err, ErrRefused)
		}
	}
	// A file system that only looks like the hierarchy.
	if pod, err := (Finder{Root: t.TempDir()}).Find(context.Background(), Request{Path: "/a"}); !errors.Is(err, ErrNoCgroup2) {
		t.Errorf("plain directory: got %v, %v, want %v", pod, err, ErrNoCgroup2)
	}
}

func TestCgroup2NetNS(t *testing.T) {
	f, top := realNode(t)
	scope := top + "/libpod-" + ctrID + ".scope"
	podman := startIn(t, f, scope+"/container")
	kubelet := startIn(t, f, top+systemdPod+"/cri-containerd-"+ctrID+".scope")

	for _, c := range []struct {
		pid  int
		want string
	}{{podman, scope}, {kubelet, top + systemdPod}} {
		path := fmt.Sprintf("/proc/%d/ns/net", c.pid)
		mustFind(t, f, Request{NetNS: path}, c.want, "netns")

		// As a bind mount does, an open descriptor shows the namespace without
		// telling a process.
		ns, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer ns.Close()
		bound := fmt.Sprintf("/proc/self/fd/%d", ns.Fd())
		mustFind(t, f, Request{NetNS: bound}, c.want, "netns")

		below := f
		below.Root += top
		mustFind(t, below, Request{NetNS: bound}, strings.TrimPrefix(c.want, top), "netns")
	}
	for _, own := range []string{"/proc/self/ns/net", fmt.Sprintf("/proc/%d/ns/net", os.Getpid())} {
		if pod, err := f.Find(context.Background(), Request{NetNS: own, Path: top + systemdPod}); !errors.Is(err, ErrRefused) {
			t.Errorf("own namespace: got %v, %v, want %v", pod, err, ErrRefused)
		}
	}
	if pod, err := f.Find(context.Background(), Request{NetNS: "/proc/self/ns/mnt"}); !errors.Is(err, ErrNotFound) {
		t.Errorf("a namespace of another kind: got %v, %v, want %v", pod, err, ErrNotFound)
	}
	if pod, err := f.Find(context.Background(), Request{NetNS: "/dev/null"}); !errors.Is(err, ErrRefused) {
		t.Errorf("a device: got %v, %v, want %v", pod, err, ErrRefused)
	}
}

// A process whose cgroup is above the root of the cgroup namespace of the one
// who asks.
func TestCgroup2Namespace(t *testing.T) {
	if os.Getenv("PODCGROUP_NETNS") != "" {
		f := Finder{Root: os.Getenv("PODCGROUP_ROOT"), Proc: "/proc"}
		pod, err := f.Find(context.Background(), Request{NetNS: os.Getenv("PODCGROUP_NETNS")})
		if !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "cgroup namespace") {
			t.Errorf("got %v, %v, want a refusal that speaks of the cgroup namespace", pod, err)
		}
		return
	}
	f, top := realNode(t)
	pid := startIn(t, f, top+"/docker/"+ctrID)
	runtime := filepath.Join(f.Root, top, "runtime")
	if err := os.Mkdir(runtime, 0o755); err != nil {
		t.Fatal(err)
	}
	dir, err := os.Open(runtime)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestCgroup2Namespace$", "-test.v")
	cmd.Env = append(os.Environ(), "PODCGROUP_ROOT="+f.Root, fmt.Sprintf("PODCGROUP_NETNS=/proc/%d/ns/net", pid))
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWCGROUP, UseCgroupFD: true, CgroupFD: int(dir.Fd()), Pdeathsig: syscall.SIGKILL}
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "--- PASS: TestCgroup2Namespace") {
		t.Errorf("in another cgroup namespace: %v\n%s", err, out)
	}
}
