package report_test

import (
	"path/filepath"
	"reflect"
	"testing"

	"github.com/skipstack/skipstack/test/report"
)

func TestWriteRead(t *testing.T) {
	path := filepath.Join(t.TempDir(), "runs.json")
	want := []report.Run{{
		Kernel: "6.1.0-50-cloud-amd64", Verdict: "risky", Risks: []string{"fionread"}, Guard: "lsm", Seconds: 1.5,
		Problems: []string{"the kernel complained"},
		Suites: []report.Suite{{Name: "test/cni", Seconds: 1, Scaled: []string{"fewer pods: emulated"}, Tests: []report.Test{
			{Name: "A", Result: report.Pass, Attrs: []report.Attr{{Key: "works", Value: "pod IP"}}},
			{Name: "A/b", Result: report.Fail},
			{Name: "C", Result: report.Skip, Reason: "needs a guard"},
			{Name: "D", Result: report.Skip, Reason: "why not", Unexpected: true},
		}}},
	}}
	if err := report.Write(path, want); err != nil {
		t.Fatal(err)
	}
	got, err := report.Read(path)
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if c := got[0].Count(); c != (report.Counts{Passed: 1, Failed: 2, Skipped: 2, Unexpected: 1}) {
		t.Errorf("counted %+v", c)
	}
}
