package doctor

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/skipstack/skipstack/plugin"
	"github.com/skipstack/skipstack/plugin/datapath"
	"github.com/skipstack/skipstack/plugin/podcgroup"
	"github.com/skipstack/skipstack/plugin/verdict"
)

var update = flag.Bool("update", false, "write the golden files")

// made is a verdict in which these probes are not ok, or could not tell.
func made(t *testing.T, results map[string]verdict.Result) *verdict.Verdict {
	t.Helper()
	// The JSON form is what verdicts are made of and checked by.
	v, err := verdict.Untried("x")
	if err != nil {
		t.Fatal(err)
	}
	v.Kernel, v.ProbedAt = "6.18.44", time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	v.Level, v.Risks, v.MPTCPListeners = verdict.Safe, 0, true
	risks := map[string]datapath.Risk{
		verdict.ProbeSplice: datapath.RiskSplice, verdict.ProbeFIONREAD: datapath.RiskFIONREAD,
		verdict.ProbeEpoll: datapath.RiskEpoll, verdict.ProbeCharged: datapath.RiskUncharged,
	}
	for i := range v.Probes {
		p := &v.Probes[i]
		p.Result, p.Detail = verdict.OK, "the "+p.Name+" of this kernel is as it should be"
		if r, ok := results[p.Name]; ok {
			p.Result, p.Detail = r, "the "+p.Name+" of this kernel is not as it should be, which takes a few words more to explain than one line has room for"
			v.Risks |= risks[p.Name]
		}
	}
	if v.Risks != 0 {
		v.Level = verdict.Risky
	}
	for _, fatal := range []string{verdict.ProbeLoad, verdict.ProbeRedirect, verdict.ProbeOrder} {
		if _, ok := results[fatal]; ok {
			v.Level = verdict.Unsupported
		}
	}
	return v
}

type fakeKernel struct {
	verdicts   []*verdict.Verdict // one for each run, the last for the rest
	err        error
	cached     *verdict.Verdict
	saved      *verdict.Verdict
	saveErr    error
	others     []verdict.Other
	othersErr  error
	memoryErr  error
	runs       int
	root       string
	max        uint32
	funnel     bool
	onRun      func()
	memoryRuns int
}

func (k *fakeKernel) Run(_ context.Context, root string) (*verdict.Verdict, error) {
	k.root = root
	if k.onRun != nil {
		k.onRun()
	}
	k.runs++
	if k.err != nil {
		return nil, k.err
	}
	return k.verdicts[min(k.runs, len(k.verdicts))-1], nil
}

func (k *fakeKernel) Cached(string) (*verdict.Verdict, error) {
	if k.cached == nil {
		return nil, verdict.ErrNoVerdict
	}
	return k.cached, nil
}

func (k *fakeKernel) Save(v *verdict.Verdict, _ string) error {
	k.saved = v
	return k.saveErr
}

func (k *fakeKernel) Memory(_ context.Context, _ string, most uint32, funnel bool) (verdict.Memory, error) {
	k.max, k.funnel = most, funnel
	k.memoryRuns++
	return verdict.Memory{MaxConnections: most, Maps: 26 << 20, Programs: 28 << 10, Connection: 3328,
		Maximum: 26<<20 + 28<<10 + 3328*uint64(most), Measured: 64}, k.memoryErr
}

func (k *fakeKernel) Others(context.Context, string, string) ([]verdict.Other, error) {
	return k.others, k.othersErr
}

// fakeDatapath is what is loaded.
type fakeDatapath struct {
	plugin.Datapath
	plugin.Set
	loaded bool
	err    error
	build  byte // what is added to this build's
	max    uint32
	node   datapath.NodeSettings
}

func (f *fakeDatapath) Open(string) (plugin.Set, error) {
	if f.err != nil {
		return nil, f.err
	}
	if !f.loaded {
		return nil, datapath.ErrNotLoaded
	}
	return f, nil
}
func (f *fakeDatapath) Close() error                         { return nil }
func (f *fakeDatapath) Node() (datapath.NodeSettings, error) { return f.node, nil }
func (f *fakeDatapath) Build() ([16]byte, error) {
	build := datapath.Build()
	build[0] += f.build
	return build, nil
}
func (f *fakeDatapath) MaxConnections() (uint32, error) { return f.max, nil }

type fakeCgroups struct {
	plugin.Cgroups
	err error
}

func (c fakeCgroups) Root(string) (string, error) { return "/sys/fs/cgroup", c.err }

