// Command summary runs the steps of CI and sums them up.
//
//	summary [-dir D] [-allow FILE] step NAME COMMAND...   # run a step
//	summary [-dir D] table                                # all steps in one table
//	summary [-dir D] support DOCS                         # what is supported, by the steps
//
// A step's command gets the name of a file in the environment ([report.Env]). It may
// write there what came of its tests, or print the output of `go test -json`, of which
// the step shows what a person wants to see. What a step came to is kept in the
// directory -dir.
//
// A step fails with its command, and if a test failed or was skipped that the
// allow-list does not name. A line of the allow-list is a package path below the
// module, a test name and the reason, separated by blanks; a name that ends in /...
// covers its subtests; the reason "the same" is that of the line before.
package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/test/report"
)

const module = "github.com/skipstack/skipstack/"

func main() { os.Exit(run(os.Args[1:], os.Stdout, os.Stderr)) }

// Exit codes.
const (
	ok = iota
	failed
	usage
)

func run(args []string, out, errs io.Writer) int {
	flags := flag.NewFlagSet("summary", flag.ContinueOnError)
	flags.SetOutput(errs)
	allow := flags.String("allow", "", "`file` of skips that are expected")
	dir := flags.String("dir", ".cache/ci", "`directory` for what the steps came to")
	if err := flags.Parse(args); err != nil {
		return usage
	}
	var good bool
	var err error
	switch rest := flags.Args(); {
	case len(rest) >= 3 && rest[0] == "step":
		var allowed allowList
		if allowed, err = readAllowed(*allow); err == nil {
			good, err = runStep(*dir, rest[1], rest[2:], allowed, out, errs)
		}
	case len(rest) == 1 && rest[0] == "table":
		good, err = table(*dir, out)
	case len(rest) == 2 && rest[0] == "support":
		err = writeSupport(*dir, rest[1])
		good = err == nil
	default:
		fmt.Fprintln(errs, "usage: summary [-dir D] [-allow FILE] step NAME COMMAND... | table | support DOCS")
		return usage
	}
	if err != nil {
		fmt.Fprintln(errs, "summary:", err)
		return failed
	}
	if !good {
		return failed
	}
	return ok
}

// A step is one line of CI's script, and what it came to.
type step struct {
	Name    string       `json:"name"`
	Command string       `json:"command"` // runs it alone
	Started time.Time    `json:"started"`
	Seconds float64      `json:"seconds"`
	Kernel  string       `json:"kernel"` // this machine's
	Failure string       `json:"failure,omitempty"`
	Runs    []report.Run `json:"runs,omitempty"`
}

func runStep(dir, name string, command []string, allowed allowList, out, errs io.Writer) (good bool, err error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return false, err
	}
	own, err := filepath.Abs(filepath.Join(dir, name+".runs"))
	if err != nil {
		return false, err
	}
	if err := os.Remove(own); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	s := step{Name: name, Command: shell(command), Started: time.Now(), Kernel: kernel()}
	// What the table has of it if this process is killed.
	s.Failure = "it ended without a result"
	if err := s.save(dir); err != nil {
		return false, err
	}
	s.Failure = ""
	fmt.Fprintf(out, "== %s\n", name)

	cmd := exec.Command(command[0], command[1:]...)
	cmd.Env = append(os.Environ(), report.Env+"="+own)
	cmd.Stderr = errs
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	if !signal.Ignored(syscall.SIGHUP) { // as under nohup(1)
		signal.Notify(signals, syscall.SIGHUP)
	}
	defer signal.Stop(signals)
	suites, runErr := runTests(cmd, signals, allowed, out)
	s.Seconds = time.Since(s.Started).Seconds()
	if len(suites) > 0 {
		s.Runs = []report.Run{{Kernel: s.Kernel, Seconds: s.Seconds, Suites: suites}}
	}
	more, err := report.Read(own)
	s.Runs = append(s.Runs, more...)
	if len(s.Runs) > 0 {
		s.Failure = complaint(s.Runs)
	}
	if err := errors.Join(runErr, ignoreMissing(err)); err != nil && s.Failure == "" {
		s.Failure = strings.ReplaceAll(err.Error(), "\n", "; ")
	}
	if s.Failure == "" {
		fmt.Fprintf(out, "== %s: ok, %s\n", name, seconds(s.Seconds))
	} else {
		fmt.Fprintf(out, "== %s: FAILED after %s: %s; alone: %s\n", name, seconds(s.Seconds), s.Failure, s.Command)
	}
	return s.Failure == "", errors.Join(s.save(dir), ignoreMissing(os.Remove(own)))
}

