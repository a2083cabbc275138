// Command loadtools lets iperf3 and sockperf measure two pods, plain and accelerated,
// so that the figures of `skipstack bench` can be compared with those of tools that
// readers know. The bench measures the same in between, so that both have the machine
// as it is at that time.
//
//	go run ./test/loadtools -json .cache/loadtools.json
//
// It needs root and a Debian machine. The packages come through apt and are unpacked
// below -cache: nothing is installed. The pods are made as those of the bench's
// private node: same plugins, same path, client and server on one CPU. Plain and
// accelerated runs differ in the cgroup of the processes, and alternate.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/skipstack/skipstack/test/debian"
	"github.com/skipstack/skipstack/test/node"
)

func main() {
	p := &program{}
	os.Exit(node.Main(p, node.MainOptions{
		Build:   []string{"github.com/skipstack/skipstack/cmd/skipstack"},
		Tools:   []string{"bridge", "host-local"},
		Prepare: p.prepare,
	}))
}

type program struct {
	cache, json string
	congestion  string
	repeats     int
}

func (p *program) parse() error {
	flags := flag.NewFlagSet("loadtools", flag.ContinueOnError)
	flags.StringVar(&p.cache, "cache", ".cache/loadtools", "`directory` where packages are unpacked")
	flags.StringVar(&p.json, "json", "", "also write the results to this `file`")
	flags.StringVar(&p.congestion, "congestion", "", "TCP's congestion control in the pods, a `name`; the machine's own if empty")
	flags.IntVar(&p.repeats, "repeats", 5, "`pairs` of runs of each experiment")
	if err := flags.Parse(os.Args[1:]); err != nil {
		return err
	}
	if flags.NArg() > 0 || p.repeats < 1 {
		return fmt.Errorf("bad arguments: %v", os.Args[1:])
	}
	var err error
	p.cache, err = filepath.Abs(p.cache)
	return err
}

// packages are those of Debian.
var packages = []string{"iperf3", "sockperf"}

func (p *program) root() string { return filepath.Join(p.cache, "root") }

// prepare gets the packages, where the network is.
func (p *program) prepare(ctx context.Context) (clean func(), err error) {
	if err := p.parse(); err != nil {
		return nil, err
	}
	if _, err := os.Stat(p.root()); err == nil {
		return nil, nil
	}
	if err := os.MkdirAll(p.cache, 0o755); err != nil {
		return nil, err
	}
	apt := &debian.APT{Dir: filepath.Join(p.cache, "apt"), OwnRelease: true, Logf: func(format string, args ...any) {
		fmt.Fprintf(os.Stderr, "loadtools: "+format+"\n", args...)
	}}
	missing, err := apt.Missing(ctx, false, packages...)
	if err != nil {
		return nil, err
	}
	return nil, apt.Unpack(ctx, p.root(), missing)
}

// Run measures in the private machine.
func (p *program) Run() int {
	if err := p.parse(); err != nil {
		fmt.Fprintln(os.Stderr, "loadtools:", err)
		return 2
	}
	if !node.Isolated() {
		fmt.Fprintln(os.Stderr, "loadtools: needs root: private mount, network, cgroup and PID namespaces")
		return 1
	}
	if err := p.measure(context.Background()); err != nil {
		fmt.Fprintln(os.Stderr, "loadtools:", err)
		return 1
	}
	return 0
}

func (p *program) measure(ctx context.Context) (err error) {
	pods, err := newPair(ctx, p.root(), p.congestion)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, pods.node.Close()) }()
	var results []Result
	for _, e := range experiments {
		fmt.Fprintln(os.Stderr, "loadtools:", e.tool, e.name)
		r := Result{Tool: e.tool, Experiment: e.name, Unit: e.unit}
		if r.Version, err = pods.version(ctx, e.tool); err != nil {
			return err
		}
		own := []Result{r, r}
		for i, sockets := range []string{"blocking", "nonblocking"} {
			own[i].Tool, own[i].Version = "bench", "skipstack bench --sockets "+sockets
		}
		for i := range p.repeats {
			kinds := []bool{false, true}
			if i%2 == 1 {
				slices.Reverse(kinds)
			}
			for _, accelerated := range kinds {
				s, err := pods.run(ctx, e, accelerated)
				if err != nil {
					return fmt.Errorf("%s %s: %w", e.tool, e.name, err)
				}
				r.add(accelerated, s)
			}
			for i, sockets := range []string{"blocking", "nonblocking"} {
				plain, accelerated, err := bench(ctx, e, sockets, p.congestion)
				if err != nil {
					return fmt.Errorf("%s: %w", e.name, err)
				}
				own[i].add(false, plain)
				own[i].add(true, accelerated)
			}
		}
		results = append(results, own[0], own[1], r)
	}
	t := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "tool\texperiment\tunit\tplain\taccelerated")
	for _, r := range results {
		fmt.Fprintf(t, "%s\t%s\t%s\t%.4g\t%.4g\n", r.Version, r.Experiment, r.Unit, r.Plain, r.Accelerated)
	}
	if err := t.Flush(); err != nil || p.json == "" {
		return err
	}
	text, err := json.MarshalIndent(results, "", "  ")
	if err == nil {
		err = os.WriteFile(p.json, append(text, '\n'), 0o644)
	}
	return err
}

// A Result is what a tool said of one experiment, run by run.
type Result struct {
	Tool        string    `json:"tool"`
	Version     string    `json:"version"`
	Experiment  string    `json:"experiment"` // as `skipstack bench` calls the point
	Unit        string    `json:"unit"`
	Plain       []float64 `json:"plain"`
	Accelerated []float64 `json:"accelerated"`
	// Seconds of CPU time of client and server for each message or transaction, and the
	// part of it in user mode; of the bench that is not known, and 0.
	PlainCPU        []float64 `json:"plain_cpu_s"`
	AcceleratedCPU  []float64 `json:"accelerated_cpu_s"`
	PlainUser       []float64 `json:"plain_user"`
	AcceleratedUser []float64 `json:"accelerated_user"`
}

func (r *Result) add(accelerated bool, s sample) {
	if accelerated {
		r.Accelerated, r.AcceleratedUser = append(r.Accelerated, s.rate), append(r.AcceleratedUser, s.user)
		r.AcceleratedCPU = append(r.AcceleratedCPU, s.cpu)
	} else {
		r.Plain, r.PlainUser = append(r.Plain, s.rate), append(r.PlainUser, s.user)
		r.PlainCPU = append(r.PlainCPU, s.cpu)
	}
}

// environment lets programs that are unpacked below root find their libraries.
func environment(root string) []string {
	var libs []string
	_ = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() && strings.Contains(path, "/lib") {
			libs = append(libs, path)
		}
		return nil
	})
	return []string{"PATH=" + filepath.Join(root, "usr/bin") + ":/usr/bin:/bin", "LD_LIBRARY_PATH=" + strings.Join(libs, ":"), "LC_ALL=C"}
}
