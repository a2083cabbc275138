// Package uring makes requests of io_uring(7), as probes and tests need them: one at a
// time, and without a library that would choose between system calls for them.
package uring

import (
	"errors"
	"fmt"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Operations, flags of requests and offsets of mmap(2): include/uapi/linux/io_uring.h.
const (
	OpPollAdd = 6
	OpRead    = 22
	OpWrite   = 23
	OpSend    = 26
	OpRecv    = 27
	OpSplice  = 30
	OpSendZC  = 47

	ForceAsync = 1 << 4 // IOSQE_ASYNC: by a worker

	// NoOffset is where a splice from or to something without positions is.
	NoOffset = ^uint64(0)

	entries     = 8
	offSQEs     = 0x10000000
	enterEvents = 1 // IORING_ENTER_GETEVENTS
)

// ErrRefused says that the kernel lets nobody here use io_uring, as those of containers
// and hardened ones do.
var ErrRefused = errors.New("io_uring is refused")

// Request is struct io_uring_sqe.
type Request struct {
	Op, RequestFlags   uint8
	ioprio             uint16
	FD                 int32
	Offset, Addr       uint64
	Len, Flags         uint32 // Flags are the operation's: of recv(2), splice(2), the events of poll(2)
	userData           uint64
	bufIndex, personal uint16
	SpliceFD           int32
	_                  [2]uint64
}

// completion is struct io_uring_cqe.
type completion struct {
	userData uint64
	res      int32
	flags    uint32
}

// params is struct io_uring_params.
type params struct {
	sqEntries, cqEntries, flags, cpu, idle, features, wqFD uint32
	_                                                      [3]uint32
	sq                                                     struct{ head, tail, mask, entries, flags, dropped, array, _, _, _ uint32 }
	cq                                                     struct{ head, tail, mask, entries, overflow, cqes, flags, _, _, _ uint32 }
}

// Ring is an io_uring. It is not safe for concurrent use. What the kernel has left to do
// when it is closed interrupts the thread that has submitted (io_ring_exit_work()): who
// minds that locks the goroutine to a thread that ends with it.
type Ring struct {
	fd     int
	params params
	rings  []byte
	sqes   []byte
	bufs   [][]byte // keeps them on the heap, where the kernel finds them
}

// New opens a ring, or fails with ErrRefused. Close it.
func New() (*Ring, error) {
	r := &Ring{}
	fd, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, entries, uintptr(unsafe.Pointer(&r.params)), 0)
	switch errno {
	case 0:
	case unix.ENOSYS, unix.EPERM:
		return nil, fmt.Errorf("%w: %w", ErrRefused, errno)
	default:
		return nil, fmt.Errorf("io_uring_setup: %w", errno)
	}
	r.fd = int(fd)
	size := max(uintptr(r.params.sq.array)+4*uintptr(r.params.sqEntries),
		uintptr(r.params.cq.cqes)+unsafe.Sizeof(completion{})*uintptr(r.params.cqEntries))
	var err error
	for _, part := range []struct {
		of     *[]byte
		offset int64
		size   uintptr
	}{
		{&r.rings, 0, size},
		{&r.sqes, offSQEs, unsafe.Sizeof(Request{}) * uintptr(r.params.sqEntries)},
	} {
		*part.of, err = unix.Mmap(r.fd, part.offset, int(part.size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
		if err != nil {
			return nil, errors.Join(fmt.Errorf("map the ring: %w", err), r.Close())
		}
	}
	return r, nil
}

// Close gives up the ring; requests that are not complete are cancelled.
func (r *Ring) Close() error {
	var errs []error
	for _, part := range [][]byte{r.rings, r.sqes} {
		if part != nil {
			errs = append(errs, unix.Munmap(part))
		}
	}
	return errors.Join(append(errs, unix.Close(r.fd))...)
}

// Submit hands a request to the kernel, with its buffer if it has one, which is the
// ring's until that is closed.
func (r *Ring) Submit(q Request, buf []byte) error {
	if buf != nil {
		r.bufs = append(r.bufs, buf)
		q.Addr, q.Len = uint64(uintptr(unsafe.Pointer(&buf[0]))), uint32(len(buf))
	}
	tail := atomic.LoadUint32(r.at(r.params.sq.tail))
	i := tail & *r.at(r.params.sq.mask)
	*(*Request)(unsafe.Pointer(&r.sqes[uintptr(i)*unsafe.Sizeof(q)])) = q
	*r.at(r.params.sq.array + 4*i) = i
	atomic.StoreUint32(r.at(r.params.sq.tail), tail+1)
	n, err := r.enter(1, 0, 0)
	if err == nil && n != 1 {
		err = fmt.Errorf("io_uring_enter took %d requests, want 1", n)
	}
	return err
}

// Poll returns the result of the request that was completed first, if there is one:
// what the system call would have returned, or a negative errno.
func (r *Ring) Poll() (res int32, ok bool, err error) {
	// Some are completed by the thread that has submitted, when it is in the kernel.
	if _, err := r.enter(0, 0, enterEvents); err != nil {
		return 0, false, err
	}
	res, ok = r.next()
	return res, ok, nil
}

// Wait is Poll that waits.
func (r *Ring) Wait() (int32, error) {
	for {
		if res, ok := r.next(); ok {
			return res, nil
		}
		// A signal ends it early; the kernel says so only if nothing was submitted with it.
		if _, err := r.enter(0, 1, enterEvents); err != nil {
			return 0, err
		}
	}
}

// enter calls io_uring_enter(2) until it is not interrupted.
func (r *Ring) enter(submit, complete, flags uintptr) (int, error) {
	for {
		n, _, errno := unix.Syscall6(unix.SYS_IO_URING_ENTER, uintptr(r.fd), submit, complete, flags, 0, 0)
		switch errno {
		case 0:
			return int(n), nil
		case unix.EINTR:
		default:
			return 0, fmt.Errorf("io_uring_enter: %w", errno)
		}
	}
}

// next takes a completion from the ring.
func (r *Ring) next() (res int32, ok bool) {
	head := *r.at(r.params.cq.head)
	if head == atomic.LoadUint32(r.at(r.params.cq.tail)) {
		return 0, false
	}
	i := head & *r.at(r.params.cq.mask)
	done := *(*completion)(unsafe.Pointer(&r.rings[uintptr(r.params.cq.cqes)+uintptr(i)*unsafe.Sizeof(completion{})]))
	atomic.StoreUint32(r.at(r.params.cq.head), head+1)
	return done.res, true
}

func (r *Ring) at(offset uint32) *uint32 { return (*uint32)(unsafe.Pointer(&r.rings[offset])) }
