package verdict

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/skipstack/skipstack/plugin/datapath"
)

func (v *Verdict) probe(name string) Probe {
	for _, p := range v.Probes {
		if p.Name == name {
			return p
		}
	}
	return Probe{}
}

// thisKernel is what must be found out about a kernel.
type thisKernel struct {
	release string // prefix of uname -r
	results map[string]Result
	funnel  bool
	risks   datapath.Risk
}

// kernels are those of the machines that the tests run on.
var kernels = []thisKernel{
	{
		// FIONREAD counts redirected bytes, but no longer those of TCP. No guard
		// is permitted.
		release: "6.18.44-",
		results: map[string]Result{
			ProbeLoad: OK, ProbeRedirect: OK, ProbeOrder: OK, ProbeCharged: OK,
			ProbeFIONREAD: OK, ProbeEpoll: OK, ProbeSplice: NotOK, ProbeMPTCP: OK,
		},
		funnel: true,
		risks:  datapath.RiskSplice,
	},
	{
		// FIONREAD counts only bytes of TCP.
		release: "6.1.",
		results: map[string]Result{
			ProbeLoad: OK, ProbeRedirect: OK, ProbeOrder: OK,
			ProbeFIONREAD: NotOK, ProbeEpoll: OK, ProbeSplice: OK, ProbeMPTCP: NotOK,
		},
		risks: datapath.RiskFIONREAD,
	},
	{
		// FIONREAD counts both.
		release: "7.3.",
		results: map[string]Result{
			ProbeLoad: OK, ProbeRedirect: OK, ProbeOrder: OK, ProbeCharged: OK,
			ProbeFIONREAD: OK, ProbeEpoll: OK, ProbeSplice: OK, ProbeMPTCP: OK,
		},
	},
	{
		// Any other that is supported.
		results: map[string]Result{
			ProbeLoad: OK, ProbeRedirect: OK, ProbeOrder: OK, ProbeEpoll: OK,
		},
	},
}

// runUntil repeats Run until it has told what it must, as its callers do: on a machine
// that stalls, a probe may run out of time. A verdict that never tells is returned, too.
func runUntil(t *testing.T, env Env, told func(v *Verdict) bool) (*Verdict, error) {
	t.Helper()
	for tries := 10; ; tries-- {
		start := time.Now()
		v, err := Run(context.Background(), env)
		if err != nil {
			return nil, err
		}
		t.Logf("%s in %v: %s, funnel %v", v.Kernel, time.Since(start).Round(time.Millisecond), v, v.Funnel)
		if tries == 1 || told(v) {
			return v, nil
		}
		t.Logf("once more: %+v", v.Probes)
	}
}

// conclusive tells if the probes that need no guard could all tell.
func conclusive(v *Verdict) bool { return othersTold(v, "") }

// allTold tells if all probes could tell.
func allTold(v *Verdict) bool { return conclusive(v) && v.probe(ProbeSplice).Result != CouldNotTell }

// othersTold tells it of all but one.
func othersTold(v *Verdict, probe string) bool {
	return !slices.ContainsFunc(v.Probes, func(p Probe) bool {
		return !depends(p.Name, probe) && p.Result == CouldNotTell
	})
}

// depends tells if a probe's outcome need not be OK where that of another is not.
func depends(name, other string) bool {
	return name == other || name == ProbeSplice || name == ProbeMPTCP && other == ProbeFIONREAD
}

