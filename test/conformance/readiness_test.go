package conformance

import (
	"errors"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

var readiness = []behaviour{
	{name: "poll", does: "what poll(2) says before and after bytes, with the bytes read, at the end, and when both have closed", run: func(c *trial) {
		a, b := c.pair()
		c.note("idle: %s", a.poll(allEvents))
		b.deliver(10)
		c.note("bytes: %s", a.poll(allEvents))
		c.note("%s", a.recv(5, 0))
		c.note("some left: %s", a.poll(allEvents))
		c.note("%s", a.recv(5, 0))
		c.note("all read: %s", a.poll(allEvents))
		c.note("%s", b.shutdown(unix.SHUT_WR))
		a.await(unix.POLLRDHUP)
		c.note("end: %s", a.poll(allEvents))
		c.note("%s", a.shutdown(unix.SHUT_WR))
		a.await(unix.POLLHUP)
		c.note("both ended: %s", a.poll(allEvents))
	}},
	{name: "poll with bytes before the end", does: "the other end sends and closes", run: func(c *trial) {
		a, b := c.pair()
		b.write(10)
		b.close()
		a.await(unix.POLLRDHUP)
		c.note("%s", a.poll(allEvents))
		c.note("%s", a.recv(100, 0))
		c.note("%s", a.poll(allEvents))
	}},
	{name: "poll of a full socket", does: "no POLLOUT while the other end does not read, POLLOUT again when it has", run: func(c *trial) {
		a, b := c.pair()
		a.fill()
		c.note("full: %s", a.poll(allEvents))
		b.read(int(a.sent))
		a.await(unix.POLLOUT)
		c.note("read: %s", a.poll(allEvents))
	}},
	{name: "poll waits", does: "poll(2) in a thread returns when bytes come", run: func(c *trial) {
		a, b := c.pair()
		k := c.start(unix.SYS_PPOLL, func() string { return pollFor(a.fd, unix.POLLIN) })
		k.mustBlock()
		b.write(10)
		c.note("%s", k.result())
	}},
	{name: "poll waits for room", does: "poll(2) for POLLOUT in a thread returns when the other end reads", run: func(c *trial) {
		a, b := c.pair()
		a.fill()
		k := c.start(unix.SYS_PPOLL, func() string { return pollFor(a.fd, unix.POLLOUT) })
		k.mustBlock()
		b.read(int(a.sent))
		c.note("%s", k.result())
	}},
	{name: "select", does: "read, write and exceptional sets, idle and with bytes waiting", run: func(c *trial) {
		a, b := c.pair()
		c.note("idle: %s", c.sel(a.fd))
		b.deliver(10)
		c.note("bytes: %s", c.sel(a.fd))
		b.close()
		c.note("%s", a.recv(10, 0))
		a.await(unix.POLLRDHUP)
		c.note("end: %s", c.sel(a.fd))
	}},
	{name: "epoll, level-triggered", does: "reported until everything is read", run: func(c *trial) {
		a, b := c.pair()
		ep := c.epoll(a.fd, unix.EPOLLIN|unix.EPOLLRDHUP)
		c.note("idle: %s", ep.now())
		b.deliver(10)
		c.note("bytes: %s", ep.now())
		c.note("again: %s", ep.now())
		a.recv(10, 0)
		c.note("read: %s", ep.now())
		b.close()
		ep.wait()
		c.note("end: %s", ep.now())
	}},
	{name: "epoll, edge-triggered", does: "reported once for each arrival, and for the end", run: func(c *trial) {
		a, b := c.pair()
		ep := c.epoll(a.fd, unix.EPOLLIN|unix.EPOLLRDHUP|unix.EPOLLET)
		b.deliver(10)
		c.note("bytes: %s", ep.wait())
		c.note("not read: %s", ep.now())
		b.deliver(10)
		c.note("more: %s", ep.wait())
		c.note("%s", a.recv(5, 0))
		c.note("partly read: %s", ep.now())
		c.note("%s", a.recv(100, 0))
		c.note("%s", a.recv(100, 0))
		b.deliver(1)
		c.note("new: %s", ep.wait())
		c.note("%s", b.shutdown(unix.SHUT_WR))
		c.note("end: %s", ep.wait())
	}},
	{name: "epoll, edge-triggered, many", once: true, does: "an event loop that reads only when told, until EAGAIN, misses nothing of 20000 messages", run: func(c *trial) {
		a, b := c.pair()
		ep := c.epoll(b.fd, unix.EPOLLIN|unix.EPOLLET)
		const messages, size = 20_000, 37
		c.together(func() {
			for range messages {
				a.write(size)
			}
		}, func() {
			for b.got < messages*size {
				if s := ep.wait(); s != "IN" {
					c.fatalf("epoll after %d bytes: %s", b.got, s)
				}
				for s := ""; s != "EAGAIN"; {
					s = b.recv(1000, 0)
					if s != "EAGAIN" && !strings.HasSuffix(s, "bytes") && s != "1 byte" {
						c.fatalf("recv after %d bytes: %s", b.got, s)
					}
				}
			}
		})
		c.note("all bytes")
	}},
	{name: "epoll, edge-triggered, room", does: "EPOLLOUT comes once, and again when a full socket has room", run: func(c *trial) {
		a, b := c.pair()
		ep := c.epoll(a.fd, unix.EPOLLOUT|unix.EPOLLET)
		c.note("at first: %s", ep.wait())
		c.note("again: %s", ep.now())
		a.fill()
		ep.now()
		b.read(int(a.sent))
		c.note("room: %s", ep.wait())
	}},
	{name: "EPOLLONESHOT", does: "reported once until armed again", run: func(c *trial) {
		a, b := c.pair()
		ep := c.epoll(a.fd, unix.EPOLLIN|unix.EPOLLONESHOT)
		b.deliver(10)
		c.note("%s", ep.wait())
		b.deliver(10)
		c.note("%s", ep.now())
		ep.arm(a.fd, unix.EPOLLIN|unix.EPOLLONESHOT)
		c.note("armed: %s", ep.wait())
	}},
	{name: "EPOLLRDHUP", does: "told from bytes by the event alone", run: func(c *trial) {
		a, b := c.pair()
		ep := c.epoll(a.fd, unix.EPOLLRDHUP)
		b.deliver(10)
		c.note("bytes: %s", ep.now())
		c.note("%s", b.shutdown(unix.SHUT_WR))
		c.note("end: %s", ep.wait())
	}},
	{name: "EPOLLEXCLUSIVE", does: "four threads wait with epolls of their own: at least one is woken, and not a message is left lying", run: func(c *trial) {
		a, b := c.pair()
		const waiters, messages = 4, 200
		var got atomic.Int64
		var wg sync.WaitGroup
		stop := make(chan struct{})
		for range waiters {
			ep := c.epoll(a.fd, unix.EPOLLIN|unix.EPOLLEXCLUSIVE)
			wg.Go(func() {
				buf := make([]byte, 1)
				for {
					select {
					case <-stop:
						return
					default:
					}
					if !ep.ready(50 * time.Millisecond) {
						continue
					}
					for {
						n, _, err := unix.Recvfrom(a.fd, buf, unix.MSG_DONTWAIT)
						if err != nil || n <= 0 {
							break
						}
						got.Add(int64(n))
					}
				}
			})
		}
		for range messages {
			b.write(1)
		}
		all := within(patience, func() bool { return got.Load() == messages })
		close(stop)
		wg.Wait()
		c.note("all read: %t", all)
	}},
	{name: "poll after RST", does: "POLLERR and POLLHUP", run: func(c *trial) {
		a, b := c.pair()
		a.warm()
		ep := c.epoll(a.fd, unix.EPOLLIN|unix.EPOLLRDHUP|unix.EPOLLET)
		b.reset()
		c.note("epoll: %s", ep.wait())
		c.note("poll: %s", a.poll(allEvents))
	}},
	{name: "SIGIO", does: "O_ASYNC: the owner gets a signal when bytes come", run: func(c *trial) {
		a, b := c.pair()
		// A signal of its own for each trial.
		sig := nextSignal()
		c.note("%s", c.signalled(sig, func() {
			c.check(setOwner(a.fd, os.Getpid()))
			_, err := unix.FcntlInt(uintptr(a.fd), unix.F_SETSIG, int(sig))
			c.check(err)
			fl, err := unix.FcntlInt(uintptr(a.fd), unix.F_GETFL, 0)
			c.check(err)
			_, err = unix.FcntlInt(uintptr(a.fd), unix.F_SETFL, fl|unix.O_ASYNC)
			c.check(err)
			b.write(10)
		}))
	}},
}

func pollFor(fd int, events int16) string {
	p := []unix.PollFd{{Fd: int32(fd), Events: events}}
	for {
		_, err := unix.Poll(p, int(patience.Milliseconds()))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return errName(err)
		}
		return eventNames(p[0].Revents)
	}
}

