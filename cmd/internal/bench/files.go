package bench

import (
	"bytes"
	"context"
	"encoding/csv"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"
)

// files are where the results go beside the table, by path; empty: nowhere.
type files struct{ json, csv, report string }

func (o *files) add(set *pflag.FlagSet) {
	set.StringVar(&o.json, "json", "", "also write the results as JSON to this `FILE`; - (or /dev/stdout) is standard output, the table then goes to standard error")
	set.StringVar(&o.csv, "csv", "", "also write the results as CSV to this `FILE`; - as with --json")
	set.StringVar(&o.report, "report", "", "also write a page with charts to this `FILE.html`")
}

// A file is one of them.
type file struct {
	flag, path string
	encode     func(*Report, io.Writer) error
}

// wanted lists the files that were asked for.
func (o files) wanted() []file {
	return slices.DeleteFunc([]file{
		{"json", o.json, (*Report).encodeJSON}, {"csv", o.csv, (*Report).encodeCSV}, {"report", o.report, (*Report).encodeHTML},
	}, func(f file) bool { return f.path == "" })
}

// noneEmpty rejects flags that were set to nothing, as by a script's empty variable:
// their defaults may be far from what was meant.
func noneEmpty(set *pflag.FlagSet) (err error) {
	set.Visit(func(f *pflag.Flag) {
		if f.Value.String() == "" && err == nil {
			err = fmt.Errorf("--%s is empty: give it a value, or leave it out", f.Name)
		}
	})
	return err
}

// settle finds out whether the files exclude each other, the program's streams, or the file
// that is read. A path that is standard output becomes -, so that what is written there is
// not mixed with the table, nor is a file that is both cut off by being opened again.
func (o *files) settle(c Config, input string) error {
	for _, path := range []*string{&o.json, &o.csv} {
		if isStream(*path, c.Out) {
			*path = "-"
		}
	}
	wanted := o.wanted()
	for i, f := range wanted {
		switch {
		case f.flag == "report" && (f.path == "-" || isStream(f.path, c.Out)):
			return fmt.Errorf("--report %s: that is standard output: name a file; only --json and --csv go there", f.path)
		case f.path == "-":
		case isStream(f.path, c.ErrOut):
			return fmt.Errorf("--%s %s: that is standard error, where progress goes", f.flag, f.path)
		default:
			if _, err := resolved(f.path); err != nil {
				return fmt.Errorf("--%s %s: %w", f.flag, f.path, err)
			}
			if input != "" && sameFile(f.path, input) {
				return fmt.Errorf("--%s %s: the bench reads that file", f.flag, f.path)
			}
		}
		for _, other := range wanted[:i] {
			switch {
			case f.path == "-" && other.path == "-":
				return fmt.Errorf("--%s and --%s cannot both be standard output", other.flag, f.flag)
			case f.path != "-" && other.path != "-" && sameFile(f.path, other.path):
				return fmt.Errorf("--%s and --%s are the same file %s", other.flag, f.flag, f.path)
			}
		}
	}
	return nil
}

// isStream tells if a path names the file that a stream of the program is, as /dev/stdout
// does. The null device is nobody's: nothing is mixed there.
func isStream(path string, stream any) bool {
	f, ok := stream.(*os.File)
	if !ok {
		return false
	}
	info, err := f.Stat()
	if err != nil {
		return false
	}
	if null, err := os.Stat(os.DevNull); err == nil && os.SameFile(info, null) {
		return false
	}
	named, err := os.Stat(path)
	return err == nil && os.SameFile(info, named)
}

// sameFile tells if two paths name one file, which need not be there.
func sameFile(a, b string) bool {
	first, err := os.Stat(a)
	second, secondErr := os.Stat(b)
	if err == nil && secondErr == nil {
		return os.SameFile(first, second)
	}
	a, err = resolved(a)
	b, secondErr = resolved(b)
	return err == nil && secondErr == nil && a == b
}

// resolved is the absolute path of a file without symbolic links. The file need not be
// there; in a directory that is not there, the links stay.
func resolved(path string) (string, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return "", err
	}
	const mostLinks = 40 // as the kernel has it
	for range mostLinks {
		dir, err := filepath.EvalSymlinks(filepath.Dir(path))
		if err != nil {
			return path, nil
		}
		path = filepath.Join(dir, filepath.Base(path))
		link, err := os.Readlink(path)
		switch {
		case err != nil: // it is no link
			return path, nil
		case filepath.IsAbs(link):
			path = link
		default:
			path = filepath.Join(dir, link)
		}
	}
	return "", unix.ELOOP
}

// checkWritable finds out whether the files can be written.
func (o files) checkWritable() error {
	for _, f := range o.wanted() {
		if f.path == "-" {
			continue
		}
		info, err := os.Stat(f.path)
		switch {
		case err != nil:
			err = checkMakeable(f.path)
		case info.IsDir():
			err = errors.New("it is a directory")
		default:
			if err = unix.Access(f.path, unix.W_OK); err != nil {
				err = fmt.Errorf("it is not writable: %w", err)
			}
		}
		if err != nil {
			return fmt.Errorf("--%s %s: %w", f.flag, f.path, err)
		}
	}
	return nil
}