// bench is a node to examine.
type bench struct {
	*Options
	kernel *fakeKernel
	loaded *fakeDatapath
	t      *testing.T
}

func newBench(t *testing.T, results map[string]verdict.Result) *bench {
	t.Helper()
	k := &fakeKernel{verdicts: []*verdict.Verdict{made(t, results)}}
	d := &fakeDatapath{}
	conf := plugin.DefaultConfig()
	root := healthy(t)
	conf.RunDir = filepath.Join(root, "run/skipstack")
	return &bench{&Options{
		Root: root, ConfDir: "/etc/cni/net.d", BinDir: "/opt/cni/bin", Config: conf,
		Conflist: Conflist{Path: "/etc/cni/net.d/10-bridge.conflist", Used: "/etc/cni/net.d/10-bridge.conflist"},
		Kernel:   k, Deps: plugin.Deps{Datapath: d, Cgroups: fakeCgroups{}},
	}, k, d, t}
}

func (b *bench) chmodRunDir(mode os.FileMode) {
	b.t.Helper()
	if err := os.Chmod(b.Config.RunDir, mode); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) examine() *Report {
	b.t.Helper()
	r, err := Examine(context.Background(), *b.Options)
	if err != nil {
		b.t.Fatal(err)
	}
	return r
}

var (
	splice   = map[string]verdict.Result{verdict.ProbeSplice: verdict.NotOK}
	disorder = map[string]verdict.Result{verdict.ProbeOrder: verdict.NotOK}
	busy     = map[string]verdict.Result{verdict.ProbeOrder: verdict.CouldNotTell}
)

func TestExitCode(t *testing.T) {
	for name, tc := range map[string]struct {
		results map[string]verdict.Result
		err     error
		code    int
		runs    int
	}{
		"safe":         {nil, nil, ExitSafe, 1},
		"risky":        {splice, nil, ExitRisky, 1},
		"unsupported":  {disorder, nil, ExitUnsupported, 1},
		"inconclusive": {busy, nil, ExitUnknown, probeRuns},
		"not allowed":  {nil, verdict.ErrPrivilege, ExitUnknown, 1},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t, tc.results)
			b.kernel.err = tc.err
			r := b.examine()
			if got := r.ExitCode(); got != tc.code || b.kernel.runs != tc.runs || b.kernel.root != "/sys/fs/cgroup" {
				t.Errorf("exit %d after %d runs at %s", got, b.kernel.runs, b.kernel.root)
			}
			if measured := r.Memory != nil; measured != (tc.code == ExitSafe || tc.code == ExitRisky) || b.kernel.memoryRuns > 0 != measured {
				t.Errorf("memory %v", r.Memory)
			}
		})
	}
	t.Run("busy at first", func(t *testing.T) {
		b := newBench(t, busy)
		b.kernel.verdicts = append(b.kernel.verdicts, made(t, splice))
		if got := b.examine().ExitCode(); got != ExitRisky {
			t.Errorf("exit %d", got)
		}
	})
	t.Run("no cgroup2", func(t *testing.T) {
		b := newBench(t, nil)
		b.Deps.Cgroups = fakeCgroups{err: podcgroup.ErrNoCgroup2}
		r := b.examine()
		if r.ExitCode() != ExitUnsupported || b.kernel.runs != 0 || r.Pods.Outcome != plugin.Plain || r.Verdict.Level != verdict.Unsupported ||
			!strings.Contains(r.Pods.Why, "cgroup: no cgroup v2") || result(r, checkCgroup2) != verdict.NotOK {
			t.Errorf("%+v", r)
		}
		// A root that somebody has named says nothing about the node.
		b.Config.CgroupRoot = "/no/such"
		r = b.examine()
		if r.ExitCode() != ExitUsage || r.Lacks != "" || b.kernel.runs != 0 || r.Pods.Outcome != plugin.Plain {
			t.Errorf("exit %d, %+v", r.ExitCode(), r)
		}
	})
}

func result(r *Report, name string) verdict.Result {
	i := slices.IndexFunc(r.Node, func(p verdict.Probe) bool { return p.Name == name })
	return r.Node[i].Result
}

