package podcgroup

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

const (
	uid       = "1858680e-b044-4fd5-9dd4-f137e30e2180"
	uidSlice  = "1858680e_b044_4fd5_9dd4_f137e30e2180"
	otherUID  = "2858680e-b044-4fd5-9dd4-f137e30e2180"
	staticUID = "99dcb84d2a34f7e338778606703258c4"
	ctrID     = "1d16e5700bb207936a96b02cfe929fa161e5685aa15186f4c8be5dc44821b860"
	ctrID2    = "aed1dcce39a52379aaa25179323c2597863a7a9bc9a974950c58d6b5ea4f04e7"
)

func onCgroup2(int) (int64, error) { return unix.CGROUP2_SUPER_MAGIC, nil }

// node is a plain directory that stands for a cgroup2 mount, and one that
// stands for /proc.
type node struct {
	Finder
	t  testing.TB
	ns string // one file per network namespace
}

func newNode(t testing.TB) *node {
	dir := t.TempDir()
	n := &node{
		Finder: Finder{Root: filepath.Join(dir, "cgroup"), Proc: filepath.Join(dir, "proc"), fsType: onCgroup2},
		t:      t,
		ns:     filepath.Join(dir, "netns"),
	}
	n.mkdir(n.Root)
	n.mkdir(n.ns)
	n.process("self", "host", "0::/system.slice/containerd.service")
	n.process("1", "host", "0::/init.scope")
	n.mountinfo("/", n.Root)
	return n
}

func (n *node) mkdir(path string) {
	n.t.Helper()
	if err := os.MkdirAll(path, 0o755); err != nil {
		n.t.Fatal(err)
	}
}

func (n *node) write(path, data string) {
	n.t.Helper()
	n.mkdir(filepath.Dir(path))
	if err := os.WriteFile(path, []byte(data), 0o644); err != nil {
		n.t.Fatal(err)
	}
}

func (n *node) symlink(to, path string) {
	n.t.Helper()
	n.mkdir(filepath.Dir(path))
	if err := os.Symlink(to, path); err != nil {
		n.t.Fatal(err)
	}
}

func (n *node) cgroups(paths ...string) *node {
	n.t.Helper()
	for _, path := range paths {
		n.mkdir(filepath.Join(n.Root, path))
	}
	return n
}

func (n *node) mountinfo(root, point string) {
	n.t.Helper()
	n.write(filepath.Join(n.Proc, "self/mountinfo"), fmt.Sprintf(
		"22 28 0:20 / /sys rw shared:7 - sysfs sysfs rw\n30 23 0:26 %s %s rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n",
		root, strings.ReplaceAll(point, " ", `\040`)))
}

// netns returns a path that stands for a bind-mounted network namespace.
func (n *node) netns(name string) string {
	n.t.Helper()
	path := filepath.Join(n.ns, name)
	if _, err := os.Stat(path); err != nil {
		n.write(path, "")
	}
	return path
}

// process makes a process and returns its /proc/PID/ns/net.
func (n *node) process(pid, ns, cgroup string) string {
	n.t.Helper()
	dir := filepath.Join(n.Proc, pid)
	if err := os.RemoveAll(filepath.Join(dir, "ns")); err != nil {
		n.t.Fatal(err)
	}
	n.symlink(n.netns(ns), filepath.Join(dir, "ns/net"))
	n.write(filepath.Join(dir, "cgroup"), "12:cpuset:/\n1:name=systemd:/x\n"+cgroup+"\n")
	return filepath.Join(dir, "ns/net")
}

// find runs Find by openat2 and by the walk that replaces it, checks that both
// agree and that no descriptor is left open, and returns path and error.
func (n *node) find(req Request) (path, source string, err error) {
	n.t.Helper()
	for _, walk := range []bool{false, true} {
		f := n.Finder
		f.noOpenat2 = walk
		before := openFDs(n.t)
		pod, e := f.Find(context.Background(), req)
		p, s := n.check(pod, e)
		if after := openFDs(n.t); after != before {
			n.t.Errorf("%d descriptors open before, %d after", before, after)
		}
		if walk && (p != path || s != source || sentinel(e) != sentinel(err)) {
			n.t.Errorf("openat2 gives %q %q %v, the walk %q %q %v", path, source, err, p, s, e)
		}
		path, source, err = p, s, e
	}
	return path, source, err
}

