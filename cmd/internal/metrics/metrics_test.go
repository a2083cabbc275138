package metrics

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/skipstack/skipstack/bpf"
	"github.com/skipstack/skipstack/plugin"
	"github.com/skipstack/skipstack/plugin/datapath"
)

// full is a report in which everything occurs.
func full() plugin.Report {
	count := datapath.Count{Messages: 3, Bytes: 30}
	r := plugin.Report{
		Build: "b", Verdict: "risky: splice",
		Loaded: &plugin.LoadedReport{SameBuild: true, Open: true, Risks: []string{"splice"}, MaxConnections: 9,
			Maps: map[string]datapath.Usage{"socks": {Entries: 2, Max: 18}, "pods": {Entries: 1, Max: 100}}},
		Totals: plugin.Totals{
			Pods: map[string]int{"attached": 2, "skipped": 1}, Connections: 1,
			Counters: datapath.Counters{Messages: map[string]datapath.Count{}, Connections: map[string]uint64{}, Events: map[string]uint64{}},
		},
	}
	for _, l := range bpf.MessageLabels {
		r.Totals.Messages[l] = count
	}
	for _, l := range bpf.ConnectionLabels {
		r.Totals.Counters.Connections[l] = 4
	}
	for _, l := range eventLabels {
		r.Totals.Events[l] = 5
	}
	for i, name := range []string{"a", "b", "c"} {
		r.Pods = append(r.Pods, plugin.PodReport{Namespace: "ns", Name: name, CgroupID: uint64(i + 1), Connections: 1,
			Redirected: datapath.Count{Messages: 1, Bytes: uint64(100 * (i + 1))}})
	}
	return r
}

// eventLabels are those of the datapath and of the splice guard.
var eventLabels = append(bpf.EventLabels[:], datapath.EventSpliceRefused, datapath.EventULPRefused)

func registry(t *testing.T, o Options) *prometheus.Registry {
	t.Helper()
	r := prometheus.NewPedanticRegistry()
	if err := New(o).Register(r); err != nil {
		t.Fatal(err)
	}
	if err := NewConflist().Register(r); err != nil {
		t.Fatal(err)
	}
	return r
}

func names(t *testing.T) []string {
	t.Helper()
	families, err := registry(t, Options{Look: full, Pods: 2}).Gather()
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, f := range families {
		all = append(all, f.GetName())
	}
	return all
}

func TestMetrics(t *testing.T) {
	r := registry(t, Options{Look: full, Version: "v1", Pods: 2})
	problems, err := testutil.GatherAndLint(r)
	if err != nil || len(problems) > 0 {
		t.Errorf("lint: %v, %v", problems, err)
	}
	err = testutil.GatherAndCompare(r, strings.NewReader(`
# HELP skipstack_build_info Always 1; version and build of the running binary.
# TYPE skipstack_build_info gauge
skipstack_build_info{build="b",version="v1"} 1
# HELP skipstack_kernel_risk Whether the kernel has the risk.
# TYPE skipstack_kernel_risk gauge
skipstack_kernel_risk{risk="epoll"} 0
skipstack_kernel_risk{risk="fionread"} 0
skipstack_kernel_risk{risk="splice"} 1
skipstack_kernel_risk{risk="uncharged"} 0
# HELP skipstack_map_entries Entries of a map of the datapath.
# TYPE skipstack_map_entries gauge
skipstack_map_entries{map="pods"} 1
skipstack_map_entries{map="socks"} 2
# HELP skipstack_pod_redirected_bytes_total Bytes that the pod has sent and that skipped the TCP/IP stack.
# TYPE skipstack_pod_redirected_bytes_total counter
skipstack_pod_redirected_bytes_total{namespace="ns",pod="b"} 200
skipstack_pod_redirected_bytes_total{namespace="ns",pod="c"} 300
# HELP skipstack_pods Pods by state.
# TYPE skipstack_pods gauge
skipstack_pods{state="attached"} 2
skipstack_pods{state="attaching"} 0
skipstack_pods{state="not attached"} 0
skipstack_pods{state="skipped"} 1
# HELP skipstack_pods_omitted Pods that have no metrics of their own because there are too many.
# TYPE skipstack_pods_omitted gauge
skipstack_pods_omitted 1
# HELP skipstack_redirected_bytes_total Bytes that skipped the TCP/IP stack.
# TYPE skipstack_redirected_bytes_total counter
skipstack_redirected_bytes_total 30
# HELP skipstack_trimmed_bytes_total Bytes of retransmissions that were cut off as they had been moved before.
# TYPE skipstack_trimmed_bytes_total counter
skipstack_trimmed_bytes_total 5
`), "skipstack_build_info", "skipstack_kernel_risk", "skipstack_map_entries", "skipstack_pod_redirected_bytes_total",
		"skipstack_pods", "skipstack_pods_omitted", "skipstack_redirected_bytes_total", "skipstack_trimmed_bytes_total")
	if err != nil {
		t.Error(err)
	}
	for _, l := range eventLabels {
		if events[l] == nil {
			t.Errorf("event %s has no metric", l)
		}
	}
}

