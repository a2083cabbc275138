package verdict

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/skipstack/skipstack/plugin/datapath"
)

// made returns the verdict that follows if the named probes have that result and
// all others are ok.
func made(r Result, names ...string) *Verdict {
	v := &Verdict{Kernel: "6.1.0", BootID: "boot", Build: [16]byte{1}}
	for _, k := range kinds {
		p := Probe{k.name, OK, "fine"}
		if slices.Contains(names, k.name) {
			p = Probe{k.name, r, "because"}
		}
		v.Probes = append(v.Probes, p)
	}
	v.conclude()
	return v
}

func TestConclude(t *testing.T) {
	for _, tc := range []struct {
		probes []string
		level  Level
		risks  datapath.Risk
		text   string
	}{
		{nil, Safe, 0, "safe"},
		{[]string{ProbeLoad}, Unsupported, 0, "unsupported: load: because"},
		{[]string{ProbeRedirect}, Unsupported, 0, "unsupported: redirect: because"},
		{[]string{ProbeOrder}, Unsupported, 0, "unsupported: order: because"},
		{[]string{ProbeCharged}, Risky, datapath.RiskUncharged, "risky: uncharged"},
		{[]string{ProbeFIONREAD}, Risky, datapath.RiskFIONREAD, "risky: fionread"},
		{[]string{ProbeEpoll}, Risky, datapath.RiskEpoll, "risky: epoll"},
		{[]string{ProbeSplice}, Risky, datapath.RiskSplice, "risky: splice"},
		{[]string{ProbeMPTCP}, Safe, 0, "safe"},
		{[]string{ProbeSplice, ProbeCharged}, Risky, datapath.RiskSplice | datapath.RiskUncharged, "risky: splice, uncharged"},
		{[]string{ProbeSplice, ProbeOrder}, Unsupported, datapath.RiskSplice, "unsupported: order: because"},
	} {
		for _, r := range []Result{NotOK, CouldNotTell} {
			v := made(r, tc.probes...)
			text := tc.text
			if r == CouldNotTell {
				text = strings.Replace(text, "unsupported", "inconclusive", 1)
			}
			if v.Inconclusive() != strings.HasPrefix(text, "inconclusive") {
				t.Errorf("%s %v: inconclusive is %v", r, tc.probes, v.Inconclusive())
			}
			if v.Level != tc.level || v.Risks != tc.risks || v.String() != text {
				t.Errorf("%s %v: %s, risks %q, %q", r, tc.probes, v.Level, v.Risks, v)
			}
			n := v.NodeSettings()
			if n.Open != (tc.level != Unsupported) || n.Risks != tc.risks || n.Funnel ||
				n.MPTCPListeners == slices.Contains(tc.probes, ProbeMPTCP) {
				t.Errorf("%s %v: node settings %+v", r, tc.probes, n)
			}
		}
	}
	v := made(CouldNotTell, ProbeRedirect)
	v.set(ProbeOrder, NotOK, "shown to be wrong")
	v.conclude()
	if want := "unsupported: order: shown to be wrong"; v.Inconclusive() || v.String() != want {
		t.Errorf("%q, not %q", v, want)
	}
	v = made(OK)
	v.Funnel = true
	if !v.NodeSettings().Funnel {
		t.Error("the node's settings forget the funnel")
	}
}

func TestUnloadable(t *testing.T) {
	v := made(OK)
	v.unloadable(datapath.ErrUnsupported)
	if v.Level != Unsupported || v.Risks&datapath.RiskSplice == 0 || v.MPTCPListeners {
		t.Errorf("%+v", v)
	}
	if want := "unsupported: load: " + datapath.ErrUnsupported.Error(); v.String() != want {
		t.Errorf("%q, not %q", v, want)
	}
	// The kernel will not learn to load them before it is booted again.
	if v.Inconclusive() || v.Due(v.ProbedAt.Add(1000*time.Hour)) {
		t.Error("a kernel that refuses the programs would be probed again and again")
	}
}

// TestJSON holds to the form that is documented.
func TestJSON(t *testing.T) {
	data, err := json.Marshal(made(NotOK, ProbeSplice))
	if err != nil {
		t.Fatal(err)
	}
	var got struct {
		Verdict string
		Risks   []string
		Probes  []map[string]string
	}
	if err := json.Unmarshal(data, &got); err != nil {
		t.Fatal(err)
	}
	if got.Verdict != "risky" || !slices.Equal(got.Risks, []string{"splice"}) || len(got.Probes) != len(kinds) {
		t.Errorf("%s", data)
	}
	for _, p := range got.Probes {
		if len(p) != 3 || p["name"] == "" || p["result"] == "" || p["detail"] == "" {
			t.Errorf("probe %v", p)
		}
	}
	if data, _ = json.Marshal(made(OK)); !strings.Contains(string(data), `"risks":[]`) {
		t.Errorf("no risks are not an empty list: %s", data)
	}
}