// check checks what holds for every result, and closes it.
func (n *node) check(pod *Pod, err error) (path, source string) {
	n.t.Helper()
	if (pod == nil) == (err == nil) {
		n.t.Fatalf("result %v together with error %v", pod, err)
	}
	if err != nil {
		return "", ""
	}
	defer pod.Dir.Close()
	if !strings.HasPrefix(pod.Path, "/") || pod.Path == "/" || filepath.Clean(pod.Path) != pod.Path {
		n.t.Errorf("path %q is not a clean path below the root", pod.Path)
	}
	root, e := filepath.EvalSymlinks(n.Root)
	if e != nil {
		n.t.Fatal(e)
	}
	real, e := filepath.EvalSymlinks(filepath.Join(n.Root, pod.Path))
	if e != nil {
		n.t.Fatal(e)
	}
	if real != filepath.Join(root, pod.Path) {
		n.t.Errorf("%s is in truth %s", pod.Path, real)
	}
	var byFD, byPath unix.Stat_t
	if e := errors.Join(unix.Fstat(int(pod.Dir.Fd()), &byFD), unix.Stat(real, &byPath)); e != nil {
		n.t.Fatal(e)
	}
	if byFD.Ino != byPath.Ino || byFD.Dev != byPath.Dev || pod.ID != byPath.Ino {
		n.t.Errorf("descriptor is inode %d, id %d, path is inode %d", byFD.Ino, pod.ID, byPath.Ino)
	}
	if byFD.Mode&unix.S_IFMT != unix.S_IFDIR {
		n.t.Errorf("%s is not a directory", pod.Path)
	}
	flags, e := unix.FcntlInt(pod.Dir.Fd(), unix.F_GETFD, 0)
	if e != nil || flags&unix.FD_CLOEXEC == 0 {
		n.t.Errorf("descriptor flags %#x, %v: not close-on-exec", flags, e)
	}
	return pod.Path, pod.Source
}

func sentinel(err error) error {
	for _, s := range []error{ErrNoCgroup2, ErrNotFound, ErrAmbiguous, ErrRefused, context.Canceled} {
		if errors.Is(err, s) {
			return s
		}
	}
	var errno unix.Errno
	errors.As(err, &errno)
	return errno
}

func openFDs(t testing.TB) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// row is one request and what must come of it: a path, or an error with words.
type row struct {
	name    string
	cgroups []string
	req     Request
	prepare func(*node, *Request)
	want    string
	wantErr error
	words   []string
}

func run(t *testing.T, source string, rows []row) {
	t.Helper()
	for _, r := range rows {
		t.Run(r.name, func(t *testing.T) {
			n := newNode(t).cgroups(r.cgroups...)
			if r.prepare != nil {
				r.prepare(n, &r.req)
			}
			path, got, err := n.find(r.req)
			if r.wantErr == nil {
				if err != nil {
					t.Fatal(err)
				}
				if path != r.want || got != source {
					t.Errorf("got %s by %s, want %s by %s", path, got, r.want, source)
				}
				return
			}
			if !errors.Is(err, r.wantErr) {
				t.Fatalf("got %q, %v, want an error wrapping %v", path, err, r.wantErr)
			}
			for _, word := range r.words {
				if !strings.Contains(err.Error(), strings.ReplaceAll(word, "ROOT", n.Root)) {
					t.Errorf("error lacks %q: %v", word, err)
				}
			}
			if strings.Contains(err.Error(), "\n") || len(err.Error()) > 1000 {
				t.Errorf("error is more than one line: %.2000q", err)
			}
		})
	}
}

const (
	cgroupfsPod = "/kubepods/burstable/pod" + uid
	systemdPod  = "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + uidSlice + ".slice"
	systemdGuar = "/kubepods.slice/kubepods-pod" + uidSlice + ".slice"
	kindPod     = "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/kubelet-kubepods-burstable-pod" + uidSlice + ".slice"
	kindfsPod   = "/kubelet/kubepods/besteffort/pod" + uid
)

