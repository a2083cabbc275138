package bench

import "slices"

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
