package hijack_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/plugin/datapath"
	"github.com/skipstack/skipstack/test/must"
)

// A flood sends SYNs from many hosts as fast as it can.
type flood struct {
	stop atomic.Bool
	sent atomic.Uint64
	wg   sync.WaitGroup
	err  error
}

// flood starts to flood a listener from elsewhere. With reset each SYN is followed by
// an RST, so that the listener's backlog never fills and each SYN leaves a
// record; without, SYN cookies end that.
func (l *lab) flood(to netip.AddrPort, reset bool) *flood {
	f := &flood{}
	l.t.Cleanup(f.halt)
	f.wg.Go(func() {
		for host := uint32(0); !f.stop.Load() && f.err == nil; host++ {
			addr := elsewhere.Addr().As4()
			binary.BigEndian.PutUint16(addr[2:], uint16(2+host%65000))
			s := segment{src: netip.AddrPortFrom(netip.AddrFrom4(addr), port(rand.IntN(1<<16))), dst: to, flags: syn, seq: rand.Uint32()}
			f.err = l.world.send(s)
			if reset && f.err == nil {
				s.flags, s.seq = rst, s.seq+1
				f.err = l.world.send(s)
			}
			f.sent.Add(1)
			l.world.drain()
		}
	})
	return f
}

func (f *flood) halt() {
	f.stop.Store(true)
	f.wg.Wait()
}

func (f *flood) end(t *testing.T) {
	t.Helper()
	f.halt()
	must.Do(t, f.err)
	t.Logf("%d SYNs", f.sent.Load())
}

// pair is a connection whose ends the test holds.
type pair struct {
	client, server int
	// again: the SYN-ACK was sent more than once, since a flooded kernel drops segments.
	// The second has another number, which the datapath does not believe.
	again bool
}

func newPair(clients *cell, listener int, to netip.AddrPort) (p pair, err error) {
	if p.client, err = clients.socket(); err != nil {
		return p, err
	}
	if err := connect(p.client, to); err != nil {
		return p, err
	}
	if err := established(p.client); err != nil {
		return p, err
	}
	if p.server, err = accept(listener); err != nil {
		return p, err
	}
	info, err := unix.GetsockoptTCPInfo(p.server, unix.IPPROTO_TCP, unix.TCP_INFO)
	if err != nil {
		return p, fmt.Errorf("read a socket's state: %w", err)
	}
	p.again = info.Total_retrans > 0
	return p, nil
}

func (p pair) exchange(token string) error {
	return errors.Join(send(p.client, token), read(p.server, token), send(p.server, "re: "+token), read(p.client, "re: "+token))
}

func (p pair) close() error { return errors.Join(unix.Close(p.client), unix.Close(p.server)) }

// pairs are connections that are open at once; a process may have but 4096
// descriptors.
type pairs []pair

func (p *pairs) close() error {
	var errs []error
	for _, one := range *p {
		errs = append(errs, one.close())
	}
	*p = nil
	return errors.Join(errs...)
}

// TestSYNFlood floods an accelerated listener. Connections that exist stay
// accelerated; new ones come about, if only by TCP.
func TestSYNFlood(t *testing.T) {
	for _, tt := range []struct {
		name  string
		reset bool
	}{{"to the backlog", false}, {"past the backlog", true}} {
		t.Run(tt.name, func(t *testing.T) {
			l := newLab(t, datapath.LoadOptions{})
			a, b := l.pod("client"), l.pod("server")
			server := netip.AddrPortFrom(b.addr, 80)
			clients, listener := newCell(t, a.Pod, cellOptions{}), newCell(t, b.Pod, cellOptions{}).listen(t, server)
			old, err := newPair(clients, listener, server)
			must.Do(t, err)
			must.Do(t, old.exchange("before"))
			before := l.counters()
			f := l.flood(server, tt.reset)
			exchanges, connections, again := uint64(0), uint64(0), uint64(0)
			recorded := func() uint64 { return l.counters().Since(before).Events["syn_recorded"] }
			// The kernel drops segments, too, when it is kept from its work.
			enough := func() bool {
				sent := f.sent.Load()
				return sent >= 5*tries && (!tt.reset || recorded() >= 5*tries/2 || sent >= 50*tries)
			}
			for ; !enough(); exchanges++ {
				must.Do(t, old.exchange(fmt.Sprint("during ", exchanges)))
				if exchanges%10 == 0 {
					p, err := newPair(clients, listener, server)
					must.Do(t, err)
					must.Do(t, errors.Join(p.exchange(fmt.Sprint("new ", connections)), p.close()))
					connections++
					if p.again {
						again++
					}
				}
			}
			f.end(t)
			must.Do(t, errors.Join(old.exchange("after"), old.close()))
			d := l.counters().Since(before)
			t.Logf("%d exchanges, %d new connections: %v %v", exchanges, connections, d.Connections, d.Events)
			if got := d.Messages["redirected"].Messages; got < 2*exchanges {
				t.Errorf("%d messages redirected in %d exchanges of a connection that was accelerated before", got, exchanges)
			}
			c := d.Connections
			if n := c["enrolled"] + c["remote_server"]; n > connections || n+again < connections || c["unproven"]+c["contested"] > 2*again {
				t.Errorf("%d new connections, %d with a second SYN-ACK, counted as %v", connections, again, c)
			}
			if n := recorded(); tt.reset && n < 5*tries/2 {
				t.Errorf("only %d of %d SYNs recorded", n, f.sent.Load())
			}
		})
	}
}

