package main

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/skipstack/skipstack/test/report"
)

// stepOf writes a step's result as a command that reports these runs has it.
func stepOf(t *testing.T, dir, name string, want int, runs ...report.Run) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "runs")
	if err := report.Write(path, runs); err != nil {
		t.Fatal(err)
	}
	call(t, want, "-dir", dir, "step", name, "sh", "-c", "cp $0 $TEST_REPORT", path)
}

func works(runtime string, what ...string) report.Test {
	t := report.Test{Name: "TestWays/" + runtime, Result: report.Pass, Attrs: []report.Attr{
		{Key: report.AttrRuntime, Value: runtime}, {Key: report.AttrCgroups, Value: "hybrid"}, {Key: report.AttrVerdict, Value: "risky: splice"},
	}}
	for _, w := range what {
		t.Attrs = append(t.Attrs, report.Attr{Key: report.AttrWorks, Value: w})
	}
	return t
}

func page(t *testing.T, docs string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(docs, supportPage))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// The page has what the runs came to, and nothing that did not pass.
func TestSupport(t *testing.T) {
	dir, docs := t.TempDir(), t.TempDir()
	failing := works("containerd 2.1", "hostPort")
	failing.Result = report.Skip
	stepOf(t, dir, "runtimes", ok, report.Run{Kernel: "6.18.0", Suites: []report.Suite{{Name: "test/runtimes", Tests: []report.Test{
		works("containerd 1.6", "pod IP", "Service"), works("containerd 2.1", "pod IP"), failing,
	}}}})
	passed := []report.Test{{Name: "TestA", Result: report.Pass}, {Name: "TestB", Result: report.Pass}}
	stepOf(t, dir, "vm", ok,
		report.Run{Kernel: "5.10.0", Verdict: "unsupported", Guard: "none", Suites: []report.Suite{{Name: "load", Tests: passed[:1]}}},
		report.Run{Kernel: "6.1.0", Version: "6.1.9-1", Verdict: "risky", Risks: []string{"fionread"}, Guard: "lsm", Suites: []report.Suite{
			{Name: "test/datapath", Tests: passed},
			{Name: "test/cni", Tests: append(passed, report.Test{Name: "TestC", Result: report.Skip, Reason: "no moon"}), Scaled: []string{"few pods: emulated"}},
		}},
		report.Run{Kernel: "7.3.0", Params: "lsm=yama", Verdict: "safe", Guard: "fmod_ret", Suites: []report.Suite{
			{Name: "test/cni", Tests: passed, Scaled: []string{"few pods: emulated"}},
		}},
	)
	call(t, ok, "-dir", dir, "support", docs)
	text := page(t, docs)
	contains(t, text,
		"| | containerd 1.6 | containerd 2.1 |", "| verdict | risky: splice | risky: splice |", "| cgroups | hybrid | hybrid |",
		"| pod IP | yes | yes |", "| Service | yes | not run |",
		"| 5.10.0 | - | unsupported | none | plain TCP;", "| 6.1.0 | 6.1.9-1 | risky: fionread | lsm | accelerated where `acceptRisks` has `fionread` |",
		"| 7.3.0 lsm=yama | - | safe | fmod_ret | accelerated |", "| not run | 2 passed | not run |", "| not run | 2 passed, 1 skipped; part | 2 passed; part |",
		"- test/cni: few pods: emulated (6.1.0, 7.3.0 lsm=yama)\n", "- skipped test/cni TestC: no moon (6.1.0)\n", "**kubelet and kube-proxy**: not part")
	if strings.Contains(text, "hostPort") || strings.Contains(text, "test/hijack") {
		t.Error("the page has what did not pass, or did not run")
	}

	// A kernel that is run by itself replaces its own series only, and a kubelet has the
	// verdict of its kernel.
	alone := t.TempDir()
	stepOf(t, alone, "vm", ok, report.Run{Kernel: "6.1.1", Verdict: "safe", Guard: "lsm", Suites: []report.Suite{{Name: "test/cni", Tests: passed}}},
		report.Run{Kernel: "6.1.1-arm64", Verdict: "safe", Guard: "lsm", Suites: []report.Suite{{Name: "test/cni", Tests: passed[:1]}}})
	kubelet := works("kubelet v1.37", "pod IP")
	kubelet.Attrs = slices.DeleteFunc(kubelet.Attrs, func(a report.Attr) bool { return a.Key == report.AttrVerdict })
	stepOf(t, alone, "kubelet", ok, report.Run{Kernel: "6.1.1", Suites: []report.Suite{{Name: "test/kubelet/inside", Tests: []report.Test{kubelet}}}})
	call(t, ok, "-dir", alone, "support", docs)
	text = page(t, docs)
	contains(t, text, "| 5.10.0 | -", "| 6.1.1 | -", "| 6.1.1-arm64 | -", "| 7.3.0 lsm=yama | -", "| not run | 2 passed | 1 passed | 2 passed; part |",
		"| verdict | risky: splice | risky: splice | safe |", "driven by a kubelet where")
	if strings.Contains(text, "6.1.0") || strings.Contains(text, "kube-proxy") {
		t.Errorf("what was run by itself did not take its place:\n%s", text)
	}

	// A tier that is run again replaces its own results only; one that failed, none.
	again := t.TempDir()
	stepOf(t, again, "runtimes", ok, report.Run{Kernel: "6.19.0", Suites: []report.Suite{{Name: "test/runtimes", Tests: []report.Test{works("containerd 9", "pod IP")}}}})
	call(t, ok, "-dir", again, "support", docs)
	text = page(t, docs)
	contains(t, text, "| | kubelet v1.37 | containerd 9 |", "| 6.1.1 |")
	stepOf(t, again, "vm", failed, report.Run{Kernel: "8.0.0", Verdict: "safe", Problems: []string{"oops"}})
	contains(t, call(t, failed, "-dir", again, "support", docs), "vm failed: 1 failed")
	if page(t, docs) != text {
		t.Error("a failed run has changed the page")
	}
}

// The page is what the results beside it give, and names tests that exist.
func TestSupportPage(t *testing.T) {
	const docs = "../../docs"
	s, err := readSupport(filepath.Join(docs, supportJSON))
	if err != nil {
		t.Fatal(err)
	}
	want, err := s.page()
	if err != nil {
		t.Fatal(err)
	}
	if got := page(t, docs); got != string(want) {
		t.Error("docs/support.md is not what docs/support.json gives; run `make support`, or `make support TIERS=` for the words alone")
	}
	var source strings.Builder
	files, err := filepath.Glob("../cni/*_test.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range files {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		source.Write(text)
	}
	makefile, err := os.ReadFile("../../Makefile")
	if err != nil {
		t.Fatal(err)
	}
	for _, target := range regexp.MustCompile("`make ([a-z-]+)`").FindAllStringSubmatch(string(want), -1) {
		if !strings.Contains(string(makefile), "\n"+target[1]+":") {
			t.Errorf("there is no make %s", target[1])
		}
	}
	names := regexp.MustCompile("`(Test[A-Za-z]+)`").FindAllStringSubmatch(string(want), -1)
	if len(names) < 5 {
		t.Errorf("the page names %d tests", len(names))
	}
	for _, name := range names {
		if !strings.Contains(source.String(), "func "+name[1]+"(") {
			t.Errorf("test/cni has no %s", name[1])
		}
	}
}
