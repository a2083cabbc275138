package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/skipstack/skipstack/test/report"
	"github.com/skipstack/skipstack/test/testjson"
	"github.com/skipstack/skipstack/test/vm/job"
)

// A judge turns what the test binary in the virtual machine says into passed and
// failed tests, as it comes.
type judge struct {
	out     io.Writer
	verbose bool
	log     *os.File
	suite   report.Suite
	decoder *testjson.Decoder
	ended   bool
	problem error
}

func newJudge(out io.Writer, logs string, verbose bool) (*judge, error) {
	j := &judge{out: out, verbose: verbose, suite: report.Suite{Name: strings.TrimPrefix(inside, "./")}}
	var err error
	if j.log, err = os.Create(filepath.Join(logs, "tests")); err != nil {
		return nil, err
	}
	if j.decoder, err = testjson.NewDecoder(j.test); err != nil {
		return nil, errors.Join(err, j.log.Close())
	}
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
		_, err := io.WriteString(j.decoder, e.Text)
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

// test takes what came of a test.
func (j *judge) test(r testjson.Result) {
	if r.Name == "" {
		return
	}
	r.Unexpected = r.Result == report.Skip
	j.suite.Tests = append(j.suite.Tests, r.Test)
	fmt.Fprintf(j.out, "%-4s  %s (%.0f s)\n", r.Result, r.Name, r.Seconds)
	if j.verbose || r.Result != report.Pass {
		fmt.Fprint(j.out, testjson.Quote(r.Output))
	}
}

// close returns what came of the tests, and what went wrong beside them.
func (j *judge) close() (report.Suite, error) {
	err := errors.Join(j.decoder.Close(), j.log.Close())
	if !j.ended {
		return j.suite, errors.Join(err, errors.New("the tests did not end"))
	}
	return j.suite, errors.Join(err, j.problem)
}
