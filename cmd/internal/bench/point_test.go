package bench

import (
	"testing"
	"time"
)

// TestQuickFits adds up what --quick is told to take; making the node, verifying and
// cleaning up take some two seconds more.
func TestQuickFits(t *testing.T) {
	p := quickParameters(options{})
	if err := p.validate(); err != nil {
		t.Fatal(err)
	}
	points := quickPoints(2)
	if total := time.Duration(2*p.Repeats*len(points)) * (p.WarmUp + p.Length); total > 17*time.Second {
		t.Errorf("%d points take %v", len(points), total)
	}
	if one := quickPoints(1); len(one) != len(points)-1 {
		t.Errorf("%d points on one CPU, %d on two", len(one), len(points))
	}
	service := false
	for _, point := range points {
		if service && point.Path == PodIP {
			t.Error("a pod IP point comes after a Service one, and would pay for its connection tracking")
		}
		service = service || point.Path == ServiceIP
	}
}

func TestParametersAreChecked(t *testing.T) {
	good := quickParameters(options{})
	for name, change := range map[string]func(*Parameters){
		"few repeats": func(p *Parameters) { p.Repeats = 4 },
		"short":       func(p *Parameters) { p.Length = minLength - 1 },
		"no warm-up":  func(p *Parameters) { p.WarmUp = 0 },
	} {
		p := good
		change(&p)
		if p.validate() == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}
