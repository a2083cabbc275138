package chart

import (
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"strings"
	"testing"
)

var looks = []Look{
	{Name: "a", Color: Orange, Marker: Circle, Hollow: true}, {Name: "b", Color: Blue, Marker: Square},
	{Name: "c", Color: Grey, Marker: Diamond, Dashed: true},
}

func draw(t *testing.T, c Chart) string {
	t.Helper()
	svg, err := c.SVG()
	if err != nil {
		t.Fatal(err)
	}
	for d := xml.NewDecoder(strings.NewReader(svg)); ; {
		if _, err := d.Token(); errors.Is(err, io.EOF) {
			return svg
		} else if err != nil {
			t.Fatalf("not well-formed: %v\n%s", err, svg)
		}
	}
}

func lines(log bool, values ...float64) Chart {
	c := Chart{ID: "c", Title: "t", Desc: "d", Log: log, Format: func(v float64) string { return fmt.Sprint(v) }}
	line := Line{Look: looks[0]}
	for i, v := range values {
		c.Columns = append(c.Columns, []string{fmt.Sprint(i)})
		line.Points = append(line.Points, Point{Column: i, Value: v})
	}
	c.Lines = []Line{line}
	return c
}

func TestSVG(t *testing.T) {
	c := lines(true, 1, 10, 100)
	for _, look := range looks[1:] {
		c.Lines = append(c.Lines, Line{Look: look, Points: []Point{{0, "x", 5}, {1, "x", 50}, {2, "y", 1}}})
	}
	c.Spans = []Span{{Look: looks[0], Values: map[int][]float64{0: {1, 2, 3}, 2: {4}}}, {Look: looks[1], Values: map[int][]float64{1: {2, 2, 2}}}}
	svg := draw(t, c)
	for _, want := range []string{`<title id="c-title">t</title>`, `<desc id="c-desc">d</desc>`, `role="img"`, `aria-labelledby="c-title c-desc"`, "stroke-dasharray", ">a<", ">b<", ">c<"} {
		if !strings.Contains(svg, want) {
			t.Errorf("no %s in %s", want, svg)
		}
	}
	if n := strings.Count(svg, "<circle"); n != 3+2+2 { // points, spans, legend
		t.Errorf("%d circles", n)
	}
	// Columns 0 and 1 are of one group, 2 is alone: one dashed segment, and the legend's.
	if n := strings.Count(svg, "stroke-dasharray"); n != 2 {
		t.Errorf("%d dashed lines", n)
	}
}

func TestOddValues(t *testing.T) {
	for _, log := range []bool{false, true} {
		for _, values := range [][]float64{{1}, {5, 5, 5}, {1e-9, 1e12}, {0, 3}, {math.NaN(), 2, math.Inf(1), -1}, {math.SmallestNonzeroFloat64, 1}, {math.MaxFloat64 / 1e10}} {
			if svg := draw(t, lines(log, values...)); strings.Contains(svg, "-9223372036854775808") {
				t.Errorf("%v, log %v: a coordinate is none", values, log)
			}
		}
		for _, values := range [][]float64{nil, {math.NaN()}, {-1, math.Inf(-1)}} {
			if _, err := lines(log, values...).SVG(); !errors.Is(err, ErrEmpty) {
				t.Errorf("%v, log %v: %v", values, log, err)
			}
		}
	}
	if _, err := lines(true, 0).SVG(); !errors.Is(err, ErrEmpty) {
		t.Errorf("zero on a logarithmic scale: %v", err)
	}
}

func TestTextIsNoMarkup(t *testing.T) {
	const evil = `</text><script>x</script>&"'`
	c := lines(false, 1, 2)
	c.Title, c.Desc, c.Rows, c.Columns[0] = evil, evil, []string{evil}, []string{evil}
	c.Lines[0].Name, c.Format = evil, func(float64) string { return evil }
	if svg := draw(t, c); strings.Contains(svg, "<script") || strings.Count(svg, "&lt;script") < 6 {
		t.Errorf("text is markup: %s", svg)
	}
}

// The values are within the scale, and it has some labels but not too many.
func TestTicks(t *testing.T) {
	for _, log := range []bool{false, true} {
		for _, v := range [][2]float64{{1, 1}, {1, 2}, {36e6, 10e9}, {3, 1e9}, {4.4, 213}, {0.1, 0.11}, {999, 1001}, {1e-9, 1e3}} {
			c := lines(log, v[0], v[1])
			ticks := c.ticks(c.values())
			if ticks[0] > v[0] || ticks[len(ticks)-1] < v[1] || !slices.IsSorted(ticks) {
				t.Errorf("%v, log %v: scale %v", v, log, ticks)
			}
			if len(ticks) < 2 || len(ticks) > 16 {
				t.Errorf("%v, log %v: %d labels", v, log, len(ticks))
			}
		}
	}
	if got := linearTicks(230); !slices.Equal(got, []float64{0, 50, 100, 150, 200, 250}) {
		t.Errorf("up to 230: %v", got)
	}
	if got := logTicks(36, 230); !slices.Equal(got, []float64{20, 50, 100, 200, 500}) {
		t.Errorf("36 to 230: %v", got)
	}
}

// A printer without colours, and people who do not see all of them, tell the looks
// apart; each colour has contrast enough against white.
func TestColorsHaveContrast(t *testing.T) {
	for _, c := range []Color{Orange, Blue, Grey} {
		linear := func(v uint8) float64 {
			x := float64(v) / 255
			if x <= 0.04045 {
				return x / 12.92
			}
			return math.Pow((x+0.055)/1.055, 2.4)
		}
		luminance := 0.2126*linear(c.R) + 0.7152*linear(c.G) + 0.0722*linear(c.B)
		if contrast := 1.05 / (luminance + 0.05); contrast < 4.5 {
			t.Errorf("%v has a contrast of %.1f", c, contrast)
		}
	}
}
