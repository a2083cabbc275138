package bench

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/plugin/datapath"
	"github.com/skipstack/skipstack/test/node"
)

// resultFD is where the isolated bench writes its JSON: files that its caller can
// name may be hidden from it.
const resultFD = 3

// outside checks what can be checked before anything is created, and runs the bench
// in private namespaces.
func outside(ctx context.Context, c Config, o options, args []string) error {
	chain, err := o.checkMachine()
	switch {
	case errors.Is(err, datapath.ErrUnsupported):
		return &ExitError{ExitNotAllowed, fmt.Errorf("the kernel's verdict is unsupported: %w", err)}
	case err != nil:
		return &ExitError{ExitUsage, err}
	case o.conflist != "":
		return here(ctx, c, o, chain)
	}
	if err := o.sweepHere(ctx, c); err != nil {
		return &ExitError{ExitNotProven, err}
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
	if said := lastWords(ctx, code); said != nil {
		return &ExitError{ExitNotProven, errors.Join(said, err)}
	}
	if result.Len() > 0 { // what was measured, whatever failed then
		_, watched, stop := untilClosed(ctx, c)
		defer stop()
		var report Report
		writeErr := json.Unmarshal(result.Bytes(), &report)
		if writeErr == nil {
			writeErr = o.writeFiles(ctx, &report, watched.Out)
		}
		err = errors.Join(err, writeErr)
	}
	if code == ExitProven && err == nil {
		return nil
	}
	return &ExitError{max(code, ExitNotProven), err}
}

// lastWords says in place of the isolated bench why it ended, if a signal did that.
func lastWords(ctx context.Context, code int) error {
	const signalled = 128 // see node.Isolate
	switch s := unix.Signal(code - signalled); {
	case code <= signalled:
		return nil
	case ctx.Err() != nil:
		return errors.New("interrupted: nothing is proven; the private node did not end in time and was killed, with all that it had")
	case s == unix.SIGKILL:
		return errors.New("the private node was killed (SIGKILL): nothing is proven; if nobody did it, memory was short: the kernel log says so")
	default:
		return fmt.Errorf("the private node was ended by a signal (%v): nothing is proven", s)
	}
}

// inside is the bench in its private namespaces.
func inside(ctx context.Context, c Config, o options) error {
	stderr, worker := c.ErrOut, func() *exec.Cmd { return selfWorker(c.Env) }
	ctx, c, stop := untilClosed(ctx, c)
	defer stop()
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
		cniPath: cniPath, program: program, stderr: stderr, mode: "on", worker: worker,
	})
	report, err := o.session(ctx, c, site, err)
	err = errors.Join(err, site.close())
	if left, leftErr := machine.Leftovers(); leftErr != nil || len(left) > 0 {
		err = errors.Join(err, leftErr, fmt.Errorf("%w:\n%s", node.ErrLeftover, strings.Join(left, "\n")))
	}
	if report != nil {
		err = errors.Join(err, report.writeJSON(os.NewFile(resultFD, "results")))
	}
	return o.verdict(ctx, report, err)
}

// session measures at a site, unless there was an error in making it, and prints
// what came of it.
func (o options) session(ctx context.Context, c Config, s site, err error) (*Report, error) {
	if err != nil {
		return nil, err
	}
	points, err := o.points()
	if err != nil {
		return nil, err
	}
	report, err := measureAll(ctx, s, parameters(o), points, c.ErrOut)
	if report == nil {
		return nil, err
	}
	out := o.table(c)
	// What is measured is told, even if something fails then.
	return report, errors.Join(err, report.writeText(out), o.writeCheck(report, out))
}

// verdict makes the command's outcome of what was measured and what failed.
func (o options) verdict(ctx context.Context, report *Report, err error) error {
	switch {
	case ctx.Err() != nil && errors.Is(err, node.ErrLeftover):
		return &ExitError{ExitNotProven, errors.Join(errors.New("interrupted: nothing is proven"), err)}
	case ctx.Err() != nil: // which causes errors everywhere
		return &ExitError{ExitNotProven, errors.New("interrupted: nothing is proven, and what was created is removed")}
	case errors.Is(err, errNotAllowed):
		return &ExitError{ExitNotAllowed, err}
	case err != nil:
		return &ExitError{ExitNotProven, err}
	case len(report.Points) == 0:
		return &ExitError{ExitNotProven, errors.New("nothing was measured")}
	case !report.Proven():
		return &ExitError{ExitNotProven, errors.New("the bypass is not proven")}
	case o.check && len(o.notMeasured(report)) > 0:
		return &ExitError{ExitNotProven, fmt.Errorf("--paths names what could not be measured: %s", joined(o.notMeasured(report)))}
	case o.check && len(report.slower(o.minSpeedup)) > 0:
		return &ExitError{ExitNotProven, fmt.Errorf("at %d of %s skipstack is slower than %.2f times plain TCP", len(report.slower(o.minSpeedup)), pointsCount(len(report.Points)), o.minSpeedup)}
	}
	return nil
}

