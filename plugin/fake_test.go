package plugin

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"

	"github.com/skipstack/skipstack/plugin/attachment"
	"github.com/skipstack/skipstack/plugin/datapath"
	"github.com/skipstack/skipstack/plugin/podcgroup"
	"github.com/skipstack/skipstack/plugin/verdict"
)

// fakeDatapath keeps in maps what package datapath keeps in the kernel.
type fakeDatapath struct {
	mu       sync.Mutex
	loaded   bool
	build    string
	programs [16]byte // their build
	max      uint32
	node     datapath.NodeSettings
	links    map[uint64]bool
	pods     map[uint64]datapath.PodSettings
	counters map[uint64]datapath.PodCounters
	seen     datapath.Observation
	bpffsDev uint64
	fail     map[string]error         // by operation
	block    map[string]chan struct{} // by operation: waits until closed
	during   func(op string)          // called in each operation
	calls    []string
	dropped  []string // bpffs and cgroup
	open     int      // sets not closed
	opened   []string // bpffs
	noBPFFS  bool
}

func newFakeDatapath() *fakeDatapath {
	return &fakeDatapath{
		links: map[uint64]bool{}, pods: map[uint64]datapath.PodSettings{}, counters: map[uint64]datapath.PodCounters{},
		fail: map[string]error{}, block: map[string]chan struct{}{}, bpffsDev: 7, max: DefaultMaxConnections, programs: datapath.Build(),
	}
}

// reboot forgets what the kernel does not keep.
func (f *fakeDatapath) reboot() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.loaded, f.node = false, datapath.NodeSettings{}
	f.bpffsDev++
	clear(f.links)
	clear(f.pods)
}

func (f *fakeDatapath) call(name string) error {
	f.mu.Lock()
	f.calls = append(f.calls, name)
	err, wait, during := f.fail[name], f.block[name], f.during
	f.mu.Unlock()
	if during != nil {
		during(name)
	}
	if wait != nil {
		<-wait
	}
	return err
}

func (f *fakeDatapath) called(name string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := 0
	for _, c := range f.calls {
		if c == name {
			n++
		}
	}
	return n
}

func (f *fakeDatapath) newSet() *fakeSet { f.open++; return &fakeSet{f} }

func (f *fakeDatapath) Open(bpffs string) (Set, error) {
	if err := errors.Join(f.call("Open"), f.call("Open "+bpffs)); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.opened = append(f.opened, bpffs)
	if !f.loaded {
		return nil, fmt.Errorf("open: %w", datapath.ErrNotLoaded)
	}
	return f.newSet(), nil
}

func (f *fakeDatapath) Load(_ context.Context, _ string, o datapath.LoadOptions) (Set, error) {
	if err := f.call("Load"); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.loaded {
		f.loaded, f.build, f.max, f.node = true, "this", o.MaxConnections, datapath.NodeSettings{}
	}
	return f.newSet(), nil
}