func TestRun(t *testing.T) {
	v, err := runUntil(t, Env{CgroupRoot: cgroupRoot(t)}, conclusive)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range v.Probes {
		t.Logf("%s: %s: %s", p.Name, p.Result, p.Detail)
		if p.Detail == "" || strings.Contains(p.Detail, "\n") {
			t.Errorf("%s: the detail is not one line", p.Name)
		}
	}
	for _, k := range kernels {
		if !strings.HasPrefix(v.Kernel, k.release) {
			continue
		}
		for name, want := range k.results {
			if p := v.probe(name); p.Result != want {
				t.Errorf("%s is %q, must be %q", name, p.Result, want)
			}
		}
		if v.Level == Unsupported || (v.Level == Safe) != (v.Risks == 0) {
			t.Errorf("%s, with risks %q", v.Level, v.Risks)
		}
		if ok := v.probe(ProbeSplice).Result == OK; ok != (v.Guard != datapath.NoGuard) {
			t.Errorf("probe splice ok: %v, guard %q", ok, v.Guard)
		}
		if k.release != "" && (v.Funnel != k.funnel || v.Risks&^datapath.RiskUncharged != k.risks) {
			t.Errorf("funnel %v, risks %q; must be %v, %q", v.Funnel, v.Risks, k.funnel, k.risks)
		}
		break
	}
	dir := t.TempDir()
	if err := v.Save(dir); err != nil {
		t.Fatal(err)
	}
	got, err := Cached(dir)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(encoded(t, got), encoded(t, v)) {
		t.Errorf("%s is kept as %s", encoded(t, v), encoded(t, got))
	}
}

