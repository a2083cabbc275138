package datapath

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/bpf"
	"github.com/skipstack/skipstack/test/must"
	"github.com/skipstack/skipstack/test/node"
)

// newBPFFS mounts a BPF file system that is unmounted with the test, and fails
// the test if pins are left.
func newBPFFS(t *testing.T) string {
	t.Helper()
	cgroupRoot(t)
	dir := t.TempDir()
	if err := EnsureBPFFS(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func mustLoad(t *testing.T, bpffs string) *Set {
	t.Helper()
	s, err := Load(t.Context(), bpffs, LoadOptions{MaxConnections: 500})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// tree lists what is pinned.
func tree(t *testing.T, bpffs string) []string {
	t.Helper()
	var paths []string
	err := filepath.WalkDir(bpffs, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() || strings.HasSuffix(path, ".debug") { // the kernel's own
			return err
		}
		rel, err := filepath.Rel(bpffs, path)
		paths = append(paths, rel)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return paths
}

func TestEnsureBPFFSMountsOnce(t *testing.T) {
	dir := newBPFFS(t)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			if err := EnsureBPFFS(t.Context(), dir); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	// The first thread, /proc/self, may be one that another test has unshared.
	mounts, err := os.ReadFile("/proc/thread-self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(string(mounts), " "+dir+" "); n != 1 {
		t.Errorf("mounted %d times", n)
	}
	if err := EnsureBPFFS(t.Context(), filepath.Join(dir, "absent")); !errors.Is(err, ErrNoBPFFS) {
		t.Errorf("absent directory: %v", err)
	}
}

// TestEnsureBPFFSHidesNothing: whatever is in the directory stays in sight.
func TestEnsureBPFFSHidesNothing(t *testing.T) {
	cgroupRoot(t)
	for name, plant := range map[string]func(path string) error{
		"file":      func(path string) error { return os.WriteFile(path, nil, 0o600) },
		"directory": func(path string) error { return os.Mkdir(path, 0o700) },
		"hidden":    func(path string) error { return os.Symlink("nowhere", filepath.Join(filepath.Dir(path), ".x")) },
	} {
		dir := t.TempDir()
		if err := plant(filepath.Join(dir, "x")); err != nil {
			t.Fatal(err)
		}
		err := EnsureBPFFS(t.Context(), dir)
		if !errors.Is(err, ErrNoBPFFS) || !strings.Contains(err.Error(), dir+" is not empty") {
			t.Errorf("%s: %v", name, err)
		}
		if is, err := isBPFFS(dir); is || err != nil {
			t.Errorf("%s: mounted: %v, %v", name, is, err)
			_ = unix.Unmount(dir, 0)
		}
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := EnsureBPFFS(t.Context(), file); !errors.Is(err, ErrNoBPFFS) {
		t.Errorf("a file: %v", err)
	}
}

func TestLoadNeedsBPFFS(t *testing.T) {
	cgroupRoot(t)
	dir := t.TempDir()
	if _, err := Open(dir); !errors.Is(err, ErrNotLoaded) {
		t.Errorf("Open: %v", err)
	}
	if _, err := Load(t.Context(), dir, LoadOptions{}); !errors.Is(err, ErrNoBPFFS) {
		t.Errorf("Load: %v", err)
	}
	if entries, _ := os.ReadDir(dir); len(entries) > 0 {
		t.Errorf("left %v", entries)
	}
}

// TestCompareAndSwapIsFound asks on a kernel that runs the datapath. On one that
// is too old, test/vm asks in a virtual machine.
func TestCompareAndSwapIsFound(t *testing.T) {
	cgroupRoot(t)
	if err := haveCompareAndSwap(); err != nil {
		t.Error(err)
	}
	if err := CheckKernel(); err != nil {
		t.Error(err)
	}
}

func TestConcurrentLoadsPublishOne(t *testing.T) {
	bpffs := newBPFFS(t)
	var wg sync.WaitGroup
	ids := make([]ebpf.MapID, 10)
	for i := range ids {
		wg.Go(func() {
			s, err := Load(t.Context(), bpffs, LoadOptions{MaxConnections: 500})
			if err != nil {
				t.Error(err)
				return
			}
			defer s.Close()
			info, err := s.maps[bpf.DatapathMapSocks].Info()
			if err != nil {
				t.Error(err)
				return
			}
			ids[i], _ = info.ID()
		})
	}
	wg.Wait()
	for _, id := range ids {
		if id == 0 || id != ids[0] {
			t.Fatalf("different sockhashes: %v", ids)
		}
	}
	if len(tree(t, bpffs)) != len(mapNames)+len(progNames) {
		t.Errorf("pinned %v", tree(t, bpffs))
	}
}

// A process that is stopped while it holds the lock holds up nobody who needs
// no lock, and others only until their deadline.
func TestLoadGivesUpOnABusyLock(t *testing.T) {
	bpffs := newBPFFS(t)
	unlock, err := lock(t.Context(), bpffs)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := Load(ctx, bpffs, LoadOptions{}); !errors.Is(err, ErrBusy) {
		t.Errorf("Load: %v", err)
	}
	unlock()
	s := mustLoad(t, bpffs)
	unlock, err = lock(t.Context(), bpffs)
	if err != nil {
		t.Fatal(err)
	}
	defer unlock()
	if _, err := Load(ctx, bpffs, LoadOptions{}); err != nil {
		t.Errorf("Load of what is there: %v", err)
	}
	cgroup, id := newCgroup(t, "busy")
	if _, err := s.Attach(cgroup, id); err != nil {
		t.Errorf("Attach: %v", err)
	}
	if err := DropPod(bpffs, id); err != nil {
		t.Errorf("DropPod: %v", err)
	}
}

func TestDamagedPinsAreReplaced(t *testing.T) {
	bpffs := newBPFFS(t)
	for _, lost := range append(slices.Clone(mapNames), "prog") {
		s := mustLoad(t, bpffs)
		path := filepath.Join(s.dir, "maps", lost)
		if lost == "prog" {
			path = filepath.Join(s.dir, "progs", bpf.DatapathProgTrack)
		}
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(bpffs); !errors.Is(err, ErrDamaged) {
			t.Fatalf("without %s: %v", lost, err)
		}
		if err := DropPod(bpffs, 1); err != nil {
			t.Errorf("DropPod without %s: %v", lost, err)
		}
	}
	mustLoad(t, bpffs)
	if _, err := Unload(t.Context(), bpffs, false); err != nil {
		t.Fatal(err)
	}
	if left := tree(t, bpffs); len(left) > 0 {
		t.Errorf("left %v", left)
	}
}

func TestAttachIsIdempotentAndSweptWithItsCgroup(t *testing.T) {
	bpffs := newBPFFS(t)
	s := mustLoad(t, bpffs)
	path := must.Get(os.MkdirTemp(cgroupRoot(t), "skipstack-test-sweep-"))(t)
	defer os.Remove(path)
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	for i := range 3 {
		created, err := s.Attach(f, st.Ino)
		if err != nil || created != (i == 0) {
			t.Fatalf("attach %d: created %v, %v", i, created, err)
		}
	}
	if _, err := s.Attach(f, st.Ino+1); err == nil {
		t.Error("attached under another cgroup's id")
	}
	if err := s.SetPod(st.Ino, PodSettings{Enabled: true}); err != nil {
		t.Fatal(err)
	}
	if err := Sweep(bpffs, 0); err != nil {
		t.Fatal(err)
	}
	if has, err := HasLink(bpffs, st.Ino); err != nil || !has {
		t.Fatalf("a live link was swept: %v", err)
	}
	if _, err := Unload(t.Context(), bpffs, false); !errors.Is(err, ErrInUse) {
		t.Errorf("Unload while attached: %v", err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	// The kernel detaches a link when it frees the cgroup, a little later.
	must.Wait(t, time.Minute, 10*time.Millisecond, func() error {
		if must.Get(HasLink(bpffs, st.Ino))(t) {
			return errors.New("the link outlives its cgroup")
		}
		return nil
	})
	if err := Sweep(bpffs, 0); err != nil {
		t.Fatal(err)
	}
	if _, ok, err := s.Pod(st.Ino); ok || err != nil {
		t.Errorf("settings of a swept pod are left: %v", err)
	}
	if ids, err := Links(bpffs); len(ids) > 0 || err != nil {
		t.Errorf("links left: %v, %v", ids, err)
	}
	if pods, err := s.PodCounters(); len(pods) > 0 || err != nil {
		t.Errorf("counters left: %v, %v", pods, err)
	}
}

func TestDropPodIsRepeatable(t *testing.T) {
	bpffs := newBPFFS(t)
	if err := DropPod(bpffs, 42); err != nil {
		t.Errorf("nothing loaded: %v", err)
	}
	s := mustLoad(t, bpffs)
	cgroup, id := newCgroup(t, "drop")
	if _, err := s.Attach(cgroup, id); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if err := DropPod(bpffs, id); err != nil {
			t.Fatal(err)
		}
	}
	if has, _ := HasLink(bpffs, id); has {
		t.Error("the link is left")
	}
	if created, err := s.Attach(cgroup, id); err != nil || !created {
		t.Errorf("attach again: created %v, %v", created, err)
	}
}

func TestSettingsRoundTrip(t *testing.T) {
	s := privateSet(t, NodeSettings{})
	want := PodSettings{
		Enabled: true, SwitchedOff: true, Accepted: RiskSplice | RiskBlocking, UnreadLimit: 12345,
		ExcludePorts: []PortRange{{1, 1}, {8000, 9000}},
	}
	if err := s.SetPod(7, want); err != nil {
		t.Fatal(err)
	}
	got, ok, err := s.Pod(7)
	if err != nil || !ok || !slices.Equal(got.ExcludePorts, want.ExcludePorts) || got.Accepted != want.Accepted ||
		got.UnreadLimit != want.UnreadLimit || !got.Enabled || !got.SwitchedOff {
		t.Errorf("got %+v, %v, %v", got, ok, err)
	}
	if err := s.SetPod(7, PodSettings{ExcludePorts: make([]PortRange, MaxExcludePorts+1)}); err == nil {
		t.Error("took too many ranges")
	}
	node := NodeSettings{Open: true, Risks: RiskSplice | RiskEpoll, Funnel: true, MPTCPListeners: true}
	if err := s.SetNode(node); err != nil {
		t.Fatal(err)
	}
	if got, err := s.Node(); err != nil || got != node {
		t.Errorf("got %+v, %v", got, err)
	}
	// The funnel stays for the sockets that need it.
	if err := s.SetNode(NodeSettings{}); err != nil {
		t.Fatal(err)
	}
	if got, err := s.Node(); err != nil || got != (NodeSettings{Funnel: true}) {
		t.Errorf("got %+v, %v", got, err)
	}
}

func TestSwitchNodeReachesSetsWithoutPins(t *testing.T) {
	bpffs := newBPFFS(t)
	restore := node.OtherSwitches(0)
	t.Cleanup(func() {
		if err := restore(); err != nil {
			t.Error(err)
		}
	})
	s := mustLoad(t, bpffs)
	off := func() bool {
		n, err := s.Node()
		if err != nil {
			t.Fatal(err)
		}
		return n.SwitchedOff
	}
	if n, err := SwitchNode(bpffs, true); err != nil || n < 1 || !off() {
		t.Fatalf("off: %d sets, %v, off %v", n, err, off())
	}
	if n, err := SwitchNode(bpffs, false); err != nil || n != 1 || off() {
		t.Fatalf("on: %d sets, %v, off %v", n, err, off())
	}
	if err := discard(root(bpffs)); err != nil {
		t.Fatal(err)
	}
	if n, err := SwitchNode(bpffs, true); err != nil || n < 1 || !off() {
		t.Fatalf("off without pins: %d sets, %v, off %v", n, err, off())
	}
}

func TestUpgradeReplacesProgramsOfAnotherBuild(t *testing.T) {
	bpffs := newBPFFS(t)
	old := mustLoad(t, bpffs)
	cgroup, id := newCgroup(t, "upgrade")
	if _, err := old.Attach(cgroup, id); err != nil {
		t.Fatal(err)
	}
	if err := old.SetNode(NodeSettings{Open: true, Funnel: true}); err != nil {
		t.Fatal(err)
	}
	fresh, changed, err := Upgrade(t.Context(), bpffs, LoadOptions{})
	if err != nil || changed {
		t.Fatalf("same build: changed %v, %v", changed, err)
	}
	fresh.Close()

	ctl, err := old.control()
	if err != nil {
		t.Fatal(err)
	}
	ctl.Build = [16]byte{1}
	if err := old.maps[bpf.DatapathMapSkipstackCtl].Put(uint32(0), ctl); err != nil {
		t.Fatal(err)
	}
	fresh, changed, err = Upgrade(t.Context(), bpffs, LoadOptions{})
	if err != nil || !changed {
		t.Fatalf("another build: changed %v, %v", changed, err)
	}
	defer fresh.Close()
	if build, err := fresh.Build(); err != nil || build != bpf.Build() {
		t.Errorf("build %x, %v", build, err)
	}
	if n, err := fresh.MaxConnections(); err != nil || n != 500 {
		t.Errorf("maxConnections %d, %v", n, err)
	}
	oldID := programID(t, old.progs[bpf.DatapathProgTrack])
	newID := programID(t, fresh.progs[bpf.DatapathProgTrack])
	if oldID == newID {
		t.Fatal("the program is the same")
	}
	if got := linkedProgram(t, linkPath(fresh.dir, "links", id)); got != newID {
		t.Errorf("the pod's link has program %d, not %d", got, newID)
	}
	// Whoever has opened the set before attaches what is there now.
	late, lateID := newCgroup(t, "upgrade-late")
	if _, err := old.Attach(late, lateID); err != nil {
		t.Fatal(err)
	}
	if got := linkedProgram(t, linkPath(fresh.dir, "links", lateID)); got != newID {
		t.Errorf("a later pod's link has program %d, not %d", got, newID)
	}
	pinned, err := Open(bpffs)
	if err != nil {
		t.Fatal(err)
	}
	defer pinned.Close()
	if got := programID(t, pinned.progs[bpf.DatapathProgTrack]); got != newID {
		t.Errorf("pinned program %d, not %d", got, newID)
	}
	if entries, err := os.ReadDir(root(bpffs)); err != nil || len(entries) != 1 {
		t.Errorf("left %v, %v", entries, err)
	}
}

// A build that counted other things has left the guard's counter pinned.
func TestCountersOfAnotherGuard(t *testing.T) {
	s := mustLoad(t, newBPFFS(t))
	m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	g := s.guardPins()
	if err := os.MkdirAll(filepath.Dir(g.path("refused")), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := m.Pin(g.path("refused")); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Counters(); err != nil {
		t.Error(err)
	}
	if old, err := g.refused(); err != nil || old != nil {
		t.Errorf("the next guard would count in %v, %v", old, err)
	}
}

// Programs of another layout are told not to enrol, and go on serving what they have.
func TestOtherLayoutsAreRetired(t *testing.T) {
	bpffs := newBPFFS(t)
	other := mustLoad(t, bpffs)
	moved := filepath.Join(root(bpffs), "v99")
	if err := os.Rename(other.dir, moved); err != nil {
		t.Fatal(err)
	}
	mustLoad(t, bpffs)
	retired := func(s *Set) bool {
		var v uint32
		if err := s.maps[bpf.DatapathMapSkipstackSwitch].Lookup(bpf.DatapathSwitchSlotSWITCH_RETIRED, &v); err != nil {
			t.Fatal(err)
		}
		return v != 0
	}
	current, err := Open(bpffs)
	if err != nil {
		t.Fatal(err)
	}
	defer current.Close()
	if !retired(other) || retired(current) {
		t.Errorf("retired: other layout %v, ours %v", retired(other), retired(current))
	}
}

// The maps of one layout are shared by builds, so their shape is fixed: whoever
// changes it raises [Layout].
func TestLayoutIsFixed(t *testing.T) {
	spec, err := bpf.LoadDatapath()
	if err != nil {
		t.Fatal(err)
	}
	want := map[string][2]uint32{ // key and value size, layout 2
		bpf.DatapathMapConnections:     {8, 72},
		bpf.DatapathMapEndpoints:       {4, 200},
		bpf.DatapathMapFunnelNext:      {8, 16},
		bpf.DatapathMapPods:            {8, 84},
		bpf.DatapathMapPodsCount:       {8, 128},
		bpf.DatapathMapQueues:          {8, 16},
		bpf.DatapathMapQueuesSum:       {4, 16},
		bpf.DatapathMapSkipstackCount:  {4, 384},
		bpf.DatapathMapSkipstackCtl:    {4, 36},
		bpf.DatapathMapSkipstackSwitch: {4, 4},
		bpf.DatapathMapSocks:           {16, 8},
	}
	if Layout != 2 || len(want) != len(mapNames) {
		t.Fatal("write the sizes of the new layout here")
	}
	for name, size := range want {
		m := spec.Maps[name]
		if m.KeySize != size[0] || m.ValueSize != size[1] {
			t.Errorf("%s: key and value have %d and %d bytes, layout %d has %v", name, m.KeySize, m.ValueSize, Layout, size)
		}
	}
}
