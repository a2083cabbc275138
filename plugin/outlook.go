package plugin

import (
	"cmp"
	"errors"
	"fmt"

	"github.com/skipstack/skipstack/plugin/datapath"
	"github.com/skipstack/skipstack/plugin/verdict"
)

// Outcome is what ADD makes of a pod.
type Outcome string

const (
	Accelerated Outcome = "accelerated"
	Plain       Outcome = "plain"
	Refused     Outcome = "refused" // ADD fails, as onError says
	Unknown     Outcome = "unknown" // it depends on the kernel, of which nothing is known
)

// Outlook is what ADD would make of a pod, and why it would not be accelerated.
type Outlook struct {
	Outcome Outcome `json:"outcome"`
	Why     string  `json:"why,omitempty"`
}

// Foresee says what ADD would make of a pod without a bandwidth limit: of one
// without annotations, and of one that asks for acceleration. gate is the node's, or
// what the kernel's verdict asks for.
// obstacle is why no pod can be attached to, "" where nothing is in the way.
func Foresee(conf Config, gate datapath.NodeSettings, obstacle string) (pods, asking Outlook) {
	if conf.SpliceGuard == SpliceGuardOff {
		gate = unguarded(gate)
	}
	foresee := func(annotations map[string]string) Outlook {
		settings, why := decide(conf, runtimeConfig{annotations: annotations})
		if obstacle == "" && !gate.Open {
			obstacle = "the kernel is not supported"
		}
		switch {
		case why == reasonMode:
			return Outlook{Plain, "mode is off"}
		case why != "":
			return Outlook{Plain, why}
		case obstacle != "" && conf.OnError == OnErrorFail:
			return Outlook{Refused, obstacle}
		case obstacle != "":
			return Outlook{Plain, obstacle}
		}
		if why := whyPlain(gate, settings); why != "" {
			return Outlook{Plain, why}
		}
		return Outlook{Accelerated, ""}
	}
	return foresee(nil), foresee(map[string]string{annotationMode: string(ModeOn)})
}

// Standing is what is loaded on the node now.
type Standing struct {
	Loaded         bool
	SameBuild      bool // as this binary's
	MaxConnections uint32
	Node           datapath.NodeSettings
}

// Update is what makes the loaded datapath go by a verdict that is stored.
type Update string

const (
	UpToDate     Update = ""         // nothing has to: it does, or an ADD has its gate opened by it
	UpdateByADD  Update = "next pod" // an ADD has it done in the background
	UpdateByLoad Update = "load"     // only [Node.Load] does
)

// Compare compares what is loaded with a verdict of this build: what makes it go by
// it if that is stored, and in what it does not yet, each difference in a few words.
func (s Standing) Compare(conf Config, v *verdict.Verdict) (Update, []string) {
	if !s.Loaded || !s.Node.Open {
		return UpToDate, nil
	}
	judged, now := asVerdict(v), s.Node
	if conf.SpliceGuard == SpliceGuardOff {
		now = unguarded(now) // each ADD sees to that
	}
	want := judged.gate(conf)
	want.Funnel, want.SwitchedOff = want.Funnel || now.Funnel, now.SwitchedOff
	if !want.Open {
		want = datapath.NodeSettings{}
	}
	update := UpToDate
	switch {
	case !s.SameBuild:
		update = UpdateByLoad
	case want == now:
	case !judged.Inconclusive() && judged.differs(conf, now, true):
		update = UpdateByADD
	default:
		update = UpdateByLoad
	}
	return update, differences(now, want)
}

// After is the gate, which is open, once the ADD of a pod has had it brought up to date
// by a verdict of this build that is stored.
func (s Standing) After(conf Config, v *verdict.Verdict) datapath.NodeSettings {
	judged := asVerdict(v)
	if judged.Inconclusive() || !judged.differs(conf, s.Node, s.SameBuild) {
		return s.Node
	}
	gate := judged.over(conf, s.Node, s.SameBuild)
	gate.SwitchedOff = s.Node.SwitchedOff
	return gate
}

func differences(now, want datapath.NodeSettings) (all []string) {
	if !want.Open {
		return []string{"it accelerates, and should not"}
	}
	if now.Risks != want.Risks {
		all = append(all, fmt.Sprintf("risks: %s, not %s", cmp.Or(now.Risks.String(), "none"), cmp.Or(want.Risks.String(), "none")))
	}
	if now.Guard != want.Guard {
		all = append(all, fmt.Sprintf("splice guard: %s, not %s", cmp.Or(now.Guard, "none"), cmp.Or(want.Guard, "none")))
	}
	if now.MPTCPListeners != want.MPTCPListeners {
		is, other := "plain", "accelerated"
		if now.MPTCPListeners {
			is, other = other, is
		}
		all = append(all, fmt.Sprintf("MPTCP listeners: %s, not %s", is, other))
	}
	if now.Funnel != want.Funnel {
		all = append(all, "no sk_skb program for FIONREAD")
	}
	return all
}

// Standing looks at the datapath that is loaded, and changes nothing.
func (n *Node) Standing(conf Config) (Standing, error) {
	var out Standing
	set, err := n.Datapath.Open(conf.BPFFS)
	if errors.Is(err, datapath.ErrNotLoaded) || errors.Is(err, datapath.ErrDamaged) {
		return out, nil
	}
	if err != nil {
		return out, err
	}
	defer set.Close()
	out.Loaded = true
	build, err := set.Build()
	if err != nil {
		return out, err
	}
	out.SameBuild = build == datapath.Build()
	if out.MaxConnections, err = set.MaxConnections(); err != nil {
		return out, err
	}
	out.Node, err = set.Node()
	return out, err
}
