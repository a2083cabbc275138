package plugin

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/skipstack/skipstack/plugin/attachment"
	"github.com/skipstack/skipstack/plugin/datapath"
	"github.com/skipstack/skipstack/plugin/podcgroup"
)

func (b *bench) node() *Node { return NewNode(b.deps()) }

func TestLoad(t *testing.T) {
	risky := &Verdict{Supported: true, Node: datapath.NodeSettings{Open: true, Risks: datapath.RiskSplice, Funnel: true}}
	for _, tc := range []struct {
		name    string
		prepare func(*bench)
		was     string
		probes  int
		gate    datapath.NodeSettings
	}{
		{"fresh", func(b *bench) { b.verdicts.cached, b.verdicts.probed = nil, risky }, "nothing", 1, risky.Node},
		{"verdict cached", func(b *bench) { b.verdicts.cached = risky }, "nothing", 0, risky.Node},
		{"loaded", func(b *bench) { b.datapath.loaded, b.datapath.build = true, "this" }, "this build", 0, safe().Node},
		{"upgrade", func(b *bench) { b.datapath.loaded, b.datapath.build = true, "older" }, "another build", 0, safe().Node},
		{"switched off stays", func(b *bench) { b.datapath.loaded, b.datapath.node.SwitchedOff = true, true }, "another build", 0,
			datapath.NodeSettings{Open: true, SwitchedOff: true}},
		{"unsupported", func(b *bench) { b.verdicts.cached = &Verdict{Node: datapath.NodeSettings{Open: true}} }, "nothing", 0, datapath.NodeSettings{}},
		{"unsupported by now", func(b *bench) {
			b.datapath.loaded, b.datapath.node.Open = true, true
			b.verdicts.cached = &Verdict{}
		}, "another build", 0, datapath.NodeSettings{}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b := newBench(t)
			tc.prepare(b)
			got, err := b.node().Load(t.Context(), b.config())
			if err != nil {
				t.Fatal(err)
			}
			if got.Was != tc.was || got.MaxConnections != DefaultMaxConnections || got.Node != tc.gate || b.verdicts.probes != tc.probes {
				t.Errorf("got %+v after %d probes, want %+v", got, b.verdicts.probes, tc)
			}
		})
	}
	t.Run("fails", func(t *testing.T) {
		for _, op := range []string{"EnsureBPFFS", "Open", "Load", "SetNode"} {
			b := newBench(t)
			b.datapath.fail[op] = errors.New("EIO")
			if _, err := b.node().Load(t.Context(), b.config()); err == nil {
				t.Errorf("%s: no error", op)
			}
		}
	})
}

// A wrong cgroup root is found before anything is loaded, the verdict being known
// or not.
func TestLoadChecksCgroupRootFirst(t *testing.T) {
	for _, cached := range []*Verdict{nil, safe()} {
		b := newBench(t)
		b.verdicts.cached, b.verdicts.probed = cached, safe()
		b.cgroups.rootErr = podcgroup.ErrNoCgroup2
		if _, err := b.node().Load(t.Context(), b.config()); !errors.Is(err, podcgroup.ErrNoCgroup2) {
			t.Errorf("error %v", err)
		}
		if b.datapath.loaded || b.datapath.called("EnsureBPFFS") > 0 || b.verdicts.probes > 0 {
			t.Errorf("did %v, %d probes", b.datapath.calls, b.verdicts.probes)
		}
	}
}

// Where there is no BPF file system, nothing is written.
func TestLoadChecksBPFFSFirst(t *testing.T) {
	b := newBench(t)
	b.runDir = filepath.Join(b.runDir, "none")
	b.datapath.fail["EnsureBPFFS"] = datapath.ErrNoBPFFS
	if _, err := b.node().Load(t.Context(), b.config()); !errors.Is(err, datapath.ErrNoBPFFS) {
		t.Errorf("error %v", err)
	}
	if _, err := os.Lstat(b.runDir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the run directory was made: %v", err)
	}
}

