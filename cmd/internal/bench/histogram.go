package bench

import "math/bits"

// A histogram counts durations in nanoseconds with a relative error under 1.6 %:
// each power of two has 64 buckets.
type histogram struct {
	// Counts is indexed by bucket; trailing empty buckets are not there.
	Counts []uint64 `json:"counts"`
}

const subBuckets = 64

// newHistogram has room for durations up to 2^40 ns, 18 minutes, so that adding
// allocates nothing.
func newHistogram() *histogram { return &histogram{make([]uint64, bucket(1<<40)+1)} }

func bucket(ns int64) int {
	if ns < subBuckets {
		return int(max(ns, 0))
	}
	shift := bits.Len64(uint64(ns)) - 7 // leaves 64..127
	return (shift+1)*subBuckets + int(ns>>shift) - subBuckets
}

// middle is the middle of a bucket.
func middle(bucket int) int64 {
	if bucket < subBuckets {
		return int64(bucket)
	}
	shift := bucket/subBuckets - 1
	low := int64(bucket%subBuckets+subBuckets) << shift
	return low + (int64(1)<<shift)/2
}

func (h *histogram) add(ns int64) { h.Counts[min(bucket(ns), len(h.Counts)-1)]++ }

// trim drops trailing empty buckets.
func (h *histogram) trim() {
	for len(h.Counts) > 0 && h.Counts[len(h.Counts)-1] == 0 {
		h.Counts = h.Counts[:len(h.Counts)-1]
	}
}

func (h *histogram) merge(other *histogram) {
	for len(h.Counts) < len(other.Counts) {
		h.Counts = append(h.Counts, 0)
	}
	for i, n := range other.Counts {
		h.Counts[i] += n
	}
}

// quantile returns the duration that the fraction q of all do not exceed; 0 if
// there are none.
func (h *histogram) quantile(q float64) int64 {
	var total, seen uint64
	for _, n := range h.Counts {
		total += n
	}
	for i, n := range h.Counts {
		seen += n
		if n > 0 && float64(seen) >= q*float64(total) {
			return middle(i)
		}
	}
	return 0
}
