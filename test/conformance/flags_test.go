package conformance

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	soPeekOff = 42 // SO_PEEK_OFF
	sioATMark = 0x8905
)

var flags = []behaviour{
	{name: "MSG_PEEK", does: "bytes stay, however often they are looked at, also across messages", run: func(c *trial) {
		a, b := c.pair()
		b.deliver(10)
		c.note("%s", a.recv(4, unix.MSG_PEEK))
		c.note("%s", a.recv(100, unix.MSG_PEEK))
		b.deliver(20)
		c.note("%s", a.recv(100, unix.MSG_PEEK))
		c.note("read %s", a.recv(4, 0))
		c.note("%s", a.recv(100, unix.MSG_PEEK))
		c.note("read %s", a.recv(100, 0))
		c.note("%s", a.recv(100, unix.MSG_PEEK))
	}},
	{name: "MSG_PEEK at the end", does: "the end can be looked at", run: func(c *trial) {
		a, b := c.pair()
		b.write(10)
		b.close()
		a.await(unix.POLLRDHUP)
		c.note("%s", a.recv(100, unix.MSG_PEEK))
		c.note("%s", a.recv(100, 0))
		c.note("%s", a.recv(100, unix.MSG_PEEK))
		c.note("%s", a.recv(100, 0))
	}},
	{name: "SO_PEEK_OFF", does: "MSG_PEEK from an offset that advances (Linux 6.9 for TCP)", run: func(c *trial) {
		a, b := c.pair()
		if err := unix.SetsockoptInt(a.fd, unix.SOL_SOCKET, soPeekOff, 3); err != nil {
			c.note("%s", errName(err))
			b.deliver(10)
			return
		}
		b.deliver(10)
		c.note("%s", peeked(a))
		c.note("%s", peeked(a))
		c.note("%s", peeked(a))
		a.recv(100, 0)
	}},
	{name: "MSG_TRUNC", does: "bytes are dropped and counted; the buffer is left alone", run: func(c *trial) {
		a, b := c.pair()
		b.deliver(100)
		buf := make([]byte, 60)
		n, _, err := unix.Recvfrom(a.fd, buf, unix.MSG_TRUNC)
		c.note("%s", outcome(n, err))
		c.note("buffer untouched: %t", string(buf) == string(make([]byte, 60)))
		a.got += 60
		c.note("then %s", a.recv(100, 0))
	}},
	{name: "MSG_TRUNC without a buffer", does: "recv(fd, NULL, 60, MSG_TRUNC) drops 60 bytes", run: func(c *trial) {
		a, b := c.pair()
		b.deliver(100)
		n, _, errno := unix.Syscall6(unix.SYS_RECVFROM, uintptr(a.fd), 0, 60, unix.MSG_TRUNC, 0, 0)
		c.note("%s", rawOutcome(n, errno))
		if errno == 0 {
			a.got += int64(n)
		}
		c.note("then %s", a.recv(1000, 0))
	}},
	{name: "MSG_WAITALL", does: "a blocking recv waits until its buffer is full", run: func(c *trial) {
		a, b := c.blockingPair()
		k := c.start(unix.SYS_RECVFROM, func() string { return a.recv(100, unix.MSG_WAITALL) })
		k.mustBlock()
		b.deliver(40)
		if !k.blocked() {
			c.note("%s", k.result())
			return
		}
		b.deliver(60)
		c.note("%s", k.result())
	}},
	{name: "MSG_WAITALL and the end", does: "what came before the end is returned", run: func(c *trial) {
		a, b := c.blockingPair()
		b.write(40)
		b.close()
		a.await(unix.POLLRDHUP)
		c.note("%s", a.recv(100, unix.MSG_WAITALL))
		c.note("%s", a.recv(100, unix.MSG_WAITALL))
	}},
	{name: "MSG_WAITALL, non-blocking", does: "takes what is there", run: func(c *trial) {
		a, b := c.pair()
		b.deliver(40)
		c.note("%s", a.recv(100, unix.MSG_WAITALL))
		c.note("%s", a.recv(100, unix.MSG_WAITALL))
	}},
	{name: "MSG_MORE", does: "bytes sent with MSG_MORE arrive with the next ones at the latest", run: func(c *trial) {
		a, b := c.pair()
		c.note("%s", a.send(10, unix.MSG_MORE))
		c.note("%s", a.send(10, unix.MSG_MORE))
		c.note("%s", a.send(10, 0))
		b.read(30)
		c.note("all arrive")
		c.note("%s", a.send(10, unix.MSG_MORE))
		b.read(10)
		c.note("and without next ones")
	}},
	{name: "TCP_CORK", does: "bytes sent while corked arrive when the cork is out, and a while later anyway", run: func(c *trial) {
		a, b := c.pair()
		a.set(unix.IPPROTO_TCP, unix.TCP_CORK, 1)
		a.write(10)
		a.write(10)
		a.set(unix.IPPROTO_TCP, unix.TCP_CORK, 0)
		b.read(20)
		a.set(unix.IPPROTO_TCP, unix.TCP_CORK, 1)
		a.write(10)
		b.read(10)
		c.note("all arrive")
	}},
	{name: "TCP_CORK and the end", does: "bytes sent while corked arrive before the end", run: func(c *trial) {
		a, b := c.pair()
		a.set(unix.IPPROTO_TCP, unix.TCP_CORK, 1)
		a.write(3000)
		a.close()
		b.read(3000)
		b.readEnd()
		c.note("all arrive")
	}},
	{name: "SO_RCVLOWAT", does: "set on a connected socket: not readable before so many bytes are there", run: func(c *trial) {
		a, b := c.pair()
		a.set(unix.SOL_SOCKET, unix.SO_RCVLOWAT, 100)
		b.deliver(40)
		c.note("poll: %s", a.poll(unix.POLLIN))
		c.note("%s", a.recv(10, 0))
		b.deliver(70)
		c.note("poll: %s", a.poll(unix.POLLIN))
		c.note("%s", a.recv(1000, 0))
	}},
	{name: "SO_RCVLOWAT, blocking", does: "a blocking recv waits for so many bytes", run: func(c *trial) {
		a, b := c.blockingPair()
		a.set(unix.SOL_SOCKET, unix.SO_RCVLOWAT, 100)
		k := c.start(unix.SYS_RECVFROM, func() string { return a.recv(1000, 0) })
		k.mustBlock()
		b.deliver(40)
		if k.blocked() {
			b.deliver(60)
		}
		c.note("%s", k.result())
	}},
	{name: "MSG_OOB", does: "an urgent byte is read apart from the stream", run: func(c *trial) {
		a, b := c.pair()
		b.deliver(10)
		n, err := unix.SendmsgN(b.fd, []byte("ab!"), nil, nil, unix.MSG_OOB)
		c.note("send: %s", outcome(n, err))
		c.until("three more bytes", func() bool { return len(a.look()) >= 12 })
		c.note("poll: %s", a.poll(unix.POLLIN|unix.POLLPRI))
		buf := make([]byte, 10)
		n, _, err = unix.Recvfrom(a.fd, buf, unix.MSG_OOB)
		c.note("recv(MSG_OOB): %s, the urgent one: %t", outcome(n, err), n == 1 && buf[0] == '!')
		rest := []byte(nil)
		for n, err = 1, nil; err == nil && n > 0; {
			n, _, err = unix.Recvfrom(a.fd, buf, 0)
			rest = append(rest, buf[:max(n, 0)]...)
		}
		c.note("the rest: %d bytes", len(rest))
	}},
	{name: "SO_OOBINLINE and SIOCATMARK", does: "an urgent byte in the stream, and the mark before it", run: func(c *trial) {
		a, b := c.pair()
		a.set(unix.SOL_SOCKET, unix.SO_OOBINLINE, 1)
		n, err := unix.SendmsgN(b.fd, []byte("ab!"), nil, nil, unix.MSG_OOB)
		c.note("send: %s", outcome(n, err))
		c.until("all bytes are there", func() bool { return len(a.look()) > 0 })
		c.note("mark: %s", a.ioctl(sioATMark))
		buf := make([]byte, 10)
		n, _, err = unix.Recvfrom(a.fd, buf, 0)
		c.note("recv: %s %q", outcome(n, err), buf[:max(n, 0)])
		c.note("mark: %s", a.ioctl(sioATMark))
		n, _, err = unix.Recvfrom(a.fd, buf, 0)
		if err == nil {
			c.note("recv: %s %q", outcome(n, err), buf[:max(n, 0)])
		}
	}},
	{name: "MSG_ERRQUEUE", does: "nothing there: EAGAIN, and the bytes stay", run: func(c *trial) {
		a, b := c.pair()
		b.deliver(10)
		_, _, _, _, err := unix.Recvmsg(a.fd, make([]byte, 10), make([]byte, 100), unix.MSG_ERRQUEUE)
		c.note("%s", errName(err))
		c.note("%s", a.recv(100, 0))
	}},
	{name: "MSG_CMSG_CLOEXEC and unknown flags", does: "ignored", run: func(c *trial) {
		a, b := c.pair()
		b.deliver(10)
		c.note("%s", a.recv(5, unix.MSG_CMSG_CLOEXEC))
		c.note("%s", a.recv(5, 1<<27))
		c.note("send: %s", a.send(10, unix.MSG_CONFIRM))
		a.arrived()
		c.note("%s", b.recv(100, 0))
	}},
	{name: "recvmsg's answer", does: "flags, address and control length that recvmsg(2) returns", run: func(c *trial) {
		a, b := c.pair()
		b.deliver(10)
		n, oobn, rflags, from, err := unix.Recvmsg(a.fd, make([]byte, 5), make([]byte, 200), 0)
		c.note("%s, control %d, flags %#x, address %v", outcome(n, err), oobn, rflags, from)
		a.got += 5
		c.note("%s", a.recv(100, 0))
	}},
	{name: "sendto with an address", does: "the address is ignored", run: func(c *trial) {
		a, b := c.pair()
		peer, err := unix.Getpeername(a.fd)
		c.check(err)
		c.note("%s", errName(unix.Sendto(a.fd, bytesAt(0, 10), unix.MSG_NOSIGNAL, peer)))
		a.sent += 10
		a.arrived()
		c.note("%s", b.recv(100, 0))
		// recvfrom gives none back.
		b.deliver(10)
		from := make([]byte, 28)
		length := uint32(len(from))
		buf := make([]byte, 100)
		n, _, errno := unix.Syscall6(unix.SYS_RECVFROM, uintptr(a.fd), uintptr(unsafe.Pointer(&buf[0])), 100, 0,
			uintptr(unsafe.Pointer(&from[0])), uintptr(unsafe.Pointer(&length)))
		c.note("recvfrom: %s, address of %d bytes", rawOutcome(n, errno), length)
	}},
}

// peeked is a MSG_PEEK of 4 bytes under SO_PEEK_OFF: which bytes of the stream.
func peeked(e *end) string {
	buf := make([]byte, 4)
	n, _, err := unix.Recvfrom(e.fd, buf, unix.MSG_PEEK)
	if err != nil {
		return errName(err)
	}
	for at := range int64(20) {
		if string(stream(at, n)) == string(buf[:n]) {
			return outcome(n, nil) + " from " + outcome(int(at), nil)
		}
	}
	return "wrong bytes"
}

// look returns what can be read and leaves it there.
func (e *end) look() []byte {
	buf := make([]byte, 1000)
	n, _, err := unix.Recvfrom(e.fd, buf, unix.MSG_PEEK|unix.MSG_DONTWAIT)
	if err != nil {
		return nil
	}
	return buf[:n]
}