// checkMakeable finds out whether a file can be made.
func checkMakeable(path string) error {
	path, err := resolved(path)
	if err != nil {
		return err
	}
	dir := filepath.Dir(path)
	if info, err := os.Stat(dir); err == nil && !info.IsDir() {
		return fmt.Errorf("%s is not a directory", dir)
	}
	if err := unix.Access(dir, unix.W_OK); err != nil {
		return fmt.Errorf("its directory is not writable: %w", err)
	}
	return nil
}

// table is where the table goes.
func (o files) table(c Config) io.Writer {
	if o.json == "-" || o.csv == "-" {
		return c.ErrOut
	}
	return c.Out
}

// writeFiles writes the results to the files that were asked for. What goes wrong
// with one does not keep the others from being written. A pipe that nobody reads is
// given up when ctx ends.
func (o files) writeFiles(ctx context.Context, r *Report, stdout io.Writer) error {
	var failed []error
	for _, f := range o.wanted() {
		var b bytes.Buffer
		err := f.encode(r, &b)
		if err == nil {
			err = writeResult(ctx, f.path, b.Bytes(), stdout)
		}
		failed = append(failed, err)
	}
	return errors.Join(failed...)
}

func writeResult(ctx context.Context, path string, result []byte, stdout io.Writer) error {
	if path == "-" {
		if _, err := stdout.Write(result); err != nil {
			return fmt.Errorf("write the results: %w", err)
		}
		return nil
	}
	// Without O_NONBLOCK, to open a FIFO would last until it has a reader.
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|unix.O_NONBLOCK|unix.O_NOCTTY, 0o644)
	if errors.Is(err, unix.ENXIO) {
		err = fmt.Errorf("%w: nobody reads this FIFO", err)
	}
	if err != nil {
		return fmt.Errorf("write the results: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = f.SetWriteDeadline(time.Unix(1, 0)) }) // of a regular file there is none
	defer stop()
	_, err = f.Write(result)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		err = fmt.Errorf("%s: nobody reads it: %w", path, context.Cause(ctx))
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("write the results: %w", err)
	}
	return nil
}

func (r *Report) encodeJSON(w io.Writer) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	if err := e.Encode(r); err != nil {
		return fmt.Errorf("write the results: %w", err)
	}
	return nil
}

func (r *Report) writeJSON(w io.WriteCloser) error {
	if err := r.encodeJSON(w); err != nil {
		w.Close()
		return err
	}
	return w.Close()
}

// csvColumns are the fields of a point in CSV, named as in JSON; those of plain,
// accelerated and unix have the kind before them, as plain_p50_ns. New ones go to the end.
func csvColumns() []string {
	columns := []string{"test", "path", "placement", "request_bytes", "response_bytes", "nodelay", "connections"}
	for _, kind := range csvKinds {
		for _, figure := range []string{
			"throughput_bytes_per_s", "transactions_per_s", "p50_ns", "p90_ns", "p99_ns", "p999_ns",
			"cpu_s", "cpu_s_per_gb", "cpu_s_per_100k_transactions",
		} {
			columns = append(columns, kind+"_"+figure)
		}
	}
	return append(columns, "speedup", "payload_bytes", "redirected_bytes", "tcp_bytes", "repeats", "mad", "proof", "standard_error", "uncertain", incompleteColumn)
}

// incompleteColumn is of the whole run, the same on each line: whether an error or an
// interruption ended it early, so that points are missing. JSON has which.
const incompleteColumn = "incomplete"

var csvKinds = []string{"plain", "accelerated", "unix"}

// encodeCSV writes a line of columns' names and one for each point. What was not
// measured is empty.
func (r *Report) encodeCSV(w io.Writer) error {
	out := csv.NewWriter(w)
	columns := csvColumns()
	lines := [][]string{columns}
	for _, p := range r.Points {
		fields, err := flatten(p)
		if err != nil {
			return fmt.Errorf("write the results: %w", err)
		}
		fields[incompleteColumn] = r.Header.Incomplete != ""
		line := make([]string, len(columns))
		for i, column := range columns {
			if v := fields[column]; v != nil {
				line[i] = fmt.Sprint(v)
			}
		}
		lines = append(lines, line)
	}
	if err := out.WriteAll(lines); err != nil {
		return fmt.Errorf("write the results: %w", err)
	}
	return nil
}

// flatten returns the fields of a point by their columns.
func flatten(p Result) (map[string]any, error) {
	encoded, err := json.Marshal(p)
	if err != nil {
		return nil, err
	}
	var fields map[string]any
	d := json.NewDecoder(bytes.NewReader(encoded))
	d.UseNumber() // digits stay as they are
	if err := d.Decode(&fields); err != nil {
		return nil, err
	}
	for _, kind := range csvKinds {
		figures, _ := fields[kind].(map[string]any)
		for name, v := range figures {
			fields[kind+"_"+name] = v
		}
	}
	return fields, nil
}
