// Package metrics exports what skipstack does on a node to Prometheus.
//
// docs/metrics.md lists every metric; a test keeps it, the dashboard and the alert
// rules in conf complete and free of names that do not exist.
package metrics

import (
	"cmp"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/skipstack/skipstack/plugin"
	"github.com/skipstack/skipstack/plugin/datapath"
)

// Options say what a [Collector] exports.
type Options struct {
	// Look returns the node's report.
	Look    func() plugin.Report
	Version string // of this binary
	// Pods is how many pods may have metrics of their own, the busiest first; 0:
	// none. Each costs six series.
	Pods int
}

// Collector is a [prometheus.Collector] that looks at the node when it is asked,
// and not more often than once a second. It may be used by several goroutines.
type Collector struct {
	o Options

	mu     sync.Mutex
	looked time.Time
	report plugin.Report
	took   time.Duration
	// What pods have been reported to have sent, by cgroup id. A connection that
	// closes while the node is looked at may be missed that time; a counter must
	// not go back for it.
	sent map[uint64]sent
}

type sent struct{ redirected, passed datapath.Count }

// leastInterval bounds what scraping can cost, however often somebody asks.
const leastInterval = time.Second

// New returns a Collector.
func New(o Options) *Collector { return &Collector{o: o, sent: map[uint64]sent{}} }

// Register registers the collector.
func (c *Collector) Register(r prometheus.Registerer) error { return r.Register(c) }

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("skipstack_"+name, help, labels, nil)
}

var (
	buildInfo = desc("build_info", "Always 1; version and build of the running binary.", "version", "build")
	loaded    = desc("datapath_loaded", "Whether the datapath is loaded and can be looked at.")
	current   = desc("datapath_current", "Whether the loaded datapath is of the running binary's build.")
	open      = desc("datapath_open", "Whether the kernel's verdict is known and allows acceleration.")
	off       = desc("datapath_switched_off", "Whether an operator has switched the node off.")
	risk      = desc("kernel_risk", "Whether the kernel has the risk.", "risk")
	maxConns  = desc("datapath_max_connections", "Connections that the datapath was made for.")

	mapEntries = desc("map_entries", "Entries of a map of the datapath.", "map")
	mapMax     = desc("map_max_entries", "Entries that the map can have.", "map")

	connections = desc("connections", "Live connections that are accelerated.")
	pods        = desc("pods", "Pods by state.", "state")

	redirectedMessages = desc("redirected_messages_total", "Messages that skipped the TCP/IP stack.")
	redirectedBytes    = desc("redirected_bytes_total", "Bytes that skipped the TCP/IP stack.")
	passedMessages     = desc("passed_messages_total", "Messages of sockets in the sockhash that went by TCP, by reason.", "reason")
	passedBytes        = desc("passed_bytes_total", "Bytes of sockets in the sockhash that went by TCP, by reason.", "reason")
	handshakes         = desc("handshakes_total", "Handshakes of attached pods' connections, by what became of them.", "outcome")
	events             = map[string]*prometheus.Desc{
		"syn_recorded":              desc("syns_recorded_total", "SYNs that listeners of attached pods have answered."),
		"peer_gone_timeout":         desc("peer_gone_timeouts_total", "Senders that were kept from waiting for a reader that is gone."),
		"funneled":                  desc("funneled_segments_total", "Segments that came by TCP and were moved to the queue of redirected bytes."),
		datapath.EventSpliceRefused: desc("splices_refused_total", "Calls of splice(2) and sendfile(2) from accelerated sockets that the splice guard refused."),
		datapath.EventULPRefused:    desc("ulps_refused_total", "Calls of setsockopt(TCP_ULP), with which kTLS begins, on accelerated sockets that the splice guard refused."),
		"trimmed_bytes":             desc("trimmed_bytes_total", "Bytes of retransmissions that were cut off as they had been moved before."),
	}

	podConnections        = desc("pod_connections", "Live connections of the pod that are accelerated.", "namespace", "pod")
	podRedirectedMessages = desc("pod_redirected_messages_total", "Messages that the pod has sent and that skipped the TCP/IP stack.", "namespace", "pod")
	podRedirectedBytes    = desc("pod_redirected_bytes_total", "Bytes that the pod has sent and that skipped the TCP/IP stack.", "namespace", "pod")
	podPassedMessages     = desc("pod_passed_messages_total", "Messages that the pod has sent by TCP to attached pods of the node.", "namespace", "pod")
	podPassedBytes        = desc("pod_passed_bytes_total", "Bytes that the pod has sent by TCP to attached pods of the node.", "namespace", "pod")
	podPlain              = desc("pod_plain", "Whether something keeps the pod's connections plain.", "namespace", "pod")
	podsOmitted           = desc("pods_omitted", "Pods that have no metrics of their own because there are too many.")

	lookSeconds = desc("look_duration_seconds", "How long it took to look at the node for this scrape.")
	problems    = desc("look_problems", "Things that could not be read for this scrape.")
)

// risks are the kernel's; "blocking" is a connection's.
var risks = []datapath.Risk{datapath.RiskSplice, datapath.RiskFIONREAD, datapath.RiskEpoll, datapath.RiskUncharged}

// states are those of pods, see [plugin.PodReport].
var states = []string{"attached", "attaching", "skipped", plugin.NotAttached}

