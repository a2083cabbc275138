package bench

import (
	"context"
	"fmt"
	"io"
	"time"

	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/plugin/datapath"
)

// A runner measures points at a site.
type runner struct {
	site       site
	parameters Parameters
	cpus       []int // that may be used
	log        io.Writer
	rules      *rules // nil: counterRules
}

// rules judge what a run gave, by what a site can know.
type rules struct {
	// late says that the connection of a run stayed plain as its client was kept from
	// the handshake for too long.
	late func(p Point, accelerated bool, m measured, counted datapath.Counters) bool
	// prove judges a point. The reason is empty unless the proof failed.
	prove func(p Point, plain, accelerated *Evidence) (Proof, string)
}

// counterRules judge by the datapath's counters.
var counterRules = &rules{
	late: func(p Point, _ bool, _ measured, counted datapath.Counters) bool {
		return p.Test != ConnectRequestResponse && counted.Connections[lateClaim] > 0
	},
	prove: func(_ Point, plain, accelerated *Evidence) (Proof, string) { return prove(plain, accelerated) },
}

func (r *runner) judge() *rules {
	if r.rules == nil {
		return counterRules
	}
	return r.rules
}

// allowedCPUs lists the CPUs that this process may use.
func allowedCPUs() ([]int, error) {
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &set); err != nil {
		return nil, fmt.Errorf("find the CPUs: %w", err)
	}
	var cpus []int
	for cpu := 0; len(cpus) < set.Count(); cpu++ {
		if set.IsSet(cpu) {
			cpus = append(cpus, cpu)
		}
	}
	return cpus, nil
}

// place picks CPUs from the end: the first ones serve most interrupts.
func (r *runner) place(p Placement) (placed, error) {
	last := len(r.cpus) - 1
	switch {
	case p == SameCPU:
		return placed{r.cpus[last], r.cpus[last]}, nil
	case p == CrossCPU && last > 0:
		return placed{r.cpus[last-1], r.cpus[last]}, nil
	}
	return placed{}, fmt.Errorf("placement %s: only one CPU may be used", p)
}

// measure runs a point: plain, accelerated, accelerated, plain, and so on, so that a
// machine that slowly changes its speed favours neither.
func (r *runner) measure(ctx context.Context, p Point) (Result, error) {
	var plain, accelerated samples
	for i := range r.parameters.Repeats {
		pair := []*samples{&plain, &accelerated}
		if i%2 == 1 {
			pair[0], pair[1] = pair[1], pair[0]
		}
		for _, s := range pair {
			m, counted, err := r.run(ctx, p, s == &accelerated, false)
			if err != nil {
				return Result{}, fmt.Errorf("%s: %w", p, err)
			}
			s.add(p.Test, m, counted)
		}
	}
	return conclude(p, &plain, &accelerated, r.judge()), nil
}

// samples are the runs of one kind.
type samples struct {
	rates    []float64
	cpu      []float64
	latency  histogram
	evidence Evidence
	again    uint64
}

func (s *samples) add(test Test, m measured, counted datapath.Counters) {
	s.rates = append(s.rates, m.rate(test))
	s.cpu = append(s.cpu, float64(m.client.CPU+m.server.CPU)/1e9)
	if m.client.Latency != nil {
		s.latency.merge(m.client.Latency)
	}
	s.again += m.client.Again + m.server.Again
	s.evidence.add(m, counted)
}

func (s *samples) figures(p Point) Figures {
	f := Figures{
		P50: s.latency.quantile(0.5), P90: s.latency.quantile(0.9), P99: s.latency.quantile(0.99),
		CPU: median(s.cpu),
	}
	rate := median(s.rates)
	if p.Test == Stream {
		f.BytesPerSecond = rate
	} else {
		f.TransactionsPerSecond = rate
		f.BytesPerSecond = rate * float64(p.RequestBytes+p.ResponseBytes)
	}
	return f
}