// sel is what select(2) says of the descriptor at once.
func (c *trial) sel(fd int) string {
	var r, w, x unix.FdSet
	if fd >= unix.FD_SETSIZE {
		c.fatalf("descriptor %d is too large for select", fd)
	}
	r.Set(fd)
	w.Set(fd)
	x.Set(fd)
	_, err := unix.Select(fd+1, &r, &w, &x, &unix.Timeval{})
	c.check(err)
	var names []string
	for _, s := range []struct {
		name string
		set  *unix.FdSet
	}{{"readable", &r}, {"writable", &w}, {"exceptional", &x}} {
		if s.set.IsSet(fd) {
			names = append(names, s.name)
		}
	}
	return strings.Join(names, "|")
}

// An epoll watches one descriptor.
type epoll struct {
	c  *trial
	fd int
}

func (c *trial) epoll(fd int, events uint32) *epoll {
	ep, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	c.check(err)
	c.later(func() { unix.Close(ep) })
	c.check(unix.EpollCtl(ep, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: events, Fd: int32(fd)}))
	return &epoll{c, ep}
}

func (p *epoll) arm(fd int, events uint32) {
	p.c.check(unix.EpollCtl(p.fd, unix.EPOLL_CTL_MOD, fd, &unix.EpollEvent{Events: events, Fd: int32(fd)}))
}

