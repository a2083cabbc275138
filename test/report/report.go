// Package report has the format in which the tiers of CI write down what came of
// them: which test passed, failed or was skipped, on which kernel. Command summary
// makes the table of CI and docs/support.md of it.
package report

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
)

// Env is the environment variable that names the file which a tier is to write with
// [Write]. Where it is set, the Makefile passes it on as -json, and runs go test with
// -json, of which command summary makes the report.
const Env = "TEST_REPORT"

// A Run is what was run on one kernel.
type Run struct {
	Kernel  string   `json:"kernel,omitempty"`  // release; this machine's if empty
	Version string   `json:"version,omitempty"` // of the distribution's package, which a release need not tell
	Params  string   `json:"params,omitempty"`  // further parameters of the kernel
	Verdict string   `json:"verdict,omitempty"` // doctor's: safe, risky, unsupported
	Risks   []string `json:"risks,omitempty"`
	Guard   string   `json:"guard,omitempty"` // how splice(2) is refused: lsm, fmod_ret, none
	Seconds float64  `json:"seconds"`
	Suites  []Suite  `json:"suites"`
	// Problems are what failed and is no test.
	Problems []string `json:"problems,omitempty"`
}

// A Suite is a package's tests, or a program.
type Suite struct {
	Name    string  `json:"name"`
	Seconds float64 `json:"seconds"`
	Tests   []Test  `json:"tests"`
	// Scaled says what was left out or made smaller, and why.
	Scaled []string `json:"scaled,omitempty"`
}

// Results of a test, as `go test -json` names them.
const (
	Pass = "pass"
	Fail = "fail"
	Skip = "skip"
)

// A Test is one test, or subtest with its parents' names.
type Test struct {
	Name   string `json:"name"`
	Result string `json:"result"`
	// Reason is why it was skipped.
	Reason string `json:"reason,omitempty"`
	// Unexpected marks a skip that nobody allowed: as bad as a failure.
	Unexpected bool `json:"unexpected,omitempty"`
	// Attrs are what it said with testing.T.Attr. A key may come more than once.
	Attrs []Attr `json:"attrs,omitempty"`
}

// Keys of attributes that docs/support.md is made of.
const (
	AttrRuntime = "runtime" // container runtime with its version
	AttrCgroups = "cgroups" // the hierarchies that it sees
	AttrVerdict = "verdict" // this machine's, such as "risky: splice"
	AttrWorks   = "works"   // what the test has seen working
)

// An Attr is a testing.T.Attr.
type Attr struct {
	Key   string `json:"key"`
	Value string `json:"value"`
}

// Verdict writes a verdict with its risks, as in "risky: splice".
func Verdict(level string, risks []string) string {
	if level == "risky" {
		return level + ": " + strings.Join(risks, ", ")
	}
	return level
}

// Attr returns the first attribute with the key.
func (t Test) Attr(key string) (value string, ok bool) {
	for _, a := range t.Attrs {
		if a.Key == key {
			return a.Value, true
		}
	}
	return "", false
}

// Counts are numbers of tests.
type Counts struct{ Passed, Failed, Skipped, Unexpected int }

// Add returns the sum.
func (c Counts) Add(d Counts) Counts {
	return Counts{c.Passed + d.Passed, c.Failed + d.Failed, c.Skipped + d.Skipped, c.Unexpected + d.Unexpected}
}

// Count counts the tests. Problems count as failures.
func (r Run) Count() Counts {
	c := Counts{Failed: len(r.Problems)}
	for _, s := range r.Suites {
		c = c.Add(s.Count())
	}
	return c
}

// Count counts the suite's tests.
func (s Suite) Count() (c Counts) {
	for _, t := range s.Tests {
		switch t.Result {
		case Pass:
			c.Passed++
		case Fail:
			c.Failed++
		case Skip:
			c.Skipped++
			if t.Unexpected {
				c.Unexpected++
			}
		}
	}
	return c
}

// Write writes runs to the file.
func Write(path string, runs []Run) error {
	text, err := json.MarshalIndent(runs, "", " ")
	if err == nil {
		err = os.WriteFile(path, append(text, '\n'), 0o644)
	}
	if err != nil {
		return fmt.Errorf("write the report: %w", err)
	}
	return nil
}

// Read reads what [Write] wrote.
func Read(path string) (runs []Run, err error) {
	text, err := os.ReadFile(path)
	if err == nil {
		err = json.Unmarshal(text, &runs)
	}
	if err != nil {
		return nil, fmt.Errorf("read the report %s: %w", path, err)
	}
	return runs, nil
}
