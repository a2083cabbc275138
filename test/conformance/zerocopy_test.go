package conformance

import (
	"errors"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

var zeroCopies = []behaviour{
	{name: "sendfile", does: "3 MB of a file to the socket", run: func(c *trial) {
		a, b := c.pair()
		const total = 3_000_000
		file := c.file(bytesAt(0, total))
		c.together(func() { b.read(total) }, func() {
			for offset := int64(0); offset < total; {
				_, err := unix.Sendfile(a.fd, file, &offset, total-int(offset))
				if errors.Is(err, unix.EAGAIN) {
					a.await(unix.POLLOUT)
					continue
				}
				c.check(err)
			}
		})
		c.note("all bytes")
	}},
	{name: "sendfile and write", does: "in turns: order is kept", run: func(c *trial) {
		a, b := c.pair()
		file := c.file(bytesAt(0, 400_000))
		for range 20 {
			a.write(7000)
			offset := a.sent
			n, err := unix.Sendfile(a.fd, file, &offset, 9000)
			c.check(err)
			a.sent += int64(n)
			b.read(int(a.sent - b.got))
		}
		c.note("all bytes in order")
	}},
	{name: "splice from a pipe", does: "200 kB from a pipe to the socket", run: func(c *trial) {
		a, b := c.pair()
		r, w := c.pipe()
		for range 20 {
			_, err := unix.Write(w, bytesAt(a.sent, 10_000))
			c.check(err)
			for left := 10_000; left > 0; {
				n, err := unix.Splice(r, nil, a.fd, nil, left, unix.SPLICE_F_MOVE)
				if err != nil {
					c.note("%s", errName(err))
					// The guard refuses splice: what is not refused is a write.
					a.write(10)
					b.read(10)
					return
				}
				a.sent += n
				left -= int(n)
			}
			b.read(10_000)
		}
		c.note("all bytes in order")
	}},
	{name: "splice to a pipe", does: "from the socket into a pipe, with bytes waiting", run: func(c *trial) {
		a, b := c.pair()
		r, w := c.pipe()
		b.deliver(1000)
		n, err := unix.Splice(a.fd, nil, w, nil, 10_000, unix.SPLICE_F_NONBLOCK)
		c.note("%s", outcome(int(n), err))
		if err == nil && n > 0 {
			buf := make([]byte, n)
			m, err := unix.Read(r, buf)
			c.check(err)
			c.note("%s", a.took(buf[:m], false))
		}
		c.note("then recv: %s", a.recv(5000, 0))
	}},
	{name: "splice to a pipe at the end", does: "the other end has closed, all is read", run: func(c *trial) {
		a, b := c.pair()
		_, w := c.pipe()
		b.write(10)
		b.close()
		a.read(10)
		a.await(unix.POLLRDHUP)
		n, err := unix.Splice(a.fd, nil, w, nil, 10_000, unix.SPLICE_F_NONBLOCK)
		c.note("%s", outcome(int(n), err))
	}},
	{name: "vmsplice", does: "memory given to a pipe, spliced to the socket", run: func(c *trial) {
		a, b := c.pair()
		r, w := c.pipe()
		data := bytesAt(0, 20_000)
		iov := unix.Iovec{Base: &data[0]}
		iov.SetLen(len(data))
		n, err := unix.Vmsplice(w, []unix.Iovec{iov}, 0)
		c.note("vmsplice: %s", outcome(n, err))
		for left := n; left > 0; {
			m, err := unix.Splice(r, nil, a.fd, nil, left, 0)
			if err != nil {
				c.note("splice: %s", errName(err))
				a.write(10)
				b.read(10)
				return
			}
			a.sent += m
			left -= int(m)
		}
		b.read(20_000)
		c.note("all bytes in order")
	}},
	{name: "MSG_ZEROCOPY", does: "the bytes arrive", run: func(c *trial) {
		a, b := c.pair()
		a.set(unix.SOL_SOCKET, unix.SO_ZEROCOPY, 1)
		c.note("%s", a.send(10_000, unix.MSG_ZEROCOPY))
		b.read(10_000)
		c.note("all bytes")
	}},
	{name: "MSG_ZEROCOPY's completion", does: "the error queue tells when the buffer is free again", run: func(c *trial) {
		a, b := c.pair()
		a.set(unix.SOL_SOCKET, unix.SO_ZEROCOPY, 1)
		c.note("%s", a.send(10_000, unix.MSG_ZEROCOPY))
		b.read(10_000)
		got := within(soon, func() bool {
			_, oobn, _, _, err := unix.Recvmsg(a.fd, nil, make([]byte, 200), unix.MSG_ERRQUEUE)
			return err == nil && oobn > 0
		})
		c.note("completion: %t", got)
	}},
	{name: "TCP_ZEROCOPY_RECEIVE", does: "received pages mapped into memory, the rest copied", run: func(c *trial) {
		a, b := c.pair()
		b.deliver(100)
		addr, err := unix.MmapPtr(a.fd, 0, nil, 16*pageSize, unix.PROT_READ, unix.MAP_SHARED)
		if err != nil {
			c.note("mmap: %s", errName(err))
		} else {
			defer func() { _ = unix.MunmapPtr(addr, 16*pageSize) }()
			// struct tcp_zerocopy_receive with a buffer for what cannot be mapped
			buf := make([]byte, 1000)
			z := struct {
				address         uint64
				length, skip    uint32
				inq             uint32
				err             int32
				copyAddress     uint64
				copyLen         int32
				flags           uint32
				control, ctlLen uint64
				ctlFlags        uint32
				_               uint32
			}{address: uint64(uintptr(addr)), length: uint32(16 * pageSize), copyAddress: uint64(uintptr(unsafe.Pointer(&buf[0]))), copyLen: int32(len(buf))}
			const tcpZerocopyReceive = 35
			length := uint32(unsafe.Sizeof(z))
			_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(a.fd), unix.IPPROTO_TCP, tcpZerocopyReceive,
				uintptr(unsafe.Pointer(&z)), uintptr(unsafe.Pointer(&length)), 0)
			if errno != 0 {
				c.note("%s", errName(errno))
			} else {
				c.note("%d mapped, %d copied", z.length, z.copyLen)
				a.took(buf[:z.copyLen], false)
			}
		}
		c.note("then recv: %s", a.recv(1000, 0))
	}},
}

// file makes a file with that content.
func (c *trial) file(content []byte) int {
	fd, err := unix.MemfdCreate("conformance", unix.MFD_CLOEXEC)
	c.check(err)
	f := os.NewFile(uintptr(fd), "memory")
	c.later(func() { f.Close() })
	_, err = f.Write(content)
	c.check(err)
	return fd
}

// pipe makes a pipe.
func (c *trial) pipe() (r, w int) {
	var p [2]int
	c.check(unix.Pipe2(p[:], unix.O_CLOEXEC))
	c.later(func() {
		unix.Close(p[0])
		unix.Close(p[1])
	})
	return p[0], p[1]
}
