package main

import (
	"bytes"
	"cmp"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/template"
	"time"

	"github.com/skipstack/skipstack/test/report"
)

// The page on what is supported is made of what the tiers came to. Their results are
// kept beside it, so that one tier can be run again by itself.
const (
	supportJSON = "support.json"
	supportPage = "support.md"
)

// support is what docs/support.json has.
type support struct {
	Runtimes []runtimeResult `json:"runtimes"`
	Kernels  []kernelResult  `json:"kernels"`
}

// A runtimeResult is what was exercised with a container runtime.
type runtimeResult struct {
	Tier    string   `json:"tier"`
	Date    string   `json:"date"`
	Runtime string   `json:"runtime"`
	Kernel  string   `json:"kernel"`
	Cgroups string   `json:"cgroups"`
	Verdict string   `json:"verdict"`
	Works   []string `json:"works"`
}

// A kernelResult is what was run on a kernel.
type kernelResult struct {
	Tier    string        `json:"tier"`
	Date    string        `json:"date"`
	Kernel  string        `json:"kernel"`
	Version string        `json:"version,omitempty"`
	Params  string        `json:"params,omitempty"`
	Verdict string        `json:"verdict"`
	Guard   string        `json:"guard,omitempty"`
	Suites  []suiteResult `json:"suites"`
}

type suiteResult struct {
	Name    string   `json:"name"`
	Passed  int      `json:"passed"`
	Skipped int      `json:"skipped,omitempty"`
	Skips   []string `json:"skips,omitempty"` // one for each reason
	Scaled  []string `json:"scaled,omitempty"`
}

// writeSupport replaces what docs has of the tiers that were run. Where none was, it
// writes the page anew.
func writeSupport(dir, docs string) error {
	steps, err := readSteps(dir)
	if err != nil && !errors.Is(err, errNoStep) {
		return err
	}
	s, err := readSupport(filepath.Join(docs, supportJSON))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, st := range steps {
		if st.Failure != "" {
			return fmt.Errorf("%s failed: %s", st.Name, st.Failure)
		}
		s.replace(st)
	}
	slices.SortFunc(s.Kernels, func(a, b kernelResult) int {
		return cmp.Or(cmp.Compare(series(a.Kernel), series(b.Kernel)), strings.Compare(a.Name(), b.Name()))
	})
	text, err := json.MarshalIndent(s, "", " ")
	if err != nil {
		return err
	}
	page, err := s.page()
	if err != nil {
		return err
	}
	return errors.Join(
		os.WriteFile(filepath.Join(docs, supportJSON), append(text, '\n'), 0o644),
		os.WriteFile(filepath.Join(docs, supportPage), page, 0o644),
	)
}

func readSupport(path string) (s support, err error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return s, err
	}
	if err := json.Unmarshal(text, &s); err != nil {
		return s, fmt.Errorf("%s: %w", path, err)
	}
	return s, nil
}

// release is a kernel's version, for the machine of the tests, whose kernel may be of
// its own making.
func release(kernel string) string {
	version, _, _ := strings.Cut(kernel, "-")
	return version
}

// replace takes a step's results in place of the ones before: of the runtimes all that
// its tier had, of the kernels those of the same series, as each can be run by itself.
func (s *support) replace(st step) {
	s.Runtimes = slices.DeleteFunc(s.Runtimes, func(r runtimeResult) bool { return r.Tier == st.Name })
	date := st.Started.Format(time.DateOnly)
	for _, run := range st.Runs {
		if run.Kernel == "" || run.Kernel == st.Kernel {
			run.Kernel = release(st.Kernel)
		}
		runtimes := runtimesOf(run)
		for _, r := range runtimes {
			r.Tier, r.Date = st.Name, date
			s.Runtimes = append(s.Runtimes, r)
		}
		if k := kernelOf(run); k.Verdict != "" && len(runtimes) == 0 {
			k.Tier, k.Date = st.Name, date
			s.Kernels = slices.DeleteFunc(s.Kernels, func(old kernelResult) bool { return old.succeededBy(k) })
			s.Kernels = append(s.Kernels, k)
		}
	}
}

// succeededBy tells if the other result is of the same kernel, or of another release of
// its series in the same tier.
func (k kernelResult) succeededBy(other kernelResult) bool {
	return k.Name() == other.Name() ||
		k.Tier == other.Tier && series(k.Kernel) == series(other.Kernel) && k.Params == other.Params && k.arm64() == other.arm64()
}

func (k kernelResult) arm64() bool { return strings.HasSuffix(k.Kernel, "-arm64") }

// series is a number by which kernels are sorted: 6.12 comes after 6.1.
func series(kernel string) (n int) {
	var major, minor int
	fmt.Sscanf(kernel, "%d.%d", &major, &minor)
	return major*1000 + minor
}

// runtimesOf gathers what tests that passed say of runtimes.
func runtimesOf(run report.Run) (all []runtimeResult) {
	for _, suite := range run.Suites {
		for _, t := range suite.Tests {
			name, ok := t.Attr(report.AttrRuntime)
			if !ok || t.Result != report.Pass {
				continue
			}
			i := slices.IndexFunc(all, func(r runtimeResult) bool { return r.Runtime == name })
			if i < 0 {
				i = len(all)
				all = append(all, runtimeResult{Runtime: name, Kernel: run.Kernel, Verdict: report.Verdict(run.Verdict, run.Risks)})
			}
			r := &all[i]
			for _, a := range t.Attrs {
				switch {
				case a.Key == report.AttrWorks && !slices.Contains(r.Works, a.Value):
					r.Works = append(r.Works, a.Value)
				case a.Key == report.AttrCgroups:
					r.Cgroups = a.Value
				case a.Key == report.AttrVerdict:
					r.Verdict = a.Value
				}
			}
		}
	}
	return all
}

