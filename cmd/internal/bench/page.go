package bench

import (
	"bytes"
	"errors"
	"fmt"
	"html"
	"io"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/skipstack/skipstack/bpf"
	"github.com/skipstack/skipstack/cmd/internal/bench/chart"
)

// encodeHTML writes the report as one page that needs nothing else.
func (r *Report) encodeHTML(w io.Writer) error {
	p := &page{report: r}
	if err := p.write(); err != nil {
		return fmt.Errorf("write the report: %w", err)
	}
	if _, err := w.Write(p.Bytes()); err != nil {
		return fmt.Errorf("write the report: %w", err)
	}
	return nil
}

// A page is written from top to bottom. All text goes through its methods, which escape
// it: some of it comes from the machine.
type page struct {
	bytes.Buffer
	report *Report
}

// markup writes HTML; nothing that is not constant may be in it.
func (p *page) markup(html string) { p.WriteString(html) }

// text writes text.
func (p *page) text(s string) { p.WriteString(html.EscapeString(s)) }

// inline writes an element with text in it; attributes are constant.
func (p *page) inline(tag, text string) {
	name, _, _ := strings.Cut(tag, " ")
	p.markup("<" + tag + ">")
	p.text(text)
	p.markup("</" + name + ">")
}

// element is inline with a line of its own.
func (p *page) element(tag, text string) {
	p.inline(tag, text)
	p.markup("\n")
}

const style = `
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; color: #111; background: #fff; margin: 0 auto; max-width: 54rem; padding: 1rem 1.25rem 3rem; }
h1 { font-size: 1.7rem; margin: .5rem 0 0; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 .5rem; border-bottom: 2px solid #111; }
h3 { font-size: 1.05rem; margin: 1.75rem 0 .25rem; }
figure { margin: .5rem 0; }
figure svg { display: block; width: 100%; height: auto; }
figcaption { font-size: .9rem; color: #333; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; margin: .5rem 0; }
caption { text-align: left; font-weight: 600; padding: .25rem 0; }
th, td { padding: .15rem .6rem; text-align: right; border-bottom: 1px solid #ccc; white-space: nowrap; }
thead th { border-bottom: 1px solid #111; vertical-align: bottom; }
tbody th, thead tr:first-child th:first-child { text-align: left; font-weight: 400; }
thead tr:first-child th:first-child { font-weight: 600; }
th[scope=colgroup] { text-align: center; border-left: 1px solid #ccc; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: .5rem 0; }
dt { font-weight: 600; } dd { margin: 0; overflow-wrap: anywhere; }
.verdict { font-size: 1.15rem; font-weight: 600; border: 2px solid #111; padding: .5rem .75rem; }
a { color: #004a80; }
@media (max-width: 36rem) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .4rem; } }
@page { margin: 15mm; }
@media print {
  body { font-size: 10.5pt; max-width: none; padding: 0; }
  nav { display: none; }
  h2, h3 { break-after: avoid; }
  figure, .scroll, .verdict { break-inside: avoid; }
  .scroll { overflow: visible; }
  table { font-size: 8pt; }
  th, td { padding: .1rem .35rem; }
  a { color: inherit; text-decoration: none; }
}
`

func (p *page) write() error {
	h := p.report.Header
	p.markup("<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n" +
		"<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n" +
		// Nothing is fetched, whatever is in the text.
		"<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\"/>\n<title>")
	p.text("skipstack bench, Linux " + h.Kernel)
	p.markup("</title>\n<style>" + style + "</style>\n</head>\n<body>\n<header>\n<h1>skipstack bench</h1>\n<p>")
	p.text("TCP between two pods of one node, plain and with skipstack")
	if !h.Started.IsZero() {
		p.text(", measured on ")
		p.inline(`time datetime="`+h.Started.UTC().Format(time.RFC3339)+`"`, h.Started.UTC().Format("2 January 2006, 15:04 UTC"))
	}
	p.markup(".</p>\n</header>\n")
	all := sections(p.report.Points)
	if len(all) > 1 {
		p.markup("<nav aria-label=\"Contents\">\n<ul>\n")
		for i, s := range all {
			p.markup(`<li><a href="#s` + strconv.Itoa(i) + `">`)
			p.text(upperFirst(s.title()))
			p.markup("</a></li>\n")
		}
		p.markup("</ul>\n</nav>\n")
	}
	p.markup("<main>\n")
	p.summary()
	p.method()
	for i, s := range all {
		if err := p.section(i, s); err != nil {
			return err
		}
	}
	p.markup("</main>\n</body>\n</html>\n")
	return nil
}

