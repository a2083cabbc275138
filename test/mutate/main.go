// Mutate proves that the tests of the datapath can fail: it takes one rule after
// another out of the C source and expects a certain test to fail without it.
//
//	go run ./test/mutate [-run regexp] [-list]
//
// It works on copies; the checkout is not changed. It needs root, clang and
// llvm-strip, and the environment variables that `go generate ./bpf` needs: CLANG,
// LLVM_STRIP, BPF_CFLAGS.
package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"
)

// A mutation is a rule of the datapath that is taken out.
type mutation struct {
	name string
	file string // in bpf/
	old  string // must be there exactly once
	new  string
	test string // fails without the rule
	pkg  string // of the test; ./test/datapath if empty
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	flags := flag.NewFlagSet("mutate", flag.ContinueOnError)
	flags.SetOutput(stderr)
	only := flags.String("run", "", "only mutations whose name matches the `regexp`")
	list := flags.Bool("list", false, "list the mutations and check that their text is in the source")
	verbose := flags.Bool("v", false, "show what the tests said")
	if err := flags.Parse(args); err != nil {
		return 2
	}
	names, err := regexp.Compile(*only)
	if err != nil {
		fmt.Fprintln(stderr, err)
		return 2
	}
	m := mutator{stdout: stdout, verbose: *verbose}
	if err := m.prepare(ctx); err != nil {
		fmt.Fprintln(stderr, "mutate:", err)
		return 1
	}
	defer os.RemoveAll(m.tmp)
	failed := 0
	for _, mu := range mutations {
		if err := mu.check(m.bpf); err != nil {
			fmt.Fprintf(stdout, "ROTTEN    %s: %v\n", mu.name, err)
			failed++
		} else if *list {
			fmt.Fprintf(stdout, "%s: %s\n", mu.name, mu.test)
		}
	}
	if *list || failed > 0 {
		return min(failed, 1)
	}
	chosen := slices.DeleteFunc(slices.Clone(mutations), func(mu mutation) bool { return !names.MatchString(mu.name) })
	if err := m.baseline(ctx, chosen); err != nil {
		fmt.Fprintln(stderr, "mutate:", err)
		return 1
	}
	for _, mu := range chosen {
		start := time.Now()
		verdict, err := m.try(ctx, mu)
		if ctx.Err() != nil {
			return 1
		}
		if err != nil {
			verdict = "ERROR"
			fmt.Fprintln(stderr, err)
		}
		if verdict != killed {
			failed++
		}
		fmt.Fprintf(stdout, "%-9s %s (%s, %.0f s)\n", verdict, mu.name, mu.test, time.Since(start).Seconds())
	}
	if failed > 0 {
		fmt.Fprintf(stdout, "%d of %d rules can be taken out without their test failing\n", failed, len(chosen))
		return 1
	}
	fmt.Fprintf(stdout, "all %d tests fail without their rule\n", len(chosen))
	return 0
}

const (
	killed   = "ok"
	survived = "SURVIVED"
)

type mutator struct {
	stdout  io.Writer
	verbose bool
	root    string // of the module
	bpf     string
	tmp     string
	bpf2go  string
	args    []string // of bpf2go, from the go:generate directive
}

func (m *mutator) prepare(ctx context.Context) error {
	if os.Geteuid() != 0 {
		return errors.New("needs root: the tests load BPF programs")
	}
	gomod, err := output(ctx, "go", "env", "GOMOD")
	if err != nil {
		return err
	}
	m.root = filepath.Dir(gomod)
	m.bpf = filepath.Join(m.root, "bpf")
	if m.args, err = directive(filepath.Join(m.bpf, "generate.go")); err != nil {
		return err
	}
	if m.bpf2go, err = output(ctx, "go", "tool", "-n", "bpf2go"); err != nil {
		return err
	}
	m.tmp, err = os.MkdirTemp("", "skipstack-mutate-")
	return err
}

// directive returns the arguments that go generate would give bpf2go.
func directive(file string) ([]string, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	_, line, ok := strings.Cut(string(data), "//go:generate go tool bpf2go ")
	if !ok {
		return nil, fmt.Errorf("%s has no directive for bpf2go", file)
	}
	line, _, _ = strings.Cut(line, "\n")
	for _, name := range []string{"CLANG", "LLVM_STRIP", "BPF_CFLAGS"} {
		if _, ok := os.LookupEnv(name); !ok {
			return nil, fmt.Errorf("%s is not set; `make generate` says what it should be", name)
		}
	}
	var args []string
	for i, part := range strings.Split(os.ExpandEnv(line), `"`) {
		if i%2 == 1 {
			args = append(args, part)
		} else {
			args = append(args, strings.Fields(part)...)
		}
	}
	return args, nil
}