func kernelOf(run report.Run) kernelResult {
	k := kernelResult{Kernel: run.Kernel, Version: run.Version, Params: run.Params, Verdict: report.Verdict(run.Verdict, run.Risks), Guard: run.Guard}
	for _, suite := range run.Suites {
		c := suite.Count()
		r := suiteResult{Name: suite.Name, Passed: c.Passed, Skipped: c.Skipped, Skips: skipped(suite), Scaled: suite.Scaled}
		for _, t := range suite.Tests {
			if v, ok := t.Attr(report.AttrVerdict); ok && k.Verdict == "" {
				k.Verdict = v
			}
		}
		k.Suites = append(k.Suites, r)
	}
	return k
}

// A ran is a suite of the page.
type ran struct{ Name, What string }

// suites are those that the page shows, as they depend on the kernel.
var suites = []ran{
	{"test/datapath", "traffic: integrity, order, back-pressure, memory, splice, loss"},
	{"test/conformance", "sockets compared with plain TCP ([conformance.md](conformance.md))"},
	{"test/hijack", "strangers that forge handshakes and segments"},
	{"test/cni", "the built plugin in a CNI chain, its life cycle, its command line"},
	{"plugin/datapath", "loading, attaching, upgrades, the splice guard"},
	{"plugin/verdict", "the probes behind the verdict"},
}

//go:embed support.md.tmpl
var supportTemplate string

// page renders docs/support.md.
func (s support) page() ([]byte, error) {
	t, err := template.New(supportPage).Funcs(template.FuncMap{
		"cell":  kernelResult.cell,
		"means": means,
		"join":  strings.Join,
		"has":   func(r runtimeResult, what string) bool { return slices.Contains(r.Works, what) },
	}).Parse(supportTemplate)
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	err = t.Execute(&b, s)
	return b.Bytes(), err
}

// Suites are those of the page that some kernel ran.
func (s support) Suites() []ran {
	return slices.DeleteFunc(slices.Clone(suites), func(r ran) bool {
		return !slices.ContainsFunc(s.Kernels, func(k kernelResult) bool { return k.cell(r.Name) != notRun })
	})
}

// means says what becomes of pods under mode auto.
func means(verdict string) string {
	level, risks, _ := strings.Cut(verdict, ": ")
	switch level {
	case "safe":
		return "accelerated"
	case "risky":
		return "accelerated where `acceptRisks` has " + "`" + strings.ReplaceAll(risks, ", ", "`, `") + "`"
	}
	return "plain TCP; one line in the log says why"
}

// Works is what was seen with any runtime, in the order of the first that did it.
func (s support) Works() (all []string) {
	for _, r := range s.Runtimes {
		for _, w := range r.Works {
			if !slices.Contains(all, w) {
				all = append(all, w)
			}
		}
	}
	return all
}

// cell is what a suite came to on a kernel.
func (k kernelResult) cell(suite string) string {
	for _, s := range k.Suites {
		if s.Name != suite {
			continue
		}
		text := fmt.Sprintf("%d passed", s.Passed)
		if s.Skipped > 0 {
			text += fmt.Sprintf(", %d skipped", s.Skipped)
		}
		if len(s.Scaled) > 0 {
			text += "; part"
		}
		return text
	}
	return notRun
}

const notRun = "not run"

// Left is what was not run or made smaller, each thing once with the kernels of which
// that is so.
func (s support) Left() []string {
	var what []string
	where := map[string][]string{}
	for _, k := range s.Kernels {
		for _, suite := range k.Suites {
			if !slices.ContainsFunc(suites, func(r ran) bool { return r.Name == suite.Name }) {
				continue
			}
			var all []string
			for _, text := range suite.Scaled {
				all = append(all, suite.Name+": "+text)
			}
			for _, text := range suite.Skips {
				all = append(all, "skipped "+text)
			}
			for _, text := range all {
				if where[text] == nil {
					what = append(what, text)
				}
				if name := k.Name(); !slices.Contains(where[text], name) {
					where[text] = append(where[text], name)
				}
			}
		}
	}
	for i, text := range what {
		what[i] = text + " (" + strings.Join(where[text], ", ") + ")"
	}
	return what
}

// Name is the kernel with the parameters that matter.
func (k kernelResult) Name() string { return strings.TrimSpace(k.Kernel + " " + k.Params) }

// VerdictOf is the verdict that a runtime's tests have told, or that of its kernel.
func (s support) VerdictOf(r runtimeResult) string {
	for _, k := range s.Kernels {
		if r.Verdict == "" && k.Name() == r.Kernel {
			return k.Verdict
		}
	}
	return cmp.Or(r.Verdict, notRun)
}

// Kubelet tells whether a kubelet has run pods.
func (s support) Kubelet() bool {
	return slices.ContainsFunc(s.Runtimes, func(r runtimeResult) bool { return strings.HasPrefix(r.Runtime, "kubelet ") })
}

// ARM64 tells whether a kernel of that architecture was run.
func (s support) ARM64() bool {
	return slices.ContainsFunc(s.Kernels, kernelResult.arm64)
}
