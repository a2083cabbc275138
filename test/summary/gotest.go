package main

import (
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/skipstack/skipstack/test/report"
	"github.com/skipstack/skipstack/test/testjson"
)

type key struct{ pkg, test string }

func (k key) String() string {
	return strings.TrimSpace(strings.TrimPrefix(k.pkg, module) + " " + k.test)
}

// readTests prints what a person wants to see of the output of `go test -json`, and
// every other line as it is.
func readTests(in io.Reader, out io.Writer, allowed allowList) ([]report.Suite, error) {
	var suites []report.Suite
	tests := map[string][]report.Test{} // of packages that have not ended
	err := testjson.Read(in, func(r testjson.Result) {
		k := key{r.Package, r.Name}
		switch r.Result {
		case testjson.BuildFail: // its package's failure follows
			fmt.Fprintf(out, "FAIL  %s\n%s", k, r.Output)
			return
		case report.Fail:
			fmt.Fprintf(out, "FAIL  %s %s\n%s", k, seconds(r.Seconds), r.Output)
		}
		if r.Name != "" {
			if r.Result == report.Skip {
				var expected bool
				if r.Reason, expected = allowed.reason(k); !expected {
					r.Reason, r.Unexpected = lastWord(r.Output), true
					fmt.Fprintf(out, "skip not on the allow-list: %s: %s\n", k, r.Reason)
				}
			}
			tests[r.Package] = append(tests[r.Package], r.Test)
		} else if r.Result != report.Skip { // which is that there are no test files
			s := report.Suite{Name: strings.TrimPrefix(r.Package, module), Seconds: r.Seconds, Tests: tests[r.Package]}
			if r.Result == report.Pass {
				fmt.Fprintf(out, "ok    %-40s %s\n", s.Name, seconds(s.Seconds))
			} else if s.Count().Failed == 0 {
				s.Tests = append(s.Tests, report.Test{Name: "(package)", Result: report.Fail})
			}
			suites = append(suites, s)
			delete(tests, r.Package)
		}
	}, func(line string) error {
		fmt.Fprintln(out, line)
		return nil
	})
	if err != nil {
		return suites, fmt.Errorf("read test output: %w", err)
	}
	return suites, nil
}

// lastWord is the last line that a skipped test printed of its own.
func lastWord(output string) string {
	lines := strings.Split(output, "\n")
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
