package plugin

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/types/create"

	"github.com/skipstack/skipstack/plugin/attachment"
	"github.com/skipstack/skipstack/plugin/datapath"
	"github.com/skipstack/skipstack/plugin/podcgroup"
)

func TestAddAttaches(t *testing.T) {
	for _, version := range SupportedVersions().SupportedVersions() {
		t.Run(version, func(t *testing.T) {
			b := newBench(t)
			r := request{version: version, conf: `"acceptRisks":["splice"],"excludePorts":[5432],"unreadLimit":65536`}
			b.mustAdd(r)
			b.wantLinks(101)
			b.wantRecord(r, attachment.Attached, "")
			b.wantLines(0)
			want := datapath.PodSettings{
				Enabled: true, Accepted: datapath.RiskSplice, UnreadLimit: 65536,
				ExcludePorts: []datapath.PortRange{{First: 5432, Last: 5432}},
			}
			if got := b.pod(101); !reflect.DeepEqual(got, want) {
				t.Errorf("settings %+v, want %+v", got, want)
			}
			rec, _ := b.record(r)
			if rec.PodNamespace != "ns" || rec.PodName != "web" || rec.PodUID != "uid" || rec.CgroupID != 101 ||
				rec.CgroupPath != "/pod-a" || rec.BPFFSDev != 7 || rec.MountNS == 0 || rec.NetNS != "/run/netns/x" || rec.Created.IsZero() {
				t.Errorf("record %+v", rec)
			}
			b.mustDel(r)
			b.wantNothing()
		})
	}
}

// What a later version of the library adds to results passes unharmed.
func TestAddPassesResultByteForByte(t *testing.T) {
	for _, prev := range []string{
		`{"cniVersion":"1.0.0","ips":[{"address":"10.0.0.5/24","new":{"a":[1,2.50,null]}}],"other":"ü\u00fc","dns":{}}`,
		`{ "dns" : {"nameservers":["10.0.0.2"]} , "routes":[{"dst":"0.0.0.0/0"}],"cniVersion":"1.0.0" }`,
		`{"cniVersion":"1.0.0"}`,
	} {
		b := newBench(t)
		out, err := b.add(request{version: "1.0.0", prev: prev})
		if err != nil || out != prev {
			t.Errorf("printed %s, error %v, want %s", out, err, prev)
		}
	}
}

func TestAddConvertsResultOfOtherVersion(t *testing.T) {
	for _, tc := range []struct{ version, prev, want string }{
		{"0.4.0", prevResultOf("1.0.0"), `"cniVersion": "0.4.0"`},
		{"0.4.0", prevResultOf("1.0.0"), `"version": "4"`},
		{"1.1.0", prevResultOf("0.3.1"), `"cniVersion": "1.1.0"`},
		{"1.1.0", prevResultOf("1.0.0"), `"cniVersion": "1.1.0"`},
		{"0.3.1", `{"ips":[{"version":"4","address":"10.0.0.5/24"}]}`, `,"cniVersion":"0.3.1"}`},
		{"0.3.0", `{ }`, `{"cniVersion":"0.3.0"}`},
		{"1.0.0", `{"cniVersion":"","dns":{} }`, `{"cniVersion":"","dns":{},"cniVersion":"1.0.0"}`},
	} {
		b := newBench(t)
		out, err := b.add(request{version: tc.version, prev: tc.prev})
		if err != nil || !strings.Contains(out, tc.want) || !json.Valid([]byte(out)) {
			t.Errorf("%s, %s: printed %s, error %v", tc.version, tc.prev, out, err)
		}
		b.wantLinks(101)
	}
}

// prevResult is required before anything else could end the ADD early.
func TestAddWithoutResult(t *testing.T) {
	for name, conf := range map[string]string{
		"plain": `"_":0`, "off": `"mode":"off"`, "unknown key": `"x":1`, "fail": `"onError":"fail"`,
	} {
		for _, prev := range []string{"", `null`, `[]`, `"x"`, `7`, `{"cniVersion":7}`, `{"cniVersion":"9.9.9"}`, `{"cniVersion":"1.1.0","ips":7}`} {
			t.Run(name+" "+prev, func(t *testing.T) {
				b := newBench(t)
				out, err := b.add(request{conf: conf, noPrev: prev == "", prev: prev})
				wantCode(t, err, types.ErrInvalidNetworkConfig, "prevResult")
				if out != "" {
					t.Errorf("printed %q", out)
				}
				b.wantNothing()
			})
		}
	}
}

