package cni_test

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/test/node"
)

// children lists this process's children by pid that satisfy a condition on their
// command line. This process is the first of its PID namespace, so a detached
// prober becomes its child when the ADD that started it ends.
func children(t *testing.T, match func(cmdline, stat string) bool) []string {
	t.Helper()
	var found []string
	for _, stat := range must(filepath.Glob("/proc/[0-9]*/stat"))(t) {
		text, err := os.ReadFile(stat)
		if err != nil {
			continue // it has just ended
		}
		cmdline, _ := os.ReadFile(filepath.Join(filepath.Dir(stat), "cmdline"))
		if match(strings.ReplaceAll(string(cmdline), "\x00", " "), string(text)) {
			found = append(found, filepath.Base(filepath.Dir(stat)))
		}
	}
	return found
}

// probers lists the detached probers that run.
func probers(t *testing.T) []string {
	t.Helper()
	return children(t, func(cmdline, _ string) bool { return strings.Contains(cmdline, " probe --lock-fd=") })
}

// orphans counts orphaned children that have ended and are not reaped, which
// nobody does before the tests end.
func orphans(t *testing.T) int {
	t.Helper()
	return len(children(t, func(_, stat string) bool {
		_, rest, _ := strings.Cut(stat, ") ")
		return strings.HasPrefix(rest, fmt.Sprintf("Z %d ", os.Getpid()))
	}))
}

// verdictFile is the file of this boot's verdict, "" if there is none.
func (s *site) verdictFile() string {
	s.t.Helper()
	files := must(filepath.Glob(filepath.Join(s.RunDir, "verdict-*.json")))(s.t)
	if len(files) == 0 {
		return ""
	}
	return files[0]
}

// After a boot nothing is loaded and no verdict known. The first ADD loads the
// datapath and waits for no verdict; a process of its own finds it, holds nothing
// of the ADD's, and opens the gate. The pods that came before are accelerated then.
func TestFirstPods(t *testing.T) {
	s := newSite(t, options{unprobed: true})
	p := s.light()
	var read, write [2]*os.File // standard output and error
	for i := range read {
		var err error
		read[i], write[i], err = os.Pipe()
		check(t, err)
		defer read[i].Close()
	}
	cmd := s.command(t.Context(), p.call().add())
	cmd.Stdout, cmd.Stderr = write[0], write[1]
	start := time.Now()
	check(t, s.Do(cmd.Start))
	for _, w := range write {
		w.Close()
	}
	var printed [2][]byte
	for i, r := range read {
		printed[i] = must(io.ReadAll(r))(t)
	}
	took := time.Since(start)
	check(t, cmd.Wait())
	if s.verdictFile() != "" {
		t.Error("the ADD has waited for the verdict")
	}
	running := probers(t)
	if len(running) != 1 {
		t.Errorf("probers %v run, want one", running)
	}
	if took > budget+startUp || string(printed[0]) != prevResult || len(printed[1]) > 0 {
		t.Errorf("after %v printed %q and %q", took, printed[0], printed[1])
	}
	t.Logf("the first ADD, which loads the datapath, took %v", took)
	for _, pid := range running {
		env := must(os.ReadFile(filepath.Join("/proc", pid, "environ")))(t)
		if strings.Contains(string(env), "CNI_") {
			t.Errorf("the prober has CNI's variables: %q", env)
		}
		if sid, err := unix.Getsid(atoi(t, pid)); err != nil || sid != atoi(t, pid) {
			t.Errorf("the prober is in session %d, %v", sid, err)
		}
	}
	s.wantRecord(p.id, "attached", "")
	if s.gate().Open {
		t.Error("the gate is open without a verdict")
	}

	// A connection that is older than the gate stays plain, and whole.
	list := s.network(node.Network{})
	client, server := s.twoPods(list, node.PodOptions{})
	wait(t, "early pods are accelerated", func() (string, bool) {
		d := s.exchange(direct(client, server))
		return fmt.Sprint(d.Connections), d.Connections["enrolled"] > 0 && d.Messages["redirected"].Messages > 0 || !accepted(t)
	})
	s.waitGate()
	s.want(0, s.run(p.call().del()))
}