// The verdict is stored where ADD looks for it, unless that would do harm.
func TestStore(t *testing.T) {
	for name, tc := range map[string]struct {
		prepare func(*bench)
		stored  bool
		why     string
	}{
		"in use":       {func(b *bench) {}, true, ""},
		"not in use":   {func(b *bench) { b.Config.RunDir += "-else" }, false, "not in use here"},
		"--no-cache":   {func(b *bench) { b.NoCache = true }, false, "--no-cache"},
		"read-only":    {func(b *bench) { b.kernel.saveErr = errors.New("read-only file system") }, false, "read-only file system"},
		"not probed":   {func(b *bench) { b.kernel.err = errors.New("x") }, false, "not probed"},
		"another":      {func(b *bench) { b.kernel.cached = made(t, nil) }, true, ""},
		"less is told": {func(b *bench) { b.kernel.cached, b.kernel.verdicts[0] = made(t, nil), made(t, busy) }, false, "could not tell all"},
		"another is less": {func(b *bench) {
			b.kernel.cached = made(t, map[string]verdict.Result{verdict.ProbeEpoll: verdict.CouldNotTell})
			b.kernel.verdicts[0] = made(t, busy)
		}, false, "could not tell all"},
		"writable by all": {func(b *bench) { b.chmodRunDir(0o777) }, false, "can be written by others (mode 0777)"},
		"symbolic link": {func(b *bench) {
			link := b.Config.RunDir + "-link"
			symlink(b.t, filepath.Dir(link), filepath.Base(link), b.Config.RunDir)
			b.Config.RunDir = link
		}, false, "symbolic link"},
		"no worse": {func(b *bench) { b.kernel.cached, b.kernel.verdicts[0] = made(t, busy), made(t, busy) }, true, ""},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t, splice)
			tc.prepare(b)
			r := b.examine()
			if r.Stored != tc.stored || !strings.Contains(r.NotStored, tc.why) || r.Stored == (r.NotStored != "") {
				t.Errorf("stored %v, %q", r.Stored, r.NotStored)
			}
			if tried := b.kernel.saved != nil; tried != (tc.stored || b.kernel.saveErr != nil) {
				t.Errorf("saved: %v", tried)
			}
		})
	}
}

