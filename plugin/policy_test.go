package plugin

import (
	"encoding/json"
	"fmt"
	"reflect"
	"strings"
	"testing"

	"github.com/skipstack/skipstack/plugin/datapath"
)

func TestDecide(t *testing.T) {
	const (
		splice    = datapath.RiskSplice
		uncharged = datapath.RiskUncharged
		all       = allRisks
		none      = datapath.Risk(0)
	)
	mode := func(m string) map[string]string { return map[string]string{"skipstack/mode": m} }
	for _, tc := range []struct {
		name        string
		mode        Mode
		accept      datapath.Risk
		annotations map[string]string
		bandwidth   bool
		reason      string // a prefix; empty: enabled
		accepted    datapath.Risk
	}{
		{"auto", ModeAuto, none, nil, false, "", none},
		{"auto accepts", ModeAuto, splice, nil, false, "", splice},
		{"auto, pod on", ModeAuto, none, mode("on"), false, "", all &^ uncharged},
		{"auto accepts uncharged, pod on", ModeAuto, uncharged, mode("on"), false, "", all},
		{"auto, pod off", ModeAuto, all, mode("off"), false, "annotation", 0},
		{"auto, pod auto", ModeAuto, splice, mode("auto"), false, "", splice},
		{"on", ModeOn, none, nil, false, "", all},
		{"on, pod on", ModeOn, none, mode("on"), false, "", all},
		{"on, pod off", ModeOn, none, mode("off"), false, "annotation", 0},
		{"on, pod auto", ModeOn, splice, mode("auto"), false, "", splice},
		{"off", ModeOff, all, nil, false, "mode off", 0},
		{"off, pod on", ModeOff, all, mode("on"), false, "mode off", 0},
		{"off, pod malformed", ModeOff, all, mode("x"), false, "mode off", 0},
		{"malformed mode", ModeOn, all, mode("ON"), false, `annotation skipstack/mode: "ON" is not one of`, 0},
		{"empty mode", ModeOn, all, mode(""), false, `annotation skipstack/mode: "" is not one of`, 0},
		{"unknown annotation", ModeOn, all, map[string]string{"skipstack/exclude-port": "1"}, false, `unknown annotation "skipstack/exclude-port"`, 0},
		{"foreign annotation", ModeAuto, none, map[string]string{"example.com/skipstack/mode": "off", "skipstack": "x"}, false, "", none},
		{"malformed ports", ModeAuto, none, map[string]string{"skipstack/exclude-ports": "80,x"}, false, `annotation skipstack/exclude-ports: "x"`, 0},
		{"bandwidth", ModeAuto, all, nil, true, "bandwidth", 0},
		{"bandwidth, pod on", ModeAuto, all, mode("on"), true, "bandwidth", 0},
		{"bandwidth annotation", ModeAuto, all, map[string]string{"kubernetes.io/ingress-bandwidth": "10M"}, false, "bandwidth", 0},
		{"egress annotation", ModeAuto, all, map[string]string{"kubernetes.io/egress-bandwidth": "10M"}, false, "bandwidth", 0},
		{"bandwidth, mode on", ModeOn, none, nil, true, "", all},
		{"bandwidth, mode on, pod auto", ModeOn, none, mode("auto"), true, "bandwidth", 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			conf := DefaultConfig()
			conf.Mode, conf.AcceptRisks = tc.mode, tc.accept
			got, reason := decide(conf, runtimeConfig{annotations: tc.annotations, bandwidth: tc.bandwidth})
			if tc.reason != "" {
				if !strings.HasPrefix(reason, tc.reason) || got.Enabled {
					t.Errorf("got %+v, reason %q, want reason %q", got, reason, tc.reason)
				}
				return
			}
			if reason != "" || !got.Enabled || got.Accepted != tc.accepted || got.SwitchedOff {
				t.Errorf("got %+v, reason %q, want accepted %v", got, reason, tc.accepted)
			}
		})
	}
}

func TestDecidePorts(t *testing.T) {
	conf := DefaultConfig()
	conf.ExcludePorts = []datapath.PortRange{{First: 80, Last: 80}}
	ports := func(s string) runtimeConfig {
		return runtimeConfig{annotations: map[string]string{"skipstack/exclude-ports": s}}
	}
	got, reason := decide(conf, ports(" 443, 81-90 ,5432"))
	want := []datapath.PortRange{{First: 80, Last: 90}, {First: 443, Last: 443}, {First: 5432, Last: 5432}}
	if reason != "" || !reflect.DeepEqual(got.ExcludePorts, want) {
		t.Errorf("got %v, reason %q, want %v", got.ExcludePorts, reason, want)
	}
	if got, reason := decide(conf, ports("")); reason != "" || len(got.ExcludePorts) != 1 {
		t.Errorf("no ports: got %v, reason %q", got.ExcludePorts, reason)
	}

	var many []string
	for i := range datapath.MaxExcludePorts {
		many = append(many, fmt.Sprint(1000+2*i))
	}
	if _, reason := decide(conf, ports(strings.Join(many, ","))); !strings.Contains(reason, "17 separate ranges") {
		t.Errorf("17 ranges with the configuration's: reason %q", reason)
	}
	if _, reason := decide(conf, ports(strings.Join(many[1:], ","))); reason != "" {
		t.Errorf("16 ranges with the configuration's: reason %q", reason)
	}
	if len(conf.ExcludePorts) != 1 {
		t.Error("decide changed the configuration")
	}
}

