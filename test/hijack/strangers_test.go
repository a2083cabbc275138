package hijack_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/plugin/datapath"
	"github.com/skipstack/skipstack/test/must"
	"github.com/skipstack/skipstack/test/node"
)

// TestCollusion has two pods that no network connects, and that may not talk to
// each other, make up a handshake together: each tells the other everything.
func TestCollusion(t *testing.T) {
	l := newLab(t, datapath.LoadOptions{})
	a, b := l.island("a"), l.island("b")
	server, host := netip.MustParseAddrPort("192.0.2.1:80"), netip.MustParseAddr("192.0.2.2")
	servers := newCell(t, a.Pod, cellOptions{Nested: true, TUN: "tun0", Addrs: []netip.Addr{server.Addr()}})
	clients := newCell(t, b.Pod, cellOptions{Nested: true, TUN: "tun0", Addrs: []netip.Addr{host}, Repair: true})
	listener := servers.listen(t, server)
	before := l.counters()
	for i := range tries {
		must.Do(t, clients.prime(1))
		s := segment{src: netip.AddrPortFrom(host, port(i)), dst: server, flags: syn, seq: rand.Uint32()}
		answer, err := servers.tun.ask(s)
		must.Do(t, err)
		x, err := clients.forged(s.src, server, s.seq, answer.seq)
		must.Do(t, err)
		must.Do(t, servers.tun.send(segment{src: s.src, dst: server, flags: ack, seq: s.seq + 1, ack: answer.seq + 1}))
		y, err := accept(listener)
		must.Do(t, err)
		must.Do(t, errors.Join(send(x, "hidden"), send(y, "hidden")))
		must.Do(t, errors.Join(silent(x), silent(y), vanish(x), vanish(y)))
		servers.tun.drain()
		clients.tun.drain()
	}
	l.expect(before, map[string]uint64{"unproven": tries, "remote_client": tries})
}

// TestPlantedRecord has a client connect to a server on another host, and an
// attacker's listener answer the same SYN with the same number before that
// server does.
func TestPlantedRecord(t *testing.T) {
	l := newLab(t, datapath.LoadOptions{})
	victim, attacker := l.pod("victim"), l.pod("attacker")
	clients := newCell(t, victim.Pod, cellOptions{})
	remote := netip.AddrPortFrom(elsewhere.Addr().Next().Next(), 443)
	evil := newCell(t, attacker.Pod, cellOptions{Nested: true, TUN: "tun0", Addrs: []netip.Addr{remote.Addr()}, Repair: true})
	listener := evil.listen(t, remote)
	before := l.counters()
	for range tries {
		must.Do(t, evil.prime(1))
		client, err := clients.socket()
		must.Do(t, err)
		must.Do(t, connect(client, remote))
		s, err := l.world.receive(func(s segment) bool { return s.flags&syn != 0 && s.dst == remote })
		must.Do(t, err)
		number := rand.Uint32()
		must.Do(t, evil.half(remote, s.src, s.seq, number))
		must.Do(t, l.world.send(segment{src: remote, dst: s.src, flags: syn | ack, seq: number, ack: s.seq + 1}))
		must.Do(t, established(client))
		must.Do(t, evil.tun.send(segment{src: s.src, dst: remote, flags: ack, seq: s.seq + 1, ack: number + 1}))
		stolen, err := accept(listener)
		must.Do(t, err)
		must.Do(t, errors.Join(send(stolen, "evil"), send(client, "secret")))
		_, err = l.world.receive(func(r segment) bool { return r.src == s.src && r.payload == "secret" })
		must.Do(t, err)
		must.Do(t, l.world.send(segment{src: remote, dst: s.src, flags: ack, seq: number + 1, ack: s.seq + 7, payload: "answer"}))
		must.Do(t, errors.Join(read(client, "answer"), silent(client), silent(stolen), vanish(client), vanish(stolen)))
		l.world.drain()
		evil.tun.drain()
	}
	// The attacker makes TIME_WAIT sockets by TCP_REPAIR, without a record.
	l.expect(before, map[string]uint64{"unproven": tries, "remote_client": tries, "remote_server": tries})
}

