// Package bench measures same-node TCP between two pods with and without skipstack,
// and proves from counters that the accelerated runs were accelerated.
//
// Plain and accelerated runs differ in one thing: the cgroup that the processes are
// born in. Pods, network namespaces, addresses, path, socket options and CPUs
// are the same, and the runs alternate.
//
// The generators' sockets block unless told otherwise (--sockets), as those of
// netperf do: a loop of send and recv has nothing in it but the two system calls, and
// what is compared is the way between them. An event loop adds the same
// poll(2) and failed recv(2) to both kinds of run, which brings every ratio
// nearer to one without saying more about the path.
package bench

import (
	"fmt"
	"io"
	"os"
	"os/signal"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/test/node"
)

// Exit codes of the command.
const (
	ExitProven     = 0
	ExitNotProven  = 1 // or the bench did not come to its end
	ExitUsage      = 2 // or it cannot be run here: nothing was created
	ExitNotAllowed = 3 // the kernel's verdict does not allow acceleration
)

// An ExitError ends the program with a code.
type ExitError struct {
	Code int
	Err  error // nil: everything has been said
}

func (e *ExitError) Error() string {
	if e.Err == nil {
		return ""
	}
	return e.Err.Error()
}

func (e *ExitError) Unwrap() error { return e.Err }

// ExitCode is the program's exit code.
func (e *ExitError) ExitCode() int { return e.Code }

// Config is what the command needs of the program around it.
type Config struct {
	Env         []string // of the program; for processes that the bench starts
	In          io.Reader
	Out, ErrOut io.Writer
}

// NewCommand returns the command `bench`. Its errors wrap [*ExitError].
func NewCommand(c Config) *cobra.Command {
	var flags flags
	cmd := &cobra.Command{
		Use:   "bench",
		Short: "Measure two pods with and without skipstack, and prove that the bypass took place",
		Long: `Measure TCP between two pods with and without skipstack, and prove that the
bypass took place.

Three sets of points: the default takes under 3 minutes, --quick under 20
seconds, --full all there is; how long is said first. Of a set, --tests,
--paths, --placements and --sizes choose. --quick with --sizes is rr and stream
of these sizes, and crr, on path pod and one CPU.

By default the pods are those of a private node, which has its own mount,
network, cgroup and PID namespaces: nothing of this machine is touched, and
everything is removed at the end. They are made through libcni by the chain
bridge, host-local, skipstack; where the first two are not in --cni-path, veth
and bridge are made by netlink. With --conflist the two pods are made on this
node by a chain of your own. What a killed bench has left is removed first,
such pods by the plugins that made them.

Plain and accelerated runs differ only in the cgroup of the processes, and
alternate. Where the ratio of a point is uncertain after the pairs of runs that
every point has, more pairs follow, up to --max-pairs and in the set's time;
--full takes the time that it needs. A ratio that stays uncertain has a ?.

Exit codes: 0 the bypass is proven for every point (and with --check no point
is slower than --min-speedup), 1 it is not (or the bench failed), 2 the bench
cannot be run as asked and nothing was created, 3 the kernel's verdict does
not allow acceleration.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			defer holdSignals(c.ErrOut)()
			o, err := flags.options(c, cmd)
			if err != nil {
				return &ExitError{ExitUsage, err}
			}
			if node.Isolated() {
				return inside(cmd.Context(), c, o)
			}
			return outside(cmd.Context(), c, o, append([]string{"bench"}, setFlags(cmd)...))
		},
	}
	flags.add(cmd)
	cmd.AddCommand(newServeCommand(c), newClientCommand(c), &cobra.Command{
		Use: workerCommand, Hidden: true, Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			if code := runWorker(c.In, c.Out, c.ErrOut); code != 0 {
				return &ExitError{Code: code}
			}
			return nil
		},
	})
	return cmd
}

// holdSignals keeps further signals from breaking off the removal of what was created,
// which has time limits of its own, until release is called.
func holdSignals(log io.Writer) (release func()) {
	signals, done := make(chan os.Signal, 1), make(chan struct{})
	signal.Notify(signals, unix.SIGINT, unix.SIGTERM, unix.SIGHUP)
	go func() {
		for n := 1; ; n++ {
			select {
			case <-signals:
				if n == 2 {
					fmt.Fprintln(log, "bench: removing what was created; it takes some seconds")
				}
			case <-done:
				return
			}
		}
	}()
	return func() {
		signal.Stop(signals)
		close(done)
	}
}

// setFlags repeats the flags that were set.
func setFlags(cmd *cobra.Command) []string {
	var args []string
	cmd.Flags().Visit(func(f *pflag.Flag) { args = append(args, "--"+f.Name+"="+f.Value.String()) })
	return args
}
