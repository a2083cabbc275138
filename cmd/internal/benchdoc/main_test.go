package main

import (
	"bytes"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/skipstack/skipstack/cmd/internal/bench"
)

func write(t *testing.T, name string, v any) string {
	t.Helper()
	text, ok := v.(string)
	if !ok {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		text = string(b)
	}
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func report(speedup float64) bench.Report {
	point := func(p bench.Point) bench.Result {
		p.Path, p.Placement, p.Connections = bench.PodIP, bench.SameCPU, 1
		return bench.Result{
			Point: p, Speedup: speedup, Proof: bench.Proven, PayloadBytes: 10, RedirectedBytes: 10,
			Plain: bench.Figures{BytesPerSecond: 1e9, TransactionsPerSecond: 1e4}, Accelerated: bench.Figures{BytesPerSecond: 3e9, TransactionsPerSecond: 2e4},
			Speedups: []float64{1.5, 9}, Outliers: []int{1}, Programs: []bench.ProgramCost{{Name: "redirect", Runs: 7, NsPerRun: 123}},
		}
	}
	r := bench.Report{}
	for _, p := range []bench.Point{
		{Test: bench.Stream, RequestBytes: 64 << 10}, {Test: bench.Stream, RequestBytes: 4 << 10},
		{Test: bench.RequestResponse, RequestBytes: 64, ResponseBytes: 64, NoDelay: true},
	} {
		r.Points = append(r.Points, point(p))
	}
	return r
}

const empty = "before\n<!-- results: written by `make bench-docs` -->\n<!-- end of results -->\nafter\n"

func TestUpdate(t *testing.T) {
	doc := write(t, "doc.md", empty)
	tools := []toolResult{
		{
			Tool: "bench", Version: "skipstack bench", Experiment: "stream 4 KiB", Unit: "bytes/s",
			Plain: []float64{1e9}, Accelerated: []float64{2e9}, PlainCPU: []float64{4e-6}, AcceleratedCPU: []float64{2e-6}, PlainUser: []float64{0},
		},
		{
			Tool: "iperf3", Version: "iperf3 3.12", Experiment: "stream 4 KiB", Unit: "bytes/s",
			Plain: []float64{1e6, 8e8, 3e10}, Accelerated: []float64{2e9, 1e9, 1.6e9},
			PlainCPU: []float64{5e-6, 1, 0}, AcceleratedCPU: []float64{2.5e-6}, PlainUser: []float64{0.2, 0.1, 0.05}, AcceleratedUser: []float64{0.5},
		},
		{
			Tool: "bench", Version: "skipstack bench", Experiment: "rr 64/64 B", Unit: "transactions/s",
			Plain: []float64{1e5}, Accelerated: []float64{2e5}, PlainCPU: []float64{1e-5}, AcceleratedCPU: []float64{5e-6},
		},
		{
			Tool: "sockperf", Version: "sockperf 3.7", Experiment: "rr 64/64 B", Unit: "transactions/s",
			Plain: []float64{9e4}, Accelerated: []float64{1.5e5}, PlainCPU: []float64{1.1e-5}, AcceleratedCPU: []float64{7e-6},
		},
	}
	again := report(1.5)
	again.Points[1].Uncertain = true
	first, second, other := write(t, "a", report(2)), write(t, "b", again), write(t, "c", tools)
	paced := report(3.25)
	paced.Header.Congestion = "bbr"
	congestion := write(t, "d", paced)
	if code := run([]string{"-bench", first, "-again", second, "-congestion", first, "-doc", doc}, io.Discard); code == 0 {
		t.Error("the same congestion control was taken for another")
	}
	if code := run([]string{"-bench", first, "-again", second, "-congestion", congestion, "-tools", other, "-doc", doc}, os.Stderr); code != 0 {
		t.Fatalf("exit code %d", code)
	}
	text, err := os.ReadFile(doc)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"### With congestion control bbr", "| 3.25 ± ",
		"before\n", "after\n", "### Pod IP, one CPU", "| stream | 64 KiB | 1.00 GB/s | 3.00 GB/s |", "At none of the 3 points.",
		"0 agree within 15 %", "Of the 2 that neither run calls uncertain, 0 agree.", "4 KiB: 2.00 and 1.50, uncertain", "64 KiB: 2.00 and 1.50\n", "greatest difference is 25 %", "| iperf3 3.12 | 8e+08 | 1.6e+09 | 2.00 | 5.00 | 2.50 | 0.50 | 1.25 |", "| skipstack bench | 1e+09 | 2e+09 | 2.00 | 4.00 | 2.00 |  |  |",
		"- stream 4 KiB: a message by plain TCP costs +25 % of CPU time in iperf3 3.12 against the bench, they do not agree within 15 %. skipstack saves 2.50 µs of it there, and 2.00 µs by the bench.",
		"- rr 64/64 B: a message by plain TCP costs +10 % of CPU time in sockperf 3.7 against the bench, they agree within 15 %. skipstack saves 4.00 µs",
		"pair 2: 9.00", "| redirect | 7 | 123 |",
	} {
		if !strings.Contains(string(text), want) {
			t.Errorf("no %q in\n%s", want, text)
		}
	}
	// The same again changes nothing.
	if err := update(doc, first, second, congestion, other); err != nil {
		t.Fatal(err)
	}
	if again, err := os.ReadFile(doc); err != nil || !bytes.Equal(text, again) {
		t.Errorf("it differs the second time: %v\n%s", err, again)
	}
}

func TestUpdateRefuses(t *testing.T) {
	good, unproven := write(t, "a", report(2)), report(2)
	unproven.Points[0].Proof = bench.Failed
	for name, c := range map[string]struct{ doc, bench, tools string }{
		"no marks":    {"text", good, ""},
		"one mark":    {strings.Split(empty, "<!-- end")[0], good, ""},
		"not proven":  {empty, write(t, "b", unproven), ""},
		"no results":  {empty, filepath.Join(t.TempDir(), "x"), ""},
		"only a tool": {empty, good, write(t, "c", []toolResult{{Tool: "x", Experiment: "y", Plain: []float64{1}, Accelerated: []float64{1}}})},
		"no runs":     {empty, good, write(t, "d", []toolResult{{Tool: "iperf3", Experiment: "rr 64/64 B"}})},
	} {
		doc := write(t, "doc.md", c.doc)
		if err := update(doc, c.bench, "", "", c.tools); err == nil {
			t.Errorf("%s: accepted", name)
		}
		if text, err := os.ReadFile(doc); err != nil || string(text) != c.doc {
			t.Errorf("%s: the document was changed: %v", name, err)
		}
	}
}

func TestDemo(t *testing.T) {
	readme := write(t, "README.md", "a\n<!-- demo: written by `make bench-docs` -->\nold\n<!-- end of demo -->\nb\n")
	if err := updateDemo(readme, write(t, "demo", "\ntable\n")); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(readme)
	if want := "a\n<!-- demo: written by `make bench-docs` -->\n\n```\ntable\n```\n\n<!-- end of demo -->\nb\n"; err != nil || string(text) != want {
		t.Errorf("%q, %v", text, err)
	}
}

// The documents have the marks.
func TestMarks(t *testing.T) {
	for file, mark := range map[string]string{"docs/benchmarks.md": "results", "README.md": "demo"} {
		text, err := os.ReadFile(filepath.Join("../../..", file))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := replace(text, mark, nil); err != nil {
			t.Errorf("%s: %v", file, err)
		}
	}
}
