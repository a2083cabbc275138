package plugin

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/containernetworking/cni/libcni"

	"github.com/skipstack/skipstack/plugin/attachment"
	"github.com/skipstack/skipstack/plugin/datapath"
)

// cache writes what libcni would.
func cache(t *testing.T, dir, container, pod, ifName, netns, config string) {
	t.Helper()
	entry := map[string]any{
		"kind": libcni.CNICacheV1, "containerId": container, "ifName": ifName, "networkName": "n", "netns": netns, "config": []byte(config),
		"cniArgs": [][2]string{{"K8S_POD_NAMESPACE", "ns"}, {"K8S_POD_NAME", pod}, {"IgnoreUnknown", "1"}},
	}
	raw, err := json.Marshal(entry)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(dir, "results"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "results", "n-"+container+"-"+ifName), raw, 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestStatusReport(t *testing.T) {
	b := newBench(t)
	node := NewNode(b.deps())
	dir := t.TempDir()
	b.datapath.loaded = true
	b.datapath.seen = datapath.Observation{
		Node:     datapath.NodeSettings{Open: true, Risks: datapath.RiskSplice},
		Build:    datapath.Build(),
		Settings: map[uint64]datapath.PodSettings{1: {Enabled: true, Accepted: datapath.RiskSplice}, 2: {Enabled: true}},
		Pods: map[uint64]datapath.PodCounters{
			1: {Accelerated: 3, Redirected: datapath.Count{Messages: 5, Bytes: 300}, Passed: datapath.Count{Messages: 2, Bytes: 100}, PassedBy: map[string]uint64{"plain": 2}},
			2: {},
		},
		Counters: datapath.Counters{Messages: map[string]datapath.Count{
			"redirected": {Messages: 5, Bytes: 300}, "plain": {Messages: 2, Bytes: 100}, "not_enrolled": {Messages: 9, Bytes: 900}}},
	}
	put := func(container, pod, network string, status attachment.Status, reason string, id uint64) {
		t.Helper()
		err := b.store().Put(attachment.Record{
			Key:          attachment.Key{Network: network, ContainerID: container, IfName: "eth0"},
			PodNamespace: "ns", PodName: pod, Status: status, Reason: reason, CgroupID: id,
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	put("c1", "fast", "n", attachment.Attached, "", 1)
	put("c1", "fast", "second", attachment.Attached, "", 1) // counts once
	put("c2", "risky", "n", attachment.Attached, "", 2)
	put("c3", "limited", "n", attachment.Skipped, "bandwidth", 0)
	put("c4", "lost", "n", attachment.Attached, "", 4)
	cache(t, dir, "c1", "fast", "eth0", "", `{"plugins":[{"type":"skipstack"}]}`)
	cache(t, dir, "old", "early", "eth0", t.TempDir(), `{"plugins":[{"type":"ptp"}]}`)
	cache(t, dir, "odd", "odd", "eth0", "", `{"plugins":[{"type":"ptp"},{"type":"skipstack"}]}`)
	cache(t, dir, "gone", "gone", "eth0", filepath.Join(dir, "no such netns"), `{}`)
	cache(t, dir, "old", "early", "lo", "", `{}`)
	if err := os.WriteFile(filepath.Join(dir, "results", "rubbish"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}

	r := node.Status(Config{RunDir: b.runDir, BPFFS: DefaultBPFFS}, dir)
	want := map[string][2]string{ // state, beginning of the reason
		"ns/fast":    {"attached", ""},
		"ns/risky":   {"attached", "the kernel has risks that are not accepted: splice"},
		"ns/limited": {"skipped", "bandwidth"},
		"ns/lost":    {"attached", "its link is gone"},
		"ns/early":   {NotAttached, reasonBefore},
		"ns/odd":     {NotAttached, reasonLost},
	}
	if len(r.Pods) != len(want) || len(r.Problems) > 0 {
		t.Errorf("pods %+v, problems %v", r.Pods, r.Problems)
	}
	for _, p := range r.Pods {
		w, ok := want[p.Title()]
		if !ok || p.State != w[0] || !strings.HasPrefix(p.Reason, w[1]) || w[1] == "" && p.Reason != "" {
			t.Errorf("%s: %s, %q; want %v", p.Title(), p.State, p.Reason, w)
		}
		if p.Name == "fast" && (p.Connections != 3 || p.Redirected.Bytes != 300 || p.Bypassed != 0.75 || p.PassedBy["plain"] != 2 || len(p.Networks) != 2) {
			t.Errorf("%+v", p)
		}
	}
	if r.Totals.Bypassed != 0.75 || r.Totals.Pods["attached"] != 3 || r.Totals.Pods["skipped"] != 1 || r.Totals.Pods[NotAttached] != 2 {
		t.Errorf("totals %+v", r.Totals)
	}
	if r.Loaded == nil || !r.Loaded.SameBuild || !r.Loaded.Open || !reflect.DeepEqual(r.Loaded.Risks, []string{"splice"}) {
		t.Errorf("loaded %+v", r.Loaded)
	}
	if b.datapath.open != 0 {
		t.Errorf("%d sets are left open", b.datapath.open)
	}
}

// Whatever is missing, there is a report.
func TestStatusWithoutDatapath(t *testing.T) {
	b := newBench(t)
	node := NewNode(b.deps())
	r := node.Status(Config{RunDir: filepath.Join(b.runDir, "absent"), BPFFS: DefaultBPFFS}, filepath.Join(b.runDir, "absent"))
	if r.Loaded != nil || !strings.Contains(r.NotLoaded, datapath.ErrNotLoaded.Error()) || len(r.Pods) != 0 || len(r.Problems) != 0 {
		t.Errorf("%+v", r)
	}
	// A verdict that is due for another look holds until then.
	b.verdicts.cached = &Verdict{Supported: true, Due: true, Summary: "risky: epoll"}
	if r := node.Status(Config{RunDir: b.runDir}, ""); !strings.HasPrefix(r.Verdict, "risky: epoll (a probe could not tell;") {
		t.Errorf("verdict %q", r.Verdict)
	}
	b.datapath.loaded = true
	b.datapath.fail["Observe"] = errors.New("EPERM")
	if r := node.Status(Config{RunDir: b.runDir}, ""); r.Loaded != nil || r.NotLoaded != "EPERM" {
		t.Errorf("%+v", r)
	}
	if _, err := node.Connections(t.Context(), Config{RunDir: b.runDir}, ConnectionFilter{}); err == nil {
		t.Error("connections of a datapath that cannot be looked at")
	}
}

// A runtime in another mount namespace pins its links in another BPF file system,
// under the same path.
func TestStatusElsewhere(t *testing.T) {
	b := newBench(t)
	node := NewNode(b.deps())
	node.proc = t.TempDir()
	for i, r := range []attachment.Record{
		{BPFFSDev: b.datapath.bpffsDev, MountNS: 1, Settings: newWish("/sys/fs/bpf", datapath.PodSettings{}).encode()},
		{BPFFSDev: 99, MountNS: 98, Settings: newWish("/sys/fs/bpf", datapath.PodSettings{}).encode()},
		{Settings: newWish("/mnt/bpf", datapath.PodSettings{}).encode()},
	} {
		r.Key = attachment.Key{Network: "n", ContainerID: fmt.Sprint(i), IfName: "eth0"}
		r.Status = attachment.Attached
		if err := b.store().Put(r); err != nil {
			t.Fatal(err)
		}
	}
	r := node.Status(Config{RunDir: b.runDir, BPFFS: "/sys/fs/bpf"}, "")
	all := strings.Join(r.Elsewhere, "\n")
	if len(r.Elsewhere) != 2 || !strings.Contains(all, "another mount namespace (98), which no process") || !strings.Contains(all, "--bpffs /mnt/bpf") {
		t.Errorf("%q", r.Elsewhere)
	}
	_, mountNS, err := datapath.BPFFSIdentity("/")
	if err != nil {
		t.Fatal(err)
	}
	if pid, ok := processIn("/proc", mountNS); !ok || pid <= 0 || pid > os.Getpid() {
		t.Errorf("process %d, %v", pid, ok)
	}
}

func TestConnectionFilter(t *testing.T) {
	c := ConnectionReport{
		Client: &EndReport{Pod: "ns/a", ports: [2]uint16{40000, 80}},
		Server: &EndReport{Pod: "ns/b", ports: [2]uint16{8080, 40000}},
	}
	for _, tc := range []struct {
		f    ConnectionFilter
		want bool
	}{
		{ConnectionFilter{}, true},
		{ConnectionFilter{Namespace: "ns", Pod: "b"}, true},
		{ConnectionFilter{Namespace: "ns", Pod: "c"}, false},
		{ConnectionFilter{Port: 80}, true},
		{ConnectionFilter{Port: 8080}, true},
		{ConnectionFilter{Port: 8081}, false},
		{ConnectionFilter{Namespace: "ns", Pod: "a", Port: 8081}, false},
	} {
		if got := tc.f.match(c); got != tc.want {
			t.Errorf("%+v: %v", tc.f, got)
		}
	}
	if (ConnectionFilter{Port: 80}).match(ConnectionReport{Server: c.Server}) {
		t.Error("matched an end that is gone")
	}
}

func FuzzDecodeCached(f *testing.F) {
	f.Add([]byte(`{"kind":"cniCacheV1","containerId":"c","config":"e30=","ifName":"eth0","cniArgs":[["K8S_POD_NAME","p"]]}`))
	f.Add([]byte(`{"kind":"cniCacheV1","containerId":"c","config":"eyJ0eXBlIjoic2tpcHN0YWNrIn0="}`))
	f.Add([]byte(`{`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		if c, _, ok := decodeCached(raw); ok && (c.container == "" || !json.Valid(raw)) {
			t.Errorf("took %q for %+v", raw, c)
		}
	})
}
