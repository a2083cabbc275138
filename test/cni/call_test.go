package cni_test

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/test/must"
	"github.com/skipstack/skipstack/test/node"
)

// A light pod is a pod's cgroup and no more, for calls whose result is made up.
type light struct {
	id, uid  string
	dir      string
	cgroupID uint64
}

// light makes a pod's cgroup as a kubelet does. The test's end removes it.
func (s *site) light() light {
	s.t.Helper()
	s.lights++
	p := light{id: fmt.Sprintf("%064x", s.lights), uid: fmt.Sprintf("00000000-0000-4000-8000-%012x", s.lights)}
	p.dir = must.Get(s.Cgroup("kubepods/burstable/pod" + p.uid))(s.t)
	p.cgroupID = inode(s.t, p.dir)
	s.t.Cleanup(func() { p.remove(s.t) })
	return p
}

func (s *site) lightPods(n int) []light {
	pods := make([]light, n)
	for i := range pods {
		pods[i] = s.light()
	}
	return pods
}

// remove removes the cgroup, as a kubelet does when the pod is gone.
func (p light) remove(t *testing.T) {
	t.Helper()
	if err := os.Remove(p.dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
}

func inode(t *testing.T, path string) uint64 {
	t.Helper()
	var st unix.Stat_t
	must.Do(t, unix.Stat(path, &st))
	return st.Ino
}

// A call is one run of the plugin by a runtime. The zero value of a field stands
// for something sensible.
type call struct {
	verb     string
	pod      light
	version  string // default 1.1.0
	network  string // default net
	ifname   string // default eth0
	netns    string // default: one that is gone; "-": none
	args     string // CNI_ARGS; default: those of a CRI runtime; "-": none
	cgroup   string // runtimeConfig.cgroupPath; default the pod's; "-": none
	members  string // more members of the configuration, as JSON; ADD accepts the kernel's risks unless they say which
	prev     string // default [prevResult]; "-": none
	stdin    string // all of standard input
	handicap string // see [handicap]

	bpffs, runDir, cgroupRoot string // default the node's
}

const prevResult = `{"cniVersion":"1.1.0","interfaces":[{"name":"eth0","sandbox":"/run/netns/x","unknown":[1.50]}],"ips":[{"address":"10.88.0.5/16","interface":0}], "dns":{}}`

func (c call) add() call                    { c.verb = "ADD"; return c }
func (c call) del() call                    { c.verb = "DEL"; return c }
func (c call) check() call                  { c.verb = "CHECK"; return c }
func (c call) with(members string) call     { c.members = members; return c }
func (p light) call(members ...string) call { return call{pod: p, members: strings.Join(members, ",")} }

// outcome is what came of a call or a command.
type outcome struct {
	call           call
	code           int
	stdout, stderr string
	took           time.Duration
	cpu            time.Duration
}

func (s *site) stdin(c call) string {
	if c.stdin != "" {
		return c.stdin
	}
	quote := func(v any) string { return string(must.Get(json.Marshal(v))(s.t)) }
	members := []string{
		`"cniVersion":` + quote(cmp.Or(c.version, "1.1.0")), `"name":` + quote(cmp.Or(c.network, "net")), `"type":"skipstack"`,
		`"bpffs":` + quote(cmp.Or(c.bpffs, s.BPFFS)), `"runDir":` + quote(cmp.Or(c.runDir, s.RunDir)),
	}
	if root := cmp.Or(c.cgroupRoot, s.CgroupRoot); root != "-" {
		members = append(members, `"cgroupRoot":`+quote(root))
	}
	if path := cmp.Or(c.cgroup, strings.TrimPrefix(c.pod.dir, s.CgroupRoot), "-"); path != "-" {
		members = append(members, `"runtimeConfig":{"cgroupPath":`+quote(path)+`}`)
	}
	if c.members != "" {
		members = append(members, c.members)
	}
	if c.verb == "ADD" && !strings.Contains(c.members, "acceptRisk") {
		members = append(members, `"acceptRisks":`+quote(accepting["acceptRisks"]))
	}
	if prev := cmp.Or(c.prev, prevResult); prev != "-" && (c.verb == "ADD" || c.verb == "CHECK" || c.verb == "DEL") {
		members = append(members, `"prevResult":`+prev)
	}
	return "{" + strings.Join(members, ",") + "}"
}

func (s *site) env(c call) []string {
	env := []string{
		"PATH=" + os.Getenv("PATH"),
		"CNI_COMMAND=" + c.verb,
		"CNI_PATH=" + s.BinDir + ":" + node.ProgramDir(),
		"CNI_IFNAME=" + cmp.Or(c.ifname, "eth0"),
		"CNI_CONTAINERID=" + c.pod.id,
	}
	if netns := cmp.Or(c.netns, filepath.Join(s.Dir, "no-netns")); netns != "-" {
		env = append(env, "CNI_NETNS="+netns)
	}
	if args := cmp.Or(c.args, "IgnoreUnknown=1;K8S_POD_NAMESPACE=ns;K8S_POD_NAME=pod-"+strings.TrimLeft(c.pod.id, "0")+
		";K8S_POD_INFRA_CONTAINER_ID="+c.pod.id+";K8S_POD_UID="+c.pod.uid); args != "-" {
		env = append(env, "CNI_ARGS="+args)
	}
	return env
}

// command makes the command of a call, with its standard input.
func (s *site) command(ctx context.Context, c call) *exec.Cmd {
	cmd := s.handicapped(ctx, c.handicap, s.env(c))
	cmd.Stdin = strings.NewReader(s.stdin(c))
	return cmd
}

// handicapped makes the command that runs the program with a handicap, if any.
func (s *site) handicapped(ctx context.Context, what string, env []string, args ...string) *exec.Cmd {
	s.t.Helper()
	if what == "" {
		cmd := exec.CommandContext(ctx, program(), args...)
		cmd.Env = env
		return cmd
	}
	worker := node.WorkerCommand(handicapName, append([]string{what, program()}, args...)...)
	cmd := exec.CommandContext(ctx, worker.Path, worker.Args[1:]...)
	cmd.Env = append(worker.Env, env...)
	if answer, ok := kernels[what]; ok {
		cmd.ExtraFiles = []*os.File{imitate(s.t, answer)}
	}
	return cmd
}

// once runs the plugin once, whether it has the time or not.
func (s *site) once(c call) outcome {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), hang)
	defer cancel()
	got := s.exec(s.command(ctx, c))
	got.call = c
	if late(got.stdout + got.stderr) {
		s.log.late.Add(1)
	}
	return got
}

