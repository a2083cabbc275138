// Command kubelet runs pods as Kubernetes does, with skipstack chained to the
// upstream bridge plugin, in a virtual machine: Debian's kernel, systemd and
// containerd, and a kubelet, kube-proxy and control plane built from source.
//
//	go run ./test/kubelet
//
// It installs what it needs below -cache, which it makes, and nothing else on the
// machine changes. The virtual machine has no network, and its disk is made anew for
// each run. Its time passes with its instructions, so nothing in it is late however
// busy the computer is. Logs of a run that failed are kept below -cache/logs.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/skipstack/skipstack/test/debian"
	"github.com/skipstack/skipstack/test/report"
	"github.com/skipstack/skipstack/test/runtimes/containerd"
	"github.com/skipstack/skipstack/test/vm/machine"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	os.Exit(run(ctx, os.Args[1:], os.Stdout))
}

func logf(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "kubelet: "+format+"\n", args...)
}

func run(ctx context.Context, args []string, out io.Writer) int {
	l := &lab{out: out}
	flags := flag.NewFlagSet("kubelet", flag.ContinueOnError)
	flags.StringVar(&l.cache, "cache", ".cache/kubelet", "where programs and the root file system are kept")
	flags.StringVar(&l.vmCache, "vm-cache", ".cache/vm", "where kernels and the emulator are kept, as test/vm has it")
	flags.StringVar(&l.runtimeCache, "runtimes-cache", ".cache/runtimes", "where containerd is kept, as test/runtimes has it")
	flags.StringVar(&l.series, "kernel", "6.12", "kernel, such as 6.12")
	flags.StringVar(&l.tests, "test", "", "only tests whose name matches this regular expression, as go test -run has it")
	flags.StringVar(&l.params, "params", "", "further parameters of the kernel; systemd.journald.forward_to_console=1 shows all services' logs")
	flags.BoolVar(&l.verbose, "v", false, "print what passing tests say, too")
	flags.BoolVar(&l.ownTime, "own-time", true, "let the machine's time pass with its instructions, so that a busy computer cannot disturb it")
	flags.IntVar(&l.cpus, "cpus", 2, "CPUs of the virtual machine")
	flags.DurationVar(&l.limit, "timeout", 90*time.Minute, "how long the virtual machine may run")
	results := flags.String("json", "", "write the result to this file")
	if err := flags.Parse(args); err != nil {
		return 2
	}
	begin := time.Now()
	r, err := l.run(ctx)
	r.Seconds = time.Since(begin).Seconds()
	if err != nil {
		r.Problems = append(r.Problems, err.Error())
		logf("%v", err)
	}
	if *results != "" {
		if err := report.Write(*results, []report.Run{r}); err != nil {
			logf("%v", err)
			return 1
		}
	}
	c := r.Count()
	fmt.Fprintf(out, "%s: %d passed, %d failed, %d skipped\n", r.Kernel, c.Passed, c.Failed, c.Skipped)
	if c.Failed+c.Skipped > 0 || c.Passed == 0 {
		return 1
	}
	return 0
}

// A lab has what a run needs.
type lab struct {
	out                          io.Writer
	cache, vmCache, runtimeCache string
	series, tests, params        string
	verbose, ownTime             bool
	cpus                         int // of the virtual machine
	limit                        time.Duration

	kubernetes string // directory of Kubernetes' programs
	qemu       *machine.QEMU
	kernel     *machine.Kernel
	containerd *containerd.Programs
}

func (l *lab) run(ctx context.Context) (r report.Run, err error) {
	r.Kernel = l.series
	for _, dir := range []*string{&l.cache, &l.vmCache, &l.runtimeCache} {
		if *dir, err = filepath.Abs(*dir); err != nil {
			return r, err
		}
		if err := os.MkdirAll(*dir, 0o755); err != nil {
			return r, err
		}
	}
	if err := l.fetch(ctx); err != nil {
		return r, err
	}
	r.Kernel = l.kernel.Release
	if err := l.build(ctx); err != nil {
		return r, err
	}
	logs := filepath.Join(l.cache, "logs")
	if err := os.RemoveAll(logs); err != nil {
		return r, err
	}
	if err := os.MkdirAll(logs, 0o755); err != nil {
		return r, err
	}
	work, err := os.MkdirTemp(l.cache, "run-")
	if err != nil {
		return r, err
	}
	defer os.RemoveAll(work)
	disk, err := l.makeDisk(ctx, work)
	if err != nil {
		return r, fmt.Errorf("make the disk: %w", err)
	}
	defer disk.Close()
	initramfs := filepath.Join(work, "initramfs")
	if err := l.makeInitramfs(ctx, initramfs); err != nil {
		return r, fmt.Errorf("make the initramfs: %w", err)
	}
	judge, err := newJudge(l.out, logs, l.verbose)
	if err != nil {
		return r, err
	}
	boot, cancel := context.WithTimeout(ctx, l.limit)
	defer cancel()
	err = l.qemu.Boot(boot, machine.Options{
		Kernel: l.kernel, Params: params + l.params, Initramfs: initramfs, Console: filepath.Join(logs, "console"), Memory: memory, CPUs: l.cpus,
		OwnTime: l.ownTime, TSC: l.ownTime, Disk: disk.Name(),
	}, judge.event)
	suite, judgeErr := judge.close()
	r.Suites = []report.Suite{suite}
	err = errors.Join(err, judgeErr)
	if c := r.Count(); err == nil && c.Failed+c.Skipped == 0 {
		return r, os.RemoveAll(logs)
	}
	return r, errors.Join(err, fmt.Errorf("logs: %s", logs))
}

// fetch gets what others have made.
func (l *lab) fetch(ctx context.Context) (err error) {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Minute)
	defer cancel()
	apt := func(cache string) *debian.APT { return &debian.APT{Dir: filepath.Join(cache, "apt"), Logf: logf} }
	vm := apt(l.vmCache)
	if l.qemu, err = machine.FetchQEMU(ctx, l.vmCache, vm); err != nil {
		return fmt.Errorf("get an emulator: %w", err)
	}
	if l.kernel, err = machine.FetchKernel(ctx, l.vmCache, vm, l.series); err != nil {
		return fmt.Errorf("get the kernel: %w", err)
	}
	if l.containerd, err = containerd.Fetch(ctx, l.runtimeCache, apt(l.runtimeCache), containerd.V2); err != nil {
		return fmt.Errorf("get containerd: %w", err)
	}
	if _, err := os.Stat(l.base()); err == nil {
		return nil
	}
	own := apt(l.cache)
	closure, err := own.Closure(ctx, release, packages...)
	if err == nil {
		err = own.Unpack(ctx, l.base(), closure)
	}
	if err != nil {
		return fmt.Errorf("get the root file system: %w", err)
	}
	return nil
}