// summary says in words what came of it, the losses too.
func (p *page) summary() {
	r := p.report
	p.markup("<section>\n<h2>Summary</h2>\n")
	var failed []string
	for _, point := range r.Points {
		if point.Proof == Failed {
			failed = append(failed, fmt.Sprintf("%s: %s", point.Point, point.Reason))
		}
	}
	switch {
	case r.Header.Incomplete != "":
		p.element(`p class="verdict"`, "INCOMPLETE: not everything was measured: "+r.Header.Incomplete)
		p.list(failed)
	case r.Proven():
		p.element(`p class="verdict"`, "The bypass is proven for every point.")
	case len(r.Points) == 0:
		p.element(`p class="verdict"`, "Nothing was measured.")
	default:
		p.element(`p class="verdict"`, fmt.Sprintf("NOT PROVEN: the bypass failed at %d of %s.", len(failed), pointsCount(len(r.Points))))
		p.list(failed)
	}
	if len(r.Points) == 0 {
		p.markup("</section>\n")
		return
	}
	slower := r.slower(1)
	if len(slower) == 0 {
		p.element("p", fmt.Sprintf("skipstack is at least as fast as plain TCP at %d of %s.", len(r.Points), pointsCount(len(r.Points))))
	} else {
		p.element("p", fmt.Sprintf("skipstack is at least as fast as plain TCP at %d of %s. Plain TCP is faster at:", len(r.Points)-len(slower), pointsCount(len(r.Points))))
		var losses []string
		for _, point := range slower {
			losses = append(losses, fmt.Sprintf("%s: %s of the plain rate", point.Point, point.ratio()))
		}
		p.list(losses)
	}
	p.list(r.crossovers())
	var outliers []string
	for _, point := range r.Points {
		for _, i := range point.Outliers {
			outliers = append(outliers, fmt.Sprintf("%s, pair %d: ratio %s", point.Point, i+1, threeDigits(point.Speedups[i])))
		}
	}
	if len(outliers) > 0 {
		p.element("p", "Outliers, which count like the others:")
		p.list(outliers)
	}
	p.markup("</section>\n")
}

func (p *page) list(items []string) {
	if len(items) == 0 {
		return
	}
	p.markup("<ul>\n")
	for _, item := range items {
		p.element("li", item)
	}
	p.markup("</ul>\n")
}

