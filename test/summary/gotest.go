package main

import (
	"bufio"
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/skipstack/skipstack/test/report"
)

// An event is a line of `go test -json`.
type event struct {
	Action, Package, ImportPath, Test, Output, Key, Value string
	Elapsed                                               float64
}

type key struct{ pkg, test string }

func (k key) String() string {
	return strings.TrimSpace(strings.TrimPrefix(k.pkg, module) + " " + k.test)
}

// readTests prints what a person wants to see of the output of `go test -json`, and
// every other line as it is.
func readTests(in io.Reader, out io.Writer, allowed allowList) ([]report.Suite, error) {
	var suites []report.Suite
	tests := map[string][]report.Test{} // of packages that have not ended
	output := map[key][]string{}
	attrs := map[key][]report.Attr{}
	sc := bufio.NewScanner(in)
	sc.Buffer(nil, 16<<20)
	for sc.Scan() {
		var e event
		if json.Unmarshal(sc.Bytes(), &e) != nil || e.Action == "" {
			fmt.Fprintln(out, sc.Text())
			continue
		}
		k := key{cmp.Or(e.Package, e.ImportPath), e.Test}
		switch e.Action {
		case "output", "build-output":
			output[k] = append(output[k], e.Output)
			continue
		case "attr":
			attrs[k] = append(attrs[k], report.Attr{Key: e.Key, Value: e.Value})
			continue
		case "build-fail": // its package's failure follows
			fmt.Fprintf(out, "FAIL  %s\n%s", k, strings.Join(output[k], ""))
			delete(output, k)
			continue
		case "pass", "skip", "fail":
		default:
			continue
		}
		failed := e.Action == "fail"
		if failed {
			fmt.Fprintf(out, "FAIL  %s %s\n%s", k, seconds(e.Elapsed), strings.Join(output[k], ""))
		}
		if e.Test != "" {
			t := report.Test{Name: e.Test, Result: e.Action, Attrs: attrs[k]}
			if e.Action == "skip" {
				var expected bool
				if t.Reason, expected = allowed.reason(k); !expected {
					t.Reason, t.Unexpected = lastWord(output[k]), true
					fmt.Fprintf(out, "skip not on the allow-list: %s: %s\n", k, t.Reason)
				}
			}
			tests[e.Package] = append(tests[e.Package], t)
		} else if e.Action != "skip" { // which is that there are no test files
			s := report.Suite{Name: strings.TrimPrefix(e.Package, module), Seconds: e.Elapsed, Tests: tests[e.Package]}
			if failed && s.Count().Failed == 0 {
				s.Tests = append(s.Tests, report.Test{Name: "(package)", Result: report.Fail})
			}
			if !failed {
				fmt.Fprintf(out, "ok    %-40s %s\n", s.Name, seconds(e.Elapsed))
			}
			suites = append(suites, s)
			delete(tests, e.Package)
		}
		delete(output, k)
		delete(attrs, k)
	}
	if err := sc.Err(); err != nil {
		// The command must not wait for a reader.
		_, _ = io.Copy(io.Discard, in)
		return suites, fmt.Errorf("read test output: %w", err)
	}
	return suites, nil
}

// lastWord is the last line that a skipped test printed of its own.
func lastWord(lines []string) string {
	for i := len(lines) - 1; i >= 0; i-- {
		line := strings.TrimSpace(lines[i])
		if line != "" && !strings.HasPrefix(line, "---") && !strings.HasPrefix(line, "===") {
			return line
		}
	}
	return "no reason given"
}

// An allowList has the reasons of skips that are expected.
type allowList map[string]string

func (a allowList) reason(k key) (why string, ok bool) {
	if why, ok := a[k.String()]; ok {
		return why, true
	}
	for name := k.test; ; {
		i := strings.LastIndex(name, "/")
		if i < 0 {
			return "", false
		}
		name = name[:i]
		if why, ok := a[key{k.pkg, name + "/..."}.String()]; ok {
			return why, true
		}
	}
}

func readAllowed(path string) (allowList, error) {
	a := allowList{}
	if path == "" {
		return a, nil
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	before := ""
	for n, line := range strings.Split(string(text), "\n") {
		fields := strings.Fields(line)
		if len(fields) == 0 || strings.HasPrefix(line, "#") {
			continue
		}
		why := strings.Join(fields[min(2, len(fields)):], " ")
		if why == "the same" {
			why = before
		}
		if why == "" {
			return nil, fmt.Errorf("%s:%d: want package, test and reason", path, n+1)
		}
		a[fields[0]+" "+fields[1]], before = why, why
	}
	return a, nil
}
