package datapath_test

import (
	"runtime"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/test/must"
)

// The little of io_uring(7) that a single request takes: include/uapi/linux/io_uring.h.
const (
	opRead     = 22
	opSplice   = 30
	forceAsync = 1 << 4 // IOSQE_ASYNC: by a worker

	offSQRing   = 0
	offSQEs     = 0x10000000
	enterEvents = 1 // IORING_ENTER_GETEVENTS
	sizeSQE     = 64
)

// sqe is a request.
type sqe struct {
	opcode, flags uint8
	fd            int32
	off, addr     uint64
	buf           []byte // in place of addr
	len           uint32
	spliceFrom    int32
}

type uringParams struct {
	sqEntries, cqEntries, flags, sqThreadCPU, sqThreadIdle, features, wqFD uint32
	_                                                                      [3]uint32
	sq, cq                                                                 struct {
		head, tail, mask, entries uint32
		// Of the submission ring: flags, dropped, array. Of the completion ring:
		// overflow, cqes, flags.
		a, b, c uint32
		_       uint32
		_       uint64
	}
}

// uring makes one request and returns its result.
func uring(t *testing.T, s sqe) (int, error) {
	t.Helper()
	var p uringParams
	fd, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, 1, uintptr(unsafe.Pointer(&p)), 0)
	if errno == unix.ENOSYS || errno == unix.EPERM {
		t.Skipf("needs io_uring: %v", errno)
	}
	if errno != 0 {
		t.Fatalf("io_uring_setup: %v", errno)
	}
	defer unix.Close(int(fd))
	size := max(p.sq.c+p.sqEntries*4, p.cq.b+p.cqEntries*16)
	ring := must.Get(unix.Mmap(int(fd), offSQRing, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE))(t)
	defer unix.Munmap(ring)
	requests := must.Get(unix.Mmap(int(fd), offSQEs, sizeSQE, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE))(t)
	defer unix.Munmap(requests)

	var pin runtime.Pinner
	defer pin.Unpin()
	if s.buf != nil {
		pin.Pin(&s.buf[0])
		s.addr = uint64(uintptr(unsafe.Pointer(&s.buf[0])))
	}
	type entry struct { // struct io_uring_sqe
		opcode, flags uint8
		ioprio        uint16
		fd            int32
		off, addr     uint64
		len, rwFlags  uint32
		userData      uint64
		bufIndex      uint16
		personality   uint16
		spliceFrom    int32
		_             [2]uint64
	}
	*(*entry)(unsafe.Pointer(&requests[0])) = entry{opcode: s.opcode, flags: s.flags, fd: s.fd, off: s.off, addr: s.addr, len: s.len, spliceFrom: s.spliceFrom}
	at := func(offset uint32) *uint32 { return (*uint32)(unsafe.Pointer(&ring[offset])) }
	*at(p.sq.c) = 0    // the first entry is the first request
	*at(p.sq.tail) = 1 // the kernel looks when it is entered
	for {
		_, _, errno = unix.Syscall6(unix.SYS_IO_URING_ENTER, fd, 1, 1, enterEvents, 0, 0)
		if errno != unix.EINTR {
			break
		}
	}
	if errno != 0 {
		t.Fatalf("io_uring_enter: %v", errno)
	}
	if *at(p.cq.tail) != 1 {
		t.Fatal("io_uring did not complete the request")
	}
	if res := int32(*at(p.cq.b + 8)); res < 0 {
		return 0, unix.Errno(-res)
	} else {
		return int(res), nil
	}
}
