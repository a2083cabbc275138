// Package chart draws the charts of a report as SVG that also tells what it shows
// without colours, and to those who cannot see it.
package chart

import (
	"bytes"
	"errors"
	"fmt"
	"html"
	"math"
	"strings"

	lib "github.com/wcharczuk/go-chart/v2"
	"github.com/wcharczuk/go-chart/v2/drawing"
)

// A Chart has columns, and a logarithmic or linear scale of values.
type Chart struct {
	ID    string // unique in the page; letters, digits and hyphens
	Title string
	Desc  string // what the chart shows, in words
	// Columns are the labels below, each of several lines.
	Columns [][]string
	// Rows name the lines of the labels, at the left.
	Rows   []string
	Log    bool
	Format func(value float64) string // of the scale's labels
	Lines  []Line
	Spans  []Span
}

// A Look tells the series of a chart apart, by more than their colours.
type Look struct {
	Name   string // in the legend
	Color  Color
	Marker Marker
	Dashed bool
	Hollow bool
}

// A Line connects values of columns.
type Line struct {
	Look
	Points []Point
}

// A Point is a value of a line. Only neighbours of one group are connected.
type Point struct {
	Column int
	Group  string
	Value  float64
}

// A Span shows, for some columns, how values are spread: a marker at the first one, small
// ticks at the others, and a line from the first to the last.
type Span struct {
	Look
	Values map[int][]float64 // by column; rising
}

// Color of a series; each is told apart from the others, and from white, by people who
// do not see all colours.
type Color = drawing.Color

// The colours, of Okabe and Ito's palette.
var (
	Orange = Color{R: 0xc4, G: 0x4e, B: 0x00, A: 0xff}
	Blue   = Color{R: 0x00, G: 0x60, B: 0xa8, A: 0xff}
	Grey   = Color{R: 0x60, G: 0x60, B: 0x60, A: 0xff}
)

var (
	black = Color{A: 0xff}
	white = Color{R: 0xff, G: 0xff, B: 0xff, A: 0xff}
	faint = Color{R: 0xd8, G: 0xd8, B: 0xd8, A: 0xff}
)

// Marker is the shape of a point.
type Marker int

const (
	Circle Marker = iota
	Square
	Diamond
)

// Measures in pixels; the page scales the whole.
const (
	width        = 760
	plotHeight   = 260
	padding      = 14
	legendHeight = 24
	lineHeight   = 16
	leftLabels   = 74 // the scale's labels, and the names of the rows
	markerSize   = 4
	fontPoints   = 9.0
	strokeWidth  = 2
)

// ErrEmpty is returned for a chart that has nothing to show.
var ErrEmpty = errors.New("the chart has no values")

// SVG draws the chart. The result is an element of HTML; no text in it is markup.
func (c Chart) SVG() (string, error) {
	values := c.values()
	if len(values) == 0 || len(c.Columns) == 0 {
		return "", ErrEmpty
	}
	ticks := c.ticks(values)
	yTicks := make([]lib.Tick, len(ticks))
	for i, v := range ticks {
		yTicks[i] = lib.Tick{Value: c.scale(v), Label: html.EscapeString(c.Format(v))}
	}
	rows := len(c.Rows)
	for _, column := range c.Columns {
		rows = max(rows, len(column))
	}
	font, err := lib.GetDefaultFont()
	if err != nil {
		return "", fmt.Errorf("draw chart %s: %w", c.ID, err)
	}
	legend := c.legend()
	text := lib.Style{Font: font, FontSize: fontPoints, FontColor: black}
	graph := lib.Chart{
		Width: width, Height: plotHeight + legend.height() + rows*lineHeight + 2*padding,
		Font: font,
		Background: lib.Style{
			FillColor: white, StrokeColor: white,
			Padding: lib.Box{Top: legend.height() + padding, Left: leftLabels, Right: padding, Bottom: rows*lineHeight + padding},
		},
		Canvas: lib.Style{FillColor: white, StrokeColor: Grey, StrokeWidth: 1},
		// The library's labels have one line; drawLabels has its own.
		XAxis:          lib.XAxis{Style: lib.Hidden(), Ticks: []lib.Tick{{Value: 0}, {Value: float64(len(c.Columns))}}},
		YAxis:          lib.YAxis{Style: lib.Hidden(), Ticks: yTicks},
		YAxisSecondary: lib.YAxis{Style: lib.Hidden()},
		Series:         []lib.Series{series{chart: c}},
	}
	graph.Elements = []lib.Renderable{
		func(r lib.Renderer, box lib.Box, _ lib.Style) { c.drawLabels(r, box, text, yTicks) },
		func(r lib.Renderer, box lib.Box, _ lib.Style) { legend.draw(r, box, text) },
	}
	var b bytes.Buffer
	if err := graph.Render(lib.SVG, &b); err != nil {
		return "", fmt.Errorf("draw chart %s: %w", c.ID, err)
	}
	return c.accessible(b.String()), nil
}

