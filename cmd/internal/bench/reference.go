package bench

import (
	"fmt"
	"slices"
)

// A reference says at which points AF_UNIX is measured, too, and has what was. A set with a
// time gives it what is left of that: points that differ only in their path or TCP_NODELAY,
// which AF_UNIX does not have, share a measurement, and there may be fewer.
type reference struct {
	runs   int // of each
	shared bool
	most   int                // of it, where it is shared: what there is time for may be less
	of     map[Point]*samples // by [reference.key]
}

// reference plans how AF_UNIX is measured at points: with as many runs as the least
// pairs at all of them, or at a few, or else in one run at as many as there is time for.
func (p Parameters) reference(points []Point) *reference {
	r := &reference{runs: p.Repeats, of: map[Point]*samples{}}
	if !p.Unix {
		return r
	}
	left := p.limit() - p.base(points, r) - p.costs(points) - beginAndEnd
	if r.shared = p.limit() > 0 && left >= 0; !r.shared { // --full, or more was asked for than the set's time
		r.want(points)
		return r
	}
	var all []Point
	for _, point := range points {
		if key := r.key(point); !slices.Contains(all, key) {
			all = append(all, key)
		}
	}
	slices.SortStableFunc(all, func(a, b Point) int { return referenceRank(a) - referenceRank(b) })
	few := 0
	r.most = len(all)
	for few < len(all) && referenceRank(all[few]) == 0 {
		few++
	}
	fit := int(left / p.run()) // runs
	switch {
	case len(all)*r.runs <= fit:
		r.want(all)
	case few > 0 && few*r.runs <= fit:
		r.want(all[:few])
	default:
		r.runs = 1
		r.want(all[:min(max(1, fit), len(all))])
	}
	return r
}

// referenceRank says what is measured first where there is not time for all: the few that
// the default set has of each path.
func referenceRank(p Point) int {
	switch few := p.Test == Stream && slices.Contains(fewSizes, p.RequestBytes) ||
		p.Test == RequestResponse && p.RequestBytes == smallMessage && p.ResponseBytes == smallMessage; {
	case p.Placement != SameCPU:
		return 2
	case p.Connections != 1 || !few:
		return 1
	}
	return 0
}

func (r *reference) key(p Point) Point {
	if r.shared {
		p.Path, p.NoDelay = "", false
	}
	return p
}

func (r *reference) want(points []Point) {
	for _, p := range points {
		r.of[r.key(p)] = &samples{}
	}
}

// at returns what was measured for a point so far; nil if nothing is to be.
func (r *reference) at(p Point) *samples {
	if r == nil {
		return nil
	}
	return r.of[r.key(p)]
}

// pending is how many runs some points still need.
func (r *reference) pending(points []Point) int {
	runs, seen := 0, map[Point]bool{}
	for _, p := range points {
		if s := r.at(p); s != nil && !seen[r.key(p)] {
			seen[r.key(p)] = true
			runs += r.runs - len(s.rates)
		}
	}
	return runs
}

// howOften says how AF_UNIX is measured; "" if it is not.
func (r *reference) howOften() string {
	if len(r.of) == 0 {
		return ""
	}
	runs := fmt.Sprintf("medians of %d runs", r.runs)
	if r.runs == 1 {
		runs = "one run"
	}
	switch {
	case !r.shared:
		return runs + " at each point"
	case len(r.of) == r.most:
		return runs + " at each point; those that differ only in path or TCP_NODELAY share them"
	}
	return fmt.Sprintf("%s at %d of %s, counting those as one that differ only in path or TCP_NODELAY; for more there is no time", runs, len(r.of), pointsCount(r.most))
}