// A node without a datapath has its few metrics, and no pods'.
func TestNotLoaded(t *testing.T) {
	look := func() plugin.Report { return plugin.Report{Problems: []string{"x"}} }
	r := registry(t, Options{Look: look, Pods: 2})
	if n, err := testutil.GatherAndCount(r, "skipstack_redirected_bytes_total", "skipstack_pod_connections", "skipstack_datapath_open"); n != 0 || err != nil {
		t.Errorf("%d metrics, %v", n, err)
	}
	if n, err := testutil.GatherAndCount(r, "skipstack_datapath_loaded", "skipstack_look_problems"); n != 2 || err != nil {
		t.Errorf("%d metrics, %v", n, err)
	}
}

// Two pods of one name, as when a StatefulSet replaces one, are one series.
func TestPodsOfOneName(t *testing.T) {
	look := func() plugin.Report {
		r := full()
		r.Pods[1].Name = "a"
		return r
	}
	r := registry(t, Options{Look: look, Pods: 9})
	err := testutil.GatherAndCompare(r, strings.NewReader(`
# HELP skipstack_pod_redirected_bytes_total Bytes that the pod has sent and that skipped the TCP/IP stack.
# TYPE skipstack_pod_redirected_bytes_total counter
skipstack_pod_redirected_bytes_total{namespace="ns",pod="a"} 300
skipstack_pod_redirected_bytes_total{namespace="ns",pod="c"} 300
`), "skipstack_pod_redirected_bytes_total")
	if err != nil {
		t.Error(err)
	}
}

// A connection that was missed in one look must not make a counter go back: that
// would count as a restart.
func TestCountersNeverGoBack(t *testing.T) {
	c := New(Options{Pods: 9})
	for _, bytes := range []uint64{500, 400, 600} {
		c.report = full()
		c.report.Pods[0].Redirected.Bytes = bytes
		c.keepUp()
		if got := c.report.Pods[0].Redirected.Bytes; got != max(bytes, 500) {
			t.Errorf("looked at %d, exported %d", bytes, got)
		}
	}
	c.report = full()
	c.report.Pods = c.report.Pods[1:]
	c.keepUp()
	if _, ok := c.sent[1]; ok {
		t.Error("a pod that is gone is remembered")
	}
}

var (
	mentioned = regexp.MustCompile(`\bskipstack_[a-z_]+`)
	selector  = regexp.MustCompile(`(\w+)=~?"([a-z_|]+)"`)
)

