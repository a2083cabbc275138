package bench

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"
)

// certain is how small the standard error of a point's ratio is to be, as a part of
// it: two benches then agree within 15 % at 99 of 100 points (2.65 standard errors of
// a difference), if nothing but chance differs.
const certain = 0.04

// A series is what was measured of a point so far.
type series struct {
	point              Point
	plain, accelerated samples
	reference          *samples // nil, or empty: none; it may be shared
	given              bool     // it gets no more pairs
}

func (s *series) uncertainty() float64 {
	return uncertainty(ratios(s.accelerated.rates, s.plain.rates))
}

func (s *series) conclude(by *rules) Result {
	result := conclude(s.point, &s.plain, &s.accelerated, by)
	if s.reference != nil && len(s.reference.rates) > 0 {
		figures := s.reference.figures(s.point)
		result.Unix = &figures
	}
	return result
}

// mostUncertain returns the series whose ratio is the most uncertain of those that may
// get more pairs, nil if none is uncertain. Those on one CPU come first: on two, much of
// the scatter is in how the CPUs wake each other, which is not the subject.
func mostUncertain(all []*series, mostPairs int) *series {
	var most *series
	for _, s := range all {
		if s.given || len(s.plain.rates) >= mostPairs || s.uncertainty() <= certain {
			continue
		}
		if most == nil || before(s, most) {
			most = s
		}
	}
	return most
}

func before(a, b *series) bool {
	if a.point.Placement != b.point.Placement {
		return a.point.Placement == SameCPU
	}
	return a.uncertainty() > b.uncertainty()
}

// refine adds pairs one by one where the ratio is the most uncertain, until all are
// certain or have the most pairs there may be, or until a time; zero is no such time.
func (r *runner) refine(ctx context.Context, all []*series, until time.Time) error {
	pair := 2 * r.parameters.run()
	var said time.Time
	for {
		s := mostUncertain(all, r.parameters.MaxPairs)
		if s == nil || !until.IsZero() && time.Now().Add(pair).After(until) {
			return nil
		}
		switch err := r.pair(ctx, s, false); {
		case errors.Is(err, errTooBusy):
			s.given = true
			fmt.Fprintf(r.log, "bench: %s: no more pairs: %v\n", s.point, err)
		case err != nil:
			return fmt.Errorf("%s: %w", s.point, err)
		}
		if time.Since(said) >= progressPause {
			said = time.Now()
			n := 0
			for _, s := range all {
				if s.uncertainty() > certain {
					n++
				}
			}
			speedups := ratios(s.accelerated.rates, s.plain.rates)
			fmt.Fprintf(r.log, "bench: more pairs, %d of %d ratios are uncertain: %s: pair %d, ratio %.2f\n", n, len(all), s.point, len(speedups), median(speedups))
		}
	}
}

// progressPause is the least time between two lines about more pairs.
const progressPause = 2 * time.Second

// stages parts points where all pairs of the earlier ones must be measured before the
// later ones begin: a Service brings connection tracking to the node.
func stages(points []Point) [][]Point {
	service := slices.IndexFunc(points, func(p Point) bool { return p.Path == ServiceIP })
	if service <= 0 {
		return [][]Point{points}
	}
	return [][]Point{points[:service], points[service:]}
}

// A budget is the time that a bench has.
type budget struct {
	start time.Time
	limit time.Duration // 0 is none
}

// end is what a bench does after its last run, beside the costs.
const end = beginAndEnd / 3

// until is when the pairs for some points that are still uncertain end, so that what
// the further ones and the costs need fits in; the zero time if there is no limit. The
// further points get their part of what is left.
func (b budget) until(points, further int, needed time.Duration) time.Time {
	if b.limit == 0 {
		return time.Time{}
	}
	now := time.Now()
	left := b.limit - now.Sub(b.start) - needed - end
	return now.Add(max(0, left) * time.Duration(points) / time.Duration(points+further))
}
