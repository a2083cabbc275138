package bench

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/skipstack/skipstack/test/node"
	"golang.org/x/sys/unix"
)

// These tests run the built program: `skipstack bench` makes a private node of its own
// within that of the tests.

func program(args ...string) *exec.Cmd {
	cmd := exec.Command(filepath.Join(node.ProgramDir(), "skipstack"), append([]string{"bench"}, args...)...)
	cmd.Env = os.Environ()
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	return cmd
}

// nothingLeft checks that no cgroup of a private node is there.
func nothingLeft(t *testing.T) {
	t.Helper()
	for _, root := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
		if left, err := filepath.Glob(root + "/skipstack-node-*"); err != nil || len(left) > 0 {
			t.Errorf("left: %v, %v", left, err)
		}
	}
}

func TestUsageErrors(t *testing.T) {
	node.Need(t)
	path := "--cni-path=" + node.ProgramDir()
	conflist := func(content string) string {
		file := filepath.Join(t.TempDir(), "x.conflist")
		if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args   []string
		nobody bool
		want   string
	}{
		{args: []string{"--quick", "--full", path}, want: "exclude each other"},
		{args: []string{"--tests=stream,udp", path}, want: "\"udp\" is none of stream, rr, crr"},
		{args: []string{"--paths=moon", path}, want: "none of pod"},
		{args: []string{"--placements=any", path}, want: "none of same-cpu"},
		{args: []string{"--sizes=64,0", path}, want: "\"0\": a message has 1 B to 16 MiB"},
		{args: []string{"--sizes=10GiB", path}, want: "\"10GiB\": a message has"},
		{args: []string{"--sizes=", path}, want: "--sizes is empty"},
		{args: []string{"--quick", "--paths=ipv6", path}, want: "has no such points"},
		{args: []string{"--repeats=4", path}, want: "--repeats 4: it is 5 to 1000"},
		{args: []string{"--max-pairs=4", path}, want: "--max-pairs 4: it is --repeats, here 5, to 1000"},
		{args: []string{"--repeats=30", "--max-pairs=25", path}, want: "--max-pairs 25: it is --repeats, here 30"},
		{args: []string{"--length=199ms", path}, want: "a run takes 200ms to 1m0s"},
		{args: []string{"--congestion-control=warp", path}, want: "\"warp\": this kernel has"},
		{args: []string{"--reference=tcp", path}, want: "--reference \"tcp\": it is unix"},
		{args: []string{"--min-speedup=2", path}, want: "--min-speedup is for --check"},
		{args: []string{"--check", "--min-speedup=-1", path}, want: "a ratio from 0 on"},
		{args: []string{"--json=-", "--csv=-", path}, want: "cannot both be standard output"},
		{args: []string{"--json=./x", "--csv=x", path}, want: "are the same file"},
		{args: []string{"--json=", path}, want: "--json is empty"},
		{args: []string{"--conflist=", path}, want: "--conflist is empty"},
		{args: []string{"--cni-path="}, want: "--cni-path is empty"},
		{args: []string{"--csv=/", path}, want: "it is a directory"},
		{args: []string{"--cni-path=/nonexistent"}, want: "no such directory"},
		{args: []string{"--quick", path, "--sockets=some"}, want: "blocking or nonblocking"},
		{args: []string{"--quick", path, "--json=/nonexistent/file"}, want: "its directory is not writable"},
		{args: []string{"--conflist=/nonexistent", path}, want: "no such file"},
		{args: []string{"--conflist=/dev/zero", path}, want: "not a regular file"},
		{args: []string{"--conflist=" + fifo, path}, want: "not a regular file"},
		{args: []string{"--placements=", path}, want: "--placements is empty"},
		{args: []string{"--reference=", path}, want: "--reference is empty"},
		{args: []string{"--conflist=" + conflist(`{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"bridge"}]}`), path}, want: "skipstack is not in it"},
		{args: []string{"--conflist=" + conflist(`{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"skipstack","speed":9}]}`), path}, want: "speed"},
		{args: []string{"--conflist=" + conflist(`{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"warp"},{"type":"skipstack"}]}`), path}, want: "no CNI plugin warp"},
		{args: []string{"--conflist=" + conflist(`{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"bridge","ipam":{"type":"oracle"}},{"type":"skipstack"}]}`), path}, want: "no CNI plugin oracle"},
		{args: []string{"--conflist=" + conflist(`{"cniVersion":"1.0.0","name":"n","type":"skipstack"}`), path}, want: "not a list of plugins"},
		{args: []string{"--conflist=" + conflist(`plugins`), path}, want: "conflist"},
		{args: []string{"--quick", "--paths=pod,service", "--check", "--conflist=" + conflist(`{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"skipstack"}]}`), path}, want: "--paths service cannot be measured with --conflist"},
		{args: []string{"--quick", path, "--speed=9"}, want: "unknown flag"},
		{args: []string{"--quick", path, "argument"}, want: "argument"},
		{args: []string{"--quick", path}, nobody: true, want: "needs root"},
	} {
		t.Run(c.want, func(t *testing.T) {
			cmd := program(c.args...)
			var out, errs bytes.Buffer
			cmd.Stdout, cmd.Stderr = &out, &errs
			if c.nobody {
				cmd.SysProcAttr.Credential = &syscall.Credential{Uid: 65534, Gid: 65534}
			}
			_ = cmd.Run()
			if code := cmd.ProcessState.ExitCode(); code != ExitUsage {
				t.Errorf("exit code %d, want %d", code, ExitUsage)
			}
			if !strings.Contains(errs.String(), c.want) || out.Len() > 0 {
				t.Errorf("it says %q, want %q; on standard output %q", errs.String(), c.want, out.String())
			}
			nothingLeft(t)
		})
	}
}

