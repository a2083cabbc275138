package traffic

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// patience is how long connecting and accepting may take, with a segment that is lost and
// node.SlowHandshakes.
const patience = 3 * time.Minute

// SocketOptions describe a socket that is listened on or connected.
type SocketOptions struct {
	Family   int // default: the address's; AF_INET6 with an IPv4 address maps it
	MPTCP    bool
	Blocking bool               // leaves O_NONBLOCK off
	From     netip.AddrPort     // what a client binds to
	Setup    func(fd int) error // before bind, listen and connect
}

// A Conn is a connected socket. Its File reads and writes through Go's poller
// and has deadlines, unless the socket is blocking; FD is for system calls.
type Conn struct {
	*os.File
	FD int
}

// A Listener is a listening socket.
type Listener struct {
	Addr netip.AddrPort
	FD   int
}

func (h *Host) open(addr netip.AddrPort, o *SocketOptions) (int, error) {
	if o.Family == 0 {
		o.Family = unix.AF_INET
		if addr.Addr().Is6() {
			o.Family = unix.AF_INET6
		}
	}
	typ, protocol := unix.SOCK_STREAM, unix.IPPROTO_TCP
	if !o.Blocking {
		typ |= unix.SOCK_NONBLOCK
	}
	if o.MPTCP {
		protocol = unix.IPPROTO_MPTCP
	}
	fd, err := h.Socket(o.Family, typ, protocol)
	if err != nil {
		return -1, err
	}
	err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	if err == nil && o.Setup != nil {
		err = o.Setup(fd)
	}
	if err == nil && o.From.IsValid() {
		err = unix.Bind(fd, sockaddr(o.From, o.Family))
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// Listen listens in the pod. Port 0 takes a free one; an AF_INET6 listener takes
// IPv4 clients too. The caller closes it.
func (h *Host) Listen(addr netip.AddrPort, o SocketOptions) (*Listener, error) {
	fd, err := h.open(addr, &o)
	if err == nil && o.Family == unix.AF_INET6 {
		err = unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 0)
	}
	if err == nil {
		err = unix.Bind(fd, sockaddr(addr, o.Family))
	}
	if err == nil {
		err = unix.Listen(fd, 1024)
	}
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", addr, err)
	}
	bound, err := unix.Getsockname(fd)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", addr, err)
	}
	return &Listener{Addr: netip.AddrPortFrom(addr.Addr(), addrPort(bound).Port()), FD: fd}, nil
}

// Close closes the listener.
func (l *Listener) Close() error { return unix.Close(l.FD) }

// Accept takes the next connection, non-blocking. The caller closes it.
func (l *Listener) Accept() (*Conn, error) {
	for deadline := time.Now().Add(patience); ; {
		ready, err := Poll(l.FD, unix.POLLIN, time.Until(deadline))
		if err == nil && ready == 0 {
			err = os.ErrDeadlineExceeded
		}
		if err != nil {
			return nil, fmt.Errorf("accept on %s: %w", l.Addr, err)
		}
		fd, _, err := unix.Accept4(l.FD, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("accept on %s: %w", l.Addr, err)
		}
		return NewConn(fd), nil
	}
}

// NewConn makes a Conn of a descriptor, which it owns.
func NewConn(fd int) *Conn { return &Conn{File: os.NewFile(uintptr(fd), "socket"), FD: fd} }

// Connect starts to connect from the pod and does not wait for the outcome: see
// [Conn.Connected]. The caller closes the connection.
func (h *Host) Connect(to netip.AddrPort, o SocketOptions) (*Conn, error) {
	fd, err := h.open(to, &o)
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", to, err)
	}
	err = retry(func() error { return unix.Connect(fd, sockaddr(to, o.Family)) })
	if err != nil && !errors.Is(err, unix.EINPROGRESS) {
		unix.Close(fd)
		return nil, fmt.Errorf("connect to %s: %w", to, err)
	}
	return NewConn(fd), nil
}

// Connected waits until the connection is made or has failed.
func (c *Conn) Connected() error {
	ready, err := Poll(c.FD, unix.POLLOUT, patience)
	if err != nil {
		return err
	}
	if ready == 0 {
		return fmt.Errorf("connect: %w", os.ErrDeadlineExceeded)
	}
	return c.Err()
}

