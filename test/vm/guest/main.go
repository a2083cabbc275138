// Command guest is the first process of a virtual machine: it mounts what a node
// has, loads modules, runs the programs of a script, reports to the host and
// powers off. If the script names a disk, it leaves all but the modules to the
// system there, which starts "guest script" as a service. Started in any other way
// it is a program of such a script.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/test/vm/job"
)

func main() {
	if os.Getpid() == 1 {
		first()
		return
	}
	if len(os.Args) == 2 && os.Args[1] == "script" {
		os.Exit(service())
	}
	os.Exit(program(os.Args[1:], os.Stdout))
}

// first never returns: a first process that ends is a kernel panic.
func first() {
	out := &events{}
	err := mount("/dev", "devtmpfs", "")
	if err == nil {
		err = out.open()
	}
	if err == nil {
		err = start(out)
	}
	if err != nil {
		out.send(job.Event{Kind: job.Failed, Text: err.Error()})
	}
	out.flush()
	unix.Sync()
	err = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	panic(fmt.Sprintf("power off: %v", err))
}

func start(out *events) error {
	s, err := readScript()
	if err != nil {
		return err
	}
	if err := loadModules(s.Modules); err != nil {
		return err
	}
	if s.Disk != "" {
		return switchRoot(s.Disk)
	}
	if err := boot(); err != nil {
		return err
	}
	return runScript(out, s)
}

// service runs the script of the disk that the system was started from.
func service() int {
	out := &events{}
	err := out.open()
	if err == nil {
		var s job.Script
		if s, err = readScript(); err == nil {
			err = runScript(out, s)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		out.send(job.Event{Kind: job.Failed, Text: err.Error()})
	}
	out.flush()
	if err != nil {
		return 1
	}
	return 0
}

// switchRoot replaces the initramfs by the system on a disk, and this process by
// that system's first one. It returns only if that fails.
func switchRoot(disk string) error {
	const root = "/sysroot"
	if err := os.Mkdir(root, 0o755); err != nil {
		return err
	}
	// The kernel may still be at finding it.
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(100 * time.Millisecond) {
		err := unix.Mount(disk, root, "ext4", 0, "")
		if err == nil {
			break
		}
		if !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ENXIO) || time.Now().After(deadline) {
			return fmt.Errorf("mount %s: %w", disk, err)
		}
	}
	for _, step := range []struct {
		what string
		do   func() error
	}{
		{"move /dev", func() error { return unix.Mount("/dev", root+"/dev", "", unix.MS_MOVE, "") }},
		{"enter the new root", func() error { return unix.Chdir(root) }},
		// A root of the initramfs cannot be pivoted (Documentation/filesystems/ramfs-rootfs-initramfs.rst).
		{"move the new root", func() error { return unix.Mount(".", "/", "", unix.MS_MOVE, "") }},
		{"change the root", func() error { return unix.Chroot(".") }},
		{"start its first process", func() error { return unix.Exec("/sbin/init", []string{"/sbin/init"}, []string{"TERM=dumb"}) }},
	} {
		if err := step.do(); err != nil {
			return fmt.Errorf("%s: %w", step.what, err)
		}
	}
	return nil
}

const cgroupRoot = "/sys/fs/cgroup"

var mounts = []struct{ path, fstype, options string }{
	{"/proc", "proc", ""},
	{"/sys", "sysfs", ""},
	{cgroupRoot, "cgroup2", ""},
	{"/sys/fs/bpf", "bpf", ""},
	{"/sys/kernel/tracing", "tracefs", ""},
	{"/dev/shm", "tmpfs", ""},
	{"/tmp", "tmpfs", "mode=1777"},
	{"/run", "tmpfs", "mode=755"},
	{"/var", "tmpfs", "mode=755"},
}

