package bench

import (
	"bytes"
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

// widest is a result whose cells are as wide as they get.
func widest(test Test) Result {
	return Result{
		Point:       Point{Test: test, Path: Loopback, Placement: CrossCPU, RequestBytes: 256, ResponseBytes: 30000, NoDelay: true, Connections: 1},
		Plain:       Figures{BytesPerSecond: 12.34e9, TransactionsPerSecond: 123456, P50: 123456789, P99: 123456789},
		Accelerated: Figures{BytesPerSecond: 12.34e9, TransactionsPerSecond: 123456, P50: 123456789, P99: 123456789},
		Speedup:     12.34, MAD: 1.23, StandardError: 1.11, Uncertain: true, Repeats: 25, PayloadBytes: 12.34e9, RedirectedBytes: 12.34e9, Proof: Overflow, Speedups: []float64{12.34},
	}
}

func TestTextFits(t *testing.T) {
	r := newReport(Parameters{Repeats: 5, MaxPairs: 25, Length: time.Second}, Facts{Network: "private node: bridge + skipstack", Verdict: "risky: splice, fionread, epoll, uncharged"})
	r.Points = []Result{widest(Stream), widest(RequestResponse), widest(ConnectRequestResponse)}
	var b bytes.Buffer
	if err := r.writeText(&b); err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(b.String()) {
		if n := utf8.RuneCountInString(strings.TrimSuffix(line, "\n")); n > 80 {
			t.Errorf("%d columns: %s", n, line)
		}
	}
	for _, explained := range []string{"the median of the pairs' ratios", "Overflow is a pass", "12.3±1.23?", "?: the ratio is uncertain", "More pairs, as the ratio was uncertain", "Medians of 5 to 25 pairs"} {
		if !strings.Contains(b.String(), explained) {
			t.Errorf("it does not say %q", explained)
		}
	}
	if !strings.Contains(b.String(), "The bypass is proven for every point.") {
		t.Error("it does not say that all is proven")
	}

	failed := widest(Stream)
	failed.Proof, failed.Reason = Failed, "the reason"
	r.Points = append(r.Points, failed)
	b.Reset()
	if err := r.writeText(&b); err != nil {
		t.Fatal(err)
	}
	if s := b.String(); !strings.Contains(s, "NOT PROVEN: ") || !strings.Contains(s, "the reason") || strings.Contains(s, "is proven") {
		t.Errorf("a failed proof is shown as:\n%s", s)
	}
}

func TestIncomplete(t *testing.T) {
	broken := errors.New("a worker ended")
	if r, err := (&Report{}).endedBy(broken); r != nil || !errors.Is(err, broken) {
		t.Errorf("%+v, %v, though nothing was measured", r, err)
	}
	r, err := (&Report{Points: []Result{widest(Stream)}}).endedBy(broken)
	if r == nil || !errors.Is(err, broken) || r.Proven() {
		t.Fatalf("%+v, %v", r, err)
	}
	var o options
	o.check, o.minSpeedup = true, 0.1
	var text, page bytes.Buffer
	if err := errors.Join(r.writeText(&text), o.writeCheck(r, &text), r.encodeHTML(&page)); err != nil {
		t.Fatal(err)
	}
	for _, b := range []string{text.String(), page.String()} {
		if !strings.Contains(b, "INCOMPLETE: ") || !strings.Contains(b, broken.Error()) || strings.Contains(b, "is proven") || strings.Contains(b, "no point is slower") {
			t.Errorf("%s", b)
		}
	}
}

func TestProvenNeedsPoints(t *testing.T) {
	if (&Report{}).Proven() {
		t.Error("a report without points proves something")
	}
}

type closer struct{ bytes.Buffer }

func (*closer) Close() error { return nil }

func TestJSON(t *testing.T) {
	r := newReport(Parameters{Repeats: 5, Length: time.Second}, Facts{Verdict: "safe"})
	r.Points = []Result{widest(RequestResponse)}
	var b closer
	if err := r.writeJSON(&b); err != nil {
		t.Fatal(err)
	}
	var got struct {
		Header map[string]any
		Points []map[string]any
	}
	if err := json.Unmarshal(b.Bytes(), &got); err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{"kernel", "cpu", "verdict", "versions", "parameters"} {
		if got.Header[key] == nil {
			t.Errorf("the header has no %s", key)
		}
	}
	for _, key := range []string{
		"test", "path", "placement", "request_bytes", "response_bytes", "nodelay", "connections", "plain", "accelerated",
		"speedup", "payload_bytes", "redirected_bytes", "tcp_bytes", "repeats", "mad", "proof", "standard_error", "uncertain",
	} {
		if got.Points[0][key] == nil {
			t.Errorf("a point has no %s", key)
		}
	}
	for _, key := range []string{"throughput_bytes_per_s", "transactions_per_s", "p50_ns", "p90_ns", "p99_ns", "cpu_s"} {
		if got.Points[0]["plain"].(map[string]any)[key] == nil {
			t.Errorf("plain has no %s", key)
		}
	}
}

func TestQuantity(t *testing.T) {
	for v, want := range map[float64]string{
		0: "0 B", 999: "999 B", 999.6: "1.00 kB", 1234: "1.23 kB", 9996: "10.0 kB", 12345: "12.3 kB", 99960: "100 kB",
		123456: "123 kB", 999600: "1.00 MB", 5e18: "5000 PB",
	} {
		if got := quantity(v, "B"); got != want {
			t.Errorf("%v is %q, want %q", v, got, want)
		}
	}
}

func TestMessage(t *testing.T) {
	for want, p := range map[string]Point{
		"64 KiB":     {Test: Stream, RequestBytes: 65536},
		"64/64 B":    {Test: RequestResponse, RequestBytes: 64, ResponseBytes: 64},
		"16/16 KiB":  {Test: RequestResponse, RequestBytes: 16384, ResponseBytes: 16384},
		"64 B/1 KiB": {Test: RequestResponse, RequestBytes: 64, ResponseBytes: 1024},
	} {
		if got := p.message(); got != want {
			t.Errorf("%+v is %q, want %q", p, got, want)
		}
	}
}

func TestPointsCount(t *testing.T) {
	for n, want := range map[int]string{0: "0 points", 1: "1 point", 12: "12 points"} {
		if got := pointsCount(n); got != want {
			t.Errorf("%d: %q, want %q", n, got, want)
		}
	}
}
