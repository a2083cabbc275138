package plugin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/skipstack/skipstack/plugin/attachment"
	"github.com/skipstack/skipstack/plugin/datapath"
	"github.com/skipstack/skipstack/plugin/podcgroup"
)

func TestDelRepeatedAndWithoutAnything(t *testing.T) {
	b := newBench(t)
	r := request{}
	b.mustDel(r) // before ADD
	if _, err := os.Stat(b.runDir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("DEL made the run directory: %v", err)
	}
	b.mustAdd(r)
	// The cgroup, the datapath, prevResult and the netns are gone, and the own
	// keys are broken.
	b.cgroups.rootErr = podcgroup.ErrNoCgroup2
	b.datapath.loaded = false
	b.datapath.fail["Open"] = datapath.ErrNotLoaded
	bad := request{cgroup: "-", noPrev: true, cniArgs: "-", conf: `"mode":7,"bpffs":"x","y":1,"onError":"fail"`}
	for range 3 {
		args := b.args(bad)
		args.Netns = ""
		if err := b.plugin(io.Discard).Del(args); err != nil {
			t.Fatal(err)
		}
	}
	b.wantNothing()
	b.wantLines(0)
}

// The link is where ADD has put it, whatever the configuration says by now.
func TestDelUsesRecordedBPFFS(t *testing.T) {
	b := newBench(t)
	b.mustAdd(request{conf: `"bpffs":"/mnt/a"`})
	rec, _ := b.record(request{})
	if got := wishOf(rec).BPFFS; got != "/mnt/a" {
		t.Fatalf("recorded bpffs %q", got)
	}
	b.mustDel(request{conf: `"bpffs":"/mnt/b"`})
	b.wantNothing()
}

// A sandbox is replaced while its pod, and so its cgroup, lives on.
func TestLateDelOfOldSandbox(t *testing.T) {
	b := newBench(t)
	first, second := request{container: "old"}, request{container: "new"}
	b.mustAdd(first)
	b.mustAdd(second)
	for range 2 {
		b.mustDel(first)
		b.wantLinks(101)
		if !b.pod(101).Enabled {
			t.Error("the new sandbox is not accelerated")
		}
	}
	b.mustDel(second)
	b.wantNothing()
}