func TestAddUndecodable(t *testing.T) {
	for _, stdin := range []string{``, `{`, `[]`, `{"name":7}`, `{"name":"n"}{}`} {
		b := newBench(t)
		args := b.args(request{})
		args.StdinData = []byte(stdin)
		wantCode(t, b.plugin(io.Discard).Add(args), types.ErrDecodingFailure)
		wantCode(t, b.plugin(io.Discard).Del(args), types.ErrDecodingFailure)
		wantCode(t, b.plugin(io.Discard).Check(args), types.ErrDecodingFailure)
		wantCode(t, b.plugin(io.Discard).GC(args), types.ErrDecodingFailure)
		wantCode(t, b.plugin(io.Discard).Status(args), types.ErrDecodingFailure)
	}
}

// Everything that can be in the way of acceleration: by default the pod starts,
// one line and the record say why; with onError "fail" the ADD fails, unless
// somebody wanted the pod left alone.
func TestAddNotAccelerated(t *testing.T) {
	pods := func(key, value string) map[string]string { return map[string]string{key: value} }
	for _, tc := range []struct {
		name    string
		r       request
		prepare func(*bench)
		reason  string
		code    uint // with onError "fail"; 0: it succeeds then too
	}{
		{name: "mode off", r: request{conf: `"mode":"off"`}, reason: "mode off"},
		{name: "annotation off", r: request{annotations: pods("skipstack/mode", "off")}, reason: "annotation"},
		{name: "annotation malformed", r: request{annotations: pods("skipstack/mode", "x\ny")}, reason: `annotation skipstack/mode: "x\ny" is not one of`},
		{name: "annotation unknown", r: request{annotations: pods("skipstack/x", "")}, reason: `unknown annotation "skipstack/x"`},
		{name: "bandwidth", r: request{annotations: pods("kubernetes.io/ingress-bandwidth", "1M")}, reason: "bandwidth"},
		{name: "mode off, no cgroup", r: request{conf: `"mode":"off"`, cgroup: "-"}, reason: "mode off"},
		{name: "unknown key", r: request{conf: `"moode":"on"`}, reason: `config: `, code: 7},
		{name: "key in the wrong case", r: request{conf: `"Mode":"on"`}, reason: `config: `, code: 7},
		{name: "invalid value", r: request{conf: `"unreadLimit":"1"`}, reason: `config: `, code: 7},
		{name: "capability", r: request{conf: `"runtimeConfig":{"cgroupPath":7}`}, reason: "runtimeConfig: cgroupPath", code: 11},
		{name: "no cgroup2", prepare: func(b *bench) { b.cgroups.rootErr = podcgroup.ErrNoCgroup2 }, reason: "cgroup: ", code: 11},
		{name: "no cgroup", r: request{cgroup: "elsewhere"}, reason: "cgroup: ", code: 11},
		{name: "no bpffs", prepare: func(b *bench) { b.datapath.fail["EnsureBPFFS"] = datapath.ErrNoBPFFS }, reason: "not a BPF file system", code: 11},
		{name: "open", prepare: func(b *bench) { b.datapath.fail["Open"] = errors.New("EPERM") }, reason: "EPERM", code: 11},
		{name: "load", prepare: func(b *bench) { b.datapath.fail["Load"] = datapath.ErrUnsupported }, reason: "kernel: ", code: 11},
		{name: "loader busy", prepare: func(b *bench) { b.datapath.fail["Load"] = datapath.ErrBusy }, reason: "busy: ", code: 11},
		{name: "verdict", prepare: func(b *bench) { b.verdicts.cached = &Verdict{Summary: "redirect does not work"} }, reason: "kernel: kernel not supported: redirect does not work", code: 11},
		{name: "node", prepare: func(b *bench) { b.datapath.fail["Node"] = errors.New("EIO") }, reason: "EIO", code: 11},
		{name: "gate", prepare: func(b *bench) { b.datapath.fail["SetNode"] = errors.New("EIO") }, reason: "EIO", code: 11},
		{name: "identity", prepare: func(b *bench) { b.datapath.fail["BPFFSIdentity"] = errors.New("EIO") }, reason: "EIO", code: 11},
		{name: "attach", prepare: func(b *bench) { b.datapath.fail["Attach"] = errors.New("EBUSY") }, reason: "EBUSY", code: 11},
		{name: "pod", prepare: func(b *bench) { b.datapath.fail["Pod"] = errors.New("EIO") }, reason: "read the pod's settings: EIO", code: 11},
		{name: "settings", prepare: func(b *bench) { b.datapath.fail["SetPod"] = errors.New("E2BIG") }, reason: "write the pod's settings: E2BIG", code: 11},
	} {
		t.Run(tc.name, func(t *testing.T) {
			for _, fail := range []bool{false, true} {
				b := newBench(t)
				if tc.prepare != nil {
					tc.prepare(b)
				}
				r := tc.r
				if fail {
					r.conf = strings.TrimPrefix(r.conf+`,"onError":"fail"`, ",")
				}
				out, err := b.add(r)
				switch {
				case !fail || tc.code == 0:
					if err != nil || out != r.withDefaults().prev {
						t.Errorf("onError fail %v: printed %q, error %v", fail, out, err)
					}
				default:
					wantCode(t, err, tc.code, "onError")
					if out != "" {
						t.Errorf("printed %q beside the error", out)
					}
				}
				b.wantRecord(r, attachment.Skipped, tc.reason)
				b.wantLinks()
				b.wantLines(1, "reason=", "container=c1", "pod=ns/web")
				if err := b.check(r); err != nil && tc.code != types.ErrInvalidNetworkConfig {
					t.Errorf("CHECK of a skipped pod: %v", err)
				}
				b.mustDel(r)
				b.wantNothing()
			}
		})
	}
}