func TestLoadSaysWhatPodsGet(t *testing.T) {
	risky := datapath.NodeSettings{Open: true, Risks: datapath.RiskSplice | datapath.RiskEpoll}
	for _, tc := range []struct {
		name string
		gate datapath.NodeSettings
		conf func(*Config)
		want string
	}{
		{"safe", datapath.NodeSettings{Open: true}, func(*Config) {}, ""},
		{"risks", risky, func(*Config) {}, "the kernel has risks that are not accepted: splice, epoll (key"},
		{"some accepted", risky, func(c *Config) { c.AcceptRisks = datapath.RiskSplice }, "the kernel has risks that are not accepted: epoll (key"},
		{"all accepted", risky, func(c *Config) { c.AcceptRisks = datapath.RiskSplice | datapath.RiskEpoll }, ""},
		{"mode on", risky, func(c *Config) { c.Mode = ModeOn }, ""},
		{"mode off", datapath.NodeSettings{Open: true}, func(c *Config) { c.Mode = ModeOff }, "mode is off"},
		{"unsupported", datapath.NodeSettings{}, func(*Config) {}, "the kernel is not supported"},
	} {
		for _, off := range []bool{false, true} {
			b := newBench(t)
			b.verdicts.cached = &Verdict{Supported: tc.gate.Open, Node: tc.gate}
			b.datapath.node.SwitchedOff, b.datapath.loaded, b.datapath.build = off, true, "this"
			conf := b.config()
			tc.conf(&conf)
			got, err := b.node().Load(t.Context(), conf)
			if err != nil || !strings.HasPrefix(got.Plain, tc.want) || tc.want == "" && got.Plain != "" || got.Node.SwitchedOff != off {
				t.Errorf("%s: got %+v, error %v, want %q", tc.name, got, err, tc.want)
			}
		}
	}
}

func TestProbe(t *testing.T) {
	b := newBench(t)
	b.verdicts.cached, b.verdicts.probed = nil, safe()
	// An ADD came first; its pod waits for the gate.
	b.mustAdd(request{})
	if b.datapath.node.Open {
		t.Fatal("the gate is open")
	}
	if v, err := b.node().Probe(t.Context(), b.config(), false, nil); err != nil || !v.Supported {
		t.Fatalf("verdict %+v, error %v", v, err)
	}
	if !b.datapath.node.Open || b.verdicts.probes != 1 {
		t.Errorf("gate %+v after %d probes", b.datapath.node, b.verdicts.probes)
	}
	// A second prober finds the verdict, unless it is worth another try.
	if _, err := b.node().Probe(t.Context(), b.config(), false, nil); err != nil || b.verdicts.probes != 1 {
		t.Errorf("error %v, %d probes", err, b.verdicts.probes)
	}
	b.verdicts.cached = inconclusive()
	if v, err := b.node().Probe(t.Context(), b.config(), false, nil); err != nil || !v.Supported || b.verdicts.probes != 2 {
		t.Errorf("verdict %+v, error %v, %d probes", v, err, b.verdicts.probes)
	}

	// Unloaded meanwhile: it stays so, unless an ADD could not load it.
	if _, err := b.node().Unload(t.Context(), b.config(), true); err != nil {
		t.Fatal(err)
	}
	if _, err := b.node().Probe(t.Context(), b.config(), false, nil); err != nil || b.datapath.loaded {
		t.Errorf("error %v, loaded %v", err, b.datapath.loaded)
	}
	if _, err := b.node().Probe(t.Context(), b.config(), true, nil); err != nil || !b.datapath.loaded || !b.datapath.node.Open {
		t.Errorf("error %v, loaded %v, gate %+v", err, b.datapath.loaded, b.datapath.node)
	}

	b.verdicts.cached, b.verdicts.probed = nil, &Verdict{}
	b.datapath.loaded = false
	if _, err := b.node().Probe(t.Context(), b.config(), true, nil); err != nil || b.datapath.loaded {
		t.Errorf("unsupported: error %v, loaded %v", err, b.datapath.loaded)
	}
}