// cli runs a command of the command line.
func (s *site) cli(args ...string) outcome {
	s.t.Helper()
	return s.bare(append(args, "--bpffs", s.BPFFS, "--run-dir", s.RunDir, "--cgroup-root", s.CgroupRoot)...)
}

// bare runs a command as it is written.
func (s *site) bare(args ...string) outcome {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), hang)
	defer cancel()
	cmd := exec.CommandContext(ctx, program(), args...)
	cmd.Env = []string{"PATH=" + os.Getenv("PATH")}
	return s.exec(cmd)
}

func (s *site) exec(cmd *exec.Cmd) outcome {
	s.t.Helper()
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	var start time.Time
	err := s.Do(func() error {
		start = time.Now()
		return cmd.Start()
	})
	if err == nil {
		err = cmd.Wait()
	}
	took := time.Since(start)
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		s.t.Error(err)
		return outcome{code: -1}
	}
	return outcome{
		code: cmd.ProcessState.ExitCode(), stdout: stdout.String(), stderr: stderr.String(), took: took,
		cpu: cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime(),
	}
}

// want checks the exit code and that standard output has what the protocol wants
// and no more: the previous result, nothing, or one error with this code.
func (s *site) want(code uint, got outcome) outcome {
	s.t.Helper()
	if code == 0 {
		stdout := ""
		if got.call.verb == "ADD" {
			stdout = cmp.Or(got.call.prev, prevResult)
		}
		if got.code != 0 || got.stdout != stdout {
			s.t.Errorf("%s: exit %d, stdout %q, want %q; stderr %s", got.call.verb, got.code, got.stdout, stdout, got.stderr)
		}
		return got
	}
	var e struct {
		Code uint   `json:"code"`
		Msg  string `json:"msg"`
	}
	if err := json.Unmarshal([]byte(got.stdout), &e); err != nil || got.code != 1 || e.Code != code || e.Msg == "" {
		s.t.Errorf("%s: exit %d, stdout %q (%v), want an error with code %d; stderr %s", got.call.verb, got.code, got.stdout, err, code, got.stderr)
	}
	return got
}