// Multus: two networks on one cgroup share the link, and the stricter wish holds.
func TestTwoAttachmentsOnOneCgroup(t *testing.T) {
	one := request{network: "one", conf: `"acceptRisks":["splice","blocking"],"unreadLimit":1048576,"excludePorts":[80]`}
	two := request{network: "two", ifname: "net1", conf: `"acceptRisks":["splice"],"unreadLimit":4096,"excludePorts":["443"]`}
	lax := datapath.PodSettings{Enabled: true, Accepted: datapath.RiskSplice | datapath.RiskBlocking, UnreadLimit: 1 << 20, ExcludePorts: []datapath.PortRange{{First: 80, Last: 80}}}
	strict := datapath.PodSettings{Enabled: true, Accepted: datapath.RiskSplice, UnreadLimit: 4096, ExcludePorts: []datapath.PortRange{{First: 80, Last: 80}, {First: 443, Last: 443}}}
	want := func(t *testing.T, b *bench, s datapath.PodSettings) {
		t.Helper()
		if got := b.pod(101); !reflect.DeepEqual(got, s) {
			t.Errorf("settings %+v, want %+v", got, s)
		}
	}

	t.Run("both on", func(t *testing.T) {
		b := newBench(t)
		b.mustAdd(one)
		want(t, b, lax)
		b.mustAdd(two)
		want(t, b, strict)
		b.mustDel(two)
		want(t, b, lax)
		b.wantLinks(101)
		b.mustDel(one)
		b.wantNothing()
	})
	t.Run("the operator's switch stays", func(t *testing.T) {
		b := newBench(t)
		b.mustAdd(one)
		s := b.pod(101)
		s.SwitchedOff = true
		b.datapath.pods[101] = s
		b.mustAdd(two)
		if !b.pod(101).SwitchedOff {
			t.Error("ADD switched the pod on")
		}
		b.mustDel(two)
		if !b.pod(101).SwitchedOff {
			t.Error("DEL switched the pod on")
		}
		b.mustDel(one)
		b.wantNothing()
	})
	off := two
	off.conf = `"mode":"off"`
	t.Run("the second is off", func(t *testing.T) {
		b := newBench(t)
		b.mustAdd(one)
		b.mustAdd(off)
		if b.pod(101).Enabled {
			t.Error("accelerated although one network is off")
		}
		b.wantLinks(101)
		b.mustDel(off)
		want(t, b, lax)
		b.mustDel(one)
		b.wantNothing()
	})
	t.Run("the first is off", func(t *testing.T) {
		b := newBench(t)
		b.mustAdd(off)
		b.wantLinks()
		b.mustAdd(one)
		if b.pod(101).Enabled {
			t.Error("accelerated although one network is off")
		}
		b.mustDel(one)
		b.wantLinks()
		b.mustDel(off)
		b.wantNothing()
	})
	t.Run("a record of a later version", func(t *testing.T) {
		b := newBench(t)
		b.mustAdd(one)
		b.mustAdd(two)
		b.writeNewerRecord(two)
		b.mustAdd(one)
		if b.pod(101).Enabled {
			t.Error("accelerated although one wish is not understood")
		}
		b.mustDel(one)
		b.wantLinks(101)
		b.mustAdd(two) // replaces the record
		want(t, b, datapath.PodSettings{Enabled: true, Accepted: datapath.RiskSplice, UnreadLimit: 4096, ExcludePorts: []datapath.PortRange{{First: 443, Last: 443}}})
		b.mustDel(two)
		b.wantNothing()
	})
	t.Run("one on another bpffs", func(t *testing.T) {
		b := newBench(t)
		b.mustAdd(one)
		other := two
		other.conf = `"bpffs":"/mnt/other"`
		b.mustAdd(other)
		b.mustDel(other)
		b.mustDel(one)
		b.wantNothing()
		if want := []string{"/mnt/other 101", "/sys/fs/bpf 101"}; !reflect.DeepEqual(b.datapath.dropped, want) {
			t.Errorf("dropped %v, want %v", b.datapath.dropped, want)
		}
	})
	t.Run("an unreadable record", func(t *testing.T) {
		b := newBench(t)
		b.mustAdd(one)
		b.mustAdd(two)
		b.mustAdd(request{container: "c3"})
		b.writeRecord(two, "{")
		// What it wants is not known, so there is no acceleration, and the link
		// stays until the cgroup goes.
		b.mustDel(one)
		b.wantLinks(101)
		if b.pod(101).Enabled {
			t.Error("accelerated although one record cannot be read")
		}
		b.mustDel(request{container: "c3"})
		b.wantLinks(101)
		b.wantLines(1, "corrupt")
		if _, ok := b.record(request{container: "c3"}); ok {
			t.Error("the record is left")
		}
		b.mustDel(two)
	})
}

// The lock is held for every decision over a pod, and not while programs load.
func TestLockDiscipline(t *testing.T) { synctest.Test(t, lockDiscipline) }

func lockDiscipline(t *testing.T) {
	b := newBench(t)
	var mu sync.Mutex
	held := map[string][]bool{}
	b.datapath.during = func(op string) {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		defer cancel()
		lock, err := b.store().Lock(ctx)
		if err == nil {
			lock.Unlock()
		}
		mu.Lock()
		defer mu.Unlock()
		held[op] = append(held[op], err != nil)
	}
	b.mustAdd(request{})
	b.mustAdd(request{network: "two"})
	b.mustAdd(request{network: "off", conf: `"mode":"off"`})
	b.mustAdd(request{container: "bad", cgroup: "pod-b", conf: `"x":1`})
	b.mustDel(request{network: "two"})
	b.mustDel(request{network: "off"})
	b.mustDel(request{})
	if err := b.gc(request{conf: `"cni.dev/valid-attachments":[]`}); err != nil {
		t.Error(err)
	}
	for op, want := range map[string]bool{
		"EnsureBPFFS": false, "Load": false,
		"Attach": true, "Pod": true, "SetPod": true, "SetNode": true, "DropPod": true, "Sweep 4": true, "Sweep 0": true,
	} {
		if len(held[op]) == 0 {
			t.Errorf("%s was not called", op)
		}
		for _, got := range held[op] {
			if got != want {
				t.Errorf("lock held during %s: %v", op, got)
			}
		}
	}
}

