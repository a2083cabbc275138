package cni_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/plugin/attachment"
	"github.com/skipstack/skipstack/plugin/datapath"
	"github.com/skipstack/skipstack/test/must"
	"github.com/skipstack/skipstack/test/node"
	"github.com/skipstack/skipstack/test/trace"
)

// slowest is how long the slowest of some calls took.
type slowest struct {
	mu   sync.Mutex
	all  []time.Duration
	what []string
}

func (s *slowest) saw(got outcome) outcome {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.all, s.what = append(s.all, got.took), append(s.what, got.call.verb)
	return got
}

// within fails the test where a call took longer than its budget and what starting
// it may take.
func (s *slowest) within(t *testing.T) {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, took := range s.all {
		if took > budget+startUp {
			t.Errorf("%s took %v, its budget is %v", s.what[i], took, budget)
		}
	}
	slices.Sort(s.all)
	t.Logf("%d calls took %v in the median, %v at most", len(s.all), s.all[len(s.all)/2], s.all[len(s.all)-1])
}

// wantAll checks the records of pods that were all added at once. Each gets attached,
// if later: a machine with no time to spare keeps some from it for the length of
// their budget. An ADD that could not even write a record leaves a plain pod; there
// are few.
func (s *site) wantAll(pods []light) {
	s.t.Helper()
	var records map[string]record
	wait(s.t, "the pods are attached", func() (string, bool) {
		records = map[string]record{}
		for _, r := range s.records() {
			records[r.ContainerID] = r
		}
		for _, p := range pods {
			if r, ok := records[p.id]; ok && r.Status != "attached" {
				return fmt.Sprintf("%+v", r), false
			}
		}
		return "", true
	})
	links := s.links()
	missing := 0
	for _, p := range pods {
		if r, ok := records[p.id]; !ok {
			missing++
		} else if r.CgroupID != p.cgroupID || !slices.Contains(links, p.cgroupID) {
			s.t.Errorf("attached without a link: %+v", r)
		}
	}
	if missing > len(pods)/5 {
		s.t.Errorf("%d of %d pods have no record", missing, len(pods))
	}
}

// 100 ADDs and DELs at once, of pods that come and pods that go.
func TestConcurrent(t *testing.T) {
	s := newSite(t, options{})
	s.ok(s.cli("load"))
	going, coming := s.lightPods(50), s.lightPods(50)
	var took slowest
	atOnce := func(added, deleted []light) {
		var wg sync.WaitGroup
		for i := range added {
			wg.Go(func() { s.want(0, took.saw(s.run(added[i].call().add()))) })
			if len(deleted) > 0 {
				wg.Go(func() { s.want(0, took.saw(s.run(deleted[i].call().del()))) })
			}
		}
		wg.Wait()
		s.wantAll(added)
	}
	atOnce(going, nil)
	atOnce(coming, going)
	atOnce(going, coming)
	// The same pods' ADD and DEL in any order leave one or the other.
	var wg sync.WaitGroup
	for _, p := range going {
		wg.Go(func() { s.want(0, took.saw(s.run(p.call().add()))) })
		wg.Go(func() { s.want(0, took.saw(s.run(p.call().del()))) })
	}
	wg.Wait()
	for _, r := range s.records() {
		if r.Status == "attached" && !slices.Contains(s.links(), r.CgroupID) {
			t.Errorf("no link, but the record %+v", r)
		}
	}
	for _, p := range slices.Concat(going, coming) {
		s.want(0, s.run(p.call().del()))
	}
	took.within(t)
	// DELs that did not get the lock in time leave links, which are swept when their
	// cgroups are gone.
	if left := s.links(); len(left) > (len(going)+len(coming))/2 {
		t.Errorf("links %v are left", left)
	}
	for _, p := range slices.Concat(going, coming) {
		p.remove(t)
	}
	s.waitSwept()
	if left := must.Get(filepath.Glob(filepath.Join(s.RunDir, "*")))(t); len(left) > 6 {
		t.Errorf("run directory: %v", left)
	}
}

// waitSwept waits until GC has swept everything, which takes until the kernel has
// released the cgroups that are gone.
func (s *site) waitSwept() {
	s.t.Helper()
	wait(s.t, "everything is swept", func() (string, bool) {
		s.gcAll()
		left := s.leftovers()
		return fmt.Sprint(left), len(left) == 0
	})
}

