// Package testjson reads what came of tests from the events that `go test -json` and
// `go tool test2json` print.
package testjson

import (
	"bufio"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"strings"

	"github.com/skipstack/skipstack/test/report"
)

// BuildFail is the result of a package that does not build. The package's failure
// follows.
const BuildFail = "build-fail"

// A Result is what a test came to, or a package.
type Result struct {
	Package string // import path; empty in what go tool test2json prints
	// Test has no name where all of the package is meant. Its result may be
	// [BuildFail] then.
	report.Test
	Seconds float64
	Output  string // what was said, lines of the testing package included
}

// event is a line (go doc test2json).
type event struct {
	Action, Package, ImportPath, Test, Output, Key, Value string
	Elapsed                                               float64
}

// Read gives results to ended as they come, and lines that are no events to other,
// whose error ends it. It reads to the end even then: who writes must not wait for a
// reader.
func Read(in io.Reader, ended func(Result), other func(line string) error) error {
	err := read(in, ended, other)
	if err != nil {
		_, _ = io.Copy(io.Discard, in)
	}
	return err
}

func read(in io.Reader, ended func(Result), other func(line string) error) error {
	type key struct{ pkg, test string }
	type said struct {
		output strings.Builder
		attrs  []report.Attr
	}
	running := map[key]*said{}
	sc := bufio.NewScanner(in)
	sc.Buffer(nil, 16<<20)
	for sc.Scan() {
		var e event
		if json.Unmarshal(sc.Bytes(), &e) != nil || e.Action == "" {
			if err := other(sc.Text()); err != nil {
				return err
			}
			continue
		}
		k := key{cmp.Or(e.Package, e.ImportPath), e.Test}
		if running[k] == nil {
			running[k] = &said{}
		}
		s := running[k]
		switch e.Action {
		case "output", "build-output":
			s.output.WriteString(e.Output)
		case "attr":
			s.attrs = append(s.attrs, report.Attr{Key: e.Key, Value: e.Value})
		case report.Pass, report.Fail, report.Skip, BuildFail:
			delete(running, k)
			ended(Result{
				Package: k.pkg, Test: report.Test{Name: e.Test, Result: e.Action, Attrs: s.attrs},
				Seconds: e.Elapsed, Output: s.output.String(),
			})
		}
	}
	return sc.Err()
}

// A Decoder is written what a test binary says that runs with -test.v=test2json, and
// makes results of it.
type Decoder struct {
	cmd  *exec.Cmd
	in   io.WriteCloser
	read chan error
}

// NewDecoder starts a decoder. It calls ended from another goroutine until it is
// closed, which is the caller's task.
func NewDecoder(ended func(Result)) (*Decoder, error) {
	d := &Decoder{cmd: exec.Command("go", "tool", "test2json", "-t"), read: make(chan error, 1)}
	var err error
	if d.in, err = d.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	events, err := d.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := d.cmd.Start(); err != nil {
		return nil, fmt.Errorf("go tool test2json: %w", err)
	}
	go func() {
		d.read <- Read(events, ended, func(line string) error { return fmt.Errorf("go tool test2json said %q", line) })
	}()
	return d, nil
}

// Write takes some of the output, which need not be whole lines.
func (d *Decoder) Write(b []byte) (int, error) { return d.in.Write(b) }

// Close waits until all that was written has been decoded.
func (d *Decoder) Close() error {
	err := errors.Join(d.in.Close(), <-d.read)
	if waitErr := d.cmd.Wait(); waitErr != nil {
		err = errors.Join(err, fmt.Errorf("go tool test2json: %w", waitErr))
	}
	return err
}

// Quote sets off what a test said from what is said about it.
func Quote(output string) string {
	var b strings.Builder
	for line := range strings.Lines(output) {
		b.WriteString("      | " + strings.TrimRight(line, "\n") + "\n")
	}
	return b.String()
}
