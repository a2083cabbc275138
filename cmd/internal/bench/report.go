package bench

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"
)

func newReport(p Parameters, f Facts) *Report {
	return &Report{Header: Header{
		Kernel: kernelRelease(), CPU: cpuModel(), CPUs: runtime.NumCPU(), Congestion: congestionControl(),
		Versions: Versions{Skipstack: version(), Go: runtime.Version()},
		Started:  time.Now().UTC().Truncate(time.Second), Parameters: p, Facts: f,
	}}
}

// version is what the go command recorded: a tag, or the commit.
func version() string {
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "unknown"
}

func kernelRelease() string {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return "unknown"
	}
	return unix.ByteSliceToString(u.Release[:])
}

// congestionControl is the default of this network namespace, which new ones take over.
func congestionControl() string {
	name, err := os.ReadFile("/proc/sys/net/ipv4/tcp_congestion_control")
	if err != nil {
		return "unknown"
	}
	return strings.TrimSpace(string(name))
}

// cpuModel is the name that /proc/cpuinfo gives; architectures differ in its key.
func cpuModel() string {
	f, err := os.Open("/proc/cpuinfo")
	if err != nil {
		return runtime.GOARCH
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		key, value, _ := strings.Cut(lines.Text(), ":")
		switch strings.TrimSpace(key) {
		case "model name", "Model", "cpu model":
			return strings.TrimSpace(value)
		}
	}
	return runtime.GOARCH
}

func (r *Report) writeJSON(w io.WriteCloser) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	if err := e.Encode(r); err != nil {
		w.Close()
		return fmt.Errorf("write the results: %w", err)
	}
	return w.Close()
}

// writeText writes the report for people, at most 100 columns wide.
func (r *Report) writeText(w io.Writer) error {
	var b bytes.Buffer
	h := r.Header
	fmt.Fprintf(&b, "\nLinux %s, %s, %d CPUs. Kernel verdict: %s.\n", h.Kernel, h.CPU, h.CPUs, h.Verdict)
	fmt.Fprintf(&b, "Two pods on a %s; congestion control %s.\n", h.Network, h.Congestion)
	fmt.Fprintf(&b, "Medians of %d pairs of runs of %v; plain and accelerated runs differ only in the\n", h.Parameters.Repeats, h.Parameters.Length)
	fmt.Fprintln(&b, "processes' cgroup. The pods accept two risks, which is right here: splice, as the processes")
	fmt.Fprintln(&b, "only send and recv, and blocking, as one thread reads each socket and retries on EAGAIN.")
	fmt.Fprintln(&b)
	t := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "test\tpath\tCPU\tmessage\tplain\tskipstack\tratio\tsent\tredirected\tproof")
	for _, p := range r.Points {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%s±%.2f\t%s\t%s\t%s\n",
			p.Test, p.Path, p.cpus(), p.options(), p.Plain.rate(p.Test), p.Accelerated.rate(p.Test), threeDigits(p.Speedup), p.MAD,
			quantity(float64(p.PayloadBytes), "B"), quantity(float64(p.RedirectedBytes), "B"), p.Proof)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	fmt.Fprintln(&b)
	t = tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "latency in us\t\t\t\tplain p50\tp99\tskipstack p50\tp99")
	for _, p := range r.Points {
		if p.Test != Stream {
			fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", p.Test, p.Path, p.cpus(), p.message(),
				micros(p.Plain.P50), micros(p.Plain.P99), micros(p.Accelerated.P50), micros(p.Accelerated.P99))
		}
	}
	if err := t.Flush(); err != nil {
		return err
	}
	fmt.Fprint(&b, `
CPU: client and server share one, or have one each.
ratio: rate with skipstack over plain rate, the median of the pairs' ratios and their median
absolute deviation. On a busy machine it differs from the ratio of the two medians shown.
sent, redirected: bytes of the skipstack runs; all of the plain runs' were seen to go by TCP.
proof: ok is 99 % redirected; overflow is as much together with what went by TCP because the
receiver had its limit of unread bytes. Overflow is a pass: a receiver slower than its sender is
meant to slow it down by TCP, and every byte that was not redirected is accounted for.
`)
	fmt.Fprintf(&b, "Checked byte by byte, apart from the measuring: %s.\n", quantity(float64(r.Header.Verified), "B"))
	for _, p := range r.Points {
		for _, i := range p.Outliers {
			fmt.Fprintf(&b, "Outlier, counted like the others: %s, pair %d: %.2f.\n", p.Point, i+1, p.Speedups[i])
		}
	}
	for _, p := range r.Points {
		if p.Proof == Failed {
			fmt.Fprintf(&b, "NOT PROVEN: %s: %s.\n", p.Point, p.Reason)
		}
	}
	if r.Proven() {
		fmt.Fprintln(&b, "The bypass is proven for every point.")
	}
	_, err := w.Write(b.Bytes())
	return err
}

func (p Point) cpus() string {
	if p.Placement == CrossCPU {
		return "2"
	}
	return "1"
}

// options describes the messages, and TCP_NODELAY where it matters to people.
func (p Point) options() string {
	if p.NoDelay && p.Test == Stream {
		return p.message() + " nodelay"
	}
	return p.message()
}

// proof is the proof and, if it failed, why.
func (r Result) proof() string {
	if r.Reason != "" {
		return string(r.Proof) + ": " + r.Reason
	}
	return string(r.Proof)
}

func (f Figures) rate(t Test) string {
	if t == Stream {
		return quantity(f.BytesPerSecond, "B/s")
	}
	return quantity(f.TransactionsPerSecond, "/s")
}

// quantity writes a number with three digits and a decimal prefix.
func quantity(v float64, unit string) string {
	prefixes := []string{"", "k", "M", "G", "T", "P"}
	i := 0
	for ; v >= 999.5 && i < len(prefixes)-1; i++ {
		v /= 1000
	}
	if i == 0 {
		return fmt.Sprintf("%.0f %s", v, unit)
	}
	return fmt.Sprintf("%s %s%s", threeDigits(v), prefixes[i], unit)
}

func threeDigits(v float64) string {
	digits := 0
	switch {
	case v < 9.995:
		digits = 2
	case v < 99.95:
		digits = 1
	}
	return strconv.FormatFloat(v, 'f', digits, 64)
}

func micros(ns int64) string { return fmt.Sprintf("%.2f", float64(ns)/1000) }
