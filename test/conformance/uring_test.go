package conformance

import (
	"errors"
	"runtime"

	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/plugin/uring"
)

var urings = []behaviour{
	{name: "io_uring send and recv", does: "IORING_OP_SEND and IORING_OP_RECV with bytes waiting", run: withRing(func(c *trial, r *ring, a, b *end) {
		b.deliver(100)
		buf := make([]byte, 1000)
		res := r.do(uring.Request{Op: uring.OpRecv, FD: int32(a.fd)}, buf)
		c.note("recv: %s", res)
		a.got += 100
		data := bytesAt(0, 500)
		c.note("send: %s", r.do(uring.Request{Op: uring.OpSend, FD: int32(a.fd)}, data))
		a.sent += 500
		b.read(500)
		c.note("right bytes: %t", string(buf[:100]) == string(bytesAt(0, 100)))
	})},
	{name: "io_uring recv that waits", does: "submitted before the bytes come", run: withRing(func(c *trial, r *ring, a, b *end) {
		buf := make([]byte, 1000)
		r.submit(uring.Request{Op: uring.OpRecv, FD: int32(a.fd)}, buf)
		b.write(100)
		c.note("%s", r.wait())
		r.submit(uring.Request{Op: uring.OpRecv, FD: int32(a.fd)}, buf)
		b.close()
		c.note("%s", r.wait())
	})},
	{name: "io_uring recv with MSG_WAITALL", does: "waits until its buffer is full", run: withRing(func(c *trial, r *ring, a, b *end) {
		buf := make([]byte, 100)
		r.submit(uring.Request{Op: uring.OpRecv, FD: int32(a.fd), Flags: unix.MSG_WAITALL}, buf)
		b.deliver(40)
		b.deliver(60)
		c.note("%s", r.wait())
	})},
	{name: "io_uring send that waits", does: "submitted while the other end has no room", run: withRing(func(c *trial, r *ring, a, b *end) {
		a.fill()
		data := bytesAt(a.sent, 1000)
		r.submit(uring.Request{Op: uring.OpSend, FD: int32(a.fd)}, data)
		b.read(int(a.sent))
		c.note("%s", r.wait())
		a.sent += 1000
		b.read(1000)
		c.note("all bytes")
	})},
	{name: "io_uring read and write", does: "IORING_OP_READ and IORING_OP_WRITE", run: withRing(func(c *trial, r *ring, a, b *end) {
		buf := make([]byte, 1000)
		r.submit(uring.Request{Op: uring.OpRead, FD: int32(a.fd)}, buf)
		b.write(100)
		c.note("%s", r.wait())
		data := bytesAt(0, 500)
		c.note("%s", r.do(uring.Request{Op: uring.OpWrite, FD: int32(a.fd)}, data))
		a.sent += 500
		b.read(500)
	})},
	{name: "io_uring poll", does: "IORING_OP_POLL_ADD before the bytes come", run: withRing(func(c *trial, r *ring, a, b *end) {
		r.submit(uring.Request{Op: uring.OpPollAdd, FD: int32(a.fd), Flags: unix.POLLIN}, nil)
		b.write(10)
		c.note("%s", r.waitFor(func(res int32) string { return eventNames(int16(res)) }))
		c.note("%s", a.recv(100, 0))
	})},
	{name: "io_uring send with zero copy", does: "IORING_OP_SEND_ZC (Linux 6.0): the result, and the notice that the buffer is free", run: withRing(func(c *trial, r *ring, a, b *end) {
		data := bytesAt(0, 10_000)
		result := r.do(uring.Request{Op: uring.OpSendZC, FD: int32(a.fd)}, data)
		c.note("%s", result)
		if result != "10000 bytes" {
			a.write(10_000)
			b.read(10_000)
			return
		}
		a.sent += 10_000
		b.read(10_000)
		c.note("notice: %s", r.waitFor(func(int32) string { return "yes" }))
	})},
	{name: "io_uring splice", does: "IORING_OP_SPLICE from the socket into a pipe, with bytes waiting", run: withRing(func(c *trial, r *ring, a, b *end) {
		_, w := c.pipe()
		b.deliver(100)
		c.note("%s", r.do(uring.Request{
			Op: uring.OpSplice, FD: int32(w), Offset: uring.NoOffset, Addr: uring.NoOffset, Len: 1000,
			Flags: unix.SPLICE_F_NONBLOCK, SpliceFD: int32(a.fd),
		}, nil))
	})},
}

// A ring is an io_uring, used for one request at a time.
type ring struct {
	c *trial
	*uring.Ring
}

// withRing gives a behaviour a ring and a pair.
func withRing(f func(c *trial, r *ring, a, b *end)) func(c *trial) {
	return func(c *trial) {
		// Completions are carried out by the thread that has submitted, and what the
		// kernel has left to do when the ring is closed interrupts it later
		// (io_ring_exit_work()). So the thread must end with the trial.
		runtime.LockOSThread()
		a, b := c.pair()
		r, err := uring.New()
		if errors.Is(err, uring.ErrRefused) {
			c.note("%v", err)
			a.warm()
			return
		}
		c.check(err)
		defer func() { c.check(r.Close()) }()
		f(c, &ring{c: c, Ring: r}, a, b)
	}
}

// submit submits one request.
func (r *ring) submit(q uring.Request, buf []byte) { r.c.check(r.Submit(q, buf)) }

// do submits a request and waits for its result.
func (r *ring) do(q uring.Request, buf []byte) string {
	r.submit(q, buf)
	return r.wait()
}

// wait waits for a result that is a number of bytes.
func (r *ring) wait() string {
	return r.waitFor(func(res int32) string {
		if res < 0 {
			return outcome(0, unix.Errno(-res))
		}
		return outcome(int(res), nil)
	})
}

func (r *ring) waitFor(say func(res int32) string) string {
	var res int32
	got := within(patience, func() bool {
		var ok bool
		var err error
		res, ok, err = r.Poll()
		r.c.check(err)
		return ok
	})
	if !got {
		return "never comes"
	}
	return say(res)
}
