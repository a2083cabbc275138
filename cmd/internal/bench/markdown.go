package bench

import (
	"bytes"
	"cmp"
	"fmt"
	"io"
	"math"
	"slices"
	"strings"
	"time"
)

// WriteMarkdown writes the report's results for docs/benchmarks.md.
func (r *Report) WriteMarkdown(w io.Writer) error {
	var b bytes.Buffer
	h := r.Header
	kind := "blocking"
	if h.Parameters.NonBlocking {
		kind = "non-blocking"
	}
	fmt.Fprintf(&b, "%s, %d CPUs, Linux %s, congestion control %s; two pods, %s; skipstack %s, %s; kernel verdict: %s. ",
		h.CPU, h.CPUs, h.Kernel, h.Congestion, h.Network, h.Versions.Skipstack, h.Versions.Go, h.Verdict)
	fmt.Fprintf(&b, "Measured on %s, the %s set, %s of %v for each point, %s sockets; it took %v. %s of data were checked byte by byte.\n",
		h.Started.Format(time.DateOnly), h.Parameters.Set, h.Parameters.pairs(), h.Parameters.Length, kind,
		(time.Duration(h.Duration) * time.Second).Round(time.Second), quantity(float64(h.Verified), "B"))
	apart := "The kernel charges interrupts to the thread that they interrupt, so the threads' CPU time has them."
	if h.InterruptsApart {
		apart = "The kernel charges interrupts to no thread: their time on the CPUs of client and server comes from /proc/stat, in steps of 10 ms."
	}
	fmt.Fprintf(&b, "%s %s\n", apart, uncertainLegend)
	for _, left := range h.LeftOut {
		fmt.Fprintf(&b, "Left out: %s.\n", left)
	}
	fmt.Fprint(&b, "\n### Where plain TCP is faster\n\n")
	for _, sentence := range r.crossovers() {
		fmt.Fprintf(&b, "- %s\n", strings.Join(strings.Fields(sentence), " "))
	}
	fmt.Fprintln(&b)
	if slower := r.slower(1); len(slower) == 0 {
		fmt.Fprintf(&b, "At none of the %d points.\n", len(r.Points))
	} else {
		fmt.Fprintf(&b, "At %d of %s:\n\n", len(slower), pointsCount(len(r.Points)))
		for _, p := range slower {
			fmt.Fprintf(&b, "- %s: ratio %s\n", p.Point, p.spacedRatio())
		}
	}
	for _, s := range sections(r.Points) {
		fmt.Fprintf(&b, "\n### %s\n", upperFirst(s.title()))
		markdownRates(&b, s)
		markdownLatencies(&b, s)
	}
	markdownPrograms(&b, r.Points)
	markdownOutliers(&b, r.Points)
	_, err := w.Write(b.Bytes())
	return err
}

// WriteMarkdownCongestion writes the rates of a report that was made on the same machine
// with another congestion control.
func (r *Report) WriteMarkdownCongestion(w io.Writer) error {
	var b bytes.Buffer
	fmt.Fprintf(&b, "\n### With congestion control %s\n\nThe same machine and pods, measured on %s: %s of %v for each point.\n",
		r.Header.Congestion, r.Header.Started.Format(time.DateOnly), r.Header.Parameters.pairs(), r.Header.Parameters.Length)
	for _, s := range sections(r.Points) {
		fmt.Fprintf(&b, "\n%s:\n", upperFirst(s.title()))
		markdownRates(&b, s)
	}
	_, err := w.Write(b.Bytes())
	return err
}

func markdownRow(w io.Writer, cells ...string) {
	fmt.Fprintf(w, "| %s |\n", strings.Join(cells, " | "))
}

// markdownHead writes the head of a table; its first left columns hold words.
func markdownHead(w io.Writer, left int, cells ...string) {
	fmt.Fprintln(w)
	markdownRow(w, cells...)
	for i := range cells {
		cells[i] = "---:"
		if i < left {
			cells[i] = "---"
		}
	}
	markdownRow(w, cells...)
}

func markdownRates(w io.Writer, s section) {
	markdownHead(w, 2, "test", "message", "plain", "skipstack", "AF_UNIX", "ratio", "pairs", "CPU s, plain", "CPU s, skipstack", "redirected", "proof")
	for _, p := range s.points {
		unix := ""
		if p.Unix != nil {
			unix = p.Unix.rate(p.Test)
		}
		markdownRow(w, string(p.Test), p.options(), p.Plain.rate(p.Test), p.Accelerated.rate(p.Test), unix,
			p.spacedRatio(), fmt.Sprint(p.Repeats), threeDigits(p.Plain.cost(p.Test)), threeDigits(p.Accelerated.cost(p.Test)),
			p.redirectedPart(), string(p.Proof))
	}
}

func (r Result) spacedRatio() string { return strings.ReplaceAll(r.ratio(), "±", " ± ") }

func markdownLatencies(w io.Writer, s section) {
	head := false
	for _, p := range s.points {
		if p.Test == Stream {
			continue
		}
		if !head {
			markdownHead(w, 2, "latency, µs", "message", "plain p50", "p90", "p99", "p99.9", "skipstack p50", "p90", "p99", "p99.9")
			head = true
		}
		cells := []string{string(p.Test), p.options()}
		for _, f := range []Figures{p.Plain, p.Accelerated} {
			cells = append(cells, micros(f.P50), micros(f.P90), micros(f.P99), micros(f.P999))
		}
		markdownRow(w, cells...)
	}
}

func markdownPrograms(w io.Writer, points []Result) {
	head := false
	for _, p := range points {
		for _, program := range p.Programs {
			if !head {
				fmt.Fprint(w, "\n### BPF programs\n")
				markdownHead(w, 3, "test", "message", "program", "runs", "ns per run")
				head = true
			}
			markdownRow(w, string(p.Test), p.options(), program.Name, fmt.Sprint(program.Runs), threeDigits(program.NsPerRun))
		}
	}
}

func markdownOutliers(w io.Writer, points []Result) {
	head := false
	for _, p := range points {
		for _, i := range p.Outliers {
			if !head {
				fmt.Fprint(w, "\n### Outliers\n\nPairs whose ratio is far from the median of their point. They count like the others.\n\n")
				head = true
			}
			fmt.Fprintf(w, "- %s, pair %d: %s, median %s\n", p.Point, i+1, threeDigits(p.Speedups[i]), threeDigits(p.Speedup))
		}
	}
}

// A Difference is how far the ratios of one point are apart in two reports.
type Difference struct {
	Point         Point
	First, Second float64
	Relative      float64 // of the second to the first: 0.1 is 10 %
	Uncertain     bool    // one of the reports says so of its ratio
}

// Compare returns the differences of the points that two reports have in common, the
// greatest first.
func Compare(first, second *Report) []Difference {
	var differences []Difference
	for _, a := range first.Points {
		for _, b := range second.Points {
			if a.Point == b.Point && a.Speedup > 0 {
				differences = append(differences, Difference{a.Point, a.Speedup, b.Speedup, math.Abs(b.Speedup/a.Speedup - 1), a.Uncertain || b.Uncertain})
			}
		}
	}
	slices.SortStableFunc(differences, func(a, b Difference) int { return cmp.Compare(b.Relative, a.Relative) })
	return differences
}

// Find returns the result of a point.
func (r *Report) Find(p Point) (Result, bool) {
	i := slices.IndexFunc(r.Points, func(result Result) bool { return result.Point == p })
	if i < 0 {
		return Result{}, false
	}
	return r.Points[i], true
}
