package main

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/skipstack/skipstack/plugin/datapath"
	"github.com/skipstack/skipstack/plugin/verdict"
	"github.com/skipstack/skipstack/test/report"
	"github.com/skipstack/skipstack/test/vm/job"
	"github.com/skipstack/skipstack/test/vm/machine"
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

// Skips that CI allows because a virtual machine runs the test are of tests that one
// does run: as planned for CI, or with -set full where the reason says so.
func TestAllowedSkips(t *testing.T) {
	text, err := os.ReadFile("../../.ci/allowed-skips")
	if err != nil {
		t.Fatal(err)
	}
	ran, why := 0, ""
	for line := range strings.Lines(string(text)) {
		fields := strings.Fields(line)
		if len(fields) < 3 || strings.HasPrefix(line, "#") {
			continue
		}
		if reason := strings.Join(fields[2:], " "); reason != "the same" {
			why = reason
		}
		if !strings.Contains(why, "test/vm") {
			continue
		}
		set := setCI
		if strings.Contains(why, "-set full") {
			set = setFull
		}
		pkg, name := fields[0], fields[1]
		top, _, _ := strings.Cut(name, "/")
		i := slices.IndexFunc(on(set, verdict.Safe, none, queue), func(s suite) bool { return s.pkg == pkg && s.runs(t, top) })
		if ran++; i < 0 {
			t.Errorf("%s %s is skipped as %q, and the set %s does not run it", pkg, name, why, set)
		}
	}
	if ran == 0 {
		t.Error("no skip is allowed for that reason")
	}
	for name, want := range map[string]bool{"TestReset": true, "TestMemoryLimit": true, "TestRandomWrites": true, "TestMemory": false} {
		for _, s := range on(setCI, verdict.Safe, none, queue) {
			if s.pkg == "test/datapath" && s.runs(t, name) != want {
				t.Errorf("%s is run: %v, want %v", name, !want, want)
			}
		}
	}
}

// Patterns for subtests, as plans have them.
var subtests = regexp.MustCompile(`/\^[^/$]*\$`)

// runs tells whether the suite runs the top-level test, or some of its subtests.
func (s suite) runs(t *testing.T, name string) bool {
	t.Helper()
	matches := func(pattern string) bool {
		pattern = subtests.ReplaceAllString(pattern, "")
		m, err := regexp.MatchString(pattern, name)
		if err != nil || strings.Contains(pattern, "/") {
			t.Fatalf("the pattern %q is not understood: %v", pattern, err)
		}
		return m
	}
	skipped := s.skip != "" && !strings.Contains(s.skip, "/") && matches(s.skip)
	return !skipped && (s.only == "" || matches(s.only))
}

// A test that got another name would silently not be run any more.
func TestPlansNameTests(t *testing.T) {
	name := regexp.MustCompile(`\bTest\w+`)
	for _, set := range []string{setCI, setFull} {
		for _, p := range plans(set, machine.AMD64) {
			for _, s := range p.suites {
				files, err := filepath.Glob(filepath.Join("../..", s.pkg, "*_test.go"))
				if err != nil || s.pkg != "" && len(files) == 0 {
					t.Fatalf("%s has no tests: %v", s.pkg, err)
				}
				var source strings.Builder
				for _, path := range files {
					text, err := os.ReadFile(path)
					if err != nil {
						t.Fatal(err)
					}
					source.Write(text)
				}
				for _, n := range name.FindAllString(s.only+" "+s.skip, -1) {
					if !strings.Contains(source.String(), "func "+n+"(") {
						t.Errorf("%s, set %s: %s has no %s", p.kernel, set, s.pkg, n)
					}
				}
			}
		}
	}
}
