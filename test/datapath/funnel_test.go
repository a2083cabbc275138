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
	"github.com/skipstack/skipstack/test/probe"
)

// TestFunnelUnderLoss sends everything by TCP over a network that loses segments.
// A sender whose small segments were lost, or whose acknowledgements were, sends
// them again as one, of which the receiver has a part: that part must not be read
// twice. On the loopback interface, segments are so long that the part is longer
// than what the kernel lets a program cut off at once.
func TestFunnelUnderLoss(t *testing.T) {
	loopback := netip.MustParseAddr("127.0.0.1")
	for _, c := range []struct {
		name     string
		loopback bool
		plan     traffic.Plan
	}{
		{"veth", false, traffic.Plan{Bytes: 100_000, MaxWrite: 1000, Paced: 50_000}},
		{"loopback", true, traffic.Plan{Bytes: 2_000_000, MaxWrite: 32_000, Paced: 50_000}},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := newLab(t, datapath.NodeSettings{Funnel: true}, datapath.LoadOptions{})
			client, server := l.pod("client", enabled), l.pod("server", enabled)
			addr := server.at(false, 0)
			if c.loopback {
				client, addr = server, netip.AddrPortFrom(loopback, 0)
			}
			for _, p := range []*pod{client, server} {
				p.fastRecovery(t)
				p.sysctl(t, "net/ipv4/tcp_sack", "0") // so the sender does not know what arrived behind a gap
			}
			tl := server.listen(t, addr, traffic.SocketOptions{})
			var ends [40][2]*traffic.Conn
			for i := range ends {
				ends[i][0], ends[i][1] = client.pair(t, tl, traffic.SocketOptions{})
				for _, end := range ends[i] {
					must.Do(t, end.Set(unix.TCP_NODELAY, 1))
				}
			}
			l.enrolled(datapath.Counters{}, uint64(len(ends)))
			l.gate(false)
			server.drop(t, 10, 0)
			if !c.loopback {
				client.drop(t, 10, 0)
			}
			ended := make(chan error, len(ends))
			for i, end := range ends {
				ab, ba := c.plan, c.plan
				ab.Seed, ba.Seed = rand.Uint64(), rand.Uint64()
				go func() {
					err := traffic.Exchange(end[0], end[1], ab, ba)
					if err = errors.Join(err, end[0].Close(), end[1].Close()); err != nil {
						err = fmt.Errorf("connection %d: %w", i, err)
					}
					ended <- err
				}()
			}
			for range ends {
				if err := <-ended; err != nil {
					t.Error(err)
				}
			}
			n := l.counters()
			t.Log(nonZero(n))
			if n.Events["trimmed_bytes"] == 0 || n.Events["funneled"] == 0 {
				t.Errorf("nothing was sent again in part: this run tests nothing: %v", nonZero(n))
			}
			if n.Messages["redirected"].Messages != 0 {
				t.Errorf("redirected with the gate closed: %v", nonZero(n))
			}
		})
	}
}

