package cni_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/plugin/datapath"
	"github.com/skipstack/skipstack/test/must"
	"github.com/skipstack/skipstack/test/node"
)

// children lists this process's children by pid that satisfy a condition on their
// command line. This process is the first of its PID namespace, so a detached
// prober becomes its child when the ADD that started it ends.
func children(t *testing.T, match func(cmdline, stat string) bool) []string {
	t.Helper()
	var found []string
	for _, stat := range must.Get(filepath.Glob("/proc/[0-9]*/stat"))(t) {
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
	files := must.Get(filepath.Glob(filepath.Join(s.RunDir, "verdict-*.json")))(s.t)
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
		must.Do(t, err)
		defer read[i].Close()
	}
	cmd := s.command(t.Context(), p.call().add())
	cmd.Stdout, cmd.Stderr = write[0], write[1]
	start := time.Now()
	must.Do(t, s.Do(cmd.Start))
	for _, w := range write {
		w.Close()
	}
	var printed [2][]byte
	for i, r := range read {
		printed[i] = must.Get(io.ReadAll(r))(t)
	}
	took := time.Since(start)
	must.Do(t, cmd.Wait())
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
		env := must.Get(os.ReadFile(filepath.Join("/proc", pid, "environ")))(t)
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
	must.Get(fmt.Sscan(s, &n))(t)
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
	for _, p := range pods {
		wg.Go(func() { s.want(0, took.saw(s.run(p.call().add()))) })
	}
	wg.Wait()
	s.waitGate()
	close(done)
	<-watched
	verdicts[inode(t, s.verdictFile())] = true
	took.within(t)
	wait(t, "the probers have ended", func() (string, bool) { return "", len(probers(t)) == 0 && orphans(t) > before })
	s.wantAll(pods)
	// One that looked for the verdict just before it was there starts another
	// prober, which has nothing to do, and so does one that has no time.
	if n := orphans(t) - before; most > 2 || n < 1 || len(verdicts) != 1 {
		t.Errorf("%d probers were started, %d seen at once, %d verdicts written, want one each", n, most, len(verdicts))
	}
	for _, p := range pods {
		s.want(0, s.run(p.call().del()))
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
		scratch := func() []string { return must.Get(filepath.Glob(filepath.Join(s.CgroupRoot, "skipstack-probe-*")))(t) }
		if i > 0 {
			wait(t, "the prober has its cgroup", func() (string, bool) { return "", len(scratch()) > 0 })
			time.Sleep(time.Duration(i-1) * 50 * time.Millisecond) // any point will do
		}
		must.Do(t, unix.Kill(atoi(t, pids[0]), unix.SIGKILL))
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

// forge makes a verdict of another kernel, on which these probes are not ok.
func forge(t *testing.T, notOK ...string) verdict {
	t.Helper()
	v := theVerdict(t)
	var doc map[string]any
	must.Do(t, json.Unmarshal(v.content, &doc))
	risks := []string{}
	level := "safe"
	for _, p := range doc["probes"].([]any) {
		probe := p.(map[string]any)
		name := probe["name"].(string)
		if name == "mptcp" { // to say that it is safe could crash a kernel on which it is not
			continue
		}
		probe["result"], probe["detail"] = "ok", "made up"
		if slices.Contains(notOK, name) {
			probe["result"] = "not ok"
			risk := map[string]string{"charged": "uncharged", "fionread": "fionread", "epoll": "epoll", "splice": "splice"}[name]
			switch {
			case risk == "":
				level = "unsupported"
			case level == "safe":
				level = "risky"
				fallthrough
			default:
				risks = append(risks, risk)
			}
		}
	}
	slices.SortFunc(risks, func(a, b string) int {
		order := []string{"splice", "fionread", "epoll", "uncharged"}
		return slices.Index(order, a) - slices.Index(order, b)
	})
	doc["verdict"], doc["risks"] = level, risks
	if slices.Contains(risks, "splice") {
		doc["guard"] = ""
	}
	return verdict{Verdict: level, Risks: risks, file: v.file, content: must.Get(json.Marshal(doc))(t)}
}

// What each kind of verdict makes of pods in mode auto, with and without a word
// from the pod or the configuration.
func TestVerdicts(t *testing.T) {
	node.Need(t)
	on := map[string]string{"skipstack/mode": "on"}
	for name, tc := range map[string]struct {
		notOK              []string
		auto, asks, accept bool // accelerated: by itself, if both pods ask for it, if the configuration accepts
	}{
		"safe":             {nil, true, true, true},
		"splice":           {[]string{"splice"}, false, true, true},
		"splice and epoll": {[]string{"splice", "epoll"}, false, true, true},
		"uncharged":        {[]string{"charged"}, false, false, true},
	} {
		t.Run(name, func(t *testing.T) {
			v := forge(t, tc.notOK...)
			s := newSite(t, options{unprobed: true})
			must.Do(t, os.MkdirAll(s.RunDir, 0o700))
			must.Do(t, os.WriteFile(filepath.Join(s.RunDir, v.file), v.content, 0o600))
			auto := s.network(node.Network{Skipstack: map[string]any{}})
			a, b := s.twoPods(auto, node.PodOptions{})
			if log := s.log.take(); tc.auto != (log == "") || !strings.Contains(log, strings.Join(v.Risks, ", ")) {
				t.Errorf("log %q", log)
			}
			s.wantAcceleratedIf(tc.auto, "auto", direct(a, b))
			c, d := s.twoPods(auto, node.PodOptions{Annotations: on})
			s.wantAcceleratedIf(tc.asks, "asked for", direct(c, d))
			e, f := s.twoPods(s.network(node.Network{}), node.PodOptions{})
			s.wantAcceleratedIf(tc.accept, "accepted", direct(e, f))
			if len(probers(t)) > 0 {
				t.Error("a verdict that is known is looked for")
			}
		})
	}
}

// On a kernel that is unsupported, in truth or by a verdict, nothing is loaded,
// everybody is told, and pods start, plain.
func TestUnsupported(t *testing.T) {
	s := newSite(t, options{unprobed: true})
	why := "unsupported: order"
	err := datapath.CheckKernel()
	truly := errors.Is(err, datapath.ErrUnsupported)
	loads := why
	if truly {
		why, loads = err.Error(), ""
		e, got := s.doctor()
		if e.Verdict != "unsupported" || got.code != 3 || len(e.Probes) == 0 || !strings.Contains(why, e.Probes[0].Detail) {
			t.Errorf("exit %d, %s, want the reason %q: %+v", got.code, e.Verdict, why, e.Probes)
		}
	} else {
		v := forge(t, "order", "splice")
		must.Do(t, os.MkdirAll(s.RunDir, 0o700))
		must.Do(t, os.WriteFile(filepath.Join(s.RunDir, v.file), v.content, 0o600))
	}
	p := s.light()
	for _, mode := range []string{"auto", "on"} {
		c := p.call(`"mode":"` + mode + `"`)
		var got outcome
		for range 5 { // an emulated machine that is busy may not be in time
			if got = s.want(0, s.run(c.add())); !late(got.stderr) {
				break
			}
		}
		if mode == "auto" {
			s.wantLines(1, why, got)
		}
		s.wantRecord(p.id, "skipped", "kernel: ")
		s.want(0, s.run(c.check()))
	}
	strict := p.call(`"onError":"fail"`)
	s.want(11, s.run(strict.add()))
	s.want(50, s.run(call{verb: "STATUS", members: `"onError":"fail"`}))
	s.want(0, s.run(call{verb: "STATUS"}))
	if _, err := os.Stat(filepath.Join(s.BPFFS, "skipstack")); err == nil {
		t.Error("the datapath is loaded")
	}
	s.wantCLI(3, loads, "pods stay plain", s.cli("load"))
	if !truly && s.gate().Open {
		t.Error("the gate is open")
	}
	s.want(0, s.run(p.call().add()))
	s.wantRecord(p.id, "skipped", "kernel: ")
	s.want(0, s.run(p.call().del()))

	// Through libcni, with a network.
	client, server := s.twoPods(s.network(node.Network{}), node.PodOptions{})
	s.wantPlain("unsupported", direct(client, server))
	s.wantRecord(server.ID, "skipped", "kernel: ")
}

// A verdict that cannot be read, or is of another build, is none.
func TestVerdictOfNoUse(t *testing.T) {
	node.Need(t)
	v := theVerdict(t)
	for name, content := range map[string]string{
		"empty":         "",
		"cut off":       string(v.content[:len(v.content)/2]),
		"contradictory": strings.Replace(string(forge(t, "order").content), `"unsupported"`, `"safe"`, 1),
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t, options{unprobed: true})
			must.Do(t, os.MkdirAll(s.RunDir, 0o700))
			must.Do(t, os.WriteFile(filepath.Join(s.RunDir, v.file), []byte(content), 0o600))
			p := s.light()
			s.want(0, s.run(p.call().add()))
			s.wantRecord(p.id, "attached", "")
			s.waitGate()
			var now verdict
			must.Do(t, json.Unmarshal(must.Get(os.ReadFile(s.verdictFile()))(t), &now))
			if now.Verdict != v.Verdict || !slices.Equal(now.Risks, v.Risks) {
				t.Errorf("verdict %+v, want %+v", now, v)
			}
			s.want(0, s.run(p.call().del()))
		})
	}
}