// An onError that cannot be read cannot ask for failure.
func TestAddInvalidOnError(t *testing.T) {
	b := newBench(t)
	r := request{conf: `"onError":"FAIL"`}
	b.mustAdd(r)
	b.wantRecord(r, attachment.Skipped, "config: ")
}

// Whatever cannot be written, the pod starts.
func TestAddRunDirUnusable(t *testing.T) {
	b := newBench(t)
	r := request{conf: `"runDir":"/proc/no/such/dir"`}
	b.mustAdd(r)
	b.wantLinks()
	b.wantLines(1, "reason=")
	b.mustDel(r)
}

func TestAddNodeGate(t *testing.T) {
	t.Run("no verdict yet", func(t *testing.T) {
		b := newBench(t)
		b.verdicts.cached = nil
		b.mustAdd(request{})
		b.mustAdd(request{container: "c2", cgroup: "pod-b"})
		b.wantLinks(101, 102)
		if len(b.prober.starts) != 2 || b.prober.starts[0] || b.verdicts.probes != 0 {
			t.Errorf("prober started %v, %d probes in the ADD", b.prober.starts, b.verdicts.probes)
		}
		if b.datapath.node.Open {
			t.Error("gate is open without a verdict")
		}
		// The verdict comes: the next ADD opens the gate, or the prober has.
		b.verdicts.cached = &Verdict{Supported: true, Node: datapath.NodeSettings{Open: true, Risks: datapath.RiskSplice, Funnel: true}}
		b.mustAdd(request{container: "c3", cgroup: "pod-b"})
		if !reflect.DeepEqual(b.datapath.node, b.verdicts.cached.Node) || len(b.prober.starts) != 2 {
			t.Errorf("gate %+v, prober %v", b.datapath.node, b.prober.starts)
		}
	})
	t.Run("open already", func(t *testing.T) {
		b := newBench(t)
		b.datapath.loaded, b.datapath.node = true, datapath.NodeSettings{Open: true, SwitchedOff: true}
		b.mustAdd(request{})
		if len(b.prober.starts) != 0 || b.datapath.called("SetNode") != 0 || b.datapath.called("Load") != 0 {
			t.Errorf("prober %v, calls %v", b.prober.starts, b.datapath.calls)
		}
	})
	t.Run("loading fails", func(t *testing.T) {
		b := newBench(t)
		b.verdicts.cached, b.datapath.fail["Load"] = nil, datapath.ErrUnsupported
		b.mustAdd(request{})
		if !reflect.DeepEqual(b.prober.starts, []bool{true}) {
			t.Errorf("prober %v", b.prober.starts)
		}
	})
	t.Run("unsupported, not loaded", func(t *testing.T) {
		b := newBench(t)
		b.verdicts.cached = &Verdict{}
		b.mustAdd(request{})
		if b.datapath.called("Load") != 0 || len(b.prober.starts) != 0 {
			t.Errorf("calls %v, prober %v", b.datapath.calls, b.prober.starts)
		}
	})
	t.Run("inconclusive", func(t *testing.T) {
		b := newBench(t)
		b.verdicts.cached = inconclusive()
		b.mustAdd(request{conf: `"onError":"fail"`})
		b.wantLinks(101)
		b.wantLines(1, "could not be judged")
		if b.datapath.node.Open || len(b.prober.starts) != 0 {
			t.Errorf("gate %+v, prober %v", b.datapath.node, b.prober.starts)
		}
		b.verdicts.cached = nil // it has lapsed
		b.mustAdd(request{container: "c2", cgroup: "pod-b"})
		if !reflect.DeepEqual(b.prober.starts, []bool{false}) {
			t.Errorf("prober %v", b.prober.starts)
		}
	})
	t.Run("prober does not start", func(t *testing.T) {
		b := newBench(t)
		b.verdicts.cached, b.prober.err = nil, errors.New("fork: EAGAIN")
		b.mustAdd(request{conf: `"onError":"fail"`})
		b.wantLinks(101)
		b.wantLines(1, "EAGAIN", "skipstack load")
	})
	t.Run("prober does not start, and loading fails", func(t *testing.T) {
		b := newBench(t)
		b.verdicts.cached, b.verdicts.err, b.prober.err = nil, errors.New("EIO"), errors.New("fork: EAGAIN")
		b.datapath.fail["Load"] = errors.New("not permitted")
		b.mustAdd(request{})
		b.wantLines(1, `reason="not permitted"`, "verdict=EIO", `prober="fork: EAGAIN"`)
	})
	t.Run("verdict unreadable", func(t *testing.T) {
		b := newBench(t)
		b.verdicts.cached, b.verdicts.err = nil, errors.New("EIO")
		b.mustAdd(request{})
		b.wantLinks(101)
		b.wantLines(1, "EIO")
		if len(b.prober.starts) != 1 {
			t.Errorf("prober %v", b.prober.starts)
		}
	})
	t.Run("damaged", func(t *testing.T) {
		b := newBench(t)
		b.datapath.fail["Open"] = datapath.ErrDamaged
		b.datapath.fail["Load"] = nil
		out, err := b.add(request{})
		if err != nil || out == "" || b.datapath.called("Load") != 1 {
			t.Errorf("error %v, calls %v", err, b.datapath.calls)
		}
	})
}

