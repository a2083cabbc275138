package conformance

import (
	"bytes"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

func pointer(b []byte) unsafe.Pointer { return unsafe.Pointer(&b[0]) }

var descriptors = []behaviour{
	{name: "dup", does: "both descriptors are the connection; the end comes when the last is closed", run: func(c *trial) {
		a, b := c.pair()
		fd, err := unix.FcntlInt(uintptr(a.fd), unix.F_DUPFD_CLOEXEC, 0)
		c.check(err)
		other := &end{c: c, fd: fd, peer: b}
		c.later(other.close)
		a.write(10)
		other.sent = a.sent
		other.write(10)
		b.read(20)
		b.deliver(20)
		c.note("%s", a.recv(10, 0))
		other.got = a.got
		c.note("%s", other.recv(10, 0))
		a.close()
		c.note("one closed: %s", b.recv(1, 0))
		other.write(10)
		b.read(10)
		other.close()
		b.await(unix.POLLRDHUP)
		c.note("both closed: %s", b.recv(1, 0))
	}},
	{name: "passed by SCM_RIGHTS", does: "to another process outside the pods, which goes on with the connection", run: func(c *trial) {
		a, b := c.pair()
		a.warm()
		b.deliver(1000)
		h := c.startHelper("passed", -1)
		c.check(unix.Sendmsg(h.control, []byte("x"), unix.UnixRights(a.fd), nil, 0))
		a.close()
		// It echoes until the end.
		b.read(1000)
		b.write(5000)
		b.read(5000)
		c.note("bytes sent before and after")
		c.note("%s", b.shutdown(unix.SHUT_WR))
		b.readEnd()
		c.note("the end; it says %s", h.wait())
	}},
	{name: "shared with a child", does: "a child process has the descriptor too and reads half; closing one of both ends nothing", run: func(c *trial) {
		a, b := c.pair()
		b.deliver(100)
		c.note("child: %s", c.help("read-60", a.fd))
		a.got += 60
		c.note("parent: %s", a.recv(1000, 0))
		c.note("child sends: %s", c.help("send-40", a.fd))
		a.sent += 40
		a.write(10)
		b.read(50)
		c.note("all bytes")
	}},
	{name: "opened again through /proc", does: "a socket cannot be opened", quiet: true, run: func(c *trial) {
		a, _ := c.pair()
		_, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", a.fd), unix.O_RDWR, 0)
		c.note("%s", errName(err))
	}},
	{name: "not a file", does: "lseek, pread, pwrite, fsync, ftruncate, mmap and an unknown ioctl", run: func(c *trial) {
		a, b := c.pair()
		b.deliver(10)
		_, err := unix.Seek(a.fd, 0, 0)
		c.note("%s", errName(err))
		_, err = unix.Pread(a.fd, make([]byte, 10), 0)
		c.note("%s", errName(err))
		_, err = unix.Pwrite(a.fd, make([]byte, 10), 0)
		c.note("%s", errName(err))
		c.note("%s", errName(unix.Fsync(a.fd)))
		c.note("%s", errName(unix.Ftruncate(a.fd, 0)))
		_, err = unix.Mmap(a.fd, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		c.note("%s", errName(err))
		c.note("%s", a.ioctl(0x4321))
		c.note("%s", a.recv(100, 0))
	}},
	{name: "connect and listen on a connection", does: "a second connect, bind, listen and accept", run: func(c *trial) {
		a, b := c.pair()
		a.warm()
		peer, err := unix.Getpeername(a.fd)
		c.check(err)
		c.note("connect: %s", errName(unix.Connect(a.fd, peer)))
		c.note("bind: %s", errName(unix.Bind(a.fd, &unix.SockaddrInet4{})))
		c.note("listen: %s", errName(unix.Listen(a.fd, 1)))
		_, _, err = unix.Accept(a.fd)
		c.note("accept: %s", errName(err))
		b.deliver(10)
		c.note("%s", a.recv(100, 0))
	}},
	{name: "many threads", once: true, does: "four threads write to one socket; all bytes of each arrive", run: func(c *trial) {
		a, b := c.blockingPair()
		const writers, records, size = 4, 500, 1000
		counts := map[byte]int{}
		parts := []func(){func() {
			buf := make([]byte, 64<<10)
			for left := writers * records * size; left > 0; {
				b.await(unix.POLLIN)
				n, _, err := unix.Recvfrom(b.fd, buf, unix.MSG_DONTWAIT)
				c.check(err)
				if n == 0 {
					c.fatalf("the stream ends early")
				}
				for _, x := range buf[:n] {
					counts[x]++
				}
				left -= n
			}
		}}
		for i := range writers {
			parts = append(parts, func() {
				for range records {
					_, err := unix.Write(a.fd, bytes.Repeat([]byte{byte('a' + i)}, size))
					c.check(err)
				}
			})
		}
		c.together(parts...)
		for i := range writers {
			c.note("%d bytes", counts[byte('a'+i)])
		}
	}},
}
