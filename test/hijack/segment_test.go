package hijack_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// TCP flags.
const (
	fin = 1 << iota
	syn
	rst
	psh
	ack
)

// A segment is a TCP segment over IPv4. A SYN has the MSS of Ethernet as its
// only option.
type segment struct {
	src, dst netip.AddrPort
	flags    byte
	seq, ack uint32
	payload  string
}

const headers = 20 + 20

var mss = []byte{2, 4, 1460 >> 8, 1460 & 255}

// marshal makes the IPv4 packet.
func (s segment) marshal() []byte {
	b := make([]byte, headers, headers+len(mss)+len(s.payload))
	if s.flags&syn != 0 {
		b = append(b, mss...)
	}
	tcpHeader := len(b) - 20
	b = append(b, s.payload...)
	ip, tcp := b[:20], b[20:]
	ip[0] = 0x45
	binary.BigEndian.PutUint16(ip[2:], uint16(len(b)))
	ip[6] = 0x40 // do not fragment
	ip[8] = 64
	ip[9] = unix.IPPROTO_TCP
	src, dst := s.src.Addr().As4(), s.dst.Addr().As4()
	copy(ip[12:], src[:])
	copy(ip[16:], dst[:])
	binary.BigEndian.PutUint16(ip[10:], ^fold(sum(ip)))
	binary.BigEndian.PutUint16(tcp[0:], s.src.Port())
	binary.BigEndian.PutUint16(tcp[2:], s.dst.Port())
	binary.BigEndian.PutUint32(tcp[4:], s.seq)
	binary.BigEndian.PutUint32(tcp[8:], s.ack)
	tcp[12] = byte(tcpHeader/4) << 4
	tcp[13] = s.flags
	binary.BigEndian.PutUint16(tcp[14:], 0xffff)
	binary.BigEndian.PutUint16(tcp[16:], ^fold(sum(ip[12:20])+unix.IPPROTO_TCP+uint32(len(tcp))+sum(tcp)))
	return b
}

func sum(b []byte) (n uint32) {
	for i, v := range b {
		n += uint32(v) << (8 * (1 - i&1))
	}
	return n
}

func fold(n uint32) uint16 {
	for n > 0xffff {
		n = n>>16 + n&0xffff
	}
	return uint16(n)
}

// parse reads an IPv4 packet; ok is false if it is something else than TCP.
func parse(b []byte) (s segment, ok bool) {
	if len(b) < headers || b[0]>>4 != 4 || b[9] != unix.IPPROTO_TCP {
		return s, false
	}
	b = b[:min(len(b), int(binary.BigEndian.Uint16(b[2:])))]
	ip, tcp := b, b[int(b[0]&15)*4:]
	port := func(addr, port []byte) netip.AddrPort {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(addr)), binary.BigEndian.Uint16(port))
	}
	return segment{
		src: port(ip[12:16], tcp[0:]), dst: port(ip[16:20], tcp[2:]),
		seq: binary.BigEndian.Uint32(tcp[4:]), ack: binary.BigEndian.Uint32(tcp[8:]),
		flags: tcp[13], payload: string(tcp[int(tcp[12]>>4)*4:]),
	}, true
}

// A tun is the far side of a TUN device: whatever hosts the test likes.
type tun struct {
	fd     int
	unread []segment
}

// openTUN makes a TUN device in the caller's network namespace. It goes with
// the descriptor.
func openTUN(name string) (*tun, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open /dev/net/tun: %w", err)
	}
	req, err := unix.NewIfreq(name)
	if err == nil {
		req.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, req)
	}
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("make TUN device %s: %w", name, err)
	}
	return &tun{fd: fd}, nil
}

func (t *tun) close() { unix.Close(t.fd) }

func (t *tun) send(s segment) error {
	if _, err := unix.Write(t.fd, s.marshal()); err != nil {
		return fmt.Errorf("send a segment: %w", err)
	}
	return nil
}

// receive waits for a segment that matches; others are kept for later calls.
func (t *tun) receive(match func(segment) bool) (segment, error) {
	for i, s := range t.unread {
		if match(s) {
			t.unread = append(t.unread[:i], t.unread[i+1:]...)
			return s, nil
		}
	}
	buf := make([]byte, 2048)
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); {
		n, err := unix.Read(t.fd, buf)
		if errors.Is(err, unix.EAGAIN) {
			p := []unix.PollFd{{Fd: int32(t.fd), Events: unix.POLLIN}}
			if _, err := unix.Poll(p, 100); err != nil && !errors.Is(err, unix.EINTR) {
				return segment{}, err
			}
			continue
		}
		if err != nil {
			return segment{}, fmt.Errorf("receive a segment: %w", err)
		}
		s, ok := parse(buf[:n])
		if !ok {
			continue
		}
		if match(s) {
			return s, nil
		}
		t.unread = append(t.unread, s)
	}
	return segment{}, fmt.Errorf("wait for a segment: %w; unread: %+v", os.ErrDeadlineExceeded, t.unread)
}

// drain drops what has arrived.
func (t *tun) drain() {
	t.unread = nil
	buf := make([]byte, 2048)
	for {
		if _, err := unix.Read(t.fd, buf); err != nil {
			return
		}
	}
}
