package plugin

import (
	"errors"
	"testing"

	"github.com/skipstack/skipstack/plugin/verdict"
)

func TestProbeTriesAgainWhileInconclusive(t *testing.T) {
	failure := errors.New("no privileges")
	for name, tc := range map[string]struct {
		results      []verdict.Result // of probe order, one a run; then the runs fail
		runs         int
		inconclusive bool
		err          error
	}{
		"at once":           {[]verdict.Result{verdict.OK}, 1, false, nil},
		"not supported":     {[]verdict.Result{verdict.NotOK}, 1, false, nil},
		"busy at first":     {[]verdict.Result{verdict.CouldNotTell, verdict.CouldNotTell, verdict.OK}, 3, false, nil},
		"busy all the time": {[]verdict.Result{verdict.CouldNotTell, verdict.CouldNotTell, verdict.CouldNotTell}, 3, true, nil},
		"fails":             {nil, 1, false, failure},
		"fails then":        {[]verdict.Result{verdict.CouldNotTell}, 2, false, failure},
	} {
		t.Run(name, func(t *testing.T) {
			runs := 0
			v, err := conclusive(func() (*verdict.Verdict, error) {
				if runs++; runs > len(tc.results) {
					return nil, failure
				}
				return &verdict.Verdict{Probes: []verdict.Probe{{Name: verdict.ProbeOrder, Result: tc.results[runs-1]}}}, nil
			})
			if !errors.Is(err, tc.err) || (err != nil) != (v == nil) || runs != tc.runs {
				t.Fatalf("%v, %v after %d runs, not %d", v, err, runs, tc.runs)
			}
			if v != nil && (Verdict{Document: v}).Inconclusive() != tc.inconclusive {
				t.Errorf("inconclusive: %v", !tc.inconclusive)
			}
		})
	}
	if (Verdict{}).Inconclusive() {
		t.Error("a verdict without document is inconclusive")
	}
}
