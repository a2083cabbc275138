package bench

import (
	"math"
	"math/rand/v2"
	"slices"
	"testing"
)

func TestMedianAndMAD(t *testing.T) {
	for _, c := range []struct {
		v           []float64
		median, mad float64
	}{
		{nil, 0, 0},
		{[]float64{3}, 3, 0},
		{[]float64{4, 1}, 2.5, 1.5},
		{[]float64{5, 1, 100, 3, 4}, 4, 1},
		{[]float64{1, 1, 2, 2, 4, 6, 9}, 2, 1}, // the textbook's example
	} {
		before := slices.Clone(c.v)
		if got := median(c.v); got != c.median {
			t.Errorf("median of %v is %v, want %v", c.v, got, c.median)
		}
		if got := mad(c.v); got != c.mad {
			t.Errorf("MAD of %v is %v, want %v", c.v, got, c.mad)
		}
		if !slices.Equal(before, c.v) {
			t.Errorf("the sample %v was changed to %v", before, c.v)
		}
	}
}

// TestMADEstimatesSpread draws from a normal distribution, where 1.4826 MAD is the
// standard deviation, and adds wild values that a standard deviation would follow.
func TestMADEstimatesSpread(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 1))
	v := make([]float64, 10000)
	for i := range v {
		v[i] = 50 + 2*r.NormFloat64()
		if i%20 == 0 {
			v[i] *= 10
		}
	}
	if m := median(v); math.Abs(m-50) > 0.3 {
		t.Errorf("median %v, want 50", m)
	}
	if s := 1.4826 * mad(v); math.Abs(s-2) > 0.25 {
		t.Errorf("scaled MAD %v, want 2", s)
	}
}

func TestRatios(t *testing.T) {
	got := ratios([]float64{4, 9, 1}, []float64{2, 3, 0})
	if want := []float64{2, 3, 0}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestOutliers(t *testing.T) {
	for _, c := range []struct {
		v    []float64
		want []int
	}{
		{[]float64{2, 2.1, 1.9, 2, 9}, []int{4}},
		{[]float64{0.5, 2, 2.1, 1.9, 2}, []int{0}},
		{[]float64{2, 2.1, 1.9, 2, 2.05}, nil},
		{[]float64{2, 2, 2, 2, 2.01}, nil}, // far in MADs, but only half a percent
		{nil, nil},
	} {
		if got := outliers(c.v); !slices.Equal(got, c.want) {
			t.Errorf("outliers of %v are %v, want %v", c.v, got, c.want)
		}
	}
}

func TestHistogram(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 1))
	h, exact := newHistogram(), []int64{}
	for range 20000 {
		ns := int64(math.Exp(r.Float64() * 25)) // up to 72 s
		h.add(ns)
		exact = append(exact, ns)
	}
	slices.Sort(exact)
	for _, q := range []float64{0, 0.5, 0.9, 0.99, 0.999, 1} {
		want := exact[max(0, int(math.Ceil(q*float64(len(exact))))-1)]
		if got := h.quantile(q); math.Abs(float64(got-want)) > 0.016*float64(want)+0.5 {
			t.Errorf("quantile %v is %d, want %d", q, got, want)
		}
	}
}

func TestHistogramBuckets(t *testing.T) {
	for ns := int64(0); ns < 1<<20; ns++ {
		if b, next := bucket(ns), bucket(ns+1); next != b && next != b+1 {
			t.Fatalf("%d ns is in bucket %d, %d ns in %d", ns, b, ns+1, next)
		}
	}
	for b := range bucket(1 << 40) {
		if got := bucket(middle(b)); got != b {
			t.Fatalf("the middle of bucket %d is in bucket %d", b, got)
		}
	}
	h := newHistogram()
	h.add(-1)
	h.add(math.MaxInt64)
	if h.quantile(0) != 0 || h.quantile(1) < 1<<39 {
		t.Errorf("values out of range: %d to %d", h.quantile(0), h.quantile(1))
	}
	empty := newHistogram()
	if empty.trim(); len(empty.Counts) != 0 || empty.quantile(0.5) != 0 {
		t.Errorf("empty: %v", empty.Counts)
	}
}

func TestHistogramMerge(t *testing.T) {
	a, b, all := &histogram{}, newHistogram(), newHistogram()
	for i := range int64(1000) {
		b.add(i * i)
		all.add(i * i)
	}
	b.trim()
	a.merge(b)
	a.merge(&histogram{Counts: []uint64{7}})
	all.Counts[0] += 7
	all.trim()
	if !slices.Equal(a.Counts, all.Counts) {
		t.Error("merging loses counts")
	}
}
