package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func parsed(t *testing.T, args ...string) (s *suite, out string, exit int, done bool) {
	t.Helper()
	var stdout, stderr bytes.Buffer
	s = &suite{out: &stdout, errs: &stderr, args: args}
	exit, done = s.parse(&stdout, &stderr)
	return s, stdout.String() + stderr.String(), exit, done
}

func TestCasesCanBeToldApart(t *testing.T) {
	seen := map[string]bool{}
	for _, c := range allCases() {
		if seen[c.String()] {
			t.Errorf("there are two cases %q", c)
		}
		seen[c.String()] = true
		if c.run == nil || c.blocking != "" && c.splices {
			t.Errorf("%s: incomplete or contradictory", c)
		}
	}
}

func TestArguments(t *testing.T) {
	all := len(allCases())
	s, _, _, done := parsed(t, "-ci")
	if done || len(s.cases) == 0 || len(s.cases) == all {
		t.Errorf("-ci chooses %d of %d cases", len(s.cases), all)
	}
	s, _, _, done = parsed(t, "-run", "^nginx: static$")
	if done || len(s.cases) != 1 || s.cases[0].name != "static" {
		t.Errorf("-run chooses %v", s.cases)
	}
	s, out, exit, done := parsed(t, "-list")
	if _, err := s.prepare(t.Context()); err != nil || s.out.(*bytes.Buffer).Len() > len(out) {
		t.Errorf("-list says it before the private machine is made, too: %v", err)
	}
	if !done || exit != 0 || strings.Count(out, "\n") != all {
		t.Errorf("-list: exit %d, done %v, %q", exit, done, out)
	}
	for _, bad := range [][]string{{"-run", "("}, {"-run", "no such case"}, {"-nonsense"}, {"word"}} {
		if _, out, exit, done := parsed(t, bad...); !done || exit != 2 || out == "" {
			t.Errorf("%q: exit %d, done %v, %q", bad, exit, done, out)
		}
	}
}

// Debian's packages link to absolute paths, which lead out of the place where they
// are unpacked.
func TestRelink(t *testing.T) {
	root := filepath.Join(t.TempDir(), "root")
	if err := os.MkdirAll(filepath.Join(root, "etc"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(root, "usr/lib"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(root, "etc/inside"), []byte("inside"), 0o644); err != nil {
		t.Fatal(err)
	}
	for name, to := range map[string]string{"a": "/etc/inside", "b": "../../etc/inside", "c": "/etc/not-unpacked"} {
		if err := os.Symlink(to, filepath.Join(root, "usr/lib", name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := relink(root); err != nil {
		t.Fatal(err)
	}
	moved := root + "-moved"
	if err := os.Rename(root, moved); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"a", "b"} {
		if got, err := os.ReadFile(filepath.Join(moved, "usr/lib", name)); err != nil || string(got) != "inside" {
			t.Errorf("link %s: %q, %v", name, got, err)
		}
	}
	if to, err := os.Readlink(filepath.Join(moved, "usr/lib/c")); err != nil || to != "/etc/not-unpacked" {
		t.Errorf("link c leads to %s, %v", to, err)
	}
}

func TestNothingToUnpack(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "packages"), []byte("a\nb\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := unpack(t.Context(), dir, []string{"b", "a", "b"}, t.Output()); err != nil {
		t.Error(err)
	}
	t.Setenv("PATH", "")
	if err := unpack(t.Context(), dir, []string{"a", "c"}, t.Output()); err == nil || !strings.Contains(err.Error(), "there is no apt-get") {
		t.Errorf("without apt-get: %v", err)
	}
}

func TestDifference(t *testing.T) {
	for _, tc := range []struct{ want, got, says string }{
		{"a\nb", "a\nc", `line 2: "c", want "b"`},
		{"a", "a\nb", `line 2: "b", want "(nothing)"`},
		{"a\nb", "a", `line 2: "(nothing)", want "b"`},
	} {
		if says := difference(tc.want, tc.got); says != tc.says {
			t.Errorf("difference(%q, %q) = %s", tc.want, tc.got, says)
		}
	}
}
