package plugin

import (
	"strings"
	"testing"

	"github.com/skipstack/skipstack/plugin/datapath"
)

func TestForesee(t *testing.T) {
	splice := datapath.NodeSettings{Open: true, Risks: datapath.RiskSplice}
	guarded := datapath.NodeSettings{Open: true, Guard: datapath.GuardLSM}
	uncharged := datapath.NodeSettings{Open: true, Risks: datapath.RiskUncharged}
	for name, tc := range map[string]struct {
		members      string
		gate         datapath.NodeSettings
		obstacle     string
		pods, asking Outcome
		why          string // of either
	}{
		"safe":           {``, datapath.NodeSettings{Open: true}, "", Accelerated, Accelerated, ""},
		"guarded":        {``, guarded, "", Accelerated, Accelerated, ""},
		"guard off":      {`"spliceGuard":"off"`, guarded, "", Plain, Accelerated, "not accepted: splice"},
		"risky":          {``, splice, "", Plain, Accelerated, "not accepted: splice"},
		"accepted":       {`"acceptRisks":["splice"]`, splice, "", Accelerated, Accelerated, ""},
		"the node's":     {``, uncharged, "", Plain, Plain, "not accepted: uncharged"},
		"mode on":        {`"mode":"on"`, uncharged, "", Accelerated, Accelerated, ""},
		"mode off":       {`"mode":"off","onError":"fail"`, splice, "no cgroup2", Plain, Plain, "mode is off"},
		"obstacle":       {`"mode":"on"`, splice, "no cgroup2", Plain, Plain, "no cgroup2"},
		"strict":         {`"onError":"fail"`, splice, "no cgroup2", Refused, Refused, "no cgroup2"},
		"strict, risky":  {`"onError":"fail"`, splice, "", Plain, Accelerated, "not accepted"},
		"unsupported":    {`"mode":"on"`, datapath.NodeSettings{}, "", Plain, Plain, "not supported"},
		"switched off":   {`"mode":"on"`, datapath.NodeSettings{Open: true, SwitchedOff: true}, "", Plain, Plain, "`skipstack on`"},
		"strict, closed": {`"onError":"fail"`, datapath.NodeSettings{}, "", Refused, Refused, "not supported"},
	} {
		t.Run(name, func(t *testing.T) {
			conf, err := ParseConfig([]byte("{" + tc.members + "}"))
			if err != nil {
				t.Fatal(err)
			}
			pods, asking := Foresee(conf, tc.gate, tc.obstacle)
			if pods.Outcome != tc.pods || asking.Outcome != tc.asking {
				t.Errorf("%+v, asking %+v", pods, asking)
			}
			for _, o := range []Outlook{pods, asking} {
				if (o.Outcome == Accelerated) != (o.Why == "") || !strings.Contains(o.Why, tc.why) && o.Outcome != Accelerated {
					t.Errorf("%+v", o)
				}
			}
		})
	}
}
