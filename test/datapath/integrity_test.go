package datapath_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/plugin/datapath"
	"github.com/skipstack/skipstack/test/datapath/traffic"
	"github.com/skipstack/skipstack/test/must"
	"github.com/skipstack/skipstack/test/node"
)

// A route is a way from a client to a listener.
type route struct {
	name   string
	client *pod
	server *pod
	listen netip.AddrPort // port 0
	by     func(l *traffic.Listener) netip.AddrPort
	o      traffic.SocketOptions // of the client
	lo     traffic.SocketOptions // of the listener
}

var any6 = netip.AddrPortFrom(netip.IPv6Unspecified(), 0)

// routes are all the ways in which two ends on one node reach each other.
func routes(t *testing.T, l *lab, client, server *pod) []route {
	t.Helper()
	direct := func(l *traffic.Listener) netip.AddrPort { return l.Addr }
	service := func(ip string) func(*traffic.Listener) netip.AddrPort {
		addr := netip.MustParseAddr(ip)
		return func(tl *traffic.Listener) netip.AddrPort {
			s := must.Get(l.node.AddService(node.ServiceOptions{
				IP: addr, Port: 80, Backend: server.at(addr.Is6(), 0).Addr(), BackendPort: tl.Addr.Port(), Masquerade: true,
			}))(t)
			t.Cleanup(func() { must.Do(t, s.Close()) })
			return netip.AddrPortFrom(addr, 80)
		}
	}
	sidecar := func(p *pod, outbound bool, from uint16) func(*traffic.Listener) netip.AddrPort {
		return func(tl *traffic.Listener) netip.AddrPort {
			s := must.Get(p.Redirect(false, outbound, from, tl.Addr.Port()))(t)
			t.Cleanup(func() { must.Do(t, s.Close()) })
			return server.at(false, from)
		}
	}
	loopback := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), 0)
	return []route{
		{name: "IPv4", client: client, server: server, listen: server.at(false, 0), by: direct},
		{name: "IPv6", client: client, server: server, listen: server.at(true, 0), by: direct},
		{name: "IPv4 to dual-stack", client: client, server: server, listen: any6,
			by: func(l *traffic.Listener) netip.AddrPort { return server.at(false, l.Addr.Port()) }},
		{name: "mapped IPv4", client: client, server: server, listen: server.at(false, 0), by: direct,
			o: traffic.SocketOptions{Family: unix.AF_INET6}},
		{name: "DNAT and masquerade", client: client, server: server, listen: server.at(false, 0), by: service("10.96.0.1")},
		{name: "DNAT and masquerade IPv6", client: client, server: server, listen: server.at(true, 0), by: service("fd00:96::1")},
		{name: "loopback in one pod", client: server, server: server, listen: loopback, by: direct},
		{name: "sidecar of the server", client: client, server: server, listen: any6, by: sidecar(server, false, 81)},
		{name: "sidecar of the client", client: client, server: client, listen: any6, by: sidecar(client, true, 82)},
	}
}

// TestRandomWrites sends random writes both ways over 200 connections at once,
// to slow and to fast readers, with so small a limit that connections change
// between redirecting and TCP all the time.
func TestRandomWrites(t *testing.T) {
	modes(t, func(t *testing.T, s datapath.NodeSettings) {
		l := newLab(t, s, datapath.LoadOptions{})
		client, server := l.pod("client", withLimit(64<<10)), l.pod("server", withLimit(64<<10))
		for _, r := range routes(t, l, client, server) {
			t.Run(r.name, func(t *testing.T) { randomWrites(t, l, r, traffic.Plan{Bytes: 1 << 20, MaxWrite: 256 << 10}, nil) })
		}
		t.Run("loss", func(t *testing.T) {
			for _, p := range []*pod{client, server} {
				p.fastRecovery(t)
			}
			lossy := func() {
				client.drop(t, 5, 0)
				server.drop(t, 5, 0)
			}
			randomWrites(t, l, routes(t, l, client, server)[0], traffic.Plan{Bytes: 512 << 10, MaxWrite: 16 << 10}, lossy)
		})
	})
}

// randomWrites sends up to the plan's number of bytes in each direction. It calls
// connected when all connections are made.
func randomWrites(t *testing.T, l *lab, r route, most traffic.Plan, connected func()) {
	const connections = 200
	before := l.counters()
	tl := must.Get(r.server.host.Listen(r.listen, r.lo))(t)
	defer tl.Close()
	by := r.by(tl)
	var ends [connections][2]*traffic.Conn
	for i := range ends {
		a, b := r.client.pairBy(t, tl, by, r.o)
		ends[i] = [2]*traffic.Conn{a, b}
	}
	if connected != nil {
		connected()
	}
	plan := func() traffic.Plan {
		return traffic.Plan{
			Seed: rand.Uint64(), Bytes: 1 + rand.Int64N(most.Bytes), MaxWrite: most.MaxWrite, Slow: rand.IntN(2) == 0,
		}
	}
	var sent uint64
	ended := make(chan error, connections)
	for i, c := range ends {
		ab, ba := plan(), plan()
		sent += uint64(ab.Bytes + ba.Bytes)
		go func() {
			err := traffic.Exchange(c[0], c[1], ab, ba)
			err = errors.Join(err, c[0].Close(), c[1].Close())
			if err != nil {
				err = fmt.Errorf("connection %d (plans %+v, %+v): %w", i, ab, ba, err)
			}
			ended <- err
		}()
	}
	broken := 0
	for range connections {
		if err := <-ended; err != nil {
			if broken++; broken <= 3 {
				t.Error(err)
			}
		}
	}
	if broken > 3 {
		t.Errorf("%d of %d connections are broken", broken, connections)
	}
	d := l.counters().Since(before)
	if got := d.Connections["enrolled"]; got != connections {
		t.Errorf("%d connections enrolled, want %d: %v", got, connections, d.Connections)
	}
	m := d.Messages
	if m["redirected"].Bytes < sent/100 || m["receiver_full"].Messages == 0 || m["unacknowledged"].Messages+m["not_read"].Messages == 0 {
		t.Errorf("no changes between redirecting and TCP, %d bytes sent: %v", sent, m)
	}
}
