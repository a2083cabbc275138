package plugin

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"github.com/skipstack/skipstack/plugin/datapath"
)

// Annotations a pod may carry. A key below skipstack/ that is not listed counts
// as malformed: a misspelt exclude-ports must not accelerate the port it names.
const (
	annotationPrefix       = "skipstack/"
	annotationMode         = annotationPrefix + "mode"
	annotationExcludePorts = annotationPrefix + "exclude-ports"

	annotationIngressBandwidth = "kubernetes.io/ingress-bandwidth"
	annotationEgressBandwidth  = "kubernetes.io/egress-bandwidth"
)

// Reasons of a pod that was skipped because somebody wanted it so. Every other
// reason is the text of what went wrong.
const (
	reasonMode       = "mode off"
	reasonAnnotation = "annotation"
	reasonBandwidth  = "bandwidth"
)

// runtimeConfig is what skipstack reads of the capability arguments.
type runtimeConfig struct {
	cgroupPath  string
	annotations map[string]string
	bandwidth   bool // a limit is set
}

// parseRuntimeConfig reads the capabilities cgroupPath, bandwidth and
// io.kubernetes.cri.pod-annotations. An absent one is the zero value: not every
// runtime passes them, and Multus passes neither annotations nor cgroupPath.
func parseRuntimeConfig(raw json.RawMessage) (runtimeConfig, error) {
	var rc runtimeConfig
	if raw == nil {
		return rc, nil
	}
	members, err := splitObject(raw)
	if err != nil {
		return rc, fmt.Errorf("runtimeConfig: %w", err)
	}
	if value := lookup(members, "cgroupPath"); value != nil {
		if rc.cgroupPath, err = decodeString(value); err != nil {
			return rc, fmt.Errorf("runtimeConfig: cgroupPath: %w", err)
		}
	}
	if value := lookup(members, "io.kubernetes.cri.pod-annotations"); value != nil {
		if err := json.Unmarshal(value, &rc.annotations); err != nil {
			return rc, fmt.Errorf("runtimeConfig: pod-annotations: %w", err)
		}
	}
	if value := lookup(members, "bandwidth"); value != nil {
		// CNI's conventions: rates in bits per second, 0 is no limit. What
		// cannot be read is taken for a limit.
		var limit struct {
			IngressRate float64 `json:"ingressRate"`
			EgressRate  float64 `json:"egressRate"`
		}
		err := json.Unmarshal(value, &limit)
		rc.bandwidth = err != nil || limit.IngressRate != 0 || limit.EgressRate != 0
	}
	return rc, nil
}

// podArgs is what skipstack reads of CNI_ARGS.
type podArgs struct{ namespace, name, uid string }

// parsePodArgs reads "K=V;K=V". Other keys and fragments without "=" pass: the
// variable is shared by all plugins of a chain. As in the CNI library, the last
// of several values counts.
func parsePodArgs(s string) podArgs {
	var a podArgs
	for pair := range strings.SplitSeq(s, ";") {
		key, value, ok := strings.Cut(pair, "=")
		if !ok {
			continue
		}
		switch key {
		case "K8S_POD_NAMESPACE":
			a.namespace = value
		case "K8S_POD_NAME":
			a.name = value
		case "K8S_POD_UID":
			a.uid = value
		}
	}
	return a
}

// decide works out what a pod gets from the configuration and its annotations
// alone. The kernel's verdict has no part in it: the datapath compares the risks
// accepted here with the node's by itself, so a verdict may come later.
//
// A non-empty reason says that the pod is to be left alone, and settings.Enabled
// is false then. That goes for a malformed annotation too: it is the tenant's, so
// it never fails a pod, whatever the operator's onError says.
func decide(conf Config, rc runtimeConfig) (settings datapath.PodSettings, reason string) {
	settings = datapath.PodSettings{
		Accepted:     conf.AcceptRisks,
		UnreadLimit:  conf.UnreadLimit,
		ExcludePorts: conf.ExcludePorts,
	}
	if conf.Mode == ModeOff {
		return settings, reasonMode
	}
	own, err := parseAnnotations(rc.annotations)
	if err != nil {
		return settings, err.Error()
	}
	if own.mode == ModeOff {
		return settings, reasonAnnotation
	}

	// The pod may always ask for more care than the configuration takes, hence
	// auto wins over on.
	auto := conf.Mode == ModeAuto || own.mode == ModeAuto
	switch {
	case auto && limitsBandwidth(rc):
		// Redirected bytes never reach the interface that limits the rate.
		return settings, reasonBandwidth
	case !auto:
		settings.Accepted = allRisks
	case own.mode == ModeOn:
		// On a kernel that charges redirected bytes to nobody the whole node
		// pays, so that risk is not the pod's to accept.
		settings.Accepted = allRisks&^datapath.RiskUncharged | conf.AcceptRisks
	}

	settings.ExcludePorts = mergePorts(append(slices.Clone(conf.ExcludePorts), own.excludePorts...))
	if n := len(settings.ExcludePorts); n > datapath.MaxExcludePorts {
		return settings, fmt.Sprintf("annotation %s: %d separate ranges with the configuration's, at most %d are possible",
			annotationExcludePorts, n, datapath.MaxExcludePorts)
	}
	settings.Enabled = true
	return settings, ""
}

