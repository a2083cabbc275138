// Command summary reads the output of `go test -json`, prints what a person
// wants to see of it, and exits 1 if a test failed, if none ran, or if one was
// skipped that the allow-list does not name.
//
//	go test -json ./... | go run ./test/summary -allow .ci/allowed-skips
//
// A line of the allow-list is a package path below the module, a test name and
// the reason, separated by blanks; a name that ends in /... covers its subtests.
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"
	"time"
)

const module = "github.com/skipstack/skipstack/"

func main() { os.Exit(run(os.Args[1:], os.Stdin, os.Stdout, os.Stderr)) }

func run(args []string, in io.Reader, out, errs io.Writer) int {
	flags := flag.NewFlagSet("summary", flag.ContinueOnError)
	flags.SetOutput(errs)
	allow := flags.String("allow", "", "file of skips that are expected")
	if err := flags.Parse(args); err != nil {
		return 2
	}
	allowed, err := readAllowed(*allow)
	if err != nil {
		fmt.Fprintln(errs, "summary:", err)
		return 2
	}
	ok, err := summarise(in, out, allowed)
	if err != nil {
		fmt.Fprintln(errs, "summary:", err)
		return 1
	}
	if !ok {
		return 1
	}
	return 0
}

type event struct {
	Action, Package, Test, Output string
	Elapsed                       float64
}

type key struct{ pkg, test string }

func (k key) String() string { return strings.TrimPrefix(k.pkg, module) + " " + k.test }

func summarise(in io.Reader, out io.Writer, allowed allowList) (ok bool, err error) {
	output := map[key][]string{}
	var failed, unexpected []key
	passed, skipped, brokenPackages := 0, 0, 0
	sc := bufio.NewScanner(in)
	sc.Buffer(nil, 16<<20)
	for sc.Scan() {
		var e event
		if json.Unmarshal(sc.Bytes(), &e) != nil {
			fmt.Fprintln(out, sc.Text()) // the compiler's own words
			continue
		}
		k := key{e.Package, e.Test}
		switch e.Action {
		case "output", "build-output":
			output[k] = append(output[k], e.Output)
			continue
		case "pass":
			if e.Test != "" {
				passed++
				break
			}
			fmt.Fprintf(out, "ok    %-40s %s\n", strings.TrimPrefix(e.Package, module), seconds(e.Elapsed))
		case "skip":
			if e.Test == "" {
				break // no test files
			}
			skipped++
			if !allowed.covers(k) {
				unexpected = append(unexpected, k)
			}
			fmt.Fprintf(out, "skip  %s: %s\n", k, reason(output[k]))
		case "fail", "build-fail":
			if e.Test == "" {
				brokenPackages++
			} else {
				failed = append(failed, k)
			}
			fmt.Fprintf(out, "FAIL  %s %s\n%s", k, seconds(e.Elapsed), strings.Join(output[k], ""))
		default:
			continue
		}
		delete(output, k)
	}
	if err := sc.Err(); err != nil {
		return false, fmt.Errorf("read test output: %w", err)
	}
	for _, k := range unexpected {
		fmt.Fprintf(out, "skip not on the allow-list: %s\n", k)
	}
	for _, k := range failed {
		fmt.Fprintf(out, "failed: %s\n", k)
	}
	fmt.Fprintf(out, "%d passed, %d failed, %d skipped\n", passed, len(failed), skipped)
	if passed == 0 {
		return false, errors.New("no test ran")
	}
	return len(failed) == 0 && brokenPackages == 0 && len(unexpected) == 0, nil
}

func seconds(s float64) string {
	return (time.Duration(s * float64(time.Second))).Round(10 * time.Millisecond).String()
}

// reason is the last line that a skipped test printed of its own.
func reason(lines []string) string {
	for i := len(lines) - 1; i >= 0; i-- {
		line := strings.TrimSpace(lines[i])
		if line != "" && !strings.HasPrefix(line, "---") && !strings.HasPrefix(line, "===") {
			return line
		}
	}
	return "no reason given"
}

type allowList map[string]bool

func (a allowList) covers(k key) bool {
	if a[k.String()] {
		return true
	}
	for name := k.test; ; {
		i := strings.LastIndex(name, "/")
		if i < 0 {
			return false
		}
		name = name[:i]
		if a[key{k.pkg, name + "/..."}.String()] {
			return true
		}
	}
}

func readAllowed(path string) (allowList, error) {
	a := allowList{}
	if path == "" {
		return a, nil
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	for n, line := range strings.Split(string(text), "\n") {
		fields := strings.Fields(line)
		if len(fields) == 0 || strings.HasPrefix(line, "#") {
			continue
		}
		if len(fields) < 3 {
			return nil, fmt.Errorf("%s:%d: want package, test and reason", path, n+1)
		}
		a[fields[0]+" "+fields[1]] = true
	}
	return a, nil
}
