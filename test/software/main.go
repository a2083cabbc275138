// Command software runs real software between pods, plain and accelerated, and
// compares what comes out: same replies, same bytes, and a connection that was
// really accelerated, or left plain for the reason that is expected.
//
//	go run ./test/software                  # everything
//	go run ./test/software -run 'nginx|redis'
//	go run ./test/software -ci              # what CI runs
//	go run ./test/software -list
//
// It needs root. Debian packages that the machine lacks are downloaded and
// unpacked below -cache; nothing is installed, so nothing is started. All
// processes run in pods of a private node (package test/node), which skipstack's
// own CNI plugin has set up.
//
// Every case runs once in plain pods, then in pods under the plugin's rules:
//
//   - mode auto, the kernel's risks accepted. By default only connections with
//     non-blocking endpoints are accelerated; software with blocking ones must
//     be counted as such, and runs again with risk "blocking" accepted.
//   - software that uses splice(2) on sockets: mode auto and no risk accepted.
//     Where this kernel has the risk "splice", its connections must stay plain.
//
// The accelerated share is redirected / (redirected + payload on the wire). The
// latter is what the pods' interfaces sent without 66 bytes of headers a packet.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"regexp"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/skipstack/skipstack/test/node"
	"github.com/skipstack/skipstack/test/report"
)

func main() {
	s := &suite{out: os.Stdout, errs: os.Stderr, args: os.Args[1:]}
	os.Exit(node.Main(s, node.MainOptions{
		Workers: map[string]node.Worker{
			httpServerName:   httpServer,
			httpClientName:   httpClient,
			grpcServerName:   grpcServer,
			grpcClientName:   grpcClient,
			l4ProxyName:      l4Proxy,
			connectProxyName: connectProxy,
		},
		Build:   []string{"github.com/skipstack/skipstack/cmd/skipstack"},
		Tools:   []string{"bridge", "host-local"},
		Prepare: s.prepare,
	}))
}

// A testCase is one use of a software.
type testCase struct {
	software, name string
	ci             bool     // CI runs it
	packages       []string // of Debian, that it needs
	// blocking says which end opens its connections with blocking sockets, so
	// that they are plain by default; empty: neither.
	blocking string
	splices  bool    // it uses splice(2) on sockets
	share    float64 // the least accelerated share that will do; default 0.9
	// run does the work and returns what must be the same each time. It may
	// be run any number of times.
	run func(*scene) (string, error)
}

func (c testCase) String() string { return c.software + ": " + c.name }

func allCases() []testCase {
	var all []testCase
	for _, some := range [][]testCase{
		nginxCases(), redisCases(), postgresCases(), goCases(), proxyCases(), haproxyCases(),
		curlCases(), sshCases(), runtimeCases(), iperfCases(),
	} {
		all = append(all, some...)
	}
	return all
}

type suite struct {
	out, errs io.Writer
	args      []string

	cases   []testCase
	verbose bool
	report  string
	cache   string
	limit   time.Duration
}

// parse returns done if there is nothing to run, and says why.
func (s *suite) parse(out, errs io.Writer) (exit int, done bool) {
	flags := flag.NewFlagSet("software", flag.ContinueOnError)
	flags.SetOutput(errs)
	only := flags.String("run", "", "only cases whose name, such as \"nginx: static\", matches the `regexp`")
	ci := flags.Bool("ci", false, "only what CI runs")
	list := flags.Bool("list", false, "list the cases and their Debian packages")
	flags.BoolVar(&s.verbose, "v", false, "show the counters and the results")
	flags.StringVar(&s.report, "json", "", "`file` for what came of the cases, as package report has it")
	flags.StringVar(&s.cache, "cache", ".cache/software", "`directory` where packages are unpacked")
	flags.DurationVar(&s.limit, "timeout", 2*time.Minute, "how long one run of a case may take")
	if err := flags.Parse(s.args); err != nil {
		return 2, true
	}
	names, err := regexp.Compile(*only)
	if err != nil || flags.NArg() > 0 {
		fmt.Fprintln(errs, "software: bad arguments:", err, flags.Args())
		return 2, true
	}
	for _, c := range allCases() {
		if names.MatchString(c.String()) && (c.ci || !*ci) {
			s.cases = append(s.cases, c)
		}
	}
	if *list {
		for _, c := range s.cases {
			fmt.Fprintf(out, "%s (%s)\n", c, strings.Join(c.packages, " "))
		}
		return 0, true
	}
	if len(s.cases) == 0 {
		fmt.Fprintln(errs, "software: no case matches")
		return 2, true
	}
	return 0, false
}

// prepare gets the packages, where the network is.
func (s *suite) prepare(ctx context.Context) (clean func(), err error) {
	if _, done := s.parse(io.Discard, io.Discard); done {
		return nil, nil // Run says why
	}
	var packages []string
	for _, c := range s.cases {
		packages = append(packages, c.packages...)
	}
	return nil, unpack(ctx, s.cache, packages, s.errs)
}

// Run runs the cases in the private machine.
func (s *suite) Run() int {
	s.cases = nil
	if exit, done := s.parse(s.out, s.errs); done {
		return exit
	}
	if !node.Isolated() {
		fmt.Fprintln(s.errs, "software: needs root: private mount, network, cgroup and PID namespaces")
		return 1
	}
	l, err := newLab(s)
	if err != nil {
		fmt.Fprintln(s.errs, "software:", err)
		return 1
	}
	failed := 0
	var rows []row
	cases := report.Suite{Name: "test/software"}
	began := time.Now()
	for _, c := range s.cases {
		start := time.Now()
		more, err := l.try(c)
		rows = append(rows, more...)
		verdict, result := "ok", report.Pass
		if err != nil {
			failed++
			verdict, result = "FAILED: "+err.Error(), report.Fail
		}
		cases.Tests = append(cases.Tests, report.Test{Name: c.String(), Result: result})
		fmt.Fprintf(s.out, "%s: %s (%.1f s)\n", c, verdict, time.Since(start).Seconds())
	}
	if err := l.close(); err != nil {
		fmt.Fprintln(s.errs, "software:", err)
		failed++
	}
	if s.report != "" {
		cases.Seconds = time.Since(began).Seconds()
		if err := report.Write(s.report, []report.Run{{Seconds: cases.Seconds, Suites: []report.Suite{cases}}}); err != nil {
			fmt.Fprintln(s.errs, "software:", err)
			failed++
		}
	}
	fmt.Fprintln(s.out)
	printTable(s.out, rows)
	if failed > 0 {
		fmt.Fprintf(s.out, "\n%d of %d cases failed\n", failed, len(s.cases))
		return 1
	}
	fmt.Fprintf(s.out, "\nall %d cases passed\n", len(s.cases))
	return 0
}

// A row of the table is one run of a case in pods under the plugin's rules.
type row struct {
	testCase
	rules   string
	payload uint64 // bytes
	share   float64
	same    bool
	note    string
}

func printTable(out io.Writer, rows []row) {
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "SOFTWARE\tCASE\tACCEPTED RISKS\tPAYLOAD\tACCELERATED\tSAME RESULT\tNOTE")
	for _, r := range rows {
		same := "yes"
		if !r.same {
			same = "NO"
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%.1f MB\t%.1f %%\t%s\t%s\n", r.software, r.name, r.rules, float64(r.payload)/1e6, 100*r.share, same, r.note)
	}
	w.Flush()
}
