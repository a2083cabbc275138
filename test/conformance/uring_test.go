package conformance

import (
	"errors"
	"runtime"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

var urings = []behaviour{
	{name: "io_uring send and recv", does: "IORING_OP_SEND and IORING_OP_RECV with bytes waiting", run: withRing(func(c *trial, r *ring, a, b *end) {
		b.deliver(100)
		buf := make([]byte, 1000)
		res := r.do(sqe{opcode: opRecv, fd: int32(a.fd), addr: address(buf), length: 1000})
		c.note("recv: %s", res)
		a.got += 100
		data := bytesAt(0, 500)
		c.note("send: %s", r.do(sqe{opcode: opSend, fd: int32(a.fd), addr: address(data), length: 500}))
		a.sent += 500
		b.read(500)
		c.note("right bytes: %t", string(buf[:100]) == string(bytesAt(0, 100)))
	})},
	{name: "io_uring recv that waits", does: "submitted before the bytes come", run: withRing(func(c *trial, r *ring, a, b *end) {
		buf := make([]byte, 1000)
		r.submit(sqe{opcode: opRecv, fd: int32(a.fd), addr: address(buf), length: 1000})
		b.write(100)
		c.note("%s", r.wait())
		r.submit(sqe{opcode: opRecv, fd: int32(a.fd), addr: address(buf), length: 1000})
		b.close()
		c.note("%s", r.wait())
		runtime.KeepAlive(buf)
	})},
	{name: "io_uring recv with MSG_WAITALL", does: "waits until its buffer is full", run: withRing(func(c *trial, r *ring, a, b *end) {
		buf := make([]byte, 100)
		r.submit(sqe{opcode: opRecv, fd: int32(a.fd), addr: address(buf), length: 100, flags: unix.MSG_WAITALL})
		b.deliver(40)
		b.deliver(60)
		c.note("%s", r.wait())
		runtime.KeepAlive(buf)
	})},
	{name: "io_uring send that waits", does: "submitted while the other end has no room", run: withRing(func(c *trial, r *ring, a, b *end) {
		a.fill()
		data := bytesAt(a.sent, 1000)
		r.submit(sqe{opcode: opSend, fd: int32(a.fd), addr: address(data), length: 1000})
		b.read(int(a.sent))
		c.note("%s", r.wait())
		a.sent += 1000
		b.read(1000)
		c.note("all bytes")
	})},
	{name: "io_uring read and write", does: "IORING_OP_READ and IORING_OP_WRITE", run: withRing(func(c *trial, r *ring, a, b *end) {
		buf := make([]byte, 1000)
		r.submit(sqe{opcode: opRead, fd: int32(a.fd), addr: address(buf), length: 1000})
		b.write(100)
		c.note("%s", r.wait())
		data := bytesAt(0, 500)
		c.note("%s", r.do(sqe{opcode: opWrite, fd: int32(a.fd), addr: address(data), length: 500}))
		a.sent += 500
		b.read(500)
		runtime.KeepAlive(buf)
	})},
	{name: "io_uring poll", does: "IORING_OP_POLL_ADD before the bytes come", run: withRing(func(c *trial, r *ring, a, b *end) {
		r.submit(sqe{opcode: opPollAdd, fd: int32(a.fd), flags: unix.POLLIN})
		b.write(10)
		c.note("%s", r.waitFor(func(res int32) string { return eventNames(int16(res)) }))
		c.note("%s", a.recv(100, 0))
	})},
	{name: "io_uring send with zero copy", does: "IORING_OP_SEND_ZC (Linux 6.0): the result, and the notice that the buffer is free", run: withRing(func(c *trial, r *ring, a, b *end) {
		data := bytesAt(0, 10_000)
		result := r.do(sqe{opcode: opSendZC, fd: int32(a.fd), addr: address(data), length: 10_000})
		c.note("%s", result)
		if result != "10000 bytes" {
			a.write(10_000)
			b.read(10_000)
			return
		}
		a.sent += 10_000
		b.read(10_000)
		c.note("notice: %s", r.waitFor(func(int32) string { return "yes" }))
		runtime.KeepAlive(data)
	})},
	{name: "io_uring splice", does: "IORING_OP_SPLICE from the socket into a pipe, with bytes waiting", run: withRing(func(c *trial, r *ring, a, b *end) {
		_, w := c.pipe()
		b.deliver(100)
		c.note("%s", r.do(sqe{
			opcode: opSplice, fd: int32(w), off: ^uint64(0), addr: ^uint64(0), length: 1000,
			flags: unix.SPLICE_F_NONBLOCK, spliceFD: int32(a.fd),
		}))
	})},
}

const (
	opPollAdd = 6
	opRead    = 22
	opWrite   = 23
	opSend    = 26
	opRecv    = 27
	opSplice  = 30
	opSendZC  = 47
)

// sqe is struct io_uring_sqe.
type sqe struct {
	opcode, sqeFlags   uint8
	ioprio             uint16
	fd                 int32
	off, addr          uint64
	length, flags      uint32
	userData           uint64
	bufIndex, personal uint16
	spliceFD           int32
	_                  [2]uint64
}

type cqe struct {
	userData uint64
	res      int32
	flags    uint32
}

// uringParams is struct io_uring_params.
type uringParams struct {
	sqEntries, cqEntries, flags, cpu, idle, features, wqFD uint32
	_                                                      [3]uint32
	sq                                                     struct{ head, tail, mask, entries, flags, dropped, array, _, _, _ uint32 }
	cq                                                     struct{ head, tail, mask, entries, overflow, cqes, flags, _, _, _ uint32 }
}

// A ring is an io_uring, used for one request at a time.
type ring struct {
	c      *trial
	fd     int
	params uringParams
	rings  []byte
	sqes   []byte
}

func address(b []byte) uint64 { return uint64(uintptr(unsafe.Pointer(&b[0]))) }

// withRing gives a behaviour a ring and a pair.
func withRing(f func(c *trial, r *ring, a, b *end)) func(c *trial) {
	return func(c *trial) {
		// Completions are carried out by the thread that has submitted, and what the
		// kernel has left to do when the ring is closed interrupts it later
		// (io_ring_exit_work()). So the thread must end with the trial.
		runtime.LockOSThread()
		a, b := c.pair()
		r := &ring{c: c}
		fd, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, 8, uintptr(unsafe.Pointer(&r.params)), 0)
		if errno != 0 {
			// Containers and hardened kernels refuse io_uring to everybody.
			c.note("io_uring_setup: %s", errName(errno))
			a.warm()
			return
		}
		r.fd = int(fd)
		defer unix.Close(r.fd)
		var err error
		size := int(r.params.cq.cqes) + int(r.params.cqEntries)*int(unsafe.Sizeof(cqe{}))
		r.rings, err = unix.Mmap(r.fd, 0, max(size, int(r.params.sq.array+4*r.params.sqEntries)), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
		c.check(err)
		defer func() { _ = unix.Munmap(r.rings) }()
		const offSQEs = 0x10000000
		r.sqes, err = unix.Mmap(r.fd, offSQEs, int(r.params.sqEntries)*int(unsafe.Sizeof(sqe{})), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
		c.check(err)
		defer func() { _ = unix.Munmap(r.sqes) }()
		f(c, r, a, b)
	}
}

func (r *ring) at(offset uint32) *uint32 { return (*uint32)(unsafe.Pointer(&r.rings[offset])) }

// submit submits one request.
func (r *ring) submit(s sqe) {
	tail := atomic.LoadUint32(r.at(r.params.sq.tail))
	i := tail & *r.at(r.params.sq.mask)
	*(*sqe)(unsafe.Pointer(&r.sqes[uintptr(i)*unsafe.Sizeof(s)])) = s
	*r.at(r.params.sq.array + 4*i) = i
	atomic.StoreUint32(r.at(r.params.sq.tail), tail+1)
	n, _, errno := unix.Syscall6(unix.SYS_IO_URING_ENTER, uintptr(r.fd), 1, 0, 0, 0, 0)
	if errno != 0 || n != 1 {
		r.c.fatalf("io_uring_enter: %d, %w", n, errno)
	}
}

// do submits a request and waits for its result.
func (r *ring) do(s sqe) string {
	r.submit(s)
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
	got := within(patience, func() bool {
		const getEvents = 1
		_, _, errno := unix.Syscall6(unix.SYS_IO_URING_ENTER, uintptr(r.fd), 0, 0, getEvents, 0, 0)
		if errno != 0 && !errors.Is(errno, unix.EINTR) {
			r.c.fatalf("io_uring_enter: %w", errno)
		}
		return *r.at(r.params.cq.head) != atomic.LoadUint32(r.at(r.params.cq.tail))
	})
	if !got {
		return "never comes"
	}
	head := *r.at(r.params.cq.head)
	i := head & *r.at(r.params.cq.mask)
	e := *(*cqe)(unsafe.Pointer(&r.rings[uintptr(r.params.cq.cqes)+uintptr(i)*unsafe.Sizeof(cqe{})]))
	atomic.StoreUint32(r.at(r.params.cq.head), head+1)
	return say(e.res)
}