func limitsBandwidth(rc runtimeConfig) bool {
	return rc.bandwidth || rc.annotations[annotationIngressBandwidth] != "" ||
		rc.annotations[annotationEgressBandwidth] != ""
}

type ownAnnotations struct {
	mode         Mode // empty: none
	excludePorts []datapath.PortRange
}

func parseAnnotations(annotations map[string]string) (ownAnnotations, error) {
	var own ownAnnotations
	var keys []string
	for key := range annotations {
		if strings.HasPrefix(key, annotationPrefix) {
			keys = append(keys, key)
		}
	}
	slices.Sort(keys) // the same complaint every time
	for _, key := range keys {
		value := annotations[key]
		switch key {
		case annotationMode:
			switch own.mode = Mode(value); own.mode {
			case ModeAuto, ModeOn, ModeOff:
			default:
				return own, fmt.Errorf("annotation %s: %s is not one of auto, on, off", key, quote(value))
			}
		case annotationExcludePorts:
			if strings.TrimSpace(value) == "" {
				continue // none, as a template may render it
			}
			for part := range strings.SplitSeq(value, ",") {
				r, err := parsePorts(strings.TrimSpace(part))
				if err != nil {
					return own, fmt.Errorf("annotation %s: %w", key, err)
				}
				own.excludePorts = append(own.excludePorts, r)
			}
		default:
			return own, fmt.Errorf("unknown annotation %s", quote(key))
		}
	}
	return own, nil
}

// wish is what one attachment asks for its pod, as its record keeps it for
// whoever has to settle the pod's settings, or to clean up, later.
type wish struct {
	// BPFFS is where the attachment's link is pinned. DEL takes it from here,
	// as its own configuration may be broken or changed by then.
	BPFFS        string   `json:"bpffs,omitempty"`
	Enabled      bool     `json:"enabled"`
	AcceptRisks  []string `json:"acceptRisks,omitempty"`
	UnreadLimit  uint32   `json:"unreadLimit,omitempty"` // bytes
	ExcludePorts []string `json:"excludePorts,omitempty"`
}

func newWish(bpffs string, s datapath.PodSettings) wish {
	w := wish{
		BPFFS:       bpffs,
		Enabled:     s.Enabled,
		AcceptRisks: s.Accepted.Names(),
		UnreadLimit: s.UnreadLimit,
	}
	for _, r := range s.ExcludePorts {
		w.ExcludePorts = append(w.ExcludePorts, formatPorts(r))
	}
	return w
}

func (w wish) encode() json.RawMessage {
	raw, err := json.Marshal(w)
	if err != nil {
		panic(err) // strings, numbers and booleans always encode
	}
	return raw
}

// settings returns false for a wish that this version cannot read in full; such
// a pod is not accelerated.
func (w wish) settings() (datapath.PodSettings, bool) {
	s := datapath.PodSettings{Enabled: w.Enabled, UnreadLimit: w.UnreadLimit}
	for _, name := range w.AcceptRisks {
		r, ok := datapath.ParseRisk(name)
		if !ok {
			return datapath.PodSettings{}, false
		}
		s.Accepted |= r
	}
	for _, ports := range w.ExcludePorts {
		r, err := parsePorts(ports)
		if err != nil {
			return datapath.PodSettings{}, false
		}
		s.ExcludePorts = append(s.ExcludePorts, r)
	}
	return s, true
}

// strictest settles what a pod gets whose attachments ask for different things:
// the datapath knows a pod by its cgroup and cannot tell its networks apart.
// SwitchedOff is not an attachment's to say and stays false.
func strictest(wishes []wish) datapath.PodSettings {
	var out datapath.PodSettings
	for i, w := range wishes {
		s, ok := w.settings()
		if !ok {
			return datapath.PodSettings{}
		}
		if i == 0 {
			out = s
			continue
		}
		out.Enabled = out.Enabled && s.Enabled
		out.Accepted &= s.Accepted
		out.UnreadLimit = min(out.UnreadLimit, s.UnreadLimit)
		out.ExcludePorts = append(out.ExcludePorts, s.ExcludePorts...)
	}
	out.ExcludePorts = mergePorts(out.ExcludePorts)
	if len(out.ExcludePorts) > datapath.MaxExcludePorts {
		// Accelerating an excluded port would be wrong, so accelerate none.
		out.Enabled = false
		out.ExcludePorts = nil
	}
	return out
}