// TestStolenServerEnd has a client claim its connection to a server that waits
// for the first byte (TCP_DEFER_ACCEPT), and an attacker's listener accept a
// connection with the same numbers meanwhile.
func TestStolenServerEnd(t *testing.T) {
	l := newLab(t, datapath.LoadOptions{})
	a, b, attacker := l.pod("client"), l.pod("server"), l.pod("attacker")
	server := netip.AddrPortFrom(b.addr, 80)
	clients, listener := newCell(t, a.Pod, cellOptions{}), newCell(t, b.Pod, cellOptions{}).listen(t, server)
	must.Do(t, unix.SetsockoptInt(listener, unix.IPPROTO_TCP, unix.TCP_DEFER_ACCEPT, 10))
	evil := newCell(t, attacker.Pod, cellOptions{Nested: true, TUN: "tun0", Addrs: []netip.Addr{server.Addr()}, Repair: true})
	evilListener := evil.listen(t, server)
	before := l.counters()
	for i := range tries {
		must.Do(t, evil.prime(1))
		client, err := clients.socket()
		must.Do(t, err)
		from := netip.AddrPortFrom(a.addr, port(i))
		must.Do(t, unix.Bind(client, sockaddr(from)))
		must.Do(t, connect(client, server))
		must.Do(t, established(client))
		own, peer, err := numbers(client)
		must.Do(t, err)
		must.Do(t, evil.half(server, from, own, peer))
		must.Do(t, evil.tun.send(segment{src: from, dst: server, flags: ack, seq: own + 1, ack: peer + 1}))
		stolen, err := accept(evilListener)
		must.Do(t, err)
		must.Do(t, errors.Join(send(stolen, "evil"), send(client, "request")))
		accepted, err := accept(listener)
		must.Do(t, err)
		must.Do(t, errors.Join(read(accepted, "request"), send(accepted, "reply"), read(client, "reply")))
		must.Do(t, errors.Join(silent(client), silent(stolen), vanish(client), vanish(accepted), vanish(stolen)))
		evil.tun.drain()
	}
	l.expect(before, map[string]uint64{"unproven": tries, "lost_race": tries, "remote_server": tries})
}

// TestSquattedPlace has a server close, and an attacker enrol a connection of its own,
// whose client has the numbers that the server had, while the server's client still sends.
func TestSquattedPlace(t *testing.T) {
	l := newLab(t, datapath.LoadOptions{})
	a, b, attacker := l.pod("client"), l.pod("server"), l.pod("attacker")
	server := netip.AddrPortFrom(b.addr, 80)
	clients, listener := newCell(t, a.Pod, cellOptions{}), newCell(t, b.Pod, cellOptions{}).listen(t, server)
	evilAt, evilHost := netip.MustParseAddrPort("192.0.2.1:80"), netip.MustParseAddr("192.0.2.2")
	evil := newCell(t, attacker.Pod, cellOptions{Nested: true, Addrs: []netip.Addr{evilAt.Addr(), evilHost}, Repair: true})
	evilListener := evil.listen(t, evilAt)
	before := l.counters()
	for i := range tries {
		must.Do(t, evil.prime(3))
		client, err := clients.socket()
		must.Do(t, err)
		must.Do(t, connect(client, server))
		must.Do(t, established(client))
		own, peer, err := numbers(client)
		must.Do(t, err)
		accepted, err := accept(listener)
		must.Do(t, err)
		must.Do(t, errors.Join(send(client, "request"), read(accepted, "request"), send(accepted, "reply"), read(client, "reply")))
		must.Do(t, unix.Close(accepted))
		must.Do(t, wait(client, unix.POLLRDHUP))

		from := netip.AddrPortFrom(evilHost, port(i))
		must.Do(t, evil.timeWaitHere(evilAt, from, peer, own))
		x, err := evil.forced(from, evilAt, peer)
		must.Do(t, err)
		must.Do(t, established(x))
		y, err := accept(evilListener)
		must.Do(t, err)

		must.Do(t, send(client, "secret"))
		must.Do(t, errors.Join(silent(x), silent(y)))
		must.Do(t, errors.Join(send(x, "mine"), read(y, "mine"), vanish(x), vanish(y), vanish(client)))
	}
	l.expect(before, map[string]uint64{"enrolled": 2 * tries, "remote_server": 2 * tries})
	if got := l.counters().Since(before).Messages["redirected"]; got.Messages < 3*tries {
		t.Errorf("%d messages redirected, want all but those to a server that is gone", got.Messages)
	}
}

