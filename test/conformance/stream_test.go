package conformance

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"unsafe"

	"golang.org/x/sys/unix"
)

var streams = []behaviour{
	{name: "order", once: true, does: "random writes in both directions at once, read in pieces of random size", run: func(c *trial) {
		a, b := c.pair()
		exchangeRandom(a, b, 8<<20)
		c.note("all bytes in order")
	}},
	{name: "single bytes", does: "3000 writes of one byte", run: func(c *trial) {
		a, b := c.pair()
		for range 3000 {
			a.write(1)
		}
		b.read(3000)
		c.note("all bytes in order")
	}},
	{name: "two writes, one read", does: "a read with enough room takes what several writes sent", run: func(c *trial) {
		a, b := c.pair()
		b.deliver(100)
		b.deliver(50)
		b.deliver(1)
		c.note("%s", a.recv(1000, 0))
		c.note("then %s", a.recv(1000, 0))
	}},
	{name: "short read", does: "a read with little room leaves the rest to the next", run: func(c *trial) {
		a, b := c.pair()
		b.deliver(100)
		for range 3 {
			c.note("%s", a.recv(40, 0))
		}
	}},
	{name: "EOF", does: "the other end sends and closes: all bytes are read, then the end, again and again", run: func(c *trial) {
		a, b := c.pair()
		b.write(100_000)
		b.close()
		a.read(100_000)
		a.await(unix.POLLRDHUP)
		for range 3 {
			c.note("%s", a.recv(10, 0))
		}
	}},
	{name: "readv and writev", does: "scattered buffers, empty ones among them", run: func(c *trial) {
		a, b := c.pair()
		data := bytesAt(0, 3000)
		n, err := unix.Writev(a.fd, [][]byte{data[:1], {}, data[1:2000], data[2000:]})
		c.note("writev: %s", outcome(n, err))
		a.sent += int64(n)
		a.arrived()
		bufs := [][]byte{make([]byte, 10), make([]byte, 0), make([]byte, 990), make([]byte, 5000)}
		n, err = unix.Readv(b.fd, bufs)
		c.note("readv: %s", outcome(n, err))
		c.note("%s", b.took(bytes.Join(bufs, nil)[:max(n, 0)], false))
		b.deliver(7)
		n, err = unix.Readv(a.fd, bufs)
		c.note("readv: %s", outcome(n, err))
		c.note("%s", a.took(bytes.Join(bufs, nil)[:max(n, 0)], false))
	}},
	{name: "sendmmsg and recvmmsg", does: "several messages by one call; in a stream their boundaries mean nothing", run: func(c *trial) {
		a, b := c.pair()
		data := bytesAt(0, 300)
		n, err := mmsg(unix.SYS_SENDMMSG, a.fd, [][]byte{data[:100], data[100:150], data[150:]}, 0)
		c.note("sendmmsg: %v, %s", n, errName(err))
		a.sent += 300
		a.arrived()
		bufs := [][]byte{make([]byte, 120), make([]byte, 120), make([]byte, 120), make([]byte, 120)}
		n, err = mmsg(unix.SYS_RECVMMSG, b.fd, bufs, unix.MSG_DONTWAIT)
		c.note("recvmmsg: %v, %s", n, errName(err))
		c.note("%s", b.took(bytes.Join(bufs, nil)[:300], false))
	}},
	{name: "empty write", does: "writes of no bytes", run: func(c *trial) {
		a, b := c.pair()
		c.note("send: %s", a.send(0, 0))
		n, err := unix.Write(a.fd, nil)
		c.note("write: %s", outcome(n, err))
		a.arrived()
		c.note("the other end: %s", b.recv(10, 0))
		a.deliver(3)
		c.note("%s", b.recv(10, 0))
	}},
	{name: "empty recv", does: "recv into no room, without and with bytes waiting, and at the end of the stream", run: func(c *trial) {
		a, b := c.pair()
		b.deliver(3)
		c.note("bytes waiting: %s", a.recv(0, 0))
		c.note("they stay: %s", a.recv(10, 0))
		b.close()
		a.await(unix.POLLRDHUP)
		c.note("at the end: %s", a.recv(0, 0))
	}},
	{name: "empty recv with nothing waiting", does: "recv into no room, non-blocking", quiet: true, run: func(c *trial) {
		a, _ := c.pair()
		c.note("%s", a.recv(0, 0))
	}},
	{name: "empty read", does: "read(2) and readv(2) into no room with nothing waiting", quiet: true, run: func(c *trial) {
		a, _ := c.pair()
		n, err := unix.Read(a.fd, nil)
		c.note("read: %s", outcome(n, err))
		n, err = unix.Readv(a.fd, [][]byte{{}, {}})
		c.note("readv: %s", outcome(n, err))
	}},
	{name: "recv into a bad address", does: "recv into memory that is not there: EFAULT, and the bytes stay", run: func(c *trial) {
		a, b := c.pair()
		_, none := c.hole()
		b.deliver(100)
		m, _, errno := unix.Syscall6(unix.SYS_RECVFROM, uintptr(a.fd), none, 100, 0, 0, 0)
		c.note("%s", rawOutcome(m, errno))
		c.note("then %s", a.recv(1000, 0))
	}},
	{name: "recv into a half-bad address", does: "recv into memory whose second half is not there", run: func(c *trial) {
		a, b := c.pair()
		page, _ := c.hole()
		b.deliver(100)
		m, _, errno := unix.Syscall6(unix.SYS_RECVFROM, uintptr(a.fd), page+pageSize-50, 100, 0, 0, 0)
		c.note("%s", rawOutcome(m, errno))
		if errno == 0 {
			a.got += int64(m)
		}
		c.note("then %s", a.recv(1000, 0))
	}},
	{name: "send from a bad address", does: "send from memory that is not there, or whose second half is not: nothing is sent, and it says", run: func(c *trial) {
		a, b := c.pair()
		a.warm()
		page, none := c.hole()
		for _, from := range []uintptr{none, page + pageSize - 50} {
			m, _, errno := unix.Syscall6(unix.SYS_SENDTO, uintptr(a.fd), from, 100, unix.MSG_NOSIGNAL, 0, 0)
			c.note("%s", rawOutcome(m, errno))
			a.arrived()
			c.note("the other end: %s", b.recv(1000, 0))
		}
	}},
	{name: "a large write", does: "one write of 64 MiB to a non-blocking socket while nobody reads takes a part, and the rest can follow", run: func(c *trial) {
		a, b := c.pair()
		const total = 64 << 20
		m, err := unix.SendmsgN(a.fd, bytesAt(0, total), nil, nil, unix.MSG_NOSIGNAL)
		c.check(err)
		c.note("a part: %t", m > 0 && m < total)
		a.sent += int64(m)
		b.read(m)
		a.deliver(1000)
		c.note("%s", b.recv(2000, 0))
	}},
	{name: "4 GiB and more", notSwitched: true, does: "4.4 GB in one direction, past the end of all 32-bit counters", run: func(c *trial) {
		a, b := c.pair()
		const total = 4_400_000_000
		c.together(func() { a.sendAll(total) }, func() { b.receiveAll(total) })
		b.deliver(100)
		c.note("all bytes in order, then back: %s", a.recv(1000, 0))
	}},
}

