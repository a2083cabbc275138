package verdict

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"time"

	"golang.org/x/sys/unix"
)

// lab is what an experiment works with.
type lab struct {
	deadline time.Time
	settle   time.Duration
}

var errDeadline = errors.New("not done in time")

// sock is a non-blocking TCP socket.
type sock struct{ fd int }

// close closes with RST, so that nothing of the connection lingers.
func (s sock) close() {
	_ = unix.SetsockoptLinger(s.fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	_ = unix.Close(s.fd)
}

// wait waits until one of the events happens, and returns what poll(2) saw.
func (l lab) wait(s sock, events int16) (int16, error) {
	for {
		left := time.Until(l.deadline)
		if left <= 0 {
			return 0, errDeadline
		}
		fds := []unix.PollFd{{Fd: int32(s.fd), Events: events}}
		n, err := unix.Poll(fds, int(left.Milliseconds())+1)
		switch {
		case err == unix.EINTR || err == nil && n == 0:
			continue
		case err != nil:
			return 0, fmt.Errorf("poll: %w", err)
		}
		return fds[0].Revents, nil
	}
}

// until repeats the check until it holds or d has passed; the deadline counts too.
func (l lab) until(d time.Duration, check func() (bool, error)) (bool, error) {
	end := time.Now().Add(d)
	if end.After(l.deadline) {
		end = l.deadline
	}
	for {
		// Before the check, which so comes once more after a stall.
		over := time.Now().After(end)
		ok, err := check()
		if ok || err != nil || over {
			return ok, err
		}
		time.Sleep(200 * time.Microsecond)
	}
}

// addresses are a listener's and the one by which a client reaches it.
type addresses struct {
	name            string
	server, clients unix.Sockaddr
	window          int // TCP_WINDOW_CLAMP of both ends, 0 for none
	buffer          int // SO_RCVBUF of both ends, 0 for what the node has
}

func overIPv4() addresses {
	return addresses{name: "IPv4",
		server:  &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}},
		clients: &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}}
}

func overIPv6() addresses {
	return addresses{name: "IPv6",
		server:  &unix.SockaddrInet6{Addr: [16]byte{15: 1}},
		clients: &unix.SockaddrInet6{Addr: [16]byte{15: 1}}}
}

func dualStack() addresses {
	return addresses{name: "IPv4 to a dual-stack listener",
		server:  &unix.SockaddrInet6{},
		clients: &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}}
}

// noIPv6 tells if connecting failed because the node has IPv6 switched off.
func noIPv6(err error) bool {
	return errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EADDRNOTAVAIL)
}

func (a addresses) newSocket(at unix.Sockaddr) (s sock, err error) {
	family := unix.AF_INET
	if _, ok := at.(*unix.SockaddrInet6); ok {
		family = unix.AF_INET6
	}
	// Only non-blocking sockets are enrolled.
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return sock{}, fmt.Errorf("socket: %w", err)
	}
	defer func() {
		if err != nil {
			unix.Close(fd)
		}
	}()
	if a.buffer > 0 {
		if err := setBuffer(fd, unix.SO_RCVBUFFORCE, unix.SO_RCVBUF, a.buffer); err != nil {
			return sock{}, fmt.Errorf("setsockopt(SO_RCVBUF): %w", err)
		}
	}
	if a.window > 0 {
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_WINDOW_CLAMP, a.window); err != nil {
			return sock{}, fmt.Errorf("setsockopt(TCP_WINDOW_CLAMP): %w", err)
		}
	}
	return sock{fd}, nil
}

// setBuffer sets a buffer's size, whatever net.core.rmem_max and wmem_max allow, if the
// caller may (CAP_NET_ADMIN). From then on TCP leaves the size alone.
func setBuffer(fd, force, option, size int) error {
	err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, force, size)
	if err == unix.EPERM {
		err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, option, size)
	}
	return err
}

