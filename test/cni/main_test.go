package cni_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/plugin/attachment"
	"github.com/skipstack/skipstack/plugin/datapath"
	"github.com/skipstack/skipstack/test/datapath/traffic"
	"github.com/skipstack/skipstack/test/must"
	"github.com/skipstack/skipstack/test/node"
	"github.com/skipstack/skipstack/test/report"
)

func TestMain(m *testing.M) {
	os.Exit(node.Main(m, node.MainOptions{
		Workers: map[string]node.Worker{
			traffic.WorkerName: traffic.Worker,
			holdName:           hold,
			handicapName:       handicap,
		},
		Build: []string{"github.com/skipstack/skipstack/cmd/skipstack"},
		Tools: []string{"bridge", "ptp", "host-local"},
	}))
}

const (
	patience = 2 * time.Minute // for what comes about by itself
	hang     = 5 * time.Minute // what takes longer does not end
	tick     = 2 * time.Millisecond
	// budget is what ADD and DEL may take, and startUp what a machine that is
	// busy with other things may take on top to start a process.
	budget  = 2 * time.Second
	startUp = 2 * time.Second
)

func program() string { return filepath.Join(node.ProgramDir(), node.PluginType) }

// A site is a node to test on.
type site struct {
	*node.Node
	*state
	t *testing.T
}

type state struct {
	log    pluginLog
	pods   []*pod
	lights int // made so far
}

// in is the site for a subtest, which is the one that fails then.
func (s *site) in(t *testing.T) *site { return &site{s.Node, s.state, t} }

type options struct {
	node.Options
	// unprobed leaves the verdict to be found by the first ADD, as after a boot.
	unprobed bool
}

// newSite makes a node. At the test's end nothing may be left on it of any pod.
func newSite(t *testing.T, o options) *site {
	t.Helper()
	s := &site{state: &state{}, t: t}
	o.Log = &s.log
	s.Node = node.ForTest(t, o.Options)
	t.Cleanup(func() {
		s.waitProber()
		for _, p := range s.pods {
			must.Do(t, p.host.Close())
		}
		left, err := s.ClosePods()
		if err == nil && len(left) > 0 && s.log.late.Load() > 0 {
			// By DELs that had no time, for the sweep.
			wait(t, "nothing is left", func() (string, bool) {
				s.gcAll()
				left, err = s.Leftovers()
				return fmt.Sprint(left, err), err == nil && len(left) == 0
			})
		}
		if err != nil || len(left) > 0 {
			t.Error("left behind:", left, err)
		}
		// Sweeps and repairs what was left on purpose.
		s.gcAll()
		if !t.Failed() {
			s.wantNothing()
		}
	})
	if !o.unprobed {
		v := theVerdict(t)
		must.Do(t, os.MkdirAll(s.RunDir, 0o700))
		must.Do(t, os.WriteFile(filepath.Join(s.RunDir, v.file), v.content, 0o600))
	}
	return s
}

// load loads the datapath, for which an ADD on a slow machine has no time.
func (s *site) load() {
	s.t.Helper()
	s.ok(s.cli("load"))
}

// verdict is what `skipstack load --json` says of this machine's kernel.
type verdict struct {
	Verdict string   `json:"verdict"`
	Risks   []string `json:"risks"`

	file    string // name and content in the run directory
	content []byte
}

// accelerates says whether connections of pods that accept these risks are
// accelerated on this kernel.
func (v verdict) accelerates(accepted ...string) bool {
	return v.Verdict != "unsupported" &&
		!slices.ContainsFunc(v.Risks, func(risk string) bool { return !slices.Contains(accepted, risk) })
}

// unclear says whether there is a probe that could not tell.
func (v verdict) unclear() bool { return bytes.Contains(v.content, []byte(`"could not tell"`)) }

var probed struct {
	sync.Mutex
	*verdict
}

// probeAttempts is how often the kernel is probed where a probe could not tell, as on
// a busy machine.
const probeAttempts = 10

