package conformance

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

var options = []behaviour{
	{name: "options read back", does: "what getsockopt(2) says of a new connection", quiet: true, run: func(c *trial) {
		a, _ := c.pair()
		for _, o := range []struct {
			name          string
			level, option int
		}{
			{"SO_TYPE", unix.SOL_SOCKET, unix.SO_TYPE}, {"SO_PROTOCOL", unix.SOL_SOCKET, unix.SO_PROTOCOL},
			{"SO_DOMAIN", unix.SOL_SOCKET, unix.SO_DOMAIN}, {"SO_ERROR", unix.SOL_SOCKET, unix.SO_ERROR},
			{"SO_ACCEPTCONN", unix.SOL_SOCKET, unix.SO_ACCEPTCONN}, {"SO_RCVLOWAT", unix.SOL_SOCKET, unix.SO_RCVLOWAT},
			{"SO_KEEPALIVE", unix.SOL_SOCKET, unix.SO_KEEPALIVE}, {"SO_REUSEADDR", unix.SOL_SOCKET, unix.SO_REUSEADDR},
			{"SO_PRIORITY", unix.SOL_SOCKET, unix.SO_PRIORITY}, {"SO_MARK", unix.SOL_SOCKET, unix.SO_MARK},
			{"TCP_MAXSEG", unix.IPPROTO_TCP, unix.TCP_MAXSEG}, {"TCP_NODELAY", unix.IPPROTO_TCP, unix.TCP_NODELAY},
			{"TCP_USER_TIMEOUT", unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT}, {"TCP_KEEPIDLE", unix.IPPROTO_TCP, unix.TCP_KEEPIDLE},
			{"IP_TOS", unix.IPPROTO_IP, unix.IP_TOS},
			{"IP_TTL", unix.IPPROTO_IP, unix.IP_TTL},
		} {
			c.note("%s %d", o.name, a.get(o.level, o.option))
		}
		s, err := unix.GetsockoptString(a.fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION)
		c.check(err)
		c.note("TCP_CONGESTION %s", strings.TrimRight(s, "\x00"))
	}},
	{name: "options set while bytes flow", does: "setsockopt(2) on a connection in use, and the answer of getsockopt(2)", run: func(c *trial) {
		a, b := c.pair()
		a.warm()
		for _, o := range []struct {
			name                 string
			level, option, value int
		}{
			{"TCP_NODELAY", unix.IPPROTO_TCP, unix.TCP_NODELAY, 1}, {"TCP_QUICKACK", unix.IPPROTO_TCP, unix.TCP_QUICKACK, 1},
			{"TCP_MAXSEG", unix.IPPROTO_TCP, unix.TCP_MAXSEG, 1000}, {"TCP_USER_TIMEOUT", unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, 12345},
			{"TCP_NOTSENT_LOWAT", unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT, 20000}, {"SO_SNDBUF", unix.SOL_SOCKET, unix.SO_SNDBUF, 20000},
			{"SO_RCVBUF", unix.SOL_SOCKET, unix.SO_RCVBUF, 20000}, {"SO_KEEPALIVE", unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
			{"SO_PRIORITY", unix.SOL_SOCKET, unix.SO_PRIORITY, 3}, {"SO_MARK", unix.SOL_SOCKET, unix.SO_MARK, 7},
			{"IP_TOS", unix.IPPROTO_IP, unix.IP_TOS, 0x10}, {"SO_BUSY_POLL", unix.SOL_SOCKET, unix.SO_BUSY_POLL, 0},
			{"SO_MAX_PACING_RATE", unix.SOL_SOCKET, unix.SO_MAX_PACING_RATE, 1 << 30},
		} {
			err := unix.SetsockoptInt(a.fd, o.level, o.option, o.value)
			got, getErr := unix.GetsockoptInt(a.fd, o.level, o.option)
			c.note("%s %s %s %d", o.name, errName(err), errName(getErr), got)
			a.write(100)
			b.read(100)
			b.write(100)
			a.read(100)
		}
	}},
	{name: "addresses", does: "getsockname(2) and getpeername(2) agree at both ends", quiet: true, run: func(c *trial) {
		a, b := c.pair()
		name := func(e *end, f func(int) (unix.Sockaddr, error)) string {
			sa, err := f(e.fd)
			c.check(err)
			return addrPort(sa).String()
		}
		c.note("%t", name(a, unix.Getsockname) == name(b, unix.Getpeername) && name(a, unix.Getpeername) == name(b, unix.Getsockname))
		b.close()
		a.await(unix.POLLRDHUP)
		_, err := unix.Getpeername(a.fd)
		c.note("after the other end has closed: %s", errName(err))
	}},
	{name: "SO_RCVBUF", does: "a receiver with a buffer of 16 KiB stops the writer before 1 MiB; then everything is read", run: func(c *trial) {
		setup := func(fd int) error {
			return errors.Join(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 16<<10),
				unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, 16<<10))
		}
		a, b := c.pairWith(socketOptions{setup: setup})
		b.fill()
		c.note("%t", b.sent < 1<<20)
		a.read(int(b.sent))
		b.deliver(10)
		c.note("%s", a.recv(100, 0))
	}},
	{name: "SO_KEEPALIVE on an idle connection", does: "an idle connection outlives its keepalive time many times over, because probes are answered", run: func(c *trial) {
		a, _ := c.pair()
		a.keepalive(1, 1, 3)
		a.warm()
		before := c.probes(a)
		c.until("five keepalive probes are sent", func() bool { return c.probes(a) >= before+5 })
		a.warm()
		c.note("alive")
	}},
	{name: "SO_KEEPALIVE with the network down", does: "segments are dropped: the idle connection ends with ETIMEDOUT", run: func(c *trial) {
		a, _ := c.pair()
		a.warm()
		c.drop(c.rig.client, 100)
		c.drop(c.rig.server, 100)
		a.keepalive(1, 1, 2)
		a.await(unix.POLLERR)
		c.note("%s", errName(a.err()))
	}},
	{name: "TCP_USER_TIMEOUT on an idle connection", does: "with keepalive it ends an idle connection whose network is down, and no other", run: func(c *trial) {
		a, b := c.pair()
		a.set(unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(soon.Milliseconds()))
		a.keepalive(1, 1, 100)
		a.warm()
		before := c.probes(a)
		c.until("three keepalive probes are sent", func() bool { return c.probes(a) >= before+3 })
		b.deliver(10)
		c.note("%s", a.recv(10, 0))
		c.drop(c.rig.client, 100)
		c.drop(c.rig.server, 100)
		a.await(unix.POLLERR)
		c.note("%s", errName(a.err()))
	}},
	{name: "TCP_USER_TIMEOUT with bytes unread", does: "a reader that takes its time, with its window shut, is no dead peer", run: func(c *trial) {
		a, b := c.pair()
		a.fill()
		// No timeout is set: the datapath must not set one either.
		time.Sleep(2 * time.Second)
		c.note("user timeout %d", a.get(unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT))
		b.read(int(a.sent))
		a.warm()
		c.note("all bytes")
	}},
	{name: "SO_ATTACH_FILTER", does: "a classic BPF filter that drops every segment, attached to a connected receiver", run: func(c *trial) {
		a, b := c.pair()
		a.warm()
		drop := []unix.SockFilter{{Code: unix.BPF_RET | unix.BPF_K, K: 0}}
		c.check(unix.SetsockoptSockFprog(a.fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: 1, Filter: &drop[0]}))
		b.write(10)
		c.note("received: %t", within(300*time.Millisecond, func() bool { return a.recv(10, unix.MSG_PEEK|unix.MSG_DONTWAIT) != "EAGAIN" }))
		c.check(unix.SetsockoptInt(a.fd, unix.SOL_SOCKET, unix.SO_DETACH_FILTER, 0))
		a.read(10)
		c.note("without the filter they come")
	}},
	{name: "TCP_CONGESTION", does: "changed on a connection in use", run: func(c *trial) {
		a, b := c.pair()
		a.warm()
		c.note("%s", errName(unix.SetsockoptString(a.fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION, "reno")))
		a.write(100)
		b.read(100)
		s, err := unix.GetsockoptString(a.fd, unix.IPPROTO_TCP, unix.TCP_CONGESTION)
		c.check(err)
		c.note("%s", strings.TrimRight(s, "\x00"))
	}},
	{name: "kTLS", does: "the tls ULP attached on both sides, with keys, before the first byte; refused alike where the kernel has none", quiet: true, run: kTLS},
	{name: "kTLS on a connection in use", does: "as after a TLS handshake in user space: some bytes go both ways, then the ULP is attached", run: func(c *trial) {
		a, _ := c.pair()
		a.warm()
		tls(c, a)
	}},
	{name: "kTLS at the receiver", does: "the tls ULP attached on one side, with keys to receive; the other side encrypts in user space", run: func(c *trial) {
		a, b := c.pair()
		a.warm()
		if !attachTLS(c, b, tlsRX) {
			return
		}
		record := tlsRecord(c, bytesAt(0, 1000))
		n, err := unix.Write(a.fd, record)
		c.note("a record of %d bytes: %s", len(record), outcome(n, err))
		b.await(unix.POLLIN)
		buf := make([]byte, 2000)
		n, err = unix.Read(b.fd, buf)
		c.note("%s, decrypted: %t", outcome(n, err), bytes.Equal(buf[:max(n, 0)], bytesAt(0, 1000)))
	}},
}

