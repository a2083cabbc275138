package bench

import (
	"math"
	"slices"
)

// median returns the middle value of v, or the mean of the two middle ones; 0 if
// there is none.
func median(v []float64) float64 {
	if len(v) == 0 {
		return 0
	}
	s := slices.Sorted(slices.Values(v))
	return (s[(len(s)-1)/2] + s[len(s)/2]) / 2
}

// mad returns the median absolute deviation from the median.
func mad(v []float64) float64 {
	m := median(v)
	deviations := make([]float64, len(v))
	for i, x := range v {
		deviations[i] = max(x-m, m-x)
	}
	return median(deviations)
}

// standardError estimates the standard error of the median of v from two of its order
// statistics, whatever its distribution (Price and Bonett, "Estimating the variance
// of the sample median", 2001): an interval of the median that is about two standard
// errors wide on either side, over the width that its exact coverage gives it. One wild
// value moves it only while there are few. It is 0 for fewer than two values, which
// say nothing of it.
func standardError(v []float64) float64 {
	n := len(v)
	if n < 2 {
		return 0
	}
	s := slices.Sorted(slices.Values(v))
	c := max(1, int(math.Round(float64(n+1)/2-math.Sqrt(float64(n)))))
	// The chance that the median is below the c-th value, or above the c-th from the end:
	// that of fewer than c heads in n throws of a coin.
	tail, term := 0.0, math.Exp2(-float64(n))
	for heads := range c {
		tail += term
		term *= float64(n-heads) / float64(heads+1)
	}
	z := math.Sqrt2 * math.Erfinv(1-2*tail)
	return (s[n-c] - s[c-1]) / (2 * z)
}

// uncertainty is the standard error of the median over the median; infinite where
// there are too few values to tell.
func uncertainty(v []float64) float64 {
	if m := median(v); m > 0 && len(v) >= 2 {
		return standardError(v) / m
	}
	return math.Inf(1)
}

// ratios divides pairwise.
func ratios(numerators, denominators []float64) []float64 {
	r := make([]float64, min(len(numerators), len(denominators)))
	for i := range r {
		if denominators[i] > 0 {
			r[i] = numerators[i] / denominators[i]
		}
	}
	return r
}

// outliers returns the indexes of values further from the median than three
// scaled MADs (1.4826 makes the MAD of a normal distribution its standard deviation),
// and further than 5 %, so that tiny spreads raise no alarm. They are reported, never
// dropped.
func outliers(v []float64) []int {
	m, limit := median(v), 3*1.4826*mad(v)
	var found []int
	for i, x := range v {
		if d := max(x-m, m-x); d > limit && d > 0.05*m {
			found = append(found, i)
		}
	}
	return found
}
