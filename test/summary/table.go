package main

import (
	"cmp"
	"fmt"
	"io"
	"strconv"
	"strings"
	"text/tabwriter"

	"github.com/skipstack/skipstack/test/report"
)

// table prints all steps, and says whether all is well. Its last line counts tests;
// a step without any that failed counts as one.
func table(dir string, out io.Writer) (good bool, err error) {
	steps, err := readSteps(dir)
	if err != nil {
		return false, err
	}
	var total report.Counts
	var notes, problems []string
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "TIER\tKERNEL\tPASSED\tFAILED\tSKIPPED\tTIME\tRESULT")
	for _, s := range steps {
		result := "ok"
		if s.Failure != "" {
			result = "FAILED"
			problems = append(problems, fmt.Sprintf("%s: %s; alone: %s", s.Name, s.Failure, s.Command))
		}
		counted := false
		if len(s.Runs) == 0 {
			fmt.Fprintf(w, "%s\t%s\t-\t-\t-\t%s\t%s\n", s.Name, s.Kernel, seconds(s.Seconds), result)
		}
		for _, r := range s.Runs {
			c := r.Count()
			total = total.Add(c)
			counted = counted || c.Failed > 0
			where := strings.TrimSpace(cmp.Or(r.Kernel, s.Kernel) + " " + r.Params)
			took, word := r.Seconds, result
			if len(s.Runs) > 1 && c.Failed == 0 && c.Unexpected == 0 {
				word = "ok" // another of this step's runs failed
			}
			fmt.Fprintf(w, "%s\t%s\t%d\t%d\t%s\t%s\t%s\n", s.Name, where, c.Passed, c.Failed, skips(c), seconds(took), word)
			notes = append(notes, runNotes(s.Name+" "+where, r)...)
			problems = append(problems, runProblems(s.Name+" "+where, r)...)
		}
		if s.Failure != "" && !counted {
			total.Failed++
		}
	}
	if err := w.Flush(); err != nil {
		return false, err
	}
	section(out, "Skipped or scaled, and why:", notes)
	section(out, "Failed:", problems)
	fmt.Fprintf(out, "%d passed, %d failed, %d skipped\n", total.Passed, total.Failed, total.Skipped)
	return len(problems) == 0, nil
}

func section(out io.Writer, title string, lines []string) {
	if len(lines) == 0 {
		return
	}
	fmt.Fprintln(out, title)
	for _, l := range lines {
		fmt.Fprintln(out, "  "+l)
	}
}

func skips(c report.Counts) string {
	if c.Unexpected > 0 {
		return fmt.Sprintf("%d (%d unexpected)", c.Skipped, c.Unexpected)
	}
	return strconv.Itoa(c.Skipped)
}

// runNotes are one line for each reason to skip, and for each thing that was scaled.
func runNotes(where string, r report.Run) (lines []string) {
	for _, what := range skipped(r.Suites...) {
		lines = append(lines, where+": skipped "+what)
	}
	for _, s := range r.Suites {
		for _, what := range s.Scaled {
			lines = append(lines, fmt.Sprintf("%s: %s: %s", where, s.Name, what))
		}
	}
	return lines
}

// skipped is a line for each reason to skip tests.
func skipped(suites ...report.Suite) (lines []string) {
	count := map[string]int{}
	example := map[string]string{}
	var reasons []string
	for _, s := range suites {
		for _, t := range s.Tests {
			if t.Result != report.Skip || t.Unexpected {
				continue
			}
			if count[t.Reason]++; count[t.Reason] == 1 {
				reasons = append(reasons, t.Reason)
				example[t.Reason] = s.Name + " " + t.Name
			}
		}
	}
	for _, why := range reasons {
		what := example[why]
		if n := count[why] - 1; n > 0 {
			what += fmt.Sprintf(" and %d more", n)
		}
		lines = append(lines, what+": "+why)
	}
	return lines
}

func runProblems(where string, r report.Run) (lines []string) {
	for _, s := range r.Suites {
		for _, t := range s.Tests {
			switch {
			case t.Result == report.Fail:
				lines = append(lines, fmt.Sprintf("%s: %s %s", where, s.Name, t.Name))
			case t.Unexpected:
				lines = append(lines, fmt.Sprintf("%s: %s %s: skipped, which the allow-list does not allow: %s", where, s.Name, t.Name, t.Reason))
			}
		}
	}
	for _, p := range r.Problems {
		lines = append(lines, where+": "+p)
	}
	return lines
}
