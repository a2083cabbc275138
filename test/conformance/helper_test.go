package conformance

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/test/node"
)

// helperName is a process outside the pods that gets a socket as descriptor
// socketFD, or a control socket as controlFD, does something and prints what it saw.
const (
	helperName = "helper"
	socketFD   = 3
	controlFD  = 3
)

func helper(args []string) int {
	say := func(n int, err error) int {
		fmt.Println(outcome(n, err))
		return 0
	}
	switch args[0] {
	case "send-nosignal":
		defaultAction(unix.SIGPIPE)
		return say(unix.SendmsgN(socketFD, []byte("x"), nil, nil, unix.MSG_NOSIGNAL))
	case "write-default-sigpipe":
		defaultAction(unix.SIGPIPE)
		return say(unix.Write(socketFD, []byte("x")))
	case "read-60":
		return say(unix.Read(socketFD, make([]byte, 60)))
	case "send-40":
		return say(unix.Write(socketFD, bytesAt(0, 40)))
	case "hold":
		fmt.Println("holds")
		_, _ = io.Copy(io.Discard, os.Stdin)
		return 0
	case "passed":
		return passed()
	}
	return 2
}

// passed takes a descriptor from the control socket and echoes until the end.
func passed() int {
	oob := make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := unix.Recvmsg(controlFD, make([]byte, 1), oob, 0)
	if err != nil {
		fmt.Println(err)
		return 1
	}
	messages, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(messages) != 1 {
		fmt.Println(messages, err)
		return 1
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil {
		fmt.Println(err)
		return 1
	}
	f := os.NewFile(uintptr(fds[0]), "socket")
	buf, total := make([]byte, 64<<10), 0
	for {
		n, err := f.Read(buf)
		if n > 0 {
			if _, err := f.Write(buf[:n]); err != nil {
				fmt.Println(err)
				return 1
			}
			total += n
		}
		if errors.Is(err, io.EOF) {
			fmt.Println(total, "bytes echoed")
			return 0
		}
		if err != nil {
			fmt.Println(err)
			return 1
		}
	}
}

// defaultAction gives a signal its default action, which Go's own handler hides.
func defaultAction(sig unix.Signal) {
	signal.Reset(sig)
	var action [4]uint64
	_, _, _ = unix.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(sig), uintptr(unsafe.Pointer(&action)), 0, 8, 0, 0)
}

// A running is a helper process.
type running struct {
	c       *trial
	cmd     *exec.Cmd
	in      io.WriteCloser
	text    *strings.Builder
	control int // the test's end of its control socket
}

// startHelper starts a helper that shares the descriptor, or has a control
// socket if fd is -1. It is gone when the trial is over.
func (c *trial) startHelper(what string, fd int) *running {
	h := &running{c: c, cmd: node.WorkerCommand(helperName, what), text: &strings.Builder{}, control: -1}
	var share int
	if fd < 0 {
		pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
		c.check(err)
		h.control, share = pair[0], pair[1]
		c.later(func() { unix.Close(h.control) })
	} else {
		dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		c.check(err)
		share = dup
	}
	// os.NewFile of a non-blocking socket would hand it to Go's poller, whose
	// Fd makes it blocking; that is another file status than the test's.
	f := os.NewFile(uintptr(share), "shared")
	defer f.Close()
	h.cmd.ExtraFiles = []*os.File{f}
	h.cmd.Stdout = h.text
	var err error
	h.in, err = h.cmd.StdinPipe()
	c.check(err)
	var flags int
	if fd >= 0 {
		flags, err = unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
		c.check(err)
	}
	c.check(h.cmd.Start())
	if fd >= 0 {
		now, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
		c.check(err)
		if now != flags {
			_, err = unix.FcntlInt(uintptr(fd), unix.F_SETFL, flags)
			c.check(err)
		}
	}
	c.later(func() {
		_ = h.cmd.Process.Kill()
		_ = h.cmd.Wait()
	})
	return h
}

// wait returns what the helper printed, or the signal that ended it.
func (h *running) wait() string {
	err := h.cmd.Wait()
	if s, ok := h.cmd.ProcessState.Sys().(syscall.WaitStatus); ok && s.Signaled() {
		return unix.SignalName(s.Signal())
	}
	if err != nil {
		h.c.fatalf("helper: %w: %s", err, h.text)
	}
	return strings.TrimSpace(h.text.String())
}

// kill kills the helper and waits for its end.
func (h *running) kill() {
	h.c.check(h.cmd.Process.Kill())
	_ = h.cmd.Wait()
}

// help runs a helper that shares the descriptor to its end.
func (c *trial) help(what string, fd int) string { return c.startHelper(what, fd).wait() }