// method says where and how it was measured.
func (p *page) method() {
	h := p.report.Header
	p.markup("<section>\n<h2>Where and how</h2>\n<dl>\n")
	fact := func(name, value string) {
		if value != "" {
			p.element("dt", name)
			p.element("dd", value)
		}
	}
	fact("Kernel", "Linux "+h.Kernel)
	fact("CPU", fmt.Sprintf("%s, %d of them", h.CPU, h.CPUs))
	fact("Kernel verdict", h.Verdict)
	fact("Pods", h.Network)
	fact("Congestion control", h.Congestion)
	fact("Versions", fmt.Sprintf("skipstack %s, %s", h.Versions.Skipstack, h.Versions.Go))
	sockets := "blocking"
	if h.Parameters.NonBlocking {
		sockets = "non-blocking, with poll(2)"
	}
	fact("Sockets", sockets)
	fact("Runs", fmt.Sprintf("medians of %s, of %v each after a warm-up of %v", h.Parameters.pairs(), h.Parameters.Length, h.Parameters.WarmUp))
	fact("AF_UNIX", h.Reference)
	fact("Verified", quantity(float64(h.Verified), "B")+", byte by byte, apart from the measuring")
	if h.Duration > 0 {
		fact("Duration", (time.Duration(h.Duration * float64(time.Second))).Round(time.Second).String())
	}
	p.markup("</dl>\n")
	if len(h.LeftOut) > 0 {
		p.element("p", "Left out:")
		p.list(h.LeftOut)
	}
	p.element("p", "stream sends messages one way; rr exchanges a request and a response at a time; crr does so on a new connection each time. "+
		"x16 is that many connections at once. nodelay is TCP_NODELAY, which switches Nagle's algorithm off; rr always has it. "+
		"The ratio is the rate with skipstack over the plain rate: the median of the pairs' ratios and their median absolute deviation. Over 1, skipstack is faster. "+uncertainLegend)
	p.element("p", "Redirected is the part of the bytes that skipped the stack. The proof is ok at 99 %; it is overflow if the others went by TCP "+
		"because the receiver had its limit of unread bytes, which is how a fast sender is slowed down.")
	if len(h.Plugins) > 0 { // pods of the bench's own
		p.element("p", "The bench's pods accept the risks splice and blocking, which is right for them: their processes only send and receive, one thread at each socket, and try again on EAGAIN.")
	}
	p.markup("</section>\n")
}

// section writes the charts and tables of one path and placement.
func (p *page) section(i int, s section) error {
	id := "s" + strconv.Itoa(i)
	p.markup(`<section id="` + id + `">` + "\n")
	p.element("h2", upperFirst(s.title()))
	var streams, transactions []Result
	for _, point := range s.points {
		if point.Test == Stream {
			streams = append(streams, point)
		} else {
			transactions = append(transactions, point)
		}
	}
	err := errors.Join(p.streams(id, streams), p.transactions(id, transactions))
	p.markup("</section>\n")
	return err
}

// figure writes a chart; nothing if it has no values.
func (p *page) figure(c chart.Chart, caption string) error {
	svg, err := c.SVG()
	if errors.Is(err, chart.ErrEmpty) {
		return nil
	}
	if err != nil {
		return err
	}
	p.element("h3", c.Title)
	p.markup("<figure>\n" + svg + "\n")
	p.element("figcaption", caption)
	p.markup("</figure>\n")
	return nil
}

// The kinds of runs, and what shows them.
type kind struct {
	look    chart.Look
	nagle   bool // TCP_NODELAY makes a difference
	figures func(Result) *Figures
}

var (
	plainKind       = kind{chart.Look{Name: "plain TCP", Color: chart.Orange, Marker: chart.Circle, Hollow: true}, true, func(r Result) *Figures { return &r.Plain }}
	acceleratedKind = kind{chart.Look{Name: "skipstack", Color: chart.Blue, Marker: chart.Square}, true, func(r Result) *Figures { return &r.Accelerated }}
	unixKind        = kind{chart.Look{Name: "AF_UNIX", Color: chart.Grey, Marker: chart.Diamond, Hollow: true}, false, func(r Result) *Figures { return r.Unix }}
)

// kinds are those that the points have.
func kinds(points []Result) []kind {
	all := []kind{plainKind, acceleratedKind}
	if slices.ContainsFunc(points, func(r Result) bool { return r.Unix != nil }) {
		all = append(all, unixKind)
	}
	return all
}

// labelled puts points of one label into one column of a chart.
type labelled struct {
	labels [][]string
	column []int // of each point
}

func labelledColumns(points []Result, label func(Result) []string) labelled {
	var c labelled
	for _, p := range points {
		l := label(p)
		i := slices.IndexFunc(c.labels, func(other []string) bool { return slices.Equal(l, other) })
		if i < 0 {
			i, c.labels = len(c.labels), append(c.labels, l)
		}
		c.column = append(c.column, i)
	}
	return c
}

// short is a size in bytes as it fits below a chart.
func short(bytes int) string {
	number, unit := size(bytes)
	return number + " " + unit
}