// withPort returns the address with another's port.
func withPort(a, bound unix.Sockaddr) unix.Sockaddr {
	var port int
	switch b := bound.(type) {
	case *unix.SockaddrInet4:
		port = b.Port
	case *unix.SockaddrInet6:
		port = b.Port
	}
	switch a := a.(type) {
	case *unix.SockaddrInet4:
		return &unix.SockaddrInet4{Port: port, Addr: a.Addr}
	case *unix.SockaddrInet6:
		return &unix.SockaddrInet6{Port: port, Addr: a.Addr}
	}
	return a
}

// connect makes a connection within this process. Both ends must be closed.
func (l lab) connect(a addresses) (client, server sock, err error) {
	client, server, err = l.tryConnect(a)
	if err != nil {
		return sock{}, sock{}, fmt.Errorf("connect over %s: %w", a.name, err)
	}
	return client, server, nil
}

func (l lab) tryConnect(a addresses) (client, server sock, err error) {
	listener, err := a.newSocket(a.server)
	if err != nil {
		return sock{}, sock{}, err
	}
	defer unix.Close(listener.fd)
	if _, ok := a.server.(*unix.SockaddrInet6); ok {
		// Else net.ipv6.bindv6only decides.
		if err := unix.SetsockoptInt(listener.fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 0); err != nil {
			return sock{}, sock{}, fmt.Errorf("setsockopt(IPV6_V6ONLY): %w", err)
		}
	}
	if err := unix.Bind(listener.fd, a.server); err != nil {
		return sock{}, sock{}, fmt.Errorf("bind: %w", err)
	}
	if err := unix.Listen(listener.fd, 1); err != nil {
		return sock{}, sock{}, fmt.Errorf("listen: %w", err)
	}
	bound, err := unix.Getsockname(listener.fd)
	if err != nil {
		return sock{}, sock{}, fmt.Errorf("getsockname: %w", err)
	}
	client, err = a.newSocket(a.clients)
	if err != nil {
		return sock{}, sock{}, err
	}
	defer func() {
		if err != nil {
			client.close()
		}
	}()
	if err := unix.Connect(client.fd, withPort(a.clients, bound)); err != nil && err != unix.EINPROGRESS {
		return sock{}, sock{}, err
	}
	if _, err := l.wait(client, unix.POLLOUT); err != nil {
		return sock{}, sock{}, err
	}
	if errno, err := unix.GetsockoptInt(client.fd, unix.SOL_SOCKET, unix.SO_ERROR); err != nil || errno != 0 {
		return sock{}, sock{}, errors.Join(err, unix.Errno(errno))
	}
	if _, err := l.wait(listener, unix.POLLIN); err != nil {
		return sock{}, sock{}, err
	}
	fd, _, err := unix.Accept4(listener.fd, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
	if err != nil {
		return sock{}, sock{}, fmt.Errorf("accept: %w", err)
	}
	server = sock{fd}
	for _, s := range []sock{client, server} {
		// Nagle would hold back what goes by TCP until an acknowledgement
		// that may be delayed.
		if err := unix.SetsockoptInt(s.fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1); err != nil {
			server.close()
			return sock{}, sock{}, fmt.Errorf("setsockopt(TCP_NODELAY): %w", err)
		}
	}
	return client, server, nil
}

// send sends all of b, in one message if the kernel takes it.
func (l lab) send(s sock, b []byte) error {
	for len(b) > 0 {
		n, err := unix.SendmsgN(s.fd, b, nil, nil, unix.MSG_NOSIGNAL)
		switch err {
		case nil:
			b = b[n:]
		case unix.EINTR:
		case unix.EAGAIN:
			if _, err := l.wait(s, unix.POLLOUT); err != nil {
				return fmt.Errorf("send: %w", err)
			}
		default:
			return fmt.Errorf("send: %w", err)
		}
	}
	return nil
}

// recv waits for bytes and returns how many it got, or [io.EOF].
func (l lab) recv(s sock, b []byte) (int, error) {
	for {
		n, _, err := unix.Recvfrom(s.fd, b, 0)
		switch {
		case err == nil && n == 0:
			return 0, io.EOF
		case err == nil:
			return n, nil
		case err == unix.EINTR:
		case err == unix.EAGAIN:
			if _, err := l.wait(s, unix.POLLIN); err != nil {
				return 0, fmt.Errorf("receive: %w", err)
			}
		default:
			return 0, fmt.Errorf("receive: %w", err)
		}
	}
}

// errWrong is a fault: bytes are missing, changed, repeated or out of order.
var errWrong = errors.New("bytes arrived wrong")

// expect receives exactly the bytes of want.
func (l lab) expect(s sock, want []byte) error {
	buf := make([]byte, len(want))
	for got := 0; got < len(want); {
		n, err := l.recv(s, buf[got:])
		if err == io.EOF {
			return fmt.Errorf("%w: end of stream after %d of %d bytes", errWrong, got, len(want))
		}
		if err != nil {
			return fmt.Errorf("%w (after %d of %d bytes)", err, got, len(want))
		}
		got += n
	}
	if !bytes.Equal(buf, want) {
		return fmt.Errorf("%w: the content of %d bytes differs", errWrong, len(want))
	}
	return nil
}

// expectEOF receives the end of the stream and nothing else.
func (l lab) expectEOF(s sock) error {
	n, err := l.recv(s, make([]byte, 16))
	if err == io.EOF {
		return nil
	}
	if err != nil {
		return err
	}
	return fmt.Errorf("%w: %d bytes too many", errWrong, n)
}

// byTCP is how many bytes TCP has carried for this sender, without repetitions.
// Redirected bytes do not count.
func byTCP(s sock) (uint64, error) {
	info, err := unix.GetsockoptTCPInfo(s.fd, unix.IPPROTO_TCP, unix.TCP_INFO)
	if err != nil {
		return 0, fmt.Errorf("getsockopt(TCP_INFO): %w", err)
	}
	return info.Bytes_sent - info.Bytes_retrans, nil
}

// unacknowledged is how many bytes sent by TCP have not arrived.
func unacknowledged(s sock) (int, error) {
	n, err := unix.IoctlGetInt(s.fd, unix.SIOCOUTQ)
	if err != nil {
		return 0, fmt.Errorf("ioctl(SIOCOUTQ): %w", err)
	}
	return n, nil
}

// waiting is what FIONREAD says.
func waiting(s sock) (int, error) {
	n, err := unix.IoctlGetInt(s.fd, unix.SIOCINQ) // the same number
	if err != nil {
		return 0, fmt.Errorf("ioctl(FIONREAD): %w", err)
	}
	return n, nil
}

// charged is the memory that the kernel charges to the receiver for what it has
// not read.
func charged(s sock) (int, error) {
	// The option returns an array of which SK_MEMINFO_RMEM_ALLOC comes first.
	n, err := unix.GetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_MEMINFO)
	if err != nil {
		return 0, fmt.Errorf("getsockopt(SO_MEMINFO): %w", err)
	}
	return n, nil
}

// patternLength is a prime, so that bytes that are out of place by any round
// number are seen.
const patternLength = 65521

// pattern is an endless stream of known bytes.
type pattern []byte

func newPattern(seed uint64) pattern {
	p := make(pattern, patternLength)
	var key [32]byte
	key[0], key[1] = byte(seed), byte(seed>>8)
	rand.NewChaCha8(key).Read(p)
	return p
}

// at returns up to n bytes of the stream from an offset on.
func (p pattern) at(offset, n int) []byte {
	b := p[offset%len(p):]
	return b[:min(n, len(b))]
}

// matches tells if b is what the stream has at the offset.
func (p pattern) matches(offset int, b []byte) bool {
	for len(b) > 0 {
		want := p.at(offset, len(b))
		if !bytes.Equal(want, b[:len(want)]) {
			return false
		}
		offset += len(want)
		b = b[len(want):]
	}
	return true
}
