package bench

import (
	"bytes"
	"context"
	"math"
	"math/rand/v2"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

// A sampler draws pairs' ratios.
type sampler func(*rand.Rand) float64

func normal(spread float64) sampler {
	return func(r *rand.Rand) float64 { return 2 * (1 + spread*r.NormFloat64()) }
}

// skewed is a stream that now and then overflows its receiver's limit: a ratio of 3,
// three times in ten one of about 1.5.
func skewed(r *rand.Rand) float64 {
	if r.Float64() < 0.3 {
		return 1.5 * (1 + 0.1*r.NormFloat64())
	}
	return 3 * (1 + 0.1*r.NormFloat64())
}

func draw(r *rand.Rand, n int, from sampler) []float64 {
	v := make([]float64, n)
	for i := range v {
		v[i] = from(r)
	}
	return v
}

// TestStandardError compares the estimate with how far medians of many samples
// really scatter, over distributions that are smooth, skewed and have wild values.
func TestStandardError(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 1))
	wild := func(r *rand.Rand) float64 {
		if r.IntN(20) == 0 {
			return 40
		}
		return normal(0.05)(r)
	}
	for name, from := range map[string]sampler{"normal": normal(0.05), "skewed": skewed, "wild": wild} {
		for _, n := range []int{5, 9, 25, 100} {
			const samples = 3000
			medians, estimates := make([]float64, samples), make([]float64, samples)
			for i := range medians {
				v := draw(r, n, from)
				medians[i], estimates[i] = median(v), standardError(v)
			}
			// 1.4826 MAD is a standard deviation where medians are about normal; of
			// skewed ones it is the greater part, which the estimate may exceed.
			scatter := 1.4826 * mad(medians)
			if got := median(estimates) / scatter; got < 0.7 || got > 2.2 || name == "normal" && (got < 0.85 || got > 1.3) {
				t.Errorf("%s, %d values: the estimate is %.2f times the real one", name, n, got)
			}
		}
	}
	for _, v := range [][]float64{nil, {1}} {
		if standardError(v) != 0 || !math.IsInf(uncertainty(v), 1) {
			t.Errorf("%v: standard error %v, uncertainty %v", v, standardError(v), uncertainty(v))
		}
	}
	if got := uncertainty([]float64{2, 2, 2, 2, 2}); got != 0 {
		t.Errorf("equal values are uncertain by %v", got)
	}
	// Five values: the distance of the outer ones over 3.726, which is twice the
	// quantile that goes with 1 in 32.
	if got := standardError([]float64{1, 4, 2, 5, 3}); math.Abs(got-4/3.726) > 0.001 {
		t.Errorf("1 to 5: %v", got)
	}
	if v := draw(r, 1000, normal(0.05)); standardError(v) <= 0 || standardError(v) > 0.01 {
		t.Errorf("1000 values: %v", standardError(v))
	}
	if !math.IsInf(uncertainty([]float64{0, 0, 0}), 1) {
		t.Error("a ratio of 0 is certain")
	}
}

// sampled is a series with pairs of such ratios.
func sampled(p Point, ratios ...float64) *series {
	s := &series{point: p}
	for _, ratio := range ratios {
		s.plain.rates, s.accelerated.rates = append(s.plain.rates, 1), append(s.accelerated.rates, ratio)
	}
	return s
}

// TestMorePairs simulates benches, and tells what more pairs are worth: how often two
// of them agree.
func TestMorePairs(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	one := func(mostPairs int, from sampler) (ratio float64, pairs int) {
		s := sampled(stream(PodIP, SameCPU, 64<<10), draw(r, minRepeats, from)...)
		for mostUncertain([]*series{s}, mostPairs) != nil {
			s.plain.rates, s.accelerated.rates = append(s.plain.rates, 1), append(s.accelerated.rates, from(r))
		}
		return median(s.accelerated.rates), len(s.accelerated.rates)
	}
	agree := func(mostPairs int, from sampler) (part, pairs float64) {
		const benches = 2000
		agreed, total := 0, 0
		for range benches {
			first, a := one(mostPairs, from)
			second, b := one(mostPairs, from)
			total += a + b
			if math.Abs(second/first-1) <= 0.15 {
				agreed++
			}
		}
		return float64(agreed) / benches, float64(total) / 2 / benches
	}
	for _, c := range []struct {
		name               string
		from               sampler
		few, many          float64 // the parts that agree: at most with 5 pairs, at least with up to 25
		leastPairs, atMost float64 // that it takes on average
	}{
		{"steady", normal(0.02), 1, 0.999, 5, 5.2},
		{"normal", normal(0.1), 0.97, 0.98, 7, 15},
		{"scattered", normal(0.2), 0.75, 0.9, 15, 25},
		{"skewed", skewed, 0.75, 0.9, 12, 25},
	} {
		few, five := agree(minRepeats, c.from)
		many, pairs := agree(defaultMaxPairs, c.from)
		t.Logf("%s: %.1f %% agree with 5 pairs, %.1f %% with %.1f on average", c.name, 100*few, 100*many, pairs)
		if few > c.few || many < c.many || five != minRepeats || pairs < c.leastPairs || pairs > c.atMost {
			t.Errorf("%s: %.3f of the benches agree with 5 pairs, %.3f with %.1f", c.name, few, many, pairs)
		}
	}
}

