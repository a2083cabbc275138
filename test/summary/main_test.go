package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const pass = `{"Action":"pass","Package":"github.com/skipstack/skipstack/bpf","Test":"TestA"}` + "\n"

func TestSummary(t *testing.T) {
	allow := filepath.Join(t.TempDir(), "allow")
	if err := os.WriteFile(allow, []byte("# why\nbpf TestB needs a new kernel\nbpf TestC/... needs root\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	skip := func(name string) string {
		return `{"Action":"output","Package":"github.com/skipstack/skipstack/bpf","Test":"` + name + `","Output":"    x_test.go:1: needs root\n"}` + "\n" +
			`{"Action":"skip","Package":"github.com/skipstack/skipstack/bpf","Test":"` + name + `"}` + "\n"
	}
	for _, tc := range []struct {
		name, in string
		exit     int
		want     string
	}{
		{"all passed", pass, 0, "1 passed, 0 failed, 0 skipped"},
		{"a listed skip", pass + skip("TestB"), 0, "needs root"},
		{"a listed subtest", pass + skip("TestC/one/two"), 0, "1 skipped"},
		{"an unlisted skip", pass + skip("TestD"), 1, "not on the allow-list: bpf TestD"},
		{"a failure", pass + `{"Action":"fail","Package":"p","Test":"TestE"}`, 1, "failed: p TestE"},
		{"a package that does not build", pass + `{"Action":"fail","Package":"p"}`, 1, "FAIL  p"},
		{"nothing ran", "", 1, "0 passed"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var out, errs strings.Builder
			exit := run([]string{"-allow", allow}, strings.NewReader(tc.in), &out, &errs)
			if exit != tc.exit || !strings.Contains(out.String(), tc.want) {
				t.Errorf("exit %d, want %d, and %q in:\n%s%s", exit, tc.exit, tc.want, out.String(), errs.String())
			}
		})
	}
}