// Dial connects from the pod. The caller closes the connection.
func (h *Host) Dial(to netip.AddrPort, o SocketOptions) (*Conn, error) {
	c, err := h.Connect(to, o)
	if err != nil {
		return nil, err
	}
	if err := c.Connected(); err != nil {
		c.Close()
		return nil, fmt.Errorf("connect to %s: %w", to, err)
	}
	return c, nil
}

// Pair connects from the host to the listener by way of the given address and
// accepts, for listeners with no other clients. The caller closes both ends.
func (h *Host) Pair(l *Listener, by netip.AddrPort, o SocketOptions) (client, server *Conn, err error) {
	if client, err = h.Dial(by, o); err != nil {
		return nil, nil, err
	}
	if server, err = l.Accept(); err != nil {
		client.Close()
		return nil, nil, err
	}
	return client, server, nil
}

// Err is the pending error of the socket (SO_ERROR), which it clears.
func (c *Conn) Err() error {
	n, err := unix.GetsockoptInt(c.FD, unix.SOL_SOCKET, unix.SO_ERROR)
	if err != nil {
		return fmt.Errorf("read SO_ERROR: %w", err)
	}
	if n != 0 {
		return unix.Errno(n)
	}
	return nil
}

// CloseWrite is shutdown(SHUT_WR).
func (c *Conn) CloseWrite() error { return unix.Shutdown(c.FD, unix.SHUT_WR) }

// Reset closes the connection with RST.
func (c *Conn) Reset() error {
	err := unix.SetsockoptLinger(c.FD, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	return errors.Join(err, c.Close())
}

// Unread is what ioctl(FIONREAD) says: bytes that can be read.
func (c *Conn) Unread() (int, error) { return unix.IoctlGetInt(c.FD, unix.TIOCINQ) }

// Info is TCP_INFO, which counts only what went by TCP.
func (c *Conn) Info() (*unix.TCPInfo, error) {
	return unix.GetsockoptTCPInfo(c.FD, unix.IPPROTO_TCP, unix.TCP_INFO)
}

// Set sets an integer option of IPPROTO_TCP.
func (c *Conn) Set(option, value int) error {
	return unix.SetsockoptInt(c.FD, unix.IPPROTO_TCP, option, value)
}

// Local and Remote are the addresses of the connection's ends.
func (c *Conn) Local() netip.AddrPort {
	sa, err := unix.Getsockname(c.FD)
	if err != nil {
		return netip.AddrPort{}
	}
	return addrPort(sa)
}

func (c *Conn) Remote() netip.AddrPort {
	sa, err := unix.Getpeername(c.FD)
	if err != nil {
		return netip.AddrPort{}
	}
	return addrPort(sa)
}

// Poll waits for events on a descriptor and returns those that are there, 0 after
// the given time.
func Poll(fd int, events int16, wait time.Duration) (int16, error) {
	for deadline := time.Now().Add(wait); ; {
		p := []unix.PollFd{{Fd: int32(fd), Events: events}}
		_, err := unix.Poll(p, max(0, int(time.Until(deadline).Milliseconds())))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return 0, fmt.Errorf("poll: %w", err)
		}
		return p[0].Revents, nil
	}
}

// A Filler writes a stream to a connection for as long as the socket takes it.
type Filler struct {
	Conn    *Conn
	Stream  *Stream
	Total   int64 // bytes that were taken
	pending []byte
	buf     [64 << 10]byte
}

// Fill writes messages of the given size, up to 64 KiB, until the socket refuses
// one or has taken so many. It does not wait.
func (f *Filler) Fill(size, messages int) (refused bool, err error) {
	for messages > 0 {
		if len(f.pending) == 0 {
			f.pending = f.buf[:len(f.buf)/size*size]
			f.Stream.Next(f.pending)
		}
		n, err := unix.Write(f.Conn.FD, f.pending[:min(size, len(f.pending))])
		switch {
		case err == nil:
			f.pending = f.pending[n:]
			f.Total += int64(n)
			messages--
		case errors.Is(err, unix.EAGAIN):
			return true, nil
		case !errors.Is(err, unix.EINTR):
			return false, err
		}
	}
	return false, nil
}

func sockaddr(a netip.AddrPort, family int) unix.Sockaddr {
	if family == unix.AF_INET6 {
		return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
	}
	return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
}

func addrPort(sa unix.Sockaddr) netip.AddrPort {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), uint16(sa.Port))
	}
	return netip.AddrPort{}
}