func TestParseRuntimeConfig(t *testing.T) {
	for _, tc := range []struct {
		name, raw string
		want      runtimeConfig
		fails     bool
	}{
		{"absent", ``, runtimeConfig{}, false},
		{"empty", `{}`, runtimeConfig{}, false},
		{"path", `{"cgroupPath": "/kubepods/podx"}`, runtimeConfig{cgroupPath: "/kubepods/podx"}, false},
		{"nulls", `{"cgroupPath": null, "bandwidth": null, "io.kubernetes.cri.pod-annotations": null}`, runtimeConfig{}, false},
		{"annotations", `{"io.kubernetes.cri.pod-annotations": {"a": "b"}}`, runtimeConfig{annotations: map[string]string{"a": "b"}}, false},
		{"bandwidth", `{"bandwidth": {"ingressRate": 1000, "ingressBurst": 8}}`, runtimeConfig{bandwidth: true}, false},
		{"no bandwidth", `{"bandwidth": {"ingressRate": 0, "egressRate": 0, "egressBurst": 34359738359}}`, runtimeConfig{}, false},
		{"odd bandwidth", `{"bandwidth": "10M"}`, runtimeConfig{bandwidth: true}, false},
		{"others", `{"portMappings": [], "ips": ["10.0.0.1"]}`, runtimeConfig{}, false},
		{"list", `[]`, runtimeConfig{}, true},
		{"path number", `{"cgroupPath": 7}`, runtimeConfig{}, true},
		{"annotation number", `{"io.kubernetes.cri.pod-annotations": {"a": 1}}`, runtimeConfig{}, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var raw json.RawMessage
			if tc.raw != "" {
				raw = json.RawMessage(tc.raw)
			}
			got, err := parseRuntimeConfig(raw)
			if (err != nil) != tc.fails {
				t.Fatalf("error %v", err)
			}
			if err == nil && !reflect.DeepEqual(got, tc.want) {
				t.Errorf("got %+v, want %+v", got, tc.want)
			}
		})
	}
}

func TestParsePodArgs(t *testing.T) {
	for _, tc := range []struct {
		in   string
		want podArgs
	}{
		{"", podArgs{}},
		{"K8S_POD_NAMESPACE=ns;K8S_POD_NAME=p;K8S_POD_UID=u;IgnoreUnknown=1", podArgs{"ns", "p", "u"}},
		{"K8S_POD_UID=a;K8S_POD_UID=b", podArgs{uid: "b"}},
		{";;=;x;K8S_POD_NAME", podArgs{}},
		{"K8S_POD_NAME=a=b", podArgs{name: "a=b"}},
		{"k8s_pod_name=a", podArgs{}},
	} {
		if got := parsePodArgs(tc.in); got != tc.want {
			t.Errorf("%q: got %+v, want %+v", tc.in, got, tc.want)
		}
	}
}

func TestStrictest(t *testing.T) {
	a := newWish("", datapath.PodSettings{Enabled: true, Accepted: allRisks, UnreadLimit: 1 << 20, ExcludePorts: []datapath.PortRange{{First: 80, Last: 90}}})
	b := newWish("", datapath.PodSettings{Enabled: true, Accepted: datapath.RiskSplice, UnreadLimit: 1 << 16, ExcludePorts: []datapath.PortRange{{First: 85, Last: 99}, {First: 443, Last: 443}}})
	off := newWish("", datapath.PodSettings{UnreadLimit: 1 << 24})
	want := datapath.PodSettings{
		Enabled: true, Accepted: datapath.RiskSplice, UnreadLimit: 1 << 16,
		ExcludePorts: []datapath.PortRange{{First: 80, Last: 99}, {First: 443, Last: 443}},
	}
	for _, wishes := range [][]wish{{a, b}, {b, a}, {a, b, a}} {
		if got := strictest(wishes); !reflect.DeepEqual(got, want) {
			t.Errorf("got %+v, want %+v", got, want)
		}
	}
	if got := strictest([]wish{a, off}); got.Enabled {
		t.Errorf("one attachment is off, yet got %+v", got)
	}
	if got := strictest([]wish{a, {Enabled: true, AcceptRisks: []string{"of a later version"}}}); got.Enabled {
		t.Errorf("one attachment is not understood, yet got %+v", got)
	}

	var many datapath.PodSettings
	many.Enabled = true
	for i := range datapath.MaxExcludePorts {
		many.ExcludePorts = append(many.ExcludePorts, datapath.PortRange{First: uint16(1000 + 2*i), Last: uint16(1000 + 2*i)})
	}
	if got := strictest([]wish{newWish("", many)}); !got.Enabled {
		t.Errorf("%d ranges: got %+v", datapath.MaxExcludePorts, got)
	}
	if got := strictest([]wish{newWish("", many), a}); got.Enabled || len(got.ExcludePorts) > datapath.MaxExcludePorts {
		t.Errorf("more ranges than the datapath takes, yet got %+v", got)
	}
}

