package bench

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

// slower lists the points whose speedup is below a ratio.
func (r *Report) slower(ratio float64) []Result {
	var slower []Result
	for _, p := range r.Points {
		if p.Speedup < ratio {
			slower = append(slower, p)
		}
	}
	return slower
}

// crossovers says in words, for each way of streaming, from which message size on
// skipstack is faster.
func (r *Report) crossovers() []string {
	type way struct {
		path      Path
		placement Placement
		noDelay   bool
	}
	var order []way
	streams := map[way][]Result{}
	for _, p := range r.Points {
		if p.Test != Stream || p.Connections != 1 {
			continue
		}
		w := way{p.Path, p.Placement, p.NoDelay}
		if streams[w] == nil {
			order = append(order, w)
		}
		streams[w] = append(streams[w], p)
	}
	var sentences []string
	for _, w := range order {
		if len(streams[w]) < 2 {
			continue
		}
		nagle := ""
		if w.noDelay {
			nagle = ", TCP_NODELAY"
		}
		sentences = append(sentences, fmt.Sprintf("One-way, %s%s:\n  %s.", title(w.path, w.placement), nagle, crossover(streams[w])))
	}
	return sentences
}

// crossover says where one way of streaming crosses from slower to faster.
func crossover(points []Result) string {
	points = slices.SortedFunc(slices.Values(points), func(a, b Result) int { return cmp.Compare(a.RequestBytes, b.RequestBytes) })
	first, last := points[0], points[len(points)-1]
	span := fmt.Sprintf("%s to %s", first.message(), last.message())
	var slower []string
	crossing := 0 // the first faster point
	for i, p := range points {
		if p.Speedup < 1 {
			slower = append(slower, p.message())
			crossing = i + 1
		}
	}
	switch {
	case len(slower) == 0:
		return fmt.Sprintf("skipstack is faster at every size, %s", span)
	case len(slower) == len(points):
		return fmt.Sprintf("plain TCP is faster here at every size, %s", span)
	case crossing == len(slower):
		// Nothing was measured between the two.
		return fmt.Sprintf("below a size between %s and %s, plain TCP is faster here", points[crossing-1].message(), points[crossing].message())
	}
	return fmt.Sprintf("plain TCP is faster here at %s, of %s", strings.Join(slower, ", "), span)
}