func TestFindByPath(t *testing.T) {
	run(t, "cgroupPath", []row{
		{name: "cgroupfs driver", cgroups: []string{cgroupfsPod}, req: Request{Path: cgroupfsPod}, want: cgroupfsPod},
		{name: "cgroupfs driver, guaranteed", cgroups: []string{"/kubepods/pod" + uid}, req: Request{Path: "/kubepods/pod" + uid}, want: "/kubepods/pod" + uid},
		{name: "systemd driver", cgroups: []string{systemdPod}, req: Request{Path: systemdPod}, want: systemdPod},
		{name: "systemd driver, guaranteed", cgroups: []string{systemdGuar}, req: Request{Path: systemdGuar}, want: systemdGuar},
		{name: "kind, systemd", cgroups: []string{kindPod}, req: Request{Path: kindPod}, want: kindPod},
		{name: "kind, cgroupfs", cgroups: []string{kindfsPod}, req: Request{Path: kindfsPod}, want: kindfsPod},
		{name: "no leading slash", cgroups: []string{cgroupfsPod}, req: Request{Path: cgroupfsPod[1:]}, want: cgroupfsPod},
		{name: "superfluous slashes", cgroups: []string{cgroupfsPod}, req: Request{Path: "//kubepods//burstable/pod" + uid + "/"}, want: cgroupfsPod},
		{name: "CRI-O basename", cgroups: []string{systemdPod}, req: Request{Path: filepath.Base(systemdPod)}, want: systemdPod},
		{name: "CRI-O basename, guaranteed", cgroups: []string{systemdGuar}, req: Request{Path: filepath.Base(systemdGuar)}, want: systemdGuar},
		{name: "CRI-O basename, nested root", cgroups: []string{kindPod}, req: Request{Path: filepath.Base(kindPod)}, want: kindPod},
		{name: "slice not expanded by the caller", cgroups: []string{"/test.slice/test-a.slice/test-a-b.slice"}, req: Request{Path: "/test-a-b.slice"}, want: "/test.slice/test-a.slice/test-a-b.slice"},
		{name: "slice that is where the path says", cgroups: []string{"/test-a.slice", "/test.slice/test-a.slice"}, req: Request{Path: "/test-a.slice"}, want: "/test-a.slice"},
		{name: "systemd triple of a container in a pod", cgroups: []string{systemdPod + "/cri-containerd-" + ctrID + ".scope"},
			req: Request{Path: filepath.Base(systemdPod) + ":cri-containerd:" + ctrID}, want: systemdPod},
		{name: "systemd triple of a container", cgroups: []string{"/system.slice/nerdctl-" + ctrID + ".scope"},
			req: Request{Path: ":nerdctl:" + ctrID}, want: "/system.slice/nerdctl-" + ctrID + ".scope"},
		{name: "systemd triple at the root", cgroups: []string{"/docker-" + ctrID + ".scope"},
			req: Request{Path: "-.slice:docker:" + ctrID}, want: "/docker-" + ctrID + ".scope"},
		{name: "systemd triple of a slice", cgroups: []string{"/a.slice/b.slice"}, req: Request{Path: "a.slice:ignored:b.slice"}, want: "/a.slice/b.slice"},
		{name: "colons without a slice are plain", cgroups: []string{"/a:b:c"}, req: Request{Path: "a:b:c"}, want: "/a:b:c"},
		{name: "colons in a path are plain", cgroups: []string{"/kubepods/pod:a:b"}, req: Request{Path: "/kubepods/pod:a:b"}, want: "/kubepods/pod:a:b"},
		{name: "cgroup of a tool's own making", cgroups: []string{"/demo/pod1"}, req: Request{Path: "/demo/pod1"}, want: "/demo/pod1"},
		{name: "the path wins over the UID", cgroups: []string{cgroupfsPod, "/kubepods/pod" + otherUID}, req: Request{Path: cgroupfsPod, PodUID: otherUID}, want: cgroupfsPod},
	})
}

