package main

import (
	"errors"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/skipstack/skipstack/test/report"
)

const pass = `{"Action":"pass","Package":"github.com/skipstack/skipstack/bpf","Test":"TestA"}` + "\n"

// ended is what a package says at its end.
func ended(action string) string {
	return `{"Action":"` + action + `","Package":"github.com/skipstack/skipstack/bpf","Elapsed":1.5}` + "\n"
}

func skip(name string) string {
	return `{"Action":"output","Package":"github.com/skipstack/skipstack/bpf","Test":"` + name + `","Output":"    x_test.go:1: needs a moon\n"}` + "\n" +
		`{"Action":"skip","Package":"github.com/skipstack/skipstack/bpf","Test":"` + name + `"}` + "\n"
}

const allowed = "# why\nbpf TestB needs a new kernel\nbpf TestC/... the same\n"

func write(t *testing.T, name, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// call runs the program and returns what it prints.
func call(t *testing.T, want int, args ...string) string {
	t.Helper()
	var out strings.Builder
	if exit := run(args, &out, &out); exit != want {
		t.Errorf("%q: exit %d, want %d:\n%s", args, exit, want, out.String())
	}
	return out.String()
}

func contains(t *testing.T, text string, wants ...string) {
	t.Helper()
	for _, want := range wants {
		if !strings.Contains(text, want) {
			t.Errorf("%q is missing in:\n%s", want, text)
		}
	}
}

func lastLine(text string) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return lines[len(lines)-1]
}

func TestStepWithTests(t *testing.T) {
	allow := write(t, "allow", allowed)
	for _, tc := range []struct {
		name, in string
		exit     int
		said     string // by the step
		inTable  string
		last     string
	}{
		{"all passed", pass + ended("pass"), ok, "== unit: ok", "1       0       0", "1 passed, 0 failed, 0 skipped"},
		{"a listed skip", pass + skip("TestB") + ended("pass"), ok, "ok", "skipped bpf TestB: needs a new kernel", "1 passed, 0 failed, 1 skipped"},
		{"listed subtests", pass + skip("TestC/one/two") + skip("TestC/three") + ended("pass"), ok, "ok",
			"bpf TestC/one/two and 1 more: needs a new kernel", "1 passed, 0 failed, 2 skipped"},
		{"an unlisted skip", pass + skip("TestD") + ended("pass"), failed, "not on the allow-list: bpf TestD: x_test.go:1: needs a moon",
			"1 (1 unexpected)", "1 passed, 1 failed, 1 skipped"},
		{"a failure", pass + `{"Action":"fail","Package":"github.com/skipstack/skipstack/bpf","Test":"TestE"}` + "\n" + ended("fail"), failed, "FAIL  bpf TestE",
			"bpf TestE", "1 passed, 1 failed, 0 skipped"},
		{"a package that does not build", pass + ended("pass") +
			`{"ImportPath":"p","Action":"build-output","Output":"undefined: x"}` + "\n" + `{"ImportPath":"p","Action":"build-fail"}` + "\n" +
			`{"Action":"fail","Package":"p","Elapsed":0,"FailedBuild":"p"}`, failed, "undefined: x", "p (package)", "1 passed, 1 failed, 0 skipped"},
		{"a package that ends early", pass + ended("fail"), failed, "FAIL  bpf", "bpf (package)", "1 passed, 1 failed, 0 skipped"},
		{"nothing but skips", skip("TestB") + ended("pass"), failed, "no test ran", "FAILED", "0 passed, 1 failed, 1 skipped"},
		{"other words", "make: here\n" + pass + ended("pass"), ok, "make: here", "ok", "1 passed, 0 failed, 0 skipped"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "ci")
			out := call(t, tc.exit, "-dir", dir, "-allow", allow, "step", "unit", "cat", write(t, "in", tc.in))
			contains(t, out, tc.said)
			if tc.exit != ok {
				contains(t, out, "alone: cat ")
			}
			out = call(t, tc.exit, "-dir", dir, "table")
			contains(t, out, tc.inTable)
			if got := lastLine(out); got != tc.last {
				t.Errorf("the last line is %q, want %q", got, tc.last)
			}
		})
	}
}