// accessible names the picture for those who cannot see it, and hides its parts, which
// the page's table has as well.
func (c Chart) accessible(svg string) string {
	start := strings.IndexByte(svg, '>') + 1
	head := strings.Replace(svg[:start-1], "<svg ", fmt.Sprintf(`<svg role="img" aria-labelledby="%s-title %s-desc" `, c.ID, c.ID), 1)
	return fmt.Sprintf(`%s><title id="%s-title">%s</title><desc id="%s-desc">%s</desc><g aria-hidden="true">%s</g></svg>`,
		head, c.ID, html.EscapeString(c.Title), c.ID, html.EscapeString(c.Desc), strings.TrimSuffix(svg[start:], "</svg>"))
}

// values lists all values that can be drawn.
func (c Chart) values() []float64 {
	var all []float64
	add := func(v float64) {
		if c.drawable(v) {
			all = append(all, v)
		}
	}
	for _, l := range c.Lines {
		for _, p := range l.Points {
			add(p.Value)
		}
	}
	for _, s := range c.Spans {
		for _, values := range s.Values {
			for _, v := range values {
				add(v)
			}
		}
	}
	return all
}

func (c Chart) drawable(v float64) bool {
	return !math.IsNaN(v) && !math.IsInf(v, 0) && (v > 0 || v == 0 && !c.Log)
}

// scale is the position of a value on the axis.
func (c Chart) scale(v float64) float64 {
	if c.Log {
		return math.Log10(v)
	}
	return v
}

// ticks are the values that the scale names; all others are between the first and the
// last one.
func (c Chart) ticks(values []float64) []float64 {
	low, high := values[0], values[0]
	for _, v := range values {
		low, high = min(low, v), max(high, v)
	}
	if c.Log {
		return logTicks(low, high)
	}
	return linearTicks(high)
}

// logTicks are powers of ten, and where those are few, also twice and five times them.
func logTicks(low, high float64) []float64 {
	first, last := math.Floor(math.Log10(low)), math.Ceil(math.Log10(high))
	factors := []float64{1}
	if last-first <= 4 {
		factors = []float64{1, 2, 5}
	}
	var all []float64
	for exp := first; exp <= last; exp++ {
		for _, f := range factors {
			all = append(all, f*math.Pow(10, exp))
		}
	}
	// One on each side of the values is enough.
	for len(all) > 2 && all[1] <= low {
		all = all[1:]
	}
	for len(all) > 2 && all[len(all)-2] >= high {
		all = all[:len(all)-1]
	}
	return all
}

// linearTicks go from 0 to the first one that is not below high.
func linearTicks(high float64) []float64 {
	if high <= 0 {
		return []float64{0, 1}
	}
	const wanted = 5
	step := math.Pow(10, math.Floor(math.Log10(high/wanted)))
	for _, f := range []float64{1, 2, 5, 10} {
		if high/(f*step) <= wanted {
			step *= f
			break
		}
	}
	all := []float64{0}
	for i := 1.0; all[len(all)-1] < high; i++ {
		all = append(all, i*step)
	}
	return all
}

// drawLabels labels the scale and the columns.
func (c Chart) drawLabels(r lib.Renderer, box lib.Box, text lib.Style, ticks []lib.Tick) {
	low, high := ticks[0].Value, ticks[len(ticks)-1].Value
	for _, t := range ticks {
		y := box.Bottom - int(float64(box.Height())*(t.Value-low)/(high-low))
		size := lib.Draw.MeasureText(r, t.Label, text)
		lib.Draw.Text(r, t.Label, box.Left-6-size.Width(), y+4, text)
	}
	baseline := func(row int) int { return box.Bottom + 2 + (row+1)*lineHeight }
	for row, name := range c.Rows {
		lib.Draw.Text(r, html.EscapeString(name), padding/2, baseline(row), text)
	}
	for i, column := range c.Columns {
		x := box.Left + int(float64(box.Width())*(float64(i)+0.5)/float64(len(c.Columns)))
		for row, label := range column {
			label = html.EscapeString(label)
			size := lib.Draw.MeasureText(r, label, text)
			lib.Draw.Text(r, label, x-size.Width()/2, baseline(row), text)
		}
	}
}

// series draws all lines and spans of a chart; the library sees one.
type series struct{ chart Chart }

func (s series) GetName() string         { return s.chart.Title }
func (s series) GetYAxis() lib.YAxisType { return lib.YAxisPrimary }
func (s series) GetStyle() lib.Style     { return lib.Style{} }
func (s series) Validate() error         { return nil }

