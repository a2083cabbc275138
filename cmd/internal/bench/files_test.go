package bench

import (
	"bytes"
	"context"
	"encoding/csv"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestCSV(t *testing.T) {
	r := newReport(Parameters{Repeats: 5, Length: time.Second}, Facts{})
	with := widest(Stream)
	with.Unix = &Figures{BytesPerSecond: 3.25e9, CPU: 0.5}
	r.Points = []Result{widest(RequestResponse), with}
	lines := encodedCSV(t, r)
	if len(lines) != 3 {
		t.Fatalf("%v", lines)
	}
	cell := func(line int, column string) string {
		i := slices.Index(lines[0], column)
		if i < 0 {
			t.Fatalf("no column %s", column)
		}
		return lines[line][i]
	}
	for _, c := range []struct {
		line   int
		column string
		want   string
	}{
		{1, "test", "rr"}, {1, "path", "loopback"}, {1, "placement", "cross-cpu"}, {1, "request_bytes", "256"}, {1, "response_bytes", "30000"},
		{1, "nodelay", "true"}, {1, "connections", "1"}, {1, "plain_transactions_per_s", "123456"}, {1, "accelerated_p99_ns", "123456789"},
		{1, "unix_cpu_s", ""}, {2, "unix_cpu_s", "0.5"}, {2, "unix_throughput_bytes_per_s", "3250000000"}, {2, "plain_p50_ns", "123456789"},
		{1, "speedup", "12.34"}, {1, "payload_bytes", "12340000000"}, {1, "redirected_bytes", "12340000000"}, {1, "tcp_bytes", "0"},
		{1, "repeats", "25"}, {1, "uncertain", "true"}, {1, "standard_error", "1.11"}, {1, "mad", "1.23"}, {1, "proof", "overflow"}, {1, "incomplete", "false"},
	} {
		if got := cell(c.line, c.column); got != c.want {
			t.Errorf("%s of line %d is %q, want %q", c.column, c.line, got, c.want)
		}
	}
	r.Header.Incomplete = "interrupted,\nor \"so\""
	incomplete := encodedCSV(t, r)
	if !slices.Equal(incomplete[0], lines[0]) {
		t.Errorf("other columns: %v", incomplete[0])
	}
	for i, line := range incomplete[1:] {
		if last := len(line) - 1; line[last] != "true" || !slices.Equal(line[:last], lines[i+1][:last]) {
			t.Errorf("of an incomplete run: %v", line)
		}
	}
}

// encodedCSV reads back what is written; the reader checks that all lines have as many
// fields.
func encodedCSV(t *testing.T, r *Report) [][]string {
	t.Helper()
	var b bytes.Buffer
	if err := r.encodeCSV(&b); err != nil {
		t.Fatal(err)
	}
	lines, err := csv.NewReader(&b).ReadAll()
	if err != nil {
		t.Fatal(err)
	}
	return lines
}

func TestWriteFiles(t *testing.T) {
	r := newReport(Parameters{Repeats: 5, Length: time.Second}, Facts{})
	r.Points = []Result{widest(Stream)}
	var o options
	o.json, o.csv = filepath.Join(t.TempDir(), "file"), "-"
	var out bytes.Buffer
	if err := o.writeFiles(t.Context(), r, &out); err != nil {
		t.Fatal(err)
	}
	if content, err := os.ReadFile(o.json); err != nil || !bytes.HasPrefix(content, []byte("{")) || !bytes.HasPrefix(out.Bytes(), []byte("test,path,")) {
		t.Errorf("JSON %q, CSV %q, %v", content, out.String(), err)
	}
	o.json = t.TempDir()
	if err := o.writeFiles(t.Context(), r, &out); err == nil {
		t.Error("a directory is written to")
	}
}

func TestCheckFiles(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	for link, to := range map[string]string{"link": "there", "dangling": dir + "/absent", "loop": "loop", "sub": "."} {
		if err := os.Symlink(to, link); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile("there", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ json, csv, want string }{
		{"there", "absent", ""},
		{"dangling", "link", ""},
		{"there", "link", "are the same file"},
		{"there", "sub/there", "are the same file"},
		{"dangling", "absent", "are the same file"},
		{"sub/dangling", "sub/absent", "are the same file"},
		{"there/x", "", "there is not a directory"},
		{"link/x", "", "there is not a directory"},
		{"loop", "", "too many levels"},
		{"no/x", "", "not writable"},
	} {
		o := files{json: c.json, csv: c.csv}
		err := o.settle(Config{}, "")
		if err == nil {
			err = o.checkWritable()
		}
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: %v, want %q", o, err, c.want)
		}
	}
}

// TestSettle: paths that are a stream of the program, whatever they are called.
func TestSettle(t *testing.T) {
	t.Chdir(t.TempDir())
	streams := map[string]*os.File{}
	for _, name := range []string{"out", "err"} {
		f, err := os.Create(name)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		streams[name] = f
	}
	if err := errors.Join(os.Link("out", "hard"), os.Symlink("out", "soft"), os.WriteFile("a", nil, 0o600), os.Link("a", "b")); err != nil {
		t.Fatal(err)
	}
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	dash, fd := files{json: "-"}, fmt.Sprintf("/proc/self/fd/%d", streams["out"].Fd())
	for _, c := range []struct {
		name        string
		given, then files
		want        string
	}{
		{"itself", files{json: "out"}, dash, ""},
		{"by a hard link", files{json: "hard"}, dash, ""},
		{"by a link", files{json: "soft"}, dash, ""},
		{"by its descriptor", files{json: fd}, dash, ""},
		{"CSV", files{csv: "out", json: "a"}, files{csv: "-", json: "a"}, ""},
		{"another file", files{json: "a"}, files{json: "a"}, ""},
		{"none", files{}, files{}, ""},
		{"both", files{json: "out", csv: fd}, files{}, "--json and --csv cannot both be standard output"},
		{"with -", files{json: "-", csv: "soft"}, files{}, "cannot both be standard output"},
		{"the page", files{report: "hard"}, files{}, "--report hard: that is standard output"},
		{"-", files{report: "-"}, files{}, "--report -: that is standard output"},
		{"standard error", files{csv: "err"}, files{}, "--csv err: that is standard error"},
		{"two names", files{json: "a", report: "b"}, files{}, "--json and --report are the same file"},
		{"what is read", files{csv: "b"}, files{}, "--csv b: the bench reads that file"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, input := c.given, "absent"
			if c.name == "what is read" {
				input = "a"
			}
			err := got.settle(Config{Out: streams["out"], ErrOut: streams["err"]}, input)
			if c.want == "" && (err != nil || got != c.then) || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("%+v, %v; want %+v, %q", got, err, c.then, c.want)
			}
		})
	}
	got := files{json: os.DevNull}
	if err := got.settle(Config{Out: null, ErrOut: null}, ""); err != nil || got.json != os.DevNull {
		t.Errorf("the null device: %+v, %v", got, err)
	}
}

// TestWriteFIFO has results go to a FIFO that nobody reads, or not to its end.
func TestWriteFIFO(t *testing.T) {
	path := filepath.Join(t.TempDir(), "fifo")
	if err := unix.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	result := bytes.Repeat([]byte("x"), 1<<20) // more than a pipe holds
	if err := writeResult(t.Context(), path, result, nil); !errors.Is(err, unix.ENXIO) {
		t.Errorf("without a reader: %v", err)
	}
	reader, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	interrupted := errors.New("interrupted")
	ctx, cancel := context.WithCancelCause(t.Context())
	time.AfterFunc(10*time.Millisecond, func() { cancel(interrupted) })
	if err := writeResult(ctx, path, result, nil); !errors.Is(err, interrupted) {
		t.Errorf("with a reader that does not read: %v", err)
	}
}
