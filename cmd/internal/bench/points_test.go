package bench

import (
	"slices"
	"strings"
	"testing"
	"time"
)

func selected(t *testing.T, s selection, cpus int) []Point {
	t.Helper()
	points, err := s.points(cpus)
	if err != nil {
		t.Fatal(err)
	}
	return points
}

func testParameters(set string) Parameters {
	return Parameters{Set: set, Repeats: minRepeats, MaxPairs: defaultMaxPairs, WarmUp: 10 * time.Millisecond, Length: minLength}
}

// TestSetsFit holds the sets to their times, with some to spare for a machine on
// which a run has to be repeated.
func TestSetsFit(t *testing.T) {
	for set, limit := range map[string]time.Duration{quickSet: 20 * time.Second, defaultSet: 3 * time.Minute} {
		p, points := testParameters(set), selected(t, selection{set: set}, 2)
		least, most := p.estimate(points)
		if most >= limit || least > limit*97/100 || least >= p.limit() {
			t.Errorf("the %s set's %d points take %v to %v, over %v", set, len(points), least, most, limit)
		}
		with := p
		with.Unix = true
		longer, longest := with.estimate(points)
		if longer <= least || longer > p.limit() || longest > p.limit() {
			t.Errorf("with a reference the %s set takes %v to %v, over %v", set, longer, longest, p.limit())
		}
		// Who asks for more than the time of the set gets it, and no more pairs.
		p.Length = time.Second
		if least, most := p.estimate(points); least <= limit || most != least {
			t.Errorf("runs of a second take %v to %v", least, most)
		}
	}
	p, points := testParameters(fullSet), selected(t, selection{set: fullSet}, 2)
	least, most := p.estimate(points)
	if pairs := most - least; pairs < time.Duration(len(points)*(defaultMaxPairs-minRepeats)*2)*minLength || p.limit() != 0 {
		t.Errorf("the full set takes %v to %v: without the pairs that there may be", least, most)
	}
	if said := p.howLong(points); !strings.Contains(said, least.Round(time.Second).String()) || !strings.Contains(said, most.Round(time.Second).String()) {
		t.Errorf("it says %q of %v to %v", said, least, most)
	}
}

// TestReferenceFits: AF_UNIX is measured where the set's time has room for it.
func TestReferenceFits(t *testing.T) {
	p := testParameters(quickSet)
	for _, c := range []struct {
		name   string
		chosen selection
		length time.Duration
		want   string
		at     []Point // with a reference, among others
		not    []Point
	}{
		{"quick", selection{set: quickSet}, minLength, "one run at 4 of 6 points, counting",
			[]Point{rr(PodIP, SameCPU, 64, 64), rr(ServiceIP, SameCPU, 64, 64), noDelay(stream(PodIP, SameCPU, 64)), stream(PodIP, SameCPU, 64<<10)},
			[]Point{crr(PodIP, SameCPU), stream(PodIP, CrossCPU, 64<<10)}},
		{"default", selection{set: defaultSet}, minLength, "medians of 5 runs at 4 of 48 points, counting",
			[]Point{stream(PodIP, SameCPU, 64), noDelay(stream(PodIP, SameCPU, 4<<10)), stream(IPv6, SameCPU, 64<<10), rr(Loopback, SameCPU, 64, 64)},
			[]Point{stream(PodIP, SameCPU, 256), stream(PodIP, CrossCPU, 64), crr(PodIP, SameCPU)}},
		{"a part", selection{set: quickSet, tests: []Test{ConnectRequestResponse}}, minLength, "medians of 5 runs at each point; those that differ",
			[]Point{crr(PodIP, SameCPU)}, nil},
		{"more than its time", selection{set: quickSet}, time.Second, "medians of 5 runs at each point",
			[]Point{crr(PodIP, SameCPU), stream(PodIP, CrossCPU, 64<<10)}, nil},
		{"full", selection{set: fullSet}, minLength, "medians of 5 runs at each point",
			[]Point{crr(ServiceIP, CrossCPU)}, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			points := selected(t, c.chosen, 2)
			p := p
			p.Set, p.Length, p.Unix = c.chosen.set, c.length, true
			r := p.reference(points)
			if got := r.howOften(); !strings.HasPrefix(got, c.want) {
				t.Errorf("it says %q, want %q", got, c.want)
			}
			for _, point := range c.at {
				if r.at(point) == nil {
					t.Errorf("none at %s", point)
				}
			}
			for _, point := range c.not {
				if r.at(point) != nil {
					t.Errorf("one at %s", point)
				}
			}
			// What is measured is no longer missing.
			before, first := r.pending(points), c.at[0]
			r.at(first).rates = make([]float64, r.runs)
			if after := r.pending(points); before != len(r.of)*r.runs || after != before-r.runs {
				t.Errorf("%d runs, then %d", before, after)
			}
			p.Unix = false
			if r := p.reference(points); r.at(first) != nil || r.pending(points) != 0 || r.howOften() != "" {
				t.Errorf("not asked for: %s", r.howOften())
			}
		})
	}
}

