package hijack_test

import (
	"errors"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/plugin/datapath"
	"github.com/skipstack/skipstack/test/must"
)

// TestKeepalive shows that a busy accelerated connection still sends keepalive
// probes by TCP, which refresh its conntrack entries.
func TestKeepalive(t *testing.T) {
	l := newLab(t, datapath.LoadOptions{})
	p, _, _ := l.accelerated()
	for _, o := range []struct{ level, name, value int }{
		{unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, 1},
		{unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, 1},
		{unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
	} {
		must.Do(t, unix.SetsockoptInt(p.client, o.level, o.name, o.value))
	}
	sent := func() uint32 {
		info, err := unix.GetsockoptTCPInfo(p.client, unix.IPPROTO_TCP, unix.TCP_INFO)
		must.Do(t, err)
		return info.Segs_out
	}
	before, messages := sent(), l.counters()
	for deadline := time.Now().Add(patience); sent() == before; time.Sleep(time.Millisecond) {
		must.Do(t, p.exchange("busy"))
		if time.Now().After(deadline) {
			t.Fatal("no segment sent")
		}
	}
	for label, m := range l.counters().Since(messages).Messages {
		if label != "redirected" && m.Messages > 0 {
			t.Errorf("%d messages were %s", m.Messages, label)
		}
	}
}

// TestDestroyedSocket ends an accelerated connection from outside, as ss -K does.
func TestDestroyedSocket(t *testing.T) {
	l := newLab(t, datapath.LoadOptions{})
	p, client, server := l.accelerated()
	name, err := unix.Getsockname(p.client)
	must.Do(t, err)
	local := name.(*unix.SockaddrInet4)
	err = client.Do(func() error {
		return netlink.SocketDestroy(&net.TCPAddr{IP: local.Addr[:], Port: local.Port}, &net.TCPAddr{IP: server.Addr().AsSlice(), Port: int(server.Port())})
	})
	if errors.Is(err, unix.EOPNOTSUPP) {
		t.Skip("needs CONFIG_INET_DIAG_DESTROY")
	}
	must.Do(t, err)
	for _, end := range []struct {
		fd   int
		want error
	}{{p.client, unix.ECONNABORTED}, {p.server, unix.ECONNRESET}} {
		must.Do(t, wait(end.fd, unix.POLLIN))
		if n, err := unix.Read(end.fd, make([]byte, 10)); !errors.Is(err, end.want) {
			t.Errorf("read: %d, %v, want %v", n, err, end.want)
		}
	}
}

// accelerated makes a connection between two pods that has redirected already.
func (l *lab) accelerated() (p pair, client *pod, server netip.AddrPort) {
	l.t.Helper()
	client, b := l.pod("client"), l.pod("server")
	server = netip.AddrPortFrom(b.addr, 80)
	clients, listener := newCell(l.t, client.Pod, cellOptions{}), newCell(l.t, b.Pod, cellOptions{}).listen(l.t, server)
	before := l.counters()
	p, err := newPair(clients, listener, server)
	must.Do(l.t, err)
	l.t.Cleanup(func() { must.Do(l.t, p.close()) })
	must.Do(l.t, p.exchange("first"))
	l.expect(before, map[string]uint64{"enrolled": 1})
	return p, client, server
}
