package hijack_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/plugin/datapath"
	"github.com/skipstack/skipstack/test/must"
)

// TestClaims lets an attacker claim connections of clients on other hosts, whose
// last acknowledgement is slow to come: all that time the record of the SYN
// is there. The attacker knows both sequence numbers, which it could not.
func TestClaims(t *testing.T) {
	for _, tt := range []struct {
		name  string
		claim func(c *cell, from, to netip.AddrPort, own, peer uint32) (int, error)
		late  bool
		label string
	}{
		{"SYN-ACK from a TUN device", (*cell).forged, false, "unproven"},
		{"SYN-ACK from a TUN device, too late", (*cell).forged, true, "unproven"},
		{"TCP_REPAIR", (*cell).restored, false, "repaired"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			const batch = 100
			var o datapath.LoadOptions
			if tt.late {
				o.ClaimWindow = shortWindow
			}
			l := newLab(t, o)
			victim, attacker := l.pod("victim"), l.pod("attacker")
			server := netip.AddrPortFrom(victim.addr, 80)
			listener := newCell(t, victim.Pod, cellOptions{}).listen(t, server)
			client := elsewhere.Addr().Next().Next()
			evil := newCell(t, attacker.Pod, cellOptions{Nested: true, TUN: "tun0", Addrs: []netip.Addr{client}, Repair: true})
			before := l.counters()
			for range tries / batch {
				must.Do(t, evil.prime(batch))
				syns := make([]segment, batch)
				answers, stolen := make([]segment, batch), make([]int, batch)
				var err error
				for i := range syns {
					syns[i] = segment{src: netip.AddrPortFrom(client, uint16(1024+i)), dst: server, flags: syn, seq: rand.Uint32()}
					answers[i], err = l.world.ask(syns[i])
					must.Do(t, err)
				}
				if tt.late {
					time.Sleep(shortWindow)
				}
				for i, s := range syns {
					stolen[i], err = tt.claim(evil, s.src, s.dst, s.seq, answers[i].seq)
					must.Do(t, err)
				}
				for i, s := range syns {
					l.serve(listener, s, answers[i], stolen[i])
				}
				evil.tun.drain()
			}
			l.expect(before, map[string]uint64{tt.label: tries, "remote_client": tries})
		})
	}
}

// serve lets the client that sent a SYN go on, and the listener's process
// answer it; neither may notice anything of the stolen socket, nor it of them.
func (l *lab) serve(listener int, s, answer segment, stolen int) {
	l.t.Helper()
	request, reply := fmt.Sprint("request ", s.seq), fmt.Sprint("reply ", s.seq)
	s.flags, s.seq, s.ack, s.payload = ack, s.seq+1, answer.seq+1, request
	must.Do(l.t, l.world.send(s))
	server, err := accept(listener)
	must.Do(l.t, err)
	must.Do(l.t, read(server, request))
	must.Do(l.t, send(server, reply))
	_, err = l.world.receive(func(r segment) bool { return r.dst == s.src && r.payload == reply })
	must.Do(l.t, err)
	must.Do(l.t, errors.Join(silent(stolen), send(stolen, "evil"), silent(server), vanish(server), vanish(stolen)))
	l.world.drain()
}

// TestLateClient delays genuine SYN-ACKs beyond the claim window: the connection
// goes by TCP.
func TestLateClient(t *testing.T) {
	l := newLab(t, datapath.LoadOptions{ClaimWindow: shortWindow})
	a, b := l.pod("client"), l.pod("server")
	server := netip.AddrPortFrom(b.addr, 80)
	listener := newCell(t, b.Pod, cellOptions{
		Sysctls: map[string]string{
			"net.ipv4.neigh.eth0.unres_qlen_bytes": "10000000",
			"net.ipv4.neigh.eth0.mcast_solicit":    "1000", // after so many seconds they are dropped
		},
	}).listen(t, server)
	clients := newCell(t, a.Pod, cellOptions{Sysctls: map[string]string{"net.ipv4.conf.eth0.arp_ignore": "8"}}) // answer nobody
	must.Do(t, a.Do(func() error { return learn(b.addr, b.mac) }))
	const batch = 50
	before := l.counters()
	for range tries / batch {
		must.Do(t, clients.prime(batch))
		// The SYN-ACKs wait until the client's address is resolved.
		must.Do(t, b.Do(func() error { return forget(a.addr) }))
		recorded := l.counters().Events["syn_recorded"]
		var fds []int
		for range batch {
			fd, err := clients.socket()
			must.Do(t, err)
			must.Do(t, connect(fd, server))
			fds = append(fds, fd)
		}
		must.Wait(t, patience, time.Millisecond, func() error {
			if n := l.counters().Events["syn_recorded"] - recorded; n != batch {
				return fmt.Errorf("%d SYNs recorded, want %d", n, batch)
			}
			return nil
		})
		time.Sleep(shortWindow)
		must.Do(t, b.Do(func() error { return learn(a.addr, a.mac) }))
		for i, fd := range fds {
			must.Do(t, established(fd))
			must.Do(t, send(fd, fmt.Sprint("late ", i)))
		}
		for range batch {
			fd, err := accept(listener)
			must.Do(t, err)
			buf := make([]byte, 100)
			must.Do(t, wait(fd, unix.POLLIN))
			n, err := unix.Read(fd, buf)
			must.Do(t, err)
			must.Do(t, send(fd, string(buf[:n])))
			must.Do(t, vanish(fd))
		}
		for i, fd := range fds {
			must.Do(t, read(fd, fmt.Sprint("late ", i)))
			must.Do(t, vanish(fd))
		}
	}
	l.expect(before, map[string]uint64{"late_claim": tries})
}