func TestFindByPathRefuses(t *testing.T) {
	outside := func(n *node) string {
		dir := filepath.Join(filepath.Dir(n.Root), "outside")
		n.mkdir(filepath.Join(dir, "pod"))
		return dir
	}
	long := strings.Repeat("a", 256)
	run(t, "", []row{
		{name: "dot dot", cgroups: []string{cgroupfsPod}, req: Request{Path: "/kubepods/../kubepods/burstable/pod" + uid}, wantErr: ErrRefused, words: []string{`".."`, "cgroup path"}},
		{name: "dot dot out", req: Request{Path: "/../outside"}, wantErr: ErrRefused},
		{name: "dot dot alone", req: Request{Path: ".."}, wantErr: ErrRefused},
		{name: "dot", cgroups: []string{cgroupfsPod}, req: Request{Path: "/kubepods/./burstable"}, wantErr: ErrRefused},
		{name: "root", req: Request{Path: "/"}, wantErr: ErrRefused, words: []string{"root", "ROOT"}},
		{name: "root as many slashes", req: Request{Path: "///"}, wantErr: ErrRefused},
		{name: "root slice", req: Request{Path: "-.slice"}, wantErr: ErrRefused},
		{name: "NUL", cgroups: []string{cgroupfsPod}, req: Request{Path: cgroupfsPod + "\x00/x"}, wantErr: ErrRefused},
		{name: "newline", req: Request{Path: "/a\nb"}, wantErr: ErrRefused},
		{name: "too long", req: Request{Path: strings.Repeat("/a", 2048)}, wantErr: ErrRefused},
		{name: "component too long", req: Request{Path: "/" + long}, wantErr: ErrRefused},
		{name: "slice name too long", req: Request{Path: long + ".slice"}, wantErr: ErrRefused},
		{name: "slice that expands too far", req: Request{Path: strings.Repeat("a-", 120) + "a.slice"}, wantErr: ErrRefused, words: []string{"longer than"}},
		{name: "slice with an empty part", req: Request{Path: "kubepods--pod.slice"}, wantErr: ErrRefused, words: []string{"between dashes"}},
		{name: "slice with a leading dash", req: Request{Path: "-kubepods.slice"}, wantErr: ErrRefused},
		{name: "slice with a trailing dash", req: Request{Path: "kubepods-.slice"}, wantErr: ErrRefused},
		{name: "slice without a name", req: Request{Path: ".slice"}, wantErr: ErrRefused},
		{name: "triple with a malformed slice", req: Request{Path: "a--b.slice:c:d"}, wantErr: ErrRefused},
		{name: "triple without a name", req: Request{Path: "a.slice:c:"}, wantErr: ErrRefused},
		{name: "a file", req: Request{Path: "/kubepods/cgroup.procs"}, wantErr: ErrRefused, words: []string{"not a directory", "ROOT/kubepods/cgroup.procs"},
			prepare: func(n *node, _ *Request) { n.write(filepath.Join(n.Root, "kubepods/cgroup.procs"), "") }},
		{name: "below a file", req: Request{Path: "/kubepods/cgroup.procs/x"}, wantErr: ErrRefused,
			prepare: func(n *node, _ *Request) { n.write(filepath.Join(n.Root, "kubepods/cgroup.procs"), "") }},
		{name: "symbolic link out", req: Request{Path: "/kubepods/pod"}, wantErr: ErrRefused, words: []string{"symbolic link"},
			prepare: func(n *node, _ *Request) { n.symlink(outside(n), filepath.Join(n.Root, "kubepods/pod")) }},
		{name: "through a symbolic link out", req: Request{Path: "/kubepods/pod"}, wantErr: ErrRefused,
			prepare: func(n *node, _ *Request) { n.symlink(outside(n), filepath.Join(n.Root, "kubepods")) }},
		{name: "symbolic link within", cgroups: []string{cgroupfsPod}, req: Request{Path: "/kubepods/pod"}, wantErr: ErrRefused,
			prepare: func(n *node, _ *Request) { n.symlink("burstable/pod"+uid, filepath.Join(n.Root, "kubepods/pod")) }},
		{name: "dangling symbolic link", req: Request{Path: "/pod"}, wantErr: ErrRefused,
			prepare: func(n *node, _ *Request) { n.symlink("nowhere", filepath.Join(n.Root, "pod")) }},
		{name: "all pods, cgroupfs", cgroups: []string{"/kubepods"}, req: Request{Path: "/kubepods"}, wantErr: ErrRefused, words: []string{"all pods"}},
		{name: "all pods, systemd", cgroups: []string{"/kubelet.slice/kubelet-kubepods.slice"}, req: Request{Path: "kubelet-kubepods.slice"}, wantErr: ErrRefused, words: []string{"all pods"}},
		{name: "a QoS class, cgroupfs", cgroups: []string{"/kubepods/besteffort"}, req: Request{Path: "/kubepods/besteffort"}, wantErr: ErrRefused, words: []string{"QoS"}},
		{name: "a QoS class, systemd", cgroups: []string{filepath.Dir(systemdPod)}, req: Request{Path: filepath.Dir(systemdPod)}, wantErr: ErrRefused, words: []string{"QoS"}},
		{name: "system.slice", cgroups: []string{"/system.slice"}, req: Request{Path: "system.slice"}, wantErr: ErrRefused},
		{name: "a login session", cgroups: []string{"/user.slice/user-0.slice/session-1.scope"}, req: Request{Path: "/user.slice/user-0.slice/session-1.scope"}, wantErr: ErrRefused},
		{name: "the runtime's own", cgroups: []string{"/rt/containerd"}, req: Request{Path: "/rt/containerd"}, wantErr: ErrRefused, words: []string{"runtime"},
			prepare: func(n *node, _ *Request) { n.process("self", "host", "0::/rt/containerd") }},
		{name: "above the runtime's own", cgroups: []string{"/rt/containerd"}, req: Request{Path: "/rt"}, wantErr: ErrRefused, words: []string{"runtime"},
			prepare: func(n *node, _ *Request) { n.process("self", "host", "0::/rt/containerd") }},
		{name: "host's network namespace", cgroups: []string{cgroupfsPod}, req: Request{Path: cgroupfsPod}, wantErr: ErrRefused, words: []string{"host's network namespace"},
			prepare: func(n *node, r *Request) { r.NetNS = n.netns("host") }},
		{name: "relative CNI_NETNS", cgroups: []string{cgroupfsPod}, req: Request{Path: cgroupfsPod, NetNS: "netns"}, wantErr: ErrRefused},
		{name: "missing", req: Request{Path: cgroupfsPod}, wantErr: ErrNotFound, words: []string{"ROOT" + cgroupfsPod}},
		{name: "missing slice", req: Request{Path: "/test-a.slice"}, wantErr: ErrNotFound, words: []string{"ROOT/test-a.slice"}},
	})
}

