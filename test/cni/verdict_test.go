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

// probers lists the node's detached probers that run.
func (s *site) probers() []string {
	s.t.Helper()
	return children(s.t, func(cmdline, _ string) bool {
		return strings.Contains(cmdline, " probe --lock-fd=") && strings.Contains(cmdline, `"runDir":"`+s.RunDir+`"`)
	})
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
	// A prober that has ended before this process looked at it, or an ADD that had no
	// time to load, is no test.
	var s *site
	var p light
	for deadline := time.Now().Add(patience); ; {
		s = newSite(t, options{unprobed: true})
		p = s.light()
		err := s.firstPod(p)
		if err == nil {
			break
		}
		if time.Now().After(deadline) || t.Failed() {
			t.Fatal(err)
		}
		t.Log("again:", err)
		s.want(0, s.run(p.call().del()))
	}

	// A connection that is older than the gate stays plain, and whole.
	list := s.network(node.Network{})
	client, server := s.twoPods(list, node.PodOptions{})
	wait(t, "early pods are accelerated", func() (string, bool) {
		d := s.exchange(direct(client, server))
		s.reprobe()
		return fmt.Sprint(d.Connections), d.Connections["enrolled"] > 0 && d.Messages["redirected"].Messages > 0 || !accepted(t)
	})
	s.waitGate()
	s.want(0, s.run(p.call().del()))
}

// firstPod runs the node's first ADD. It returns an error where that had no time, or
// the prober that it started was not seen.
func (s *site) firstPod(p light) error {
	s.t.Helper()
	t := s.t
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
	running := s.probers()
	if string(printed[0]) != prevResult || len(running) > 1 {
		t.Errorf("printed %q; probers %v run, want one", printed[0], running)
	}
	if took > budget+startUp || late(string(printed[1])) || s.unfinished(p.id) {
		return fmt.Errorf("ADD took %v: %s", took, printed[1])
	}
	if len(printed[1]) > 0 {
		t.Errorf("logged %s", printed[1])
	}
	t.Logf("the first ADD, which loads the datapath, took %v", took)
	for _, pid := range running {
		// Of one that ends, that is empty.
		env := must.Get(os.ReadFile(filepath.Join("/proc", pid, "environ")))(t)
		if strings.Contains(string(env), "CNI_") {
			t.Errorf("the prober has CNI's variables: %q", env)
		}
		if sid, err := unix.Getsid(atoi(t, pid)); err != nil || sid != atoi(t, pid) {
			t.Errorf("the prober is in session %d, %v", sid, err)
		}
	}
	s.wantRecord(p.id, "attached", "")
	open := s.gate().Open
	if s.verdictFile() != "" || len(running) == 0 {
		return errors.New("the verdict is known when the ADD ends, or it has started no prober")
	}
	if open {
		t.Error("the gate is open without a verdict")
	}
	return nil
}

// unclear says whether there is a verdict with a probe that could not tell, as happens
// on a busy machine.
func (s *site) unclear() bool {
	s.t.Helper()
	content, _ := os.ReadFile(s.verdictFile())
	return verdict{content: content}.unclear()
}

// reprobe has the kernel probed again where a prober could not tell: ADDs would have it
// tried again after a minute.
func (s *site) reprobe() {
	s.t.Helper()
	if len(s.probers()) > 0 || s.open() || !s.unclear() {
		return
	}
	s.t.Log("again: the machine was too busy for the prober")
	must.Do(s.t, os.Remove(s.verdictFile()))
	p := s.light()
	s.want(0, s.run(p.call().add()))
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
	look := func() {
		var st unix.Stat_t
		if unix.Stat(s.verdictFile(), &st) == nil && !s.unclear() {
			verdicts[st.Ino] = true
		}
	}
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		for {
			most = max(most, len(s.probers()))
			look()
			select {
			case <-done:
				return
			case <-time.After(tick):
			}
		}
	}()
	var adds crowd
	var wg sync.WaitGroup
	for _, p := range pods {
		wg.Go(func() { s.want(0, adds.saw(s.once(p.call().add()))) })
	}
	wg.Wait()
	s.waitGate()
	close(done)
	<-watched
	look()
	adds.log(t)
	wait(t, "the probers have ended", func() (string, bool) { return "", len(s.probers()) == 0 && orphans(t) > before })
	s.wantAll(pods, &adds)
	// One that looked for the verdict just before it was there starts another
	// prober, which has nothing to do, and so does one that has no time. They come one
	// after the other, but on a slow machine one may take long to end.
	if n := orphans(t) - before; most > 2+len(adds.late) || n < 1 || len(verdicts) != 1 {
		t.Errorf("%d probers were started, %d seen at once, %d verdicts written, want one each", n, most, len(verdicts))
	}
	for _, p := range pods {
		s.want(0, s.run(p.call().del()))
	}
	s.wantNothing()
}

