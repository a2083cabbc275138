package metrics

import (
	"sync"

	"github.com/prometheus/client_golang/prometheus"
)

// Conflist exports what the agent does about the CNI configuration.
type Conflist struct {
	mu      sync.Mutex
	present bool
	repairs uint64
}

var (
	conflistPresent = desc("conflist_present", "Whether the entry is in the CNI configuration and the binary in place.")
	conflistRepairs = desc("conflist_repairs_total", "How often the entry or the binary was put in place.")
)

// NewConflist returns a Conflist that knows of no entry.
func NewConflist() *Conflist { return &Conflist{} }

// Register registers the metrics.
func (c *Conflist) Register(r prometheus.Registerer) error { return r.Register(c) }

// Set sets both. repairs only grows.
func (c *Conflist) Set(present bool, repairs uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.present, c.repairs = present, repairs
}

// Describe implements [prometheus.Collector].
func (c *Conflist) Describe(ch chan<- *prometheus.Desc) { ch <- conflistPresent; ch <- conflistRepairs }

// Collect implements [prometheus.Collector].
func (c *Conflist) Collect(ch chan<- prometheus.Metric) {
	c.mu.Lock()
	defer c.mu.Unlock()
	ch <- prometheus.MustNewConstMetric(conflistPresent, prometheus.GaugeValue, number(c.present))
	ch <- prometheus.MustNewConstMetric(conflistRepairs, prometheus.CounterValue, float64(c.repairs))
}
