package main

import (
	"strings"
	"testing"

	"github.com/skipstack/skipstack/plugin/datapath"
	"github.com/skipstack/skipstack/plugin/verdict"
	"github.com/skipstack/skipstack/test/report"
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
	risky := judged(verdict.Risky, datapath.RiskSplice, datapath.NoGuard)
	unsupported := judged(verdict.Unsupported, 0, datapath.NoGuard)
	for name, tc := range map[string]struct {
		suite  suite
		output string
		end    job.Event
		want   report.Counts
	}{
		"passes":          {tests, passes + "PASS\n", job.Event{}, report.Counts{Passed: 1}},
		"fails":           {tests, passes + fails + "FAIL\n", job.Event{Exit: 1}, report.Counts{Passed: 1, Failed: 1}},
		"skips":           {tests, passes + skips + "PASS\n", job.Event{}, report.Counts{Passed: 1, Skipped: 1, Unexpected: 1}},
		"may skip":        {tests, passes + strings.ReplaceAll(skips, "TestC", "TestD") + "PASS\n", job.Event{}, report.Counts{Passed: 1, Skipped: 1}},
		"runs nothing":    {tests, "testing: warning: no tests to run\nPASS\n", job.Event{}, report.Counts{Failed: 1}},
		"leaves things":   {tests, passes + "PASS\nleft behind\n", job.Event{Exit: 1}, report.Counts{Passed: 1, Failed: 1}},
		"takes too long":  {tests, passes, job.Event{Exit: -1, TimedOut: true}, report.Counts{Failed: 1}},
		"loads":           {loads, `{"Error":""}`, job.Event{}, report.Counts{Passed: 1}},
		"does not load":   {loads, `{"Error":"no"}`, job.Event{}, report.Counts{Failed: 1}},
		"is refused":      {refused, `{"Error":"no compare-and-swap","Unsupported":true}`, job.Event{}, report.Counts{Passed: 1}},
		"loads, too new":  {refused, `{"Error":""}`, job.Event{}, report.Counts{Failed: 1}},
		"refused vaguely": {refused, `{"Error":"EPERM"}`, job.Event{}, report.Counts{Failed: 1}},
		"as expected":     {risky, `{"verdict":"risky","risks":["splice"]}`, job.Event{Exit: 4}, report.Counts{Passed: 1}},
		"other risks":     {risky, `{"verdict":"risky","risks":["splice","epoll"]}`, job.Event{Exit: 4}, report.Counts{Failed: 1}},
		"safe":            {risky, `{"verdict":"safe","risks":[]}`, job.Event{}, report.Counts{Failed: 1}},
		"other guard":     {risky, `{"verdict":"risky","risks":["splice"],"guard":"lsm"}`, job.Event{Exit: 4}, report.Counts{Failed: 1}},
		"other exit code": {risky, `{"verdict":"risky","risks":["splice"]}`, job.Event{}, report.Counts{Passed: 1, Failed: 1}},
		"could not tell":  {risky, `{"verdict":"risky","risks":["splice"],"inconclusive":true}`, job.Event{Exit: 4}, report.Counts{Failed: 1}},
		"unsupported": {unsupported, `{"verdict":"unsupported","risks":["splice"],"inconclusive":true,
			"probes":[{"name":"load","result":"not ok","detail":"no compare-and-swap"}]}`, job.Event{Exit: 3}, report.Counts{Passed: 1}},
		"unsupported, and does not say why": {unsupported, `{"verdict":"unsupported","probes":[{"name":"load","result":"not ok","detail":"EINVAL"}]}`,
			job.Event{Exit: 3}, report.Counts{Failed: 1}},
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
			j.close()
			if got := j.run.Count(); got != tc.want {
				t.Errorf("%+v, want %+v:\n%s", got, tc.want, &out)
			}
			if bad := tc.want.Failed+tc.want.Unexpected > 0; strings.HasPrefix(out.String(), "FAIL") != bad {
				t.Errorf("%s", &out)
			}
		})
	}
	t.Run("silent", func(t *testing.T) {
		j := newJudge(plan{suites: []suite{tests}}, &strings.Builder{}, t.TempDir(), false)
		if j.close(); j.run.Count().Failed != 1 {
			t.Error("nothing was reported, and that is fine")
		}
	})
}
