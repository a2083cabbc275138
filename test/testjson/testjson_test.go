package testjson

import (
	"errors"
	"reflect"
	"strings"
	"testing"

	"github.com/skipstack/skipstack/test/report"
)

func TestRead(t *testing.T) {
	const in = `{"ImportPath":"broken","Action":"build-output","Output":"undefined: x\n"}
{"ImportPath":"broken","Action":"build-fail"}
make: here
{"Action":"start","Package":"p"}
{"Action":"output","Package":"p","Test":"TestA","Output":"a "}
{"Action":"output","Package":"q","Test":"TestA","Output":"another's"}
{"Action":"attr","Package":"p","Test":"TestA","Key":"k","Value":"v"}
{"Action":"output","Package":"p","Test":"TestA","Output":"b\n"}
{"Action":"skip","Package":"p","Test":"TestA","Elapsed":2}
{"Action":"pass","Package":"p","Test":"TestA"}
{"no":"event"}
{"Action":"output","Package":"p","Output":"FAIL\n"}
{"Action":"fail","Package":"p","Elapsed":1.5}
`
	var got []Result
	var others []string
	if err := Read(strings.NewReader(in), func(r Result) { got = append(got, r) }, func(line string) error {
		others = append(others, line)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	want := []Result{
		{Package: "broken", Test: report.Test{Result: BuildFail}, Output: "undefined: x\n"},
		{Package: "p", Test: report.Test{Name: "TestA", Result: report.Skip, Attrs: []report.Attr{{Key: "k", Value: "v"}}}, Seconds: 2, Output: "a b\n"},
		{Package: "p", Test: report.Test{Name: "TestA", Result: report.Pass}}, // run again: nothing is left of the first time
		{Package: "p", Test: report.Test{Result: report.Fail}, Seconds: 1.5, Output: "FAIL\n"},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%+v, want %+v", got, want)
	}
	if want := []string{"make: here", `{"no":"event"}`}; !reflect.DeepEqual(others, want) {
		t.Errorf("%q, want %q", others, want)
	}
}

// Who writes is not left waiting where the reader gives up.
func TestReadReadsToTheEnd(t *testing.T) {
	in := strings.NewReader("other\n" + strings.Repeat(`{"Action":"pass","Test":"TestA"}`+"\n", 1000))
	no := errors.New("no")
	err := Read(in, func(r Result) { t.Errorf("%+v", r) }, func(string) error { return no })
	if !errors.Is(err, no) || in.Len() > 0 {
		t.Errorf("%v, %d bytes are left", err, in.Len())
	}
}

func TestDecoder(t *testing.T) {
	const said = "=== RUN   TestA\n    a_test.go:1: no\n--- FAIL: TestA (0.25s)\n"
	var got []Result
	d, err := NewDecoder(func(r Result) { got = append(got, r) })
	if err != nil {
		t.Fatal(err)
	}
	for _, part := range []string{said[:20], said[20:], "FAIL\n"} {
		if _, err := d.Write([]byte(part)); err != nil {
			t.Error(err)
		}
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if len(got) > 0 {
		got[len(got)-1].Seconds = 0 // how long the decoder ran
	}
	want := []Result{
		{Test: report.Test{Name: "TestA", Result: report.Fail}, Seconds: 0.25, Output: said},
		{Test: report.Test{Result: report.Fail}, Output: "FAIL\n"},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%+v, want %+v", got, want)
	}
}

func TestQuote(t *testing.T) {
	if got, want := Quote("a\nb"), "      | a\n      | b\n"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}