// many is the number of connections, if it is not one.
func many(p Point) string {
	if p.Connections > 1 {
		return "x" + strconv.Itoa(p.Connections)
	}
	return ""
}

// streams writes what was measured one way.
func (p *page) streams(id string, points []Result) error {
	if len(points) == 0 {
		return nil
	}
	points = slices.SortedStableFunc(slices.Values(points), func(a, b Result) int {
		if a.Connections != b.Connections {
			return a.Connections - b.Connections
		}
		return a.RequestBytes - b.RequestBytes
	})
	c := labelledColumns(points, func(r Result) []string { return []string{short(r.RequestBytes), many(r.Point)} })
	lines := func(value func(*Figures) float64) []chart.Line {
		var all []chart.Line
		for _, k := range kinds(points) {
			for _, noDelay := range []bool{false, true} {
				line := chart.Line{Look: k.look}
				if k.nagle {
					line.Dashed = noDelay
					if noDelay {
						line.Name += ", nodelay"
					}
				} else if noDelay {
					continue // it has been drawn
				}
				drawn := map[int]bool{}
				for i, r := range points {
					if f := k.figures(r); f != nil && (r.NoDelay == noDelay || !k.nagle) && !drawn[c.column[i]] {
						drawn[c.column[i]] = true
						line.Points = append(line.Points, chart.Point{Column: c.column[i], Group: strconv.Itoa(r.Connections), Value: value(f)})
					}
				}
				if len(line.Points) > 0 {
					all = append(all, line)
				}
			}
		}
		return all
	}
	rate := chart.Chart{
		ID: id + "-throughput", Title: "Throughput by message size", Columns: c.labels, Rows: []string{"message", ""}, Log: true,
		Format: func(v float64) string { return plainQuantity(v, "B/s") },
		Lines:  lines(func(f *Figures) float64 { return f.BytesPerSecond }),
	}
	rate.Desc = describe(rate)
	if err := p.figure(rate, "Bytes per second by bytes of each message, one way; logarithmic. Higher is better. Dashed: TCP_NODELAY."); err != nil {
		return err
	}
	p.rateTable("Throughput", points)
	cost := rate
	cost.ID, cost.Title = id+"-stream-cpu", "CPU time of a gigabyte by message size"
	cost.Format = func(v float64) string { return plainQuantity(v, "s") }
	cost.Lines = lines(func(f *Figures) float64 { return f.CPUPerGB })
	cost.Desc = describe(cost)
	if err := p.figure(cost, "CPU seconds per 10⁹ bytes, of both sides together, kernel included; logarithmic. Lower is better. Dashed: TCP_NODELAY."); err != nil {
		return err
	}
	p.costTable("CPU seconds per GB", points)
	return nil
}