func (f *fakeDatapath) Upgrade(ctx context.Context, bpffs string, o datapath.LoadOptions) (Set, bool, error) {
	if err := f.call("Upgrade"); err != nil {
		return nil, false, err
	}
	s, err := f.Load(ctx, bpffs, o)
	if err != nil {
		return nil, false, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	changed := f.build != "this"
	f.build, f.programs = "this", datapath.Build()
	return s, changed, nil
}

func (f *fakeDatapath) Loadable(string) error { return f.call("Loadable") }

func (f *fakeDatapath) EnsureBPFFS(context.Context, string) error { return f.call("EnsureBPFFS") }

func (f *fakeDatapath) BPFFSIdentity(string) (uint64, uint64, error) {
	return f.bpffsDev, 4026531840, f.call("BPFFSIdentity")
}

func (f *fakeDatapath) HasLink(_ string, id uint64) (bool, error) {
	err := f.call("HasLink")
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.links[id], err
}

func (f *fakeDatapath) DropPod(bpffs string, id uint64) error {
	if err := f.call("DropPod"); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.dropped = append(f.dropped, fmt.Sprintf("%s %d", bpffs, id))
	delete(f.links, id)
	delete(f.pods, id)
	return nil
}

func (f *fakeDatapath) Sweep(_ string, limit int) error {
	return f.call(fmt.Sprintf("Sweep %d", limit))
}

func (f *fakeDatapath) Published(bpffs string) (bool, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.noBPFFS {
		return false, fmt.Errorf("%s: %w", bpffs, datapath.ErrNoBPFFS)
	}
	return f.loaded, nil
}

func (f *fakeDatapath) Unload(_ context.Context, _ string, force bool) (datapath.Remaining, error) {
	if err := f.call("Unload"); err != nil {
		return datapath.Remaining{}, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.links) > 0 && !force {
		return datapath.Remaining{}, fmt.Errorf("unload: %w", datapath.ErrInUse)
	}
	f.loaded = false
	clear(f.links)
	clear(f.pods)
	return datapath.Remaining{Sockets: 3}, nil
}

func (f *fakeDatapath) LiveInKernel() (uint64, error) { return 5, nil }

func (f *fakeDatapath) SwitchNode(_ string, off bool) (int, error) {
	if err := f.call("SwitchNode"); err != nil {
		return 0, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.loaded {
		return 0, nil
	}
	f.node.SwitchedOff = off
	return 1, nil
}

type fakeSet struct{ f *fakeDatapath }

func (s *fakeSet) Close() error {
	s.f.mu.Lock()
	defer s.f.mu.Unlock()
	s.f.open--
	return nil
}

func (s *fakeSet) Attach(cgroup *os.File, id uint64) (bool, error) {
	if err := s.f.call("Attach"); err != nil {
		return false, err
	}
	s.f.mu.Lock()
	defer s.f.mu.Unlock()
	had := s.f.links[id]
	s.f.links[id] = true
	return !had, nil
}

func (s *fakeSet) Pod(id uint64) (datapath.PodSettings, bool, error) {
	err := errors.Join(s.f.call("Pod"), s.f.call(fmt.Sprintf("Pod %d", id)))
	s.f.mu.Lock()
	defer s.f.mu.Unlock()
	p, ok := s.f.pods[id]
	return p, ok, err
}

func (s *fakeSet) SetPod(id uint64, p datapath.PodSettings) error {
	if err := s.f.call("SetPod"); err != nil {
		return err
	}
	s.f.mu.Lock()
	defer s.f.mu.Unlock()
	s.f.pods[id] = p
	return nil
}

func (s *fakeSet) Node() (datapath.NodeSettings, error) {
	err := s.f.call("Node")
	s.f.mu.Lock()
	defer s.f.mu.Unlock()
	return s.f.node, err
}

func (s *fakeSet) Build() ([16]byte, error) { return s.f.programs, s.f.call("Build") }

func (s *fakeSet) SetNode(n datapath.NodeSettings) error {
	err := s.f.call("SetNode")
	if err != nil && !errors.Is(err, datapath.ErrGuard) {
		return err
	}
	s.f.mu.Lock()
	defer s.f.mu.Unlock()
	if err != nil {
		n = unguarded(n)
	}
	n.SwitchedOff = s.f.node.SwitchedOff
	s.f.node = n
	return err
}

func (s *fakeSet) MaxConnections() (uint32, error) { return s.f.max, nil }

func (s *fakeSet) Observe() (datapath.Observation, error) {
	err := s.f.call("Observe")
	s.f.mu.Lock()
	defer s.f.mu.Unlock()
	return s.f.seen, err
}

func (s *fakeSet) PodCounters() (map[uint64]datapath.PodCounters, error) {
	s.f.mu.Lock()
	defer s.f.mu.Unlock()
	return maps.Clone(s.f.counters), nil
}

// fakeCgroups knows cgroups by path and by pod UID.
type fakeCgroups struct {
	rootErr error
	ids     map[string]uint64
	dir     string
}

func (c *fakeCgroups) Root(configured string) (string, error) { return configured, c.rootErr }

func (c *fakeCgroups) Find(_ context.Context, _ string, r podcgroup.Request) (*podcgroup.Pod, error) {
	for _, name := range []string{strings.TrimPrefix(r.Path, "/"), r.PodUID} {
		if id, ok := c.ids[name]; ok && name != "" {
			dir, err := os.Open(c.dir)
			return &podcgroup.Pod{Dir: dir, ID: id, Path: "/" + name}, err
		}
	}
	return nil, fmt.Errorf("%w: %q", podcgroup.ErrNotFound, r.Path)
}

type fakeVerdicts struct {
	cached *Verdict
	err    error // of Cached, where cached is nil; ErrNoVerdict by default
	probed *Verdict
	probes int
}

func (v *fakeVerdicts) Cached(string) (Verdict, error) {
	switch {
	case v.cached != nil:
		return *v.cached, nil
	case v.err != nil:
		return Verdict{}, v.err
	}
	return Verdict{}, ErrNoVerdict
}

func (v *fakeVerdicts) Probe(context.Context, Config) (Verdict, error) {
	v.probes++
	if v.probed == nil {
		return Verdict{}, errors.New("cannot probe")
	}
	v.cached = v.probed
	return *v.probed, nil
}

func (v *fakeVerdicts) GuardFailed(_ Config, was Verdict, _ error) (Verdict, error) {
	was.Node = unguarded(was.Node)
	v.cached = &was
	return was, nil
}

type fakeProber struct {
	mu     sync.Mutex
	starts []bool // load
	err    error
}

func (p *fakeProber) Start(_ Config, load bool) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.starts = append(p.starts, load)
	return p.err
}

// ampleBudget is more than any verb needs on a busy machine.
const ampleBudget = 10 * time.Second

// inconclusive is the verdict on a kernel while the machine is too busy to tell.
func inconclusive() *Verdict {
	return &Verdict{Document: &verdict.Verdict{Level: verdict.Unsupported,
		Probes: []verdict.Probe{{Name: verdict.ProbeOrder, Result: verdict.CouldNotTell}}}}
}

// safe is the verdict of a kernel without fault.
func safe() *Verdict { return &Verdict{Supported: true, Node: datapath.NodeSettings{Open: true}} }

// bench is one node with fakes for everything but the records, which are real.
type bench struct {
	t        *testing.T
	datapath *fakeDatapath
	cgroups  *fakeCgroups
	verdicts *fakeVerdicts
	prober   *fakeProber
	runDir   string
	budget   time.Duration
	step     func(string)
	logs     syncBuffer
	running  running
}

// running counts the verbs that run, those too that their callers have given up.
// A WaitGroup may not be added to while somebody waits.
type running struct {
	mu sync.Mutex
	n  int
}

func (r *running) add(n int) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.n += n
	return r.n
}

type syncBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

// take returns the lines written since the last call.
func (b *syncBuffer) take() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	s := strings.TrimSuffix(b.buf.String(), "\n")
	b.buf.Reset()
	if s == "" {
		return nil
	}
	return strings.Split(s, "\n")
}

// timed runs a test in which time passes only while all wait for it, so that a budget
// ends when something is stuck, and not because the machine is busy.
func timed(t *testing.T, name string, f func(t *testing.T)) {
	t.Run(name, func(t *testing.T) { synctest.Test(t, f) })
}

func newBench(t *testing.T) *bench {
	b := &bench{
		t:        t,
		datapath: newFakeDatapath(),
		cgroups:  &fakeCgroups{ids: map[string]uint64{"pod-a": 101, "pod-b": 102}, dir: t.TempDir()},
		verdicts: &fakeVerdicts{cached: safe()},
		prober:   &fakeProber{},
		runDir:   filepath.Join(t.TempDir(), "run"),
		budget:   ampleBudget,
	}
	t.Cleanup(func() {
		for end := time.Now().Add(20 * time.Second); b.running.add(0) > 0; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatal("a verb does not end")
			}
		}
		b.datapath.mu.Lock()
		defer b.datapath.mu.Unlock()
		if b.datapath.open != 0 && len(b.datapath.block) == 0 {
			t.Errorf("%d sets are not closed", b.datapath.open)
		}
	})
	return b
}