// now is what the epoll reports without waiting.
func (p *epoll) now() string { return p.report(0) }

// wait is what the epoll reports next.
func (p *epoll) wait() string { return p.report(patience) }

func (p *epoll) ready(d time.Duration) bool { return p.report(d) != "nothing" }

func (p *epoll) report(d time.Duration) string {
	var events [4]unix.EpollEvent
	for {
		n, err := unix.EpollWait(p.fd, events[:], int(d.Milliseconds()))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		p.c.check(err)
		var names []string
		for _, e := range events[:n] {
			names = append(names, eventNames(int16(e.Events)))
		}
		if names == nil {
			return "nothing"
		}
		slices.Sort(names)
		return strings.Join(names, ", ")
	}
}

// setOwner is F_SETOWN_EX for a process.
func setOwner(fd, pid int) error {
	const fSetownEx, ownerPID = 15, 1
	owner := [2]int32{ownerPID, int32(pid)}
	_, _, errno := unix.Syscall(unix.SYS_FCNTL, uintptr(fd), fSetownEx, uintptr(unsafe.Pointer(&owner)))
	if errno != 0 {
		return errno
	}
	return nil
}

// nextSignal is a real-time signal that nobody else waits for.
var nextSignal = func() func() unix.Signal {
	var used atomic.Int32
	return func() unix.Signal { return unix.Signal(40 + used.Add(1)%20) }
}()
