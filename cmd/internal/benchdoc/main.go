// Command benchdoc writes what was measured into docs/benchmarks.md, so that no figure
// is copied by hand. `make bench-docs` measures and runs it.
package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"regexp"
	"slices"

	"github.com/skipstack/skipstack/cmd/internal/bench"
)

func main() { os.Exit(run(os.Args[1:], os.Stderr)) }

func run(args []string, stderr io.Writer) int {
	flags := flag.NewFlagSet("benchdoc", flag.ContinueOnError)
	flags.SetOutput(stderr)
	result := flags.String("bench", "", "`FILE` that skipstack bench --json has written")
	again := flags.String("again", "", "`FILE` of a second run, to compare")
	congestion := flags.String("congestion", "", "`FILE` of a run with another congestion control")
	tools := flags.String("tools", "", "`FILE` that test/loadtools -json has written")
	doc := flags.String("doc", "docs/benchmarks.md", "`FILE` to write the results into")
	demo := flags.String("demo", "", "`FILE` that make demo has printed, for README.md")
	if err := flags.Parse(args); err != nil {
		return 2
	}
	err := update(*doc, *result, *again, *congestion, *tools)
	if err == nil && *demo != "" {
		err = updateDemo("README.md", *demo)
	}
	if err != nil {
		fmt.Fprintln(stderr, "benchdoc:", err)
		return 1
	}
	return 0
}

func update(doc, result, again, congestion, tools string) error {
	var report, second, other bench.Report
	if err := read(result, &report); err != nil {
		return err
	}
	if !report.Proven() {
		return errors.New("the bypass is not proven in this report")
	}
	var b bytes.Buffer
	if err := report.WriteMarkdown(&b); err != nil {
		return err
	}
	if again != "" {
		if err := read(again, &second); err != nil {
			return err
		}
		writeAgreement(&b, bench.Compare(&report, &second))
	}
	if congestion != "" {
		if err := read(congestion, &other); err != nil {
			return err
		}
		if other.Header.Congestion == report.Header.Congestion {
			return fmt.Errorf("%s was measured with congestion control %s, too", congestion, other.Header.Congestion)
		}
		if err := other.WriteMarkdownCongestion(&b); err != nil {
			return err
		}
	}
	if tools != "" {
		var results []toolResult
		if err := read(tools, &results); err != nil {
			return err
		}
		if err := writeTools(&b, results); err != nil {
			return err
		}
	}
	return rewrite(doc, "results", b.Bytes())
}

// updateDemo shows what the demo printed.
func updateDemo(readme, demo string) error {
	text, err := os.ReadFile(demo)
	if err != nil {
		return err
	}
	return rewrite(readme, "demo", slices.Concat([]byte("```\n"), bytes.TrimSpace(text), []byte("\n```")))
}

// vendor is what follows a kernel's version in its release; it says something of the
// machine, not of what was measured.
var vendor = regexp.MustCompile(`(Linux \d+\.\d+\.\d+)-[^ ,]+`)

// rewrite puts text between a document's marks.
func rewrite(doc, mark string, text []byte) error {
	text = vendor.ReplaceAll(text, []byte("$1"))
	old, err := os.ReadFile(doc)
	if err != nil {
		return err
	}
	changed, err := replace(old, mark, text)
	if err != nil {
		return fmt.Errorf("%s: %w", doc, err)
	}
	return os.WriteFile(doc, changed, 0o644)
}

func read(path string, into any) error {
	text, err := os.ReadFile(path)
	if err == nil {
		err = json.Unmarshal(text, into)
	}
	if err != nil {
		return fmt.Errorf("read results %s: %w", path, err)
	}
	return nil
}

// replace puts text between the marks of a document, which are lines of their own.
func replace(doc []byte, mark string, text []byte) ([]byte, error) {
	begin := fmt.Appendf(nil, "<!-- %s: written by `make bench-docs` -->\n", mark)
	end := fmt.Appendf(nil, "<!-- end of %s -->\n", mark)
	before, rest, ok := bytes.Cut(doc, begin)
	_, after, ended := bytes.Cut(rest, end)
	if !ok || !ended {
		return nil, fmt.Errorf("it has no lines %q and %q", bytes.TrimSpace(begin), bytes.TrimSpace(end))
	}
	return slices.Concat(before, begin, []byte("\n"), bytes.TrimSpace(text), []byte("\n\n"), end, after), nil
}

// agreement is how near to each other two runs' ratios should be, on one CPU.
const agreement = 0.15

func writeAgreement(w io.Writer, differences []bench.Difference) {
	fmt.Fprint(w, "\n### Two runs\n\n")
	same := slices.DeleteFunc(slices.Clone(differences), func(d bench.Difference) bool { return d.Point.Placement != bench.SameCPU })
	apart := slices.DeleteFunc(slices.Clone(same), func(d bench.Difference) bool { return d.Relative <= agreement })
	if len(same) == 0 {
		fmt.Fprintln(w, "The two runs have no point on one CPU in common.")
		return
	}
	certain := slices.DeleteFunc(slices.Clone(same), func(d bench.Difference) bool { return d.Uncertain })
	certainApart := slices.DeleteFunc(slices.Clone(apart), func(d bench.Difference) bool { return d.Uncertain })
	fmt.Fprintf(w, "The run was repeated at once. Of %d ratios on one CPU, %d agree within %.0f %%; the greatest difference is %.0f %%, at %s (%.2f and %.2f). ",
		len(same), len(same)-len(apart), 100*agreement, 100*same[0].Relative, same[0].Point, same[0].First, same[0].Second)
	fmt.Fprintf(w, "Of the %d that neither run calls uncertain, %d agree.\n", len(certain), len(certain)-len(certainApart))
	for i, d := range apart {
		if i == 0 {
			fmt.Fprint(w, "Further apart:\n\n")
		}
		mark := ""
		if d.Uncertain {
			mark = ", uncertain"
		}
		fmt.Fprintf(w, "- %s: %.2f and %.2f%s\n", d.Point, d.First, d.Second, mark)
	}
}