// writeNewerRecord makes the record of r one of a later format.
func (b *bench) writeNewerRecord(r request) {
	b.t.Helper()
	rec, _ := b.record(r)
	data, err := os.ReadFile(filepath.Join(b.runDir, "attachments", rec.Key.FileName()))
	if err != nil {
		b.t.Fatal(err)
	}
	text := strings.Replace(string(data), `"version":1`, `"version":99`, 1)
	text = strings.Replace(text, `"settings":{`, `"settings2":{`, 1)
	if text == string(data) {
		b.t.Fatal("the record does not look as expected")
	}
	b.writeRecord(r, text)
}

// writeRecord writes in place: the index has a hard link to the file.
func (b *bench) writeRecord(r request, text string) {
	b.t.Helper()
	rec, ok := b.record(r)
	if !ok {
		b.t.Fatal("no record")
	}
	if err := os.WriteFile(filepath.Join(b.runDir, "attachments", rec.Key.FileName()), []byte(text), 0o600); err != nil {
		b.t.Fatal(err)
	}
}

// A link that cannot be removed does not keep the pod from being deleted.
func TestDelFails(t *testing.T) {
	for _, op := range []string{"DropPod", "Open", "SetPod"} {
		t.Run(op, func(t *testing.T) {
			b := newBench(t)
			b.mustAdd(request{})
			if op != "DropPod" {
				b.mustAdd(request{container: "c2"}) // DEL has to settle with this one
			}
			b.datapath.fail[op] = errors.New("EIO")
			b.mustDel(request{})
			b.wantLines(1, "EIO")
			if _, ok := b.record(request{}); ok {
				t.Error("the record is left")
			}
		})
	}
}

func TestDelPanics(t *testing.T) {
	var names []string
	b := newBench(t)
	b.mustAdd(request{})
	b.step = func(name string) { names = append(names, name) }
	b.mustDel(request{})
	if len(names) == 0 {
		t.Fatal("no steps")
	}
	for _, step := range names {
		t.Run(step, func(t *testing.T) {
			b := newBench(t)
			b.mustAdd(request{})
			b.step = func(name string) {
				if name == step {
					panic("bug at " + step)
				}
			}
			b.mustDel(request{})
			b.wantLines(1, "bug at "+step)
			if _, ok := b.record(request{}); ok {
				t.Error("the record is left")
			}
		})
		t.Run(step+", killed", func(t *testing.T) {
			b := newBench(t)
			b.mustAdd(request{})
			b.die(step)
			b.mustDel(request{})
			b.live()
			b.mustDel(request{})
			b.wantNothing()
		})
	}
}

func TestDelCorruptRecord(t *testing.T) {
	b := newBench(t)
	b.mustAdd(request{})
	b.writeRecord(request{}, "{")
	b.mustDel(request{})
	if _, ok := b.record(request{}); ok {
		t.Error("the record is left")
	}
	// So does the next ADD, which finds the link.
	b.mustAdd(request{})
	b.mustDel(request{})
	b.wantNothing()
}

