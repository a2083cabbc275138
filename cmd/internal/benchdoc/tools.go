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
	MessageBytes                    int `json:"message_bytes"`
	Plain, Accelerated              []float64
	PlainUser                       []float64 `json:"plain_user"`
	AcceleratedUser                 []float64 `json:"accelerated_user"`
}

// micros is the time of a message or transaction at the median of rates.
func (t toolResult) micros(rates []float64) float64 {
	return float64(max(1, t.MessageBytes)) / median(rates) * 1e6
}

// user is how much of that is spent in the tool itself.
func (t toolResult) user(rates, parts []float64) string {
	if len(parts) == 0 {
		return ""
	}
	return fmt.Sprintf("%.2f", t.micros(rates)*median(parts))
}

// writeTools sets what tools measured beside what the bench did in between.
func writeTools(w io.Writer, results []toolResult) error {
	var experiments []string
	for _, t := range results {
		if len(t.Plain) == 0 || len(t.Accelerated) == 0 || median(t.Plain) <= 0 || median(t.Accelerated) <= 0 {
			return fmt.Errorf("%s: no runs of %s", t.Version, t.Experiment)
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
				plain, accelerated, accelerated/plain, t.micros(t.Plain), t.micros(t.Accelerated),
				t.user(t.Plain, t.PlainUser), t.user(t.Accelerated, t.AcceleratedUser))
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

Pod IP, one CPU; medians. The tools and the bench measured in turn. The times are those of one message or transaction,
both sides; "in the tool" is the part of it that client and server spend in user mode, by getrusage(2).

| experiment | by | plain | skipstack | ratio | µs, plain | µs, skipstack | in the tool, plain | in the tool, skipstack |
| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
`

// compare says how far the tools are from the bench with blocking sockets, which they
// use, too: in rate, and in the time that skipstack saves of a message.
func compare(w io.Writer, experiment string, results []toolResult) error {
	of := func(bench bool) int {
		return slices.IndexFunc(results, func(t toolResult) bool { return t.Experiment == experiment && (t.Tool == "bench") == bench })
	}
	own, other := of(true), of(false)
	if own < 0 || other < 0 {
		return fmt.Errorf("%s was not measured by both the bench and a tool", experiment)
	}
	b, t := results[own], results[other]
	difference := func(theirs, ours float64) float64 { return 100 * (theirs/ours - 1) }
	plain := difference(median(t.Plain), median(b.Plain))
	verdict := "they agree"
	if math.Abs(plain) > 100*agreement {
		verdict = "they do not agree"
	}
	fmt.Fprintf(w, "- %s: plain TCP is %+.0f %% in %s, %s within %.0f %%. skipstack saves %.2f µs of each message there, and %.2f µs by the bench.\n",
		experiment, plain, t.Version, verdict, 100*agreement, t.micros(t.Plain)-t.micros(t.Accelerated), b.micros(b.Plain)-b.micros(b.Accelerated))
	return nil
}

func median(v []float64) float64 {
	s := slices.Sorted(slices.Values(v))
	return (s[(len(s)-1)/2] + s[len(s)/2]) / 2
}