// save writes what the step came to, all of it or nothing.
func (s step) save(dir string) error {
	text, err := json.MarshalIndent(s, "", " ")
	if err != nil {
		return err
	}
	path := filepath.Join(dir, s.Name+".json")
	if err := os.WriteFile(path+".new", text, 0o644); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

func ignoreMissing(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// stopTime is how long what a step has started may take to clean up once it was told
// to stop. Package node gives programs half a minute.
const stopTime = 2 * time.Minute

// runTests runs the command and reads its output. Signals go to all that the command
// has started in its process group: make tells its children of some only, the go
// command tells none. It then waits for all of them, as the go command does not.
func runTests(cmd *exec.Cmd, signals <-chan os.Signal, allowed allowList, out io.Writer) ([]report.Suite, error) {
	pipe, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	// The parent-death signal is sent when the thread that started the child ends.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	group := cmd.Process.Pid
	var told atomic.Bool
	ended := make(chan struct{})
	defer close(ended)
	go func() {
		for {
			select {
			case s := <-signals:
				if s == syscall.SIGHUP {
					s = syscall.SIGTERM // on which programs clean up
				}
				// Orphans become children of this process, to be reaped here: not every
				// container's first process does that.
				_ = unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
				told.Store(true)
				_ = unix.Kill(-group, s.(syscall.Signal))
			case <-ended:
				return
			}
		}
	}()
	suites, err := readTests(pipe, out, allowed)
	err = errors.Join(err, cmd.Wait())
	if told.Load() {
		err = errors.Join(err, awaitGroup(group, stopTime))
	}
	return suites, err
}

var errLivesOn = errors.New("it was told to stop, and some of what it has started lives on")

// awaitGroup waits until the process group is empty, and reaps those of its processes
// that are children of this one.
func awaitGroup(group int, limit time.Duration) error {
	for deadline := time.Now().Add(limit); ; time.Sleep(50 * time.Millisecond) {
		for {
			if pid, err := unix.Wait4(-group, nil, unix.WNOHANG, nil); err != nil || pid <= 0 {
				break
			}
		}
		if errors.Is(unix.Kill(-group, 0), unix.ESRCH) {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%w after %s, in process group %d", errLivesOn, limit, group)
		}
	}
}

// complaint says in a few words what is wrong with the runs; empty: nothing.
func complaint(runs []report.Run) string {
	var c report.Counts
	for _, r := range runs {
		c = c.Add(r.Count())
	}
	switch {
	case c.Failed > 0:
		return fmt.Sprintf("%d failed", c.Failed)
	case c.Unexpected > 0:
		return fmt.Sprintf("%d skipped that the allow-list does not name", c.Unexpected)
	case c.Passed == 0:
		return "no test ran"
	}
	return ""
}

// shell writes a command as one types it.
func shell(command []string) string {
	words := make([]string, len(command))
	for i, w := range command {
		if strings.ContainsAny(w, " \t'\"$&|;<>()*?[]{}\\") {
			name, value, assigned := strings.Cut(w, "=")
			if !assigned {
				name, value = "", w
			} else {
				name += "="
			}
			w = name + "'" + strings.ReplaceAll(value, "'", `'\''`) + "'"
		}
		words[i] = w
	}
	return strings.Join(words, " ")
}

func kernel() string {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "unknown"
	}
	return unix.ByteSliceToString(u.Release[:])
}

func seconds(s float64) string {
	d := time.Duration(s * float64(time.Second))
	if d < time.Minute {
		return d.Round(10 * time.Millisecond).String()
	}
	return d.Round(time.Second).String()
}

var errNoStep = errors.New("no step was run")

func readSteps(dir string) ([]step, error) {
	files, err := filepath.Glob(filepath.Join(dir, "*.json"))
	if err != nil {
		return nil, err
	}
	if len(files) == 0 {
		return nil, fmt.Errorf("%s: %w", dir, errNoStep)
	}
	var steps []step
	for _, path := range files {
		text, err := os.ReadFile(path)
		if err != nil {
			return nil, err
		}
		var s step
		if err := json.Unmarshal(text, &s); err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		steps = append(steps, s)
	}
	slices.SortFunc(steps, func(a, b step) int { return cmp.Or(a.Started.Compare(b.Started), strings.Compare(a.Name, b.Name)) })
	return steps, nil
}