// A gate that is open is brought up to date, in the background, when its verdict is
// due for another look or no longer the one that it goes by.
func TestAddOutdated(t *testing.T) {
	const epoll, splice = datapath.RiskEpoll, datapath.RiskSplice
	gate := func(risks datapath.Risk) datapath.NodeSettings {
		return datapath.NodeSettings{Open: true, Risks: risks}
	}
	verdict := func(node datapath.NodeSettings) *Verdict { return &Verdict{Supported: node.Open, Node: node} }
	due := func(node datapath.NodeSettings) *Verdict { v := verdict(node); v.Due = true; return v }
	for name, tc := range map[string]struct {
		node    datapath.NodeSettings
		verdict *Verdict
		conf    string
		build   byte
		starts  bool
	}{
		"as it should be":  {node: gate(epoll), verdict: verdict(gate(epoll))},
		"switched off":     {node: datapath.NodeSettings{Open: true, SwitchedOff: true}, verdict: safe()},
		"due":              {node: gate(epoll), verdict: due(gate(epoll)), starts: true},
		"better":           {node: gate(epoll), verdict: safe(), starts: true},
		"worse":            {node: gate(0), verdict: verdict(gate(epoll)), starts: true},
		"MPTCP":            {node: gate(0), verdict: verdict(datapath.NodeSettings{Open: true, MPTCPListeners: true}), starts: true},
		"needs the funnel": {node: gate(0), verdict: verdict(datapath.NodeSettings{Open: true, Funnel: true}), starts: true},
		"has had a funnel": {node: datapath.NodeSettings{Open: true, Funnel: true}, verdict: safe()},
		"unsupported":      {node: gate(0), verdict: &Verdict{}, starts: true},
		"inconclusive":     {node: gate(0), verdict: inconclusive()},
		// After an upgrade: the gate goes by another binary's verdict.
		"no verdict":                     {node: gate(0), starts: true},
		"another build, no verdict":      {node: gate(0), build: 1, starts: true},
		"another build, due":             {node: gate(epoll), verdict: due(gate(epoll)), build: 1, starts: true},
		"another build, inconclusive":    {node: gate(0), verdict: inconclusive(), build: 1},
		"another build, as it should be": {node: gate(epoll), verdict: verdict(gate(epoll)), build: 1},
		// What is known of other programs opens the gate no further for these.
		"another build, better":      {node: gate(epoll), verdict: verdict(datapath.NodeSettings{Open: true, MPTCPListeners: true}), build: 1},
		"another build, worse":       {node: gate(0), verdict: verdict(gate(epoll)), build: 1, starts: true},
		"another build, MPTCP":       {node: datapath.NodeSettings{Open: true, MPTCPListeners: true}, verdict: safe(), build: 1, starts: true},
		"another build, unsupported": {node: gate(0), verdict: &Verdict{}, build: 1, starts: true},
		"guard not wanted":           {node: gate(splice), verdict: verdict(datapath.NodeSettings{Open: true, Guard: datapath.GuardLSM}), conf: `"spliceGuard":"off"`},
		"by another":                 {node: gate(splice), verdict: verdict(datapath.NodeSettings{Open: true, Guard: datapath.GuardLSM})},
		"guard is gone":              {node: datapath.NodeSettings{Open: true, Guard: datapath.GuardLSM}, verdict: verdict(gate(splice)), starts: true},
		"no guard any more":          {node: gate(splice), verdict: safe(), starts: true},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			b.datapath.loaded, b.datapath.node, b.verdicts.cached = true, tc.node, tc.verdict
			b.datapath.programs[0] += tc.build
			r := request{conf: cmp.Or(tc.conf, `"acceptRisks":["splice","epoll"]`)}
			b.mustAdd(r)
			var want []bool
			if tc.starts {
				want = []bool{false}
			}
			if !slices.Equal(b.prober.starts, want) || b.verdicts.probes != 0 || b.datapath.node != tc.node {
				t.Errorf("prober %v, %d probes in the ADD, gate %+v", b.prober.starts, b.verdicts.probes, b.datapath.node)
			}
			b.wantRecord(r, attachment.Attached, "")
		})
	}
	t.Run("not opened yet", func(t *testing.T) {
		b := newBench(t)
		b.verdicts.cached = due(gate(0))
		b.mustAdd(request{})
		b.wantLines(0)
		if !b.datapath.node.Open || !slices.Equal(b.prober.starts, []bool{false}) {
			t.Errorf("gate %+v, prober %v", b.datapath.node, b.prober.starts)
		}
	})
	t.Run("prober does not start", func(t *testing.T) {
		b := newBench(t)
		b.datapath.loaded, b.datapath.node, b.verdicts.cached = true, gate(0), due(gate(0))
		b.prober.err = errors.New("fork: EAGAIN")
		b.mustAdd(request{conf: `"onError":"fail"`})
		b.wantLinks(101)
		b.wantLines(1, "EAGAIN", "go by what is known")
	})
}

