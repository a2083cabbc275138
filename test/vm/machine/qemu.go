// Package machine runs virtual machines on Debian's cloud kernels, without hardware
// support (QEMU's TCG): it fetches the emulator and the kernels, packs an initramfs,
// and boots.
package machine

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/skipstack/skipstack/test/debian"
	"github.com/skipstack/skipstack/test/vm/job"
)

// Architectures that can be emulated, as Go and Debian call them.
const (
	AMD64 = "amd64"
	ARM64 = "arm64"
)

// A computer is what QEMU imitates.
type computer struct {
	program, pkg string // of QEMU and of Debian
	args         []string
	console      string // the kernel's name of the first serial port
	params       string // of the kernel
}

// Mitigations, and a clock that is checked, cost much under emulation. On a busy
// machine the check of the timer fails, which is a panic.
var computers = map[string]computer{
	AMD64: {
		program: "qemu-system-x86_64", pkg: "qemu-system-x86", args: []string{"-M", "pc", "-cpu", "max"},
		console: "ttyS0", params: "mitigations=off tsc=unstable no_timer_check",
	},
	ARM64: {
		program: "qemu-system-aarch64", pkg: "qemu-system-arm", args: []string{"-M", "virt", "-cpu", "cortex-a72"},
		console: "ttyAMA0", params: "mitigations=off",
	},
}

// QEMU is an emulator with its firmware.
type QEMU struct {
	computer
	path string
	args []string
	env  []string
}

// oldest works: 7.2 of bookworm has double faults in 6.12 guests.
const oldestQEMU = 10

var qemuVersion = regexp.MustCompile(`version (\d+)\.`)

func (q *QEMU) works(ctx context.Context) bool {
	cmd := exec.CommandContext(ctx, q.path, "--version")
	cmd.Env = q.env
	out, err := cmd.Output()
	if err != nil {
		return false
	}
	m := qemuVersion.FindSubmatch(out)
	if m == nil {
		return false
	}
	major, err := strconv.Atoi(string(m[1]))
	return err == nil && major >= oldestQEMU
}

// FetchQEMU finds the machine's own emulator of its own architecture or, if that is
// missing or too old, unpacks one into the cache.
func FetchQEMU(ctx context.Context, cache string, a *debian.APT) (*QEMU, error) {
	return FetchQEMUOf(ctx, cache, a, AMD64)
}

// FetchQEMUOf is [FetchQEMU] for another architecture.
func FetchQEMUOf(ctx context.Context, cache string, a *debian.APT, arch string) (*QEMU, error) {
	c, ok := computers[arch]
	if !ok {
		return nil, fmt.Errorf("no emulator of %q is known", arch)
	}
	if path, err := exec.LookPath(c.program); err == nil {
		if q := (&QEMU{computer: c, path: path, env: os.Environ()}); q.works(ctx) {
			return q, nil
		}
	}
	dir := filepath.Join(cache, "qemu")
	if arch != AMD64 {
		dir += "-" + arch
	}
	q := &QEMU{
		computer: c,
		path:     filepath.Join(dir, "usr/bin", c.program),
		args:     []string{"-L", filepath.Join(dir, "usr/share/qemu"), "-L", filepath.Join(dir, "usr/share/seabios")},
		env: append(os.Environ(), "LD_LIBRARY_PATH="+strings.Join([]string{
			filepath.Join(dir, "lib/x86_64-linux-gnu"), filepath.Join(dir, "usr/lib/x86_64-linux-gnu"),
		}, ":")),
	}
	if q.works(ctx) {
		return q, nil
	}
	packages, err := a.Missing(ctx, true, c.pkg)
	if err != nil {
		return nil, err
	}
	if err := a.Unpack(ctx, dir, packages); err != nil {
		return nil, err
	}
	if !q.works(ctx) {
		return nil, fmt.Errorf("the emulator in %s does not start, or is older than QEMU %d", dir, oldestQEMU)
	}
	return q, nil
}

// Options describe a virtual machine.
type Options struct {
	Kernel    *Kernel
	Params    string // further parameters of the kernel
	Initramfs string // file
	Console   string // file that gets what the kernel says
	Memory    int    // MiB
	CPUs      int    // default 2
	// OwnTime makes a clock of the instructions, 2 ns each: however slow and busy the
	// computer is, time limits in the machine are kept, and waiting takes no time.
	// All its CPUs share one of the computer's.
	OwnTime bool
	// TSC lets an x86 kernel read the time from the CPU's counter, which OwnTime makes
	// exact. Programs that ask for the time all the time are faster by it.
	TSC bool
	// Disk is the image of a disk, if there is one. It is persistent memory, /dev/pmem0:
	// nothing has to be waited for, which in OwnTime would take any time. Its size is
	// a multiple of 128 MiB. The file stays as it is: what the machine writes is lost.
	Disk string
}

