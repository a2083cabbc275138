// Command vm runs the project's own tests on the kernels that users have: Debian's
// cloud kernels, in a virtual machine without hardware support (QEMU's TCG).
//
//	go run ./test/vm                 # all kernels
//	go run ./test/vm -kernel 6.1
//
// It installs what it needs below -cache, which it makes, and nothing else on the
// machine changes. A virtual machine has no disk and no network. The logs of a
// kernel that failed are kept below -cache/logs; a warning or worse in the
// kernel's own log is a failure.
package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"

	"github.com/skipstack/skipstack/test/debian"
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
	only := flags.String("kernel", "", "comma-separated kernels, such as 6.1; all if empty")
	tests := flags.String("test", "", "only tests whose name matches this regular expression, as go test -run has it")
	suites := flags.String("suite", "", "only suites whose name matches this regular expression")
	cache := flags.String("cache", ".cache/vm", "where kernels and the emulator are kept")
	verbose := flags.Bool("v", false, "print what passing tests say, too")
	limit := flags.Duration("timeout", 30*time.Minute, "how long one kernel may take")
	if err := flags.Parse(args); err != nil {
		return 2
	}
	match, err := regexp.Compile(*suites)
	if err != nil {
		logf("%v", err)
		return 2
	}
	plans, err := choose(*only, match, *tests)
	if err != nil {
		logf("%v", err)
		return 2
	}
	if err := os.MkdirAll(filepath.Join(*cache, "logs"), 0o755); err != nil {
		logf("%v", err)
		return 1
	}
	l := &lab{out: out, verbose: *verbose, limit: *limit}
	if l.cache, err = filepath.Abs(*cache); err != nil {
		logf("%v", err)
		return 1
	}
	if err := l.prepare(ctx, plans); err != nil {
		logf("%v", err)
		return 1
	}
	var passed, failed, skipped, broken int
	for _, p := range plans {
		r, err := l.kernel(ctx, p)
		passed, failed, skipped = passed+r.passed, failed+r.failed, skipped+r.skipped
		fmt.Fprintf(out, "%-5s %-36s %d passed, %d failed, %d skipped, %s\n", word(err), r.release, r.passed, r.failed, r.skipped,
			r.took.Round(time.Second))
		if err != nil {
			broken++
			fmt.Fprintf(out, "      %s\n      again: go run ./test/vm -kernel %s\n",
				strings.ReplaceAll(err.Error(), "\n", "\n      "), p.kernel)
		}
		if ctx.Err() != nil {
			break
		}
	}
	fmt.Fprintf(out, "%d passed, %d failed, %d skipped\n", passed, failed, skipped)
	if broken > 0 || ctx.Err() != nil || passed == 0 {
		return 1
	}
	return 0
}

func word(err error) string {
	if err != nil {
		return "FAIL"
	}
	return "ok"
}

// A lab has what all kernels need.
type lab struct {
	cache   string
	out     io.Writer
	verbose bool
	limit   time.Duration
	apt     *debian.APT
	qemu    *machine.QEMU
}

func (l *lab) prepare(ctx context.Context, plans []plan) (err error) {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Minute)
	defer cancel()
	l.apt = &debian.APT{Dir: filepath.Join(l.cache, "apt"), Logf: logf}
	if l.qemu, err = machine.FetchQEMU(ctx, l.cache, l.apt); err != nil {
		return fmt.Errorf("get an emulator: %w", err)
	}
	return l.build(ctx, plans)
}

// build builds all programs and test binaries, static.
func (l *lab) build(ctx context.Context, plans []plan) error {
	bin := filepath.Join(l.cache, "bin")
	if err := l.goTool(ctx, "", "build", "-o", filepath.Join(bin, "guest"), "./test/vm/guest"); err != nil {
		return err
	}
	for _, p := range programs {
		if err := l.goTool(ctx, p.arch, "build", "-o", filepath.Join(bin, p.name), p.pkg); err != nil {
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
			if err := l.goTool(ctx, "", "test", "-c", "-o", filepath.Join(bin, binary(s.pkg)), "./"+s.pkg); err != nil {
				return err
			}
		}
	}
	return nil
}

func (l *lab) goTool(ctx context.Context, arch string, args ...string) error {
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+cmp.Or(arch, "amd64"))
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go %s: %w\n%s", strings.Join(args, " "), err, out)
	}
	return nil
}

func binary(pkg string) string { return strings.ReplaceAll(pkg, "/", "-") + ".test" }

// result is what came of one kernel.
type result struct {
	release                 string
	passed, failed, skipped int
	took                    time.Duration
}

func (l *lab) kernel(ctx context.Context, p plan) (r result, err error) {
	r.release = p.kernel
	begin := time.Now()
	defer func() { r.took = time.Since(begin) }()
	fetch, cancel := context.WithTimeout(ctx, 15*time.Minute)
	defer cancel()
	k, err := machine.FetchKernel(fetch, l.cache, l.apt, p.kernel)
	if err != nil {
		return r, fmt.Errorf("get the kernel: %w", err)
	}
	r.release = k.Release

	logs := filepath.Join(l.cache, "logs", strings.TrimSpace(p.kernel+" "+p.params))
	if err := os.RemoveAll(logs); err != nil {
		return r, err
	}
	if err := os.MkdirAll(logs, 0o755); err != nil {
		return r, err
	}
	defer func() {
		if err == nil {
			err = os.RemoveAll(logs)
		} else {
			err = fmt.Errorf("%w\nlogs: %s", err, logs)
		}
	}()
	initramfs := filepath.Join(logs, "initramfs")
	defer os.Remove(initramfs)
	if err := l.pack(fetch, k, p, initramfs); err != nil {
		return r, fmt.Errorf("make the initramfs: %w", err)
	}

	boot, cancel := context.WithTimeout(ctx, l.limit)
	defer cancel()
	judge := newJudge(p, l.out, logs, l.verbose)
	console := filepath.Join(logs, "console")
	err = l.qemu.Boot(boot, machine.Options{
		Kernel: k, Params: p.params, Initramfs: initramfs, Console: console, Memory: 3072,
	}, judge.event)
	err = errors.Join(err, judge.close())
	r.passed, r.failed, r.skipped = judge.passed, judge.failed, judge.skipped
	said, readErr := machine.Complaints(console)
	if len(said) > 0 {
		err = errors.Join(err, fmt.Errorf("the kernel complained: %s", strings.Join(said, "; ")))
	}
	return r, errors.Join(err, readErr)
}
