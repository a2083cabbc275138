package plugin

import (
	"errors"

	"github.com/skipstack/skipstack/plugin/datapath"
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
	MaxConnections uint32
	Node           datapath.NodeSettings
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
	if out.MaxConnections, err = set.MaxConnections(); err != nil {
		return out, err
	}
	out.Node, err = set.Node()
	return out, err
}