// What pods get depends on the configuration, on what is loaded, and on what is in
// the way.
func TestOutlook(t *testing.T) {
	blocks := func(cgroup string, everywhere bool) []verdict.Other {
		return []verdict.Other{{Program: "theirs", Type: "sock_ops", Cgroup: cgroup, Sharing: verdict.Exclusive, Blocks: true, Everywhere: everywhere, Conflict: "x"}}
	}
	for name, tc := range map[string]struct {
		results      map[string]verdict.Result
		prepare      func(*bench)
		pods, asking plugin.Outcome
		says         string // why, or a note
	}{
		"safe":            {nil, func(*bench) {}, plugin.Accelerated, plugin.Accelerated, "blocking sockets stay plain"},
		"risky":           {splice, func(*bench) {}, plugin.Plain, plugin.Accelerated, "not accepted: splice"},
		"unsupported":     {disorder, func(*bench) {}, plugin.Plain, plugin.Plain, "unsupported: order"},
		"not probed":      {nil, func(b *bench) { b.kernel.err = errors.New("no rights") }, plugin.Unknown, plugin.Unknown, "not probed"},
		"not probed, off": {nil, func(b *bench) { b.kernel.err, b.Config.Mode = errors.New("no rights"), plugin.ModeOff }, plugin.Plain, plugin.Plain, "mode is off"},
		"blocked":         {nil, func(b *bench) { b.kernel.others = blocks("/", true) }, plugin.Plain, plugin.Plain, "theirs of other software at cgroup /"},
		"pushed aside": {nil, func(b *bench) {
			b.kernel.others = blocks("/", true)
			b.kernel.others[0].Sharing = verdict.Override
		}, plugin.Plain, plugin.Plain, "theirs of other software at cgroup / would not run"},
		"blocked below": {nil, func(b *bench) { b.kernel.others = blocks("/kubepods", false) },
			plugin.Accelerated, plugin.Accelerated, "pods below cgroup /kubepods are plain"},
		"strict": {nil, func(b *bench) { b.kernel.others, b.Config.OnError = blocks("/", true), plugin.OnErrorFail },
			plugin.Refused, plugin.Refused, "theirs"},
		"no bpffs": {nil, func(b *bench) { b.Config.BPFFS = "/no/such" }, plugin.Plain, plugin.Plain, "no directory /no/such"},
		"switched off": {nil, func(b *bench) { b.loaded.loaded, b.loaded.node.SwitchedOff, b.loaded.node.Open = true, true, true },
			plugin.Plain, plugin.Plain, "`skipstack on`"},
		"switched off, closed": {nil, func(b *bench) { b.loaded.loaded, b.loaded.node.SwitchedOff = true, true },
			plugin.Plain, plugin.Plain, "`skipstack on`"},
		"earlier verdict": {nil, func(b *bench) {
			b.loaded.loaded, b.loaded.node = true, datapath.NodeSettings{Open: true, Risks: datapath.RiskEpoll}
		}, plugin.Accelerated, plugin.Accelerated, "has it changed in the background, `skipstack load --config /etc/cni/net.d/10-bridge.conflist`"},
		"earlier verdict, this one not kept": {nil, func(b *bench) {
			b.loaded.loaded, b.loaded.node = true, datapath.NodeSettings{Open: true, Risks: datapath.RiskEpoll}
			b.NoCache = true
		}, plugin.Plain, plugin.Accelerated, "goes on so, as this one is not stored"},
		"unsupported by now": {disorder, func(b *bench) { b.loaded.loaded, b.loaded.node.Open = true, true },
			plugin.Plain, plugin.Plain, "it accelerates, and should not"},
		"another build, further risk": {splice, func(b *bench) { b.loaded.loaded, b.loaded.node.Open, b.loaded.build = true, true, 1 },
			plugin.Plain, plugin.Accelerated, "of another build than this verdict"},
		"another build, less risk": {nil, func(b *bench) {
			b.loaded.loaded, b.loaded.node, b.loaded.build = true, datapath.NodeSettings{Open: true, Risks: datapath.RiskEpoll}, 1
		}, plugin.Plain, plugin.Accelerated, "of another build than this verdict"},
		"busy, loaded": {busy, func(b *bench) { b.loaded.loaded, b.loaded.node.Open = true, true },
			plugin.Accelerated, plugin.Accelerated, "as this one is inconclusive"},
		"unsafe run directory": {nil, func(b *bench) { b.chmodRunDir(0o777) }, plugin.Plain, plugin.Plain, "can be written by others (mode 0777)"},
		"unsafe, strict": {nil, func(b *bench) { b.chmodRunDir(0o770); b.Config.OnError = plugin.OnErrorFail },
			plugin.Refused, plugin.Refused, "can be written by others (mode 0770)"},
		"guard off": {nil, func(b *bench) {
			b.kernel.verdicts[0].Guard, b.Config.SpliceGuard = datapath.GuardLSM, plugin.SpliceGuardOff
		}, plugin.Plain, plugin.Accelerated, "spliceGuard is off"},
		"other size":    {nil, func(b *bench) { b.loaded.loaded, b.loaded.max = true, 99 }, plugin.Accelerated, plugin.Accelerated, "loaded for 99 connections"},
		"not openable":  {nil, func(b *bench) { b.loaded.err = errors.New("EACCES") }, plugin.Accelerated, plugin.Accelerated, "cannot be looked at: EACCES"},
		"mode off":      {nil, func(b *bench) { b.Config.Mode = plugin.ModeOff }, plugin.Plain, plugin.Plain, "mode is off"},
		"busy machine":  {busy, func(*bench) {}, plugin.Plain, plugin.Plain, "inconclusive: order"},
		"all accepted":  {splice, func(b *bench) { b.Config.AcceptRisks = datapath.RiskSplice }, plugin.Accelerated, plugin.Accelerated, ""},
		"probing fails": {nil, func(b *bench) { b.kernel.err = errors.New("x\ny"); b.loaded.loaded, b.loaded.node.Open = true, true }, plugin.Accelerated, plugin.Accelerated, ""},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t, tc.results)
			tc.prepare(b)
			r := b.examine()
			if r.Pods.Outcome != tc.pods || r.Asking.Outcome != tc.asking {
				t.Errorf("%+v, asking %+v", r.Pods, r.Asking)
			}
			if all := r.Pods.Why + strings.Join(r.Notes, "\n"); !strings.Contains(all, tc.says) {
				t.Errorf("says %q", all)
			}
			if strings.Contains(r.ProbeError, "\n") {
				t.Errorf("%q is not one line", r.ProbeError)
			}
		})
	}
}