// killedAt runs the call again and again, and kills it before the change by which
// it was not killed yet, until it ends by itself. After each time it calls then.
func (s *site) killedAt(stride int, c call, before, then func(change int)) (changes int) {
	s.t.Helper()
	for k := rand.IntN(stride); ; k += stride {
		before(k)
		n := 0
		status, stdout, _ := s.trace(c, func(call trace.Step) trace.Fate {
			if !call.Changes() {
				return trace.GoOn
			}
			if n++; n > k {
				return trace.Kill
			}
			return trace.GoOn
		})
		if stdout != "" && (c.verb != "ADD" || stdout != prevResult) {
			s.t.Errorf("killed before change %d, it has printed %q", k, stdout)
		}
		then(k)
		if !status.Signaled() {
			if status.ExitStatus() != 0 {
				s.t.Errorf("%s exits with %d", c.verb, status.ExitStatus())
			}
			return k
		}
		if s.t.Failed() {
			s.t.Fatalf("after %s was killed before change %d", c.verb, k)
		}
	}
}

// An ADD that is killed, wherever that is, is repaired by the next ADD, by DEL and
// by GC, and does no harm to another pod.
func TestAddKilled(t *testing.T) {
	s := newSite(t, options{})
	bystander, next, p := s.light(), s.light(), s.light()
	s.want(0, s.run(bystander.call().add()))
	keep := fmt.Sprintf(`"cni.dev/valid-attachments":[{"containerID":%q,"ifname":"eth0"}]`, bystander.id)
	type repair struct {
		stride int
		f      func(*site)
	}
	for name, repair := range map[string]repair{
		"ADD": {1, func(s *site) {
			s.wantLines(0, "", s.want(0, s.run(p.call().add())))
			s.wantRecord(p.id, "attached", "")
			s.wantLinks(bystander.cgroupID, p.cgroupID)
			s.want(0, s.run(p.call().check()))
			s.want(0, s.run(p.call().del()))
		}},
		"DEL": {1, func(s *site) { s.wantLines(0, "", s.want(0, s.run(p.call().del()))) }},
		"GC":  {2, func(s *site) { s.want(0, s.run(call{verb: "GC", members: keep})) }},
		"ADD of another pod": {3, func(s *site) {
			s.want(0, s.run(next.call().add()))
			s.wantRecord(next.id, "attached", "")
			s.want(0, s.run(next.call().del()))
			s.want(0, s.run(p.call().del()))
		}},
	} {
		t.Run(name, func(t *testing.T) {
			s := s.in(t)
			points := s.killedAt(repair.stride, p.call().add(), func(int) {}, func(int) {
				repair.f(s)
				s.wantLinks(bystander.cgroupID)
				s.wantRecord(bystander.id, "attached", "")
			})
			if points < 10 {
				t.Errorf("only %d points", points)
			}
			t.Logf("killed at every change of %d, or every %d", points, repair.stride)
			// What was half written is swept, not kept.
			s.want(0, s.run(call{verb: "GC", members: keep}))
			s.want(0, s.run(bystander.call().del()))
			s.wantNothing()
			s.want(0, s.run(bystander.call().add()))
		})
	}
	s.want(0, s.run(bystander.call().del()))
}

// The ADD that loads the datapath, killed: the next one loads it.
func TestLoadKilled(t *testing.T) {
	s := newSite(t, options{})
	p := s.light()
	points := s.killedAt(6, p.call().add(), func(int) { s.reboot(true) }, func(int) {
		s.wantLines(0, "", s.want(0, s.run(p.call().add())))
		s.wantRecord(p.id, "attached", "")
		s.wantLinks(p.cgroupID)
		s.want(0, s.run(p.call().del()))
		s.gcAll() // temporary files
		s.wantNothing()
	})
	if points < 40 {
		t.Errorf("only %d points", points)
	}
}

