package conformance

import (
	"errors"
	"time"

	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/test/datapath/traffic"
)

var ends = []behaviour{
	{name: "half-close", does: "shutdown(SHUT_WR): EPIPE here, the end there, and the other direction goes on", run: func(c *trial) {
		a, b := c.pair()
		a.write(50_000)
		c.note("shutdown: %s", a.shutdown(unix.SHUT_WR))
		c.note("send: %s", a.send(1, 0))
		b.read(50_000)
		b.readEnd()
		b.deliver(100_000)
		a.read(100_000)
		c.note("both directions ended in order")
		b.close()
		a.await(unix.POLLRDHUP)
		c.note("%s", a.recv(1, 0))
	}},
	{name: "shutdown(SHUT_RD) with bytes waiting", does: "what has arrived can be read, then the end", run: func(c *trial) {
		a, b := c.pair()
		b.deliver(100)
		c.note("shutdown: %s", a.shutdown(unix.SHUT_RD))
		c.note("%s", a.recv(1000, 0))
		c.note("%s", a.recv(1000, 0))
	}},
	{name: "shutdown(SHUT_RD), then the other end sends", does: "the other end may send, and what it sends can be read", run: func(c *trial) {
		a, b := c.pair()
		c.note("shutdown: %s", a.shutdown(unix.SHUT_RD))
		c.note("%s", a.recv(1000, 0))
		b.deliver(100)
		c.note("%s", a.recv(1000, 0))
		c.note("%s", a.recv(1000, 0))
		a.deliver(10)
		c.note("the other way: %s", b.recv(1000, 0))
	}},
	{name: "shutdown(SHUT_RDWR)", does: "EPIPE and the end here, the end there", run: func(c *trial) {
		a, b := c.pair()
		a.warm()
		c.note("shutdown: %s", a.shutdown(unix.SHUT_RDWR))
		c.note("send: %s", a.send(1, 0))
		c.note("recv: %s", a.recv(1, 0))
		b.await(unix.POLLRDHUP)
		c.note("the other end: %s", b.recv(1, 0))
	}},
	{name: "shutdown twice", does: "and after the other end has closed, too", quiet: true, run: func(c *trial) {
		a, b := c.pair()
		c.note("%s", a.shutdown(unix.SHUT_WR))
		c.note("%s", a.shutdown(unix.SHUT_WR))
		b.close()
		a.await(unix.POLLHUP)
		c.note("%s", a.shutdown(unix.SHUT_RDWR))
	}},
	{name: "both ends half-close", does: "both send, then shut down sending, then read all", run: func(c *trial) {
		a, b := c.pair()
		for _, e := range []*end{a, b} {
			e.write(20_000)
			c.note("%s", e.shutdown(unix.SHUT_WR))
		}
		for _, e := range []*end{a, b} {
			e.read(20_000)
			e.readEnd()
		}
		c.note("all bytes, both ends")
	}},
	{name: "close with bytes unread", does: "close(2) while received bytes are unread: what the other end reads", run: func(c *trial) {
		a, b := c.pair()
		b.deliver(1000)
		a.close()
		b.await(unix.POLLIN)
		c.note("%s", b.recv(1, 0))
	}},
	{name: "writer after its reader is gone", does: "the reader closes with bytes unread while the writer waits for room: the writer's wait ends with an error", run: func(c *trial) {
		a, b := c.pair()
		a.fill()
		b.close()
		a.await(unix.POLLERR)
		c.note("%t", a.err() != nil)
		c.note("send: %s", a.send(1, 0))
	}},
	{name: "send after the other end has closed", does: "the first send is taken and answered with RST, later ones fail", run: func(c *trial) {
		a, b := c.pair()
		a.warm()
		b.close()
		a.await(unix.POLLRDHUP)
		c.note("%s", a.send(10, 0))
		a.await(unix.POLLERR)
		c.note("%s", errName(a.err()))
		c.note("%s", a.send(10, 0))
		c.note("recv: %s", a.recv(10, 0))
	}},
	{name: "RST by SO_LINGER 0", does: "the other end resets: the error is reported once, then the end", run: func(c *trial) {
		a, b := c.pair()
		a.warm()
		b.reset()
		a.await(unix.POLLERR)
		c.note("poll: %s", a.poll(allEvents))
		c.note("%s", a.recv(10, 0))
		c.note("%s", a.recv(10, 0))
		c.note("send: %s", a.send(10, 0))
	}},
	{name: "RST with bytes unread", does: "the other end sends and resets before the bytes are read", run: func(c *trial) {
		a, b := c.pair()
		b.deliver(100)
		b.reset()
		a.await(unix.POLLERR)
		c.note("%s", a.recv(1000, 0))
		c.note("%s", a.recv(1000, 0))
	}},
	{name: "SO_ERROR after RST", does: "SO_ERROR gives the error once", run: func(c *trial) {
		a, b := c.pair()
		a.warm()
		b.reset()
		a.await(unix.POLLERR)
		c.note("%s", errName(a.err()))
		c.note("%s", errName(a.err()))
		c.note("recv: %s", a.recv(10, 0))
	}},
	{name: "SO_LINGER", does: "close(2) with a linger time waits until the bytes have arrived; all of them can be read", run: func(c *trial) {
		a, b := c.pairWith(socketOptions{blocking: true})
		c.check(unix.SetsockoptLinger(a.fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1, Linger: 60}))
		a.write(30_000)
		start := time.Now()
		a.close()
		c.note("within its time: %t", time.Since(start) < 60*time.Second)
		b.read(30_000)
		b.readEnd()
		c.note("all bytes, then the end")
	}},
	{name: "EPIPE and SIGPIPE", does: "a process writes to an end that it has shut down, with and without MSG_NOSIGNAL", run: func(c *trial) {
		a, _ := c.pair()
		a.warm()
		c.note("shutdown: %s", a.shutdown(unix.SHUT_WR))
		c.note("MSG_NOSIGNAL: %s", c.help("send-nosignal", a.fd))
		c.note("write: %s", c.help("write-default-sigpipe", a.fd))
	}},
	{name: "the other end's process is killed", does: "SIGKILL of a process that has read everything", run: func(c *trial) {
		a, b := c.pair()
		h := c.startHelper("hold", b.fd)
		a.write(100)
		b.read(100)
		b.close()
		h.kill()
		a.await(unix.POLLRDHUP)
		c.note("%s", a.recv(10, 0))
	}},
	{name: "disconnect and connect again", once: true, mayStayPlain: 1, does: "connect(AF_UNSPEC) on the client, then a new connection by the same socket", run: func(c *trial) {
		l := c.listen(socketOptions{})
		defer unix.Close(l.FD)
		near, far := c.connect(l, socketOptions{})
		near.warm()
		c.check(disconnect(near.fd))
		far.await(unix.POLLRDHUP)
		c.note("the other end: %s", far.recv(1, 0))
		c.note("send: %s", near.send(1, 0))
		err := unix.Connect(near.fd, sockaddr(l.Addr))
		if err != nil && !errors.Is(err, unix.EINPROGRESS) {
			c.check(err)
		}
		c.connected(near)
		far = c.accept(l, socketOptions{})
		near.peer, far.peer = far, near
		near.sent, near.got = 0, 0
		near.warm()
		c.note("connected again, bytes go both ways")
	}},
	{name: "shutdown wakes poll", does: "poll(2) in another thread while this one shuts down", quiet: true, run: func(c *trial) {
		a, _ := c.pair()
		k := c.start(unix.SYS_PPOLL, func() string {
			got, err := traffic.Poll(a.fd, unix.POLLIN|unix.POLLRDHUP, patience)
			c.check(err)
			return eventNames(got)
		})
		k.mustBlock()
		c.note("%s", a.shutdown(unix.SHUT_RD))
		c.note("%s", k.result())
	}},
}

// disconnect is connect(2) with an address of family AF_UNSPEC.
func disconnect(fd int) error {
	var unspec [16]byte
	_, _, errno := unix.Syscall(unix.SYS_CONNECT, uintptr(fd), uintptr(pointer(unspec[:])), uintptr(len(unspec)))
	if errno != 0 {
		return errno
	}
	return nil
}