// What doctor says of the loaded datapath and of the stored verdict is what ADD and
// load make of them.
func TestLoaded(t *testing.T) {
	asked := made(t, nil).NodeSettings()
	for name, tc := range map[string]struct {
		change  func(*bench)
		line    string // below the verdict
		update  string
		differs string
		note    string
	}{
		"goes by it":    {func(*bench) {}, "stored: the loaded datapath goes by it\n", "", "", ""},
		"closed":        {func(b *bench) { b.loaded.node = datapath.NodeSettings{} }, "stored: pods that start from now on go by it\n", "", "", ""},
		"risks":         {func(b *bench) { b.loaded.node.Risks = datapath.RiskEpoll }, "from the next pod's ADD on", "next pod", "risks: epoll, not none", "in the background"},
		"MPTCP":         {func(b *bench) { b.loaded.node.MPTCPListeners = false }, "from the next pod's ADD on", "next pod", "MPTCP listeners: plain, not accelerated", "in the background"},
		"level":         {func(b *bench) { b.kernel.verdicts[0] = made(t, disorder) }, "from the next pod's ADD on", "next pod", "it accelerates, and should not", "in the background"},
		"not stored":    {func(b *bench) { b.loaded.node.MPTCPListeners, b.NoCache = false, true }, "not stored for ADD: --no-cache", "", "MPTCP listeners", "not stored"},
		"another build": {func(b *bench) { b.loaded.build = 1 }, "stored, but the loaded datapath does not go by it", "load", "", "of another build than this verdict"},
		"guard": {func(b *bench) {
			b.kernel.verdicts[0].Guard, b.loaded.node.Risks = datapath.GuardLSM, datapath.RiskSplice
		}, "stored, but the loaded datapath does not go by it", "load", "risks: splice, not none; splice guard: none, not lsm", "10-bridge.conflist` changes it"},
		"guard not wanted": {func(b *bench) {
			b.kernel.verdicts[0].Guard, b.loaded.node.Guard, b.Config.SpliceGuard = datapath.GuardLSM, datapath.GuardLSM, plugin.SpliceGuardOff
		}, "stored: the loaded datapath goes by it\n", "", "", "which leaves the risk splice"},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t, nil)
			b.loaded.loaded, b.loaded.node, b.loaded.max = true, asked, b.Config.MaxConnections
			tc.change(b)
			r := b.examine()
			var out bytes.Buffer
			if err := r.Print(&out); err != nil || !strings.Contains(out.String(), tc.line) {
				t.Errorf("%v: %s", err, out.String())
			}
			raw, err := json.Marshal(r)
			if err != nil {
				t.Fatal(err)
			}
			var doc struct {
				Datapath struct {
					Differs                   []string
					Update, Guard             *string
					SameBuild, MPTCPListeners *bool
				}
			}
			if err := json.Unmarshal(raw, &doc); err != nil {
				t.Fatal(err)
			}
			d := doc.Datapath
			if differs := strings.Join(d.Differs, "; "); d.Differs == nil || tc.differs == "" && differs != "" || !strings.Contains(differs, tc.differs) ||
				d.Update == nil || *d.Update != tc.update || d.Guard == nil || *d.SameBuild != (b.loaded.build == 0) || *d.MPTCPListeners != b.loaded.node.MPTCPListeners {
				t.Errorf("%s", raw)
			}
			// The first note is always there: blocking sockets.
			if notes := strings.Join(r.Notes, "\n"); !strings.Contains(notes, tc.note) || tc.note == "" && len(r.Notes) != 1 || strings.Contains(notes, "unload") {
				t.Errorf("notes %q", notes)
			}
		})
	}
}

func TestInterrupted(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	b := newBench(t, nil)
	b.kernel.onRun = cancel
	if r, err := Examine(ctx, *b.Options); !errors.Is(err, context.Canceled) || r != nil || b.kernel.saved != nil {
		t.Errorf("%v, %+v", err, r)
	}
}