func kTLS(c *trial) {
	a, _ := c.pair()
	tls(c, a)
}

// Of setsockopt(2): include/linux/socket.h, include/uapi/linux/tls.h.
const solTLS, tlsTX, tlsRX = 282, 1, 2

// attachTLS attaches kTLS, with keys for some directions, unless the kernel refuses.
func attachTLS(c *trial, e *end, directions ...int) bool {
	if err := unix.SetsockoptString(e.fd, unix.IPPROTO_TCP, unix.TCP_ULP, "tls"); err != nil {
		c.note("TCP_ULP: %s", errName(err))
		return false
	}
	for _, dir := range directions {
		if err := unix.SetsockoptString(e.fd, solTLS, dir, string(tlsKeys)); err != nil {
			c.note("keys for direction %d: %s", dir, errName(err))
			return false
		}
	}
	return true
}

// tls attaches kTLS at both ends and sends records both ways.
func tls(c *trial, a *end) {
	b := a.peer
	if !attachTLS(c, a, tlsTX, tlsRX) || !attachTLS(c, b, tlsTX, tlsRX) {
		return
	}
	for _, e := range []*end{a, b} {
		e.write(20_000)
		e.peer.read(20_000)
	}
	c.note("20000 bytes both ways")
}

// tlsKeys is struct tls12_crypto_info_aes_gcm_128, the same in both directions.
var tlsKeys = func() []byte {
	const tls12, aesGCM128 = 0x0303, 51
	b := binary.NativeEndian.AppendUint16(nil, tls12)
	b = binary.NativeEndian.AppendUint16(b, aesGCM128)
	for _, field := range [][]byte{tlsNonce, tlsKey, tlsSalt, tlsSequence} {
		b = append(b, field...)
	}
	return b
}()