func TestRunTwiceAtOnce(t *testing.T) {
	root := cgroupRoot(t)
	var verdicts [2]*Verdict
	var wg sync.WaitGroup
	for i := range verdicts {
		wg.Go(func() {
			var err error
			if verdicts[i], err = runUntil(t, Env{CgroupRoot: root}, conclusive); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	a, b := verdicts[0], verdicts[1]
	if a == nil || b == nil {
		return
	}
	if a.String() != b.String() || a.Funnel != b.Funnel || a.Level == Unsupported {
		t.Errorf("%s, %v and %s, %v", encoded(t, a), a.Funnel, encoded(t, b), b.Funnel)
	}
}

// TestJudge lets the kernel, or the worker, misbehave.
func TestJudge(t *testing.T) {
	splice := datapath.RiskSplice
	for fake, tc := range map[string]struct {
		probe  string
		result Result
		detail string
		level  Level
		risks  datapath.Risk
	}{
		"loses":          {ProbeRedirect, NotOK, "corrupt data", Unsupported, splice},
		"not redirected": {ProbeRedirect, NotOK, "nothing to gain", Unsupported, splice},
		"by TCP":         {ProbeRedirect, NotOK, "nothing to gain", Unsupported, splice},
		"not enrolled":   {ProbeRedirect, CouldNotTell, "0 of 1 connections were enrolled", Unsupported, splice},
		"disorders":      {ProbeOrder, NotOK, "corrupt data", Unsupported, splice},
		"one mode":       {ProbeOrder, CouldNotTell, "too few to tell", Unsupported, splice},
		"uncharged":      {ProbeCharged, NotOK, "fill the node's memory", Risky, splice | datapath.RiskUncharged},
		"not stopped":    {ProbeCharged, NotOK, "fill the node's memory", Risky, splice | datapath.RiskUncharged},
		"not released":   {ProbeCharged, NotOK, "stall", Risky, splice | datapath.RiskUncharged},
		"sleeps on":      {ProbeEpoll, NotOK, "would hang", Risky, splice | datapath.RiskEpoll},
		"fails":          {ProbeEpoll, CouldNotTell, "no sockets left", Risky, splice | datapath.RiskEpoll},
		"crash":          {ProbeEpoll, CouldNotTell, "the worker ended: out of luck", Risky, splice | datapath.RiskEpoll},
		"counts nothing": {ProbeFIONREAD, NotOK, "does not count redirected bytes: nginx, Java and .NET readers may stall", Risky,
			splice | datapath.RiskFIONREAD},
		"counts redirected": {ProbeFIONREAD, NotOK, "not even with an sk_skb program", Risky, splice | datapath.RiskFIONREAD},
		"counts all":        {ProbeFIONREAD, OK, "and bytes that came by TCP", Risky, splice},
	} {
		t.Run(fake, func(t *testing.T) {
			v := runFake(t, fake, func(v *Verdict) bool {
				p := v.probe(tc.probe)
				return othersTold(v, tc.probe) && (p.Result != CouldNotTell || strings.Contains(p.Detail, tc.detail))
			})
			p := v.probe(tc.probe)
			if p.Result != tc.result || !strings.Contains(p.Detail, tc.detail) {
				t.Errorf("%+v", p)
			}
			if v.Level != tc.level || v.Risks != tc.risks {
				t.Errorf("%s, risks %q", v.Level, v.Risks)
			}
			if v.Funnel && (tc.probe == ProbeFIONREAD) {
				t.Error("the funnel is wanted where it does not help")
			}
			if v.MPTCPListeners == (fake == "counts nothing") {
				t.Errorf("MPTCP listeners: %v", v.MPTCPListeners)
			}
			othersOK(t, v, tc.probe)
		})
	}
}

func runFake(t *testing.T, fake string, told func(*Verdict) bool) *Verdict {
	t.Helper()
	v, err := runUntil(t, Env{CgroupRoot: cgroupRoot(t), workerArgs: []string{fakeWorkerArg, fake}}, told)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// A process that a seccomp filter keeps from io_uring says that it has not tried it. One
// without a filter has nobody to leave that to.
func TestRingUntried(t *testing.T) {
	root := cgroupRoot(t)
	splicesWithoutRing := []string{root, fakeWorkerArg, "no io_uring"}
	for arg, want := range map[string]bool{filteredArg: true, unfilteredArg: filtered()} {
		for tries := 10; ; tries-- {
			out, err := exec.Command("/proc/self/exe", append([]string{arg}, splicesWithoutRing...)...).CombinedOutput()
			if err != nil {
				t.Fatalf("%s: %v: %s", arg, err, out)
			}
			v, err := decode(out)
			if err != nil {
				t.Fatalf("%s: %v: %s", arg, err, out)
			}
			p := v.probe(ProbeSplice)
			if p.Result == CouldNotTell && tries > 1 {
				t.Logf("once more: %+v", p)
				continue
			}
			if p.Result != OK || v.RingUntried != want || v.Due(v.ProbedAt.Add(recheckAfter+time.Second)) != (want && !filtered()) {
				t.Errorf("%s: %s", arg, out)
			}
			break
		}
	}
}

// TestGuard: the guard refuses io_uring's splice, too, and one that does not is none.
func TestGuard(t *testing.T) {
	guard := datapath.NoGuard
	t.Run("refuses", func(t *testing.T) {
		v, err := runUntil(t, Env{CgroupRoot: cgroupRoot(t)}, allTold)
		if err != nil {
			t.Fatal(err)
		}
		p := v.probe(ProbeSplice)
		if guard = v.Guard; guard == datapath.NoGuard {
			t.Skipf("needs a kernel that permits a splice guard: %+v", p)
		}
		if strings.Contains(p.Detail, "also io_uring's") == noRing() || strings.Contains(p.Detail, "not tried") != noRing() {
			t.Errorf("%+v", p)
		}
		if v.RingUntried != (noRing() && filtered()) {
			t.Errorf("io_uring is untried: %v", v.RingUntried)
		}
	})
	t.Run("costs", func(t *testing.T) {
		if guard == datapath.NoGuard {
			t.Skip("needs a kernel that permits a splice guard")
		}
		root := cgroupRoot(t)
		detail := func() string {
			v, err := runUntil(t, Env{CgroupRoot: root}, allTold)
			if err != nil {
				t.Fatal(err)
			}
			return v.probe(ProbeSplice).Detail
		}
		set, err := datapath.LoadPrivate(probeSet())
		if err != nil {
			t.Fatal(err)
		}
		defer set.Close()
		if err := set.SetNode(datapath.NodeSettings{Open: true, Guard: guard}); err != nil {
			t.Fatal(err)
		}
		if d := detail(); !strings.Contains(d, "ns with it") || strings.Contains(d, "ns without") {
			t.Errorf("while a guard is attached: %s", d)
		}
		if err := set.Close(); err != nil {
			t.Fatal(err)
		}
		waitFor(t, "the guard's end", func() bool {
			attached, err := guardAttached()
			return err == nil && !attached
		})
		if d := detail(); !strings.Contains(d, "ns without") {
			t.Errorf("with no guard: %s", d)
		}
	})
	t.Run("misses io_uring", func(t *testing.T) {
		v := runFake(t, "io_uring is missed", allTold)
		p := v.probe(ProbeSplice)
		if p.Result != NotOK || guard != datapath.NoGuard && !strings.Contains(p.Detail, string(guard)+": it does not refuse io_uring's splice") {
			t.Errorf("%+v", p)
		}
		if v.Guard != datapath.NoGuard || v.Risks&datapath.RiskSplice == 0 {
			t.Errorf("guard %q, risks %q", v.Guard, v.Risks)
		}
	})
}

// TestOrderTriesAgain: rounds in which nearly all went one way, as on a busy
// machine, are not the last.
func TestOrderTriesAgain(t *testing.T) {
	v := runFake(t, "one mode at first", conclusive)
	if p := v.probe(ProbeOrder); p.Result != OK {
		t.Errorf("%+v", p)
	}
	if v.Level == Unsupported || v.Inconclusive() {
		t.Errorf("%s", v)
	}
}

// othersOK tells if only that probe, and what depends on it, is not ok.
func othersOK(t *testing.T, v *Verdict, probe string) {
	t.Helper()
	for _, p := range v.Probes {
		if !depends(p.Name, probe) && p.Result != OK {
			t.Errorf("%+v", p)
		}
	}
}

// TestTunedBuffers: a verdict is on the kernel, whatever buffers TCP has on the node.
func TestTunedBuffers(t *testing.T) {
	usual := runFake(t, "tcp_rmem "+bufferSizes[0], conclusive)
	for _, sizes := range bufferSizes[1:] {
		t.Run(sizes, func(t *testing.T) {
			v := runFake(t, "tcp_rmem "+sizes, conclusive)
			for i, want := range usual.Probes {
				if p := v.Probes[i]; p.Result != want.Result {
					t.Errorf("%+v, else %+v", p, want)
				}
			}
		})
	}
}

func TestHangingProbe(t *testing.T) {
	for experiment, probe := range map[string]string{
		expExchange: ProbeRedirect,
		expShuffle:  ProbeOrder,
		expFlood:    ProbeCharged,
		expWaiting:  ProbeFIONREAD,
		expWake:     ProbeEpoll,
	} {
		t.Run(experiment, func(t *testing.T) {
			v := runFake(t, "hang "+experiment, func(v *Verdict) bool {
				return othersTold(v, probe) && strings.Contains(v.probe(probe).Detail, "no answer")
			})
			if p := v.probe(probe); p.Result != CouldNotTell || !strings.Contains(p.Detail, "no answer") {
				t.Errorf("%+v", p)
			}
			othersOK(t, v, probe)
		})
	}
}

func TestEveryProbeHangs(t *testing.T) {
	cgroupRoot := cgroupRoot(t)
	start := time.Now()
	v, err := Run(context.Background(), Env{CgroupRoot: cgroupRoot, workerArgs: []string{fakeWorkerArg, "hang"}})
	if err != nil {
		t.Fatal(err)
	}
	if v.Level != Unsupported || v.Funnel || v.MPTCPListeners || !v.Inconclusive() {
		t.Errorf("%+v", v)
	}
	for _, p := range v.Probes {
		if p.Name != ProbeLoad && p.Name != ProbeSplice && p.Result != CouldNotTell {
			t.Errorf("%+v", p)
		}
	}
	// Less than three seconds on an ordinary machine. The slowest has its times to the
	// full, and starts and ends slowly.
	if d := time.Since(start); d > 2*slowest*budget {
		t.Errorf("took %v", d)
	} else {
		t.Logf("took %v", d.Round(time.Millisecond))
	}
}

// waitFor waits for a condition that must come about.
func waitFor(t *testing.T, what string, check func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !check(); {
		if time.Now().After(end) {
			t.Fatalf("waited in vain for %s", what)
		}
		time.Sleep(time.Millisecond)
	}
}

// workers lists the processes in the scratch cgroups.
func workers(t *testing.T, root string) []int {
	t.Helper()
	var pids []int
	for _, dir := range children(t, root) {
		data, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
		if err != nil {
			continue // removed meanwhile
		}
		for _, field := range strings.Fields(string(data)) {
			if pid, err := strconv.Atoi(field); err == nil && pid > 0 {
				pids = append(pids, pid)
			}
		}
	}
	return pids
}

func TestCancel(t *testing.T) {
	for _, when := range []string{"before", "scratch cgroup", "worker"} {
		t.Run(when, func(t *testing.T) {
			root := cgroupRoot(t)
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			if when == "before" {
				cancel()
			}
			done := make(chan error, 1)
			go func() {
				v, err := Run(ctx, Env{CgroupRoot: root, workerArgs: []string{fakeWorkerArg, "hang"}})
				if v != nil {
					t.Errorf("a verdict: %s", v)
				}
				done <- err
			}()
			var pids []int
			switch when {
			case "scratch cgroup":
				waitFor(t, when, func() bool { return len(children(t, root)) > 0 })
			case "worker":
				waitFor(t, when, func() bool {
					pids = workers(t, root)
					return len(pids) > 0
				})
			}
			cancel()
			if err := <-done; !errors.Is(err, context.Canceled) || errors.Is(err, ErrPrivilege) {
				t.Error(err)
			}
			for _, pid := range pids {
				if !gone(pid) {
					t.Errorf("worker %d lives", pid)
				}
			}
		})
	}
}

// TestKilled kills a process that probes: its worker goes with it, and the next
// run removes the cgroup.
func TestKilled(t *testing.T) {
	root := cgroupRoot(t)
	var pids []int
	for {
		cmd := exec.Command("/proc/self/exe", runArg, root, fakeWorkerArg, "hang")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		waitFor(t, "the worker", func() bool {
			pids = workers(t, root)
			return len(pids) > 0
		})
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait()
		if !cmd.ProcessState.Exited() {
			break
		}
		// It had ended, and cleaned up: this process was not let run meanwhile.
	}
	waitFor(t, "the worker's end", func() bool { return gone(pids[0]) })
	left := children(t, root)
	if len(left) != 1 {
		t.Fatalf("scratch cgroups: %q", left)
	}
	waitFor(t, "the end of all its threads", func() bool {
		events, err := os.ReadFile(filepath.Join(left[0], "cgroup.events"))
		return err == nil && strings.Contains(string(events), "populated 0")
	})
	if _, err := Run(context.Background(), Env{CgroupRoot: root}); err != nil {
		t.Error(err)
	}
	if left := children(t, root); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}

func TestSweep(t *testing.T) {
	root := cgroupRoot(t)
	live, err := newScratch(root)
	if err != nil {
		t.Fatal(err)
	}
	dead, foreign := filepath.Join(root, scratchPrefix+"1-dead"), filepath.Join(root, "pod")
	for _, dir := range []string{dead, foreign} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := sweep(context.Background(), root); err != nil {
		t.Error(err)
	}
	for dir, want := range map[string]bool{live.dir.Name(): true, dead: false, foreign: true} {
		if _, err := os.Stat(dir); (err == nil) != want {
			t.Errorf("%s: %v", dir, err)
		}
	}
	if err := errors.Join(live.remove(time.Minute), os.Remove(foreign)); err != nil {
		t.Error(err)
	}
}

// TestUnprivileged: whoever may not probe learns nothing about the kernel.
func TestUnprivileged(t *testing.T) {
	cmd := exec.Command("/proc/self/exe", runArg, cgroupRoot(t), WorkerArg)
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.HasPrefix(string(out), "privilege\n") {
		t.Errorf("%v: %s", err, out)
	}
}

func TestNoCgroup2(t *testing.T) {
	for _, dir := range []string{t.TempDir(), "/nonexistent"} {
		v, err := Run(context.Background(), Env{CgroupRoot: dir})
		if v != nil || err == nil || !strings.Contains(err.Error(), dir) || errors.Is(err, ErrPrivilege) {
			t.Errorf("%v, %v", v, err)
		}
	}
}

// TestNoWorker: a program that cannot be started is no fault of the kernel.
func TestNoWorker(t *testing.T) {
	root := cgroupRoot(t)
	for _, exe := range []string{"/nonexistent", "/bin/false"} {
		if v, err := Run(context.Background(), Env{CgroupRoot: root, Exe: exe}); v != nil || err == nil {
			t.Errorf("%s: %v", exe, v)
		}
	}
}