// theVerdict has the kernel probed, once.
func theVerdict(t *testing.T) verdict {
	t.Helper()
	probed.Lock()
	defer probed.Unlock()
	for attempts := probeAttempts; probed.verdict == nil; attempts-- {
		v := probe(t)
		if attempts > 1 && v.unclear() {
			t.Logf("again: %s", v.content)
			continue
		}
		if v.Verdict == "unsupported" {
			t.Fatalf("these tests need a kernel that is supported: %s", v.content)
		}
		t.Attr(report.AttrVerdict, report.Verdict(v.Verdict, v.Risks))
		probed.verdict = &v
	}
	return *probed.verdict
}

// probe has the kernel probed, by load.
func probe(t *testing.T) verdict {
	t.Helper()
	s := newSite(t, options{unprobed: true})
	got := s.cli("load", "--json")
	var out struct {
		Verdict verdict `json:"verdict"`
		Was     string  `json:"was"`
		Open    bool    `json:"open"`
	}
	if err := json.Unmarshal([]byte(got.stdout), &out); err != nil || out.Verdict.Verdict == "" {
		t.Fatalf("load --json: %v, %+v", err, got)
	}
	unsupported := out.Verdict.Verdict == "unsupported"
	if (got.code == 0) == unsupported || out.Was != "nothing" || out.Open == unsupported {
		t.Fatalf("load said %+v", got)
	}
	files := must.Get(filepath.Glob(filepath.Join(s.RunDir, "verdict-*.json")))(t)
	if len(files) != 1 {
		t.Fatalf("files of the verdict: %v", files)
	}
	out.Verdict.file = filepath.Base(files[0])
	out.Verdict.content = must.Get(os.ReadFile(files[0]))(t)
	return out.Verdict
}

// record is an attachment's file as docs and other programs know it.
type record struct {
	Version      int             `json:"version"`
	Network      string          `json:"network"`
	ContainerID  string          `json:"containerID"`
	IfName       string          `json:"ifName"`
	PodNamespace string          `json:"podNamespace"`
	PodName      string          `json:"podName"`
	PodUID       string          `json:"podUID"`
	Status       string          `json:"status"`
	Reason       string          `json:"reason"`
	CgroupID     uint64          `json:"cgroupID"`
	CgroupPath   string          `json:"cgroupPath"`
	BPFFSDev     uint64          `json:"bpffsDev"`
	Settings     json.RawMessage `json:"settings"`
}

// records reads the attachments' files.
func (s *site) records() []record {
	s.t.Helper()
	var all []record
	for _, path := range must.Get(filepath.Glob(filepath.Join(s.RunDir, "attachments", "[0-9a-f]*.json")))(s.t) {
		raw, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		must.Do(s.t, err)
		var r record
		if err := json.Unmarshal(raw, &r); err != nil {
			s.t.Fatalf("%s: %v: %s", path, err, raw)
		}
		all = append(all, r)
	}
	return all
}

// record returns the one record of a container.
func (s *site) record(container string) record {
	s.t.Helper()
	all := slices.DeleteFunc(s.records(), func(r record) bool { return r.ContainerID != container })
	if len(all) != 1 {
		s.t.Fatalf("container %s has %d records, want 1: %+v", container, len(all), all)
	}
	return all[0]
}

// wantRecord checks a container's record. An empty reason stands for none.
func (s *site) wantRecord(container, status, reason string) {
	s.t.Helper()
	r := s.record(container)
	if r.Status != status || !strings.HasPrefix(r.Reason, reason) || reason == "" && r.Reason != "" {
		s.t.Errorf("record of container %.12s is %s (%s), want %s (%s)", container, r.Status, r.Reason, status, reason)
	}
}

// links lists the pinned links by cgroup id, parked ones included.
func (s *site) links() []uint64 {
	s.t.Helper()
	var ids []uint64
	for _, dir := range []string{"links", "parked"} {
		for _, path := range must.Get(filepath.Glob(filepath.Join(s.BPFFS, "skipstack/v*", dir, "*")))(s.t) {
			ids = append(ids, must.Get(strconv.ParseUint(filepath.Base(path), 10, 64))(s.t))
		}
	}
	slices.Sort(ids)
	return ids
}