func TestCheck(t *testing.T) {
	gone := func(b *bench) { delete(b.datapath.links, 101) }
	for _, tc := range []struct {
		name    string
		add     *request
		prepare func(*bench)
		plain   bool // fails with onError plain
		fail    bool // fails with onError fail
	}{
		{name: "right after ADD", add: &request{}},
		{name: "link removed by hand", add: &request{}, prepare: gone, plain: true, fail: true},
		{name: "skipped", add: &request{conf: `"mode":"off"`}},
		{name: "no ADD", fail: true},
		{name: "unmounted bpffs", add: &request{}, prepare: func(b *bench) { gone(b); b.datapath.bpffsDev = 8 }, fail: true},
		{name: "not loaded", add: &request{}, prepare: func(b *bench) { gone(b); b.datapath.loaded = false }, fail: true},
		{name: "cannot tell", add: &request{}, prepare: func(b *bench) { b.datapath.fail["HasLink"] = errors.New("EPERM") }, fail: true},
		{name: "no bpffs", add: &request{}, prepare: func(b *bench) { b.datapath.fail["BPFFSIdentity"] = errors.New("ENOENT") }, fail: true},
		{name: "unloaded", add: &request{}, prepare: func(b *bench) {
			if _, err := NewNode(b.deps()).Unload(b.t.Context(), b.config(), true); err != nil {
				b.t.Error(err)
			}
		}},
		{name: "attaching", add: &request{}, prepare: func(b *bench) {
			rec, _ := b.record(request{})
			rec.Status = attachment.Attaching
			if err := b.store().Put(rec); err != nil {
				b.t.Error(err)
			}
		}, fail: true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b := newBench(t)
			if tc.add != nil {
				b.mustAdd(*tc.add)
				b.logs.take()
			}
			if tc.prepare != nil {
				tc.prepare(b)
			}
			for _, onError := range []string{"plain", "fail"} {
				for _, version := range []string{"0.4.0", "1.0.0", "1.1.0"} {
					for _, noPrev := range []bool{false, true} {
						err := b.check(request{version: version, noPrev: noPrev, conf: `"onError":"` + onError + `"`})
						want := tc.plain
						if onError == "fail" {
							want = tc.fail
						}
						if want {
							wantCode(t, err, types.ErrTryAgainLater)
						} else if err != nil {
							t.Errorf("onError %s: %v", onError, err)
						}
					}
				}
			}
		})
	}
	t.Run("bad key", func(t *testing.T) {
		b := newBench(t)
		if err := b.check(request{conf: `"x":1`}); err != nil {
			t.Error(err)
		}
		wantCode(t, b.check(request{conf: `"x":1,"onError":"fail"`}), types.ErrInvalidNetworkConfig, `"x"`)
	})
}

func (b *bench) config() Config {
	c := DefaultConfig()
	c.RunDir = b.runDir
	return c
}