// Whatever the documentation, the dashboard and the alert rules name exists, and
// the documentation names all there is.
func TestNamesExist(t *testing.T) {
	exist := names(t)
	for _, file := range []string{"../../../docs/metrics.md", "../../../conf/monitoring/dashboard.json", "../../../conf/monitoring/alerts.yaml"} {
		raw, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		found := mentioned.FindAllString(string(raw), -1)
		if len(found) == 0 {
			t.Errorf("%s names no metric", file)
		}
		for _, name := range found {
			if !slices.Contains(exist, name) {
				t.Errorf("%s: no metric %s", file, name)
			}
		}
		for _, m := range selector.FindAllStringSubmatch(string(raw), -1) {
			labels := map[string][]string{"reason": bpf.MessageLabels[:], "outcome": bpf.ConnectionLabels[:]}[m[1]]
			for _, value := range strings.Split(m[2], "|") {
				if labels != nil && !slices.Contains(labels, value) {
					t.Errorf("%s: no %s %q", file, m[1], value)
				}
			}
		}
		if strings.HasSuffix(file, ".md") {
			for _, name := range exist {
				if !slices.Contains(found, name) {
					t.Errorf("%s does not explain %s", file, name)
				}
			}
			for _, label := range slices.Concat(bpf.MessageLabels[:], bpf.ConnectionLabels[:]) {
				if label != datapath.LabelRedirected && !strings.Contains(string(raw), "`"+label+"`") {
					t.Errorf("%s does not explain %s", file, label)
				}
			}
		}
	}
}

func TestDashboardIsSound(t *testing.T) {
	raw, err := os.ReadFile("../../../conf/monitoring/dashboard.json")
	if err != nil {
		t.Fatal(err)
	}
	var d struct {
		UID    string
		Panels []struct {
			ID      int
			Title   string
			GridPos struct{ X, Y, W, H int }
			Targets []struct{ Expr string }
		}
	}
	if err := json.Unmarshal(raw, &d); err != nil || d.UID == "" || len(d.Panels) == 0 {
		t.Fatalf("%v: %+v", err, d)
	}
	taken := map[[2]int]string{}
	ids := map[int]bool{}
	for _, p := range d.Panels {
		if ids[p.ID] || p.Title == "" || len(p.Targets) == 0 || p.GridPos.X+p.GridPos.W > 24 {
			t.Errorf("panel %+v", p)
		}
		ids[p.ID] = true
		for x := p.GridPos.X; x < p.GridPos.X+p.GridPos.W; x++ {
			for y := p.GridPos.Y; y < p.GridPos.Y+p.GridPos.H; y++ {
				if other := taken[[2]int{x, y}]; other != "" {
					t.Fatalf("panels %q and %q overlap", p.Title, other)
				}
				taken[[2]int{x, y}] = p.Title
			}
		}
		for _, target := range p.Targets {
			if !mentioned.MatchString(target.Expr) {
				t.Errorf("%s: %q", p.Title, target.Expr)
			}
		}
	}
}

// promtool parses every expression, where it is installed (Debian: prometheus).
// TestNamesExist does what it cannot: it knows the names.
func TestPromtool(t *testing.T) {
	promtool, err := exec.LookPath("promtool")
	if err != nil {
		t.Log("promtool is not installed: expressions are not parsed")
		return
	}
	if out, err := exec.Command(promtool, "check", "rules", "../../../conf/monitoring/alerts.yaml").CombinedOutput(); err != nil {
		t.Errorf("alerts.yaml: %v\n%s", err, out)
	}
	raw, err := os.ReadFile("../../../conf/monitoring/dashboard.json")
	if err != nil {
		t.Fatal(err)
	}
	var d struct {
		Panels []struct{ Targets []struct{ Expr string } }
	}
	if err := json.Unmarshal(raw, &d); err != nil {
		t.Fatal(err)
	}
	rules := "groups:\n- name: dashboard\n  rules:\n"
	n := 0
	for _, p := range d.Panels {
		for _, target := range p.Targets {
			expr := strings.NewReplacer("$__rate_interval", "5m", "$instance", ".*").Replace(target.Expr)
			rules += fmt.Sprintf("  - record: r%d\n    expr: %q\n", n, expr)
			n++
		}
	}
	file := t.TempDir() + "/rules.yaml"
	if err := os.WriteFile(file, []byte(rules), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(promtool, "check", "rules", file).CombinedOutput(); err != nil {
		t.Errorf("dashboard.json: %v\n%s", err, out)
	}
}