// What a probe could not tell is asked again when it is due, and the gate follows.
func TestProbeAgain(t *testing.T) {
	risky := datapath.NodeSettings{Open: true, Risks: datapath.RiskEpoll}
	for name, now := range map[string]datapath.NodeSettings{
		"better": {Open: true, MPTCPListeners: true}, "worse": {Open: true, Risks: datapath.RiskEpoll | datapath.RiskSplice}, "unfit": {},
	} {
		for _, due := range []bool{false, true} {
			b := newBench(t)
			b.datapath.loaded, b.datapath.node = true, risky
			b.verdicts.cached = &Verdict{Supported: true, Node: risky, Due: due}
			b.verdicts.probed = &Verdict{Supported: now.Open, Node: now}
			_, err := b.node().Probe(t.Context(), b.config(), false, nil)
			want := risky
			if due {
				want = now
			}
			if err != nil || b.datapath.node != want || b.verdicts.probes > 0 != due {
				t.Errorf("%s, due %v: gate %+v after %d probes, error %v", name, due, b.datapath.node, b.verdicts.probes, err)
			}
		}
	}
}

// After an upgrade the prober has the gate go by the new binary's verdict. Meanwhile,
// and where that comes to nothing, the gate stays as it is.
func TestProbeAfterUpgrade(t *testing.T) {
	const epoll, splice = datapath.RiskEpoll, datapath.RiskSplice
	type gate = datapath.NodeSettings
	risky := gate{Open: true, Risks: epoll}
	guarded := gate{Open: true, Guard: datapath.GuardLSM}
	for name, tc := range map[string]struct {
		was       gate
		probed    *Verdict // nil: probing fails
		same, not gate     // by it, where the loaded programs are of this build, or not
	}{
		"further risk":     {gate{Open: true}, &Verdict{Supported: true, Node: risky}, risky, risky},
		"less risk":        {risky, safe(), gate{Open: true}, risky},
		"unsupported":      {risky, &Verdict{}, gate{}, gate{Risks: epoll}},
		"inconclusive":     {risky, inconclusive(), risky, risky},
		"probing fails":    {risky, nil, risky, risky},
		"MPTCP":            {gate{Open: true}, &Verdict{Supported: true, Node: gate{Open: true, MPTCPListeners: true}}, gate{Open: true, MPTCPListeners: true}, gate{Open: true}},
		"guarded by now":   {gate{Open: true}, &Verdict{Supported: true, Node: guarded}, guarded, guarded},
		"guard not wanted": {gate{Open: true, Risks: splice}, &Verdict{Supported: true, Node: guarded}, guarded, gate{Open: true, Risks: splice}},
		"guard works not":  {guarded, &Verdict{Supported: true, Node: gate{Open: true, Risks: splice}}, gate{Open: true, Risks: splice}, gate{Open: true, Risks: splice}},
		"guard not needed": {guarded, safe(), gate{Open: true}, guarded},
		"switched off":     {gate{Open: true, SwitchedOff: true}, &Verdict{Supported: true, Node: risky}, gate{Open: true, SwitchedOff: true, Risks: epoll}, gate{Open: true, SwitchedOff: true, Risks: epoll}},
	} {
		for build, want := range []gate{tc.same, tc.not} {
			t.Run(fmt.Sprintf("%s, build %d", name, build), func(t *testing.T) {
				b := newBench(t)
				b.datapath.loaded, b.datapath.node = true, tc.was
				b.datapath.programs[0] += byte(build)
				b.verdicts.cached, b.verdicts.probed = nil, tc.probed
				// It does not come in between either.
				b.datapath.during = func(op string) {
					if now := b.datapath.node; op != "SetNode" && now != tc.was && now != want {
						t.Errorf("gate %+v at %s", now, op)
					}
				}
				b.mustAdd(request{})
				if !slices.Equal(b.prober.starts, []bool{false}) {
					t.Fatalf("prober %v", b.prober.starts)
				}
				if _, err := b.node().Probe(t.Context(), b.config(), false, nil); (err != nil) != (tc.probed == nil) {
					t.Errorf("error %v", err)
				}
				if b.datapath.node != want || b.verdicts.probes != 1 {
					t.Errorf("gate %+v after %d probes, want %+v", b.datapath.node, b.verdicts.probes, want)
				}
				// The next ADD is content, unless it has to be tried again.
				b.mustAdd(request{container: "c2"})
				if again := tc.probed == nil; len(b.prober.starts) > 1 != again {
					t.Errorf("prober %v", b.prober.starts)
				}
			})
		}
	}
}