func TestMostUncertain(t *testing.T) {
	steady := sampled(stream(PodIP, SameCPU, 1), 2, 2, 2, 2, 2)
	some := sampled(stream(PodIP, SameCPU, 2), 2, 2.2, 1.9, 2, 1.8)
	much := sampled(stream(PodIP, SameCPU, 3), 2, 4, 1, 2, 1.8)
	cross := sampled(stream(PodIP, CrossCPU, 4), 2, 9, 1, 2, 1.8)
	full := sampled(stream(PodIP, SameCPU, 5), 2, 9, 1, 2, 1.8, 1, 7, 8)
	all := []*series{cross, full, steady, some, much}
	for _, want := range []*series{much, some, cross, nil} {
		got := mostUncertain(all, 8)
		if got != want {
			t.Fatalf("chosen %+v, want %+v", got, want)
		}
		if got != nil {
			got.given = true
		}
	}
}

func TestStages(t *testing.T) {
	pod, service := stream(PodIP, SameCPU, 1), stream(ServiceIP, SameCPU, 1)
	for _, c := range []struct {
		points []Point
		want   []int
	}{
		{[]Point{pod, pod, service}, []int{2, 1}}, {[]Point{pod, pod}, []int{2}}, {[]Point{service, service}, []int{2}},
	} {
		var got []int
		for _, stage := range stages(c.points) {
			got = append(got, len(stage))
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("%v is parted into %v, want %v", c.points, got, c.want)
		}
	}
}

func TestBudget(t *testing.T) {
	if !(budget{start: time.Now()}).until(1, 1, 0).IsZero() {
		t.Error("there is an end without a limit")
	}
	// 100 s are left over when 20 further points have what they need: half of the points
	// get half of them.
	const needed = 48 * time.Second
	limit := needed + end + 100*time.Second
	synctest.Test(t, func(t *testing.T) {
		b := budget{start: time.Now(), limit: limit}
		if got := time.Until(b.until(20, 20, needed)); got != 50*time.Second {
			t.Errorf("%v for more pairs, want 50s", got)
		}
		b.start = b.start.Add(-limit)
		if got := time.Until(b.until(20, 20, 0)); got != 0 {
			t.Errorf("%v for more pairs, though the time is over", got)
		}
	})
}

// TestRefine measures over the loopback: as many pairs as there may be where
// nothing is certain, none where the time is over.
func TestRefine(t *testing.T) {
	r := testRunner(t, newLoopbackSite(t))
	var log bytes.Buffer
	r.log, r.parameters.MaxPairs = &log, 8
	// Far apart, whatever the machine does.
	all := []*series{
		sampled(point(RequestResponse, 64, 64), 0.001, 0.001, 0.001, 1000, 1000, 1000),
		sampled(point(RequestResponse, 64, 64), 0.001, 0.001, 0.001, 1000, 1000, 1000),
	}
	if err := r.refine(t.Context(), all, time.Now()); err != nil || len(all[0].plain.rates) != 6 {
		t.Errorf("%v; %d pairs without time", err, len(all[0].plain.rates))
	}
	if err := r.refine(t.Context(), all, time.Time{}); err != nil {
		t.Fatal(err)
	}
	for i, s := range all {
		if result := s.conclude(r.judge()); result.Repeats != 8 || len(result.Speedups) != 8 || !result.Uncertain {
			t.Errorf("point %d: %+v", i, result)
		}
	}
	if !bytes.Contains(log.Bytes(), []byte("more pairs, 2 of 2 ratios are uncertain")) {
		t.Errorf("it said %q", log.String())
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	r.parameters.MaxPairs = 9
	if err := r.refine(ctx, all, time.Time{}); err == nil {
		t.Error("it was not interrupted")
	}
}