// The report for people, word for word.
func TestPrint(t *testing.T) {
	for name, prepare := range map[string]func(*bench){
		"safe":  func(*bench) {},
		"risky": func(b *bench) { b.kernel.verdicts = []*verdict.Verdict{made(t, splice)} },
		"unsupported": func(b *bench) {
			b.kernel.verdicts = []*verdict.Verdict{made(t, disorder)}
			b.Conflist = Conflist{}
		},
		"busy": func(b *bench) { b.kernel.verdicts = []*verdict.Verdict{made(t, busy)} },
		"not-root": func(b *bench) {
			b.kernel.err = fmt.Errorf("%w: load BPF programs: operation not permitted", verdict.ErrPrivilege)
			b.kernel.othersErr = verdict.ErrPrivilege
			write(t, b.Root, "proc/self/status", "CapEff:\t0000000000000000\n")
		},
		"neighbours": func(b *bench) {
			b.NoCache = true
			b.Config.OnError = plugin.OnErrorFail
			b.Config.AcceptRisks = datapath.RiskSplice | datapath.RiskBlocking
			b.kernel.others = []verdict.Other{
				{Program: "obi_sockmap_tra", ProgramID: 12, Type: "sock_ops", Cgroup: "/", Sharing: verdict.Multi, Everywhere: true,
					Product: "OpenTelemetry eBPF Instrumentation", Processes: []string{"obi (4711)"}, Conflict: "it puts sockets into a sockmap of its own"},
				{Program: "obi_packet_exte", ProgramID: 13, Type: "sk_msg", Map: "sock_dir", MapID: 14, Conflict: "a socket has room for one such program"},
				{Program: "harm\x1b[2Jless", ProgramID: 15, Type: "sock_ops", Cgroup: "/system.slice", Sharing: verdict.Multi},
				{Program: "old", ProgramID: 16, Type: "sock_ops", Cgroup: "/", Sharing: verdict.Exclusive, Blocks: true, Everywhere: true, Conflict: "EPERM"},
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t, nil)
			prepare(b)
			r := b.examine()
			r.Took, r.Verdict.Kernel = 700*time.Millisecond, "6.18.44"
			for i, c := range r.Node { // a path of another length would wrap lines elsewhere
				r.Node[i].Detail = strings.ReplaceAll(c.Detail, b.Root, "ROOT")
			}
			var out bytes.Buffer
			if err := r.Print(&out); err != nil {
				t.Fatal(err)
			}
			for line := range strings.Lines(out.String()) {
				if n := len([]rune(strings.TrimSuffix(line, "\n"))); n > width || strings.HasSuffix(line, " \n") {
					t.Errorf("%d columns: %q", n, line)
				}
			}
			got := out.String()
			golden := filepath.Join("testdata", name+".golden")
			if *update {
				if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if got != string(want) {
				t.Errorf("is not %s (-update writes it):\n%s", golden, got)
			}
		})
	}
}

// What other programs read: names and types stay.
func TestJSON(t *testing.T) {
	for name, prepare := range map[string]func(*bench){
		"risky":      func(b *bench) { b.kernel.others = []verdict.Other{{Program: "p", Type: "sk_msg"}} },
		"not probed": func(b *bench) { b.kernel.err = errors.New("x") },
		"busy":       func(b *bench) { b.kernel.verdicts = []*verdict.Verdict{made(t, busy)} },
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t, splice)
			prepare(b)
			r := b.examine()
			raw, err := json.Marshal(r)
			if err != nil {
				t.Fatal(err)
			}
			var doc struct {
				Verdict      *string
				Risks        []string
				Inconclusive *bool
				Probes       []map[string]string
				Node         []map[string]string
				Others       []map[string]any
				Outlook      struct{ Pods, Asking map[string]string }
				Memory       map[string]any
				Datapath     struct{ Loaded *bool }
			}
			if err := json.Unmarshal(raw, &doc); err != nil {
				t.Fatal(err)
			}
			want, risks := "unsupported", []string{}
			if name == "risky" {
				want, risks = "risky", []string{"splice"}
			} else if name == "not probed" {
				risks = []string{"splice", "fionread", "epoll", "uncharged"} // not ok, for want of knowing
			}
			if doc.Verdict == nil || *doc.Verdict != want || doc.Risks == nil || !slices.Equal(doc.Risks, risks) ||
				doc.Inconclusive == nil || *doc.Inconclusive != (name != "risky") {
				t.Errorf("%s", raw)
			}
			for _, list := range [][]map[string]string{doc.Probes, doc.Node} {
				if len(list) < 8 {
					t.Errorf("%d probes", len(list))
				}
				for _, p := range list {
					if len(p) != 3 || p["name"] == "" || !slices.Contains([]string{"ok", "not ok", "could not tell"}, p["result"]) ||
						p["detail"] == "" || strings.Contains(p["detail"], "\n") {
						t.Errorf("%v", p)
					}
				}
			}
			if doc.Others == nil || doc.Outlook.Pods["outcome"] == "" || doc.Datapath.Loaded == nil || (doc.Memory == nil) != (name != "risky") {
				t.Errorf("%s", raw)
			}
		})
	}
}