// TestFIONREAD compares what ioctl(FIONREAD) says with what can be read, by TCP
// and by redirecting, mixed. A kernel that has the risk fionread counts what came by
// TCP only; no funnel helps there, and none is used.
func TestFIONREAD(t *testing.T) {
	v := probe.Kernel(t, node.ForTest(t, node.Options{}).CgroupRoot)
	uncounted := v.Risks&datapath.RiskFIONREAD != 0
	fionread := func(t *testing.T, s datapath.NodeSettings) {
		l := newLab(t, s, datapath.LoadOptions{})
		client, server := l.pod("client", enabled), l.pod("server", enabled)
		a, b := client.pair(t, server.listen(t, server.at(false, 0), traffic.SocketOptions{}), traffic.SocketOptions{})
		sent, got := traffic.NewStream(1), traffic.NewStream(1)
		unread := func(redirected, tcp int) {
			t.Helper()
			want := redirected + tcp
			if uncounted {
				want = tcp
			}
			wait(t, "FIONREAD says what it should", func() (string, bool) {
				n := must.Get(b.Unread())(t)
				return fmt.Sprintf("%d, want %d of %d redirected bytes and %d others", n, want, redirected, tcp), n == want
			})
		}
		unread(0, 0)
		write(t, a, sent, 5000)
		l.expect(datapath.Counters{}, "redirected", 1)
		unread(5000, 0)
		l.gate(false)
		write(t, a, sent, 3000)
		l.expect(datapath.Counters{}, "switched_off", 1)
		unread(5000, 3000)
		drained(t, a)
		l.gate(true)
		if s.Funnel {
			l.next("redirected") // segments are acknowledged before they are moved
		}
		write(t, a, sent, 1000)
		if s.Funnel {
			l.expect(datapath.Counters{}, "redirected", 2)
		} else {
			l.expect(datapath.Counters{}, "not_read", 1)
		}
		unread(5000, 4000)
		read(t, b, got, 4000)
		unread(1000, 4000)
		read(t, b, got, 2500)
		unread(0, 2500)
		l.gate(false)
		write(t, a, sent, 100)
		unread(0, 2600)
		read(t, b, got, 2600)
		unread(0, 0)
	}
	switch {
	case v.Funnel || uncounted:
		fionread(t, datapath.NodeSettings{Funnel: v.Funnel})
	default: // right both ways
		modes(t, fionread)
	}
}

// TestPartlyOldSegment makes a sender send again as one what arrived (but for the
// acknowledgement) and what was lost: the receiver must read the first part once.
func TestPartlyOldSegment(t *testing.T) {
	for _, end := range []struct {
		name                   string
		halfClosed, fin, small bool
	}{
		{name: "data"},
		{name: "data and FIN", fin: true},
		{name: "data and FIN to a half-closed reader", fin: true, halfClosed: true},
		{name: "FIN to a half-closed reader", fin: true, halfClosed: true, small: true},
	} {
		t.Run(end.name, func(t *testing.T) {
			l := newLab(t, datapath.NodeSettings{Funnel: true}, datapath.LoadOptions{})
			client, server := l.pod("client", enabled), l.pod("server", enabled)
			for _, p := range []*pod{client, server} {
				p.fastRecovery(t)
				p.sysctl(t, "net/ipv4/tcp_sack", "0")
				p.sysctl(t, "net/ipv4/tcp_early_retrans", "0")
			}
			a, b := client.pair(t, server.listen(t, server.at(false, 0), traffic.SocketOptions{}), traffic.SocketOptions{})
			must.Do(t, a.Set(unix.TCP_NODELAY, 1))
			if end.halfClosed {
				must.Do(t, b.CloseWrite())
				eof(t, a)
			}
			l.gate(false)
			sent, got := traffic.NewStream(1), traffic.NewStream(1)
			deaf := client.drop(t, 100, 0)
			write(t, a, sent, 600)
			read(t, b, got, 600)
			lost := server.drop(t, 100, 0)
			second := 600
			if end.small {
				second = 0
			} else {
				write(t, a, sent, second)
			}
			if end.fin {
				must.Do(t, a.CloseWrite())
			}
			// On a busy machine what arrived may have been sent again before, alone.
			had := must.Get(a.Info())(t).Bytes_retrans
			wait(t, "both are sent again as one", func() (string, bool) {
				info := must.Get(a.Info())(t)
				return fmt.Sprintf("%+v", info), info.Bytes_retrans >= had+uint64(600+second)
			})
			deaf()
			lost()
			read(t, b, got, second)
			if end.fin {
				eof(t, b)
			} else {
				drained(t, a)
				nothing(t, b)
			}
			if n := l.counters().Events["trimmed_bytes"]; n != 600 {
				t.Errorf("%d bytes trimmed, want 600", n)
			}
		})
	}
}
