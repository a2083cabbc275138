package bench

import (
	"bytes"
	"encoding/csv"
	"encoding/json"
	"fmt"
	"io"
	"os"
)

// writeFiles writes the results to the files that were asked for.
func (o options) writeFiles(r *Report, stdout io.Writer) error {
	for _, f := range []struct {
		path  string
		write func(*Report, io.Writer) error
	}{{o.json, (*Report).encodeJSON}, {o.csv, (*Report).encodeCSV}} {
		if f.path == "" {
			continue
		}
		var b bytes.Buffer
		if err := f.write(r, &b); err != nil {
			return err
		}
		if err := writeResult(f.path, b.Bytes(), stdout); err != nil {
			return err
		}
	}
	return nil
}

func writeResult(path string, result []byte, stdout io.Writer) error {
	var err error
	if path == "-" {
		_, err = stdout.Write(result)
	} else {
		err = os.WriteFile(path, result, 0o644)
	}
	if err != nil {
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
// accelerated and unix have the kind before them, as plain_p50_ns.
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
	return append(columns, "speedup", "payload_bytes", "redirected_bytes", "tcp_bytes", "repeats", "mad", "proof")
}

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
