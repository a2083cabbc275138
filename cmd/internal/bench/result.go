package bench

import "time"

// The types of a bench's result, as --json writes it. The names of the fields are an
// interface: scripts read them.

// A Report is everything that a bench found out.
type Report struct {
	Header Header   `json:"header"`
	Points []Result `json:"points"`

	missing []Path // that the site does not have
}

// Proven tells if everything was measured and every point's bypass is proven.
func (r *Report) Proven() bool {
	for _, p := range r.Points {
		if p.Proof == Failed {
			return false
		}
	}
	return len(r.Points) > 0 && r.Header.Incomplete == ""
}

// Header says where and how a report came about.
type Header struct {
	Kernel     string     `json:"kernel"` // release
	CPU        string     `json:"cpu"`    // model
	CPUs       int        `json:"cpus"`
	Congestion string     `json:"tcp_congestion_control"` // plain TCP's speed depends on it
	Versions   Versions   `json:"versions"`
	Started    time.Time  `json:"started"`
	Duration   float64    `json:"duration_s"`
	Parameters Parameters `json:"parameters"`
	Verified   uint64     `json:"verified_bytes"` // checked byte by byte, apart from the measuring
	// InterruptsApart: the kernel charges the time of interrupts to no thread; it is
	// then taken from /proc/stat and part of every cpu_s.
	InterruptsApart bool `json:"interrupts_apart"`
	// Reference says how AF_UNIX was measured; empty: it was not.
	Reference string `json:"reference,omitempty"`
	// Incomplete is the error that ended it early: points are missing, or what the BPF
	// programs cost. Empty: there was none.
	Incomplete string `json:"incomplete,omitempty"`
	Facts
}

// Versions of what was measured.
type Versions struct {
	Skipstack string `json:"skipstack"` // a tag or a commit
	Go        string `json:"go"`
}

// Facts describe where a bench ran.
type Facts struct {
	Network         string   `json:"network"` // how the pods are connected
	Plugins         []string `json:"plugins"` // of the conflist
	BridgeNetfilter bool     `json:"bridge_netfilter"`
	Verdict         string   `json:"verdict"`
	LeftOut         []string `json:"left_out,omitempty"` // what could not be measured there, and why
}

// Parameters are how long and how often each point is measured.
type Parameters struct {
	Set     string `json:"set"`     // quick, default or full
	Repeats int    `json:"repeats"` // of plain and accelerated each, at least
	// MaxPairs is the most of a point whose ratio is uncertain, as far as the set's
	// time goes.
	MaxPairs int           `json:"max_pairs"`
	WarmUp   time.Duration `json:"warm_up_ns"`
	Length   time.Duration `json:"length_ns"` // of one run, without its warm-up
	// NonBlocking: the generators use O_NONBLOCK sockets and poll(2), as event
	// loops do, instead of blocking ones.
	NonBlocking bool `json:"non_blocking"`
	// Congestion is the congestion control that was asked for; empty: the node's own.
	Congestion string `json:"tcp_congestion_control,omitempty"`
	// Unix: points are measured over an AF_UNIX stream as well.
	Unix bool `json:"reference_unix"`
}

// Test is an experiment, by netperf's definitions.
type Test string

const (
	// Stream sends messages one way; its rate is bytes read per second.
	Stream Test = "stream"
	// RequestResponse exchanges one message each way at a time on each connection.
	RequestResponse Test = "rr"
	// ConnectRequestResponse opens and closes a connection for each exchange.
	ConnectRequestResponse Test = "crr"
)

// Path is how the client reaches the server.
type Path string

const (
	PodIP     Path = "pod"      // the server pod's address
	ServiceIP Path = "service"  // an address that the node translates (DNAT)
	IPv6      Path = "ipv6"     // the server pod's IPv6 address
	Loopback  Path = "loopback" // 127.0.0.1, client and server in one pod
)

// Placement is which CPUs client and server run on.
type Placement string