func (b *bench) deps() Deps {
	return Deps{
		Datapath: b.datapath, Cgroups: b.cgroups, Verdicts: b.verdicts, Prober: b.prober,
		Log: func(c Config) (*slog.Logger, io.Closer) {
			level := slog.LevelInfo
			if err := level.UnmarshalText([]byte(c.LogLevel)); err != nil {
				b.t.Error(err)
			}
			b.running.add(1) // a verb closes its log last
			return slog.New(slog.NewTextHandler(&b.logs, &slog.HandlerOptions{Level: level})), closer(func() { b.running.add(-1) })
		},
	}
}

type closer func()

func (c closer) Close() error { c(); return nil }

func (b *bench) plugin(stdout io.Writer) *Plugin {
	p := New(b.deps(), stdout, slog.New(slog.NewTextHandler(&b.logs, nil)))
	p.budget, p.step = b.budget, b.step
	return p
}

func (b *bench) store() *attachment.Store { return attachment.NewStore(b.runDir) }

// request is one call of the plugin.
type request struct {
	version     string // default 1.1.0
	network     string // default net
	container   string // default c1
	ifname      string // default eth0
	cgroup      string // runtimeConfig.cgroupPath; default pod-a, "-" for none
	cniArgs     string
	conf        string // further members of the configuration
	annotations map[string]string
	noPrev      bool
	prev        string // default prevResultOf(version)
}

func (r request) withDefaults() request {
	set := func(s *string, v string) {
		if *s == "" {
			*s = v
		}
	}
	set(&r.version, "1.1.0")
	set(&r.network, "net")
	set(&r.container, "c1")
	set(&r.ifname, "eth0")
	set(&r.cgroup, "pod-a")
	set(&r.cniArgs, "IgnoreUnknown=1;K8S_POD_NAMESPACE=ns;K8S_POD_NAME=web;K8S_POD_UID=uid")
	set(&r.prev, prevResultOf(r.version))
	return r
}

func prevResultOf(version string) string {
	ip := `{"address":"10.0.0.5/24","gateway":"10.0.0.1","interface":0}`
	if strings.HasPrefix(version, "0.") {
		ip = `{"version":"4","address":"10.0.0.5/24","gateway":"10.0.0.1","interface":0}`
	}
	return `{"cniVersion":"` + version + `","interfaces":[{"name":"eth0","mac":"02:00:00:00:00:01","sandbox":"/run/netns/x"}],"ips":[` +
		ip + `],"dns":{}}`
}

func (b *bench) args(r request) *skel.CmdArgs {
	r = r.withDefaults()
	rc := map[string]any{}
	if r.cgroup != "-" {
		rc["cgroupPath"] = r.cgroup
	}
	if r.annotations != nil {
		rc["io.kubernetes.cri.pod-annotations"] = r.annotations
	}
	rcJSON, err := json.Marshal(rc)
	if err != nil {
		b.t.Fatal(err)
	}
	conf := fmt.Sprintf(`{"cniVersion":%q,"name":%q,"type":"skipstack","runDir":%q,"runtimeConfig":%s`, r.version, r.network, b.runDir, rcJSON)
	if r.conf != "" {
		conf += "," + r.conf
	}
	if !r.noPrev {
		conf += `,"prevResult":` + r.prev
	}
	return &skel.CmdArgs{
		ContainerID: r.container, Netns: "/run/netns/x", IfName: r.ifname, Args: r.cniArgs, Path: "/opt/cni/bin",
		StdinData: []byte(conf + "}"),
	}
}

// add runs ADD and returns what it printed.
func (b *bench) add(r request) (string, error) {
	var out bytes.Buffer
	err := b.plugin(&out).Add(b.args(r))
	return out.String(), err
}

func (b *bench) mustAdd(r request) {
	b.t.Helper()
	out, err := b.add(r)
	if err != nil {
		b.t.Fatalf("ADD: %v", err)
	}
	if want := r.withDefaults().prev; out != want {
		b.t.Fatalf("ADD printed\n%s\nwant\n%s", out, want)
	}
}

func (b *bench) del(r request) error { return b.plugin(io.Discard).Del(b.args(r)) }

