package bench

import (
	"errors"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A socket is a TCP socket that is driven by raw system calls: no netpoller, and no
// Go scheduler between two calls of a loop, so that a generator does what one in
// C does. The thread must be locked, and the collector and the asynchronous
// preemption be off (workerEnv), as nothing can stop a thread that is
// blocked in a raw system call.
type socket struct {
	fd          int
	local       bool // AF_UNIX
	nonBlocking bool

	sent, received uint64 // payload bytes
	again          uint64 // EAGAIN from a blocking socket; see recv
}

func newSocket(domain int, nonBlocking bool) (*socket, error) {
	kind := unix.SOCK_STREAM | unix.SOCK_CLOEXEC
	if nonBlocking {
		kind |= unix.SOCK_NONBLOCK
	}
	fd, err := unix.Socket(domain, kind, 0)
	if err != nil {
		return nil, fmt.Errorf("open a socket: %w", err)
	}
	return &socket{fd: fd, local: domain == unix.AF_UNIX, nonBlocking: nonBlocking}, nil
}

// setNoDelay does nothing to an AF_UNIX socket, which has no delay.
func (s *socket) setNoDelay() error {
	if s.local {
		return nil
	}
	if err := unix.SetsockoptInt(s.fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1); err != nil {
		return fmt.Errorf("set TCP_NODELAY: %w", err)
	}
	return nil
}

// setCongestionControl leaves the network namespace's default if name is empty, and
// does nothing to an AF_UNIX socket. Accepted sockets inherit it from a listener
// that it was set on (tcp_ca_openreq_child()).
func (s *socket) setCongestionControl(name string) error {
	if s.local || name == "" {
		return nil
	}
	if err := unix.SetsockoptString(s.fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION, name); err != nil {
		return fmt.Errorf("set congestion control %s: %w", name, err)
	}
	return nil
}

// listen binds to an address and returns the port, which the kernel chooses if it is 0.
func (s *socket) listen(at endpoint) (uint16, error) {
	sa := at.sockaddr()
	if _, _, e := unix.RawSyscall(unix.SYS_BIND, uintptr(s.fd), uintptr(unsafe.Pointer(&sa[0])), uintptr(len(sa))); e != 0 {
		return 0, fmt.Errorf("bind to %s: %w", at, e)
	}
	if err := unix.Listen(s.fd, backlog); err != nil {
		return 0, fmt.Errorf("listen: %w", err)
	}
	bound, err := unix.Getsockname(s.fd)
	if err != nil {
		return 0, fmt.Errorf("read the port: %w", err)
	}
	switch bound := bound.(type) {
	case *unix.SockaddrInet4:
		return uint16(bound.Port), nil
	case *unix.SockaddrInet6:
		return uint16(bound.Port), nil
	}
	return 0, nil
}

// backlog has room for all connections of a point at once.
const backlog = 1024

// errStopped is returned by accept after the listener was shut down.
var errStopped = errors.New("the listener was shut down")

func (s *socket) accept() (*socket, error) {
	for {
		accepted, e := s.tryAccept()
		switch e {
		case 0:
			return accepted, nil
		case unix.EINVAL:
			return nil, errStopped
		case unix.EAGAIN:
			s.poll(unix.POLLIN)
		case unix.EINTR, unix.ECONNABORTED:
		default:
			return nil, fmt.Errorf("accept: %w", e)
		}
	}
}

func (s *socket) tryAccept() (*socket, unix.Errno) {
	flags := uintptr(unix.SOCK_CLOEXEC)
	if s.nonBlocking {
		flags |= unix.SOCK_NONBLOCK
	}
	fd, _, e := unix.RawSyscall6(unix.SYS_ACCEPT4, uintptr(s.fd), 0, 0, flags, 0, 0)
	if e != 0 {
		return nil, e
	}
	return &socket{fd: int(fd), local: s.local, nonBlocking: s.nonBlocking}, 0
}

func (s *socket) connect(sa []byte) error {
	_, _, e := unix.RawSyscall(unix.SYS_CONNECT, uintptr(s.fd), uintptr(unsafe.Pointer(&sa[0])), uintptr(len(sa)))
	if e == unix.EINPROGRESS {
		s.poll(unix.POLLOUT)
		code, err := unix.GetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_ERROR)
		if err != nil {
			return fmt.Errorf("connect: %w", err)
		}
		e = unix.Errno(code)
	}
	if e != 0 {
		return fmt.Errorf("connect: %w", e)
	}
	return nil
}