// A gate that is closed is opened for programs of this build only, which the prober puts
// in the place of another's.
func TestProbeRenews(t *testing.T) {
	for name, verdict := range map[string]*Verdict{"cached": safe(), "none yet": nil} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			b.datapath.loaded, b.datapath.build = true, "another"
			b.datapath.programs[0]++
			b.verdicts.cached, b.verdicts.probed = verdict, safe()
			b.datapath.during = func(op string) {
				if b.datapath.node.Open && b.datapath.programs != datapath.Build() {
					t.Errorf("open at %s", op)
				}
			}
			b.mustAdd(request{})
			b.wantLinks(101)
			if b.datapath.node.Open || !slices.Equal(b.prober.starts, []bool{false}) {
				t.Fatalf("gate %+v, prober %v", b.datapath.node, b.prober.starts)
			}
			if _, err := b.node().Probe(t.Context(), b.config(), false, nil); err != nil {
				t.Fatal(err)
			}
			if b.datapath.programs != datapath.Build() || !b.datapath.node.Open {
				t.Errorf("gate %+v, this build's programs: %v", b.datapath.node, b.datapath.programs == datapath.Build())
			}
			b.mustAdd(request{container: "c2"})
			if len(b.prober.starts) != 1 || b.datapath.open != 0 {
				t.Errorf("prober %v, %d sets are open", b.prober.starts, b.datapath.open)
			}
		})
	}
	t.Run("in vain", func(t *testing.T) {
		b := newBench(t)
		b.datapath.loaded, b.datapath.build = true, "another"
		b.datapath.programs[0]++
		b.datapath.fail["Upgrade"] = datapath.ErrUnsupported
		if _, err := b.node().Probe(t.Context(), b.config(), false, nil); !errors.Is(err, datapath.ErrUnsupported) {
			t.Errorf("error %v", err)
		}
		if b.datapath.node.Open || b.datapath.open != 0 {
			t.Errorf("gate %+v, %d sets are open", b.datapath.node, b.datapath.open)
		}
	})
	t.Run("unsupported", func(t *testing.T) {
		b := newBench(t)
		b.datapath.loaded, b.datapath.build = true, "another"
		b.datapath.programs[0]++
		b.verdicts.cached = &Verdict{}
		_, _ = b.node().Probe(t.Context(), b.config(), false, nil)
		if b.datapath.called("Upgrade") != 0 || b.datapath.build != "another" || b.datapath.node.Open {
			t.Errorf("calls %v, gate %+v", b.datapath.calls, b.datapath.node)
		}
	})
}

// A guard that cannot be loaded is left out of the verdict, and tried again when that
// is due.
func TestProbeGuardFails(t *testing.T) {
	guarded := &Verdict{Supported: true, Node: datapath.NodeSettings{Open: true, Guard: datapath.GuardLSM}}
	b := newBench(t)
	b.datapath.loaded, b.verdicts.cached, b.verdicts.probed = true, guarded, guarded
	b.datapath.fail["SetNode"] = fmt.Errorf("%w: too many programs", datapath.ErrGuard)
	if _, err := b.node().Probe(t.Context(), b.config(), false, nil); !errors.Is(err, datapath.ErrGuard) {
		t.Errorf("error %v", err)
	}
	without := datapath.NodeSettings{Open: true, Risks: datapath.RiskSplice}
	if b.datapath.node != without || b.verdicts.cached.Node != without || b.verdicts.probes != 0 {
		t.Errorf("gate %+v, verdict %+v, %d probes", b.datapath.node, b.verdicts.cached, b.verdicts.probes)
	}
	delete(b.datapath.fail, "SetNode")
	b.verdicts.cached.Due = true
	if _, err := b.node().Probe(t.Context(), b.config(), false, nil); err != nil || b.datapath.node != guarded.Node {
		t.Errorf("gate %+v, error %v", b.datapath.node, err)
	}
}