// The guard that the verdict has found goes with the gate, unless the configuration
// does not want one; then the risk is there, on a node that is open already too.
func TestAddSpliceGuard(t *testing.T) {
	found := datapath.NodeSettings{Open: true, Guard: datapath.GuardLSM}
	without := datapath.NodeSettings{Open: true, Risks: datapath.RiskSplice}
	const off = `"spliceGuard":"off"`
	b := newBench(t)
	b.verdicts.cached = &Verdict{Supported: true, Node: found}
	b.mustAdd(request{})
	if b.datapath.node != found {
		t.Errorf("gate %+v", b.datapath.node)
	}
	b.wantLines(0)
	b.mustAdd(request{container: "c2", cgroup: "pod-b", conf: off})
	if b.datapath.node != without {
		t.Errorf("gate %+v with a guard that is not wanted", b.datapath.node)
	}
	b.wantLines(1, "risks that are not accepted: splice")
	b.mustAdd(request{container: "c3", cgroup: "pod-b"})
	if b.datapath.node != without {
		t.Errorf("gate %+v: one ADD undoes what another's configuration wants", b.datapath.node)
	}
	b.logs.take()
	if got, err := b.node().Load(t.Context(), b.config()); err != nil || got.Node != found || got.Plain != "" {
		t.Errorf("load: %+v, %v", got, err)
	}
	conf := b.config()
	conf.SpliceGuard = SpliceGuardOff
	if got, err := b.node().Load(t.Context(), conf); err != nil || got.Node != without || !strings.Contains(got.Plain, "splice") {
		t.Errorf("load without a guard: %+v, %v", got, err)
	}

	b = newBench(t)
	b.verdicts.cached = &Verdict{Supported: true, Node: found}
	b.mustAdd(request{conf: off + `,"acceptRisks":["splice"]`})
	if b.datapath.node != without {
		t.Errorf("gate %+v", b.datapath.node)
	}
	b.wantLines(0)
}

// A guard that cannot be attached costs no more than the risk.
func TestAddWithoutItsGuard(t *testing.T) {
	for _, op := range []string{"SetNode", "Attach"} {
		b := newBench(t)
		b.datapath.fail[op] = fmt.Errorf("%w: too many programs", datapath.ErrGuard)
		b.mustAdd(request{conf: `"onError":"fail"`})
		b.wantRecord(request{}, attachment.Attached, "")
		b.wantLines(1, "splice(2) is not guarded", "too many programs")
	}
	// The prober tries again.
	b := newBench(t)
	b.verdicts.cached = &Verdict{Supported: true, Node: datapath.NodeSettings{Open: true, Guard: datapath.GuardLSM}}
	b.datapath.fail["SetNode"] = fmt.Errorf("%w: too many programs", datapath.ErrGuard)
	b.mustAdd(request{})
	if !slices.Equal(b.prober.starts, []bool{false}) {
		t.Errorf("prober %v", b.prober.starts)
	}
}

