package cni_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/test/must"
	"github.com/skipstack/skipstack/test/node"
)

// examination is what `skipstack doctor --json` prints.
type examination struct {
	Verdict      string   `json:"verdict"`
	Risks        []string `json:"risks"`
	Inconclusive bool     `json:"inconclusive"`
	Probes, Node []struct{ Name, Result, Detail string }
	Stored       bool   `json:"stored"`
	NotStored    string `json:"notStored"`
	Others       []struct {
		Program, Type, Cgroup, Sharing, Map, Conflict string
		Blocks                                        bool
		Processes                                     []string
	}
	Outlook  struct{ Pods, Asking struct{ Outcome, Why string } }
	Datapath struct{ Loaded, Open bool }
	Memory   *struct{ Connection, Maps, Maximum, MaxConnections uint64 }
}

func (e *examination) check(t *testing.T, name string) (result, detail string) {
	t.Helper()
	for _, c := range e.Node {
		if c.Name == name {
			return c.Result, c.Detail
		}
	}
	t.Fatalf("there is no check %s: %+v", name, e.Node)
	return "", ""
}

// parse checks that a doctor has printed one JSON object and said nothing else.
func parse(t *testing.T, got outcome) examination {
	t.Helper()
	var e examination
	dec := json.NewDecoder(strings.NewReader(got.stdout))
	if err := dec.Decode(&e); err != nil || dec.More() || got.stderr != "" {
		t.Fatalf("exit %d, %v, stdout %s, stderr %s", got.code, err, got.stdout, got.stderr)
	}
	return e
}

func (s *site) doctor(args ...string) (examination, outcome) {
	s.t.Helper()
	got := s.cli(append([]string{"doctor", "--json", "--cni-conf-dir", s.ConfDir, "--cni-bin-dir", node.ProgramDir()}, args...)...)
	return parse(s.t, got), got
}

// calmDoctor is doctor, again where the machine was too busy for a probe to tell.
func (s *site) calmDoctor(args ...string) (e examination, got outcome) {
	s.t.Helper()
	got = s.calm(func() outcome {
		e, got = s.doctor(args...)
		return got
	})
	return e, got
}

// calm runs a doctor, again where the machine was too busy for a probe to tell.
func (s *site) calm(doctor func() outcome) (got outcome) {
	s.t.Helper()
	for range probeAttempts {
		if got = doctor(); !strings.Contains(got.stdout, "could not tell") || theVerdict(s.t).unclear() {
			break
		}
		s.t.Log("again:", got.stdout)
	}
	return got
}

// code is the exit code that goes with a verdict.
func (v verdict) code() int {
	return map[string]int{"safe": 0, "unsupported": 3, "risky": 4}[v.Verdict]
}

// tree lists what is below directories, with the time of the last change.
func tree(t *testing.T, dirs ...string) string {
	t.Helper()
	var b strings.Builder
	for _, dir := range dirs {
		must.Do(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			if err != nil {
				return err
			}
			info, err := d.Info()
			if err != nil {
				return err
			}
			if d.IsDir() {
				fmt.Fprintln(&b, path)
			} else {
				fmt.Fprintln(&b, path, info.ModTime(), info.Size())
			}
			return nil
		}))
	}
	return b.String()
}