func (s series) Render(r lib.Renderer, box lib.Box, xRange, yRange lib.Range, _ lib.Style) {
	at := func(column, value float64) (x, y int) {
		return box.Left + xRange.Translate(column), box.Bottom - yRange.Translate(s.chart.scale(value))
	}
	s.grid(r, box, yRange)
	for i, span := range s.chart.Spans {
		// Side by side within their column.
		offset := 0.5 + 0.24*(float64(i)-float64(len(s.chart.Spans)-1)/2)
		for column := range s.chart.Columns {
			var values []float64
			for _, v := range span.Values[column] {
				if s.chart.drawable(v) {
					values = append(values, v)
				}
			}
			if len(values) > 0 {
				span.draw(r, values, func(v float64) (x, y int) { return at(float64(column)+offset, v) })
			}
		}
	}
	for _, line := range s.chart.Lines {
		line.draw(r, s.chart.drawable, func(p Point) (x, y int) { return at(float64(p.Column)+0.5, p.Value) })
	}
}

func (s series) grid(r lib.Renderer, box lib.Box, yRange lib.Range) {
	for _, v := range s.chart.ticks(s.chart.values()) {
		pen(r, faint, nil, 1)
		y := box.Bottom - yRange.Translate(s.chart.scale(v))
		stroke(r, box.Left, y, box.Right, y)
	}
}

var dashes = []float64{7, 4}

func (l Look) pen(r lib.Renderer) {
	if l.Dashed {
		pen(r, l.Color, dashes, strokeWidth)
		return
	}
	pen(r, l.Color, nil, strokeWidth)
}

func pen(r lib.Renderer, c Color, dash []float64, w float64) {
	r.ResetStyle()
	r.SetStrokeColor(c)
	r.SetStrokeWidth(w)
	r.SetStrokeDashArray(dash)
}

func stroke(r lib.Renderer, x1, y1, x2, y2 int) {
	r.MoveTo(x1, y1)
	r.LineTo(x2, y2)
	r.Stroke()
}

func (l Line) draw(r lib.Renderer, drawable func(float64) bool, at func(Point) (x, y int)) {
	var points []Point
	for _, p := range l.Points {
		if drawable(p.Value) {
			points = append(points, p)
		}
	}
	for i, p := range points {
		if i > 0 && points[i-1].Group == p.Group {
			l.pen(r)
			x1, y1 := at(points[i-1])
			x2, y2 := at(p)
			stroke(r, x1, y1, x2, y2)
		}
	}
	for _, p := range points {
		x, y := at(p)
		l.mark(r, x, y)
	}
}

func (s Span) draw(r lib.Renderer, values []float64, at func(float64) (x, y int)) {
	x, first := at(values[0])
	_, last := at(values[len(values)-1])
	s.pen(r)
	stroke(r, x, first, x, last)
	for _, v := range values[1:] {
		_, y := at(v)
		pen(r, s.Color, nil, strokeWidth)
		stroke(r, x-markerSize, y, x+markerSize, y)
	}
	s.mark(r, x, first)
}

// mark draws the look's marker.
func (l Look) mark(r lib.Renderer, x, y int) {
	pen(r, l.Color, nil, strokeWidth)
	fill := l.Color
	if l.Hollow {
		fill = white
	}
	r.SetFillColor(fill)
	const d = markerSize
	corners := [][2]int{{x - d, y - d}, {x + d, y - d}, {x + d, y + d}, {x - d, y + d}}
	switch l.Marker {
	case Circle:
		r.Circle(d, x, y)
		return
	case Diamond:
		corners = [][2]int{{x - d - 1, y}, {x, y - d - 1}, {x + d + 1, y}, {x, y + d + 1}}
	}
	for i, p := range corners {
		if i == 0 {
			r.MoveTo(p[0], p[1])
		} else {
			r.LineTo(p[0], p[1])
		}
	}
	r.Close()
	r.FillStroke()
}

// A legend has a sample of each look.
type legend struct {
	looks []Look
	span  bool
}

func (c Chart) legend() legend {
	var l legend
	for _, line := range c.Lines {
		l.looks = append(l.looks, line.Look)
	}
	for _, span := range c.Spans {
		l.looks = append(l.looks, span.Look)
	}
	return l
}

const legendColumns = 3

func (l legend) height() int {
	return legendHeight * ((len(l.looks) + legendColumns - 1) / legendColumns)
}

func (l legend) draw(r lib.Renderer, box lib.Box, text lib.Style) {
	const sample = 36
	for i, look := range l.looks {
		x := box.Left + i%legendColumns*(box.Width()/legendColumns)
		y := padding/2 + legendHeight/2 + i/legendColumns*legendHeight
		look.pen(r)
		stroke(r, x, y, x+sample, y)
		look.mark(r, x+sample/2, y)
		lib.Draw.Text(r, html.EscapeString(look.Name), x+sample+6, y+4, text)
	}
}