// A step without tests has its command's exit code.
func TestStepWithoutTests(t *testing.T) {
	dir := t.TempDir()
	call(t, ok, "-dir", dir, "step", "build", "true")
	contains(t, call(t, ok, "-dir", dir, "table"), "build", "0 passed, 0 failed, 0 skipped")
	contains(t, call(t, failed, "-dir", dir, "step", "lint", "sh", "-c", "exit 3", "FLAGS=-a b"),
		"FAILED", "exit status 3; alone: sh -c 'exit 3' FLAGS='-a b'")
	contains(t, call(t, failed, "-dir", dir, "step", "missing", "no-such-program"), "not found")
	out := call(t, failed, "-dir", dir, "table")
	if build, lint := strings.Index(out, "\nbuild "), strings.Index(out, "\nlint "); build < 0 || lint < build {
		t.Errorf("want the steps in the order in which they ran:\n%s", out)
	}
	if got := lastLine(out); got != "0 passed, 2 failed, 0 skipped" {
		t.Errorf("the last line is %q", got)
	}
}

// A command may fail though each of its tests passed, and that counts.
func TestStepThatFailsAfterItsTests(t *testing.T) {
	dir := t.TempDir()
	contains(t, call(t, failed, "-dir", dir, "step", "unit", "sh", "-c", "cat $0; exit 2", write(t, "in", pass+ended("pass"))), "exit status 2")
	if got := lastLine(call(t, failed, "-dir", dir, "table")); got != "1 passed, 1 failed, 0 skipped" {
		t.Errorf("the last line is %q", got)
	}
}

// A command may write a report of its own, with several kernels.
func TestStepWithReport(t *testing.T) {
	dir := t.TempDir()
	runs := filepath.Join(t.TempDir(), "runs")
	if err := report.Write(runs, []report.Run{
		{Kernel: "6.1.0", Seconds: 90, Suites: []report.Suite{{Name: "test/cni", Scaled: []string{"fewer pods: emulated"},
			Tests: []report.Test{{Name: "TestA", Result: report.Pass}, {Name: "TestB", Result: report.Skip, Reason: "no moon"}}}}},
		{Kernel: "7.3", Params: "lsm=yama", Seconds: 9, Problems: []string{"the kernel complained"}},
	}); err != nil {
		t.Fatal(err)
	}
	call(t, failed, "-dir", dir, "step", "vm", "sh", "-c", "cp $0 $TEST_REPORT", runs)
	out := call(t, failed, "-dir", dir, "table")
	contains(t, out, "6.1.0", "7.3 lsm=yama", "1m30s", "skipped test/cni TestB: no moon", "test/cni: fewer pods: emulated",
		"vm 7.3 lsm=yama: the kernel complained", "alone: sh -c 'cp $0 $TEST_REPORT' "+runs)
	if got := lastLine(out); got != "1 passed, 1 failed, 1 skipped" {
		t.Errorf("the last line is %q", got)
	}
	// What a run before left is not taken for this one's.
	call(t, failed, "-dir", dir, "step", "vm", "sh", "-c", "exit 1")
	if got := lastLine(call(t, failed, "-dir", dir, "table")); got != "0 passed, 1 failed, 0 skipped" {
		t.Errorf("the last line is %q", got)
	}
}

// Nothing but a sound report says that a step is well.
func TestStepWithBrokenReport(t *testing.T) {
	for name, in := range map[string]string{"empty": "", "half": `[{"kernel":"6.1.0","suites":[{"name"`} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			out := call(t, failed, "-dir", dir, "step", "vm", "sh", "-c", "cat $0 >$TEST_REPORT", write(t, "in", in))
			contains(t, out, "FAILED", "read the report", "unexpected end of JSON input; alone: ")
			out = call(t, failed, "-dir", dir, "table")
			contains(t, out, "vm: read the report")
			if got := lastLine(out); got != "0 passed, 1 failed, 0 skipped" {
				t.Errorf("the last line is %q", got)
			}
		})
	}
}

