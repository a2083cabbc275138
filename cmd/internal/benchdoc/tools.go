package main

import (
	"fmt"
	"io"
	"math"
	"slices"
)

// A toolResult is what test/loadtools writes, for a tool or for the bench.
type toolResult struct {
	Tool, Version, Experiment, Unit string
	Plain, Accelerated              []float64
	PlainCPU                        []float64 `json:"plain_cpu_s"`
	AcceleratedCPU                  []float64 `json:"accelerated_cpu_s"`
	PlainUser                       []float64 `json:"plain_user"`
	AcceleratedUser                 []float64 `json:"accelerated_user"`
}

// micros is the CPU time of a message or transaction in µs.
func micros(seconds []float64) float64 { return median(seconds) * 1e6 }

// user is how much of that the tool itself spends; nothing is known of the bench.
func user(seconds, parts []float64) string {
	if part := median(parts); part > 0 {
		return fmt.Sprintf("%.2f", micros(seconds)*part)
	}
	return ""
}

// writeTools sets what tools measured beside what the bench did in between.
func writeTools(w io.Writer, results []toolResult) error {
	var experiments []string
	for _, t := range results {
		for _, v := range [][]float64{t.Plain, t.Accelerated, t.PlainCPU, t.AcceleratedCPU} {
			if median(v) <= 0 {
				return fmt.Errorf("%s: no runs of %s", t.Version, t.Experiment)
			}
		}
		if !slices.Contains(experiments, t.Experiment) {
			experiments = append(experiments, t.Experiment)
		}
	}
	fmt.Fprint(w, toolsText)
	for _, e := range experiments {
		for _, t := range results {
			if t.Experiment != e {
				continue
			}
			plain, accelerated := median(t.Plain), median(t.Accelerated)
			fmt.Fprintf(w, "| %s | %s | %.3g | %.3g | %.2f | %.2f | %.2f | %s | %s |\n", e+", "+t.Unit, t.Version,
				plain, accelerated, accelerated/plain, micros(t.PlainCPU), micros(t.AcceleratedCPU),
				user(t.PlainCPU, t.PlainUser), user(t.AcceleratedCPU, t.AcceleratedUser))
		}
	}
	fmt.Fprintln(w)
	for _, e := range experiments {
		if err := compare(w, e, results); err != nil {
			return err
		}
	}
	return nil
}

const toolsText = `
### Other tools

Pod IP, one CPU; medians. The tools and the bench measured in turn. CPU is the CPU time of one message or transaction in
µs, of client and server, by getrusage(2) for the tools; "in the tool" is the part of it in user mode, in which the
bench's generators do next to nothing.

| experiment | by | plain | skipstack | ratio | CPU, plain | CPU, skipstack | in the tool, plain | in the tool, skipstack |
| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
`

// compare says how far a tool is from the bench with blocking sockets, which the tools
// use, too: in the CPU time of plain TCP, which a busy machine changes less than the
// rate, and in what skipstack saves.
func compare(w io.Writer, experiment string, results []toolResult) error {
	of := func(bench bool) int {
		return slices.IndexFunc(results, func(t toolResult) bool { return t.Experiment == experiment && (t.Tool == "bench") == bench })
	}
	own, other := of(true), of(false)
	if own < 0 || other < 0 {
		return fmt.Errorf("%s was not measured by both the bench and a tool", experiment)
	}
	b, t := results[own], results[other]
	plain := 100 * (micros(t.PlainCPU)/micros(b.PlainCPU) - 1)
	verdict := "they agree"
	if math.Abs(plain) > 100*agreement {
		verdict = "they do not agree"
	}
	fmt.Fprintf(w, "- %s: a message by plain TCP costs %+.0f %% of CPU time in %s against the bench, %s within %.0f %%. skipstack saves %.2f µs of it there, and %.2f µs by the bench.\n",
		experiment, plain, t.Version, verdict, 100*agreement, micros(t.PlainCPU)-micros(t.AcceleratedCPU), micros(b.PlainCPU)-micros(b.AcceleratedCPU))
	return nil
}

// median is 0 of no values.
func median(v []float64) float64 {
	if len(v) == 0 {
		return 0
	}
	s := slices.Sorted(slices.Values(v))
	return (s[(len(s)-1)/2] + s[len(s)/2]) / 2
}
