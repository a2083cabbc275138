package cni_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/test/must"
)

// Kernels that lack something are imitated: seccomp holds a program's bpf(2) and
// mount(2) calls, and the test answers them as such a kernel does, or lets them pass.
// Processes that the program leaves behind are held, too.

// A trap is a call that is held.
type trap struct {
	nr   int32
	pid  int
	args [6]uint64
}

// memory reads what an argument points to.
func (c trap) memory(arg, size int) []byte {
	b := make([]byte, size)
	n, _ := unix.ProcessVMReadv(c.pid, []unix.Iovec{{Base: &b[0], Len: uint64(size)}}, []unix.RemoteIovec{{Base: uintptr(c.args[arg]), Len: size}}, 0)
	return b[:max(n, 0)]
}

// attr is a 32-bit member of bpf(2)'s attributes; what is beyond their size is 0.
func (c trap) attr(offset int) uint32 {
	b := make([]byte, offset+4)
	copy(b, c.memory(1, min(int(c.args[2]), len(b))))
	return binary.NativeEndian.Uint32(b[offset:])
}

// An answer is the error that a kernel gives; 0: what this one says.
type answer func(c trap) unix.Errno

// seccompData is struct seccomp_data, seccompNotif and seccompReply are struct
// seccomp_notif and seccomp_notif_resp of linux/seccomp.h.
type (
	seccompData struct {
		nr   int32
		arch uint32
		ip   uint64
		args [6]uint64
	}
	seccompNotif struct {
		id         uint64
		pid, flags uint32
		data       seccompData
	}
	seccompReply struct {
		id    uint64
		val   int64
		error int32
		flags uint32
	}
)

// trapped has seccomp hold this thread's calls from now on, and sends the descriptor
// to answer them through descriptor 3.
func trapped() error {
	load := func(offset uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: offset}
	}
	filter := []unix.SockFilter{
		load(uint32(unsafe.Offsetof(seccompData{}.nr))),
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.SYS_BPF, Jt: 2},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.SYS_MOUNT, Jt: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_USER_NOTIF},
	}
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	fd, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_NEW_LISTENER,
		uintptr(unsafe.Pointer(&program)))
	runtime.KeepAlive(filter)
	if errno != 0 {
		return fmt.Errorf("seccomp: %w", errno)
	}
	unix.CloseOnExec(3)
	return unix.Sendmsg(3, []byte{0}, unix.UnixRights(int(fd)), nil, 0)
}

// imitate answers the calls of a program that gets the file as its descriptor 3. The
// program and its like must have ended by the test's end.
func imitate(t *testing.T, a answer) *os.File {
	t.Helper()
	pair := must.Get(unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0))(t)
	theirs := os.NewFile(uintptr(pair[1]), "seccomp")
	ended := make(chan error, 1)
	go func() { ended <- serve(pair[0], a) }()
	t.Cleanup(func() {
		// Where no program has sent its listener, none will.
		must.Do(t, unix.Shutdown(pair[0], unix.SHUT_RD))
		if err := <-ended; err != nil {
			t.Error("answer a program's calls:", err)
		}
		must.Do(t, errors.Join(unix.Close(pair[0]), theirs.Close()))
	})
	return theirs
}

// serve takes the listener from the socket and answers until the last process that is
// held has ended.
func serve(socket int, a answer) error {
	oob := make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := unix.Recvmsg(socket, make([]byte, 1), oob, 0)
	if err != nil || n == 0 {
		return err
	}
	messages, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil {
		return err
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil {
		return err
	}
	defer unix.Close(fds[0])
	for {
		poll := []unix.PollFd{{Fd: int32(fds[0]), Events: unix.POLLIN}}
		if _, err := unix.Poll(poll, -1); err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
		if poll[0].Revents&unix.POLLIN == 0 {
			if poll[0].Revents&unix.POLLHUP != 0 {
				return nil
			}
			continue
		}
		var got seccompNotif
		// ENOENT: the call was given up, as by a signal.
		switch err := notif(fds[0], unix.SECCOMP_IOCTL_NOTIF_RECV, unsafe.Pointer(&got)); {
		case errors.Is(err, unix.ENOENT), errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return err
		}
		reply := seccompReply{id: got.id, flags: unix.SECCOMP_USER_NOTIF_FLAG_CONTINUE}
		if errno := a(trap{got.data.nr, int(got.pid), got.data.args}); errno != 0 {
			reply = seccompReply{id: got.id, error: -int32(errno)}
		}
		if err := notif(fds[0], unix.SECCOMP_IOCTL_NOTIF_SEND, unsafe.Pointer(&reply)); err != nil && !errors.Is(err, unix.ENOENT) {
			return err
		}
	}
}

func notif(fd int, request uintptr, arg unsafe.Pointer) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(arg)); errno != 0 {
		return errno
	}
	return nil
}