// conclude makes a point's result of its runs.
func conclude(p Point, plain, accelerated *samples, by *rules) Result {
	speedups := ratios(accelerated.rates, plain.rates)
	result := Result{
		Point: p, Plain: plain.figures(p), Accelerated: accelerated.figures(p),
		Speedup: median(speedups), MAD: mad(speedups), Repeats: len(speedups),
		PayloadBytes: accelerated.evidence.Payload, RedirectedBytes: accelerated.evidence.redirected(),
		TCPBytes: accelerated.evidence.TCP,
		Speedups: speedups, Outliers: outliers(speedups),
		Again: plain.again + accelerated.again,
	}
	result.Proof, result.Reason = by.prove(p, &plain.evidence, &accelerated.evidence)
	return result
}

// attempts is how often a run that something disturbed is tried.
const attempts = 3

// run does one run of a point and returns what the datapath counted meanwhile. It is
// repeated if it did not cover its window, or if the one connection of a run was
// kept from the handshake for so long that it stays plain by design.
func (r *runner) run(ctx context.Context, p Point, accelerated, verify bool) (measured, datapath.Counters, error) {
	var none datapath.Counters
	cpus, err := r.place(p.Placement)
	if err != nil {
		return measured{}, none, err
	}
	target, err := r.site.target(p.Path)
	if err != nil {
		return measured{}, none, err
	}
	clients := clientPod
	if p.Path == Loopback {
		clients = serverPod
	}
	client, err := r.site.worker(role{clientSide, clients, accelerated})
	if err != nil {
		return measured{}, none, err
	}
	server, err := r.site.worker(role{serverSide, serverPod, accelerated})
	if err != nil {
		return measured{}, none, err
	}
	o := order{
		Point: p, NonBlocking: r.parameters.NonBlocking, Verify: verify,
		WarmUp: r.parameters.WarmUp, Length: r.parameters.Length,
	}
	for attempt := 1; ; attempt++ {
		before, err := r.site.counters()
		if err != nil {
			return measured{}, none, err
		}
		m, err := run(ctx, client, server, o, cpus, target)
		if err != nil {
			return measured{}, none, err
		}
		after, err := r.site.counters()
		if err != nil {
			return measured{}, none, err
		}
		counted := after.Since(before)
		short := !verify && !m.covers(p.Test, r.parameters.Length)
		late := r.judge().late(p, accelerated, m, counted)
		why := "the client was late in the handshake"
		if short {
			why = fmt.Sprintf("a run lasted %v", m.elapsed(p.Test))
		}
		switch {
		case !short && !late, !short && attempt == attempts:
			return m, counted, nil
		case attempt == attempts:
			return m, none, fmt.Errorf("the machine is too busy: %s", why)
		}
		fmt.Fprintf(r.log, "bench: %s: %s, once more\n", p, why)
	}
}

// covers tells if things were counted over most of a run's window.
func (m measured) covers(test Test, length time.Duration) bool { return m.elapsed(test) > length/2 }

// verify sends checked data on a path, plain and accelerated, and returns how much.
func (r *runner) verify(ctx context.Context, path Path) (bytes uint64, err error) {
	p := Point{Test: RequestResponse, Path: path, Placement: SameCPU, Connections: 1}
	for _, accelerated := range []bool{false, true} {
		m, counted, err := r.run(ctx, p, accelerated, true)
		if err != nil {
			return 0, fmt.Errorf("verify data on path %s: %w", path, err)
		}
		var e Evidence
		e.add(m, counted)
		if !accelerated {
			if reason := notPlain(&e); reason != "" {
				return 0, fmt.Errorf("verify data on path %s, plain: %s", path, reason)
			}
		} else if reason := unexplained(&e); reason != "" || e.redirected() == 0 {
			return 0, fmt.Errorf("verify data on path %s: nothing was redirected %s", path, reason)
		}
		bytes += m.payload()
	}
	return bytes, nil
}
