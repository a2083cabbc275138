package conformance

import (
	"os"
	"os/signal"
	"slices"
	"strings"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

var blockings = []behaviour{
	{name: "blocking recv", does: "waits for bytes, and for the end", run: func(c *trial) {
		a, b := c.blockingPair()
		k := c.start(unix.SYS_RECVFROM, func() string { return a.recv(100, 0) })
		k.mustBlock()
		b.write(10)
		c.note("%s", k.result())
		k = c.start(unix.SYS_RECVFROM, func() string { return a.recv(100, 0) })
		k.mustBlock()
		b.close()
		c.note("%s", k.result())
	}},
	{name: "blocking peek", does: "MSG_PEEK waits for bytes", run: func(c *trial) {
		a, b := c.blockingPair()
		k := c.start(unix.SYS_RECVFROM, func() string { return a.recv(100, unix.MSG_PEEK) })
		k.mustBlock()
		b.write(10)
		c.note("%s", k.result())
		c.note("%s", a.recv(100, 0))
	}},
	{name: "blocking send", does: "one send(2) of 64 MiB returns when all is taken, which needs a reader", run: func(c *trial) {
		a, b := c.blockingPair()
		k := c.start(unix.SYS_SENDMSG, func() string { return a.send(64<<20, 0) })
		k.mustBlock()
		b.read(64 << 20)
		c.note("%s", k.result())
	}},
	{name: "MSG_DONTWAIT", does: "a blocking socket does not wait", run: func(c *trial) {
		a, b := c.blockingPair()
		c.note("recv: %s", a.recv(10, unix.MSG_DONTWAIT))
		b.deliver(10)
		c.note("%s", a.recv(100, unix.MSG_DONTWAIT))
		a.fill()
		c.note("send: %s", a.send(1000, unix.MSG_DONTWAIT))
	}},
	{name: "non-blocking", does: "EAGAIN with nothing to read, and with no room to write", run: func(c *trial) {
		a, _ := c.pair()
		c.note("recv: %s", a.recv(10, 0))
		a.fill()
		c.note("send: %s", a.send(1000, 0))
	}},
	{name: "O_NONBLOCK at run time", does: "switched on and off with fcntl", run: func(c *trial) {
		a, b := c.blockingPair()
		c.check(unix.SetNonblock(a.fd, true))
		c.note("on: %s", a.recv(10, 0))
		c.check(unix.SetNonblock(a.fd, false))
		k := c.start(unix.SYS_RECVFROM, func() string { return a.recv(100, 0) })
		k.mustBlock()
		b.write(10)
		c.note("off: %s", k.result())
	}},
	{name: "SO_RCVTIMEO", does: "a blocking recv gives up after its time, and takes what comes before", run: func(c *trial) {
		a, b := c.blockingPair()
		a.timeout(unix.SO_RCVTIMEO, 50*time.Millisecond)
		start := time.Now()
		c.note("%s", a.recv(10, 0))
		c.note("in time: %t", time.Since(start) >= 45*time.Millisecond)
		a.timeout(unix.SO_RCVTIMEO, patience)
		k := c.start(unix.SYS_RECVFROM, func() string { return a.recv(100, 0) })
		k.mustBlock()
		b.write(10)
		c.note("%s", k.result())
	}},
	{name: "SO_SNDTIMEO", does: "a blocking send gives up after its time", run: func(c *trial) {
		a, _ := c.blockingPair()
		a.fill()
		a.timeout(unix.SO_SNDTIMEO, 50*time.Millisecond)
		got := ""
		// On a busy machine acknowledgements make room even now, for a part.
		c.until("there is no room", func() bool {
			got = a.send(1<<20, 0)
			return !strings.HasSuffix(got, "bytes")
		})
		c.note("%s", got)
	}},
	{name: "SO_SNDTIMEO after a part", does: "a blocking send that was taken in part returns the part", run: func(c *trial) {
		a, b := c.blockingPair()
		a.timeout(unix.SO_SNDTIMEO, 50*time.Millisecond)
		m, err := unix.SendmsgN(a.fd, bytesAt(0, 64<<20), nil, nil, unix.MSG_NOSIGNAL)
		c.check(err)
		c.note("a part: %t", m > 0 && m < 64<<20)
		a.sent += int64(m)
		b.read(m)
		c.note("all of it arrives")
	}},
	{name: "signal with SA_RESTART", does: "a thread in a blocking recv is signalled: the call goes on", run: func(c *trial) {
		a, b := c.blockingPair()
		c.note("%s", c.interrupt(restarting, unix.SYS_RECVFROM, func() string { return a.recv(100, 0) }, func() { b.write(10) }))
		b.deliver(10)
		c.note("then %s", a.recv(100, 0))
	}},
	{name: "signal without SA_RESTART", does: "a thread in a blocking recv is signalled: EINTR", run: func(c *trial) {
		a, b := c.blockingPair()
		c.note("%s", c.interrupt(interrupting, unix.SYS_RECVFROM, func() string { return a.recv(100, 0) }, func() {}))
		b.deliver(10)
		c.note("then %s", a.recv(100, 0))
	}},
	{name: "signal without SA_RESTART and SO_RCVTIMEO", does: "as above, with a timeout set", run: func(c *trial) {
		a, b := c.blockingPair()
		a.timeout(unix.SO_RCVTIMEO, 2*patience)
		c.note("%s", c.interrupt(interrupting, unix.SYS_RECVFROM, func() string { return a.recv(100, 0) }, func() {}))
		b.deliver(10)
		c.note("then %s", a.recv(100, 0))
	}},
	{name: "signal with SA_RESTART in send", does: "a thread in a blocking send is signalled: the call goes on", run: func(c *trial) {
		a, b := c.blockingPair()
		a.fill()
		before := int(a.sent)
		c.note("%s", c.interrupt(restarting, unix.SYS_SENDMSG, func() string { return a.send(1000, 0) }, func() { b.read(before) }))
	}},
	{name: "signal without SA_RESTART in send", does: "a thread in a blocking send is signalled: EINTR, and nothing is sent", run: func(c *trial) {
		a, b := c.blockingPair()
		a.fill()
		before := int(a.sent)
		c.note("%s", c.interrupt(interrupting, unix.SYS_SENDMSG, func() string { return a.send(1000, 0) }, func() {}))
		b.read(before)
		a.deliver(10)
		c.note("then %s", b.recv(100, 0))
	}},
	{name: "write by another thread while recv waits", does: "a blocking recv waits for bytes while another thread writes to the same socket", run: func(c *trial) {
		a, b := c.blockingPair()
		a.warm()
		k := c.start(unix.SYS_RECVFROM, func() string { return a.recv(100, 0) })
		k.mustBlock()
		for range 20 {
			a.write(10_000)
			b.read(10_000)
		}
		b.write(10)
		c.note("%s", k.result())
	}},
	{name: "two readers", does: "two threads wait in recv, one message comes, then another", run: func(c *trial) {
		a, b := c.blockingPair()
		k1 := c.start(unix.SYS_RECVFROM, func() string { return plainRecv(a.fd) })
		k1.mustBlock()
		k2 := c.start(unix.SYS_RECVFROM, func() string { return plainRecv(a.fd) })
		k2.mustBlock()
		b.deliver(10)
		first, other := k1, k2
		c.until("one has returned", func() bool {
			if k2.returned() {
				first, other = k2, k1
			}
			return first.returned()
		})
		// What the other does before there is something for it.
		if !within(soon, other.returned) {
			b.write(10)
		}
		both := []string{first.got, other.result()}
		slices.Sort(both)
		c.note("%s", strings.Join(both, " and "))
	}},
	{name: "shutdown(SHUT_RD) by another thread while recv waits", does: "the recv ends", quiet: true, run: func(c *trial) {
		a, _ := c.blockingPair()
		k := c.start(unix.SYS_RECVFROM, func() string { return a.recv(100, 0) })
		k.mustBlock()
		c.note("%s", a.shutdown(unix.SHUT_RD))
		c.note("%s", k.result())
	}},
	{name: "shutdown(SHUT_WR) by another thread while recv waits", does: "the recv goes on and takes what comes", run: func(c *trial) {
		a, b := c.blockingPair()
		k := c.start(unix.SYS_RECVFROM, func() string { return a.recv(100, 0) })
		k.mustBlock()
		c.note("%s", a.shutdown(unix.SHUT_WR))
		if !within(soon, k.returned) {
			c.note("goes on")
		}
		b.write(10)
		c.note("%s", k.result())
	}},
	{name: "RST while recv waits", does: "the other end resets", run: func(c *trial) {
		a, b := c.blockingPair()
		a.warm()
		k := c.start(unix.SYS_RECVFROM, func() string { return a.recv(100, 0) })
		k.mustBlock()
		b.reset()
		c.note("%s", k.result())
	}},
	{name: "receiver in a page fault", does: "a thread in recv waits for a page of its buffer (userfaultfd, but also NFS or FUSE); the other end's non-blocking send", run: func(c *trial) {
		a, b := c.pair()
		a.warm()
		page, resolve := c.absentPage()
		a.deliver(10)
		reader := c.start(unix.SYS_RECVFROM, func() string {
			n, _, errno := unix.Syscall6(unix.SYS_RECVFROM, uintptr(b.fd), page, 10, 0, 0, 0)
			return rawOutcome(n, errno)
		})
		reader.mustBlock()
		writer := c.start(unix.SYS_SENDMSG, func() string { return a.send(10, unix.MSG_DONTWAIT) })
		c.note("waits: %t", writer.blocked())
		resolve()
		c.note("%s", writer.result())
		c.note("%s", reader.result())
		b.got += 10
		b.read(10)
	}},
	{name: "RST while send waits", does: "the other end resets", run: func(c *trial) {
		a, b := c.blockingPair()
		a.fill()
		k := c.start(unix.SYS_SENDMSG, func() string { return a.send(1000, 0) })
		k.mustBlock()
		b.reset()
		c.note("%s", k.result())
	}},
}

func plainRecv(fd int) string {
	n, _, err := unix.Recvfrom(fd, make([]byte, 100), 0)
	return outcome(n, err)
}

func (e *end) timeout(option int, d time.Duration) {
	tv := unix.NsecToTimeval(d.Nanoseconds())
	e.c.check(unix.SetsockoptTimeval(e.fd, unix.SOL_SOCKET, option, &tv))
}

// absentPage maps a page that is there only once resolve is called.
func (c *trial) absentPage() (page uintptr, resolve func()) {
	fd, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC, 0, 0)
	if errno != 0 {
		c.fatalf("userfaultfd: %w", errno)
	}
	c.later(func() { unix.Close(int(fd)) })
	addr, err := unix.MmapPtr(-1, 0, nil, pageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	c.check(err)
	c.later(func() { _ = unix.MunmapPtr(addr, pageSize) })
	page = uintptr(addr)
	const (
		uffdioAPI, uffdioRegister, uffdioZeropage = 0xc018aa3f, 0xc020aa00, 0xc020aa04
		uffdAPI, missing                          = 0xaa, 1
	)
	ioctl := func(request uintptr, arg []uint64) {
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, fd, request, uintptr(unsafe.Pointer(&arg[0]))); errno != 0 {
			c.fatalf("userfaultfd: %w", errno)
		}
	}
	ioctl(uffdioAPI, []uint64{uffdAPI, 0, 0})
	ioctl(uffdioRegister, []uint64{uint64(page), uint64(pageSize), missing, 0})
	return page, func() { ioctl(uffdioZeropage, []uint64{uint64(page), uint64(pageSize), 0, 0}) }
}

