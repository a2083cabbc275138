package main

import (
	"fmt"
	"strings"
	"testing"

	"github.com/skipstack/skipstack/plugin/datapath"
	"github.com/skipstack/skipstack/plugin/verdict"
	"github.com/skipstack/skipstack/test/vm/job"
)

// TestJudge gives verdicts on what a virtual machine could say.
func TestJudge(t *testing.T) {
	const (
		passes = "=== RUN   TestA\n--- PASS: TestA (0.00s)\n"
		fails  = "=== RUN   TestB\n    b_test.go:1: no\n--- FAIL: TestB (0.00s)\n"
		skips  = "=== RUN   TestC\n    c_test.go:1: needs root\n--- SKIP: TestC (0.00s)\n"
	)
	tests := suite{pkg: "p", skips: map[string]string{"TestD": "why"}}
	for name, tc := range map[string]struct {
		suite  suite
		output string
		end    job.Event
		counts [3]int // passed, failed, skipped
		want   string // part of the problem, if there is one
	}{
		"passes":          {tests, passes + "PASS\n", job.Event{}, [3]int{1, 0, 0}, ""},
		"fails":           {tests, passes + fails + "FAIL\n", job.Event{Exit: 1}, [3]int{1, 1, 0}, "failed: TestB"},
		"skips":           {tests, passes + skips + "PASS\n", job.Event{}, [3]int{1, 1, 1}, "skipped without reason: TestC"},
		"may skip":        {tests, passes + strings.ReplaceAll(skips, "TestC", "TestD") + "PASS\n", job.Event{}, [3]int{1, 0, 1}, ""},
		"runs nothing":    {tests, "testing: warning: no tests to run\nPASS\n", job.Event{}, [3]int{0, 1, 0}, "no test ran"},
		"leaves things":   {tests, passes + "PASS\nleft behind\n", job.Event{Exit: 1}, [3]int{1, 1, 0}, "exit code 1"},
		"takes too long":  {tests, passes, job.Event{Exit: -1, TimedOut: true}, [3]int{0, 1, 0}, "stopped"},
		"loads":           {loads, `{"Error":""}`, job.Event{}, [3]int{1, 0, 0}, ""},
		"does not load":   {loads, `{"Error":"no"}`, job.Event{}, [3]int{0, 1, 0}, "does not load: no"},
		"is refused":      {refused, `{"Error":"no compare-and-swap","Unsupported":true}`, job.Event{}, [3]int{1, 0, 0}, ""},
		"loads, too new":  {refused, `{"Error":""}`, job.Event{}, [3]int{0, 1, 0}, "want one clear line"},
		"refused vaguely": {refused, `{"Error":"EPERM"}`, job.Event{}, [3]int{0, 1, 0}, "want one clear line"},
		"as expected":     {judged(verdict.Risky, datapath.RiskSplice), `{"Level":"risky","Risks":"splice"}`, job.Event{}, [3]int{1, 0, 0}, ""},
		"other risks": {judged(verdict.Risky, datapath.RiskSplice), `{"Level":"risky","Risks":"splice, epoll"}`, job.Event{},
			[3]int{0, 1, 0}, "want risky [splice]"},
		"safe": {judged(verdict.Risky, datapath.RiskSplice), `{"Level":"safe"}`, job.Event{}, [3]int{0, 1, 0}, "want risky [splice]"},
	} {
		t.Run(name, func(t *testing.T) {
			var out strings.Builder
			j := newJudge(plan{suites: []suite{tc.suite}}, &out, t.TempDir(), false)
			half := len(tc.output) / 2
			tc.end.Kind = job.Ended
			for _, e := range []job.Event{
				{Kind: job.Booted}, {Kind: job.Output, Text: tc.output[:half]}, {Kind: job.Output, Text: tc.output[half:]}, tc.end, {Kind: job.Done},
			} {
				if err := j.event(e); err != nil {
					t.Fatal(err)
				}
			}
			if got := [3]int{j.passed, j.failed, j.skipped}; got != tc.counts {
				t.Errorf("%v passed, failed and skipped, want %v", got, tc.counts)
			}
			if err := j.close(); (err != nil) != (tc.want != "") || err != nil && !strings.Contains(fmt.Sprint(err), tc.want) {
				t.Errorf("%v, want %q", err, tc.want)
			}
		})
	}
	t.Run("silent", func(t *testing.T) {
		j := newJudge(plan{suites: []suite{tests}}, &strings.Builder{}, t.TempDir(), false)
		if err := j.close(); err == nil {
			t.Error("nothing was reported, and that is fine")
		}
	})
}