var (
	tlsNonce    = bytes.Repeat([]byte{1}, 8)
	tlsKey      = bytes.Repeat([]byte{2}, 16)
	tlsSalt     = bytes.Repeat([]byte{3}, 4)
	tlsSequence = bytes.Repeat([]byte{4}, 8)
)

// tlsRecord is the first record that is sent with tlsKeys, as TLS 1.2 has it: RFC 5246,
// section 6.2.3.3, and RFC 5288, section 3.
func tlsRecord(c *trial, plain []byte) []byte {
	block, err := aes.NewCipher(tlsKey)
	c.check(err)
	gcm, err := cipher.NewGCM(block)
	c.check(err)
	header := []byte{23, 3, 3} // application data
	size := len(tlsNonce) + len(plain) + gcm.Overhead()
	authenticated := binary.BigEndian.AppendUint16(append(slices.Clone(tlsSequence), header...), uint16(len(plain)))
	record := append(binary.BigEndian.AppendUint16(header, uint16(size)), tlsNonce...)
	return gcm.Seal(record, append(slices.Clone(tlsSalt), tlsNonce...), plain, authenticated)
}

func (e *end) keepalive(idle, interval, probes int) {
	e.set(unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, idle)
	e.set(unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, interval)
	e.set(unix.IPPROTO_TCP, unix.TCP_KEEPCNT, probes)
	e.set(unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1)
}

// probes counts the keepalive probes that the end's pod has sent.
func (c *trial) probes(e *end) (n int) {
	var text []byte
	c.check(c.pod(e).Do(func() (err error) {
		text, err = os.ReadFile("/proc/thread-self/net/netstat")
		return err
	}))
	// Pairs of lines: names, then values.
	lines := strings.Split(string(text), "\n")
	for i := 0; i+1 < len(lines); i += 2 {
		names, values := strings.Fields(lines[i]), strings.Fields(lines[i+1])
		for j, name := range names {
			if name == "TCPKeepAlive" {
				_, err := fmt.Sscan(values[j], &n)
				c.check(err)
				return n
			}
		}
	}
	c.fatalf("no TCPKeepAlive in /proc/net/netstat")
	return 0
}