func TestGC(t *testing.T) {
	fill := func(t *testing.T) *bench {
		b := newBench(t)
		b.mustAdd(request{container: "c1"})
		b.mustAdd(request{container: "c2", cgroup: "pod-b"})
		b.mustAdd(request{container: "c3", cgroup: "pod-b"})
		b.mustAdd(request{container: "c4", conf: `"mode":"off"`, cgroup: "-"})
		b.mustAdd(request{network: "foreign", container: "c1", ifname: "net1"})
		b.logs.take()
		return b
	}
	list := func(s string) request { return request{conf: `"cni.dev/valid-attachments":` + s} }
	remaining := func(t *testing.T, b *bench) []string {
		t.Helper()
		records, err := b.store().List()
		if err != nil {
			t.Error(err)
		}
		var names []string
		for _, r := range records {
			names = append(names, r.Network+"/"+r.ContainerID)
		}
		return names
	}

	for _, none := range []string{"null", "[]", "[ ]", `[{"containerID":"c9","ifname":"eth0"}]`, `[{"containerID":"c1","ifname":"eth1"}]`} {
		t.Run(none, func(t *testing.T) {
			b := fill(t)
			if err := b.gc(list(none)); err != nil {
				t.Fatal(err)
			}
			if got := remaining(t, b); !reflect.DeepEqual(got, []string{"foreign/c1"}) {
				t.Errorf("left %v", got)
			}
			b.wantLinks(101)
			if b.datapath.called("Sweep 0") != 1 {
				t.Error("dead cgroups were not swept")
			}
		})
	}
	t.Run("some valid", func(t *testing.T) {
		b := fill(t)
		if err := b.gc(list(`[{"containerID":"c3","ifname":"eth0"},{"containerID":"c1","ifname":"eth0"}]`)); err != nil {
			t.Fatal(err)
		}
		if got := remaining(t, b); len(got) != 3 {
			t.Errorf("left %v", got)
		}
		b.wantLinks(101, 102)
	})
	for _, bad := range []string{`{}`, `"x"`, `[1]`, `[null]`, `[{}]`, `[{"containerID":"c1"}]`, `[{"containerID":1,"ifname":"eth0"}]`} {
		t.Run("refuses "+bad, func(t *testing.T) {
			b := fill(t)
			wantCode(t, b.gc(list(bad)), types.ErrInvalidNetworkConfig, "nothing was removed")
			if got := remaining(t, b); len(got) != 5 {
				t.Errorf("left %v", got)
			}
		})
	}
	t.Run("absent", func(t *testing.T) {
		b := fill(t)
		wantCode(t, b.gc(request{}), types.ErrInvalidNetworkConfig, "cni.dev/valid-attachments is missing")
		wantCode(t, b.gc(request{conf: `"cni.dev/Valid-Attachments":[]`}), types.ErrInvalidNetworkConfig)
		if got := remaining(t, b); len(got) != 5 {
			t.Errorf("left %v", got)
		}
	})
	t.Run("broken keys", func(t *testing.T) {
		b := fill(t)
		if err := b.gc(request{conf: `"onError":"fail","x":1,"cni.dev/valid-attachments":null`}); err != nil {
			t.Fatal(err)
		}
		if got := remaining(t, b); len(got) != 1 {
			t.Errorf("left %v", got)
		}
	})
	t.Run("errors are joined", func(t *testing.T) {
		b := fill(t)
		b.datapath.fail["DropPod"] = errors.New("EIO")
		b.datapath.fail["Sweep 0"] = errors.New("ENXIO")
		err := b.gc(list("[]"))
		wantCode(t, err, types.ErrTryAgainLater, "EIO", "ENXIO", "c2")
		b.datapath.fail = map[string]error{}
		if err := b.gc(list("[]")); err != nil {
			t.Error(err)
		}
		if got := remaining(t, b); len(got) != 1 {
			t.Errorf("left %v", got)
		}
	})
	t.Run("corrupt record", func(t *testing.T) {
		b := fill(t)
		b.writeRecord(request{container: "c2"}, "{")
		if err := b.gc(list("[]")); err != nil {
			t.Error(err)
		}
		b.wantLinks(101)
	})
	timed(t, "lock is stuck", func(t *testing.T) {
		b := fill(t)
		lock, err := b.store().Lock(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer lock.Unlock()
		b.budget = 1e6 // a millisecond
		wantCode(t, b.gc(list("[]")), types.ErrTryAgainLater, "busy: ")
	})
}

func TestStatus(t *testing.T) {
	for _, tc := range []struct {
		name    string
		conf    string
		prepare func(*bench)
		fails   string // with onError fail
	}{
		{name: "fresh node"},
		{name: "no verdict", prepare: func(b *bench) { b.verdicts.cached = nil }},
		{name: "loaded", prepare: func(b *bench) { b.datapath.loaded = true }},
		{name: "gate open", prepare: func(b *bench) { b.datapath.loaded, b.datapath.node.Open, b.verdicts.cached = true, true, nil }},
		{name: "unsupported", prepare: func(b *bench) { b.verdicts.cached = &Verdict{Summary: "order is lost"} }, fails: "order is lost"},
		{name: "unsupported, loaded", prepare: func(b *bench) { b.datapath.loaded, b.verdicts.cached = true, &Verdict{Summary: "order is lost"} }, fails: "order is lost"},
		{name: "no cgroup2", prepare: func(b *bench) { b.cgroups.rootErr = podcgroup.ErrNoCgroup2 }, fails: "cgroup"},
		{name: "no permission", prepare: func(b *bench) { b.datapath.fail["Open"] = errors.New("EPERM") }, fails: "EPERM"},
		{name: "not loadable", prepare: func(b *bench) { b.datapath.fail["Loadable"] = datapath.ErrNoBPFFS }, fails: "BPF file system"},
		{name: "loaded once", prepare: func(b *bench) { b.datapath.loaded, b.datapath.fail["Loadable"] = true, datapath.ErrNoBPFFS }},
		{name: "bad key", conf: `"x":1`, fails: `"x"`},
		{name: "mode off", conf: `"mode":"off"`, prepare: func(b *bench) { b.verdicts.cached = &Verdict{} }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b := newBench(t)
			if tc.prepare != nil {
				tc.prepare(b)
			}
			if err := b.status(request{conf: tc.conf}); err != nil {
				t.Errorf("onError plain: %v", err)
			}
			err := b.status(request{conf: strings.TrimPrefix(tc.conf+`,"onError":"fail"`, ",")})
			if tc.fails != "" {
				wantCode(t, err, types.ErrPluginNotAvailable, tc.fails)
			} else if err != nil {
				t.Errorf("onError fail: %v", err)
			}
			if b.datapath.called("Load") != 0 {
				t.Error("STATUS loaded the datapath")
			}
		})
	}
}