// Boot runs a virtual machine until it powers off. What its script's runs did goes
// to handle. It fails if the machine does not come to the end of its script before
// ctx is done, or if the kernel reports trouble on its console.
func (q *QEMU) Boot(ctx context.Context, o Options, handle func(job.Event) error) error {
	err := q.boot(ctx, o, handle)
	said, readErr := complaints(o.Console)
	if len(said) > 0 {
		err = errors.Join(err, fmt.Errorf("the kernel complained: %s", strings.Join(said, "; ")))
	}
	return errors.Join(err, readErr)
}

func (q *QEMU) boot(ctx context.Context, o Options, handle func(job.Event) error) error {
	args := slices.Concat(q.args, q.computer.args)
	if o.OwnTime {
		args = append(args, "-accel", "tcg,thread=single", "-icount", "shift=1,sleep=off")
	} else {
		args = append(args, "-accel", "tcg,thread=multi")
	}
	params := q.params
	if o.TSC {
		params = strings.Replace(params, "tsc=unstable", "tsc=reliable", 1)
	}
	memory := strconv.Itoa(o.Memory)
	if o.Disk != "" {
		info, err := os.Stat(o.Disk)
		if err != nil {
			return fmt.Errorf("find the disk: %w", err)
		}
		memory += fmt.Sprintf(",slots=1,maxmem=%dM", int64(o.Memory)+info.Size()>>20)
		args = append(args, "-machine", "nvdimm=on", "-device", "nvdimm,memdev=disk", "-object",
			fmt.Sprintf("memory-backend-file,id=disk,share=off,size=%d,mem-path=%s", info.Size(), strings.ReplaceAll(o.Disk, ",", ",,")))
	}
	args = append(args, "-smp", strconv.Itoa(cmp.Or(o.CPUs, 2)), "-m", memory,
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-serial", "file:"+o.Console,
		"-chardev", "stdio,id=results,signal=off", "-serial", "chardev:results",
		"-kernel", o.Kernel.image, "-initrd", o.Initramfs,
		"-append", "console="+q.console+" loglevel=7 panic=-1 oops=panic rdinit=/init "+params+" "+o.Params)
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	// The parent-death signal is sent when the thread that started the child ends.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd := exec.CommandContext(ctx, q.path, args...)
	cmd.Env = q.env
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	cmd.WaitDelay = 5 * time.Second
	var errs strings.Builder
	cmd.Stderr = &errs
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start the emulator: %w", err)
	}
	done := false
	err = read(bufio.NewScanner(out), func(e job.Event) error {
		switch e.Kind {
		case job.Failed:
			return errors.New(e.Text)
		case job.Done:
			done = true
		}
		return handle(e)
	})
	if err != nil {
		stop()
	}
	waitErr := cmd.Wait()
	switch {
	case err != nil:
		return err
	case ctx.Err() != nil:
		return fmt.Errorf("the virtual machine was stopped: %w", context.Cause(ctx))
	case waitErr != nil:
		return fmt.Errorf("emulator: %w: %s", waitErr, strings.TrimSpace(errs.String()))
	case !done:
		return errors.New("the virtual machine ended before its script did")
	}
	return nil
}

// read reads events. Anything else on the port is an error: it would hide one.
func read(sc *bufio.Scanner, handle func(job.Event) error) error {
	sc.Buffer(nil, 16<<20)
	for sc.Scan() {
		var e job.Event
		if err := json.Unmarshal(sc.Bytes(), &e); err != nil {
			return fmt.Errorf("the virtual machine said %q: %w", sc.Text(), err)
		}
		if err := handle(e); err != nil {
			return err
		}
	}
	return sc.Err()
}

// trouble is what a healthy kernel does not say.
var trouble = regexp.MustCompile(`WARNING: |BUG: |BUG at |Oops|Call [Tt]race:|Kernel panic|general protection fault|` +
	`double fault|invalid opcode|Unable to handle kernel|detected stall|blocked for more than|[Oo]ut of memory: |` +
	`page allocation failure|KASAN|UBSAN|refcount_t: |list_(add|del) corruption|unregister_netdevice: waiting for`)

// complaints returns the lines of a console in which the kernel reports trouble.
func complaints(console string) ([]string, error) {
	text, err := os.ReadFile(console)
	if err != nil {
		return nil, err
	}
	var found []string
	for line := range strings.Lines(string(text)) {
		if trouble.MatchString(line) {
			found = append(found, strings.TrimSpace(line))
		}
	}
	return found, nil
}
