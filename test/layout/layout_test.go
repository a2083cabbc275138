// Package layout checks how the packages depend on each other.
package layout

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/skipstack/skipstack/"

type pkg struct {
	ImportPath, Name, Doc string
	Imports               []string
}

func packages(t *testing.T) []pkg {
	t.Helper()
	out, err := exec.Command("go", "list", "-json=ImportPath,Name,Doc,Imports", module+"...").Output()
	if err != nil {
		t.Fatal(err)
	}
	var all []pkg
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p pkg
		err := dec.Decode(&p)
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		p.ImportPath = strings.TrimPrefix(p.ImportPath, module)
		all = append(all, p)
	}
}

// within tells if a package is one of those, or below it where the name ends in "/...".
func within(name string, patterns ...string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool {
		dir, below := strings.CutSuffix(p, "/...")
		return name == dir || below && strings.HasPrefix(name, dir+"/")
	})
}

// Dependencies point inward: bpf, plugin, cmd. Tests may use what they test.
func TestImports(t *testing.T) {
	rules := []struct {
		of      string
		allowed []string // packages of this module; nothing else of it
	}{
		{"bpf/...", nil},
		{"plugin/regular", nil},
		{"plugin/uring", nil},
		{"plugin/podcgroup", nil},
		{"plugin/attachment", nil},
		{"plugin/podlog", []string{"plugin/attachment"}},
		{"plugin/datapath", []string{"bpf"}},
		{"plugin/verdict", []string{"bpf", "plugin/attachment", "plugin/datapath", "plugin/regular", "plugin/uring"}},
		{"plugin", []string{"plugin/..."}},
		{"conf", nil},
		{"cmd/...", []string{"bpf", "plugin/...", "cmd/...", "conf", "test/node"}}, // the benchmark runs in a private node
	}
	for _, p := range packages(t) {
		i := slices.IndexFunc(rules, func(r struct {
			of      string
			allowed []string
		}) bool {
			return within(p.ImportPath, r.of)
		})
		if i < 0 {
			if !within(p.ImportPath, "test/...") {
				t.Errorf("%s has no rule", p.ImportPath)
			}
			continue
		}
		for _, imp := range p.Imports {
			if name, ours := strings.CutPrefix(imp, module); ours && !within(name, rules[i].allowed...) {
				t.Errorf("%s imports %s", p.ImportPath, name)
			}
		}
	}
}

// Whoever wants something of the kernel's BPF asks these.
func TestOnlyTheDatapathKnowsBPF(t *testing.T) {
	for _, p := range packages(t) {
		if within(p.ImportPath, "bpf", "plugin/datapath", "plugin/verdict", "test/...") {
			continue
		}
		for _, imp := range p.Imports {
			if strings.HasPrefix(imp, "github.com/cilium/ebpf") {
				t.Errorf("%s imports %s", p.ImportPath, imp)
			}
		}
	}
}

func TestPackagesSayWhatTheyAre(t *testing.T) {
	for _, p := range packages(t) {
		want := "Package " + p.Name
		if p.Name == "main" {
			want = ""
		}
		if p.Doc == "" {
			// A package of tests alone has its comment where go list does not look.
			if len(p.Imports) > 0 || p.Name == "main" {
				t.Errorf("%s has no package comment", p.ImportPath)
			}
		} else if !strings.HasPrefix(p.Doc, want) {
			t.Errorf("%s: its comment begins %q, want %q", p.ImportPath, p.Doc, want)
		}
	}
}