func (s *site) wantLinks(ids ...uint64) {
	s.t.Helper()
	slices.Sort(ids)
	if got := s.links(); !slices.Equal(got, ids) {
		s.t.Errorf("pinned links of cgroups %v, want %v", got, ids)
	}
}

// leftovers lists what no attachment that is gone may leave in the run directory
// and on the bpffs.
func (s *site) leftovers() []string {
	s.t.Helper()
	var left []string
	for _, pattern := range []string{
		filepath.Join(s.RunDir, "attachments", "*"), // temporary files too
		filepath.Join(s.RunDir, "cgroups", "*"), filepath.Join(s.RunDir, ".*"),
		filepath.Join(s.BPFFS, "skipstack", "tmp-*"),
		filepath.Join(s.BPFFS, "skipstack", "v*", "links", "*"), filepath.Join(s.BPFFS, "skipstack", "v*", "parked", "*"),
		filepath.Join(s.CgroupRoot, "skipstack-*"),
	} {
		left = append(left, must.Get(filepath.Glob(pattern))(s.t)...)
	}
	set, err := datapath.Open(s.BPFFS)
	if errors.Is(err, datapath.ErrNotLoaded) {
		return left
	}
	must.Do(s.t, err)
	defer set.Close()
	for id := range must.Get(set.PodCounters())(s.t) {
		left = append(left, fmt.Sprintf("counters of cgroup %d", id))
	}
	return left
}

func (s *site) wantNothing() {
	s.t.Helper()
	s.waitProber() // it has a cgroup and files of its own
	if left := s.leftovers(); len(left) > 0 {
		s.t.Errorf("%d things are left: %v", len(left), left[:min(len(left), 8)])
	}
}

// counters reads the datapath's counters; without a datapath all are zero.
func (s *site) counters() datapath.Counters {
	s.t.Helper()
	set, err := datapath.Open(s.BPFFS)
	if errors.Is(err, datapath.ErrNotLoaded) {
		return datapath.Counters{}
	}
	must.Do(s.t, err)
	defer set.Close()
	return must.Get(set.Counters())(s.t)
}

// gcAll runs a GC that names no attachment as valid for every network with a
// record.
func (s *site) gcAll() {
	s.t.Helper()
	networks := []string{"net"} // GC also sweeps what belongs to none
	for _, r := range s.records() {
		if !slices.Contains(networks, r.Network) {
			networks = append(networks, r.Network)
		}
	}
	for _, name := range networks {
		s.want(0, s.run(call{verb: "GC", network: name, members: `"cni.dev/valid-attachments":[]`}))
	}
}

// waitProber waits until no detached prober runs.
func (s *site) waitProber() {
	s.t.Helper()
	f, err := os.Open(filepath.Join(s.RunDir, attachment.ProbeLock))
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	must.Do(s.t, err)
	defer f.Close()
	wait(s.t, "the prober ends", func() (string, bool) {
		// It lets go of the lock now and then.
		return "the probe lock is held", len(s.probers()) == 0 && unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB) == nil
	})
}

// wait waits until the condition holds.
func wait(t *testing.T, what string, condition func() (state string, ok bool)) {
	t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(tick) {
		state, ok := condition()
		if ok {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain until %s: %s", what, state)
		}
	}
}

// pluginLog is what plugins that libcni ran wrote to stderr.
type pluginLog struct {
	lockedBuffer
	late atomic.Int32 // how often a call of this node had no time
}

func (l *pluginLog) Write(p []byte) (int, error) {
	if late(string(p)) {
		l.late.Add(1)
	}
	return l.lockedBuffer.Write(p)
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

// len is how much was written since the last take.
func (b *lockedBuffer) len() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Len()
}

// since returns what was written after that much, and cut forgets it.
func (b *lockedBuffer) since(mark int) string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return string(b.b.Bytes()[min(mark, b.b.Len()):])
}

func (b *lockedBuffer) cut(mark int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.b.Truncate(min(mark, b.b.Len()))
}

// take returns what was written since the last take.
func (b *lockedBuffer) take() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	defer b.b.Reset()
	return b.b.String()
}