// transactions writes what was measured there and back.
func (p *page) transactions(id string, points []Result) error {
	if len(points) == 0 {
		return nil
	}
	c := labelledColumns(points, func(r Result) []string {
		note := many(r.Point)
		if r.Test == ConnectRequestResponse {
			note = strings.TrimSpace(string(r.Test) + " " + note)
		}
		return []string{short(r.RequestBytes), short(r.ResponseBytes), note}
	})
	rows := []string{"request", "response", ""}
	var spans []chart.Span
	for _, k := range kinds(points) {
		span := chart.Span{Look: k.look, Values: map[int][]float64{}}
		for i, r := range points {
			if f := k.figures(r); f != nil && f.P50 > 0 {
				span.Values[c.column[i]] = []float64{float64(f.P50), float64(f.P90), float64(f.P99), float64(f.P999)}
			}
		}
		spans = append(spans, span)
	}
	latency := chart.Chart{
		ID: id + "-latency", Title: "Latency percentiles", Columns: c.labels, Rows: rows, Log: true,
		Format: func(ns float64) string { return plainQuantity(ns/1e9, "s") }, Spans: spans,
	}
	latency.Desc = describe(latency)
	if err := p.figure(latency, "Time of a transaction; logarithmic. Lower is better. The symbol is the median (p50), the ticks are p90, p99 and p99.9."); err != nil {
		return err
	}
	p.latencyTable(points)
	lines := func(value func(*Figures) float64) []chart.Line {
		var all []chart.Line
		for _, k := range kinds(points) {
			line := chart.Line{Look: k.look}
			for i, r := range points {
				if f := k.figures(r); f != nil {
					group := fmt.Sprint(r.Test, r.RequestBytes, r.Connections)
					line.Points = append(line.Points, chart.Point{Column: c.column[i], Group: group, Value: value(f)})
				}
			}
			all = append(all, line)
		}
		return all
	}
	rate := chart.Chart{
		ID: id + "-rate", Title: "Transactions per second", Columns: c.labels, Rows: rows,
		Format: func(v float64) string { return plainQuantity(v, "/s") },
		Lines:  lines(func(f *Figures) float64 { return f.TransactionsPerSecond }),
	}
	rate.Desc = describe(rate)
	if err := p.figure(rate, "Higher is better. Lines connect responses to requests of one size."); err != nil {
		return err
	}
	p.rateTable("Transactions per second", points)
	cost := rate
	cost.ID, cost.Title, cost.Log = id+"-transaction-cpu", "CPU time of 100 000 transactions", true
	cost.Format = func(v float64) string { return plainQuantity(v, "s") }
	cost.Lines = lines(func(f *Figures) float64 { return f.CPUPer100k })
	cost.Desc = describe(cost)
	if err := p.figure(cost, "CPU seconds of both sides together, kernel included; logarithmic. Lower is better."); err != nil {
		return err
	}
	p.costTable("CPU seconds per 100 000 transactions", points)
	return nil
}

// plainQuantity is quantity without digits that a scale does not need, and for small
// values too.
func plainQuantity(v float64, unit string) string {
	if v == 0 {
		return "0"
	}
	for _, prefix := range []struct {
		name  string
		scale float64
	}{{"G", 1e9}, {"M", 1e6}, {"k", 1e3}, {"", 1}, {"m", 1e-3}, {"µ", 1e-6}, {"n", 1e-9}} {
		// Not quite the scale: computed powers of ten may miss it by a little.
		if v >= prefix.scale*0.999999 && (unit != "s" || prefix.scale <= 1) {
			return strconv.FormatFloat(math.Round(v/prefix.scale*100)/100, 'f', -1, 64) + " " + prefix.name + unit
		}
	}
	return strconv.FormatFloat(v, 'g', 2, 64) + " " + unit
}

// describe says in words what a chart shows: the first and the last value of each series.
func describe(c chart.Chart) string {
	label := func(column int) string {
		return strings.Join(slices.DeleteFunc(slices.Clone(c.Columns[column]), func(s string) bool { return s == "" }), " / ")
	}
	var parts []string
	add := func(name string, first, last chart.Point) {
		part := fmt.Sprintf("%s: %s at %s", name, c.Format(first.Value), label(first.Column))
		if last != first {
			part += fmt.Sprintf(", %s at %s", c.Format(last.Value), label(last.Column))
		}
		parts = append(parts, part)
	}
	for _, l := range c.Lines {
		if len(l.Points) > 0 {
			add(l.Name, l.Points[0], l.Points[len(l.Points)-1])
		}
	}
	for _, s := range c.Spans {
		var medians []chart.Point
		for column := range c.Columns {
			if v := s.Values[column]; len(v) > 0 {
				medians = append(medians, chart.Point{Column: column, Value: v[0]})
			}
		}
		if len(medians) > 0 {
			add(s.Name+", median", medians[0], medians[len(medians)-1])
		}
	}
	return strings.Join(parts, "; ") + ". All values are in the table below."
}

// A group of columns has a heading above theirs.
type group struct {
	name    string
	columns []string
}