func (mu mutation) check(dir string) error {
	source, err := os.ReadFile(filepath.Join(dir, mu.file))
	if err != nil {
		return err
	}
	if n := strings.Count(string(source), mu.old); n != 1 {
		return fmt.Errorf("the text to take out is %d times in %s, want once", n, mu.file)
	}
	return nil
}

// baseline checks that every test passes as long as nothing is taken out.
func (m *mutator) baseline(ctx context.Context, chosen []mutation) error {
	type test struct{ pkg, name string }
	var tests []test
	for _, mu := range chosen {
		if t := (test{mu.pkg, mu.test}); !slices.Contains(tests, t) {
			tests = append(tests, t)
		}
	}
	overlay, err := m.build(ctx, nil)
	if err != nil {
		return err
	}
	for _, test := range tests {
		out, passed, err := m.test(ctx, overlay, test.pkg, test.name)
		if err != nil {
			return err
		}
		if !passed || !bytes.Contains(out, []byte("--- PASS: ")) {
			return fmt.Errorf("%s does not pass as it is:\n%s", test.name, out)
		}
	}
	return nil
}

// try says whether the mutation's test fails without the rule.
func (m *mutator) try(ctx context.Context, mu mutation) (string, error) {
	overlay, err := m.build(ctx, &mu)
	if err != nil {
		return "", fmt.Errorf("%s: %w", mu.name, err)
	}
	out, passed, err := m.test(ctx, overlay, mu.pkg, mu.test)
	if err != nil {
		return "", fmt.Errorf("%s: %w", mu.name, err)
	}
	if m.verbose {
		m.stdout.Write(out)
	}
	if passed {
		return survived, nil
	}
	// A mutant that the verifier refuses proves nothing.
	if bytes.Contains(out, []byte("kernel not supported")) || bytes.Contains(out, []byte("load BPF programs")) {
		return "", fmt.Errorf("%s: the mutant does not load:\n%s", mu.name, out)
	}
	if !bytes.Contains(out, []byte("--- FAIL: ")) {
		return "", fmt.Errorf("%s: no test failed:\n%s", mu.name, out)
	}
	return killed, nil
}

// build compiles the programs, without the rule of the mutation if there is one,
// and returns the overlay that puts them in the place of the committed ones.
func (m *mutator) build(ctx context.Context, mu *mutation) (overlay string, err error) {
	dir, err := os.MkdirTemp(m.tmp, "bpf-")
	if err != nil {
		return "", err
	}
	sources, err := filepath.Glob(filepath.Join(m.bpf, "*.[ch]"))
	if err != nil {
		return "", err
	}
	for _, path := range sources {
		data, err := os.ReadFile(path)
		if err != nil {
			return "", err
		}
		if mu != nil && filepath.Base(path) == mu.file {
			data = bytes.Replace(data, []byte(mu.old), []byte(mu.new), 1)
		}
		if err := os.WriteFile(filepath.Join(dir, filepath.Base(path)), data, 0o600); err != nil {
			return "", err
		}
	}
	// What a rule needed may now be unused.
	cmd := exec.CommandContext(ctx, m.bpf2go, noWerror(m.args)...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "GOPACKAGE=bpf")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("compile: %w\n%s", err, out)
	}
	replace := map[string]string{}
	for _, name := range []string{"datapath_bpfel.go", "datapath_bpfel.o"} {
		replace[filepath.Join(m.bpf, name)] = filepath.Join(dir, name)
	}
	data, err := json.Marshal(map[string]any{"Replace": replace})
	if err != nil {
		return "", err
	}
	overlay = filepath.Join(dir, "overlay.json")
	return overlay, os.WriteFile(overlay, data, 0o600)
}

func noWerror(args []string) []string {
	args = slices.Clone(args)
	for i := range args {
		args[i] = strings.ReplaceAll(args[i], "-Werror", "")
	}
	return args
}

func (m *mutator) test(ctx context.Context, overlay, pkg, test string) (out []byte, passed bool, err error) {
	cmd := exec.CommandContext(ctx, "go", "test", "-overlay="+overlay, "-count=1", "-v", "-failfast", "-timeout=20m", "-run", test, cmp.Or(pkg, "./test/datapath"))
	cmd.Dir = m.root
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	out, err = cmd.CombinedOutput()
	if err == nil {
		return out, true, nil
	}
	var exit *exec.ExitError
	if !errors.As(err, &exit) || ctx.Err() != nil || bytes.Contains(out, []byte("[build failed]")) {
		return nil, false, fmt.Errorf("go test: %w\n%s", err, out)
	}
	return out, false, nil
}

func output(ctx context.Context, name string, args ...string) (string, error) {
	out, err := exec.CommandContext(ctx, name, args...).Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			return "", fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, exit.Stderr)
		}
		return "", err
	}
	return strings.TrimSpace(string(out)), nil
}
