// Package trace runs a program and stops it between any two system calls, for tests
// of what is left when a process is killed or gets stuck.
package trace

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A Fate is what becomes of a traced program at a system call.
type Fate int

const (
	GoOn  Fate = iota
	Kill       // SIGKILL, before the call is made
	Stick      // SIGSTOP, before the call is made
)

// A Step is a system call that a traced program is about to make.
type Step struct {
	Nr   uint64
	Args [6]uint64
}

// Changes says whether the call changes something that others see: files, pins,
// locks, BPF objects, processes. Between two of those a program may be killed
// anywhere with the same outcome.
func (c Step) Changes() bool {
	switch c.Nr {
	case unix.SYS_OPENAT:
		return c.Args[2]&unix.O_CREAT != 0
	case unix.SYS_CLONE: // a process, not a thread
		return c.Args[0]&unix.CLONE_VFORK != 0
	case unix.SYS_BPF:
		switch c.Args[0] {
		case unix.BPF_MAP_CREATE, unix.BPF_MAP_UPDATE_ELEM, unix.BPF_MAP_DELETE_ELEM, unix.BPF_PROG_LOAD, unix.BPF_OBJ_PIN,
			unix.BPF_PROG_ATTACH, unix.BPF_LINK_CREATE, unix.BPF_LINK_UPDATE:
			return true
		}
		return false
	case unix.SYS_MKDIRAT, unix.SYS_RENAMEAT, unix.SYS_RENAMEAT2, unix.SYS_UNLINKAT, unix.SYS_LINKAT, unix.SYS_FLOCK,
		unix.SYS_WRITE, unix.SYS_PWRITE64, unix.SYS_FTRUNCATE, unix.SYS_MOUNT, unix.SYS_CLONE3, unix.SYS_EXIT_GROUP:
		return true
	}
	return false
}

// Touches says whether the call looks at files or BPF objects, or changes them.
func (c Step) Touches() bool {
	switch c.Nr {
	case unix.SYS_OPENAT, unix.SYS_OPENAT2, unix.SYS_READ, unix.SYS_PREAD64, unix.SYS_GETDENTS64, unix.SYS_STATFS, unix.SYS_BPF:
		return true
	}
	return c.Changes()
}

// Run runs a program with no arguments but its name and asks at each of its system
// calls what is to become of it. A program that sticks is left so until end is
// called, which kills it; any other has ended when Run returns, and end does nothing.
func Run(program string, attr os.ProcAttr, at func(Step) Fate) (status syscall.WaitStatus, end func(), err error) {
	t := &tracer{program: program, attr: attr, at: at}
	outcome, resume, done := make(chan error), make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		// Only the thread that started the program may trace it.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := t.run()
		outcome <- err
		if t.stuck {
			<-resume
		}
		if t.pid != 0 && (t.stuck || err != nil) {
			t.reap()
		}
	}()
	if err := <-outcome; err != nil {
		<-done
		return 0, func() {}, err
	}
	end = func() {
		if t.stuck {
			close(resume)
		}
		<-done
	}
	if t.stuck {
		return 0, end, nil
	}
	end()
	return t.status, func() {}, nil
}

// tracer traces one process. Its methods are called on one thread.
type tracer struct {
	program string
	attr    os.ProcAttr
	at      func(Step) Fate
	pid     int
	status  syscall.WaitStatus
	stuck   bool
}

// run runs the program until it ends or gets stuck.
func (t *tracer) run() error {
	// A group of its own tells its threads from other children of this process.
	t.attr.Sys = &syscall.SysProcAttr{Ptrace: true, Setpgid: true}
	p, err := os.StartProcess(t.program, []string{t.program}, &t.attr)
	if err != nil {
		return err
	}
	t.pid = p.Pid
	_ = p.Release()
	for first := true; ; first = false {
		tid, ws, err := t.wait()
		if err != nil {
			return err
		}
		if ws.Exited() || ws.Signaled() {
			if tid == t.pid {
				t.status = ws
				return nil
			}
			continue // one of its threads
		}
		if first {
			const options = unix.PTRACE_O_TRACESYSGOOD | unix.PTRACE_O_TRACECLONE | unix.PTRACE_O_EXITKILL
			if err := unix.PtraceSetOptions(tid, options); err != nil {
				return fmt.Errorf("trace: %w", err)
			}
		}
		signal := 0
		switch s := ws.StopSignal(); s {
		case unix.SIGTRAP | 0x80:
			call, entered, err := syscallInfo(tid)
			if err != nil || !entered {
				break
			}
			switch t.at(call) {
			case Kill:
				err = unix.Kill(t.pid, unix.SIGKILL)
			case Stick:
				// This thread stays in its stop; the others meet the signal, or
				// a system call, and nobody lets them go on.
				t.stuck = true
				return unix.Kill(t.pid, unix.SIGSTOP)
			}
			if err != nil {
				return fmt.Errorf("trace: %w", err)
			}
		case unix.SIGTRAP, unix.SIGSTOP: // exec, a new thread
		default:
			signal = int(s)
		}
		if err := unix.PtraceSyscall(tid, signal); err != nil && !errors.Is(err, unix.ESRCH) { // killed meanwhile
			return fmt.Errorf("trace: %w", err)
		}
	}
}

func (t *tracer) wait() (tid int, ws syscall.WaitStatus, err error) {
	for {
		tid, err = syscall.Wait4(-t.pid, &ws, unix.WALL, nil)
		if !errors.Is(err, unix.EINTR) {
			return tid, ws, err
		}
	}
}

// reap kills the program and waits for its end.
func (t *tracer) reap() {
	_ = unix.Kill(t.pid, unix.SIGKILL)
	for {
		tid, ws, err := t.wait()
		if err != nil || tid == t.pid && (ws.Exited() || ws.Signaled()) {
			return
		}
	}
}

// syscallInfo is PTRACE_GET_SYSCALL_INFO, which is the same on all architectures.
func syscallInfo(tid int) (call Step, entered bool, err error) {
	// struct ptrace_syscall_info, include/uapi/linux/ptrace.h
	var info struct {
		op     uint8
		arch   uint32
		ip, sp uint64
		nr     uint64
		args   [6]uint64
		_      uint64
	}
	const request, entry = 0x420e, 1
	_, _, errno := unix.Syscall6(unix.SYS_PTRACE, request, uintptr(tid), unsafe.Sizeof(info), uintptr(unsafe.Pointer(&info)), 0, 0)
	if errno != 0 {
		return Step{}, false, errno
	}
	return Step{info.nr, info.args}, info.op == entry, nil
}