// TestSameAddresses has an attacker give itself the addresses of a client and a
// server, in a namespace of its own, and connect between the same ports at the
// same time: the numbers come from the same hash of addresses and ports.
func TestSameAddresses(t *testing.T) {
	l := newLab(t, datapath.LoadOptions{})
	a, b, attacker := l.pod("client"), l.pod("server"), l.pod("attacker")
	server := netip.AddrPortFrom(b.addr, 80)
	clients, listener := newCell(t, a.Pod, cellOptions{}), newCell(t, b.Pod, cellOptions{}).listen(t, server)
	evil := newCell(t, attacker.Pod, cellOptions{Nested: true, Addrs: []netip.Addr{a.addr, b.addr}})
	evilListener := evil.listen(t, server)
	before := l.counters()
	t.Run("at the same time", func(t *testing.T) {
		for _, side := range []struct {
			name     string
			clients  *cell
			listener int
		}{{"victim", clients, listener}, {"attacker", evil, evilListener}} {
			t.Run(side.name, func(t *testing.T) {
				t.Parallel()
				for i := range tries {
					token := fmt.Sprint(side.name, i)
					must.Do(t, converse(side.clients, side.listener, netip.AddrPortFrom(a.addr, port(i)), server, token))
				}
			})
		}
	})
	l.expect(before, map[string]uint64{"enrolled": 2 * tries})
}

// converse connects, and exchanges a token and an answer to it.
func converse(clients *cell, listener int, from, to netip.AddrPort, token string) error {
	client, err := clients.socket()
	if err != nil {
		return err
	}
	defer unix.Close(client)
	if from.IsValid() {
		if err := unix.Bind(client, sockaddr(from)); err != nil {
			return fmt.Errorf("bind to %s: %w", from, err)
		}
	}
	if err := connect(client, to); err != nil {
		return err
	}
	if err := established(client); err != nil {
		return err
	}
	server, err := accept(listener)
	if err != nil {
		return err
	}
	err = errors.Join(send(client, token), read(server, token), send(server, "re: "+token), read(client, "re: "+token))
	return errors.Join(err, silent(client), silent(server), vanish(server))
}

// port spreads connections over ports, so that none meets remains of another.
func port(i int) uint16 { return uint16(1024 + i%60000) }

// hub makes the node's bridge flood frames to all its ports, as one whose
// forwarding database is full does.
func (l *lab) hub() {
	l.t.Helper()
	must.Do(l.t, l.node.Do(func() error {
		var never uint32
		return netlink.LinkModify(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "cni0"}, AgeingTime: &never})
	}))
	// br_set_ageing_time() leaves it to a work item to forget what was learned; until then
	// frames for those addresses go to one port.
	must.Wait(l.t, patience, time.Millisecond, func() error {
		return l.node.Do(func() error {
			entries, err := netlink.NeighList(0, unix.AF_BRIDGE)
			for _, e := range entries {
				if err == nil && e.State&(netlink.NUD_PERMANENT|netlink.NUD_NOARP) == 0 {
					err = fmt.Errorf("the bridge still knows where %s is", e.HardwareAddr)
				}
			}
			return err
		})
	})
}

// impostor makes a cell in a pod that has taken over another's addresses; what
// it sends to a third is swallowed by the TUN device.
func impostor(t *testing.T, p, other *pod, to netip.Addr) *cell {
	t.Helper()
	c := newCell(t, p.Pod, cellOptions{TUN: "tun0", Repair: true, Sysctls: noFilter})
	must.Do(t, p.Do(func() error {
		return errors.Join(takeOver(other.addr, other.mac), addRoute("tun0", netip.PrefixFrom(to, 32)))
	}))
	return c
}

