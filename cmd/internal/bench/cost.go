package bench

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/skipstack/skipstack/plugin/datapath"
)

// A programSite knows what the BPF programs cost.
type programSite interface {
	// runTimes is how often the datapath's programs ran, and for how long, while
	// the kernel measured it.
	runTimes() (map[string]datapath.RunTime, error)
}

// costPoints are the points whose BPF programs are timed: those that differ in what
// the programs do.
func costPoints(points []Point) []Point {
	return slices.DeleteFunc(slices.Clone(points), func(p Point) bool {
		twin := p // Nagle's algorithm is TCP's
		twin.NoDelay = false
		return p.Path != PodIP || p.Placement != SameCPU || p.Connections != 1 ||
			p.Test == Stream && p.NoDelay && slices.Contains(points, twin)
	})
}

// costs times the BPF programs in runs of their own, as the kernel's measuring of
// them costs time itself.
func (r *runner) costs(ctx context.Context, report *Report) error {
	s, ok := r.site.(programSite)
	if !ok || !report.Proven() {
		return nil
	}
	var points []Point
	for _, p := range report.Points {
		points = append(points, p.Point)
	}
	points = costPoints(points)
	if len(points) == 0 {
		return nil
	}
	fmt.Fprintf(r.log, "bench: timing the BPF programs at %s\n", pointsCount(len(points)))
	measuring, err := datapath.MeasureRunTimes()
	if err != nil {
		return err
	}
	defer measuring.Close()
	timing := *r
	timing.parameters.Length /= 2 // it gives a mean of very many runs
	for _, p := range points {
		before, err := s.runTimes()
		if err != nil {
			return err
		}
		switch _, _, err := timing.run(ctx, p, true, false); {
		case errors.Is(err, errTooBusy):
			fmt.Fprintf(r.log, "bench: %s: not timed: %v\n", p, err)
			continue
		case err != nil:
			return fmt.Errorf("%s: %w", p, err)
		}
		after, err := s.runTimes()
		if err != nil {
			return err
		}
		i := slices.IndexFunc(report.Points, func(result Result) bool { return result.Point == p })
		report.Points[i].Programs = programCosts(before, after)
	}
	return nil
}

// programCosts is what ran between two readings, by the programs' names.
func programCosts(before, after map[string]datapath.RunTime) []ProgramCost {
	var costs []ProgramCost
	for _, name := range slices.Sorted(maps.Keys(after)) {
		runs, time := after[name].Runs-before[name].Runs, after[name].Time-before[name].Time
		if runs > 0 {
			costs = append(costs, ProgramCost{Name: name, Runs: runs, NsPerRun: float64(time) / float64(runs)})
		}
	}
	return costs
}
