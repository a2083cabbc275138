package conflist

import (
	"bytes"
	"fmt"
	"strings"
)

// Diff is the change as a unified diff, such as diff(1) prints; empty if there is
// none. An edit is in one place, so there is one hunk.
func (c Change) Diff() string {
	a, b := lines(c.Before), lines(c.After)
	head := 0
	for head < len(a) && head < len(b) && a[head] == b[head] {
		head++
	}
	tail := 0
	for tail < len(a)-head && tail < len(b)-head && a[len(a)-1-tail] == b[len(b)-1-tail] {
		tail++
	}
	if head == len(a) && head == len(b) {
		return ""
	}
	const context = 3
	first, after := max(0, head-context), min(tail, context)
	var out strings.Builder
	name := func(text []byte) string {
		if text == nil {
			return "/dev/null"
		}
		return c.Path
	}
	fmt.Fprintf(&out, "--- %s\n+++ %s\n", name(c.Before), name(c.After))
	at := func(lines []string) string {
		n := len(lines) - tail + after - first
		if n == 0 {
			return "0,0"
		}
		return fmt.Sprintf("%d,%d", first+1, n)
	}
	fmt.Fprintf(&out, "@@ -%s +%s @@\n", at(a), at(b))
	put := func(sign string, lines []string) {
		for _, line := range lines {
			out.WriteString(sign + line)
			if !strings.HasSuffix(line, "\n") {
				out.WriteString("\n\\ No newline at end of file\n")
			}
		}
	}
	put(" ", a[first:head])
	put("-", a[head:len(a)-tail])
	put("+", b[head:len(b)-tail])
	put(" ", a[len(a)-tail:len(a)-tail+after])
	return out.String()
}

// lines keeps the ends of lines.
func lines(text []byte) []string {
	var all []string
	for line := range bytes.Lines(text) {
		all = append(all, string(line))
	}
	return all
}