func (b *bench) mustDel(r request) {
	b.t.Helper()
	if err := b.del(r); err != nil {
		b.t.Fatalf("DEL: %v", err)
	}
}

func (b *bench) check(r request) error { return b.plugin(io.Discard).Check(b.args(r)) }
func (b *bench) gc(r request) error    { r.noPrev = true; return b.plugin(io.Discard).GC(b.args(r)) }
func (b *bench) status(r request) error {
	r.noPrev = true
	return b.plugin(io.Discard).Status(b.args(r))
}

func (b *bench) record(r request) (attachment.Record, bool) {
	b.t.Helper()
	r = r.withDefaults()
	rec, err := b.store().Get(attachment.Key{Network: r.network, ContainerID: r.container, IfName: r.ifname})
	if err != nil && !errors.Is(err, attachment.ErrNotFound) {
		b.t.Fatal(err)
	}
	return rec, err == nil
}

// age makes a record one from before the node was booted.
func (b *bench) age(r request) {
	b.t.Helper()
	rec, _ := b.record(r)
	path := filepath.Join(b.runDir, "attachments", rec.FileName())
	data, err := os.ReadFile(path)
	if err != nil {
		b.t.Fatal(err)
	}
	boot, err := attachment.BootID()
	if err != nil {
		b.t.Fatal(err)
	}
	if err := os.WriteFile(path, bytes.Replace(data, []byte(boot), []byte("another"), 1), 0o600); err != nil {
		b.t.Fatal(err)
	}
	if rec, _ := b.record(r); !rec.Stale {
		b.t.Fatalf("record %+v", rec)
	}
}

// wantRecord checks status and the beginning of the reason.
func (b *bench) wantRecord(r request, status attachment.Status, reason string) {
	b.t.Helper()
	rec, ok := b.record(r)
	if !ok {
		b.t.Errorf("no record, want %s", status)
		return
	}
	if rec.Status != status || !strings.HasPrefix(rec.Reason, reason) || reason == "" && rec.Reason != "" {
		b.t.Errorf("record %s %q, want %s %q", rec.Status, rec.Reason, status, reason)
	}
}

// wantLinks checks which cgroups are attached.
func (b *bench) wantLinks(ids ...uint64) {
	b.t.Helper()
	b.datapath.mu.Lock()
	defer b.datapath.mu.Unlock()
	if got := slices.Sorted(maps.Keys(b.datapath.links)); !slices.Equal(got, ids) {
		b.t.Errorf("links to %v, want %v", got, ids)
	}
	if got := slices.Sorted(maps.Keys(b.datapath.pods)); !slices.Equal(got, ids) {
		b.t.Errorf("settings of %v, want %v", got, ids)
	}
}

func (b *bench) pod(id uint64) datapath.PodSettings {
	b.datapath.mu.Lock()
	defer b.datapath.mu.Unlock()
	return b.datapath.pods[id]
}

// wantNothing checks that no attachment is left.
func (b *bench) wantNothing() {
	b.t.Helper()
	b.wantLinks()
	records, err := b.store().List()
	if err != nil || len(records) > 0 {
		b.t.Errorf("records %v, error %v, want none", records, err)
	}
}

// wantLines checks how many lines were logged, and what they say.
func (b *bench) wantLines(n int, substrings ...string) {
	b.t.Helper()
	lines := b.logs.take()
	if len(lines) != n {
		b.t.Errorf("%d log lines, want %d:\n%s", len(lines), n, strings.Join(lines, "\n"))
	}
	all := strings.Join(lines, "\n")
	for _, s := range substrings {
		if !strings.Contains(all, s) {
			b.t.Errorf("log does not say %q:\n%s", s, all)
		}
	}
}

// wantCode checks that err is a coded CNI error whose text has the substrings.
func wantCode(t *testing.T, err error, code uint, substrings ...string) {
	t.Helper()
	var e *types.Error
	if !errors.As(err, &e) || e.Code != code {
		t.Errorf("error %v, want code %d", err, code)
		return
	}
	for _, s := range substrings {
		if !strings.Contains(e.Msg+"\n"+e.Details, s) {
			t.Errorf("error %v does not say %q", err, s)
		}
	}
}