// A pod that is attached and yet plain is worth a line, if the gate is open.
func TestAddSaysWhyPlain(t *testing.T) {
	risky := datapath.NodeSettings{Open: true, Risks: datapath.RiskSplice | datapath.RiskEpoll}
	for name, tc := range map[string]struct {
		node datapath.NodeSettings
		conf string
		says string // "": nothing
	}{
		"safe":            {datapath.NodeSettings{Open: true}, ``, ""},
		"closed":          {datapath.NodeSettings{Risks: datapath.RiskSplice}, ``, ""},
		"accepted":        {risky, `"acceptRisks":["splice","epoll"]`, ""},
		"accepted wholly": {risky, `"mode":"on"`, ""},
		"not accepted":    {risky, ``, "risks that are not accepted: splice, epoll ("},
		"in part":         {risky, `"acceptRisks":["splice"]`, "risks that are not accepted: epoll ("},
		"switched off":    {datapath.NodeSettings{Open: true, SwitchedOff: true}, ``, "`skipstack on`"},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			b.datapath.loaded, b.datapath.node = true, tc.node
			b.verdicts.cached = nil
			r := request{conf: tc.conf}
			b.mustAdd(r)
			b.wantRecord(r, attachment.Attached, "")
			if tc.says == "" {
				b.wantLines(0)
			} else {
				b.wantLines(1, "level=INFO", "pod is not accelerated", "container=c1", tc.says)
			}
		})
	}
	t.Run("pod switched off", func(t *testing.T) {
		b := newBench(t)
		b.mustAdd(request{})
		if _, err := b.node().SwitchPod(t.Context(), b.config(), "ns", "web", true); err != nil {
			t.Fatal(err)
		}
		b.mustAdd(request{container: "c2"})
		b.wantLines(1, "`skipstack on --pod`")
	})
	t.Run("another network is off", func(t *testing.T) {
		b := newBench(t)
		b.mustAdd(request{network: "one", conf: `"mode":"off"`})
		b.logs.take()
		b.mustAdd(request{network: "two"})
		b.wantLines(1, "another network")
	})
}

// The size of a loaded datapath cannot change; that is worth a line.
func TestAddOtherSize(t *testing.T) {
	b := newBench(t)
	b.mustAdd(request{conf: `"maxConnections":64`})
	b.wantLines(0)
	b.mustAdd(request{container: "c2", conf: `"maxConnections":65`})
	b.wantLines(1, "configured=65", "loaded=64")
	b.wantLinks(101)
}

// steps returns the steps of an ADD on a fresh node.
func steps(t *testing.T, run func(*bench)) []string {
	b := newBench(t)
	b.verdicts.cached = nil // the longest way, with a prober
	var names []string
	b.step = func(name string) { names = append(names, name) }
	run(b)
	if len(names) == 0 {
		t.Fatal("no steps")
	}
	return names
}

// A panic at any step of ADD leaves a plain pod and its networking.
func TestAddPanics(t *testing.T) {
	for _, step := range steps(t, func(b *bench) { b.mustAdd(request{}) }) {
		t.Run(step, func(t *testing.T) {
			b := newBench(t)
			b.step = func(name string) {
				if name == step {
					panic("bug at " + step)
				}
			}
			r := request{}
			b.mustAdd(r)
			b.wantLinks()
			b.wantRecord(r, attachment.Skipped, "panic: bug at "+step)
			b.wantLines(1, "bug at "+step)
			_, err := b.add(request{conf: `"onError":"fail"`})
			wantCode(t, err, types.ErrTryAgainLater, "panic: bug")

			b.step = nil
			b.mustAdd(r)
			b.wantLinks(101)
			b.wantRecord(r, attachment.Attached, "")
			b.mustDel(r)
			b.wantNothing()
		})
	}
}

func TestAddPanicWhileLogging(t *testing.T) {
	b := newBench(t)
	deps := b.deps()
	deps.Log = func(Config) (log nilLog, closer io.Closer) { panic("no log") }
	var out bytes.Buffer
	p := b.plugin(&out)
	p.Deps = deps
	if err := p.Add(b.args(request{})); err != nil || out.Len() == 0 {
		t.Errorf("printed %q, error %v", out.String(), err)
	}
	b.wantLines(1, "no log")
	if err := p.Del(b.args(request{})); err != nil {
		t.Error(err)
	}
}

// die ends the goroutine of a verb at a step like kill -9 ends its process: what
// comes after does not happen, and the kernel drops the locks.
func (b *bench) die(at string) {
	b.step = func(name string) {
		if name == at {
			runtime.Goexit()
		}
	}
}

func (b *bench) live() { b.budget, b.step = ampleBudget, nil }