func atoi(t *testing.T, s string) (n int) {
	t.Helper()
	must(fmt.Sscan(s, &n))(t)
	return n
}

// Fifty ADDs at once on a node that has just booted: all pods start, one process
// loads, one probes.
func TestManyFirstPods(t *testing.T) {
	s := newSite(t, options{unprobed: true})
	pods := s.lightPods(50)
	before := orphans(t)
	done := make(chan struct{})
	var most int
	verdicts := map[uint64]bool{} // inodes
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		for {
			most = max(most, len(probers(t)))
			if file := s.verdictFile(); file != "" {
				verdicts[inode(t, file)] = true
			}
			select {
			case <-done:
				return
			case <-time.After(tick):
			}
		}
	}()
	var took slowest
	var wg sync.WaitGroup
	var got [50]outcome
	for i, p := range pods {
		wg.Go(func() { got[i] = s.want(0, took.saw(s.run(p.call().add()))) })
	}
	wg.Wait()
	s.waitGate()
	close(done)
	<-watched
	verdicts[inode(t, s.verdictFile())] = true
	took.within(t)
	wait(t, "the probers have ended", func() (string, bool) { return "", len(probers(t)) == 0 && orphans(t) > before })
	// An ADD that looked for the verdict just before it was there starts another
	// prober, which has nothing to do.
	if n := orphans(t) - before; most > 2 || n < 1 || n > 3 || len(verdicts) != 1 {
		t.Errorf("%d probers were started, %d seen at once, %d verdicts written, want one each", n, most, len(verdicts))
	}
	attached := 0
	for i, p := range pods {
		if s.record(p.id).Status == "attached" {
			attached++
		} else {
			t.Logf("plain: %s", got[i].stderr)
		}
		s.want(0, s.run(p.call().del()))
	}
	if attached < 40 {
		t.Errorf("%d of 50 pods are attached", attached)
	}
	s.wantNothing()
}

// A prober that is killed leaves nothing that the next one does not clear away.
func TestProberKilled(t *testing.T) {
	s := newSite(t, options{unprobed: true})
	p := s.light()
	for i := range 4 {
		s.want(0, s.run(p.call().add()))
		pids := probers(t)
		if len(pids) != 1 {
			t.Fatalf("probers %v, want one", pids)
		}
		// Once at once, then ever later on its way.
		scratch := func() []string { return must(filepath.Glob(filepath.Join(s.CgroupRoot, "skipstack-probe-*")))(t) }
		if i > 0 {
			wait(t, "the prober has its cgroup", func() (string, bool) { return "", len(scratch()) > 0 })
			time.Sleep(time.Duration(i-1) * 50 * time.Millisecond) // any point will do
		}
		check(t, unix.Kill(atoi(t, pids[0]), unix.SIGKILL))
		s.waitProber()
		if s.verdictFile() != "" {
			t.Error("it was not killed before it knew the verdict")
		}
	}
	s.want(0, s.run(p.call().add()))
	s.waitGate()
	s.want(0, s.run(p.call().del()))
	s.wantNothing()
}

// Where the verdict asks for more than a pod accepts, ADD says so.
func TestRiskIsNamed(t *testing.T) {
	s := newSite(t, options{})
	v := theVerdict(t)
	if len(v.Risks) == 0 {
		t.Skip("needs a kernel with a risk")
	}
	p, q := s.light(), s.light()
	cautious := p.call().add()
	cautious.cautious = true
	got := s.wantLines(1, "pod is not accelerated", s.want(0, s.run(cautious)))
	for _, risk := range v.Risks {
		if !strings.Contains(got.stderr, risk) {
			t.Errorf("the log line does not name the risk %s: %s", risk, got.stderr)
		}
	}
	s.wantRecord(p.id, "attached", "")
	s.wantLines(0, "", s.want(0, s.run(q.call(`"acceptRisks":["`+strings.Join(v.Risks, `","`)+`"]`).add())))
	s.want(0, s.run(p.call().del()))
	s.want(0, s.run(q.call().del()))

	load := s.cli("load")
	if load.code != 0 || !strings.Contains(load.stdout, "risky: "+strings.Join(v.Risks, ", ")) {
		t.Errorf("load does not name the risks: %+v", load)
	}
}