// Doctor finds what load finds, says what will become of pods, and leaves nothing.
func TestDoctor(t *testing.T) {
	v := theVerdict(t)
	s := newSite(t, options{unprobed: true})
	before := tree(t, s.BPFFS, s.RunDir, s.ConfDir, s.CgroupRoot)
	e, got := s.calmDoctor()
	if e.Verdict != v.Verdict || !slices.Equal(e.Risks, v.Risks) || got.code != v.code() || e.Inconclusive {
		t.Errorf("verdict %s %v, exit %d; want %+v", e.Verdict, e.Risks, got.code, v)
	}
	t.Logf("took %v", got.took)
	if e.Stored || !strings.Contains(e.NotStored, "not in use") || e.Datapath.Loaded || len(e.Probes) < 8 {
		t.Errorf("%+v", e)
	}
	if m := e.Memory; m == nil || m.Connection < 1<<10 || m.Maximum < m.Maps+m.Connection*m.MaxConnections {
		t.Errorf("memory %+v", e.Memory)
	}
	for _, name := range []string{"privileges", "cgroup2", "bpffs"} {
		if result, detail := e.check(t, name); result != "ok" {
			t.Errorf("%s: %s: %s", name, result, detail)
		}
	}
	if result, detail := e.check(t, "plugin"); result != "ok" || !strings.Contains(detail, "this build") {
		t.Errorf("plugin: %s: %s", result, detail)
	}
	human := s.calm(func() outcome { return s.cli("doctor", "--cni-conf-dir", s.ConfDir) })
	if human.code != v.code() || human.stderr != "" || !strings.HasPrefix(human.stdout, "Verdict: "+v.Verdict) {
		t.Errorf("exit %d: %s%s", human.code, human.stdout, human.stderr)
	}
	for line := range strings.Lines(human.stdout) {
		if n := len([]rune(strings.TrimSuffix(line, "\n"))); n > 100 {
			t.Errorf("%d columns: %s", n, line)
		}
	}
	if after := tree(t, s.BPFFS, s.RunDir, s.ConfDir, s.CgroupRoot); after != before {
		t.Errorf("left behind:\n%s\nbefore:\n%s", after, before)
	}

	// Where skipstack is in use, ADD goes by what it has found.
	must.Do(t, os.MkdirAll(s.RunDir, 0o700))
	if e, _ := s.doctor("--no-cache"); e.Stored || s.verdictFile() != "" {
		t.Errorf("stored with --no-cache: %v", e.Stored)
	}
	if e, _ := s.calmDoctor(); !e.Stored || s.verdictFile() == "" {
		t.Errorf("not stored: %s", e.NotStored)
	}
	p := s.light()
	s.want(0, s.run(p.call().add()))
	if len(s.probers()) > 0 || s.gate().Open == (v.Verdict == "unsupported") {
		t.Error("ADD has not gone by the verdict")
	}
	before = tree(t, s.BPFFS)
	gate := s.gate()
	if e, _ := s.doctor(); !e.Datapath.Loaded || e.Datapath.Open != gate.Open || s.gate() != gate {
		t.Errorf("of a loaded datapath: %+v", e.Datapath)
	}
	if after := tree(t, s.BPFFS); after != before {
		t.Errorf("the loaded datapath is not as before:\n%s\n%s", after, before)
	}
	s.want(0, s.run(p.call().del()))
}

// What doctor says of pods is what they get.
func TestDoctorForetells(t *testing.T) {
	node.Need(t)
	all := []string{"splice", "fionread", "epoll", "uncharged", "blocking"}
	for name, entry := range map[string]map[string]any{
		"auto":     {"mode": "auto"},
		"accepted": {"mode": "auto", "acceptRisks": all},
		"off":      {"mode": "off"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t, options{})
			own := map[string]any{"type": "skipstack", "bpffs": s.BPFFS, "runDir": s.RunDir, "cgroupRoot": s.CgroupRoot}
			for k, v := range entry {
				own[k] = v
			}
			list := map[string]any{"cniVersion": "1.0.0", "name": "pods", "plugins": []any{map[string]any{"type": "bridge"}, own}}
			must.Do(t, os.WriteFile(filepath.Join(s.ConfDir, "10-pods.conflist"), must.Get(json.Marshal(list))(t), 0o600))
			e := parse(t, s.calm(func() outcome { return s.bare("doctor", "--json", "--cni-conf-dir", s.ConfDir) }))
			t.Logf("%+v", e.Outlook)
			asking := map[string]string{"skipstack/mode": "on"}
			network := s.network(node.Network{Skipstack: entry})
			a, b := s.twoPods(network, node.PodOptions{})
			s.wantAcceleratedIf(e.Outlook.Pods.Outcome == "accelerated", e.Outlook.Pods.Why, direct(a, b))
			c, d := s.twoPods(network, node.PodOptions{Annotations: asking})
			s.wantAcceleratedIf(e.Outlook.Asking.Outcome == "accelerated", e.Outlook.Asking.Why, direct(c, d))
		})
	}
}

