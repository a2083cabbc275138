// Command vm runs the project's own tests on the kernels that users have: Debian's
// cloud kernels, in a virtual machine without hardware support (QEMU's TCG).
//
//	go run ./test/vm                 # all kernels, what CI runs: half an hour
//	go run ./test/vm -kernel 6.1
//	go run ./test/vm -set full       # hours
//
// Time in a machine passes with the instructions that it executes, so a test of a
// time limit means what it says, however busy the computer is, and waiting is free.
//
// It installs what it needs below -cache, which it makes, and nothing else on the
// machine changes. A virtual machine has no disk and no network. The logs of a
// kernel that failed are kept below -cache/logs; a warning or worse in the
// kernel's own log is a failure.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/skipstack/skipstack/test/debian"
	"github.com/skipstack/skipstack/test/report"
	"github.com/skipstack/skipstack/test/vm/machine"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	os.Exit(run(ctx, os.Args[1:], os.Stdout))
}

func logf(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "vm: "+format+"\n", args...)
}

func run(ctx context.Context, args []string, out io.Writer) int {
	flags := flag.NewFlagSet("vm", flag.ContinueOnError)
	set := flags.String("set", setCI, "what to run: "+setCI+", which takes half an hour on two CPUs, or "+setFull+", which takes hours")
	arch := flags.String("arch", machine.AMD64, "architecture: "+machine.AMD64+" or "+machine.ARM64)
	only := flags.String("kernel", "", "comma-separated kernels, such as 6.1; all if empty")
	tests := flags.String("test", "", "only tests whose name matches this regular expression, as go test -run has it")
	suites := flags.String("suite", "", "only suites whose name matches this regular expression")
	cache := flags.String("cache", ".cache/vm", "where kernels and the emulator are kept")
	results := flags.String("json", "", "write the results to this file, in the format of package test/report")
	verbose := flags.Bool("v", false, "print what passing tests say, too")
	limit := flags.Duration("timeout", 0, "how long one kernel may take; 0 is an hour, or six for the full set")
	parallel := flags.Int("parallel", min(runtime.NumCPU(), 4), "how many virtual machines run at once: each needs a CPU")
	ownTime := flags.Bool("own-time", true, "let a machine's time pass with its instructions, so that a busy computer cannot disturb it")
	cpus := flags.Int("cpus", 2, "CPUs of a virtual machine")
	if err := flags.Parse(args); err != nil {
		return 2
	}
	if *limit == 0 {
		*limit = time.Hour
		if *set == setFull {
			*limit = 6 * time.Hour
		}
	}
	match, err := regexp.Compile(*suites)
	if err != nil {
		logf("%v", err)
		return 2
	}
	plans, err := choose(*set, *arch, *only, match, *tests)
	if err != nil {
		logf("%v", err)
		return 2
	}
	if err := os.MkdirAll(*cache, 0o755); err != nil {
		logf("%v", err)
		return 1
	}
	l := &lab{out: &lockedWriter{w: out}, verbose: *verbose, limit: *limit, cpus: *cpus, ownTime: *ownTime, arch: *arch}
	if l.cache, err = filepath.Abs(*cache); err != nil {
		logf("%v", err)
		return 1
	}
	if err := l.prepare(ctx, plans); err != nil {
		logf("%v", err)
		return 1
	}
	runs := l.all(ctx, plans, max(1, *parallel))
	l.summarise(out, *set, plans, runs)
	if *results != "" {
		if err := report.Write(*results, runs); err != nil {
			logf("%v", err)
			return 1
		}
	}
	c := total(runs)
	if c.Failed+c.Unexpected > 0 || c.Passed == 0 || ctx.Err() != nil {
		return 1
	}
	return 0
}

// all runs the plans, some at once, and returns what came of each.
func (l *lab) all(ctx context.Context, plans []plan, parallel int) []report.Run {
	runs := make([]report.Run, len(plans))
	var wg sync.WaitGroup
	room := make(chan struct{}, parallel)
	for i, p := range plans {
		room <- struct{}{}
		wg.Go(func() {
			defer func() { <-room }()
			runs[i] = report.Run{Kernel: p.kernel, Params: p.params, Problems: []string{"not begun"}}
			if ctx.Err() == nil {
				runs[i] = l.kernel(ctx, p)
			}
		})
	}
	wg.Wait()
	return runs
}

func total(runs []report.Run) (c report.Counts) {
	for _, r := range runs {
		c = c.Add(r.Count())
	}
	return c
}

// summarise prints a line for each kernel, what was left out or made smaller, and
// how to run again what failed.
func (l *lab) summarise(out io.Writer, set string, plans []plan, runs []report.Run) {
	fmt.Fprintln(out)
	for i, r := range runs {
		c := r.Count()
		fmt.Fprintf(out, "%-5s %-34s %-8s %s\n", word(c.Failed+c.Unexpected == 0), strings.TrimSpace(r.Kernel+" "+r.Params),
			(time.Duration(r.Seconds) * time.Second), counted(c))
		if r.Verdict != "" {
			fmt.Fprintf(out, "      verdict %s%s, splice guard: %s\n", r.Verdict, strings.TrimSuffix(" ("+strings.Join(r.Risks, ", ")+")", " ()"), r.Guard)
		}
		for _, problem := range r.Problems {
			fmt.Fprintf(out, "      %s\n", strings.ReplaceAll(problem, "\n", "\n      "))
		}
		if c.Failed+c.Unexpected > 0 {
			fmt.Fprintf(out, "      logs: %s\n      again: go run ./test/vm -set %s -arch %s -kernel %s\n", l.logs(plans[i]), set, l.arch, plans[i].kernel)
		}
	}
	var said []string
	for _, r := range runs {
		for _, s := range r.Suites {
			for _, why := range s.Scaled {
				if line := s.Name + ": " + why; !slices.Contains(said, line) {
					said = append(said, line)
				}
			}
		}
	}
	for _, line := range said {
		fmt.Fprintln(out, "not all of", line)
	}
	fmt.Fprintln(out, counted(total(runs)))
}

