package bench

import (
	"bytes"
	"encoding/xml"
	"errors"
	"io"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/skipstack/skipstack/bpf"
)

// syntheticReport has made-up figures of a plausible shape: skipstack is slower for
// small streams and connections, and faster for all else.
func syntheticReport(t *testing.T, set string, unix bool) *Report {
	t.Helper()
	points, err := selection{set: set}.points(2)
	if err != nil {
		t.Fatal(err)
	}
	r := &Report{Header: Header{
		Kernel: "6.18.44", CPU: "A CPU", CPUs: 2, Congestion: "cubic", Versions: Versions{"v0.3.0", "go1.26"},
		Started: time.Date(2026, 11, 22, 23, 0, 0, 0, time.UTC), Duration: 171, Verified: 144e6,
		Parameters: Parameters{Set: set, Repeats: 5, WarmUp: 10 * time.Millisecond, Length: 200 * time.Millisecond, Unix: unix},
		Facts:      Facts{Network: "private node: bridge + skipstack", Verdict: "safe"},
	}}
	for _, p := range points {
		latency := 9e3 + float64(p.RequestBytes+p.ResponseBytes)/2
		stream := 36e6 * math.Pow(float64(p.RequestBytes)/64, 0.6)
		gain := 1.9
		switch {
		case p.Test == ConnectRequestResponse:
			latency, gain = 60e3, 0.97
		case p.Test == Stream && p.RequestBytes < 1024:
			gain = 0.7
		}
		if p.Test == Stream && p.NoDelay {
			stream /= 1 + 3e4/float64(p.RequestBytes+5000)
		}
		if p.Placement == CrossCPU {
			latency *= 5
		}
		latency *= float64(p.Connections)
		figures := func(gain float64) Figures {
			f := Figures{BytesPerSecond: stream * gain, CPU: 0.2, CPUPerGB: 1e9 / stream / gain}
			if p.Test != Stream {
				f = Figures{TransactionsPerSecond: 1e9 * gain * float64(p.Connections) / latency, CPU: 0.2, CPUPer100k: latency / gain / 1e4}
				f.P50, f.P90, f.P99, f.P999 = int64(latency/gain), int64(1.2*latency/gain), int64(2*latency/gain), int64(9*latency/gain)
			}
			return f
		}
		result := Result{
			Point: p, Plain: figures(1), Accelerated: figures(gain), Speedup: gain, MAD: 0.03, Repeats: 5,
			PayloadBytes: 3e9, RedirectedBytes: 3e9, Proof: Proven, Speedups: []float64{gain},
			Programs: []ProgramCost{{bpf.DatapathProgRedirect, 1000, 213}},
		}
		if p.Test == Stream && p.RequestBytes >= 64<<10 {
			result.Proof, result.RedirectedBytes, result.TCPBytes = Overflow, 2.7e9, 3e8
		}
		if unix {
			f := figures(2.1)
			result.Unix = &f
		}
		r.Points = append(r.Points, result)
	}
	return r
}

// encodePage encodes a report and checks what holds of every page: its elements
// close, nothing is fetched, and each picture is named.
func encodePage(t *testing.T, r *Report) (page string, pictures int) {
	t.Helper()
	var b bytes.Buffer
	if err := r.encodeHTML(&b); err != nil {
		t.Fatal(err)
	}
	d := xml.NewDecoder(bytes.NewReader(b.Bytes()))
	ids, named := map[string]bool{}, []string{}
	var open []string
	for {
		token, err := d.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatalf("the page is not well-formed: %v", err)
		}
		element, ok := token.(xml.StartElement)
		if end, is := token.(xml.EndElement); is {
			if last := open[len(open)-1]; last != end.Name.Local {
				t.Errorf("%s ends in %s", end.Name.Local, last)
			}
			open = open[:len(open)-1]
		}
		if !ok {
			continue
		}
		open = append(open, element.Name.Local)
		attributes := map[string]string{}
		for _, a := range element.Attr {
			attributes[a.Name.Local] = a.Value
			switch a.Name.Local {
			case "id":
				if ids[a.Value] {
					t.Errorf("id %s is given twice", a.Value)
				}
				ids[a.Value] = true
			case "href", "aria-labelledby":
				for _, id := range strings.Fields(a.Value) {
					named = append(named, strings.TrimPrefix(id, "#"))
				}
			case "src", "srcset", "data", "action", "onload", "onclick", "onerror":
				t.Errorf("%s has %s=%q", element.Name.Local, a.Name.Local, a.Value)
			}
		}
		switch element.Name.Local {
		case "script", "link", "iframe", "object", "img", "image", "use", "form":
			t.Errorf("the page has an element %s", element.Name.Local)
		case "html":
			if attributes["lang"] != "en" {
				t.Error("the page has no language")
			}
		case "svg":
			pictures++
			if attributes["role"] != "img" || attributes["aria-labelledby"] == "" || attributes["viewBox"] == "" {
				t.Errorf("svg %v", attributes)
			}
		case "th":
			if attributes["scope"] == "" {
				t.Error("a heading of a table has no scope")
			}
		}
	}
	for _, id := range named {
		if !ids[id] {
			t.Errorf("there is no %q", id)
		}
	}
	page = b.String()
	if rest := strings.NewReplacer(`xmlns="http://www.w3.org/2000/svg"`, "", `xmlns:xlink="http://www.w3.org/1999/xlink"`, "").Replace(page); strings.Contains(rest, "http:") || strings.Contains(rest, "https:") || strings.Contains(rest, "url(") {
		t.Error("the page refers to something outside")
	}
	if strings.Contains(page, "NaN") || strings.Contains(page, "Inf") || strings.Contains(page, "%!") {
		t.Error("the page has a number that is none")
	}
	return page, pictures
}