// A prober that is killed leaves nothing that the next one does not clear away.
func TestProberKilled(t *testing.T) {
	var s *site
	var p light
	afresh := func() {
		s = newSite(t, options{unprobed: true})
		p = s.light()
	}
	afresh()
	for i, deadline := 0, time.Now().Add(patience); i < 4; {
		if s.killsProber(p, i) {
			i++
			continue
		}
		// It has opened the gate, and no ADD of that node starts another.
		if time.Now().After(deadline) {
			t.Fatal("it was never killed before it knew the verdict")
		}
		t.Log("again: the prober was not killed in time")
		s.want(0, s.run(p.call().del()))
		afresh()
	}
	s.want(0, s.run(p.call().add()))
	s.waitGate()
	s.want(0, s.run(p.call().del()))
	s.wantNothing()
}

// killsProber runs an ADD and kills the prober that it starts: at once, or ever later on
// its way. It returns false if the prober was done before.
func (s *site) killsProber(p light, when int) bool {
	s.t.Helper()
	s.want(0, s.run(p.call().add()))
	pids := s.probers()
	if len(pids) > 1 {
		s.t.Fatalf("probers %v, want one", pids)
	}
	if len(pids) == 0 {
		return false
	}
	if when > 0 {
		wait(s.t, "the prober has its cgroup, or ends", func() (string, bool) {
			scratch := must.Get(filepath.Glob(filepath.Join(s.CgroupRoot, "skipstack-probe-*")))(s.t)
			return "", len(scratch) > 0 || len(s.probers()) == 0
		})
		time.Sleep(time.Duration(when-1) * 50 * time.Millisecond) // any point will do
	}
	must.Do(s.t, unix.Kill(atoi(s.t, pids[0]), unix.SIGKILL))
	s.waitProber()
	return s.verdictFile() == ""
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
			if len(s.probers()) > 0 {
				t.Error("a verdict that is known is looked for")
			}
		})
	}
}

// A risk that a probe could not rule out goes away by itself: some time later an ADD
// has the kernel probed again, and the gate follows.
func TestLookAgain(t *testing.T) {
	node.Need(t)
	var doc map[string]any
	must.Do(t, json.Unmarshal(forge(t, "epoll").content, &doc))
	for _, p := range doc["probes"].([]any) {
		if probe := p.(map[string]any); probe["name"] == "epoll" {
			probe["result"] = "could not tell"
		}
	}
	s := newSite(t, options{unprobed: true})
	file := filepath.Join(s.RunDir, theVerdict(t).file)
	must.Do(t, os.MkdirAll(s.RunDir, 0o700))
	write := func(age time.Duration) {
		doc["probedAt"] = time.Now().Add(-age).UTC().Format(time.RFC3339)
		must.Do(t, os.WriteFile(file, must.Get(json.Marshal(doc))(t), 0o600))
	}
	add := func() {
		p := s.light()
		s.want(0, s.run(p.call().add()))
		s.wantRecord(p.id, "attached", "")
		s.want(0, s.run(p.call().del()))
	}
	write(0)
	add()
	add()
	if risks := s.gate().Risks; risks&datapath.RiskEpoll == 0 || len(s.probers()) > 0 {
		t.Errorf("risks %s, probers %v: the verdict is new", risks, s.probers())
	}
	write(30 * time.Minute)
	add()
	wait(t, "the gate goes by a new verdict", func() (string, bool) {
		if len(s.probers()) > 0 {
			return "probing", false
		}
		var now verdict
		must.Do(t, json.Unmarshal(must.Get(os.ReadFile(s.verdictFile()))(t), &now))
		if s.unclear() { // the machine is busy, or it still is the old one
			write(30 * time.Minute)
			add()
			return "the verdict is unclear", false
		}
		risks := s.gate().Risks.Names()
		return fmt.Sprintf("risks %q by verdict %+v", risks, now), slices.Equal(risks, now.Risks)
	})
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
		got := s.want(0, s.run(c.add()))
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
