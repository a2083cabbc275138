package bench

import (
	"github.com/skipstack/skipstack/plugin/datapath"
)

// samples are the runs of one kind.
type samples struct {
	rates        []float64
	cpu          []float64 // seconds
	bytes        uint64
	transactions uint64
	latency      histogram
	evidence     Evidence
	again        uint64
}

func (s *samples) add(p Point, m measured, counted datapath.Counters) {
	s.rates = append(s.rates, m.rate(p.Test))
	s.cpu = append(s.cpu, m.cpu(p.Placement).Seconds())
	s.bytes += m.moved(p)
	s.transactions += m.client.Transactions
	if m.client.Latency != nil {
		s.latency.merge(m.client.Latency)
	}
	s.again += m.client.Again + m.server.Again
	s.evidence.add(m, counted)
}

func (s *samples) figures(p Point) Figures {
	f := Figures{
		P50: s.latency.quantile(0.5), P90: s.latency.quantile(0.9), P99: s.latency.quantile(0.99), P999: s.latency.quantile(0.999),
		CPU: median(s.cpu),
	}
	var cpu float64
	for _, seconds := range s.cpu {
		cpu += seconds
	}
	if s.bytes > 0 {
		f.CPUPerGB = cpu / (float64(s.bytes) / 1e9)
	}
	if s.transactions > 0 {
		f.CPUPer100k = cpu / (float64(s.transactions) / 1e5)
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
		Speedup: median(speedups), MAD: mad(speedups), StandardError: standardError(speedups),
		Uncertain: uncertainty(speedups) > certain, Repeats: len(speedups),
		PayloadBytes: accelerated.evidence.Payload, RedirectedBytes: accelerated.evidence.redirected(),
		TCPBytes: accelerated.evidence.TCP,
		Speedups: speedups, Outliers: outliers(speedups),
		Again: plain.again + accelerated.again,
	}
	result.Proof, result.Reason = by.prove(p, &plain.evidence, &accelerated.evidence)
	return result
}
