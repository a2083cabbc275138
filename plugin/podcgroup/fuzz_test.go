package podcgroup

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// fuzzNode is a node that no input changes, with what a hostile path may aim at:
// links out of the root and within it, a file, planted names.
func fuzzNode(f *testing.F) *node {
	n := newNode(f).cgroups(cgroupfsPod+"/"+ctrID+"/pod"+otherUID, systemdPod, kindPod, "/test.slice/test-a.slice",
		"/kubepods/besteffort/pod"+staticUID, "/system.slice/nerdctl-"+ctrID+".scope/container", "/a/b/c", "/rt/containerd")
	outside := filepath.Join(filepath.Dir(n.Root), "outside")
	n.mkdir(filepath.Join(outside, "kubepods", "pod"+uid))
	n.symlink(outside, filepath.Join(n.Root, "out"))
	n.symlink("/", filepath.Join(n.Root, "a/root"))
	n.symlink("../a", filepath.Join(n.Root, "a/self"))
	n.symlink(outside, filepath.Join(n.Root, "kubepods/pod"+otherUID))
	n.write(filepath.Join(n.Root, "cgroup.procs"), "1\n")
	n.process("self", "host", "0::/rt/containerd")
	n.process("77", "pod", "0::"+systemdPod+"/x.scope")
	return n
}

// holds runs Find and checks that its result is a directory below the root,
// neither the root nor the runtime's own cgroup, or an error, never both, and
// that walking by openat agrees with openat2.
func holds(t *testing.T, n *node, req Request) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	var first string
	var firstErr error
	for _, walk := range []bool{false, true} {
		m := *n
		m.t, m.noOpenat2 = t, walk
		pod, err := m.Find(ctx, req)
		path, _ := m.check(pod, err)
		if strings.HasPrefix("/rt/containerd/", path+"/") && err == nil {
			t.Errorf("%+v: got %s, which holds the runtime", req, path)
		}
		if err != nil && strings.Contains(err.Error(), "\n") {
			t.Errorf("%+v: error of several lines: %q", req, err)
		}
		if walk && (path != first || sentinel(err) != sentinel(firstErr)) {
			t.Errorf("%+v: openat2 gives %q, %v, the walk %q, %v", req, first, firstErr, path, err)
		}
		first, firstErr = path, err
	}
}

func FuzzFindByPath(f *testing.F) {
	for _, seed := range []string{
		cgroupfsPod, systemdPod, kindPod, filepath.Base(systemdPod), filepath.Base(kindPod), "/test-a.slice", "-.slice",
		filepath.Base(systemdPod) + ":cri-containerd:" + ctrID, ":nerdctl:" + ctrID, "a.slice:b:", "::", "a:b:c",
		"/", "", "..", "/../outside", "/a/../..", "/a/root/etc", "/a/self/b", "/out/kubepods", "/cgroup.procs", "/cgroup.procs/x",
		"/kubepods", "/kubepods/besteffort", "/rt", "/rt/containerd", "a--b.slice", ".slice", "/a\x00/b", "/a\n", "//a//b//",
		strings.Repeat("/a", 3000), strings.Repeat("a-", 120) + "a.slice", "/a/\xff\xfe",
	} {
		f.Add(seed)
	}
	n := fuzzNode(f)
	f.Fuzz(func(t *testing.T, path string) { holds(t, n, Request{Path: path}) })
}

func FuzzFindByUID(f *testing.F) {
	for _, seed := range []string{uid, uidSlice, otherUID, staticUID, "", "..", "../x", "a/b", "a\x00b", "-", "_", "*", ctrID, strings.Repeat("f", 300)} {
		f.Add(seed)
	}
	n := fuzzNode(f)
	f.Fuzz(func(t *testing.T, uid string) { holds(t, n, Request{PodUID: uid}) })
}

func FuzzFindByNetNS(f *testing.F) {
	for _, seed := range []string{"", "/", "/proc/77/ns/net", "/proc/self/ns/net", "/proc/1/ns/net", "/proc/77/../78/ns/net", "/run/netns/x", "netns", "/proc/self/status", "/a\x00b"} {
		f.Add(seed)
	}
	n := fuzzNode(f)
	f.Fuzz(func(t *testing.T, path string) {
		holds(t, n, Request{NetNS: path})
		holds(t, n, Request{NetNS: n.Proc + path})
	})
}

// FuzzCgroupFile feeds what /proc/PID/cgroup says of a process in the pod.
func FuzzCgroupFile(f *testing.F) {
	for _, seed := range []string{
		"0::/\n", "0::" + systemdPod + "/x.scope\n", "0::" + cgroupfsPod + "/" + ctrID + "\n", "4:cpu:/\n0::/system.slice/nerdctl-" + ctrID + ".scope/container\n",
		"0::/../../x\n", "0::/..", "0::/a/../b\n", "0::a\n", "0::", "", "0::/out/kubepods\n", "0::/kubepods\n", "0::/rt/containerd\n", "0::/rt\n", "0::/a/b/c (deleted)\n", "0::/a\x00\n",
		"0::/part" + systemdPod + "\n",
	} {
		f.Add(seed, "/")
		f.Add(seed, "/part")
	}
	n := fuzzNode(f)
	f.Fuzz(func(t *testing.T, data, mountRoot string) {
		if err := os.WriteFile(filepath.Join(n.Proc, "77/cgroup"), []byte(data), 0o644); err != nil {
			t.Fatal(err)
		}
		m := *n
		m.t = t
		m.mountinfo(mountRoot, m.Root)
		holds(t, &m, Request{NetNS: filepath.Join(n.Proc, "77/ns/net")})
		holds(t, &m, Request{NetNS: filepath.Join(n.ns, "pod")})
	})
}

func FuzzMountinfo(f *testing.F) {
	for _, seed := range []string{
		"30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n",
		`30 23 0:26 /a\040b /c\134d rw - cgroup2 none rw`, "30 23 0:26 /../.. /cg rw - cgroup2 none rw\n", " - cgroup2", "a b c d e f - cgroup2 x y",
		"1 2 0:3 / / rw - cgroup2 none rw\n1 2 0:3 /x /sys rw - cgroup2 none rw\n", "30 23 0:26 / /sys rw - cgroup cgroup rw,cpu\n", `\`, "1 2 3 /.. /sys rw - cgroup2 a b",
	} {
		f.Add(seed, "/sys/fs/cgroup/x")
		f.Add(seed, "/")
	}
	proc := f.TempDir()
	(&node{t: f}).mkdir(filepath.Join(proc, "self"))
	f.Fuzz(func(t *testing.T, data, root string) {
		if strings.Contains(root, "\x00") {
			return // no such path can be opened
		}
		if err := os.WriteFile(filepath.Join(proc, "self/mountinfo"), []byte(data), 0o644); err != nil {
			t.Fatal(err)
		}
		base, err := mountBase(proc, root)
		if err != nil && base != nil {
			t.Errorf("result %v together with error %v", base, err)
		}
		for _, comp := range base {
			if comp == "" || comp == "." || comp == ".." || strings.Contains(comp, "/") {
				t.Errorf("base %q has component %q", base, comp)
			}
		}
		// None of this is a cgroup2 mount, whatever mountinfo says.
		if got, err := findRoot(filepath.Join(proc, "none"), proc, func(int) (int64, error) { return 0, nil }); !errors.Is(err, ErrNoCgroup2) {
			t.Errorf("got root %q, %v, want %v", got, err, ErrNoCgroup2)
		}
	})
}
