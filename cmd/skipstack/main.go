// Command skipstack is a CNI chained plugin and its command line.
//
// It is the plugin if CNI_COMMAND is set and there are no arguments, as a container
// runtime calls it; otherwise the command line. An administrator's shell may well
// have CNI_COMMAND set.
package main

import (
	"context"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/cmd/internal/bench"
	"github.com/skipstack/skipstack/cmd/internal/cli"
	"github.com/skipstack/skipstack/plugin"
	"github.com/skipstack/skipstack/plugin/verdict"
)

func main() {
	os.Exit(run(os.Environ(), os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}

// run runs the program and returns its exit code. args do not include the
// program's name.
func run(env, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	deps := plugin.System(env, stderr)
	switch {
	case len(args) == 0 && isSet(env, "CNI_COMMAND"):
		return plugin.Main(deps, stdout, stderr)
	case len(args) > 0 && args[0] == verdict.WorkerArg:
		return verdict.Worker(args[1:], stdin, stdout)
	}
	// The first signal ends what is under way in an orderly manner, the second
	// at once.
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop)
	// A terminal that goes away may say so twice: once by the shell, once by the kernel.
	if !signal.Ignored(unix.SIGHUP) { // as nohup(1) has it
		var stop func()
		ctx, stop = signal.NotifyContext(ctx, unix.SIGHUP)
		defer stop()
	}
	return cli.Run(ctx, args, cli.Streams{In: stdin, Out: stdout, Err: stderr, Colour: colour(env, stdout)}, deps,
		bench.NewCommand(bench.Config{Env: env, In: stdin, Out: stdout, ErrOut: stderr}))
}

// isSet says whether the variable has a value, as CNI counts an empty one as
// absent.
func isSet(env []string, name string) bool {
	for _, kv := range env {
		if value, ok := strings.CutPrefix(kv, name+"="); ok && value != "" {
			return true
		}
	}
	return false
}

// colour says whether what goes to out may be coloured: it is a terminal that can,
// and NO_COLOR is not set (no-color.org).
func colour(env []string, out io.Writer) bool {
	f, ok := out.(*os.File)
	if !ok || isSet(env, "NO_COLOR") || slices.Contains(env, "TERM=dumb") || !isSet(env, "TERM") {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}