// Killed at any step of ADD: DEL, GC or the next ADD repairs.
func TestAddKilled(t *testing.T) {
	for _, step := range steps(t, func(b *bench) { b.mustAdd(request{}) }) {
		for name, repair := range map[string]func(*bench){
			"DEL": func(b *bench) { b.mustDel(request{}) },
			"GC": func(b *bench) {
				if err := b.gc(request{conf: `"cni.dev/valid-attachments":[]`}); err != nil {
					b.t.Error(err)
				}
			},
			"ADD": func(b *bench) {
				b.mustAdd(request{})
				b.wantLinks(101)
				b.wantRecord(request{}, attachment.Attached, "")
				b.mustDel(request{})
			},
			"ADD on another cgroup": func(b *bench) {
				b.mustAdd(request{cgroup: "pod-b"})
				b.wantLinks(102)
				b.mustDel(request{})
			},
			"ADD that is skipped": func(b *bench) {
				b.mustAdd(request{conf: `"mode":"off"`})
				b.wantLinks()
				b.mustDel(request{})
			},
			"ADD that fails": func(b *bench) {
				b.mustAdd(request{conf: `"x":"y"`})
				b.wantLinks()
				b.mustDel(request{})
			},
			"ADD of the next sandbox": func(b *bench) {
				b.mustAdd(request{container: "c2"})
				b.wantLinks(101)
				b.mustDel(request{})
				b.wantLinks(101)
				if !b.pod(101).Enabled {
					b.t.Error("the next sandbox is not accelerated")
				}
				b.mustDel(request{container: "c2"})
			},
		} {
			t.Run(step+", "+name, func(t *testing.T) {
				b := newBench(t)
				b.die(step)
				b.mustAdd(request{})
				b.live()
				repair(b)
				b.wantNothing()
				b.datapath.open = 0
			})
		}
	}
}

// A lock that is free again in time keeps no pod from being attached.
func TestSlowLock(t *testing.T) {
	for _, conf := range []string{`"onError":"plain"`, `"onError":"fail"`} {
		t.Run(conf, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBench(t)
				b.mustAdd(request{container: "old"})
				lock, err := b.store().Lock(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				b.budget = Budget
				time.AfterFunc(Budget/2, func() { lock.Unlock() })
				r := request{container: "c1", cgroup: "pod-b", conf: conf}
				b.mustAdd(r)
				b.wantLinks(101, 102)
				b.wantRecord(r, attachment.Attached, "")
			})
		})
	}
}

// A stuck holder of the lock stops nobody.
func TestStuckLock(t *testing.T) { synctest.Test(t, stuckLock) }