// The signals of the test: Go's own handler, which does nothing but count, with
// SA_RESTART and without.
const (
	restarting   = unix.SIGUSR1
	interrupting = unix.SIGUSR2
)

// handlers installs the handlers, once.
var handlers = sync.OnceValue(func() error {
	signals := make(chan os.Signal, 100)
	signal.Notify(signals, restarting, interrupting)
	go func() {
		for range signals {
		}
	}()
	// struct sigaction of the kernel: handler, flags, restorer, mask
	var action [4]uint64
	const maskSize = 8
	_, _, errno := unix.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(interrupting), 0, uintptr(unsafe.Pointer(&action)), maskSize, 0, 0)
	if errno != 0 {
		return errno
	}
	const saRestart = 0x10000000
	action[1] &^= saRestart
	_, _, errno = unix.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(interrupting), uintptr(unsafe.Pointer(&action)), 0, maskSize, 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
})

// interrupt sends a signal to a thread in a blocking call. Where that does not end
// the call, after does.
func (c *trial) interrupt(sig unix.Signal, nr int, f func() string, after func()) string {
	c.check(handlers())
	k := c.start(nr, f)
	k.mustBlock()
	switches := k.switches()
	c.check(unix.Tgkill(os.Getpid(), k.tid, sig))
	// The thread has run its handler and, if the call goes on, sleeps again.
	c.until("the thread has run", func() bool { return k.returned() || k.switches() != switches })
	if k.blocked() {
		after()
	}
	return k.result()
}

// signalled prepares a thread's socket for a signal and says whether it comes.
func (c *trial) signalled(sig os.Signal, cause func()) string {
	came := make(chan os.Signal, 10)
	signal.Notify(came, sig)
	defer signal.Stop(came)
	cause()
	select {
	case <-came:
		return "a signal"
	case <-time.After(patience):
		return "no signal"
	}
}
