package bench

import (
	"fmt"
	"strconv"
)

// proof is the proof and, if it failed, why.
func (r Result) proof() string {
	if r.Reason != "" {
		return string(r.Proof) + ": " + r.Reason
	}
	return string(r.Proof)
}

// ratio is a point's speedup with its spread, and a mark if it is uncertain.
func (r Result) ratio() string {
	s := threeDigits(r.Speedup) + "±" + threeDigits(r.MAD)
	if r.Uncertain {
		s += "?"
	}
	return s
}

// uncertainLegend explains the mark.
var uncertainLegend = fmt.Sprintf("A ratio with a question mark is uncertain: the standard error of the median is more than %.0f %%.", 100*certain)

// pairs says how many pairs of runs a point has.
func (p Parameters) pairs() string {
	if p.MaxPairs > p.Repeats {
		return fmt.Sprintf("%d to %d pairs of runs", p.Repeats, p.MaxPairs)
	}
	return fmt.Sprintf("%d pairs of runs", p.Repeats)
}

func (f Figures) rate(t Test) string {
	if t == Stream {
		return quantity(f.BytesPerSecond, "B/s")
	}
	return quantity(f.TransactionsPerSecond, "/s")
}

// quantity writes a number with three digits and a decimal prefix.
func quantity(v float64, unit string) string {
	prefixes := []string{"", "k", "M", "G", "T", "P"}
	i := 0
	for ; v >= 999.5 && i < len(prefixes)-1; i++ {
		v /= 1000
	}
	if i == 0 {
		return fmt.Sprintf("%.0f %s", v, unit)
	}
	return fmt.Sprintf("%s %s%s", threeDigits(v), prefixes[i], unit)
}

// pointsCount is "1 point", "2 points".
func pointsCount(n int) string {
	if n == 1 {
		return "1 point"
	}
	return fmt.Sprintf("%d points", n)
}

func threeDigits(v float64) string {
	digits := 0
	switch {
	case v < 9.995:
		digits = 2
	case v < 99.95:
		digits = 1
	}
	return strconv.FormatFloat(v, 'f', digits, 64)
}

// micros writes nanoseconds as microseconds.
func micros(ns int64) string { return threeDigits(float64(ns) / 1000) }
