package main

import (
	"fmt"
	"io"
	"slices"

	"github.com/skipstack/skipstack/cmd/internal/bench"
)

// A toolResult is what test/loadtools writes.
type toolResult struct {
	Tool, Version, Experiment, Unit string
	Plain, Accelerated              []float64
}

// points are the bench's own of the experiments, all by pod IP on one CPU.
var points = map[string]bench.Point{
	"stream 64 KiB": {Test: bench.Stream, RequestBytes: 64 << 10},
	"stream 4 KiB":  {Test: bench.Stream, RequestBytes: 4 << 10},
	"rr 64/64 B":    {Test: bench.RequestResponse, RequestBytes: 64, ResponseBytes: 64, NoDelay: true},
}

// writeTools sets what tools measured beside what the bench did.
func writeTools(w io.Writer, r *bench.Report, results []toolResult) error {
	fmt.Fprint(w, "\n### Other tools\n\nPod IP, one CPU; medians.\n\n"+
		"| experiment | unit | by | plain | skipstack | ratio |\n| --- | --- | --- | ---: | ---: | ---: |\n")
	row := func(experiment, unit, by string, plain, accelerated float64) {
		fmt.Fprintf(w, "| %s | %s | %s | %.3g | %.3g | %.2f |\n", experiment, unit, by, plain, accelerated, accelerated/plain)
	}
	for _, t := range results {
		p, ok := points[t.Experiment]
		if !ok || len(t.Plain) == 0 || len(t.Accelerated) == 0 {
			return fmt.Errorf("%s: unknown experiment %q, or no runs", t.Tool, t.Experiment)
		}
		p.Path, p.Placement, p.Connections = bench.PodIP, bench.SameCPU, 1
		own, ok := r.Find(p)
		if !ok {
			return fmt.Errorf("the bench's report has no point %s", p)
		}
		plain, accelerated := own.Plain.TransactionsPerSecond, own.Accelerated.TransactionsPerSecond
		if p.Test == bench.Stream {
			plain, accelerated = own.Plain.BytesPerSecond, own.Accelerated.BytesPerSecond
		}
		row(t.Experiment, t.Unit, "skipstack bench", plain, accelerated)
		row(t.Experiment, t.Unit, t.Version, median(t.Plain), median(t.Accelerated))
	}
	return nil
}

func median(v []float64) float64 {
	s := slices.Sorted(slices.Values(v))
	return (s[(len(s)-1)/2] + s[len(s)/2]) / 2
}