// sendAll is write for very many bytes: it copies none of them.
func (e *end) sendAll(total int64) {
	for e.sent < total {
		m, err := unix.SendmsgN(e.fd, stream(e.sent, int(min(256<<10, total-e.sent))), nil, nil, unix.MSG_NOSIGNAL)
		if errors.Is(err, unix.EAGAIN) {
			e.await(unix.POLLOUT)
			continue
		}
		e.c.check(err)
		e.sent += int64(m)
	}
}

// receiveAll is read for very many bytes: it copies none of them.
func (e *end) receiveAll(total int64) {
	for buf := make([]byte, 1<<20); e.got < total; {
		m, _, err := unix.Recvfrom(e.fd, buf, unix.MSG_DONTWAIT)
		if errors.Is(err, unix.EAGAIN) {
			e.await(unix.POLLIN)
			continue
		}
		e.c.check(err)
		if m == 0 || !bytes.Equal(buf[:m], stream(e.got, m)) {
			e.c.fatalf("wrong bytes among %d at %d", m, e.got)
		}
		e.got += int64(m)
	}
}

// exchangeRandom sends so many bytes in both directions at once, in pieces of random
// size, and receives them.
func exchangeRandom(a, b *end, total int) {
	pieces := func(f func(n int)) func() {
		return func() {
			for left := total; left > 0; {
				n := min(left, 1+rand.IntN(1<<rand.IntN(18)))
				f(n)
				left -= n
			}
		}
	}
	a.c.together(pieces(a.write), pieces(b.write), pieces(a.read), pieces(b.read))
}

// together runs functions in goroutines of their own and waits for all of them.
func (c *trial) together(fs ...func()) {
	ended := make(chan any, len(fs))
	for _, f := range fs {
		go func() {
			defer func() { ended <- recover() }()
			f()
		}()
	}
	var failure any
	for range fs {
		if r := <-ended; failure == nil {
			failure = r
		}
	}
	if failure != nil {
		panic(failure)
	}
}

var pageSize = uintptr(unix.Getpagesize())

// hole maps a page that is there, followed by one that is not.
func (c *trial) hole() (page, none uintptr) {
	addr, err := unix.MmapPtr(-1, 0, nil, 2*pageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	c.check(err)
	c.later(func() { _ = unix.MunmapPtr(addr, 2*pageSize) })
	page = uintptr(addr)
	_, _, errno := unix.Syscall(unix.SYS_MPROTECT, page+pageSize, pageSize, unix.PROT_NONE)
	if errno != 0 {
		c.check(errno)
	}
	return page, page + pageSize
}

func rawOutcome(n uintptr, errno unix.Errno) string {
	if errno != 0 {
		return outcome(0, errno)
	}
	return outcome(int(n), nil)
}

type mmsghdr struct {
	unix.Msghdr
	n uint32
	_ [4]byte
}

// mmsg is sendmmsg(2) or recvmmsg(2); it returns the length of each message.
func mmsg(nr uintptr, fd int, bufs [][]byte, flags int) (lengths []int, err error) {
	messages, iovs := make([]mmsghdr, len(bufs)), make([]unix.Iovec, len(bufs))
	for i, b := range bufs {
		iovs[i].Base = &b[0]
		iovs[i].SetLen(len(b))
		messages[i].Iov = &iovs[i]
		messages[i].SetIovlen(1)
	}
	n, _, errno := unix.Syscall6(nr, uintptr(fd), uintptr(unsafe.Pointer(&messages[0])), uintptr(len(messages)), uintptr(flags), 0, 0)
	if errno != 0 {
		return nil, errno
	}
	for _, m := range messages[:n] {
		lengths = append(lengths, int(m.n))
	}
	return lengths, nil
}