func TestWishRoundTrip(t *testing.T) {
	s := datapath.PodSettings{
		Enabled: true, Accepted: datapath.RiskEpoll | datapath.RiskBlocking, UnreadLimit: 4096,
		ExcludePorts: []datapath.PortRange{{First: 1, Last: 1}, {First: 5, Last: 9}},
	}
	var w wish
	if err := json.Unmarshal(newWish("/sys/fs/bpf", s).encode(), &w); err != nil {
		t.Fatal(err)
	}
	if got, ok := w.settings(); !ok || !reflect.DeepEqual(got, s) || w.BPFFS != "/sys/fs/bpf" {
		t.Errorf("got %+v, %v", got, ok)
	}
}

func FuzzAnnotations(f *testing.F) {
	f.Add("on", "80,443", false)
	f.Add("off", "", true)
	f.Add("auto", "1-65535", false)
	f.Add("", "0", false)
	f.Add("ON", "1-2-3,,", false)
	f.Add("on", "1,3,5,7,9,11,13,15,17,19,21,23,25,27,29,31,33", false)
	f.Fuzz(func(t *testing.T, mode, ports string, bandwidth bool) {
		conf := DefaultConfig()
		conf.ExcludePorts = []datapath.PortRange{{First: 22, Last: 22}}
		s, reason := decide(conf, runtimeConfig{
			annotations: map[string]string{"skipstack/mode": mode, "skipstack/exclude-ports": ports},
			bandwidth:   bandwidth,
		})
		if s.Enabled != (reason == "") {
			t.Errorf("enabled %v with reason %q", s.Enabled, reason)
		}
		if s.Enabled && (mode == "off" || bandwidth) {
			t.Error("enabled against the pod's wish")
		}
		if s.Accepted&datapath.RiskUncharged != 0 {
			t.Error("a pod accepted the node's risk")
		}
		if strings.ContainsAny(reason, "\n\r") {
			t.Errorf("reason %q is not one line", reason)
		}
		if !s.Enabled {
			return
		}
		covered := false
		for i, r := range s.ExcludePorts {
			covered = covered || r.First <= 22 && 22 <= r.Last
			if r.First == 0 || r.Last < r.First || i > 0 && r.First <= s.ExcludePorts[i-1].Last {
				t.Errorf("ranges %v", s.ExcludePorts)
			}
		}
		if !covered || len(s.ExcludePorts) > datapath.MaxExcludePorts {
			t.Errorf("ranges %v", s.ExcludePorts)
		}
	})
}

func FuzzPodArgs(f *testing.F) {
	for _, seed := range []string{
		"", "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web-0;K8S_POD_INFRA_CONTAINER_ID=abc;K8S_POD_UID=0f1e",
		";", "=", "K8S_POD_UID", "K8S_POD_UID=;K8S_POD_UID=../..", "K8S_POD_NAME=a=b;c",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, s string) {
		a := parsePodArgs(s)
		for key, value := range map[string]string{"K8S_POD_NAMESPACE": a.namespace, "K8S_POD_NAME": a.name, "K8S_POD_UID": a.uid} {
			if value != "" && !strings.Contains(";"+s+";", ";"+key+"="+value+";") {
				t.Errorf("%s=%q is not in %q", key, value, s)
			}
		}
	})
}

func FuzzRuntimeConfig(f *testing.F) {
	for _, seed := range []string{
		`{}`, `[]`, `{"cgroupPath":"/a"}`, `{"cgroupPath":1}`, `{"bandwidth":{"ingressRate":1e999}}`,
		`{"io.kubernetes.cri.pod-annotations":{"skipstack/mode":"on"}}`, `{"io.kubernetes.cri.pod-annotations":[]}`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		rc, err := parseRuntimeConfig(raw)
		if err == nil && len(raw) > 0 && !json.Valid(raw) {
			t.Errorf("took invalid JSON: %+v", rc)
		}
	})
}
