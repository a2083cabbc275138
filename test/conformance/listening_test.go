package conformance

import (
	"errors"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/test/datapath/traffic"
)

var listening = []behaviour{
	{name: "accept after bytes", once: true, notSwitched: true, does: "the client sends before the server accepts", run: func(c *trial) {
		l := c.listen(socketOptions{})
		defer unix.Close(l.FD)
		near := c.dial(l, socketOptions{})
		c.acceptable(l)
		near.deliver(1000)
		near.deliver(1000)
		far := c.accept(l, socketOptions{})
		near.peer, far.peer = far, near
		c.note("poll: %s", far.poll(allEvents))
		c.note("%s", far.recv(5000, 0))
		far.write(100)
		near.read(100)
		c.note("and back")
	}},
	{name: "accept after bytes and the end", once: true, notSwitched: true, does: "the client sends and closes before the server accepts", run: func(c *trial) {
		l := c.listen(socketOptions{})
		defer unix.Close(l.FD)
		near := c.dial(l, socketOptions{})
		c.acceptable(l)
		near.deliver(1000)
		near.close()
		far := c.accept(l, socketOptions{})
		near.peer, far.peer = far, near
		far.await(unix.POLLRDHUP)
		c.note("%s", far.recv(5000, 0))
		c.note("%s", far.recv(5000, 0))
	}},
	{name: "accept after RST", once: true, notSwitched: true, does: "the client resets before the server accepts", quiet: true, run: func(c *trial) {
		l := c.listen(socketOptions{})
		defer unix.Close(l.FD)
		near := c.dial(l, socketOptions{})
		c.acceptable(l)
		near.reset()
		far := c.accept(l, socketOptions{})
		near.peer, far.peer = far, near
		far.await(unix.POLLERR | unix.POLLHUP)
		c.note("%s", far.recv(1, 0))
	}},
	{name: "accept4's flags", once: true, notSwitched: true, does: "the accepted socket is blocking or not as accept4(2) says, whatever the listener is", run: func(c *trial) {
		l := c.listen(socketOptions{})
		defer unix.Close(l.FD)
		near := c.dial(l, socketOptions{})
		far := c.accept(l, socketOptions{blocking: true})
		near.peer, far.peer = far, near
		k := c.start(unix.SYS_RECVFROM, func() string { return far.recv(100, 0) })
		k.mustBlock()
		near.write(10)
		c.note("%s", k.result())
	}},
	{name: "listener closes with a connection waiting", once: true, notSwitched: true, does: "the client of a connection that was never accepted is reset", quiet: true, run: func(c *trial) {
		l := c.listen(socketOptions{})
		near := c.dial(l, socketOptions{})
		c.acceptable(l)
		closeFD(l.FD)
		near.await(unix.POLLERR | unix.POLLRDHUP)
		c.note("%s", near.recv(1, 0))
	}},
	{name: "listener closes after accept", once: true, notSwitched: true, does: "accepted connections go on", run: func(c *trial) {
		l := c.listen(socketOptions{})
		near, far := c.connect(l, socketOptions{})
		closeFD(l.FD)
		near.warm()
		far.warm()
		c.note("goes on")
	}},
	{name: "listen backlog full", once: true, notSwitched: true, does: "with a backlog of 1 two clients get in, the third when there is room; all can talk", run: func(c *trial) {
		l := c.listen(socketOptions{backlog: 1})
		defer unix.Close(l.FD)
		var clients []*end
		for range 2 {
			clients = append(clients, c.dial(l, socketOptions{}))
		}
		c.acceptable(l)
		// Both third acknowledgements have been taken.
		c.until("the queue is full", func() bool {
			info, err := unix.GetsockoptTCPInfo(l.FD, unix.IPPROTO_TCP, unix.TCP_INFO)
			c.check(err)
			return info.Unacked == 2 // of a listener: connections that wait for accept(2)
		})
		late := &end{c: c, fd: c.socket(c.rig.client, socketOptions{})}
		c.later(late.close)
		err := unix.Connect(late.fd, sockaddr(l.Addr))
		c.note("third: %s", errName(err))
		clients = append(clients, late)
		// In whatever order they come.
		var accepted []*end
		for range clients {
			accepted = append(accepted, c.accept(l, socketOptions{}))
		}
		c.connected(late)
		for _, near := range clients {
			name, err := unix.Getsockname(near.fd)
			c.check(err)
			for _, far := range accepted {
				peer, err := unix.Getpeername(far.fd)
				c.check(err)
				if addrPort(name) == addrPort(peer) {
					near.peer, far.peer = far, near
					near.warm()
				}
			}
		}
		c.note("all three talk")
	}},
	{name: "SO_REUSEPORT", once: true, notSwitched: true, does: "two listeners on one port, 40 clients: each is served by one of the two", run: func(c *trial) {
		reuse := func(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1) }
		first := c.listen(socketOptions{setup: reuse})
		defer unix.Close(first.FD)
		second, err := c.rig.server.host.Listen(first.Addr, traffic.SocketOptions{Setup: reuse})
		c.check(err)
		defer unix.Close(second.FD)
		served := [2]int{}
		for range 40 {
			near := c.dial(first, socketOptions{})
			p := []unix.PollFd{{Fd: int32(first.FD), Events: unix.POLLIN}, {Fd: int32(second.FD), Events: unix.POLLIN}}
			var n int
			c.check(retry(func() (err error) {
				n, err = unix.Poll(p, int(patience.Milliseconds()))
				return err
			}))
			if n != 1 {
				c.fatalf("%d listeners are ready", n)
			}
			i, l := 0, first
			if p[1].Revents != 0 {
				i, l = 1, second
			}
			served[i]++
			far := c.accept(l, socketOptions{})
			near.peer, far.peer = far, near
			near.warm()
			near.close()
			far.close()
		}
		c.note("both serve: %t", served[0] > 0 && served[1] > 0)
	}},
	{name: "port reuse at once after close", once: true, notSwitched: true,
		does: "20 times over: a connection between the same two ports, made again as soon as the server has closed it", run: func(c *trial) {
			c.samePorts(func(near, far *end) {
				near.write(5000)
				far.read(5000)
				far.close()
				near.readEnd()
				near.close()
			})
		}},
	{name: "port reuse after RST", once: true, notSwitched: true, does: "as above, but the client resets", run: func(c *trial) {
		c.samePorts(func(near, far *end) {
			near.reset()
			far.await(unix.POLLERR)
			far.close()
		})
	}},
	{name: "listener again at once", once: true, notSwitched: true, does: "bind to the port of a server that has just closed its connections, with and without SO_REUSEADDR", run: func(c *trial) {
		l := c.listen(socketOptions{})
		near, far := c.connect(l, socketOptions{})
		if c.rig.role == server {
			near, far = far, near
		}
		near.warm()
		far.close()
		near.await(unix.POLLRDHUP)
		near.close()
		closeFD(l.FD)
		fd, err := c.rig.server.host.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
		c.check(err)
		defer unix.Close(fd)
		c.note("without: %s", errName(unix.Bind(fd, sockaddr(l.Addr))))
		again, err := c.rig.server.host.Listen(l.Addr, traffic.SocketOptions{})
		c.note("with: %s", errName(err))
		if err == nil {
			defer unix.Close(again.FD)
			near, _ = c.connect(again, socketOptions{})
			near.warm()
		}
	}},
	{name: "connection refused", once: true, notSwitched: true, notEnrolled: "no connection is made", does: "connect to a port on which nobody listens", quiet: true, run: func(c *trial) {
		// Bound, so that nobody else can listen there meanwhile.
		silent := c.socket(c.rig.server, socketOptions{})
		defer unix.Close(silent)
		c.check(unix.Bind(silent, sockaddr(netip.AddrPortFrom(c.rig.server.addr(), 0))))
		name, err := unix.Getsockname(silent)
		c.check(err)
		fd := c.socket(c.rig.client, socketOptions{blocking: true})
		defer unix.Close(fd)
		c.note("%s", errName(unix.Connect(fd, name)))
	}},
	{name: "TCP_DEFER_ACCEPT", once: true, notSwitched: true, notEnrolled: "the client sends before the server is connected", quiet: true,
		does: "the server accepts when the first bytes are there", run: func(c *trial) {
			l := c.listen(socketOptions{setup: func(fd int) error {
				return unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_DEFER_ACCEPT, 10)
			}})
			defer unix.Close(l.FD)
			near := c.dial(l, socketOptions{})
			near.write(1000)
			far := c.accept(l, socketOptions{})
			near.peer, far.peer = far, near
			far.read(1000)
			far.write(1000)
			near.read(1000)
			c.note("bytes go both ways")
		}},
	{name: "self-connect", once: true, notSwitched: true, notEnrolled: "a socket that is its own other end is left alone", quiet: true,
		does: "a socket bound and connected to the same port", run: func(c *trial) {
			fd := c.socket(c.rig.client, socketOptions{blocking: true})
			e := &end{c: c, fd: fd}
			e.peer = e
			defer unix.Close(fd)
			c.check(unix.Bind(fd, sockaddr(netip.AddrPortFrom(c.rig.client.addr(), 0))))
			name, err := unix.Getsockname(fd)
			c.check(err)
			c.note("%s", errName(unix.Connect(fd, name)))
			e.write(100)
			e.read(100)
			c.note("its own bytes")
		}},
	{name: "TCP Fast Open", once: true, notSwitched: true,
		does: "the client asks for a cookie, and sends its next first bytes with the SYN: that connection stays plain, the first does not", run: func(c *trial) {
			for _, p := range []*pod{c.rig.client, c.rig.server} {
				c.check(p.Do(func() error { return os.WriteFile("/proc/sys/net/ipv4/tcp_fastopen", []byte("3"), 0) }))
			}
			const tcpFastOpen = 23
			l := c.listen(socketOptions{})
			defer unix.Close(l.FD)
			c.check(unix.SetsockoptInt(l.FD, unix.IPPROTO_TCP, tcpFastOpen, 16))
			for i := range 2 {
				near := &end{c: c, fd: c.socket(c.rig.client, socketOptions{})}
				n, err := unix.SendmsgN(near.fd, bytesAt(0, 100), nil, sockaddr(l.Addr), unix.MSG_FASTOPEN)
				if err != nil && !errors.Is(err, unix.EINPROGRESS) {
					c.check(err)
				}
				near.sent = int64(max(n, 0))
				near.await(unix.POLLOUT)
				far := c.accept(l, socketOptions{})
				near.peer, far.peer = far, near
				near.write(100)
				far.read(int(near.sent))
				info, err := unix.GetsockoptTCPInfo(near.fd, unix.IPPROTO_TCP, unix.TCP_INFO)
				c.check(err)
				const synData = 32 // TCPI_OPT_SYN_DATA
				c.note("with the SYN: %t", info.Options&synData != 0)
				if i == 0 {
					c.connections++
				}
				near.close()
			}
			c.note("all bytes")
		}},
}

// samePorts makes 20 connections between the same two ports, one after the other.
func (c *trial) samePorts(use func(near, far *end)) {
	l := c.listen(socketOptions{})
	defer unix.Close(l.FD)
	port := 0 // any at first
	bind := socketOptions{client: func(fd int) (err error) {
		// The last connection is gone when its last segment has been acknowledged.
		within(patience, func() bool {
			err = unix.Bind(fd, &unix.SockaddrInet4{Addr: c.rig.client.addr().As4(), Port: port})
			return !errors.Is(err, unix.EADDRINUSE)
		})
		return err
	}}
	for range 20 {
		near := c.dial(l, bind)
		far := c.accept(l, socketOptions{})
		near.peer, far.peer = far, near
		name, err := unix.Getsockname(near.fd)
		c.check(err)
		port = int(addrPort(name).Port())
		near.warm()
		use(near, far)
	}
	c.note("20 connections, all bytes")
}