// Many at once, on few cgroups, in no order; then nothing is left.
func TestConcurrentAddAndDel(t *testing.T) {
	b := newBench(t)
	b.budget = 60e9
	var wg sync.WaitGroup
	for i := range 100 {
		wg.Go(func() {
			r := request{container: fmt.Sprintf("c%d", i), cgroup: []string{"pod-a", "pod-b"}[i%2]}
			if i%5 == 0 {
				r.conf = `"mode":"off"`
			}
			b.mustAdd(r)
			if i%3 == 0 {
				b.mustAdd(r)
			}
			b.mustDel(r)
			b.mustDel(r)
		})
	}
	wg.Wait()
	b.wantNothing()
	if _, err := os.Stat(filepath.Join(b.runDir, "cgroups", "101")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the index of cgroup 101 is left: %v", err)
	}
}

func FuzzGC(f *testing.F) {
	for _, seed := range []string{"null", "[]", `[{"containerID":"c1","ifname":"eth0"}]`, `{}`, `[[]]`, `[{"containerID":null}]`} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, list string) {
		in, err := decodeInput([]byte(`{"name":"n","cni.dev/valid-attachments":` + list + `}`))
		if err != nil {
			return
		}
		valid, err := in.validAttachments()
		if (valid == nil) == (err == nil) {
			t.Errorf("list %v, error %v", valid, err)
		}
		for key := range valid {
			if key.Network != "n" {
				t.Errorf("key %+v", key)
			}
		}
	})
}

// A DEL that has lost its time before it comes to the lock takes it all the same, if it
// is free.
func TestDelLate(t *testing.T) { synctest.Test(t, delLate) }

func delLate(t *testing.T) {
	b := newBench(t)
	b.mustAdd(request{})
	p := b.plugin(io.Discard)
	log := p.Log
	p.Log = func(c Config) (*slog.Logger, io.Closer) {
		time.Sleep(p.budget * 9 / 10) // as where the log's disk is slow
		return log(c)
	}
	if err := p.Del(b.args(request{})); err != nil {
		t.Error(err)
	}
	b.wantLines(0)
	b.wantNothing()
}