// TestOverheardSYNACK lets an attacker receive a copy of the listener's SYN-ACK.
func TestOverheardSYNACK(t *testing.T) {
	for _, tt := range []struct {
		name  string
		plain bool // the client's pod takes no part
		want  map[string]uint64
	}{
		{"two claimants", false, map[string]uint64{"contested": tries, "lost_race": tries}},
		{"one claimant, who is not the client", true, map[string]uint64{"unproven": tries}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l := newLab(t, datapath.LoadOptions{})
			a, b, attacker := l.plain("client"), l.pod("server"), l.pod("attacker")
			if !tt.plain {
				l.attach(a.Pod)
			}
			l.hub()
			server := netip.AddrPortFrom(b.addr, 80)
			clients, listener := newCell(t, a.Pod, cellOptions{Repair: true}), newCell(t, b.Pod, cellOptions{}).listen(t, server)
			evil := impostor(t, attacker, a, b.addr)
			before := l.counters()
			for i := range tries {
				must.Do(t, errors.Join(clients.prime(1), evil.prime(1)))
				from, number := netip.AddrPortFrom(a.addr, port(i)), rand.Uint32()
				other, err := evil.forced(from, server, number)
				must.Do(t, err)
				client, err := clients.forced(from, server, number)
				must.Do(t, err)
				must.Do(t, errors.Join(established(client), established(other)))
				accepted, err := accept(listener)
				must.Do(t, err)
				must.Do(t, errors.Join(send(other, "evil"), send(client, "request"), read(accepted, "request")))
				must.Do(t, errors.Join(send(accepted, "reply"), read(client, "reply"), silent(client), silent(accepted)))
				must.Do(t, errors.Join(vanish(client), vanish(other), vanish(accepted)))
				evil.tun.drain()
			}
			l.expect(before, tt.want)
			l.expectPlain(before)
		})
	}
}

// TestOverheardACK lets an attacker receive copies of all that a client sends to
// a server that waits for the first byte, and answer them under the same numbers
// with a listener of its own.
func TestOverheardACK(t *testing.T) {
	l := newLab(t, datapath.LoadOptions{})
	// A bridge floods its newest port first: the server's record must be there
	// before the attacker's.
	attacker, a, b := l.pod("attacker"), l.pod("client"), l.pod("server")
	l.hub()
	server := netip.AddrPortFrom(b.addr, 80)
	// Timestamps would give the attacker's SYN-ACK away now and then.
	clients := newCell(t, a.Pod, cellOptions{Repair: true, Sysctls: map[string]string{"net.ipv4.tcp_timestamps": "0"}})
	servers := newCell(t, b.Pod, cellOptions{TUN: "tun0", Repair: true})
	listener := servers.listen(t, server)
	must.Do(t, unix.SetsockoptInt(listener, unix.IPPROTO_TCP, unix.TCP_DEFER_ACCEPT, 10))
	evil := impostor(t, attacker, b, a.addr)
	evilListener := evil.listen(t, server)
	const batch = 200
	before := l.counters()
	for round := range tries / batch {
		must.Do(t, errors.Join(clients.prime(batch), servers.prime(batch), evil.prime(batch)))
		var syns [batch]segment
		client := netip.PrefixFrom(a.addr, 32)
		must.Do(t, b.Do(func() error { return addRoute("tun0", client) }))
		number := rand.Uint32()
		for i := range syns {
			syns[i] = segment{src: netip.AddrPortFrom(a.addr, port(round*batch+i)), seq: rand.Uint32()}
			must.Do(t, errors.Join(servers.timeWait(server, syns[i].src, syns[i].seq, number), evil.timeWait(server, syns[i].src, syns[i].seq, number)))
		}
		must.Do(t, b.Do(func() error { return removeRoute("tun0", client) }))
		for _, s := range syns {
			client, err := clients.forced(s.src, server, s.seq)
			must.Do(t, err)
			must.Do(t, established(client))
			other, err := accept(evilListener)
			must.Do(t, err)
			must.Do(t, send(client, "request"))
			accepted, err := accept(listener)
			must.Do(t, err)
			must.Do(t, errors.Join(read(accepted, "request"), send(other, "evil"), send(accepted, "reply"), read(client, "reply")))
			must.Do(t, errors.Join(silent(client), silent(accepted), vanish(client), vanish(other), vanish(accepted)))
		}
		evil.tun.drain()
	}
	l.expect(before, map[string]uint64{"unproven": tries, "lost_race": tries, "remote_server": 2 * tries})
	l.expectPlain(before)
}

// takeOver gives the pod's interface another's addresses, in the caller's network namespace.
func takeOver(addr netip.Addr, mac net.HardwareAddr) error {
	link, err := netlink.LinkByName(node.IfName)
	if err == nil {
		err = netlink.LinkSetHardwareAddr(link, mac)
	}
	if err != nil {
		return fmt.Errorf("take over %s: %w", mac, err)
	}
	return addAddr(node.IfName, addr)
}