func TestPage(t *testing.T) {
	for _, c := range []struct {
		set      string
		unix     bool
		pictures int
		want     []string
	}{
		// Five charts of each path and placement that has streams and transactions.
		{quickSet, false, 5 + 2 + 3, []string{"Plain TCP is faster at:", "crr pod same-cpu 64/64 B: 0.97±0.03 of the plain rate", "Service IP"}},
		{defaultSet, false, 2*5 + 3*5, []string{"below a size between", "TCP_NODELAY"}},
		{fullSet, true, 8 * 5, []string{"AF_UNIX", "x256"}},
	} {
		page, pictures := encodePage(t, syntheticReport(t, c.set, c.unix))
		if pictures != c.pictures {
			t.Errorf("%s: %d pictures, want %d", c.set, pictures, c.pictures)
		}
		for _, want := range append(c.want, "The bypass is proven for every point.", "22 November 2026", "6.18.44", "safe", "cubic") {
			if !strings.Contains(page, want) {
				t.Errorf("%s: the page does not say %q", c.set, want)
			}
		}
	}
}

// Every figure of every point is in a table.
func TestPageTablesAreComplete(t *testing.T) {
	r := syntheticReport(t, quickSet, true)
	page, _ := encodePage(t, r)
	for _, p := range r.Points {
		for _, f := range []*Figures{&p.Plain, &p.Accelerated, p.Unix} {
			wanted := []string{f.rate(p.Test), threeDigits(f.cost(p.Test))}
			if p.Test != Stream {
				wanted = append(wanted, micros(f.P50), micros(f.P90), micros(f.P99), micros(f.P999))
			}
			for _, want := range wanted {
				if !strings.Contains(page, "<td>"+want+"</td>") {
					t.Errorf("%s: the page does not have %s", p.Point, want)
				}
			}
		}
	}
}

func TestPageEscapes(t *testing.T) {
	const evil = `"'><script>alert(1)</script><img src=x onerror=alert(2)>&lt;`
	r := syntheticReport(t, quickSet, false)
	h := &r.Header
	h.Kernel, h.CPU, h.Congestion, h.Versions, h.LeftOut = evil, evil, evil, Versions{evil, evil}, []string{evil}
	h.Network, h.Verdict = evil, evil
	r.Points[0].Proof, r.Points[0].Reason = Failed, evil
	page, _ := encodePage(t, r)
	if strings.Contains(page, "<script") || strings.Contains(page, "<img") || strings.Count(page, "&lt;script&gt;") < 8 {
		t.Error("text of the machine is markup in the page")
	}
}

func TestPageOfFew(t *testing.T) {
	nothing := &Report{}
	if page, pictures := encodePage(t, nothing); pictures != 0 || !strings.Contains(page, "Nothing was measured.") {
		t.Errorf("of nothing: %d pictures", pictures)
	}
	r := syntheticReport(t, quickSet, false)
	for i := range r.Points {
		one := &Report{Header: r.Header, Points: r.Points[i : i+1]}
		if _, pictures := encodePage(t, one); pictures == 0 {
			t.Errorf("%s alone has no picture", one.Points[0].Point)
		}
	}
	// Where there are no figures there is no chart, but a table.
	r.Points[0].Plain, r.Points[0].Accelerated = Figures{}, Figures{BytesPerSecond: math.NaN()}
	r.Points[0].Proof, r.Points[0].Reason = Failed, "nothing was sent"
	page, _ := encodePage(t, &Report{Points: r.Points[:1]})
	if !strings.Contains(page, "NOT PROVEN") || !strings.Contains(page, "nothing was sent") || strings.Contains(page, "proven for every") {
		t.Error("a failed proof is not told")
	}
}

func TestPlainQuantity(t *testing.T) {
	for v, want := range map[float64]string{
		0: "0", 1: "1 B", 999: "999 B", 1000: "1 kB", 2.5e9: "2.5 GB", 5e12: "5000 GB", 0.02: "20 mB", 2.345678: "2.35 B", 2e-6: "2 µB", 1e-9: "1 nB", math.Pow(10, -6): "1 µB",
	} {
		if got := plainQuantity(v, "B"); got != want {
			t.Errorf("%v is %q, want %q", v, got, want)
		}
	}
	if got := plainQuantity(2000, "s"); got != "2000 s" {
		t.Errorf("2000 seconds are %q", got)
	}
}