type disturbance struct {
	name    string
	after   string                             // the line on standard error that it is disturbed after
	disturb func(t *testing.T, bench int) bool // false: it came too late
	want    string
	partial bool // points were measured before, and are told
}

// TestDisturbed ends the bench, or one of its workers, at different points.
func TestDisturbed(t *testing.T) {
	node.Need(t)
	for _, c := range []disturbance{
		{"SIGINT while it begins", "making a private node", signalTo(unix.SIGINT, false), "interrupted", false},
		{"SIGTERM while the kernel is probed", "making a private node", whileProbing(signalTo(unix.SIGTERM, false)), "interrupted", false},
		{"SIGTERM while measuring", "data verified", signalTo(unix.SIGTERM, false), "interrupted", false},
		{"SIGTERM again and again", "data verified", again(signalTo(unix.SIGTERM, false)), "interrupted", false},
		{"the terminal goes away, which is said twice", "data verified", again(signalTo(unix.SIGHUP, true)), "interrupted", false},
		{"Ctrl-C while measuring", "data verified", signalTo(unix.SIGINT, true), "interrupted", false},
		{"worker killed", "data verified", killWorker, "signal: killed", false},
		{"worker killed later", "bench: 2/", killWorker, "signal: killed", true},
		{"SIGTERM later", "bench: 2/", signalTo(unix.SIGTERM, false), "interrupted", true},
		{"the private node killed", "data verified", killPrivate, "the private node was killed (SIGKILL)", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			for tries := 1; !disturbed(t, c); tries++ {
				if tries == 5 {
					t.Fatal("the moment to disturb it at was missed each time")
				}
			}
		})
	}
}

// disturbed runs the bench, and returns false if the moment to disturb it at was missed.
func disturbed(t *testing.T, c disturbance) bool {
	t.Helper()
	file := filepath.Join(t.TempDir(), "result.json")
	cmd := program("--quick", "--cni-path="+node.ProgramDir(), "--json="+file)
	var out bytes.Buffer
	cmd.Stdout = &out
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var said strings.Builder
	reached, met := false, false
	for lines := bufio.NewScanner(stderr); lines.Scan(); {
		fmt.Fprintln(&said, lines.Text())
		if !reached && strings.Contains(lines.Text(), c.after) {
			reached, met = true, c.disturb(t, cmd.Process.Pid)
		}
	}
	err = cmd.Wait()
	if reached && !met {
		return false
	}
	if code := cmd.ProcessState.ExitCode(); code != ExitNotProven {
		t.Errorf("exit code %d (%v), want %d", code, err, ExitNotProven)
	}
	if !reached || !strings.Contains(said.String(), c.want) || strings.Contains(out.String(), "proven for every point") {
		t.Errorf("it said %q, want %q", said.String(), c.want)
	}
	written, _ := os.ReadFile(file)
	if c.partial && (!strings.Contains(out.String(), "\nINCOMPLETE: ") || !bytes.Contains(written, []byte(`"incomplete": "`))) {
		t.Errorf("what was measured is lost:\n%s%s", out.String(), written)
	}
	if n := strings.Count(said.String(), "skipstack: "); n != 1 {
		t.Errorf("%d error messages:\n%s", n, said.String())
	}
	nothingLeft(t)
	return true
}

func signalTo(s unix.Signal, group bool) func(*testing.T, int) bool {
	return func(t *testing.T, pid int) bool {
		if group {
			pid = -pid
		}
		if err := unix.Kill(pid, s); err != nil {
			t.Error(err)
		}
		return true
	}
}

// again repeats a signal while the bench cleans up.
func again(signal func(*testing.T, int) bool) func(*testing.T, int) bool {
	return func(t *testing.T, pid int) bool {
		for range 20 {
			signal(t, pid) // the process stays until it is waited for
			time.Sleep(5 * time.Millisecond)
		}
		return true
	}
}

// whileProbing sends a signal when the prober runs that the first ADD has started.
func whileProbing(signal func(*testing.T, int) bool) func(*testing.T, int) bool {
	return func(t *testing.T, bench int) bool {
		seen := true
		for deadline := time.Now().Add(20 * time.Second); seen && process(t, "\x00probe\x00") == 0; time.Sleep(time.Millisecond) {
			// This process may not have been let run while there was one.
			seen = time.Now().Before(deadline)
		}
		return signal(t, bench) && seen
	}
}

// killWorker kills a worker process.
func killWorker(t *testing.T, _ int) bool {
	kill(t, process(t, "\x00bench\x00worker\x00"))
	return true
}

// killPrivate kills the first process of the private node, the bench's only child.
func killPrivate(t *testing.T, bench int) bool {
	children, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", bench))
	if err != nil {
		t.Fatal(err)
	}
	pid := 0
	for _, path := range children {
		if text, err := os.ReadFile(path); err == nil && len(text) > 0 {
			_, _ = fmt.Sscan(string(text), &pid)
		}
	}
	kill(t, pid)
	return true
}

func kill(t *testing.T, pid int) {
	t.Helper()
	if pid == 0 {
		t.Error("no process to kill")
		return
	}
	if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
		t.Error(err)
	}
}

// process returns the first process that it finds with such arguments, 0 if there is
// none; the tests run in a PID namespace of their own and see only their own.
func process(t *testing.T, args string) (pid int) {
	t.Helper()
	found, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range found {
		cmdline, err := os.ReadFile(path)
		if err != nil || !bytes.Contains(cmdline, []byte(args)) {
			continue
		}
		if _, err := fmt.Sscanf(path, "/proc/%d/", &pid); err != nil {
			t.Fatal(err)
		}
		return pid
	}
	return 0
}