// A sock_ops program of other software above the pods: beside it skipstack works,
// unless it was attached to be alone, or would be pushed aside.
func TestDoctorNeighbours(t *testing.T) {
	for name, flags := range map[string]uint32{"multi": unix.BPF_F_ALLOW_MULTI, "override": unix.BPF_F_ALLOW_OVERRIDE, "exclusive": 0} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t, options{})
			prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
				Type: ebpf.SockOps, Name: "neighbour_ops", License: "GPL",
				Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()},
			})
			must.Do(t, err)
			defer prog.Close()
			dir := must.Get(os.Open(s.CgroupRoot))(t)
			defer dir.Close()
			must.Do(t, link.RawAttachProgram(link.RawAttachProgramOptions{
				Target: int(dir.Fd()), Attach: ebpf.AttachCGroupSockOps, Program: prog, Flags: flags,
			}))
			detach := func() {
				must.Do(t, link.RawDetachProgram(link.RawDetachProgramOptions{Target: int(dir.Fd()), Attach: ebpf.AttachCGroupSockOps, Program: prog}))
			}
			doctor := s.calmDoctor
			if name == "exclusive" { // no probe can tell
				doctor = s.doctor
			}
			e, got := doctor()
			found := false
			for _, o := range e.Others {
				if o.Program != "neighbour_ops" || o.Cgroup != "/" {
					continue
				}
				found = true
				if o.Type != "sock_ops" || o.Sharing != name || o.Blocks != (name != "multi") || len(o.Processes) != 1 {
					t.Errorf("%+v", o)
				}
			}
			if !found {
				t.Errorf("not found: %+v", e.Others)
			}
			p := s.light()
			s.want(0, s.run(p.call().add()))
			if name != "multi" {
				// Below one that excludes others, the kernel cannot even be probed.
				if (got.code == 1) != (flags == 0) || e.Inconclusive != (flags == 0) || e.Outlook.Pods.Outcome != "plain" || !strings.Contains(e.Outlook.Pods.Why, "neighbour_ops") {
					t.Errorf("exit %d, %+v", got.code, e)
				}
				s.wantRecord(p.id, "skipped", "attach sock_ops")
				pod := must.Get(os.Open(p.dir))(t)
				defer pod.Close()
				if r, err := link.QueryPrograms(link.QueryOptions{
					Target: int(pod.Fd()), Attach: ebpf.AttachCGroupSockOps, QueryFlags: unix.BPF_F_QUERY_EFFECTIVE,
				}); err != nil || len(r.Programs) != 1 {
					t.Errorf("the other program no longer runs for the pod: %v, %+v", err, r)
				}
			} else {
				if v := theVerdict(t); got.code != v.code() || e.Outlook.Asking.Why != "" {
					t.Errorf("exit %d, %+v", got.code, e.Outlook)
				}
				s.wantRecord(p.id, "attached", "")
			}
			s.want(0, s.run(p.call().del()))
			detach()
		})
	}
}

// A signal ends it in an orderly manner, whenever it comes.
func TestDoctorInterrupted(t *testing.T) {
	s := newSite(t, options{})
	scratch := func() []string { return must.Get(filepath.Glob(filepath.Join(s.CgroupRoot, "skipstack-probe-*")))(t) }
	for _, sig := range []unix.Signal{unix.SIGINT, unix.SIGTERM, unix.SIGHUP} {
		for _, when := range []string{"cgroup", "worker"} {
			t.Run(fmt.Sprintf("%v, %s", sig, when), func(t *testing.T) {
				before := tree(t, s.BPFFS, s.RunDir)
				// A doctor that has ended before this process saw it there is no test.
				for deadline := time.Now().Add(patience); !s.in(t).interrupted(sig, when == "worker"); {
					if time.Now().After(deadline) {
						t.Fatal("it always ended before the signal came")
					}
				}
				if left := scratch(); len(left) > 0 {
					t.Errorf("left behind: %v", left)
				}
				if after := tree(t, s.BPFFS, s.RunDir); after != before {
					t.Errorf("left behind:\n%s\n%s", after, before)
				}
			})
		}
	}
}