func stuckLock(t *testing.T) {
	b := newBench(t)
	b.mustAdd(request{container: "old"})
	b.wantLinks(101)
	lock, err := b.store().Lock(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Unlock()

	b.budget = Budget
	var wg sync.WaitGroup
	inTime := func(name string, f func()) {
		wg.Go(func() {
			start := time.Now()
			f()
			if d := time.Since(start); d > b.budget {
				t.Errorf("%s took %v", name, d)
			}
		})
	}
	for _, r := range []request{
		{container: "c1", cgroup: "pod-b"},
		{container: "c2", cgroup: "pod-b", conf: `"mode":"off"`},
		{container: "c3", cgroup: "elsewhere"},
	} {
		inTime("ADD", func() {
			if out, err := b.add(r); err != nil || out != r.withDefaults().prev {
				t.Errorf("printed %q, error %v", out, err)
			}
		})
	}
	inTime("ADD that fails", func() {
		_, err := b.add(request{container: "x", conf: `"onError":"fail"`})
		wantCode(t, err, types.ErrTryAgainLater, "busy: ")
	})
	// DEL succeeds; the record goes, the link is left to the sweep.
	inTime("DEL", func() {
		if err := b.del(request{container: "old"}); err != nil {
			t.Errorf("DEL: %v", err)
		}
	})
	wg.Wait()
	b.wantLines(5, "another process holds the lock")
	b.wantRecord(request{container: "c1"}, attachment.Skipped, "busy: ")
	b.wantRecord(request{container: "c2"}, attachment.Skipped, "mode off")
	b.wantRecord(request{container: "c3"}, attachment.Skipped, "cgroup: ")
	if _, ok := b.record(request{container: "old"}); ok {
		t.Error("the record is left")
	}
	b.wantLinks(101)
	// A second DEL has nothing to do and waits for nothing.
	start := time.Now()
	b.mustDel(request{container: "old"})
	if d := time.Since(start); d > 0 {
		t.Errorf("the second DEL took %v", d)
	}

	b.live()
	if err := lock.Unlock(); err != nil {
		t.Fatal(err)
	}
	b.mustAdd(request{container: "c1"})
	b.wantRecord(request{container: "c1"}, attachment.Attached, "")
}

// Whatever call does not return, ADD and DEL do.
func TestStuckCall(t *testing.T) {
	for _, op := range []string{"Open", "Load", "EnsureBPFFS", "Attach", "SetPod", "DropPod"} {
		timed(t, op, func(t *testing.T) {
			b := newBench(t)
			if op == "DropPod" {
				b.mustAdd(request{})
			}
			wait := make(chan struct{})
			b.datapath.block[op] = wait
			b.budget = 100 * time.Millisecond
			if op == "DropPod" {
				b.mustDel(request{})
			} else {
				b.mustAdd(request{})
			}
			b.wantLines(1, "not done in time")
			close(wait)
		})
	}
}

// nilLog lets a test write a Log function that never returns.
type nilLog = *slog.Logger

func FuzzAdd(f *testing.F) {
	for _, seed := range []string{
		`{"cniVersion":"1.0.0","name":"n","type":"skipstack","prevResult":{"cniVersion":"1.0.0"}}`,
		`{"cniVersion":"1.0.0","name":"n","prevResult":{"cniVersion":"1.0.0","ips":[{"address":"10.0.0.5/24"}]},"runtimeConfig":{"cgroupPath":"pod-a"}}`,
		`{"cniVersion":"0.3.1","name":"n","prevResult":{},"mode":"off"}`,
		`{"cniVersion":"0.4.0","name":"n","prevResult":{"cniVersion":"1.0.0"},"onError":"fail","x":1}`,
		`{"name":"n","prevResult":null}`,
		`{"Name":"n","PREVRESULT":{}}`,
		`{"cniVersion":"1.1.0","name":"n","prevResult":{"cniVersion":""},"runtimeConfig":{"io.kubernetes.cri.pod-annotations":{"skipstack/mode":"on"}}}`,
		`{"name":"n","prevResult":{ } ,"prevResult":[]}`,
		`{}`, `[`, `null`,
	} {
		f.Add([]byte(seed), "K8S_POD_UID=pod-b")
	}
	f.Fuzz(func(t *testing.T, stdin []byte, cniArgs string) {
		b := newBench(t)
		b.datapath.loaded = true
		var out bytes.Buffer
		p := b.plugin(&out)
		// The fuzzer must not choose where files go.
		if bytes.Contains(bytes.ToLower(stdin), []byte("dir")) || bytes.Contains(stdin, []byte(`\u`)) {
			return
		}
		stdin = bytes.Replace(stdin, []byte("{"), fmt.Appendf(nil, `{"runDir":%q,`, b.runDir), 1)
		stdin = bytes.Replace(stdin, []byte(",}"), []byte("}"), 1)
		// skel refuses other versions before a verb is called.
		if in, err := decodeInput(stdin); err == nil && !slices.Contains(SupportedVersions().SupportedVersions(), in.cniVersion) {
			return
		}
		args := &skel.CmdArgs{ContainerID: "c", IfName: "eth0", Args: cniArgs, StdinData: stdin}
		err := p.Add(args)
		if err == nil {
			var result struct {
				CNIVersion string `json:"cniVersion"`
			}
			if json.Unmarshal(out.Bytes(), &result) != nil || result.CNIVersion == "" {
				t.Errorf("printed %q", out.String())
			}
		} else {
			var e *types.Error
			if !errors.As(err, &e) || out.Len() > 0 {
				t.Errorf("error %v, printed %q", err, out.String())
			}
		}
		err = p.Del(args)
		var e *types.Error
		if err != nil && (!errors.As(err, &e) || e.Code != types.ErrDecodingFailure) {
			t.Errorf("DEL: %v", err)
		}
		if err == nil {
			b.wantNothing()
		}
	})
}

func FuzzResult(f *testing.F) {
	for _, version := range SupportedVersions().SupportedVersions() {
		for _, prev := range []string{prevResultOf(version), prevResultOf("1.0.0"), `{}`, `{"cniVersion":null}`, `{"CNIVersion":"0.4.0","dns":{"domain":"x"}}`, `{"ips":[{"version":"6","address":"fd00::1/64"}]}`, `[]`} {
			f.Add(version, prev)
		}
	}
	f.Fuzz(func(t *testing.T, version, prev string) {
		if !slices.Contains(SupportedVersions().SupportedVersions(), version) {
			return
		}
		in, err := decodeInput(fmt.Appendf(nil, `{"name":"n","cniVersion":%q,"prevResult":%s}`, version, prev))
		if err != nil {
			return
		}
		out, err := in.result()
		if err != nil {
			var e *types.Error
			if !errors.As(err, &e) || out != nil {
				t.Errorf("error %v, result %s", err, out)
			}
			return
		}
		// What ADD prints, libcni reads.
		if _, err := create.Create(version, out); err != nil {
			t.Errorf("printed %s: %v", out, err)
		}
	})
}