// TestSpoofedAddress lets an attacker connect to a server with the address of
// another host. What it sends is its socket's own, but the SYN-ACK goes to that
// host, so the attacker puts one of its own into its namespace. TCP itself is
// content with the right number; nothing the server sends may reach the attacker.
// (A listener with the same addresses in a namespace of the attacker's, and the
// time, give the number to within some hundred candidates.)
func TestSpoofedAddress(t *testing.T) {
	t.Run("number overheard", func(t *testing.T) {
		s := newSpoof(t, nil)
		for i := range tries {
			s.attack(i, func(_, answer segment) uint32 { return answer.seq })
		}
		s.l.expect(s.before, map[string]uint64{"unproven": tries, "remote_client": tries})
	})
	// A listener that is flooded answers with SYN cookies, and a listener in a
	// namespace of the attacker's computes the same: this attacker knows no more
	// than it can find out.
	t.Run("SYN cookie computed", func(t *testing.T) {
		flooded := map[string]string{"net.ipv4.tcp_syncookies": "2"}
		s := newSpoof(t, flooded)
		oracle := newCell(t, s.attacker.Pod, cellOptions{Nested: true, TUN: "tun0", Addrs: []netip.Addr{s.server.Addr()}, Sysctls: flooded})
		oracle.listen(t, s.server)
		known := 0
		for i := range tries {
			s.attack(i, func(syn, answer segment) uint32 {
				guess, err := oracle.tun.ask(syn)
				must.Do(t, err)
				oracle.tun.drain()
				if guess.seq == answer.seq {
					known++
				}
				return answer.seq
			})
		}
		t.Logf("the attacker knew the cookie in %d of %d tries", known, tries)
		s.l.expect(s.before, map[string]uint64{"remote_server": tries})
	})
}

type spoof struct {
	t        *testing.T
	l        *lab
	attacker *pod
	server   netip.AddrPort
	host     netip.Addr // whose address the attacker uses
	listener int
	evil     *cell
	before   datapath.Counters
}

func newSpoof(t *testing.T, sysctls map[string]string) *spoof {
	t.Helper()
	s := &spoof{t: t, l: newLab(t, datapath.LoadOptions{}), host: elsewhere.Addr().Next().Next()}
	victim := s.l.pod("victim")
	s.attacker = s.l.pod("attacker")
	s.server = netip.AddrPortFrom(victim.addr, 80)
	s.listener = newCell(t, victim.Pod, cellOptions{Sysctls: sysctls}).listen(t, s.server)
	s.evil = newCell(t, s.attacker.Pod, cellOptions{TUN: "tun0", Addrs: []netip.Addr{s.host}, Repair: true, Sysctls: noFilter})
	s.before = s.l.counters()
	return s
}

// attack connects from the host's address; number returns the attacker's idea of
// the server's initial sequence number.
func (s *spoof) attack(i int, number func(syn, answer segment) uint32) {
	s.t.Helper()
	must.Do(s.t, s.evil.prime(1))
	sent := segment{src: netip.AddrPortFrom(s.host, port(i)), dst: s.server, flags: syn, seq: rand.Uint32()}
	stolen, err := s.evil.forced(sent.src, s.server, sent.seq)
	must.Do(s.t, err)
	answer, err := s.l.world.receive(func(a segment) bool { return a.flags == syn|ack && a.ack == sent.seq+1 })
	must.Do(s.t, err)
	must.Do(s.t, s.evil.tun.send(segment{src: s.server, dst: sent.src, flags: syn | ack, seq: number(sent, answer), ack: sent.seq + 1}))
	must.Do(s.t, established(stolen))
	accepted, err := accept(s.listener)
	must.Do(s.t, err)
	must.Do(s.t, send(accepted, "reply"))
	_, err = s.l.world.receive(func(r segment) bool { return r.dst == sent.src && r.payload == "reply" })
	must.Do(s.t, err)
	must.Do(s.t, errors.Join(silent(stolen), vanish(stolen), vanish(accepted)))
	s.l.world.drain()
	s.evil.tun.drain()
}

// noFilter lets a pod use addresses that are not its own.
var noFilter = map[string]string{
	"net.ipv4.conf.all.rp_filter": "0", "net.ipv4.conf.default.rp_filter": "0", "net.ipv4.conf.eth0.rp_filter": "0",
}
