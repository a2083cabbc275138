package bench

import (
	"bytes"
	"fmt"
	"io"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/skipstack/skipstack/bpf"
)

// The tables are made for terminals of 80 columns.

// A section is the points of one path and placement.
type section struct {
	path      Path
	placement Placement
	points    []Result
}

func sections(points []Result) []section {
	var all []section
	for _, p := range points {
		i := slices.IndexFunc(all, func(s section) bool { return s.path == p.Path && s.placement == p.Placement })
		if i < 0 {
			i, all = len(all), append(all, section{path: p.Path, placement: p.Placement})
		}
		all[i].points = append(all[i].points, p)
	}
	return all
}

func (s section) title() string { return title(s.path, s.placement) }

func title(path Path, placement Placement) string {
	paths := map[Path]string{PodIP: "pod IP", ServiceIP: "Service IP", IPv6: "IPv6", Loopback: "loopback in one pod"}
	if placement == CrossCPU {
		return paths[path] + ", two CPUs"
	}
	return paths[path] + ", one CPU"
}

// writeText writes the report for people.
func (r *Report) writeText(w io.Writer) error {
	var b bytes.Buffer
	h := r.Header
	fmt.Fprintln(&b)
	paragraph(&b, "Linux %s, %s, %d CPUs. Kernel verdict: %s.", h.Kernel, h.CPU, h.CPUs, h.Verdict)
	paragraph(&b, "Two pods, %s; congestion control %s.", h.Network, h.Congestion)
	paragraph(&b, "Medians of %s of %v; plain and accelerated runs differ only in the processes' cgroup. "+
		"The pods accept two risks, which is right here: splice, as the processes only send and recv, and blocking, "+
		"as one thread reads each socket and retries on EAGAIN.", h.Parameters.pairs(), h.Parameters.Length)
	if h.Reference != "" {
		paragraph(&b, "AF_UNIX, a stream between the same pods with no network at all: %s.", h.Reference)
	}
	r.writeResults(&b, `
one CPU, two CPUs: client and server share one, or have one each.
ratio: rate with skipstack over plain rate, the median of the pairs' ratios and
  their median absolute deviation. On a busy machine it differs from the ratio
  of the two medians shown.
?: the ratio is uncertain: its standard error is more than 4 %, in spite of all
  pairs that there was time for.
sent: payload bytes of the skipstack runs, and how much of it was redirected.
  All of the plain runs' was seen to go by TCP.
x16: that many connections at once.
proof: ok is 99 % redirected; overflow is as much together with what went by TCP
  because the receiver had its limit of unread bytes. Overflow is a pass: a
  receiver slower than its sender is meant to slow it down by TCP, and every
  byte that was not redirected is accounted for.
`)
	_, err := w.Write(b.Bytes())
	return err
}

// writeResults writes the tables and what follows from them; legend explains the
// first ones.
func (r *Report) writeResults(b io.Writer, legend string) {
	for _, left := range r.Header.LeftOut {
		paragraph(b, "Left out: %s.", left)
	}
	if len(r.Points) == 0 {
		fmt.Fprintln(b, "Nothing was measured.")
		return
	}
	for _, s := range sections(r.Points) {
		fmt.Fprintf(b, "\n%s\n", upperFirst(s.title()))
		writeRates(b, s.points, r.Header.Parameters.Unix)
	}
	fmt.Fprint(b, legend)
	for _, s := range sections(r.Points) {
		writeLatencies(b, s)
	}
	for _, s := range sections(r.Points) {
		writeCosts(b, s)
	}
	fmt.Fprintln(b)
	for _, sentence := range r.crossovers() {
		fmt.Fprintln(b, sentence)
	}
	r.writeLosses(b)
	fmt.Fprintf(b, "Checked byte by byte, apart from the measuring: %s.\n", quantity(float64(r.Header.Verified), "B"))
	for _, p := range r.Points {
		for _, i := range p.Outliers {
			paragraph(b, "Outlier, counted like the others: %s, pair %d: %.2f.", p.Point, i+1, p.Speedups[i])
		}
	}
	for _, p := range r.Points {
		if p.Repeats > r.Header.Parameters.Repeats {
			paragraph(b, "More pairs, as the ratio was uncertain: %s: %d, standard error %.1f %%.", p.Point, p.Repeats, 100*p.StandardError/p.Speedup)
		}
	}
	for _, p := range r.Points {
		if p.Proof == Failed {
			paragraph(b, "NOT PROVEN: %s: %s.", p.Point, p.Reason)
		}
	}
	if r.Header.Incomplete != "" {
		paragraph(b, "INCOMPLETE: not everything was measured: %s.", r.Header.Incomplete)
	}
	if r.Proven() {
		fmt.Fprintln(b, "The bypass is proven for every point.")
	}
}

// columns is the width of a terminal.
const columns = 80

// paragraph writes text in lines of at most that width; the further ones are indented.
func paragraph(w io.Writer, format string, args ...any) {
	line := ""
	for _, word := range strings.Fields(fmt.Sprintf(format, args...)) {
		switch {
		case line == "":
			line = word
		case utf8.RuneCountInString(line)+1+utf8.RuneCountInString(word) > columns:
			fmt.Fprintln(w, line)
			line = "  " + word
		default:
			line += " " + word
		}
	}
	fmt.Fprintln(w, line)
}

func upperFirst(s string) string { return strings.ToUpper(s[:1]) + s[1:] }

