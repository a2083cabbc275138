package plugin

import (
	"errors"
	"testing"
	"time"

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

// A verdict that leaves io_uring open is due where no seccomp filter is in force.
func TestDueForRing(t *testing.T) {
	v := &verdict.Verdict{Level: verdict.Safe, ProbedAt: time.Now(), RingUntried: true}
	if got := asVerdict(v); got.Due != v.Improvable() {
		t.Errorf("due: %v", got.Due)
	}
	if v.RingUntried = false; asVerdict(v).Due {
		t.Error("due for nothing")
	}
}