// TestSets checks what the issue asks of the sets: the pod IP path in full, the
// others on one CPU at 64 B, 4 KiB and 64 KiB.
func TestSets(t *testing.T) {
	points, full := selected(t, selection{set: defaultSet}, 2), selected(t, selection{set: fullSet}, 2)
	for _, set := range [][]Point{points, full, selected(t, selection{set: quickSet}, 2)} {
		service := false
		for i, p := range set {
			if service = service || p.Path == ServiceIP; service && p.Path != ServiceIP {
				t.Errorf("%s comes after a Service point, and would pay for its connection tracking", p)
			}
			if slices.Contains(set[:i], p) {
				t.Errorf("%s is measured twice", p)
			}
		}
	}
	for _, p := range points {
		if p.Path == PodIP {
			continue
		}
		if p.Placement != SameCPU || !slices.Contains(fewSizes, p.RequestBytes) || p.Connections != 1 {
			t.Errorf("the default set has %s", p)
		}
	}
	of := func(points []Point, path Path) []Point {
		return slices.DeleteFunc(slices.Clone(points), func(p Point) bool { return p.Path != path })
	}
	pod := of(points, PodIP)
	if !slices.Equal(pod, of(full, PodIP)) {
		t.Error("the default set does not have the pod IP path in full")
	}
	for _, path := range allPaths {
		if len(of(full, path)) != len(pod) {
			t.Errorf("the full set has %d points on path %s, %d on pod", len(of(full, path)), path, len(pod))
		}
		if path != PodIP && len(of(points, path)) < len(fewSizes) {
			t.Errorf("the default set has %v on path %s", of(points, path), path)
		}
	}
	for _, want := range []Point{
		stream(PodIP, SameCPU, 64), stream(PodIP, CrossCPU, 256<<10), noDelay(stream(PodIP, SameCPU, 256<<10)),
		rr(PodIP, SameCPU, 64, 64), rr(PodIP, CrossCPU, 128, 30000), rr(PodIP, SameCPU, 256, 8<<10), crr(PodIP, CrossCPU),
		connections(16, rr(PodIP, SameCPU, 64, 64)), connections(256, stream(PodIP, CrossCPU, 64<<10)),
	} {
		if !slices.Contains(pod, want) {
			t.Errorf("%s is not measured", want)
		}
	}
}

func TestSelection(t *testing.T) {
	for _, p := range selected(t, selection{set: fullSet}, 1) {
		if p.Placement == CrossCPU {
			t.Fatalf("%s on one CPU", p)
		}
	}
	got := selected(t, selection{
		set: defaultSet, tests: []Test{Stream, RequestResponse}, paths: []Path{IPv6}, placements: []Placement{SameCPU}, sizes: []int{100},
	}, 2)
	if want := []Point{stream(IPv6, SameCPU, 100), rr(IPv6, SameCPU, 64, 64)}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	quick := selection{set: quickSet, sizes: []int{64, 1 << 10}}
	want := []Point{
		rr(PodIP, SameCPU, 64, 64), rr(PodIP, SameCPU, 64, 1<<10), stream(PodIP, SameCPU, 64), stream(PodIP, SameCPU, 1<<10), crr(PodIP, SameCPU),
	}
	if got := selected(t, quick, 2); !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	quick.tests = []Test{ConnectRequestResponse}
	if got := selected(t, quick, 2); !slices.Equal(got, want[4:]) {
		t.Errorf("got %v, want %v", got, want[4:])
	}
	if _, err := (selection{set: quickSet, paths: []Path{Loopback}}).points(2); err == nil {
		t.Error("a selection without points is accepted")
	}
}

func TestParseSizes(t *testing.T) {
	got, err := parseSizes("64KiB, 1,16MiB,30000")
	if want := []int{1, 30000, 64 << 10, 16 << 20}; err != nil || !slices.Equal(got, want) {
		t.Errorf("got %v, %v", got, err)
	}
	for _, bad := range []string{"", "0", "-1", "10GiB", "9999999999999GiB", "17MiB", "16777217", "64,64", "1KiB,1024", "4K", "x", "64,", "1.5KiB"} {
		if got, err := parseSizes(bad); err == nil {
			t.Errorf("%q gives %v", bad, got)
		}
	}
}

func TestParametersAreChecked(t *testing.T) {
	if err := testParameters(quickSet).validate(); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*Parameters){
		"few repeats":  func(p *Parameters) { p.Repeats = 4 },
		"many repeats": func(p *Parameters) { p.Repeats = 1001 },
		"few pairs":    func(p *Parameters) { p.MaxPairs = 4 },
		"many pairs":   func(p *Parameters) { p.MaxPairs = 1001 },
		"short":        func(p *Parameters) { p.Length = minLength - 1 },
		"long":         func(p *Parameters) { p.Length = time.Hour },
		"no warm-up":   func(p *Parameters) { p.WarmUp = 0 },
	} {
		p := testParameters(quickSet)
		change(&p)
		if p.validate() == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func FuzzParseSizes(f *testing.F) {
	for _, seed := range []string{"64,4KiB,64KiB", "1", "16MiB", "10GiB", "0", "64,64", "9223372036854775807MiB", " 1 KiB ,2", ",", "-1KiB"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, list string) {
		sizes, err := parseSizes(list)
		if (err == nil) != (len(sizes) > 0) {
			t.Fatalf("%q gives %v and %v", list, sizes, err)
		}
		for i, n := range sizes {
			if n < minSize || n > maxSize || i > 0 && n <= sizes[i-1] {
				t.Errorf("%q gives %v", list, sizes)
			}
		}
	})
}
