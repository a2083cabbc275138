package conformance

import (
	"encoding/binary"
	"fmt"
	"os"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

const siocOutQNSD = 0x894b

var counts = []behaviour{
	{name: "FIONREAD", does: "ioctl(FIONREAD), alias SIOCINQ: bytes that can be read, as they come and are read", run: func(c *trial) {
		a, b := c.pair()
		c.note("%s", a.ioctl(unix.TIOCINQ))
		b.deliver(100)
		c.note("%s", a.ioctl(unix.TIOCINQ))
		b.deliver(1000)
		c.note("%s", a.ioctl(unix.TIOCINQ))
		a.recv(30, 0)
		c.note("%s", a.ioctl(unix.TIOCINQ))
		a.recv(30, unix.MSG_PEEK)
		c.note("%s", a.ioctl(unix.TIOCINQ))
		a.recv(5000, 0)
		c.note("%s", a.ioctl(unix.TIOCINQ))
	}},
	{name: "FIONREAD at the end", does: "bytes before the end are counted, the end is not", run: func(c *trial) {
		a, b := c.pair()
		b.write(100)
		b.close()
		a.await(unix.POLLRDHUP)
		c.note("%s", a.ioctl(unix.TIOCINQ))
		a.recv(100, 0)
		c.note("%s", a.ioctl(unix.TIOCINQ))
	}},
	{name: "SIOCOUTQ", does: "bytes that have not arrived: none once they have, some while the other end has no room", run: func(c *trial) {
		a, b := c.pair()
		a.write(1000)
		a.arrived()
		c.note("arrived: %s", a.ioctl(unix.TIOCOUTQ))
		c.note("%s", b.recv(5000, 0))
		a.fill()
		c.note("no room: %t", a.ioctl(unix.TIOCOUTQ) != "0")
		c.note("not sent: %t", a.ioctl(siocOutQNSD) != "0")
		b.read(int(a.sent - 1000))
		a.arrived()
		c.note("read: %s, %s", a.ioctl(unix.TIOCOUTQ), a.ioctl(siocOutQNSD))
	}},
	{name: "TCP_INFO", does: "state and options, open, half-closed and closed", run: func(c *trial) {
		a, b := c.pair()
		a.warm()
		state := func() string {
			info, err := unix.GetsockoptTCPInfo(a.fd, unix.IPPROTO_TCP, unix.TCP_INFO)
			c.check(err)
			return fmt.Sprintf("state %d, options %#x, unacknowledged %d, lost %d, retransmitted %d",
				info.State, info.Options&0xf, info.Unacked, info.Lost, info.Retrans)
		}
		a.arrived()
		c.note("%s", state())
		c.note("%s", b.shutdown(unix.SHUT_WR))
		a.await(unix.POLLRDHUP)
		c.note("%s", state())
	}},
	{name: "TCP_INFO's byte counts", does: "tcpi_bytes_acked and tcpi_bytes_received after 1000 bytes each way", run: func(c *trial) {
		a, b := c.pair()
		a.write(1000)
		b.read(1000)
		b.write(1000)
		a.read(1000)
		a.arrived()
		info, err := unix.GetsockoptTCPInfo(a.fd, unix.IPPROTO_TCP, unix.TCP_INFO)
		c.check(err)
		// A SYN counts as one in bytes_acked.
		c.note("sent %t, acknowledged %t, received %t", info.Bytes_sent >= 1000, info.Bytes_acked >= 1000, info.Bytes_received >= 1000)
	}},
	{name: "/proc/net/tcp", does: "the receive queue that ss(8) and netstat(8) show", run: func(c *trial) {
		a, b := c.pair()
		b.deliver(1000)
		c.note("%s", c.queues(a))
		a.recv(5000, 0)
	}},
	{name: "SO_MEMINFO", does: "unread bytes are charged to the receiver, and given back when they are read", run: func(c *trial) {
		a, b := c.pair()
		c.note("at first %t", a.meminfo() > 0)
		b.deliver(50_000)
		c.note("unread %t", a.meminfo() >= 50_000)
		a.read(50_000)
		c.until("the charge is given back", func() bool { return a.meminfo() < 50_000 })
		c.note("given back")
	}},
	{name: "fstat", does: "a socket, and no size", run: func(c *trial) {
		a, b := c.pair()
		b.deliver(10)
		var st unix.Stat_t
		c.check(unix.Fstat(a.fd, &st))
		c.note("%#o, %d bytes", st.Mode, st.Size)
		link, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", a.fd))
		c.check(err)
		c.note("%s", link[:strings.IndexByte(link, '[')])
		a.recv(10, 0)
	}},
}

// meminfo is what is charged to the socket for received bytes.
func (e *end) meminfo() uint32 {
	const soMeminfo, vars = 55, 9 // SO_MEMINFO, SK_MEMINFO_VARS
	var info [vars]uint32
	length := uint32(unsafe.Sizeof(info))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(e.fd), unix.SOL_SOCKET, soMeminfo,
		uintptr(unsafe.Pointer(&info)), uintptr(unsafe.Pointer(&length)), 0)
	if errno != 0 {
		e.c.check(errno)
	}
	return info[0] // SK_MEMINFO_RMEM_ALLOC
}

// queues finds the end in /proc/net/tcp of its pod.
func (c *trial) queues(e *end) (line string) {
	name, err := unix.Getsockname(e.fd)
	c.check(err)
	peer, err := unix.Getpeername(e.fd)
	c.check(err)
	hex := func(sa unix.Sockaddr) string {
		a := sa.(*unix.SockaddrInet4)
		return fmt.Sprintf("%08X:%04X", binary.NativeEndian.Uint32(a.Addr[:]), a.Port)
	}
	var table []byte
	c.check(c.pod(e).Do(func() (err error) {
		table, err = os.ReadFile("/proc/thread-self/net/tcp")
		return err
	}))
	for l := range strings.Lines(string(table)) {
		f := strings.Fields(l)
		if len(f) > 4 && f[1] == hex(name) && f[2] == hex(peer) {
			var tx, rx uint32
			_, err := fmt.Sscanf(f[4], "%X:%X", &tx, &rx)
			c.check(err)
			return fmt.Sprintf("state %s, to send %d, to read %d", f[3], tx, rx)
		}
	}
	return "not in the table"
}