const (
	SameCPU  Placement = "same-cpu"
	CrossCPU Placement = "cross-cpu"
)

// A Point is one thing to measure.
type Point struct {
	Test          Test      `json:"test"`
	Path          Path      `json:"path"`
	Placement     Placement `json:"placement"`
	RequestBytes  int       `json:"request_bytes"`  // of a stream: bytes of each send
	ResponseBytes int       `json:"response_bytes"` // 0 for a stream
	NoDelay       bool      `json:"nodelay"`        // TCP_NODELAY, on both sides
	Connections   int       `json:"connections"`    // at once
}

// Figures are what the repeats of one kind of run gave: medians of the rates, and
// percentiles of the latencies of all repeats together.
type Figures struct {
	BytesPerSecond        float64 `json:"throughput_bytes_per_s"` // rr and crr: both directions
	TransactionsPerSecond float64 `json:"transactions_per_s"`     // 0 for a stream
	P50                   int64   `json:"p50_ns"`                 // of a transaction; 0 for a stream
	P90                   int64   `json:"p90_ns"`
	P99                   int64   `json:"p99_ns"`
	P999                  int64   `json:"p999_ns"`
	// CPU is the CPU time of a run, median: both sides, user and system, and
	// the interrupts of their CPUs.
	CPU float64 `json:"cpu_s"`
	// CPU time over what it achieved, of all repeats together.
	CPUPerGB   float64 `json:"cpu_s_per_gb"`                // 10^9 bytes, both directions
	CPUPer100k float64 `json:"cpu_s_per_100k_transactions"` // 0 for a stream
}

// Proof says whether the accelerated runs of a point were accelerated.
type Proof string

const (
	// Proven: 99 % of the bytes were redirected.
	Proven Proof = "ok"
	// Overflow: with those that went by TCP because the receiver was full, and
	// those that then had to wait for TCP, it is 99 %.
	Overflow Proof = "overflow"
	// Failed: they were not, or the plain runs were not plain.
	Failed Proof = "failed"
)

// A Result is what measuring one point gave.
type Result struct {
	Point
	Plain       Figures  `json:"plain"`
	Accelerated Figures  `json:"accelerated"`
	Unix        *Figures `json:"unix"` // null: no reference was asked for, or there was no time for it
	// Speedup is accelerated over plain in rate, pair by pair; the median, its median
	// absolute deviation, and how far the median may be off: its standard error.
	Speedup       float64 `json:"speedup"`
	MAD           float64 `json:"mad"`
	StandardError float64 `json:"standard_error"`
	// Uncertain: the standard error is more than 4 % of the speedup; for other
	// pairs the bench had no time, or the most it may have were not enough.
	Uncertain bool `json:"uncertain"`
	Repeats   int  `json:"repeats"` // pairs
	// Bytes of the accelerated runs, warm-up included, both directions.
	PayloadBytes    uint64 `json:"payload_bytes"`
	RedirectedBytes uint64 `json:"redirected_bytes"`
	TCPBytes        uint64 `json:"tcp_bytes"`
	Proof           Proof  `json:"proof"`
	Reason          string `json:"reason,omitempty"` // of a failed proof
	// Speedups are those of all pairs, in the order they were measured; Outliers
	// are indexes of those far from the median, which counts them as well.
	Speedups []float64 `json:"speedups"`
	Outliers []int     `json:"outliers,omitempty"`
	// Again is how often a blocking call returned EAGAIN.
	Again uint64 `json:"eagain,omitempty"`
	// Programs is what the BPF programs cost in a run of their own with the
	// kernel's BPF statistics on; empty where there was none.
	Programs []ProgramCost `json:"programs,omitempty"`
}

// A ProgramCost is what one BPF program cost during a run.
type ProgramCost struct {
	Name     string  `json:"name"`
	Runs     uint64  `json:"runs"`
	NsPerRun float64 `json:"ns_per_run"`
}