func mount(path, fstype, options string) error {
	if err := os.MkdirAll(path, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(fstype, path, fstype, 0, options); err != nil {
		return fmt.Errorf("mount %s: %w", path, err)
	}
	return nil
}

func boot() error {
	for _, m := range mounts {
		if err := mount(m.path, m.fstype, m.options); err != nil {
			return err
		}
	}
	// Children of the root get every controller, as under systemd.
	controllers, err := os.ReadFile(cgroupRoot + "/cgroup.controllers")
	if err != nil {
		return err
	}
	for c := range strings.FieldsSeq(string(controllers)) {
		if err := os.WriteFile(cgroupRoot+"/cgroup.subtree_control", []byte("+"+c), 0); err != nil {
			return fmt.Errorf("enable controller %s: %w", c, err)
		}
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find lo: %w", err)
	}
	return netlink.LinkSetUp(lo)
}

func loadModules(files []string) error {
	for _, path := range files {
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		err = unix.FinitModule(int(f.Fd()), "", 0)
		f.Close()
		if err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("load module %s: %w", path, err)
		}
	}
	return nil
}

func readScript() (s job.Script, err error) {
	text, err := os.ReadFile(job.ScriptPath)
	if err != nil {
		return s, err
	}
	return s, json.Unmarshal(text, &s)
}

func runScript(out *events, s job.Script) error {
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return err
	}
	out.send(job.Event{Kind: job.Booted, Text: unix.ByteSliceToString(uts.Release[:]), Version: unix.ByteSliceToString(uts.Version[:])})
	for i, r := range s.Runs {
		// The console's reader wants to know what the kernel complains about.
		_ = os.WriteFile("/dev/kmsg", []byte("run "+r.Name+"\n"), 0)
		e := run(out, i, r)
		out.send(e)
	}
	out.send(job.Event{Kind: job.Done})
	return nil
}

func run(out *events, i int, r job.Run) job.Event {
	e := job.Event{Kind: job.Ended, Run: i, Exit: -1}
	cmd := exec.Command(r.Path, r.Args...)
	cmd.Dir = r.Dir
	cmd.Env = append([]string{"PATH=/bin", "HOME=/tmp", "TMPDIR=/tmp", "GOTRACEBACK=all"}, r.Env...)
	cmd.Stdout = runOutput{out, i}
	cmd.Stderr = cmd.Stdout
	cmd.WaitDelay = 10 * time.Second // for children that hold the pipe
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	begin := time.Now()
	if err := cmd.Start(); err != nil {
		out.send(job.Event{Kind: job.Output, Run: i, Text: err.Error() + "\n"})
		return e
	}
	overdue := time.AfterFunc(r.Timeout, func() {
		e.TimedOut = true
		// Go programs say what they were doing.
		_ = unix.Kill(-cmd.Process.Pid, unix.SIGQUIT)
		time.Sleep(10 * time.Second)
		_ = unix.Kill(-cmd.Process.Pid, unix.SIGKILL)
	})
	if err := cmd.Wait(); err == nil || cmd.ProcessState != nil {
		e.Exit = cmd.ProcessState.ExitCode()
	}
	overdue.Stop()
	e.Took = time.Since(begin)
	return e
}

// events writes to the host.
type events struct {
	mu sync.Mutex
	w  *os.File
}

func (o *events) open() error {
	f, err := os.OpenFile(job.ResultPort(), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return err
	}
	t, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	if err != nil {
		return fmt.Errorf("%s: %w", job.ResultPort(), err)
	}
	t.Oflag &^= unix.OPOST
	t.Lflag &^= unix.ECHO | unix.ICANON | unix.ISIG
	if err := unix.IoctlSetTermios(int(f.Fd()), unix.TCSETS, t); err != nil {
		return fmt.Errorf("%s: %w", job.ResultPort(), err)
	}
	o.w = f
	return nil
}

func (o *events) send(e job.Event) {
	line, err := json.Marshal(e)
	if err != nil {
		panic(err)
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.w != nil {
		_, _ = o.w.Write(append(line, '\n'))
	}
}

// flush waits until the host has everything.
func (o *events) flush() {
	if o.w != nil {
		_ = unix.IoctlSetInt(int(o.w.Fd()), unix.TCSBRK, 1) // tcdrain(3)
	}
}

type runOutput struct {
	out *events
	run int
}

func (r runOutput) Write(b []byte) (int, error) {
	r.out.send(job.Event{Kind: job.Output, Run: r.run, Text: string(b)})
	return len(b), nil
}