// Describe implements [prometheus.Collector].
func (c *Collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{
		buildInfo, loaded, current, open, off, risk, maxConns, mapEntries, mapMax, connections, pods, redirectedMessages, redirectedBytes,
		passedMessages, passedBytes, handshakes, podConnections, podRedirectedMessages, podRedirectedBytes, podPassedMessages, podPassedBytes,
		podPlain, podsOmitted, lookSeconds, problems,
	} {
		ch <- d
	}
	for _, d := range events {
		ch <- d
	}
}

// Collect implements [prometheus.Collector].
func (c *Collector) Collect(ch chan<- prometheus.Metric) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.looked.IsZero() || time.Since(c.looked) >= leastInterval {
		start := time.Now()
		c.report = c.o.Look()
		c.looked, c.took = time.Now(), time.Since(start)
		c.keepUp()
	}
	r := &c.report
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	counter := func(d *prometheus.Desc, v uint64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), labels...)
	}
	gauge(buildInfo, 1, c.o.Version, r.Build)
	gauge(lookSeconds, c.took.Seconds())
	gauge(problems, float64(len(r.Problems)))
	gauge(loaded, number(r.Loaded != nil))
	for _, state := range states {
		gauge(pods, float64(r.Totals.Pods[state]), state)
	}
	if r.Loaded == nil {
		return
	}
	gauge(current, number(r.Loaded.SameBuild))
	gauge(open, number(r.Loaded.Open))
	gauge(off, number(r.Loaded.SwitchedOff))
	gauge(maxConns, float64(r.Loaded.MaxConnections))
	for _, k := range risks {
		gauge(risk, number(slices.Contains(r.Loaded.Risks, k.String())), k.String())
	}
	for name, u := range r.Loaded.Maps {
		gauge(mapEntries, float64(u.Entries), name)
		gauge(mapMax, float64(u.Max), name)
	}
	gauge(connections, float64(r.Totals.Connections))
	redirected := r.Totals.Redirected()
	counter(redirectedMessages, redirected.Messages)
	counter(redirectedBytes, redirected.Bytes)
	for label, n := range r.Totals.Messages {
		if label == datapath.LabelRedirected {
			continue
		}
		counter(passedMessages, n.Messages, label)
		counter(passedBytes, n.Bytes, label)
	}
	for label, n := range r.Totals.Counters.Connections {
		counter(handshakes, n, label)
	}
	for label, n := range r.Totals.Events {
		if d, ok := events[label]; ok {
			counter(d, n)
		}
	}
	if c.o.Pods > 0 {
		c.collectPods(gauge, counter)
	}
}

func number(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// keepUp keeps the pods' counters from going back.
func (c *Collector) keepUp() {
	now := map[uint64]sent{}
	for i := range c.report.Pods {
		p := &c.report.Pods[i]
		if p.CgroupID == 0 {
			continue
		}
		before := c.sent[p.CgroupID]
		p.Redirected, p.Passed = most(p.Redirected, before.redirected), most(p.Passed, before.passed)
		now[p.CgroupID] = sent{p.Redirected, p.Passed}
	}
	if c.report.Loaded != nil { // else it may be back in a moment
		c.sent = now
	}
}

func most(a, b datapath.Count) datapath.Count {
	return datapath.Count{Messages: max(a.Messages, b.Messages), Bytes: max(a.Bytes, b.Bytes)}
}

// collectPods exports the pods, the busiest if there are too many. Of a pod that
// is being replaced by one of the same name, both count as one.
func (c *Collector) collectPods(gauge func(*prometheus.Desc, float64, ...string), counter func(*prometheus.Desc, uint64, ...string)) {
	type name struct{ namespace, pod string }
	byName := map[name]plugin.PodReport{}
	for _, p := range c.report.Pods {
		if p.Name == "" {
			continue // it has none that anybody would know
		}
		id := name{p.Namespace, p.Name}
		if other, ok := byName[id]; ok {
			p.Connections += other.Connections
			p.Redirected = p.Redirected.Plus(other.Redirected)
			p.Passed = p.Passed.Plus(other.Passed)
			if other.Reason == "" {
				p.Reason = ""
			}
		}
		byName[id] = p
	}
	names := slices.SortedFunc(maps.Keys(byName), func(a, b name) int {
		p, q := byName[a], byName[b]
		return cmp.Or(cmp.Compare(q.Redirected.Bytes+q.Passed.Bytes, p.Redirected.Bytes+p.Passed.Bytes),
			cmp.Compare(a.namespace, b.namespace), cmp.Compare(a.pod, b.pod))
	})
	gauge(podsOmitted, float64(max(0, len(names)-c.o.Pods)))
	for _, id := range names[:min(len(names), c.o.Pods)] {
		p := byName[id]
		gauge(podConnections, float64(p.Connections), id.namespace, id.pod)
		gauge(podPlain, number(p.Reason != ""), id.namespace, id.pod)
		counter(podRedirectedMessages, p.Redirected.Messages, id.namespace, id.pod)
		counter(podRedirectedBytes, p.Redirected.Bytes, id.namespace, id.pod)
		counter(podPassedMessages, p.Passed.Messages, id.namespace, id.pod)
		counter(podPassedBytes, p.Passed.Bytes, id.namespace, id.pod)
	}
}