// A DEL, and a GC, that are killed are simply repeated.
func TestDelAndGCKilled(t *testing.T) {
	s := newSite(t, options{})
	p, q := s.light(), s.light()
	add := func(int) {
		s.want(0, s.run(p.call().add()))
		s.want(0, s.run(q.call().add()))
	}
	gc := call{verb: "GC", members: `"cni.dev/valid-attachments":[]`}
	s.killedAt(1, p.call().del(), add, func(int) {
		s.want(0, s.run(p.call().del()))
		s.wantLinks(q.cgroupID)
	})
	s.want(0, s.run(q.call().del()))
	s.wantNothing()
	s.killedAt(1, gc, add, func(int) {
		s.want(0, s.run(gc))
		s.wantNothing()
	})
}

// Many at once, and each may be killed at any time.
func TestKilledAmongOthers(t *testing.T) {
	s := newSite(t, options{})
	pods := s.lightPods(40)
	killed := 0
	for range 5 {
		var wg sync.WaitGroup
		var mu sync.Mutex
		for _, p := range pods {
			c := p.call().add()
			if rand.IntN(3) == 0 {
				c = p.call().del()
			}
			after := time.Duration(rand.Int64N(int64(200 * time.Millisecond)))
			wg.Go(func() {
				ctx, cancel := context.WithTimeout(context.Background(), after)
				defer cancel()
				cmd := s.command(ctx, c)
				cmd.WaitDelay = time.Second
				if err := s.Do(cmd.Start); err != nil {
					return // killed before it began
				}
				if cmd.Wait() != nil {
					mu.Lock()
					killed++
					mu.Unlock()
				}
			})
		}
		wg.Wait()
	}
	if killed < 10 {
		t.Errorf("only %d calls were killed", killed)
	}
	for i, p := range pods {
		if i%2 == 0 {
			s.want(0, s.run(p.call().add()))
			s.wantRecord(p.id, "attached", "")
		}
		if i%4 < 2 {
			s.want(0, s.run(p.call().del()))
		}
	}
	s.gcAll()
	s.wantNothing()
}

// meanwhile runs calls at once while something is stuck. Each succeeds within its
// time, but for GC, which fails within it. meanwhile returns what came of them.
func (s *site) meanwhile(calls ...call) []outcome {
	s.t.Helper()
	var took slowest
	got := make([]outcome, len(calls))
	var wg sync.WaitGroup
	for i, c := range calls {
		wg.Go(func() {
			got[i] = took.saw(s.run(c))
			if c.verb == "GC" { // it has nobody to let go
				s.want(11, got[i])
			} else {
				s.want(0, got[i])
			}
		})
	}
	wg.Wait()
	took.within(s.t)
	return got
}

// wantOneLine checks that of several calls that met the same trouble one has said so.
func (s *site) wantOneLine(holding string, got []outcome) {
	s.t.Helper()
	all := outcome{call: got[0].call}
	for _, g := range got {
		all.stderr += g.stderr
	}
	s.wantLines(1, holding, all)
}

