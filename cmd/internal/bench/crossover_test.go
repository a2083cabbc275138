package bench

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"strings"
	"testing"
)

func streams(speedups ...float64) []Result {
	sizes := []int{64, 256, 1024, 4096}
	var points []Result
	for i, speedup := range speedups {
		points = append(points, Result{Point: stream(PodIP, SameCPU, sizes[i]), Speedup: speedup, Proof: Proven})
	}
	return points
}

func TestCrossover(t *testing.T) {
	for want, points := range map[string][]Result{
		"skipstack is faster at every size, 64 B to 4 KiB":                 streams(1, 1.5, 2, 3),
		"plain TCP is faster here at every size, 64 B to 4 KiB":            streams(0.5, 0.6, 0.7, 0.99),
		"below a size between 64 B and 256 B, plain TCP is faster here":    streams(0.5, 1.5, 2, 3),
		"below a size between 256 B and 1 KiB, plain TCP is faster here":   streams(0.5, 0.9, 1, 3),
		"plain TCP is faster here at 256 B, of 64 B to 4 KiB":              streams(1.1, 0.9, 2, 3),
		"plain TCP is faster here at 64 B, 1 KiB, 4 KiB, of 64 B to 4 KiB": streams(0.9, 1.1, 0.9, 0.9),
	} {
		if got := crossover(points); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

// TestCrossoversKeepApart: paths, placements and TCP_NODELAY have sentences of their own.
func TestCrossoversKeepApart(t *testing.T) {
	r := &Report{Points: streams(0.5, 1.5)}
	for _, p := range streams(2, 2) {
		p.NoDelay = true
		r.Points = append(r.Points, p)
	}
	other := streams(0.1)[0]
	other.Path = IPv6 // one size says nothing about others
	many := streams(0.1)[0]
	many.Connections = 16
	r.Points = append(r.Points, other, many)
	got := r.crossovers()
	if len(got) != 2 || !strings.Contains(got[0], "below a size between 64 B and 256 B,") || !strings.Contains(got[1], "TCP_NODELAY:\n  skipstack is faster at every size") {
		t.Errorf("%q", got)
	}
}

func TestCheck(t *testing.T) {
	r := &Report{Points: streams(0.5, 1.5, 1)}
	if got := r.slower(1); len(got) != 1 || got[0].RequestBytes != 64 {
		t.Errorf("slower than 1: %v", got)
	}
	var o options
	o.check, o.minSpeedup = true, 1.2
	var b bytes.Buffer
	if err := o.writeCheck(r, &b); err != nil || strings.Count(b.String(), "ratio") != 2 || !strings.Contains(b.String(), "CHECK FAILED") {
		t.Errorf("%s, %v", b.String(), err)
	}
	err := o.verdict(t.Context(), r, nil)
	if err == nil || !strings.Contains(err.Error(), "at 2 of 3 points skipstack is slower than 1.20") {
		t.Errorf("verdict %v", err)
	}
	b.Reset()
	o.minSpeedup = 0.5
	if err := o.writeCheck(r, &b); err != nil || !strings.Contains(b.String(), "no point is slower") {
		t.Errorf("%s, %v", b.String(), err)
	}
	if err := o.verdict(t.Context(), r, nil); err != nil {
		t.Errorf("verdict %v", err)
	}
	r.Points[0].Proof = Failed
	if err := o.verdict(t.Context(), r, nil); err == nil || !strings.Contains(err.Error(), "not proven") {
		t.Errorf("verdict %v", err)
	}
}

// pathless is a site without any path.
type pathless struct{ *loopbackSite }

func (pathless) target(Path) (netip.Addr, error) {
	return netip.Addr{}, fmt.Errorf("%w: the pods are far apart", errNoPath)
}

// TestPathMissing: a path that was named and turns out not to be there fails a check, and
// nothing is said of points that were not measured.
func TestPathMissing(t *testing.T) {
	p := testRunner(t, newLoopbackSite(t)).parameters
	p.Length = minLength
	report, err := measureAll(t.Context(), pathless{newLoopbackSite(t)}, p, []Point{point(RequestResponse, 64, 64)}, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	var o options
	o.check, o.minSpeedup, o.selection.paths = true, 1, []Path{PodIP}
	var b bytes.Buffer
	if err := errors.Join(report.writeText(&b), o.writeCheck(report, &b)); err != nil {
		t.Fatal(err)
	}
	if s := b.String(); !strings.Contains(s, "Nothing was measured.") || !strings.Contains(s, "path pod, which --paths names") || strings.Contains(s, "none of these") || strings.Contains(s, "no point") {
		t.Errorf("%s", s)
	}
	if err := o.verdict(t.Context(), report, nil); err == nil || !strings.Contains(err.Error(), "nothing was measured") {
		t.Errorf("verdict %v", err)
	}
	report.Points = streams(1.5)
	if err := o.verdict(t.Context(), report, nil); err == nil || !strings.Contains(err.Error(), "could not be measured: pod") {
		t.Errorf("verdict %v", err)
	}
	o.selection.paths = nil // the set has it, which is no promise
	if err := o.verdict(t.Context(), report, nil); err != nil {
		t.Errorf("verdict %v", err)
	}
}