// In a run directory that outlives a reboot, records speak of links that are gone and of
// cgroups whose ids are others' by now.
func TestStaleRecords(t *testing.T) {
	// rebooted returns a node after a reboot, and before any DEL of what was there.
	rebooted := func(t *testing.T, rs ...request) *bench {
		b := newBench(t)
		for _, r := range rs {
			b.mustAdd(r)
			b.age(r)
		}
		b.logs.take()
		b.datapath.reboot()
		return b
	}
	other := request{container: "c2"} // the same cgroup id
	timed(t, "ADD that finds the lock busy", func(t *testing.T) {
		b := rebooted(t, request{})
		b.datapath.loaded, b.datapath.node.Open = true, true
		lock, err := b.store().Lock(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		b.mustAdd(request{})
		b.wantRecord(request{}, attachment.Skipped, "busy: ")
		lock.Unlock()
		if err := b.node().Sweep(t.Context(), b.config()); err != nil {
			t.Fatal(err)
		}
		b.wantRecord(request{}, attachment.Attached, "")
		b.wantLinks(101)
	})
	t.Run("status", func(t *testing.T) {
		b := rebooted(t, request{}, request{container: "db", cniArgs: "K8S_POD_NAMESPACE=ns;K8S_POD_NAME=db"})
		b.mustAdd(other)
		r := b.node().Status(b.config(), "")
		if len(r.Pods) != 2 || r.Totals.Pods["attached"] != 1 || r.Totals.Pods[NotAttached] != 1 {
			t.Fatalf("pods %+v", r.Pods)
		}
		if db := r.Pods[0]; db.Name != "db" || db.State != NotAttached || db.Reason != reasonReboot || db.CgroupID != 0 {
			t.Errorf("pod %+v", db)
		}
		if web := r.Pods[1]; web.State != "attached" || !slices.Equal(web.Containers, []string{"c2"}) {
			t.Errorf("pod %+v", web)
		}
	})
	t.Run("settings of another pod", func(t *testing.T) {
		b := rebooted(t, request{conf: `"mode":"off"`}, request{network: "second", conf: `"excludePorts":[80]`})
		b.mustAdd(other)
		if p := b.pod(101); !p.Enabled || len(p.ExcludePorts) > 0 {
			t.Errorf("settings %+v", p)
		}
		b.mustDel(request{})
		b.mustDel(request{network: "second"})
		b.wantLinks(101)
		b.mustDel(other)
		b.wantNothing()
	})
	t.Run("link of another pod", func(t *testing.T) {
		b := rebooted(t, request{})
		b.mustAdd(other)
		b.mustDel(other)
		b.wantLinks()
	})
	t.Run("link without a record", func(t *testing.T) {
		b := rebooted(t, request{})
		b.mustAdd(other)
		rec, _ := b.record(other)
		if err := b.store().Delete(rec.Key); err != nil {
			t.Fatal(err)
		}
		b.mustDel(request{})
		b.wantLinks(101)
	})
	t.Run("CHECK", func(t *testing.T) {
		b := rebooted(t, request{})
		b.datapath.loaded = true
		b.datapath.bpffsDev-- // it may well have the number that it had
		if err := b.check(request{}); err != nil {
			t.Error(err)
		}
		wantCode(t, b.check(request{conf: `"onError":"fail"`}), types.ErrTryAgainLater, reasonReboot)
	})
	t.Run("switch and unload", func(t *testing.T) {
		b := rebooted(t, request{})
		b.mustAdd(request{container: "c2", cniArgs: "K8S_POD_NAMESPACE=ns;K8S_POD_NAME=db"})
		_, err := b.node().SwitchPod(t.Context(), b.config(), "ns", "web", true)
		if !errors.Is(err, ErrNoPod) || strings.Contains(err.Error(), "skipped") || b.pod(101).SwitchedOff {
			t.Errorf("error %v, settings %+v", err, b.pod(101))
		}
		if out, err := b.node().Unload(t.Context(), b.config(), true); err != nil || out.Detached != 1 {
			t.Errorf("%+v, %v", out, err)
		}
	})
	t.Run("not adopted", func(t *testing.T) {
		b := newBench(t)
		b.datapath.fail["Load"] = datapath.ErrBusy
		b.mustAdd(request{})
		delete(b.datapath.fail, "Load")
		b.age(request{})
		b.datapath.loaded = true
		if err := b.node().Sweep(t.Context(), b.config()); err != nil {
			t.Error(err)
		}
		b.wantLinks()
	})
}
