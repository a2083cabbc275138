package cni_test

import (
	"context"
	"errors"
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

// crowd is what came of calls that were made at once, so that some have no time.
type crowd struct {
	mu   sync.Mutex
	took []time.Duration
	late map[string]bool // containers with a call that said so
}

func (c *crowd) saw(got outcome) outcome {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.took = append(c.took, got.took)
	if late(got.stdout + got.stderr) {
		if c.late == nil {
			c.late = map[string]bool{}
		}
		c.late[got.call.pod.id] = true
	}
	return got
}

// log logs how long they took, which they share the machine for: what a call may wait
// for others is checked by [site.meanwhile].
func (c *crowd) log(t *testing.T) {
	t.Helper()
	slices.Sort(c.took)
	t.Logf("%d calls took %v in the median, %v at most; of %d containers one had no time", len(c.took), c.took[len(c.took)/2], c.took[len(c.took)-1], len(c.late))
}

// wantAll checks the records of pods that were all added at once. Each gets attached,
// if later: a machine with no time to spare keeps some from it for the length of
// their budget. An ADD that could not even write a record, or wrote one when a prober
// had looked for such, leaves a plain pod, and says that it had no time.
func (s *site) wantAll(pods []light, added *crowd) {
	s.t.Helper()
	var records map[string]record
	idle := 0
	wait(s.t, "the pods are attached", func() (string, bool) {
		if len(s.probers()) == 0 {
			idle++
		}
		records = map[string]record{}
		for _, r := range s.records() {
			records[r.ContainerID] = r
		}
		for _, p := range pods {
			r, ok := records[p.id]
			if ok && r.Status == "attached" {
				continue
			}
			if idle > 0 && !ok && !added.late[p.id] {
				s.t.Fatalf("the ADD of %.12s has not said that it had no time, but there is no record", p.id)
			}
			if idle > 0 && !ok || idle > 100 && added.late[p.id] {
				s.want(0, s.run(p.call().add()))
			}
			return fmt.Sprintf("%+v", r), false
		}
		return "", true
	})
	links := s.links()
	for _, p := range pods {
		if r := records[p.id]; r.CgroupID != p.cgroupID || !slices.Contains(links, p.cgroupID) {
			s.t.Errorf("attached without a link: %+v", r)
		}
	}
}

// 100 ADDs and DELs at once, of pods that come and pods that go.
func TestConcurrent(t *testing.T) {
	s := newSite(t, options{})
	s.ok(s.cli("load"))
	going, coming := s.lightPods(50), s.lightPods(50)
	var all crowd
	atOnce := func(added, deleted []light) {
		var wg sync.WaitGroup
		for i := range added {
			wg.Go(func() { s.want(0, all.saw(s.once(added[i].call().add()))) })
			if len(deleted) > 0 {
				wg.Go(func() { s.want(0, all.saw(s.once(deleted[i].call().del()))) })
			}
		}
		wg.Wait()
		s.wantAll(added, &all)
	}
	atOnce(going, nil)
	atOnce(coming, going)
	atOnce(going, coming)
	// The same pods' ADD and DEL in any order leave one or the other.
	var wg sync.WaitGroup
	for _, p := range going {
		wg.Go(func() { s.want(0, all.saw(s.once(p.call().add()))) })
		wg.Go(func() { s.want(0, all.saw(s.once(p.call().del()))) })
	}
	wg.Wait()
	for _, r := range s.records() {
		// A DEL may have no time to remove the record, which is last.
		if r.Status == "attached" && !slices.Contains(s.links(), r.CgroupID) && !all.late[r.ContainerID] {
			t.Errorf("no link, but the record %+v", r)
		}
	}
	for _, p := range slices.Concat(going, coming) {
		s.want(0, s.run(p.call().del()))
	}
	all.log(t)
	// DELs that did not get the lock in time leave links, which are swept when their
	// cgroups are gone.
	if left := s.links(); len(left) > 0 && s.log.late.Load() == 0 {
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
		var got outcome
		s.attempt(func() error {
			before(k)
			n := 0
			got, _ = s.trace(c, func(call trace.Step) trace.Fate {
				if !call.Changes() {
					return trace.GoOn
				}
				if n++; n > k {
					return trace.Kill
				}
				return trace.GoOn
			})
			ended := got.code >= 0
			if !ended && got.stdout != "" && (c.verb != "ADD" || got.stdout != prevResult) {
				s.t.Errorf("killed before change %d, it has printed %q", k, got.stdout)
			}
			tardy := ended && late(got.stdout+got.stderr)
			if ended && !tardy {
				s.want(0, got)
			}
			then(k)
			if tardy {
				return fmt.Errorf("%s had no time for change %d: %s", c.verb, k, got.stdout+got.stderr)
			}
			return nil
		})
		if got.code >= 0 {
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
	for start, round := time.Now(), 0; round < 5 || killed < 10 && time.Since(start) < patience; round++ {
		var wg sync.WaitGroup
		var mu sync.Mutex
		for _, p := range pods {
			c := p.call().add()
			if rand.IntN(3) == 0 {
				c = p.call().del()
			}
			after := time.Duration(rand.Int64N(int64(200 * time.Millisecond)))
			wg.Go(func() {
				cmd := s.command(context.Background(), c)
				if err := s.Do(cmd.Start); err != nil {
					t.Error(err)
					return
				}
				defer time.AfterFunc(after, func() { _ = cmd.Process.Kill() }).Stop()
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
	s.waitProber()
	s.gcAll()
	s.wantNothing()
}

// meanwhile runs calls at once while something is stuck. Each succeeds within its
// time, but for GC, which fails within it. meanwhile returns what came of them, and an
// error if one took longer, or had not even the time to do without what is stuck.
func (s *site) meanwhile(calls ...call) (got []outcome, err error) {
	s.t.Helper()
	got = make([]outcome, len(calls))
	errs := make([]error, len(calls))
	var wg sync.WaitGroup
	for i, c := range calls {
		wg.Go(func() {
			got[i] = s.once(c)
			switch {
			case got[i].took > budget+startUp:
				errs[i] = fmt.Errorf("%s took %v, its budget is %v", c.verb, got[i].took, budget)
			case outOfTime(got[i].stdout + got[i].stderr):
				errs[i] = fmt.Errorf("%s: %s%s", c.verb, got[i].stdout, got[i].stderr)
			case c.verb == "GC": // it has nobody to let go
				s.want(11, got[i])
			default:
				s.want(0, got[i])
			}
		})
	}
	wg.Wait()
	return got, errors.Join(errs...)
}

// outOfTime says whether somebody says that all the time has gone, also that for giving
// up when the time for the work has.
func outOfTime(text string) bool {
	return strings.Contains(text, "not done in time") || strings.Contains(text, "cleanup=")
}

// onlyLine checks that of several calls that met the same trouble one has said so. Two
// have where one held the log's own lock for long.
func (s *site) onlyLine(holding string, got []outcome) error {
	s.t.Helper()
	lines := 0
	for _, g := range got {
		n := len(logLines(g.stderr))
		s.wantLines(n, holding, g)
		lines += n
	}
	if lines != 1 {
		return fmt.Errorf("%d lines, want one: %+v", lines, got)
	}
	return nil
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

	pods := []*node.Pod{must.Get(s.NewPod("client", node.PodOptions{}))(t), must.Get(s.NewPod("server", node.PodOptions{}))(t)}
	fresh := s.lightPods(4)
	s.attempt(func() (err error) {
		defer func() {
			for _, p := range pods {
				if err != nil {
					must.Do(t, p.Del(t.Context(), list, node.IfName))
				}
			}
			s.log.take()
		}()
		start := time.Now()
		var wg sync.WaitGroup
		for _, p := range pods {
			wg.Go(func() {
				if _, err := p.Add(t.Context(), list, node.IfName); err != nil {
					t.Error(err)
				}
			})
		}
		got, err := s.meanwhile(fresh[0].call().add(), fresh[1].call().add(), fresh[2].call(`"mode":"off"`).add(),
			gone.call().del(), before.call().check(), before.call().add(), call{verb: "STATUS"},
			call{verb: "GC", members: `"cni.dev/valid-attachments":[]`})
		wg.Wait()
		if took := time.Since(start); took > budget+2*startUp {
			err = errors.Join(err, fmt.Errorf("the chain took %v", took))
		}
		for _, i := range []int{4, 6} {
			if got[i].took > startUp {
				err = errors.Join(err, fmt.Errorf("%s waited %v for a lock that it does not need", got[i].call.verb, got[i].took))
			}
		}
		chain := outcome{stderr: s.log.take()}
		if outOfTime(chain.stderr) {
			err = errors.Join(err, errors.New(chain.stderr))
		}
		if err != nil {
			return err
		}
		return s.onlyLine("level=WARN msg=\"pod is not accelerated\"", []outcome{got[0], got[1], got[5], chain})
	})
	for _, p := range fresh[:2] {
		s.wantRecord(p.id, "skipped", "busy: ")
		if r := s.record(p.id); !strings.Contains(r.Reason, "another process holds the lock") {
			t.Errorf("record %+v", r)
		}
	}
	client, server := s.peopled(pods[0]), s.peopled(pods[1])
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
	s.waitProber() // it attaches the pods that started meanwhile
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
			s.attempt(func() error {
				got, err := s.meanwhile(calls...)
				if err != nil {
					return err
				}
				return s.onlyLine("busy: ", got)
			})
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
	s.waitProber() // it might mount it again
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
	s.attempt(func() error {
		all, err := s.meanwhile(p.call().add(), q.call().add())
		for _, got := range all {
			if late(got.stderr) {
				err = errors.Join(err, errors.New(got.stderr))
			} else {
				s.wantLines(0, "", got)
			}
		}
		if err != nil { // there may not even be the time to load; the next ADD needs none for it
			must.Do(t, must.Get(datapath.Load(t.Context(), s.BPFFS, datapath.LoadOptions{}))(t).Close())
		}
		return err
	})
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
	s.attempt(func() error {
		all, err := s.meanwhile(p.call(`"mod":2`).add(), q.call(`"mod":2`).add())
		for _, got := range all {
			if n := len(logLines(got.stderr)); n < 1 {
				t.Error("nothing was logged")
			}
			if got.took > startUp {
				err = errors.Join(err, fmt.Errorf("ADD took %v", got.took))
			}
		}
		return err
	})
	s.want(0, s.run(p.call().del()))
	s.want(0, s.run(q.call().del()))
}

// An ADD that is stopped at some change, with whatever it holds, stops no other.
func TestStuckAdd(t *testing.T) {
	s := newSite(t, options{})
	p, q, r := s.light(), s.light(), s.light()
	s.want(0, s.run(r.call().add()))
	changes := 0
	s.trace(p.call().add(), func(c trace.Step) trace.Fate {
		if c.Changes() {
			changes++
		}
		return trace.GoOn
	})
	s.want(0, s.run(p.call().del()))
	busy := 0
	for start, i := time.Now(), 0; i < 6 || busy == 0 && time.Since(start) < patience; i++ {
		k := (i%6*changes + rand.IntN(changes)) / 6
		n := 0
		_, end := s.trace(p.call().add(), func(c trace.Step) trace.Fate {
			if c.Changes() {
				if n++; n > k {
					return trace.Stick
				}
			}
			return trace.GoOn
		})
		s.attempt(func() error {
			_, err := s.meanwhile(q.call().add(), r.call().del())
			return err
		})
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

// open says whether the gate is open, which it is not where nothing is loaded yet.
func (s *site) open() bool {
	s.t.Helper()
	set, err := datapath.Open(s.BPFFS)
	if errors.Is(err, datapath.ErrNotLoaded) {
		return false
	}
	must.Do(s.t, err)
	defer set.Close()
	return must.Get(set.Node())(s.t).Open
}

// waitGate waits until the prober has opened the gate.
func (s *site) waitGate() {
	s.t.Helper()
	wait(s.t, "the gate is open", func() (string, bool) {
		s.reprobe()
		return "it is closed", s.open()
	})
	s.waitProber()
}

// Somebody removes pins by hand. The next ADD loads what is missing, connections
// that live lose nothing, and new ones are accelerated.
func TestDamaged(t *testing.T) {
	s := newSite(t, options{})
	list := s.network(node.Network{})
	client, server := s.twoPods(list, node.PodOptions{})
	pins := must.Get(filepath.Glob(filepath.Join(s.BPFFS, "skipstack/v2/*s/*[a-z]*")))(t)
	if len(pins) < 5 {
		t.Fatalf("pins %v", pins)
	}
	rand.Shuffle(len(pins), func(i, j int) { pins[i], pins[j] = pins[j], pins[i] })
	for _, pin := range pins[:4] {
		a, b := s.connect(direct(client, server))
		s.wantRedirected(a, b)
		must.Do(t, os.Remove(pin))
		for _, p := range []*pod{client, server} { // as for two new pods of the same cgroups
			s.attach(p.Pod, list, "again")
		}
		for range 5 {
			s.say(a, b)
			s.say(b, a)
		}
		s.wantAccelerated("after "+filepath.Base(pin)+" was removed", direct(client, server))
		s.wantLinks(client.cgroupID(t), server.cgroupID(t))
		for _, p := range []*pod{client, server} {
			must.Do(t, p.Check(t.Context(), list, node.IfName))
			s.detach(p.Pod, list, "again")
		}
		must.Do(t, a.Close())
		must.Do(t, b.Close())
	}
}