// poll waits for the socket.
func (s *socket) poll(events int16) {
	p := unix.PollFd{Fd: int32(s.fd), Events: events}
	unix.RawSyscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&p)), 1, 0, 0, 0, 0)
}

// recv reads once. It returns 0 at the end of the stream.
//
// A blocking recv on an accelerated socket may return EAGAIN when it is woken
// without data; one reader and no signals make that
// rare here, and trying again is right.
func (s *socket) recv(buf []byte) (int, error) {
	for {
		n, _, e := unix.RawSyscall6(unix.SYS_RECVFROM, uintptr(s.fd), uintptr(unsafe.Pointer(&buf[0])), uintptr(len(buf)), 0, 0, 0)
		if e == 0 {
			s.received += uint64(n)
			return int(n), nil
		}
		if err := s.retry(e, unix.POLLIN); err != nil {
			return 0, fmt.Errorf("receive: %w", err)
		}
	}
}

// recvFull fills buf. It returns false if the stream ends before its first byte.
func (s *socket) recvFull(buf []byte) (bool, error) {
	for got := 0; got < len(buf); {
		n, err := s.recv(buf[got:])
		if err != nil {
			return false, err
		}
		if n == 0 {
			if got == 0 {
				return false, nil
			}
			return false, fmt.Errorf("receive: the stream ended after %d of %d bytes", got, len(buf))
		}
		got += n
	}
	return true, nil
}

// send writes all of buf.
func (s *socket) send(buf []byte) error {
	for len(buf) > 0 {
		n, _, e := unix.RawSyscall6(unix.SYS_SENDTO, uintptr(s.fd), uintptr(unsafe.Pointer(&buf[0])), uintptr(len(buf)), unix.MSG_NOSIGNAL, 0, 0)
		if e == 0 {
			s.sent += uint64(n)
			buf = buf[n:]
			continue
		}
		if err := s.retry(e, unix.POLLOUT); err != nil {
			return fmt.Errorf("send: %w", err)
		}
	}
	return nil
}

// retry returns nil if the call that returned e is to be tried again.
func (s *socket) retry(e unix.Errno, events int16) error {
	switch {
	case e == unix.EINTR:
	case e == unix.EAGAIN && s.nonBlocking:
		s.poll(events)
	case e == unix.EAGAIN:
		s.again++
	default:
		return e
	}
	return nil
}

func (s *socket) shutdownWrite() error {
	if err := unix.Shutdown(s.fd, unix.SHUT_WR); err != nil {
		return fmt.Errorf("shut down sending: %w", err)
	}
	return nil
}

func (s *socket) close() {
	unix.RawSyscall(unix.SYS_CLOSE, uintptr(s.fd), 0, 0)
}

// tcpSent returns how many payload bytes went out by TCP, without retransmissions.
// Redirected bytes are not among them; those of an AF_UNIX socket neither.
func (s *socket) tcpSent() (uint64, error) {
	if s.local {
		return 0, nil
	}
	info, err := unix.GetsockoptTCPInfo(s.fd, unix.IPPROTO_TCP, unix.TCP_INFO)
	if err != nil {
		return 0, fmt.Errorf("read TCP_INFO: %w", err)
	}
	return info.Bytes_sent - info.Bytes_retrans, nil
}