// One prober at a time, and none beside load and unload.
func TestProbeLock(t *testing.T) { synctest.Test(t, probeLock) }

func probeLock(t *testing.T) {
	b := newBench(t)
	held, err := lockProbe(t.Context(), b.runDir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.node().Probe(t.Context(), b.config(), false, nil); !errors.Is(err, errProbing) {
		t.Errorf("Probe: %v", err)
	}
	if _, err := b.node().Load(t.Context(), b.config()); !errors.Is(err, errProbing) {
		t.Errorf("Load: %v", err)
	}
	if _, err := b.node().Unload(t.Context(), b.config(), true); !errors.Is(err, errProbing) {
		t.Errorf("Unload: %v", err)
	}
	// The child has the lock and gives it back.
	if _, err := b.node().Probe(t.Context(), b.config(), false, held); err != nil {
		t.Error(err)
	}
	held, err = lockProbe(ended(), b.runDir)
	if err != nil {
		t.Fatal(err)
	}
	held.Close()

	if err := os.Remove(filepath.Join(b.runDir, attachment.ProbeLock)); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/etc/passwd", filepath.Join(b.runDir, attachment.ProbeLock)); err != nil {
		t.Fatal(err)
	}
	if _, err := lockProbe(ended(), b.runDir); err == nil {
		t.Error("followed a symbolic link")
	}
}

