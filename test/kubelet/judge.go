package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/skipstack/skipstack/test/report"
	"github.com/skipstack/skipstack/test/vm/job"
)

// A judge turns what the test binary in the virtual machine says into passed and
// failed tests, as it comes.
type judge struct {
	out     io.Writer
	verbose bool
	log     *os.File
	suite   report.Suite
	decoder *exec.Cmd
	in      io.WriteCloser
	decoded chan error
	ended   bool
	problem error
}

func newJudge(out io.Writer, logs string, verbose bool) (*judge, error) {
	j := &judge{out: out, verbose: verbose, suite: report.Suite{Name: strings.TrimPrefix(inside, "./")}, decoded: make(chan error, 1)}
	var err error
	if j.log, err = os.Create(filepath.Join(logs, "tests")); err != nil {
		return nil, err
	}
	j.decoder = exec.Command("go", "tool", "test2json")
	if j.in, err = j.decoder.StdinPipe(); err != nil {
		return nil, err
	}
	events, err := j.decoder.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := j.decoder.Start(); err != nil {
		return nil, fmt.Errorf("go tool test2json: %w", err)
	}
	go func() { j.decoded <- j.decode(events) }()
	return j, nil
}

// event takes what the virtual machine reports.
func (j *judge) event(e job.Event) error {
	switch e.Kind {
	case job.Booted:
		logf("%s is up", e.Text)
	case job.Output:
		if _, err := j.log.WriteString(e.Text); err != nil {
			return err
		}
		_, err := io.WriteString(j.in, e.Text)
		return err
	case job.Ended:
		j.ended = true
		j.suite.Seconds = e.Took.Seconds()
		if e.TimedOut {
			j.problem = errors.New("the tests were stopped")
		} else if e.Exit != 0 {
			j.problem = fmt.Errorf("the tests ended with exit code %d", e.Exit)
		}
	}
	return nil
}

type testEvent struct {
	Action, Test, Output, Key, Value string
	Elapsed                          float64
}

func (j *judge) decode(in io.Reader) error {
	said, attrs := map[string]*strings.Builder{}, map[string][]report.Attr{}
	sc := bufio.NewScanner(in)
	sc.Buffer(nil, 16<<20)
	for sc.Scan() {
		var e testEvent
		if err := json.Unmarshal(sc.Bytes(), &e); err != nil {
			return fmt.Errorf("go tool test2json said %q: %w", sc.Text(), err)
		}
		if said[e.Test] == nil {
			said[e.Test] = &strings.Builder{}
		}
		switch e.Action {
		case "output":
			said[e.Test].WriteString(e.Output)
		case "attr":
			attrs[e.Test] = append(attrs[e.Test], report.Attr{Key: e.Key, Value: e.Value})
		case report.Pass, report.Fail, report.Skip:
			if e.Test == "" {
				continue
			}
			t := report.Test{Name: e.Test, Result: e.Action, Attrs: attrs[e.Test], Unexpected: e.Action == report.Skip}
			j.suite.Tests = append(j.suite.Tests, t)
			fmt.Fprintf(j.out, "%-4s  %s (%.0f s)\n", e.Action, e.Test, e.Elapsed)
			if j.verbose || e.Action != report.Pass {
				for line := range strings.Lines(said[e.Test].String()) {
					fmt.Fprintf(j.out, "      | %s\n", strings.TrimRight(line, "\n"))
				}
			}
		}
	}
	return sc.Err()
}

// close returns what came of the tests, and what went wrong beside them.
func (j *judge) close() (report.Suite, error) {
	err := errors.Join(j.in.Close(), <-j.decoded, j.decoder.Wait(), j.log.Close())
	if !j.ended {
		return j.suite, errors.Join(err, errors.New("the tests did not end"))
	}
	return j.suite, errors.Join(err, j.problem)
}
