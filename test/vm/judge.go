package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/skipstack/skipstack/test/vm/job"
)

// A judge turns what the virtual machine says into passed and failed tests.
type judge struct {
	plan                    plan
	out                     io.Writer
	logs                    string
	verbose                 bool
	output                  map[int]*bytes.Buffer
	passed, failed, skipped int
	problems                []error
	booted                  string // the kernel's release
	done                    int    // suites
}

func newJudge(p plan, out io.Writer, logs string, verbose bool) *judge {
	return &judge{plan: p, out: out, logs: logs, verbose: verbose, output: map[int]*bytes.Buffer{}}
}

func (j *judge) event(e job.Event) error {
	switch e.Kind {
	case job.Booted:
		j.booted = e.Text
		logf("%s is up", e.Text)
		return nil
	case job.Done:
		return nil
	}
	if e.Run < 0 || e.Run >= len(j.plan.suites) {
		return fmt.Errorf("the virtual machine reports on run %d, which it has not", e.Run)
	}
	if j.output[e.Run] == nil {
		j.output[e.Run] = &bytes.Buffer{}
	}
	if e.Kind == job.Output {
		j.output[e.Run].WriteString(e.Text)
		return j.log(j.plan.suites[e.Run], e.Text)
	}
	return j.ended(j.plan.suites[e.Run], e)
}

// log keeps what a suite says, as it comes.
func (j *judge) log(s suite, text string) error {
	name := filepath.Join(j.logs, strings.NewReplacer("/", "-", " ", "-").Replace(s.name()))
	f, err := os.OpenFile(name, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return err
	}
	if _, err := f.WriteString(text); err != nil {
		f.Close()
		return err
	}
	return f.Close()
}

func (j *judge) ended(s suite, e job.Event) error {
	j.done++
	output := j.output[e.Run].Bytes()
	before := j.failed
	var err error
	if s.pkg == "" {
		err = s.check(string(output))
		j.count(err)
	} else {
		err = j.tests(s, output)
	}
	if e.TimedOut {
		err = errors.Join(err, fmt.Errorf("it was stopped after %s", s.timeout))
	} else if e.Exit != 0 {
		err = errors.Join(err, fmt.Errorf("exit code %d", e.Exit))
	}
	fmt.Fprintf(j.out, "%-5s %s: %s %s\n", word(err), j.booted, s.name(), e.Took.Round(10*time.Millisecond))
	if s.scaled != "" {
		fmt.Fprintf(j.out, "      not all of it: %s\n", s.scaled)
	}
	if err != nil {
		j.problems = append(j.problems, fmt.Errorf("%s: %w", s.name(), err))
		if j.failed == before {
			j.failed++
		}
	}
	return nil
}

func (j *judge) count(err error) {
	if err != nil {
		j.failed++
	} else {
		j.passed++
	}
}

// close says what went wrong.
func (j *judge) close() error {
	if n := len(j.plan.suites) - j.done; n > 0 {
		j.problems = append(j.problems, fmt.Errorf("%d of %d suites did not end", n, len(j.plan.suites)))
		j.failed += n
	}
	return errors.Join(j.problems...)
}

type testEvent struct{ Action, Test, Output string }

// tests counts the tests of a binary.
func (j *judge) tests(s suite, output []byte) error {
	cmd := exec.Command("go", "tool", "test2json")
	cmd.Stdin = bytes.NewReader(output)
	text, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("go tool test2json: %w", err)
	}
	said := map[string]*strings.Builder{}
	var failed, skips []string
	ran := 0
	for line := range bytes.Lines(text) {
		var e testEvent
		if err := json.Unmarshal(line, &e); err != nil {
			return fmt.Errorf("go tool test2json said %q: %w", line, err)
		}
		if said[e.Test] == nil {
			said[e.Test] = &strings.Builder{}
		}
		switch e.Action {
		case "output":
			said[e.Test].WriteString(e.Output)
			continue
		case "pass", "fail", "skip":
		default:
			continue
		}
		switch {
		case e.Test == "":
		case e.Action == "pass":
			j.passed++
			ran++
		case e.Action == "fail":
			j.failed++
			failed = append(failed, e.Test)
			fmt.Fprint(j.out, indent(said[e.Test].String()))
		case e.Action == "skip":
			j.skipped++
			why, ok := s.skips[e.Test]
			if !ok {
				skips = append(skips, e.Test)
				why = "UNEXPECTED"
			}
			fmt.Fprintf(j.out, "      skip %s: %s\n%s", e.Test, why, indent(said[e.Test].String()))
		}
		if j.verbose && e.Action == "pass" {
			fmt.Fprint(j.out, indent(said[e.Test].String()))
		}
	}
	switch {
	case len(failed) > 0:
		err = fmt.Errorf("failed: %s", strings.Join(failed, ", "))
	case ran == 0:
		fmt.Fprint(j.out, indent(string(output)))
		err = errors.New("no test ran")
	}
	if len(skips) > 0 {
		err = errors.Join(err, fmt.Errorf("skipped without reason: %s", strings.Join(skips, ", ")))
	}
	return err
}

func indent(text string) string {
	var b strings.Builder
	for line := range strings.Lines(text) {
		b.WriteString("      | " + strings.TrimRight(line, "\n") + "\n")
	}
	return b.String()
}