func TestUnload(t *testing.T) {
	t.Run("refuses", func(t *testing.T) {
		b := newBench(t)
		b.mustAdd(request{})
		_, err := b.node().Unload(t.Context(), b.config(), false)
		if !errors.Is(err, datapath.ErrInUse) || !strings.Contains(err.Error(), "ns/web") {
			t.Errorf("error %v", err)
		}
		b.wantLinks(101)
		b.wantRecord(request{}, attachment.Attached, "")
	})
	t.Run("forced", func(t *testing.T) {
		b := newBench(t)
		b.mustAdd(request{})
		b.mustAdd(request{container: "off", conf: `"mode":"off"`, cgroup: "pod-b"})
		got, err := b.node().Unload(t.Context(), b.config(), true)
		if err != nil || !reflect.DeepEqual(got, Unloaded{Was: true, Detached: 1, Sockets: 3}) {
			t.Errorf("got %+v, error %v", got, err)
		}
		b.wantLinks()
		b.wantRecord(request{}, attachment.Skipped, "unloaded")
		b.wantRecord(request{container: "off"}, attachment.Skipped, "mode off")
		b.mustDel(request{})
		b.mustDel(request{container: "off"})
		b.wantNothing()
	})
	t.Run("killed after recording", func(t *testing.T) {
		b := newBench(t)
		b.mustAdd(request{})
		b.datapath.fail["Unload"] = errors.New("killed")
		if _, err := b.node().Unload(t.Context(), b.config(), true); err == nil {
			t.Fatal("no error")
		}
		b.wantLinks(101)
		b.mustDel(request{})
		b.wantNothing()
	})
	t.Run("only dead pods", func(t *testing.T) {
		b := newBench(t)
		b.mustAdd(request{})
		b.datapath.links = map[uint64]bool{}
		if _, err := b.node().Unload(t.Context(), b.config(), false); err != nil {
			t.Error(err)
		}
	})
	t.Run("links without records", func(t *testing.T) {
		b := newBench(t)
		b.mustAdd(request{})
		if err := os.RemoveAll(b.runDir); err != nil {
			t.Fatal(err)
		}
		if _, err := b.node().Unload(t.Context(), b.config(), false); !errors.Is(err, datapath.ErrInUse) {
			t.Errorf("error %v", err)
		}
	})
	t.Run("nothing loaded", func(t *testing.T) {
		b := newBench(t)
		if got, err := b.node().Unload(t.Context(), b.config(), false); err != nil || got.Was {
			t.Errorf("got %+v, error %v", got, err)
		}
	})
	t.Run("no bpffs", func(t *testing.T) {
		b := newBench(t)
		b.mustAdd(request{})
		b.datapath.noBPFFS = true
		_, err := b.node().Unload(t.Context(), b.config(), true)
		if !errors.Is(err, datapath.ErrNoBPFFS) || !strings.Contains(err.Error(), "nothing was loaded at "+DefaultBPFFS) {
			t.Errorf("error %v", err)
		}
		b.wantLinks(101)
		b.wantRecord(request{}, attachment.Attached, "")
	})
	t.Run("counts pods", func(t *testing.T) {
		b := newBench(t)
		b.mustAdd(request{})
		b.mustAdd(request{ifname: "net1", network: "second"})
		b.mustAdd(request{ifname: "net2", network: "third"})
		b.mustAdd(request{container: "c2", cgroup: "pod-b", cniArgs: "K8S_POD_NAMESPACE=ns;K8S_POD_NAME=db"})
		_, err := b.node().Unload(t.Context(), b.config(), false)
		if !errors.Is(err, datapath.ErrInUse) || !strings.HasSuffix(err.Error(), ": 2 (ns/db, ns/web)") {
			t.Errorf("error %v", err)
		}
		if got, err := b.node().Unload(t.Context(), b.config(), true); err != nil || got.Detached != 2 {
			t.Errorf("got %+v, error %v", got, err)
		}
	})
	t.Run("another bpffs", func(t *testing.T) {
		b := newBench(t)
		r := request{conf: `"bpffs":"/mnt/other"`}
		b.mustAdd(r)
		b.datapath.links = map[uint64]bool{}
		if _, err := b.node().Unload(t.Context(), b.config(), false); err != nil {
			t.Error(err)
		}
		b.wantRecord(r, attachment.Attached, "")
	})
	timed(t, "lock is stuck", func(t *testing.T) {
		b := newBench(t)
		lock, err := b.store().Lock(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer lock.Unlock()
		if _, err := b.node().Unload(t.Context(), b.config(), true); !errors.Is(err, attachment.ErrBusy) {
			t.Errorf("error %v", err)
		}
	})
}

func TestSwitchNode(t *testing.T) {
	b := newBench(t)
	if _, err := b.node().Switch(b.config(), true); !errors.Is(err, datapath.ErrNotLoaded) {
		t.Errorf("nothing loaded: %v", err)
	}
	b.mustAdd(request{})
	b.datapath.counters = map[uint64]datapath.PodCounters{101: {Live: 4}, 102: {Live: 2}}
	// The brake works whoever holds the lock.
	lock, err := b.store().Lock(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	got, err := b.node().Switch(b.config(), true)
	if err != nil || got.Sets != 1 || got.Pods != 0 || got.Sockets != 6 || !b.datapath.node.SwitchedOff {
		t.Errorf("got %+v, error %v, node %+v", got, err, b.datapath.node)
	}
	lock.Unlock()
	b.datapath.counters = map[uint64]datapath.PodCounters{101: {Live: 1}}
	if n, err := got.Left(); err != nil || n != 1 {
		t.Errorf("%d are left, error %v", n, err)
	}
	// With the pins gone, those of the kernel count.
	b.datapath.loaded = false
	if n, err := got.Left(); err != nil || n != 5 {
		t.Errorf("%d are left, error %v", n, err)
	}
	b.datapath.loaded = true
	// So they do where only some are gone: the brake reaches that set, too.
	b.datapath.fail["Open"] = datapath.ErrDamaged
	if got, err := b.node().Switch(b.config(), true); err != nil || got.Sockets != 5 {
		t.Errorf("some pins gone: got %+v, error %v", got, err)
	}
	// Whoever cannot count them says that the switch was thrown.
	b.datapath.fail["Open"] = errors.New("EIO")
	if _, err := b.node().Switch(b.config(), true); err == nil || !strings.Contains(err.Error(), "acceleration is switched off, but") {
		t.Errorf("sockets that cannot be counted: error %v", err)
	}
	delete(b.datapath.fail, "Open")
	b.mustAdd(request{container: "c2"})
	if !b.datapath.node.SwitchedOff {
		t.Error("ADD switched the node on")
	}
	if _, err := b.node().Switch(b.config(), false); err != nil || b.datapath.node.SwitchedOff {
		t.Errorf("error %v, node %+v", err, b.datapath.node)
	}
}

func TestSwitchPod(t *testing.T) {
	b := newBench(t)
	b.mustAdd(request{})
	b.mustAdd(request{container: "other", cgroup: "pod-b", cniArgs: "K8S_POD_NAMESPACE=ns;K8S_POD_NAME=db"})
	b.mustAdd(request{container: "off", cgroup: "-", conf: `"mode":"off"`, cniArgs: "K8S_POD_NAMESPACE=ns;K8S_POD_NAME=off"})
	b.datapath.counters = map[uint64]datapath.PodCounters{101: {Live: 4}, 102: {Live: 2}}
	got, err := b.node().SwitchPod(t.Context(), b.config(), "ns", "web", true)
	if err != nil || got.Sets != 0 || got.Pods != 1 || got.Sockets != 4 {
		t.Errorf("got %+v, error %v", got, err)
	}
	if s := b.pod(101); !s.SwitchedOff || !s.Enabled || b.pod(102).SwitchedOff {
		t.Errorf("settings %+v and %+v", s, b.pod(102))
	}
	if _, err := b.node().SwitchPod(t.Context(), b.config(), "ns", "web", false); err != nil || b.pod(101).SwitchedOff {
		t.Errorf("error %v, settings %+v", err, b.pod(101))
	}
	for name, why := range map[string]string{"none": "", "off": "mode off"} {
		if _, err := b.node().SwitchPod(t.Context(), b.config(), "ns", name, true); !errors.Is(err, ErrNoPod) || !strings.Contains(err.Error(), why) {
			t.Errorf("%s: error %v", name, err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := b.node().SwitchPod(ctx, b.config(), "ns", "web", true); !errors.Is(err, attachment.ErrBusy) {
		t.Errorf("cancelled: %v", err)
	}
}

// The pod is where its ADD has attached it, whatever is configured by now.
func TestSwitchPodAtItsOwnBPFFS(t *testing.T) {
	b := newBench(t)
	b.mustAdd(request{conf: `"bpffs":"/mnt/other"`})
	b.datapath.opened = nil
	got, err := b.node().SwitchPod(t.Context(), b.config(), "ns", "web", true)
	if err != nil || got.Pods != 1 || !b.pod(101).SwitchedOff || !slices.Equal(b.datapath.opened, []string{"/mnt/other"}) {
		t.Errorf("got %+v, error %v, opened %v", got, err, b.datapath.opened)
	}
}

// Trouble with one of a pod's cgroups does not keep the others as they are.
func TestSwitchPodTriesAll(t *testing.T) {
	for op, left := range map[string]uint64{"Pod 101": 101, "Pod 102": 102, "Open /mnt/other": 102, "Open " + DefaultBPFFS: 101} {
		b := newBench(t)
		b.mustAdd(request{})
		b.mustAdd(request{container: "c2", cgroup: "pod-b", conf: `"bpffs":"/mnt/other"`})
		b.datapath.counters = map[uint64]datapath.PodCounters{101: {Live: 4}, 102: {Live: 2}}
		fault := errors.New("EIO")
		b.datapath.fail[op] = fault
		got, err := b.node().SwitchPod(t.Context(), b.config(), "ns", "web", true)
		if !errors.Is(err, fault) || got.Pods != 1 {
			t.Errorf("%s: got %+v, error %v", op, got, err)
		}
		for _, id := range []uint64{101, 102} {
			if b.pod(id).SwitchedOff != (id != left) {
				t.Errorf("%s: cgroup %d: %+v", op, id, b.pod(id))
			}
		}
	}
}