// A mount point below the root shows something else than the hierarchy.
func TestFindRefusesMountPoint(t *testing.T) {
	n := newNode(t)
	n.Root = "/"
	if _, _, err := n.find(Request{Path: "/proc"}); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "leaves the cgroup hierarchy") {
		t.Errorf("got %v, want a refusal of /proc below /", err)
	}
}

// The file system is checked on the descriptor that is returned, not only at
// the root.
func TestFindRefusesForeignFileSystem(t *testing.T) {
	n := newNode(t).cgroups(cgroupfsPod)
	var root unix.Stat_t
	if err := unix.Stat(n.Root, &root); err != nil {
		t.Fatal(err)
	}
	n.fsType = func(fd int) (int64, error) {
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil || st.Ino != root.Ino {
			return unix.TMPFS_MAGIC, err
		}
		return unix.CGROUP2_SUPER_MAGIC, nil
	}
	for _, req := range []Request{{Path: cgroupfsPod}, {PodUID: uid}} {
		if _, _, err := n.find(req); !errors.Is(err, ErrRefused) {
			t.Errorf("%+v: got %v, want %v", req, err, ErrRefused)
		}
	}
	n.fsType = func(int) (int64, error) { return 0, unix.EIO }
	if _, _, err := n.find(Request{Path: cgroupfsPod}); !errors.Is(err, unix.EIO) {
		t.Errorf("got %v, want %v", err, unix.EIO)
	}
}

func TestFindWithoutCgroup2(t *testing.T) {
	n := newNode(t).cgroups(cgroupfsPod)
	n.fsType = nil // the temporary directory's true type
	_, _, err := n.find(Request{Path: cgroupfsPod})
	if !errors.Is(err, ErrNoCgroup2) || !strings.Contains(err.Error(), n.Root) {
		t.Errorf("got %v, want %v at %s", err, ErrNoCgroup2, n.Root)
	}
	n.Root = filepath.Join(n.Root, "nowhere")
	if _, _, err := n.find(Request{Path: cgroupfsPod}); !errors.Is(err, ErrNoCgroup2) {
		t.Errorf("root missing: got %v, want %v", err, ErrNoCgroup2)
	}
}