// wantLines checks how many lines were logged and that each holds a text.
func (s *site) wantLines(n int, holding string, got outcome) outcome {
	s.t.Helper()
	lines := logLines(got.stderr)
	for _, line := range lines {
		if !strings.Contains(line, holding) {
			s.t.Errorf("%s logged %q, want %q in it", got.call.verb, line, holding)
		}
	}
	if len(lines) != n {
		s.t.Errorf("%s logged %d lines, want %d: %q", got.call.verb, len(lines), n, lines)
	}
	return got
}

func logLines(stderr string) []string {
	return strings.FieldsFunc(stderr, func(r rune) bool { return r == '\n' })
}

// holdName is a worker that takes the flock of a file or directory and keeps it.
const holdName = "hold"

func hold(args []string) int {
	f, err := os.Open(args[0])
	if err == nil {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	fmt.Println("held")
	select {}
}

// stuck is a process that holds a lock and has been stopped with SIGSTOP.
type stuck struct{ cmd *exec.Cmd }

func newStuck(t *testing.T, path string) *stuck {
	t.Helper()
	cmd := node.WorkerCommand(holdName, path)
	out := must.Get(cmd.StdoutPipe())(t)
	must.Do(t, cmd.Start())
	s := &stuck{cmd}
	t.Cleanup(s.end)
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "held\n" {
		t.Fatalf("hold %s: %q, %v", path, line, err)
	}
	must.Do(t, cmd.Process.Signal(unix.SIGSTOP))
	wait(t, "the process stops", func() (string, bool) {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", cmd.Process.Pid))
		return string(stat), err == nil && strings.Contains(string(stat), ") T ")
	})
	return s
}

func (s *stuck) end() {
	_ = s.cmd.Process.Kill()
	_ = s.cmd.Wait()
}

// handicapName is a worker that gives up something and becomes another program.
const handicapName = "handicap"

// handicap is called with what to give up and the program.
func handicap(args []string) int {
	runtime.LockOSThread()
	err := giveUp(args[0])
	if err == nil {
		err = syscall.Exec(args[1], args[1:], os.Environ())
	}
	fmt.Fprintln(os.Stderr, "handicap:", err)
	return 99
}

func giveUp(what string) error {
	switch what {
	case "root": // all that a user has not
		return errors.Join(syscall.Setgroups(nil), syscall.Setgid(65534), syscall.Setuid(65534))
	case "capabilities":
		for c := uintptr(0); c <= unix.CAP_LAST_CAP; c++ {
			if err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0); err != nil && !errors.Is(err, unix.EINVAL) {
				return err
			}
		}
		return nil
	case "cgroup2": // the mount
		return errors.Join(ownMounts(), unmountCgroup2())
	}
	if cover, ok := covers[what]; ok {
		if err := errors.Join(ownMounts(), cover()); err != nil {
			return err
		}
	}
	if _, ok := kernels[what]; ok {
		return trapped()
	}
	if _, ok := covers[what]; ok {
		return nil
	}
	return fmt.Errorf("unknown handicap %q", what)
}

// ownMounts gives the process mounts that nobody else sees.
func ownMounts() error {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return err
	}
	return unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
}

func unmountCgroup2() error {
	info, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(info)) {
		before, after, _ := strings.Cut(line, " - ")
		if strings.HasPrefix(after, "cgroup2 ") {
			if err := unix.Unmount(strings.Fields(before)[4], unix.MNT_DETACH); err != nil {
				return err
			}
		}
	}
	return nil
}