func writeRates(w io.Writer, points []Result, withUnix bool) {
	row := func(test Test, message, plain, accelerated, unix, ratio, sent, redirected string, proof Proof) {
		if withUnix {
			// The reference takes the place of the bytes, which JSON and CSV have.
			sent = unix
		}
		line := fmt.Sprintf("%-6s %-15s %9s %9s %9s %-10s %6s  %s", test, message, plain, accelerated, sent, ratio, redirected, proof)
		fmt.Fprintln(w, strings.TrimRight(line, " "))
	}
	row("test", "message", "plain", "skipstack", "AF_UNIX", "ratio", "sent", "redir.", "proof")
	for _, p := range points {
		var unix string
		if p.Unix != nil {
			unix = p.Unix.rate(p.Test)
		}
		row(p.Test, p.options(), p.Plain.rate(p.Test), p.Accelerated.rate(p.Test), unix,
			p.ratio(), quantity(float64(p.PayloadBytes), "B"), p.redirectedPart(), p.Proof)
	}
}

// redirectedPart is the part of the accelerated runs' bytes that was redirected.
func (r Result) redirectedPart() string {
	if r.PayloadBytes == 0 {
		return "-"
	}
	// Cut, not rounded: 100 % is all.
	return fmt.Sprintf("%.1f%%", float64(r.RedirectedBytes*1000/r.PayloadBytes)/10)
}

func writeLatencies(w io.Writer, s section) {
	if !slices.ContainsFunc(s.points, func(p Result) bool { return p.Test != Stream }) {
		return
	}
	fmt.Fprintf(w, "\nLatency in us, %s\n", s.title())
	fmt.Fprintf(w, "%-17s%6s%7s%7s%7s%11s%7s%7s%7s\n", "test message", "plain", "p90", "p99", "p99.9", "skipstack", "p90", "p99", "p99.9")
	for _, p := range s.points {
		if p.Test != Stream {
			a, b := p.Plain, p.Accelerated
			fmt.Fprintf(w, "%-4s %-12s%6s%7s%7s%7s%11s%7s%7s%7s\n", p.Test, p.options(),
				micros(a.P50), micros(a.P90), micros(a.P99), micros(a.P999), micros(b.P50), micros(b.P90), micros(b.P99), micros(b.P999))
		}
	}
	fmt.Fprintln(w, "plain, skipstack: p50.")
}

func writeCosts(w io.Writer, s section) {
	fmt.Fprintf(w, "\nCPU s per GB (stream) or 100 000 transactions, %s\n", s.title())
	timed := slices.ContainsFunc(s.points, func(p Result) bool { return len(p.Programs) > 0 })
	line := fmt.Sprintf("%-6s %-15s %9s %9s", "test", "message", "plain", "skipstack")
	if timed {
		line += fmt.Sprintf(" %10s %11s %10s", "sk_msg ns", "sock_ops ns", "sk_skb ns")
	}
	fmt.Fprintln(w, line)
	for _, p := range s.points {
		line := fmt.Sprintf("%-6s %-15s %9s %9s", p.Test, p.options(), threeDigits(p.Plain.cost(p.Test)), threeDigits(p.Accelerated.cost(p.Test)))
		if timed {
			line += fmt.Sprintf(" %10s %11s %10s", p.program(bpf.DatapathProgRedirect), p.program(bpf.DatapathProgTrack), p.program(bpf.DatapathProgFunnel))
		}
		fmt.Fprintln(w, strings.TrimRight(line, " "))
	}
	if timed {
		fmt.Fprintln(w, "sk_msg, sock_ops, sk_skb: nanoseconds of each run of the BPF program, in a pass\n"+
			"of its own. sk_msg runs for each send, sock_ops at handshakes and closes.")
	}
}

// cost is CPU seconds per GB of a stream, per 100 000 transactions of other tests.
func (f Figures) cost(t Test) float64 {
	if t == Stream {
		return f.CPUPerGB
	}
	return f.CPUPer100k
}

func (r Result) program(name string) string {
	for _, p := range r.Programs {
		if p.Name == name {
			return threeDigits(p.NsPerRun)
		}
	}
	return ""
}

// writeLosses lists every point where plain TCP is faster.
func (r *Report) writeLosses(w io.Writer) {
	slower := r.slower(1)
	if len(slower) == 0 {
		fmt.Fprintln(w, "Plain TCP is faster at none of these points.")
		return
	}
	fmt.Fprintf(w, "Plain TCP is faster at %d of %s:\n", len(slower), pointsCount(len(r.Points)))
	writePoints(w, slower)
}

func writePoints(w io.Writer, points []Result) {
	for _, p := range points {
		fmt.Fprintf(w, "  %s: ratio %s\n", p.Point, p.ratio())
	}
}

// writeCheck says what --check found.
func (o options) writeCheck(r *Report, w io.Writer) error {
	if !o.check {
		return nil
	}
	var b bytes.Buffer
	missing, slower := o.notMeasured(r), r.slower(o.minSpeedup)
	for _, path := range missing {
		fmt.Fprintf(&b, "CHECK FAILED: path %s, which --paths names, was not measured.\n", path)
	}
	if len(slower) > 0 {
		fmt.Fprintf(&b, "CHECK FAILED: slower than %.2f times plain TCP:\n", o.minSpeedup)
		writePoints(&b, slower)
	}
	if len(missing)+len(slower) == 0 && len(r.Points) > 0 && r.Header.Incomplete == "" {
		fmt.Fprintf(&b, "Check: no point is slower than %.2f times plain TCP.\n", o.minSpeedup)
	}
	_, err := w.Write(b.Bytes())
	return err
}