// interrupted sends a signal to a doctor that has a scratch cgroup, or a worker in
// it, and tells whether that came in time.
func (s *site) interrupted(sig unix.Signal, worker bool) bool {
	s.t.Helper()
	var stdout, stderr lockedBuffer
	cmd := exec.Command(program(), "doctor", "--no-cache", "--bpffs", s.BPFFS, "--run-dir", s.RunDir, "--cgroup-root", s.CgroupRoot)
	cmd.Env = []string{"PATH=" + os.Getenv("PATH")}
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	must.Do(s.t, s.Do(cmd.Start))
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	there := func() bool {
		dirs := must.Get(filepath.Glob(filepath.Join(s.CgroupRoot, "skipstack-probe-*")))(s.t)
		if len(dirs) == 0 || !worker {
			return len(dirs) > 0
		}
		procs, err := os.ReadFile(filepath.Join(dirs[0], "cgroup.procs"))
		return err == nil && len(procs) > 0
	}
	for deadline := time.Now().Add(patience); !there(); time.Sleep(tick) {
		select {
		case <-ended:
			return false
		default:
		}
		if time.Now().After(deadline) {
			cmd.Process.Kill()
			<-ended
			s.t.Fatal("it does not begin")
		}
	}
	times := 1
	if sig == unix.SIGHUP {
		times = 2 // as where a terminal goes away
	}
	for range times {
		if err := cmd.Process.Signal(sig); !errors.Is(err, os.ErrProcessDone) {
			must.Do(s.t, err)
		}
	}
	select {
	case <-ended:
	case <-time.After(patience):
		cmd.Process.Kill()
		<-ended
		s.t.Fatal("it does not end")
	}
	code, out, errs := cmd.ProcessState.ExitCode(), stdout.take(), stderr.take()
	if code == theVerdict(s.t).code() || strings.Contains(out, "could not tell") { // it has said all
		return false
	}
	if code != 1 || out != "" || !strings.Contains(errs, "canceled") {
		s.t.Errorf("exit %d, %s%s", code, out, errs)
	}
	return true
}

// Whoever may not probe is told what is missing, and nothing is claimed.
func TestDoctorUnprivileged(t *testing.T) {
	s := newSite(t, options{})
	exe := must.Get(os.Open(program()))(t)
	defer exe.Close()
	for name, tc := range map[string]struct {
		attr *syscall.SysProcAttr
		says string
	}{
		"nobody": {&syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}, "as root"},
		"user namespace": {&syscall.SysProcAttr{
			Cloneflags:  unix.CLONE_NEWUSER,
			UidMappings: []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}},
			GidMappings: []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}},
		}, "user namespace"},
	} {
		t.Run(name, func(t *testing.T) {
			before := tree(t, s.BPFFS, s.RunDir, s.CgroupRoot)
			// The test's directory is closed to others; an open file is not.
			cmd := exec.Command("/proc/self/fd/3", "doctor", "--json", "--bpffs", s.BPFFS, "--run-dir", s.RunDir, "--cgroup-root", s.CgroupRoot)
			cmd.ExtraFiles = []*os.File{exe}
			cmd.Env, cmd.Dir, cmd.SysProcAttr = []string{}, "/", tc.attr
			got := s.in(t).exec(cmd)
			e := parse(t, got)
			if got.code != 1 || e.Verdict != "unsupported" || !e.Inconclusive || e.Stored || e.Outlook.Pods.Outcome != "unknown" {
				t.Errorf("exit %d, %+v", got.code, e)
			}
			for _, p := range e.Probes {
				if p.Result != "could not tell" {
					t.Errorf("%+v", p)
				}
			}
			if result, detail := e.check(t, "privileges"); result != "not ok" || !strings.Contains(detail, tc.says) {
				t.Errorf("%s: %s", result, detail)
			}
			if after := tree(t, s.BPFFS, s.RunDir, s.CgroupRoot); after != before {
				t.Errorf("left behind:\n%s\n%s", after, before)
			}
		})
	}
}

