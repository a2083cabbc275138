package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
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
	rules      *rules     // nil: counterRules
	reference  *reference // nil: none
	// interruptsApart: CPU time is that of the threads and of their CPUs' interrupts.
	interruptsApart bool
}

// rules judge what a run gave, by what a site can know.
type rules struct {
	// late says that the connection of a run stayed plain as its client was kept from
	// the handshake for too long.
	late     func(p Point, accelerated bool, m measured, counted datapath.Counters) bool
	lateness string // what is said of such a run
	// prove judges a point. The reason is empty unless the proof failed.
	prove func(p Point, plain, accelerated *Evidence) (Proof, string)
}

// clientLate is [rules.lateness] where counters tell.
const clientLate = "a client was late in the handshake"

// counterRules judge by the datapath's counters.
var counterRules = &rules{
	lateness: clientLate,
	late: func(p Point, _ bool, m measured, counted datapath.Counters) bool {
		return p.Test != ConnectRequestResponse && float64(counted.Connections[lateClaim]) > (1-enough)*float64(m.client.Conns)
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

// series measures the least pairs of a point: plain, accelerated, accelerated, plain,
// and so on, so that a machine that slowly changes its speed favours neither. What is
// missing of the point's reference follows its pairs, a run each.
func (r *runner) series(ctx context.Context, p Point) (*series, error) {
	s := &series{point: p, reference: r.reference.at(p)}
	for range r.parameters.Repeats {
		if err := r.pair(ctx, s, s.reference != nil && len(s.reference.rates) < r.reference.runs); err != nil {
			return nil, fmt.Errorf("%s: %w", p, err)
		}
	}
	return s, nil
}

// pair adds a pair of runs to a series, or nothing if there is an error.
func (r *runner) pair(ctx context.Context, s *series, reference bool) error {
	kinds := []runKind{{}, {accelerated: true}}
	if len(s.plain.rates)%2 == 1 {
		kinds[0], kinds[1] = kinds[1], kinds[0]
	}
	if reference {
		kinds = append(kinds, runKind{unix: true})
	}
	var runs [3]struct {
		m       measured
		counted datapath.Counters
	}
	for i, kind := range kinds {
		var err error
		if runs[i].m, runs[i].counted, err = r.runAs(ctx, s.point, kind); err != nil {
			return err
		}
	}
	for i, kind := range kinds {
		of := &s.plain
		switch {
		case kind.unix:
			of = s.reference
		case kind.accelerated:
			of = &s.accelerated
		}
		of.add(s.point, runs[i].m, runs[i].counted)
	}
	return nil
}

// errTooBusy is returned for a run that something disturbed at every attempt.
var errTooBusy = errors.New("the machine is too busy")

// attempts is how often a run that something disturbed is tried.
const attempts = 10

// A runKind says what a run of a point is for.
type runKind struct {
	accelerated bool
	verify      bool // the verification pass
	unix        bool // the reference: an AF_UNIX stream between the same pods
}

// run is [runner.runAs] without a reference.
func (r *runner) run(ctx context.Context, p Point, accelerated, verify bool) (measured, datapath.Counters, error) {
	return r.runAs(ctx, p, runKind{accelerated: accelerated, verify: verify})
}

// runAs does one run of a point and returns what the datapath counted meanwhile. It is
// repeated if it did not cover its window, or if connections of a run were
// kept from the handshake for so long that they stay plain by design.
func (r *runner) runAs(ctx context.Context, p Point, kind runKind) (measured, datapath.Counters, error) {
	var none datapath.Counters
	cpus, err := r.place(p.Placement)
	if err != nil {
		return measured{}, none, err
	}
	target, err := r.target(p, kind)
	if err != nil {
		return measured{}, none, err
	}
	clients := clientPod
	if p.Path == Loopback {
		clients = serverPod
	}
	client, err := r.site.worker(role{clientSide, clients, kind.accelerated})
	if err != nil {
		return measured{}, none, err
	}
	server, err := r.site.worker(role{serverSide, serverPod, kind.accelerated})
	if err != nil {
		return measured{}, none, err
	}
	o := order{
		Point: p, NonBlocking: r.parameters.NonBlocking, Congestion: r.parameters.Congestion, Verify: kind.verify, Interrupts: r.interruptsApart,
		WarmUp: r.parameters.WarmUp, Length: r.parameters.Length,
	}
	what, said := p.String(), ""
	if kind.verify {
		what = "verifying data"
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
		short := !kind.verify && !m.covers(p.Test, r.parameters.Length)
		late := r.judge().late(p, kind.accelerated, m, counted)
		why := r.judge().lateness
		if short {
			why = fmt.Sprintf("a run lasted %v", m.elapsed(p.Test))
		}
		switch {
		case !short && !late, !short && attempt == attempts:
			return m, counted, nil
		case attempt == attempts:
			return m, none, fmt.Errorf("%w: %s", errTooBusy, why)
		}
		if why != said { // not the same up to nine times
			fmt.Fprintf(r.log, "bench: %s: %s: trying again\n", what, why)
			said = why
		}
	}
}

// target is where a run's client connects to.
func (r *runner) target(p Point, kind runKind) (endpoint, error) {
	if kind.unix {
		s, ok := r.site.(localSite)
		if !ok {
			return endpoint{}, errors.New("the pods share no file system: there can be no AF_UNIX reference")
		}
		return endpoint{Unix: s.socketPath()}, nil
	}
	addr, err := r.site.target(p.Path)
	return endpoint{TCP: netip.AddrPortFrom(addr, 0)}, err
}

// notAccelerated says what is wrong with the accelerated part of the verification.
func (r *runner) notAccelerated(e *Evidence) string {
	reason := unexplained(e)
	if reason == "" && e.redirected() == 0 {
		reason = fmt.Sprintf("none of %d bytes were redirected, %d went by TCP%s", e.Payload, e.TCP, passed(e))
	}
	return r.because(reason)
}

// because adds to the reason of a failure, if there is one, what has changed at the site.
func (r *runner) because(reason string) string {
	s, ok := r.site.(interface{ changed() string })
	if !ok || reason == "" {
		return reason
	}
	if why := s.changed(); why != "" {
		reason += "; " + why
	}
	return reason
}

// conclude is what a series gave.
func (r *runner) conclude(s *series) Result {
	result := s.conclude(r.judge())
	result.Reason = r.because(result.Reason)
	return result
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
		} else if reason := r.notAccelerated(&e); reason != "" {
			return 0, fmt.Errorf("verify data on path %s: %s", path, reason)
		}
		bytes += m.payload()
	}
	return bytes, nil
}
