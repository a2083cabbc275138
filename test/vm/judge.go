package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/skipstack/skipstack/test/report"
	"github.com/skipstack/skipstack/test/testjson"
	"github.com/skipstack/skipstack/test/vm/job"
)

// A judge turns what the virtual machine says into passed and failed tests.
type judge struct {
	plan    plan
	out     io.Writer // gets one write for each suite
	logs    string
	verbose bool
	output  map[int]*bytes.Buffer
	run     report.Run
	done    int // suites
}

func newJudge(p plan, out io.Writer, logs string, verbose bool) *judge {
	return &judge{
		plan: p, out: out, logs: logs, verbose: verbose, output: map[int]*bytes.Buffer{},
		run: report.Run{Kernel: p.kernel, Params: p.params},
	}
}

// packageVersion is in what uname -v says: "#1 SMP PREEMPT_DYNAMIC Debian 6.12.57-1 (2025-11-05)".
var packageVersion = regexp.MustCompile(` Debian (\S+)`)

func (j *judge) event(e job.Event) error {
	switch e.Kind {
	case job.Booted:
		j.run.Kernel = e.Text
		if m := packageVersion.FindStringSubmatch(e.Version); m != nil {
			j.run.Version = m[1]
		}
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
	j.ended(j.plan.suites[e.Run], e)
	return nil
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

func (j *judge) ended(s suite, e job.Event) {
	j.done++
	output := j.output[e.Run].Bytes()
	rs := report.Suite{Name: s.name(), Seconds: e.Took.Seconds(), Scaled: s.scaled}
	var said strings.Builder
	var err error
	if s.pkg == "" {
		err = s.check(string(output), &j.run)
		test := report.Test{Name: s.name(), Result: report.Pass}
		if err != nil {
			test.Result = report.Fail
		}
		rs.Tests = []report.Test{test}
	} else {
		rs.Tests, err = j.tests(&said, s, output)
	}
	if e.TimedOut {
		err = errors.Join(err, fmt.Errorf("it was stopped after %s", s.timeout))
	} else if e.Exit != s.exit {
		err = errors.Join(err, fmt.Errorf("exit code %d, want %d", e.Exit, s.exit))
	}
	j.run.Suites = append(j.run.Suites, rs)
	c := rs.Count()
	if err != nil && c.Failed+c.Unexpected == 0 {
		j.problem(fmt.Errorf("%s: %w", s.name(), err))
	}
	head := fmt.Sprintf("%-5s %s: %s: %s, %s\n", word(err == nil), j.name(), s.name(), counted(c), e.Took.Round(10*time.Millisecond))
	if err != nil {
		head += "      " + strings.ReplaceAll(err.Error(), "\n", "\n      ") + "\n"
	}
	fmt.Fprint(j.out, head+said.String())
}

// name is the kernel's, with the parameters that make it another.
func (j *judge) name() string { return strings.TrimSpace(j.run.Kernel + " " + j.run.Params) }

func (j *judge) problem(err error) { j.run.Problems = append(j.run.Problems, err.Error()) }

// close adds what did not happen.
func (j *judge) close() {
	for _, s := range j.plan.suites[j.done:] {
		j.problem(fmt.Errorf("%s did not end", s.name()))
	}
}

// tests reads what a test binary said.
func (j *judge) tests(out io.Writer, s suite, output []byte) (tests []report.Test, err error) {
	var failed, skips []string
	ran := 0
	decoder, err := testjson.NewDecoder(func(r testjson.Result) {
		quote := r.Result == report.Fail
		if r.Name == "" {
			quote = quote && len(failed) == 0
		} else {
			switch r.Result {
			case report.Pass:
				ran++
				quote = j.verbose
			case report.Fail:
				failed = append(failed, r.Name)
			case report.Skip:
				var expected bool
				if r.Reason, expected = s.skips[r.Name]; !expected {
					skips = append(skips, r.Name)
					r.Unexpected, r.Reason = true, "unexpected"
					quote = true
				}
			}
			tests = append(tests, r.Test)
		}
		if quote {
			fmt.Fprint(out, testjson.Quote(r.Output))
		}
	})
	if err != nil {
		return nil, err
	}
	_, err = decoder.Write(output)
	if err = errors.Join(err, decoder.Close()); err != nil {
		return nil, err
	}
	if len(failed) > 0 {
		err = fmt.Errorf("failed: %s", strings.Join(failed, ", "))
	} else if ran == 0 {
		fmt.Fprint(out, testjson.Quote(string(output)))
		err = errors.New("no test ran")
	}
	if len(skips) > 0 {
		err = errors.Join(err, fmt.Errorf("skipped without reason: %s", strings.Join(skips, ", ")))
	}
	return tests, err
}
