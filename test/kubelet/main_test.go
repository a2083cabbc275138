package main

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/skipstack/skipstack/test/report"
	"github.com/skipstack/skipstack/test/vm/job"
)

// TestJudge gives a verdict on what a virtual machine could say.
func TestJudge(t *testing.T) {
	const (
		passes  = "\x16=== RUN   TestA\n\x16=== ATTR  TestA runtime containerd 2\n\x16--- PASS: TestA (0.00s)\n"
		further = "\x16=== RUN   TestC\n" // a result comes with what follows it
		fails   = "\x16=== RUN   TestB\n    b_test.go:1: no\n\x16--- FAIL: TestB (0.00s)\n\x16FAIL\n"
	)
	a := report.Test{Name: "TestA", Result: report.Pass, Attrs: []report.Attr{{Key: "runtime", Value: "containerd 2"}}}
	for name, tc := range map[string]struct {
		output string
		events []job.Event // after that
		tests  []report.Test
		want   string // part of the problem, if there is one
	}{
		"passes": {passes + "\x16PASS\n", []job.Event{{Kind: job.Ended}, {Kind: job.Done}}, []report.Test{a}, ""},
		"fails": {passes + fails, []job.Event{{Kind: job.Ended, Exit: 1}, {Kind: job.Done}},
			[]report.Test{a, {Name: "TestB", Result: report.Fail}}, "exit code 1"},
		"takes too long": {passes + further, []job.Event{{Kind: job.Ended, Exit: -1, TimedOut: true}}, []report.Test{a}, "stopped"},
		"stops":          {passes + further, nil, []report.Test{a}, "did not end"},
	} {
		t.Run(name, func(t *testing.T) {
			var out strings.Builder
			logs := t.TempDir()
			j, err := newJudge(&out, logs, false)
			if err != nil {
				t.Fatal(err)
			}
			half := len(tc.output) / 2
			for _, e := range append([]job.Event{
				{Kind: job.Booted}, {Kind: job.Output, Text: tc.output[:half]}, {Kind: job.Output, Text: tc.output[half:]},
			}, tc.events...) {
				if err := j.event(e); err != nil {
					t.Fatal(err)
				}
			}
			suite, err := j.close()
			if (err != nil) != (tc.want != "") || err != nil && !strings.Contains(err.Error(), tc.want) {
				t.Errorf("%v, want %q", err, tc.want)
			}
			if !reflect.DeepEqual(suite.Tests, tc.tests) {
				t.Errorf("%+v, want %+v", suite.Tests, tc.tests)
			}
			if strings.Contains(tc.output, "FAIL") != strings.Contains(out.String(), "b_test.go:1: no") {
				t.Errorf("it printed %s", out.String())
			}
			if text, err := os.ReadFile(filepath.Join(logs, "tests")); err != nil || string(text) != tc.output {
				t.Errorf("it logged %q, %v", text, err)
			}
		})
	}
}

// TestTree leaves alone what its files are links to.
func TestTree(t *testing.T) {
	cache, root := t.TempDir(), t.TempDir()
	original := filepath.Join(cache, "conf")
	if err := os.WriteFile(original, []byte("Debian's"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Link(original, filepath.Join(root, "conf")); err != nil {
		t.Fatal(err)
	}
	tr := &tree{root: root}
	tr.write("conf", []byte("ours"), 0o600)
	tr.link("conf", "etc/link")
	if tr.err != nil {
		t.Fatal(tr.err)
	}
	for path, want := range map[string]string{original: "Debian's", filepath.Join(root, "conf"): "ours"} {
		if got, err := os.ReadFile(path); err != nil || string(got) != want {
			t.Errorf("%s has %q, %v, want %q", path, got, err, want)
		}
	}
	if target, err := os.Readlink(filepath.Join(root, "etc/link")); err != nil || target != "conf" {
		t.Errorf("the link leads to %q, %v", target, err)
	}
	tr.copy(filepath.Join(cache, "missing"), "x", 0o644)
	tr.write("y", nil, 0o644)
	if tr.err == nil {
		t.Error("a missing file is no error")
	}
	if _, err := os.Stat(filepath.Join(root, "y")); err == nil {
		t.Error("it goes on after an error")
	}
}
