package node

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
)

const workerEnv = "SKIPSTACK_NODE_WORKER"

// ProgramsEnv is the environment variable that names the directory of the programs
// in [MainOptions]. [Main] sets it, unless it is set: where nothing can be built,
// somebody else has put them there.
const ProgramsEnv = "SKIPSTACK_NODE_PROGRAMS"

// A Worker is a function that a test runs as a process of its own, in a pod.
type Worker func(args []string) (exit int)

// MainOptions are what a test package needs of [Main].
type MainOptions struct {
	Workers map[string]Worker // for [WorkerCommand]
	Build   []string          // main packages, for example ./cmd/skipstack by import path
	Tools   []string          // tools of go.mod by short name, for example bridge
	// Prepare, if set, runs first, where the network and the machine's files are.
	// It returns what is to be done there at the end, if anything.
	Prepare func(ctx context.Context) (clean func(), err error)
}

// Main runs a test package in a private machine, and fails if it leaves something
// behind there. TestMain calls os.Exit with its result. Without root the tests
// run where they are; those that need a node skip by [Need]. So they do with
// -fuzz, whose workers talk to the go command's process over inherited files; and
// with -list nothing is made or built.
//
// The programs in Build and Tools are built first and found by every node as
// CNI plugins.
func Main(m interface{ Run() int }, o MainOptions) int {
	if name := os.Getenv(workerEnv); name != "" {
		worker, ok := o.Workers[name]
		if !ok {
			fmt.Fprintf(os.Stderr, "unknown worker %q\n", name)
			return 2
		}
		return worker(os.Args[1:])
	}
	if os.Geteuid() != 0 || fuzzingOrListing() {
		return m.Run()
	}
	exit, err := run(m, o)
	if err != nil {
		fmt.Fprintln(os.Stderr, "private machine for the tests:", err)
		exit = max(exit, 1)
	}
	return exit
}

// fuzzingOrListing tells if this is a test program that runs no tests, or fuzzes.
func fuzzingOrListing() bool {
	for _, name := range []string{"test.fuzz", "test.fuzzworker", "test.list"} {
		f := flag.Lookup(name)
		if f == nil { // not a test program
			return false
		}
		if !flag.Parsed() {
			flag.Parse()
		}
		if f.Value.String() != f.DefValue {
			return true
		}
	}
	return false
}

func run(m interface{ Run() int }, o MainOptions) (int, error) {
	if !Isolated() {
		ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
		defer stop()
		env := os.Environ()
		if o.Prepare != nil {
			clean, err := o.Prepare(ctx)
			if err != nil {
				return 1, err
			}
			if clean != nil {
				defer clean()
			}
		}
		if len(o.Build)+len(o.Tools) > 0 && ProgramDir() == "" {
			dir, remove, err := buildPrograms(ctx, o)
			if err != nil {
				return 1, err
			}
			defer remove()
			env = append(env, ProgramsEnv+"="+dir)
		}
		return Isolate(ctx, Command{Args: os.Args[1:], Env: env, Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr})
	}
	// Programs that tests run would inherit what nohup(1) has told this one.
	if signal.Ignored(syscall.SIGHUP) {
		signal.Notify(make(chan os.Signal, 1), syscall.SIGHUP)
	}
	machine, err := Prepare()
	if err != nil {
		return 1, err
	}
	exit := m.Run()
	left, err := machine.Leftovers()
	if err == nil && len(left) > 0 {
		err = fmt.Errorf("%w:\n%s", ErrLeftover, strings.Join(left, "\n"))
	}
	return exit, err
}

// buildPrograms builds what the tests run into a new directory. It works outside
// the private network, where modules can be fetched.
func buildPrograms(ctx context.Context, o MainOptions) (dir string, remove func(), err error) {
	if err := sweep(os.TempDir(), os.RemoveAll); err != nil {
		return "", nil, err
	}
	dir, lock, err := lockedDir(os.TempDir())
	if err != nil {
		return "", nil, err
	}
	remove = func() {
		os.RemoveAll(dir)
		lock.Close()
	}
	if err := buildInto(ctx, dir, o); err != nil {
		remove()
		return "", nil, err
	}
	return dir, remove, nil
}

func buildInto(ctx context.Context, dir string, o MainOptions) error {
	if len(o.Build) > 0 {
		if _, err := goCommand(ctx, append([]string{"build", "-buildvcs=false", "-o", dir + "/"}, o.Build...)...); err != nil {
			return err
		}
	}
	for _, tool := range o.Tools {
		// The go command keeps the programs of tools in its cache.
		path, err := goCommand(ctx, "tool", "-n", tool)
		if err != nil {
			return err
		}
		if err := os.Symlink(path, filepath.Join(dir, tool)); err != nil {
			return fmt.Errorf("link tool %s: %w", tool, err)
		}
	}
	return nil
}

func goCommand(ctx context.Context, args ...string) (string, error) {
	var stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("go %s: %w\n%s", strings.Join(args, " "), err, stderr.Bytes())
	}
	return strings.TrimSpace(string(out)), nil
}

// ProgramDir is the directory of the programs in [MainOptions]; empty if there are none.
func ProgramDir() string { return os.Getenv(ProgramsEnv) }

// WorkerCommand makes the command that runs a worker of [MainOptions].
func WorkerCommand(name string, args ...string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe", args...)
	// A program built with -race sleeps a second at its end unless told otherwise.
	cmd.Env = append(os.Environ(), workerEnv+"="+name, "GORACE=atexit_sleep_ms=0 "+os.Getenv("GORACE"))
	cmd.Stderr = os.Stderr
	return cmd
}

// TB is the part of testing.TB that the fixture uses.
type TB interface {
	Helper()
	Skip(args ...any)
	Fatal(args ...any)
	Error(args ...any)
	Cleanup(func())
}

// Need skips the test where no node can be made.
func Need(t TB) {
	t.Helper()
	if !Isolated() {
		t.Skip("needs root: private mount, network, cgroup and PID namespaces")
	}
}

// ForTest is [Need] and [New]. At the test's end the node's pods are closed, and the
// test fails if they left something on the node.
func ForTest(t TB, o Options) *Node {
	t.Helper()
	Need(t)
	n, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if left, err := n.ClosePods(); err != nil || len(left) > 0 {
			t.Error(ErrLeftover, left, err)
		}
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	})
	return n
}
