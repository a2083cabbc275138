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
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"time"

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

// options are what the command line asks for.
type options struct {
	quick   bool
	cniPath string
	json    string
	sockets string
}

// defaultCNIPath is where distributions and kubeadm put CNI plugins.
const defaultCNIPath = "/opt/cni/bin"

// NewCommand returns the command `bench`. Its errors wrap [*ExitError].
func NewCommand(c Config) *cobra.Command {
	var o options
	cmd := &cobra.Command{
		Use:   "bench",
		Short: "Measure two pods with and without skipstack, and prove that the bypass took place",
		Long: `Measure TCP between two pods of a private node with and without skipstack.

The node has its own mount, network, cgroup and PID namespaces: nothing of this
machine is touched, and everything is removed at the end. Its pods are made
through libcni by the chain bridge, host-local, skipstack. Plain and accelerated
runs differ only in the cgroup of the processes, and alternate.

Exit codes: 0 the bypass is proven for every point, 1 it is not (or the bench
failed), 2 the bench cannot be run as asked, 3 the kernel's verdict does not
allow acceleration.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			// The caller's context ends on the other signals.
			ctx, stop := signal.NotifyContext(cmd.Context(), unix.SIGHUP)
			defer stop()
			if node.Isolated() {
				return inside(ctx, c, o)
			}
			return outside(ctx, c, o, append([]string{"bench"}, setFlags(cmd)...))
		},
	}
	cmd.Flags().BoolVar(&o.quick, "quick", false, "measure a small set in under 20 seconds")
	cmd.Flags().StringVar(&o.cniPath, "cni-path", defaultCNIPath, "`DIRECTORY` of the CNI plugins bridge and host-local")
	cmd.Flags().StringVar(&o.json, "json", "", "also write the results as JSON to this `FILE`; - is standard output, the table then goes to standard error")
	cmd.Flags().StringVar(&o.sockets, "sockets", "blocking", "what the generators use: blocking, or nonblocking with poll(2)")
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

// setFlags repeats the flags that were set.
func setFlags(cmd *cobra.Command) []string {
	var args []string
	cmd.Flags().Visit(func(f *pflag.Flag) { args = append(args, "--"+f.Name+"="+f.Value.String()) })
	return args
}

// resultFD is where the isolated bench writes its JSON: files that its caller can
// name may be hidden from it.
const resultFD = 3

// outside checks what can be checked before anything is created, and runs the bench
// in private namespaces.
func outside(ctx context.Context, c Config, o options, args []string) error {
	if err := check(o); err != nil {
		return &ExitError{ExitUsage, err}
	}
	resultRead, resultWrite, err := os.Pipe()
	if err != nil {
		return &ExitError{ExitNotProven, err}
	}
	defer resultRead.Close()
	var result bytes.Buffer
	copied := make(chan error, 1)
	go func() {
		_, err := io.Copy(&result, resultRead)
		copied <- err
	}()
	code, err := node.Isolate(ctx, node.Command{
		Args: args, Env: c.Env, Stdin: c.In, Stdout: c.Out, Stderr: c.ErrOut,
		ExtraFiles: []*os.File{resultWrite},
	})
	resultWrite.Close()
	if err != nil && !errors.Is(err, node.ErrLeftover) {
		return &ExitError{ExitUsage, err} // it did not begin
	}
	err = errors.Join(err, <-copied)
	if err == nil && result.Len() > 0 {
		err = writeResult(o.json, result.Bytes(), c.Out)
	}
	if code == ExitProven && err == nil {
		return nil
	}
	return &ExitError{max(code, ExitNotProven), err}
}

func writeResult(path string, result []byte, stdout io.Writer) error {
	if path == "-" {
		_, err := stdout.Write(result)
		return err
	}
	if err := os.WriteFile(path, result, 0o644); err != nil {
		return fmt.Errorf("write the results: %w", err)
	}
	return nil
}

// check finds out whether the bench can be run as asked.
func check(o options) error {
	if !o.quick {
		return errors.New("say --quick: it is the only set of points so far")
	}
	if o.sockets != "blocking" && o.sockets != "nonblocking" {
		return fmt.Errorf("--sockets %q: it is blocking or nonblocking", o.sockets)
	}
	if o.json != "" && o.json != "-" {
		if err := unix.Access(filepath.Dir(o.json), unix.W_OK); err != nil {
			return fmt.Errorf("--json %s: its directory is not writable: %w", o.json, err)
		}
	}
	if os.Geteuid() != 0 {
		return node.ErrPrivilege
	}
	for _, plugin := range requiredPlugins {
		path := filepath.Join(o.cniPath, plugin)
		if _, err := exec.LookPath(path); err != nil {
			return fmt.Errorf("no CNI plugin %s in %s: name its directory with --cni-path (in the source tree, `make plugins` builds it in bin/cni): %w", plugin, o.cniPath, err)
		}
	}
	program, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find this program: %w", err)
	}
	cniPath, err := filepath.Abs(o.cniPath)
	if err != nil {
		return fmt.Errorf("--cni-path: %w", err)
	}
	for _, path := range []string{program, cniPath} {
		if strings.HasPrefix(path, "/run/") {
			return fmt.Errorf("%s cannot be used: the private node has a /run of its own", path)
		}
	}
	return nil
}

// quickParameters fit the quick set into 20 seconds.
func quickParameters(o options) Parameters {
	return Parameters{Repeats: 5, WarmUp: 10 * time.Millisecond, Length: minLength, NonBlocking: o.sockets == "nonblocking"}
}

// inside is the bench in its private namespaces.
func inside(ctx context.Context, c Config, o options) error {
	machine, err := node.Prepare()
	if err != nil {
		return &ExitError{ExitNotProven, fmt.Errorf("prepare private namespaces: %w", err)}
	}
	program, err := os.Executable()
	if err != nil {
		return &ExitError{ExitNotProven, fmt.Errorf("find this program: %w", err)}
	}
	cniPath, err := filepath.Abs(o.cniPath)
	if err != nil {
		return &ExitError{ExitNotProven, fmt.Errorf("--cni-path: %w", err)}
	}
	fmt.Fprintln(c.ErrOut, "bench: making a private node with two pods")
	site, err := newPrivateSite(ctx, privateOptions{
		cniPath: cniPath, program: program, stderr: c.ErrOut, mode: "on",
		worker: func() *exec.Cmd { return selfWorker(c.Env) },
	})
	var report *Report
	if err == nil {
		report, err = measureAll(ctx, site, quickParameters(o), quickPoints, c.ErrOut)
	}
	// What is measured is told, even if cleaning up fails then.
	if report != nil {
		out := c.Out
		if o.json == "-" {
			out = c.ErrOut
		}
		err = errors.Join(err, report.writeText(out))
	}
	err = errors.Join(err, site.close())
	if left, leftErr := machine.Leftovers(); leftErr != nil || len(left) > 0 {
		err = errors.Join(err, leftErr, fmt.Errorf("%w:\n%s", node.ErrLeftover, strings.Join(left, "\n")))
	}
	if report != nil && o.json != "" {
		err = errors.Join(err, report.writeJSON(os.NewFile(resultFD, "results")))
	}
	switch {
	case ctx.Err() != nil:
		return &ExitError{ExitNotProven, errors.Join(errors.New("interrupted: nothing is proven, and what was created is removed"), onlyLeftover(err))}
	case errors.Is(err, errNotAllowed):
		return &ExitError{ExitNotAllowed, err}
	case err != nil:
		return &ExitError{ExitNotProven, err}
	case !report.Proven():
		return &ExitError{ExitNotProven, errors.New("the bypass is not proven")}
	}
	return nil
}

// onlyLeftover hides errors that an interruption causes everywhere.
func onlyLeftover(err error) error {
	if errors.Is(err, node.ErrLeftover) {
		return err
	}
	return nil
}

// measureAll runs a set of points, which depends on the number of CPUs, at a site.
func measureAll(ctx context.Context, s site, p Parameters, set func(cpus int) []Point, log io.Writer) (*Report, error) {
	if err := p.validate(); err != nil {
		return nil, err
	}
	cpus, err := allowedCPUs()
	if err != nil {
		return nil, err
	}
	r := &runner{site: s, parameters: p, cpus: cpus, log: log}
	points := set(len(cpus))
	report := newReport(p, s.facts())
	var verified Path
	for i, point := range points {
		if point.Path != verified {
			bytes, err := r.verify(ctx, point.Path)
			if err != nil {
				return nil, err
			}
			fmt.Fprintf(log, "bench: path %s: %s of data verified\n", point.Path, quantity(float64(bytes), "B"))
			verified = point.Path
			report.Header.Verified += bytes
		}
		result, err := r.measure(ctx, point)
		if err != nil {
			return nil, err
		}
		report.Points = append(report.Points, result)
		fmt.Fprintf(log, "bench: %d/%d %s: ratio %.2f, %s\n", i+1, len(points), point, result.Speedup, result.proof())
	}
	return report, nil
}