func TestFindFallsBack(t *testing.T) {
	n := newNode(t).cgroups(cgroupfsPod)
	n.process("77", "pod", "0::"+cgroupfsPod+"/"+ctrID)
	all := Request{Path: "/nowhere", PodUID: uid, NetNS: n.netns("pod")}
	if path, source, err := n.find(all); err != nil || path != cgroupfsPod || source != "podUID" {
		t.Errorf("stale path: got %s by %s, %v", path, source, err)
	}
	all.PodUID = ""
	if path, source, err := n.find(all); err != nil || path != cgroupfsPod || source != "netns" {
		t.Errorf("stale path, no UID: got %s by %s, %v", path, source, err)
	}
	// A hostile value is no reason to guess.
	for _, req := range []Request{
		{Path: "/../x", PodUID: uid},
		{Path: "/kubepods", PodUID: uid},
		{PodUID: "../" + uid, NetNS: n.netns("pod")},
	} {
		if path, _, err := n.find(req); !errors.Is(err, ErrRefused) {
			t.Errorf("%+v: got %s, %v, want %v", req, path, err, ErrRefused)
		}
	}
	_, _, err := n.find(Request{Path: "/nowhere", PodUID: otherUID, NetNS: n.netns("empty")})
	if !errors.Is(err, ErrNotFound) {
		t.Fatalf("got %v, want %v", err, ErrNotFound)
	}
	for _, word := range []string{"/nowhere", otherUID, n.netns("empty")} {
		if !strings.Contains(err.Error(), word) {
			t.Errorf("error does not say that it looked for %s: %v", word, err)
		}
	}
	if _, _, err := n.find(Request{}); !errors.Is(err, ErrNotFound) || !strings.Contains(err.Error(), `"capabilities": {"cgroupPath": true}`) {
		t.Errorf("nothing to go by: got %v, want advice", err)
	}
}

func TestFindHonoursContext(t *testing.T) {
	n := newNode(t).cgroups(cgroupfsPod)
	n.process("77", "pod", "0::"+cgroupfsPod)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	for _, req := range []Request{{Path: cgroupfsPod}, {PodUID: uid}, {NetNS: n.netns("pod")}} {
		pod, err := n.Find(ctx, req)
		n.check(pod, err)
		if !errors.Is(err, context.Canceled) {
			t.Errorf("%+v: got %v, want %v", req, err, context.Canceled)
		}
	}
	// Cancelled while a search is under way: by the way itself, not before it.
	tr, err := n.open()
	if err != nil {
		t.Fatal(err)
	}
	defer tr.close()
	if _, err := tr.byUID(ctx, Request{PodUID: uid}); !errors.Is(err, context.Canceled) {
		t.Errorf("search by UID: got %v, want %v", err, context.Canceled)
	}
	if _, err := tr.byNetNS(ctx, Request{NetNS: n.netns("pod")}); !errors.Is(err, context.Canceled) {
		t.Errorf("search for a process: got %v, want %v", err, context.Canceled)
	}
}

func TestExpandSlice(t *testing.T) {
	for name, want := range map[string]string{
		"a.slice":                 "/a.slice",
		"a-b-c.slice":             "/a.slice/a-b.slice/a-b-c.slice",
		"-.slice":                 "/",
		`a\x2db-c.slice`:          `/a\x2db.slice/a\x2db-c.slice`,
		filepath.Base(systemdPod): systemdPod,
	} {
		if comps, err := expandSlice(name); err != nil || slash(comps) != want {
			t.Errorf("%s: got %s, %v, want %s", name, slash(comps), err, want)
		}
	}
	for _, name := range []string{"", "a", ".slice", "--.slice", "-a.slice", "a-.slice", "a--b.slice", "a/b.slice", "a.scope"} {
		if comps, err := expandSlice(name); err == nil {
			t.Errorf("%q: got %s, want an error", name, slash(comps))
		}
	}
}