func counted(c report.Counts) string {
	s := fmt.Sprintf("%d passed, %d failed, %d skipped", c.Passed, c.Failed, c.Skipped)
	if c.Unexpected > 0 {
		s += fmt.Sprintf(" (%d unexpectedly)", c.Unexpected)
	}
	return s
}

func word(ok bool) string {
	if ok {
		return "ok"
	}
	return "FAIL"
}

// A lockedWriter is for several virtual machines at once.
type lockedWriter struct {
	mu sync.Mutex
	w  io.Writer
}

func (l *lockedWriter) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.w.Write(b)
}

// A lab has what all kernels need.
type lab struct {
	arch    string
	cache   string
	bin     string // in the cache: what is built
	out     io.Writer
	verbose bool
	limit   time.Duration
	cpus    int // of a virtual machine
	ownTime bool
	fetch   sync.Mutex
	apt     *debian.APT
	qemu    *machine.QEMU
}

func (l *lab) prepare(ctx context.Context, plans []plan) (err error) {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Minute)
	defer cancel()
	l.bin = filepath.Join(l.cache, "bin", l.arch)
	l.apt = &debian.APT{Dir: filepath.Join(l.cache, "apt"), Logf: logf}
	if l.qemu, err = machine.FetchQEMUOf(ctx, l.cache, l.apt, l.arch); err != nil {
		return fmt.Errorf("get an emulator: %w", err)
	}
	if l.arch != machine.AMD64 {
		l.apt = &debian.APT{Dir: filepath.Join(l.cache, "apt-"+l.arch), Arch: l.arch, Logf: logf}
	}
	return l.build(ctx, plans)
}

// build builds all programs and test binaries, static.
func (l *lab) build(ctx context.Context, plans []plan) error {
	if _, err := machine.Go(ctx, "", l.arch, "build", "-o", filepath.Join(l.bin, "guest"), "./test/vm/guest"); err != nil {
		return err
	}
	for _, p := range programs {
		arch := l.arch
		if p.compat {
			arch = compat[l.arch]
		}
		if _, err := machine.Go(ctx, "", arch, "build", "-o", filepath.Join(l.bin, p.name), p.pkg); err != nil {
			return err
		}
	}
	done := map[string]bool{}
	for _, p := range plans {
		for _, s := range p.suites {
			if s.pkg == "" || done[s.pkg] {
				continue
			}
			done[s.pkg] = true
			if _, err := machine.Go(ctx, "", l.arch, "test", "-c", "-o", filepath.Join(l.bin, binary(s.pkg)), "./"+s.pkg); err != nil {
				return err
			}
		}
	}
	return nil
}

func binary(pkg string) string { return strings.ReplaceAll(pkg, "/", "-") + ".test" }

// logs is the directory of what is said in the virtual machine.
func (l *lab) logs(p plan) string {
	return filepath.Join(l.cache, "logs", l.arch, strings.TrimSpace(p.kernel+" "+p.params))
}

// kernel runs a plan.
func (l *lab) kernel(ctx context.Context, p plan) report.Run {
	begin := time.Now()
	logs := l.logs(p)
	j := newJudge(p, l.out, logs, l.verbose)
	if err := l.boot(ctx, p, logs, j); err != nil {
		j.problem(err)
	}
	j.close()
	j.run.Seconds = time.Since(begin).Seconds()
	if c := j.run.Count(); c.Failed+c.Unexpected == 0 {
		if err := os.RemoveAll(logs); err != nil {
			j.problem(err)
		}
	}
	return j.run
}

func (l *lab) boot(ctx context.Context, p plan, logs string, j *judge) error {
	fetch, cancel := context.WithTimeout(ctx, 15*time.Minute)
	defer cancel()
	l.fetch.Lock()
	k, err := machine.FetchKernel(fetch, l.cache, l.apt, p.kernel)
	l.fetch.Unlock()
	if err != nil {
		return fmt.Errorf("get the kernel: %w", err)
	}
	j.run.Kernel = k.Release
	if err := os.RemoveAll(logs); err != nil {
		return err
	}
	if err := os.MkdirAll(logs, 0o755); err != nil {
		return err
	}
	initramfs := filepath.Join(logs, "initramfs")
	defer os.Remove(initramfs)
	if err := l.pack(fetch, k, p, initramfs); err != nil {
		return fmt.Errorf("make the initramfs: %w", err)
	}
	boot, cancel := context.WithTimeout(ctx, l.limit)
	defer cancel()
	return l.qemu.Boot(boot, machine.Options{
		Kernel: k, Params: p.params, Initramfs: initramfs, Console: filepath.Join(logs, "console"), Memory: 3072, CPUs: l.cpus, OwnTime: l.ownTime,
	}, j.event)
}