// table writes a table whose first column names its rows. Each group of columns has a
// heading of its own, above theirs; groups may be nil.
func (p *page) table(caption string, head []string, groups []group, rows [][]string) {
	p.markup("<div class=\"scroll\">\n<table>\n")
	p.element("caption", caption)
	p.markup("<thead><tr>")
	for _, name := range head {
		tag := `th scope="col"`
		if groups != nil {
			tag += ` rowspan="2"`
		}
		p.inline(tag, name)
	}
	for _, g := range groups {
		p.inline(`th scope="colgroup" colspan="`+strconv.Itoa(len(g.columns))+`"`, g.name)
	}
	p.markup("</tr>")
	if groups != nil {
		p.markup("\n<tr>")
		for _, g := range groups {
			for _, name := range g.columns {
				p.inline(`th scope="col"`, name)
			}
		}
		p.markup("</tr>")
	}
	p.markup("</thead>\n<tbody>\n")
	for _, row := range rows {
		p.markup("<tr>")
		p.inline(`th scope="row"`, row[0])
		for _, cell := range row[1:] {
			p.inline("td", cell)
		}
		p.markup("</tr>\n")
	}
	p.markup("</tbody>\n</table>\n</div>\n")
}

// cells of a row: its name, a value for each kind, and what follows them.
func row(r Result, all []kind, value func(*Figures) string, more ...string) []string {
	cells := []string{string(r.Test) + " " + r.options()}
	for _, k := range all {
		cell := "–"
		if f := k.figures(r); f != nil {
			cell = value(f)
		}
		cells = append(cells, cell)
	}
	return append(cells, more...)
}

// rowHead names the first column of every table.
const rowHead = "test, message"

// headOf names the columns of a table with one for each kind.
func headOf(all []kind, more ...string) []string {
	head := []string{rowHead}
	for _, k := range all {
		head = append(head, k.look.Name)
	}
	return append(head, more...)
}

func (p *page) rateTable(caption string, points []Result) {
	all := kinds(points)
	var rows [][]string
	for _, r := range points {
		rows = append(rows, row(r, all, func(f *Figures) string { return f.rate(r.Test) },
			r.ratio(), strconv.Itoa(r.Repeats), quantity(float64(r.PayloadBytes), "B"), r.redirectedPart(), string(r.Proof)))
	}
	p.table(caption, headOf(all, "ratio", "pairs", "sent", "redirected", "proof"), nil, rows)
}

func (p *page) latencyTable(points []Result) {
	all := kinds(points)
	var groups []group
	for _, k := range all {
		groups = append(groups, group{k.look.Name, []string{"p50", "p90", "p99", "p99.9"}})
	}
	var rows [][]string
	for _, r := range points {
		cells := []string{string(r.Test) + " " + r.options()}
		for _, k := range all {
			if f := k.figures(r); f != nil {
				cells = append(cells, micros(f.P50), micros(f.P90), micros(f.P99), micros(f.P999))
			} else {
				cells = append(cells, "–", "–", "–", "–")
			}
		}
		rows = append(rows, cells)
	}
	p.table("Latency in µs", []string{rowHead}, groups, rows)
}

// costTable has the BPF programs, too, where they were timed.
func (p *page) costTable(caption string, points []Result) {
	all := kinds(points)
	var programs []string
	values := group{name: "CPU seconds"}
	for _, k := range all {
		values.columns = append(values.columns, k.look.Name)
	}
	timed := group{name: "BPF, ns per run"}
	for _, program := range []struct{ name, kind string }{
		{bpf.DatapathProgRedirect, "sk_msg"}, {bpf.DatapathProgTrack, "sock_ops"}, {bpf.DatapathProgFunnel, "sk_skb"},
	} {
		if slices.ContainsFunc(points, func(r Result) bool { return r.program(program.name) != "" }) {
			programs, timed.columns = append(programs, program.name), append(timed.columns, program.kind)
		}
	}
	var rows [][]string
	for _, r := range points {
		cells := row(r, all, func(f *Figures) string { return threeDigits(f.cost(r.Test)) })
		for _, name := range programs {
			cells = append(cells, or(r.program(name), "–"))
		}
		rows = append(rows, cells)
	}
	groups := []group{values}
	if len(programs) > 0 {
		groups = append(groups, timed)
	}
	p.table(caption, []string{rowHead}, groups, rows)
}