// A process that holds the lock of the run directory has been stopped. Pods start,
// plain, and go, all the same.
func TestStuckRunDirLock(t *testing.T) {
	s := newSite(t, options{})
	list := s.network(node.Network{})
	before, gone := s.light(), s.light()
	s.want(0, s.run(before.call().add()))
	s.want(0, s.run(gone.call().add()))
	holder := newStuck(t, filepath.Join(s.RunDir, "lock"))

	var client, server *pod
	chain := make(chan bool)
	start := time.Now()
	go func() {
		defer close(chain)
		var wg sync.WaitGroup
		var pods [2]*node.Pod
		for i := range pods {
			wg.Go(func() {
				var err error
				if pods[i], err = s.AddPod(t.Context(), fmt.Sprint("pod-", i), list, node.PodOptions{}); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if !t.Failed() {
			client, server = s.peopled(pods[0]), s.peopled(pods[1])
		}
	}()
	fresh := s.lightPods(4)
	got := s.meanwhile(fresh[0].call().add(), fresh[1].call().add(), fresh[2].call(`"mode":"off"`).add(),
		gone.call().del(), before.call().check(), before.call().add(), call{verb: "STATUS"},
		call{verb: "GC", members: `"cni.dev/valid-attachments":[]`})
	<-chain
	if took := time.Since(start); took > budget+2*startUp {
		t.Errorf("the chain took %v", took)
	}
	warned := 0
	for _, line := range append(logLines(s.log.take()), logLines(got[0].stderr+got[1].stderr+got[5].stderr)...) {
		if warned++; !strings.Contains(line, "level=WARN msg=\"pod is not accelerated\"") || !strings.Contains(line, "another process holds the lock") {
			t.Errorf("logged %s", line)
		}
	}
	if warned != 1 {
		t.Errorf("%d lines that say why pods are plain, want 1", warned)
	}
	for _, p := range fresh[:2] {
		s.wantRecord(p.id, "skipped", "busy: ")
	}
	for _, i := range []int{4, 6} {
		if got[i].took > startUp {
			t.Errorf("%s waited %v for a lock that it does not need", got[i].call.verb, got[i].took)
		}
	}
	if t.Failed() {
		return
	}
	s.wantPlain("pods that started meanwhile", direct(client, server))
	for _, r := range s.records() {
		if r.ContainerID == gone.id {
			t.Error("the deleted pod's record is left")
		}
	}
	// The one that was there stays as it was.
	s.wantRecord(before.id, "attached", "")

	holder.end()
	gone.remove(t) // what its DEL has left, a later ADD or GC sweeps
	s.want(0, s.run(fresh[0].call().add()))
	s.wantRecord(fresh[0].id, "attached", "")
	for _, p := range append(fresh, before, gone) {
		s.want(0, s.run(p.call().del()))
	}
	wait(t, "the kernel has released the cgroup", func() (string, bool) {
		return "", !must.Get(datapath.HasLink(s.BPFFS, gone.cgroupID))(t)
	})
	s.gcAll()
	s.wantLinks()
}

// The same for the locks of loading: on the bpffs, and on the directory that it is
// to be mounted on.
func TestStuckLoading(t *testing.T) {
	s := newSite(t, options{})
	empty := filepath.Join(s.Dir, "empty")
	must.Do(t, os.Mkdir(empty, 0o700))
	must.Do(t, os.Mkdir(filepath.Join(s.BPFFS, "skipstack"), 0o700))
	for name, tc := range map[string]struct{ bpffs, lock string }{
		"loading":  {s.BPFFS, filepath.Join(s.BPFFS, "skipstack")},
		"mounting": {empty, empty},
	} {
		t.Run(name, func(t *testing.T) {
			s := s.in(t)
			holder := newStuck(t, tc.lock)
			var calls []call
			for _, p := range s.lightPods(3) {
				c := p.call().add()
				c.bpffs = tc.bpffs
				calls = append(calls, c)
			}
			s.wantOneLine("busy: ", s.meanwhile(calls...))
			for _, c := range calls {
				s.wantRecord(c.pod.id, "skipped", "busy: ")
			}
			holder.end()
			for _, c := range calls {
				s.want(0, s.run(c.add()))
				s.wantRecord(c.pod.id, "attached", "")
				s.want(0, s.run(c.del()))
			}
		})
	}
	must.Do(t, unix.Unmount(empty, unix.MNT_DETACH))
}

// A prober that is stuck keeps pods from being accelerated, and from nothing else.
func TestStuckProber(t *testing.T) {
	s := newSite(t, options{unprobed: true})
	p, q := s.light(), s.light()
	must.Do(t, os.MkdirAll(s.RunDir, 0o700))
	lock := filepath.Join(s.RunDir, attachment.ProbeLock)
	must.Do(t, os.WriteFile(lock, nil, 0o600))
	holder := newStuck(t, lock)
	for _, got := range s.meanwhile(p.call().add(), q.call().add()) {
		s.wantLines(0, "", got)
	}
	s.wantRecord(p.id, "attached", "")
	s.wantRecord(q.id, "attached", "")
	if s.gate().Open {
		t.Error("the gate is open without a verdict")
	}
	holder.end()
	s.want(0, s.run(q.call().add()))
	s.waitGate()
	s.want(0, s.run(p.call().del()))
	s.want(0, s.run(q.call().del()))
}

// Lines that are counted across processes do not wait for a process that is stuck.
func TestStuckLog(t *testing.T) {
	s := newSite(t, options{})
	p, q := s.light(), s.light()
	s.want(0, s.run(p.call(`"mod":1`).add()))
	newStuck(t, filepath.Join(s.RunDir, "log-repeats"))
	for _, got := range s.meanwhile(p.call(`"mod":2`).add(), q.call(`"mod":2`).add()) {
		if n := len(logLines(got.stderr)); n < 1 {
			t.Error("nothing was logged")
		}
		if got.took > startUp {
			t.Errorf("ADD took %v", got.took)
		}
	}
	s.want(0, s.run(p.call().del()))
	s.want(0, s.run(q.call().del()))
}

// An ADD that is stopped at some change, with whatever it holds, stops no other.
func TestStuckAdd(t *testing.T) {
	s := newSite(t, options{})
	p, q, r := s.light(), s.light(), s.light()
	s.want(0, s.run(r.call().add()))
	changes := 0
	_, _, _ = s.trace(p.call().add(), func(c trace.Step) trace.Fate {
		if c.Changes() {
			changes++
		}
		return trace.GoOn
	})
	s.want(0, s.run(p.call().del()))
	busy := 0
	for i := range 6 {
		k := (i*changes + rand.IntN(changes)) / 6
		n := 0
		_, _, end := s.trace(p.call().add(), func(c trace.Step) trace.Fate {
			if c.Changes() {
				if n++; n > k {
					return trace.Stick
				}
			}
			return trace.GoOn
		})
		s.meanwhile(q.call().add(), r.call().del())
		// The record tells, not the log, which leaves out repeats.
		if s.record(q.id).Status == "skipped" {
			s.wantRecord(q.id, "skipped", "busy: lock ")
			busy++
		} else {
			s.wantRecord(q.id, "attached", "")
		}
		end()
		s.want(0, s.run(q.call().add()))
		s.wantRecord(q.id, "attached", "")
		s.want(0, s.run(p.call().del()))
		s.want(0, s.run(q.call().del()))
		s.gcAll()
		s.want(0, s.run(r.call().add()))
		s.wantLinks(r.cgroupID)
		if t.Failed() {
			t.Fatalf("after ADD was stopped before change %d", k)
		}
	}
	if busy == 0 {
		t.Error("the lock was never held by the stopped ADD")
	}
	s.want(0, s.run(r.call().del()))
}

// gate reads the node's gate.
func (s *site) gate() datapath.NodeSettings {
	s.t.Helper()
	set := must.Get(datapath.Open(s.BPFFS))(s.t)
	defer set.Close()
	return must.Get(set.Node())(s.t)
}

// waitGate waits until the prober has opened the gate.
func (s *site) waitGate() {
	s.t.Helper()
	wait(s.t, "the gate is open", func() (string, bool) { return "it is closed", s.gate().Open })
	s.waitProber()
}

// Somebody removes pins by hand. The next ADD loads what is missing, connections
// that live lose nothing, and new ones are accelerated.
func TestDamaged(t *testing.T) {
	s := newSite(t, options{})
	list := s.network(node.Network{})
	client, server := s.twoPods(list, node.PodOptions{})
	pins := must.Get(filepath.Glob(filepath.Join(s.BPFFS, "skipstack/v1/*s/*[a-z]*")))(t)
	if len(pins) < 5 {
		t.Fatalf("pins %v", pins)
	}
	rand.Shuffle(len(pins), func(i, j int) { pins[i], pins[j] = pins[j], pins[i] })
	for _, pin := range pins[:4] {
		a, b := s.connect(direct(client, server))
		s.wantRedirected(a, b)
		must.Do(t, os.Remove(pin))
		for _, p := range []*pod{client, server} { // as for two new pods of the same cgroups
			_, err := p.Add(t.Context(), list, "again")
			must.Do(t, err)
		}
		for range 5 {
			s.say(a, b)
			s.say(b, a)
		}
		s.wantAccelerated("after "+filepath.Base(pin)+" was removed", direct(client, server))
		s.wantLinks(client.cgroupID(t), server.cgroupID(t))
		for _, p := range []*pod{client, server} {
			must.Do(t, p.Check(t.Context(), list, node.IfName))
			must.Do(t, p.Del(t.Context(), list, "again"))
		}
		must.Do(t, a.Close())
		must.Do(t, b.Close())
	}
}