// TestEviction opens more connections than there is room for records of, before
// the first of them sends.
func TestEviction(t *testing.T) {
	const records, connections = 1024, 1500
	l := newLab(t, datapath.LoadOptions{MaxConnections: 4 * records})
	a, b := l.pod("client"), l.pod("server")
	server := netip.AddrPortFrom(b.addr, 80)
	clients, listener := newCell(t, a.Pod, cellOptions{}), newCell(t, b.Pod, cellOptions{}).listen(t, server)
	var open pairs
	t.Cleanup(func() { must.Do(t, open.close()) })
	before := l.counters()
	for range connections {
		p, err := newPair(clients, listener, server)
		must.Do(t, err)
		open = append(open, p)
	}
	l.expect(before, map[string]uint64{"enrolled": connections})
	for round := range 3 {
		for i, p := range open {
			must.Do(t, p.exchange(fmt.Sprint("round ", round, " connection ", i)))
		}
	}
	// A client without a record sends by TCP, its server may redirect.
	m := l.counters().Since(before).Messages
	missing := m["record_missing"].Messages
	if missing < connections-records || m["plain"].Messages < 2*missing || m["redirected"].Messages < 3*connections {
		t.Errorf("messages: %v", m)
	}
}

// TestMapFull opens more connections than the sockhash holds.
func TestMapFull(t *testing.T) {
	l := newLab(t, datapath.LoadOptions{MaxConnections: 16})
	a, b := l.pod("client"), l.pod("server")
	server := netip.AddrPortFrom(b.addr, 80)
	clients, listener := newCell(t, a.Pod, cellOptions{}), newCell(t, b.Pod, cellOptions{}).listen(t, server)
	var open pairs
	t.Cleanup(func() { must.Do(t, open.close()) })
	for round := range 3 {
		before := l.counters()
		for range 100 {
			p, err := newPair(clients, listener, server)
			must.Do(t, err)
			open = append(open, p)
		}
		for i, p := range open {
			must.Do(t, p.exchange(fmt.Sprint("round ", round, " connection ", i)))
		}
		l.expect(before, map[string]uint64{"enrolled": 16, "map_full": 84})
		must.Do(t, open.close())
		must.Wait(t, patience, time.Millisecond, func() error {
			n, err := l.set.Enrolled()
			if err == nil && n != 0 {
				err = fmt.Errorf("%d sockets left in the sockhash", n)
			}
			return err
		})
	}
}

// TestChurn opens, uses and closes connections from two pods at once, and a
// flood besides, with so few records that they are evicted and recycled at every
// moment of a connection's life.
func TestChurn(t *testing.T) {
	const records, idle = 1024, 600 // idle connections of each pod
	l := newLab(t, datapath.LoadOptions{MaxConnections: 4 * records})
	b := l.pod("server")
	cells := newCell(t, b.Pod, cellOptions{})
	flooded := netip.AddrPortFrom(b.addr, 79)
	cells.listen(t, flooded)
	before := l.counters()
	f := l.flood(flooded, true)
	var again atomic.Uint64
	t.Run("connections", func(t *testing.T) {
		for i := range 2 {
			clients := newCell(t, l.pod(fmt.Sprint("client", i)).Pod, cellOptions{})
			server := netip.AddrPortFrom(b.addr, uint16(80+i))
			listener := cells.listen(t, server)
			t.Run(fmt.Sprint("pod ", i), func(t *testing.T) {
				t.Parallel()
				var open pairs
				t.Cleanup(func() { must.Do(t, open.close()) })
				for n := range tries {
					p, err := newPair(clients, listener, server)
					must.Do(t, err)
					if p.again {
						again.Add(1)
					}
					if open = append(open, p); len(open) > idle {
						p, open = open[0], open[1:]
						token := fmt.Sprint("pod ", i, " connection ", n)
						must.Do(t, errors.Join(p.exchange(token), p.exchange(token+" again"), silent(p.client), silent(p.server), p.close()))
					}
				}
			})
		}
	})
	f.end(t)
	d := l.counters().Since(before)
	t.Logf("%v %v", d.Connections, d.Messages)
	if d.Connections["enrolled"] < tries || d.Messages["record_missing"].Messages < tries/10 || d.Messages["redirected"].Messages < tries/10 {
		t.Errorf("too little happened: %v %v", d.Connections, d.Messages)
	}
	if n := d.Connections["unproven"] + d.Connections["contested"]; n > 2*again.Load() {
		t.Errorf("%d connections mistaken for others, %d had a second SYN-ACK: %v", n, again.Load(), d.Connections)
	}
}