// What is missing on a node, for real.
func TestDoctorMissing(t *testing.T) {
	s := newSite(t, options{})
	noexec := filepath.Join(s.Dir, "noexec")
	must.Do(t, os.Mkdir(noexec, 0o755))
	must.Do(t, unix.Mount("tmpfs", noexec, "tmpfs", unix.MS_NOEXEC|unix.MS_RDONLY, "size=64k"))
	defer func() { must.Do(t, unix.Unmount(noexec, 0)) }()
	empty := filepath.Join(s.Dir, "empty")
	must.Do(t, os.Mkdir(empty, 0o755))

	got := s.calm(func() outcome {
		return s.bare("doctor", "--json", "--bpffs", s.Dir, "--run-dir", s.RunDir, "--cgroup-root", s.CgroupRoot, "--cni-bin-dir", noexec)
	})
	e := parse(t, got)
	if result, detail := e.check(t, "plugin"); result != "not ok" || !strings.Contains(detail, "noexec") {
		t.Errorf("%s: %s", result, detail)
	}
	if result, detail := e.check(t, "bpffs"); result != "not ok" || !strings.Contains(detail, "mount -t bpf") {
		t.Errorf("%s: %s", result, detail)
	}
	if e.Outlook.Pods.Outcome != "plain" || !strings.Contains(e.Outlook.Pods.Why, s.Dir) || got.code != theVerdict(t).code() {
		t.Errorf("exit %d, %+v", got.code, e.Outlook)
	}

	got = s.bare("doctor", "--json", "--bpffs", empty, "--run-dir", s.RunDir, "--cgroup-root", empty)
	e = parse(t, got)
	if result, detail := e.check(t, "cgroup2"); got.code != 2 || result != "not ok" || !strings.Contains(detail, empty) {
		t.Errorf("exit %d, %s: %s", got.code, result, detail)
	}
	if result, detail := e.check(t, "bpffs"); result != "ok" || !strings.Contains(detail, "mounts one") {
		t.Errorf("%s: %s", result, detail)
	}
	if left := must.Get(os.ReadDir(empty))(t); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}

	// A run directory that load and ADD refuse is refused by doctor, too.
	link, open := filepath.Join(s.Dir, "link"), filepath.Join(s.Dir, "open")
	must.Do(t, errors.Join(os.Symlink(s.RunDir, link), os.Mkdir(open, 0o700), os.Chmod(open, 0o777)))
	for dir, why := range map[string]string{link: "symbolic link", open: "can be written by others"} {
		flags := []string{"--bpffs", s.BPFFS, "--run-dir", dir, "--cgroup-root", s.CgroupRoot}
		e := parse(t, s.calm(func() outcome { return s.bare(append([]string{"doctor", "--json"}, flags...)...) }))
		if result, detail := e.check(t, "rundir"); result != "not ok" || !strings.Contains(detail, why) || e.Stored ||
			!strings.Contains(e.NotStored, why) || e.Outlook.Pods.Outcome != "plain" {
			t.Errorf("%s: %s: %s; stored: %v %s; %+v", dir, result, detail, e.Stored, e.NotStored, e.Outlook)
		}
		if got := s.bare(append([]string{"load"}, flags...)...); got.code != 1 || !strings.Contains(got.stderr, why) {
			t.Errorf("load: %+v", got)
		}
		c := s.light().call()
		c.runDir = dir
		s.wantLines(1, why, s.want(0, s.run(c.add())))
	}
}