// A step of which nothing was heard any more is not well: it may have been killed.
func TestStepThatDoesNotEnd(t *testing.T) {
	dir := t.TempDir()
	call(t, ok, "-dir", dir, "step", "build", "true")
	// What the table says in the middle of a step is what it says if that never ends.
	saved := filepath.Join(t.TempDir(), "saved")
	call(t, ok, "-dir", dir, "step", "vm", "cp", "-r", dir, saved)
	out := call(t, failed, "-dir", saved, "table")
	contains(t, out, "build", "vm: it ended without a result; alone: cp -r ")
	if got := lastLine(out); got != "0 passed, 1 failed, 0 skipped" {
		t.Errorf("the last line is %q", got)
	}
	call(t, ok, "-dir", dir, "table")
}

func TestUsage(t *testing.T) {
	for _, args := range [][]string{{}, {"step"}, {"step", "x"}, {"table", "y"}, {"-no-such-flag"}} {
		call(t, usage, args...)
	}
	contains(t, call(t, failed, "-dir", t.TempDir(), "table"), "no step was run")
	contains(t, call(t, failed, "-dir", t.TempDir(), "-allow", write(t, "allow", "bpf TestB"), "step", "x", "true"), "want package, test and reason")
}

// A signal ends all that a step's command has started, not only the command itself.
func TestSignalEndsAll(t *testing.T) {
	all := []os.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP}
	// Programs inherit what this one ignores, as under nohup(1), but not what it hears.
	heard := make(chan os.Signal, 1)
	signal.Notify(heard, all...)
	defer signal.Stop(heard)
	for _, s := range all {
		t.Run(s.String(), func(t *testing.T) {
			out, in := io.Pipe()
			signals := make(chan os.Signal, 1)
			ended := make(chan error, 1)
			// Both shells' children keep the output open while they live. The last one says so
			// itself: a SIGINT that meets a shell's child before its exec(3) may be lost (dash).
			cmd := exec.Command("sh", "-c", "sh -c 'tail -f \"$0\"; :' \"$0\"; :", write(t, "says", "started\n"))
			go func() {
				_, err := runTests(cmd, signals, nil, in)
				ended <- err
			}()
			line := make([]byte, len("started\n"))
			if _, err := io.ReadFull(out, line); err != nil || string(line) != "started\n" {
				t.Fatalf("%q, %v", line, err)
			}
			signals <- s
			select {
			case err := <-ended:
				if err == nil {
					t.Error("the command ended well")
				}
			case <-time.After(time.Minute):
				t.Error("what the command has started lives on")
				_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
			}
		})
	}
}

// A step that is told to stop has ended when all that it has started has: its command
// may end before the programs that it has started have cleaned up.
func TestSignalWaitsForCleanup(t *testing.T) {
	// The program in the background does not keep the output open.
	const script = `(trap 'sleep 1; : >"$1"; exit' TERM; exec >/dev/null; : >"$0"; while :; do sleep 0.1; done) &
		until [ -e "$0" ]; do sleep 0.1; done; echo started; wait`
	for _, s := range []os.Signal{syscall.SIGTERM, syscall.SIGHUP} { // the latter as SIGTERM
		t.Run(s.String(), func(t *testing.T) {
			cleaned := filepath.Join(t.TempDir(), "cleaned")
			out, in := io.Pipe()
			signals := make(chan os.Signal, 1)
			ended := make(chan error, 1)
			go func() {
				_, err := runTests(exec.Command("sh", "-c", script, filepath.Join(t.TempDir(), "ready"), cleaned), signals, nil, in)
				ended <- err
			}()
			if _, err := io.ReadFull(out, make([]byte, len("started\n"))); err != nil {
				t.Fatal(err)
			}
			signals <- s
			if err := <-ended; err == nil || errors.Is(err, errLivesOn) {
				t.Errorf("it ended with %v", err)
			}
			if _, err := os.Stat(cleaned); err != nil {
				t.Errorf("what was started was not waited for: %v", err)
			}
		})
	}
}

func TestAwaitGroup(t *testing.T) {
	cmd := exec.Command("sleep", "1000")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	group := cmd.Process.Pid
	if err := awaitGroup(group, 0); !errors.Is(err, errLivesOn) {
		t.Errorf("%v", err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := awaitGroup(group, time.Minute); err != nil {
		t.Error(err)
	}
}