// notMeasured lists the paths that the user has named and the site does not have.
func (o options) notMeasured(r *Report) []Path {
	return slices.DeleteFunc(slices.Clone(r.missing), func(p Path) bool { return !slices.Contains(o.selection.paths, p) })
}

// errNoPath is returned where a site has no such path.
var errNoPath = errors.New("no such path here")

// measureAll measures points at a site. What was measured before an error comes with it,
// if there is something.
func measureAll(ctx context.Context, s site, p Parameters, points []Point, log io.Writer) (*Report, error) {
	if err := p.validate(); err != nil {
		return nil, err
	}
	cpus, err := allowedCPUs()
	if err != nil {
		return nil, err
	}
	r := &runner{site: s, parameters: p, cpus: cpus, log: log, reference: p.reference(points)}
	if judge, ok := s.(interface{ rules() *rules }); ok {
		r.rules = judge.rules()
	}
	if r.interruptsApart, err = interruptsApart(); err != nil {
		return nil, err
	}
	start := time.Now()
	report := newReport(p, s.facts())
	report.Header.InterruptsApart, report.Header.Reference = r.interruptsApart, r.reference.howOften()
	fmt.Fprintf(log, "bench: %s, %s\n", pointsCount(len(points)), p.howLong(points))
	if report.Header.Reference != "" {
		fmt.Fprintf(log, "bench: AF_UNIX: %s\n", report.Header.Reference)
	}
	if err = r.measureStages(ctx, start, points, report); err == nil {
		err = r.costs(ctx, report)
	}
	report.Header.Duration = time.Since(start).Seconds()
	return report.endedBy(err)
}

// measureStages measures points and adds them to the report, also those before an error.
func (r *runner) measureStages(ctx context.Context, start time.Time, points []Point, report *Report) error {
	p := r.parameters
	budget := budget{start: start, limit: p.limit()}
	var path Path
	missing, done := false, 0
	for _, stage := range stages(points) {
		var measured []*series
		conclude := func() {
			for _, s := range measured {
				report.Points = append(report.Points, r.conclude(s))
			}
		}
		for _, point := range stage {
			done++
			var err error
			if point.Path != path {
				path = point.Path
				missing, err = r.begin(ctx, path, report)
			}
			if err == nil && (missing || r.leaveOut(point, report)) {
				continue
			}
			var s *series
			if err == nil {
				s, err = r.series(ctx, point)
			}
			if err != nil {
				conclude()
				return err
			}
			measured = append(measured, s)
			left := time.Since(start) / time.Duration(done) * time.Duration(len(points)-done)
			r.tell(s, fmt.Sprintf("%d/%d, %v left", done, len(points), left.Round(time.Second)))
		}
		err := r.refine(ctx, measured, budget.until(len(stage), len(points)-done, p.base(points[done:], r.reference)+p.costs(points)))
		conclude()
		if err != nil {
			return err
		}
	}
	return nil
}

// endedBy marks a report as incomplete if it ended with an error, which it returns. There
// is no report if nothing was measured before.
func (r *Report) endedBy(err error) (*Report, error) {
	if err != nil && len(r.Points) == 0 {
		return nil, err
	}
	if err != nil {
		r.Header.Incomplete = err.Error()
	}
	return r, err
}

// tell says what came of a point so far.
func (r *runner) tell(s *series, progress string) {
	result := r.conclude(s)
	fmt.Fprintf(r.log, "bench: %s: %s: ratio %.2f, %s\n", progress, result.Point, result.Speedup, result.proof())
}

// leaveOut says in the report why the site cannot measure a point, if so.
func (r *runner) leaveOut(p Point, report *Report) bool {
	s, ok := r.site.(interface{ cannot(Point) string })
	if !ok || s.cannot(p) == "" {
		return false
	}
	if why := s.cannot(p); !slices.Contains(report.Header.LeftOut, why) {
		report.Header.LeftOut = append(report.Header.LeftOut, why)
		fmt.Fprintf(r.log, "bench: left out: %s\n", why)
	}
	return true
}

// begin verifies data on a path before it is measured. A path that the site does
// not have is noted in the report.
func (r *runner) begin(ctx context.Context, path Path, report *Report) (missing bool, err error) {
	if _, err := r.site.target(path); errors.Is(err, errNoPath) {
		report.Header.LeftOut = append(report.Header.LeftOut, fmt.Sprintf("path %s: %v", path, err))
		report.missing = append(report.missing, path)
		fmt.Fprintf(r.log, "bench: path %s is left out: %v\n", path, err)
		return true, nil
	}
	bytes, err := r.verify(ctx, path)
	if err != nil {
		return false, err
	}
	fmt.Fprintf(r.log, "bench: path %s: %s of data verified\n", path, quantity(float64(bytes), "B"))
	report.Header.Verified += bytes
	return false, nil
}
