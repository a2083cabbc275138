package datapath_test

import (
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/plugin/datapath"
	"github.com/skipstack/skipstack/test/datapath/traffic"
	"github.com/skipstack/skipstack/test/must"
	"github.com/skipstack/skipstack/test/node"
)

// tcpOption sets an option of IPPROTO_TCP before the handshake.
func tcpOption(option, value int) func(int) error {
	return func(fd int) error { return unix.SetsockoptInt(fd, unix.IPPROTO_TCP, option, value) }
}

// exchange sends random bytes both ways at once and checks them. The ends are
// shut down afterwards.
func exchange(t *testing.T, a, b *traffic.Conn) {
	t.Helper()
	plan := traffic.Plan{Bytes: 300_000, MaxWrite: 50_000}
	ab, ba := plan, plan
	ab.Seed, ba.Seed = 1, 2
	must.Do(t, traffic.Exchange(a, b, ab, ba))
}

// expectConnections fails the test unless exactly these outcomes of connections
// were counted since the earlier reading.
func (l *lab) expectConnections(before datapath.Counters, want map[string]uint64) {
	l.t.Helper()
	d := l.counters().Since(before)
	for outcome, n := range d.Connections {
		if n != want[outcome] {
			l.t.Errorf("%d connections counted as %s, want %d: %v", n, outcome, want[outcome], nonZero(d))
		}
	}
}

// expectPlain fails the test if a message was redirected since the earlier reading.
func (l *lab) expectPlain(before datapath.Counters) {
	l.t.Helper()
	if d := l.counters().Since(before); d.Messages["redirected"].Messages != 0 {
		l.t.Errorf("messages were redirected: %v", nonZero(d))
	}
}

// expectRedirected fails the test if none was.
func (l *lab) expectRedirected(before datapath.Counters) {
	l.t.Helper()
	if d := l.counters().Since(before); d.Messages["redirected"].Messages == 0 {
		l.t.Errorf("no message was redirected: %v", nonZero(d))
	}
}

// TestClientSendsFirst lets the client send before the server's socket is
// established: such a connection stays on TCP.
func TestClientSendsFirst(t *testing.T) {
	modes(t, func(t *testing.T, s datapath.NodeSettings) {
		l := newLab(t, s, datapath.LoadOptions{})
		client, server := l.pod("client", enabled), l.pod("server", enabled)
		for _, c := range []struct {
			name             string
			client, listener traffic.SocketOptions
		}{
			{"TCP_DEFER_ACCEPT", traffic.SocketOptions{}, traffic.SocketOptions{Setup: tcpOption(unix.TCP_DEFER_ACCEPT, 10)}},
			{"delayed acknowledgement", traffic.SocketOptions{Setup: tcpOption(unix.TCP_QUICKACK, 0)}, traffic.SocketOptions{}},
			{"both", traffic.SocketOptions{Setup: tcpOption(unix.TCP_QUICKACK, 0)},
				traffic.SocketOptions{Setup: tcpOption(unix.TCP_DEFER_ACCEPT, 10)}},
		} {
			t.Run(c.name, func(t *testing.T) {
				tl := server.listen(t, server.at(false, 0), c.listener)
				// The kernel delays the acknowledgement by TCP_DELACK_MAX, 200 ms at most.
				const connections, delay = 50, 100 * time.Millisecond
				for first, deadline := 0, time.Now().Add(patience); first < connections; {
					if time.Now().After(deadline) {
						t.Fatalf("only %d clients could send in time", first)
					}
					before := l.counters()
					sent, got := traffic.NewStream(1), traffic.NewStream(1)
					start := time.Now()
					a := must.Get(client.host.Dial(tl.Addr, c.client))(t)
					write(t, a, sent, 1000)
					inTime := time.Since(start) < delay
					b := must.Get(tl.Accept())(t)
					read(t, b, got, 1000)
					write(t, a, sent, 1000)
					write(t, b, sent, 1000)
					read(t, b, got, 1000)
					read(t, a, got, 1000)
					must.Do(t, errors.Join(a.Close(), b.Close()))
					if !inTime {
						continue
					}
					first++
					l.expectPlain(before)
					l.expect(before, "lost_race", 1)
					l.expect(before, "plain", 1)
					l.expectConnections(before, map[string]uint64{"lost_race": 1})
				}
			})
		}
	})
}

// TestServerSendsFirst is for protocols in which the server speaks first: its
// messages are redirected before the client has sent any.
func TestServerSendsFirst(t *testing.T) {
	modes(t, func(t *testing.T, s datapath.NodeSettings) {
		l := newLab(t, s, datapath.LoadOptions{})
		client, server := l.pod("client", enabled), l.pod("server", enabled)
		tl := server.listen(t, server.at(false, 0), traffic.SocketOptions{})
		for range 50 {
			before := l.counters()
			a, b := client.pair(t, tl, traffic.SocketOptions{})
			sent, got := traffic.NewStream(1), traffic.NewStream(1)
			for range 3 {
				write(t, b, sent, 1000)
			}
			read(t, a, got, 3000)
			write(t, a, sent, 1000)
			read(t, b, got, 1000)
			l.expect(before, "redirected", 4)
			l.enrolled(before, 1)
			must.Do(t, errors.Join(a.Close(), b.Close()))
		}
	})
}

const synData = 32 // TCPI_OPT_SYN_DATA, include/uapi/linux/tcp.h

// TestFastOpen sends data with the SYN.
func TestFastOpen(t *testing.T) {
	modes(t, func(t *testing.T, s datapath.NodeSettings) {
		l := newLab(t, s, datapath.LoadOptions{})
		client, server := l.pod("client", enabled), l.pod("server", enabled)
		for _, p := range []*pod{client, server} {
			p.sysctl(t, "net/ipv4/tcp_fastopen", "3")
		}
		tl := server.listen(t, server.at(false, 0), traffic.SocketOptions{Setup: tcpOption(unix.TCP_FASTOPEN, 10)})
		to := &unix.SockaddrInet4{Port: int(tl.Addr.Port()), Addr: tl.Addr.Addr().As4()}
		for _, c := range []struct {
			name string
			// open sends the first 1000 bytes of the stream.
			open func(t *testing.T, sent *traffic.Stream) *traffic.Conn
		}{
			{"sendto", func(t *testing.T, sent *traffic.Stream) *traffic.Conn {
				fd := must.Get(client.host.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK, 0))(t)
				a := traffic.NewConn(fd)
				first := make([]byte, 1000)
				sent.Next(first)
				err := unix.Sendto(fd, first, unix.MSG_FASTOPEN, to)
				if errors.Is(err, unix.EINPROGRESS) { // no cookie yet: nothing was sent
					must.Do(t, a.Connected())
					_, err = a.Write(first)
				}
				must.Do(t, err)
				return a
			}},
			{"TCP_FASTOPEN_CONNECT", func(t *testing.T, sent *traffic.Stream) *traffic.Conn {
				a := must.Get(client.host.Connect(tl.Addr, traffic.SocketOptions{Setup: tcpOption(unix.TCP_FASTOPEN_CONNECT, 1)}))(t)
				must.Do(t, a.Connected())
				write(t, a, sent, 1000)
				return a
			}},
		} {
			t.Run(c.name, func(t *testing.T) {
				withData := 0
				for range 5 {
					sent, got := traffic.NewStream(1), traffic.NewStream(1)
					a := c.open(t, sent)
					t.Cleanup(func() { a.Close() })
					b := must.Get(tl.Accept())(t)
					t.Cleanup(func() { b.Close() })
					read(t, b, got, 1000)
					write(t, b, sent, 1000)
					read(t, a, got, 1000)
					if must.Get(a.Info())(t).Options&synData != 0 {
						withData++
					}
					exchange(t, a, b)
				}
				if withData < 3 {
					t.Errorf("%d of 5 connections had data in the SYN", withData)
				}
			})
		}
		if n := l.counters(); n.Connections["enrolled"] > 2 {
			t.Errorf("connections with data in the SYN were enrolled: %v", nonZero(n))
		}
	})
}

// TestMPTCP has Go's default listener, which is an MPTCP one, and MPTCP clients.
func TestMPTCP(t *testing.T) {
	node.Need(t)
	if fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, unix.IPPROTO_MPTCP); err != nil {
		t.Skipf("needs MPTCP: %v", err)
	} else {
		unix.Close(fd)
	}
	for _, c := range []struct {
		name             string
		client, listener bool // are MPTCP
		safe             bool // accept(2) on an MPTCP listener
		want             string
	}{
		{"TCP client, MPTCP listener", false, true, true, "enrolled"},
		{"TCP client, unsafe MPTCP listener", false, true, false, "mptcp"},
		{"MPTCP client, MPTCP listener", true, true, true, "mptcp"},
		{"MPTCP client, unsafe MPTCP listener", true, true, false, "mptcp"},
		{"MPTCP client, TCP listener", true, false, true, "mptcp"},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := newLab(t, datapath.NodeSettings{Funnel: true, MPTCPListeners: c.safe}, datapath.LoadOptions{})
			client, server := l.pod("client", enabled), l.pod("server", enabled)
			tl := server.listen(t, server.at(false, 0), traffic.SocketOptions{MPTCP: c.listener})
			const connections = 20
			for range connections {
				a, b := client.pair(t, tl, traffic.SocketOptions{MPTCP: c.client})
				echo(t, a, b)
				exchange(t, a, b)
				must.Do(t, errors.Join(a.Close(), b.Close()))
			}
			l.expectConnections(datapath.Counters{}, map[string]uint64{c.want: connections})
			if c.want == "enrolled" {
				l.expectRedirected(datapath.Counters{})
			} else {
				l.expectPlain(datapath.Counters{})
			}
		})
	}
}

// TestSelfConnect connects a socket to itself.
func TestSelfConnect(t *testing.T) {
	modes(t, func(t *testing.T, s datapath.NodeSettings) {
		l := newLab(t, s, datapath.LoadOptions{})
		p := l.pod("pod", enabled)
		for _, addr := range []netip.AddrPort{p.at(false, 4000), netip.MustParseAddrPort("127.0.0.1:4000")} {
			a := must.Get(p.host.Dial(addr, traffic.SocketOptions{From: addr}))(t)
			if a.Local() != a.Remote() {
				t.Fatalf("%s is connected to %s", a.Local(), a.Remote())
			}
			sent, got := traffic.NewStream(1), traffic.NewStream(1)
			for range 10 {
				write(t, a, sent, 10_000)
				read(t, a, got, 10_000)
			}
			must.Do(t, a.Close())
		}
		l.expectPlain(datapath.Counters{})
		l.enrolled(datapath.Counters{}, 0)
	})
}

// TestSimultaneousOpen lets two sockets connect to each other.
func TestSimultaneousOpen(t *testing.T) {
	modes(t, func(t *testing.T, s datapath.NodeSettings) {
		l := newLab(t, s, datapath.LoadOptions{})
		p, q := l.pod("p", enabled), l.pod("q", enabled)
		must.Do(t, l.normalHandshakes())
		// The first SYN of each is lost, so that both are sent again and cross.
		const syn = 2
		stop := []func(){p.dropFlags(t, syn), q.dropFlags(t, syn)}
		a := must.Get(p.host.Connect(q.at(false, 5000), traffic.SocketOptions{From: p.at(false, 5000)}))(t)
		defer a.Close()
		b := must.Get(q.host.Connect(p.at(false, 5000), traffic.SocketOptions{From: q.at(false, 5000)}))(t)
		defer b.Close()
		for _, f := range stop {
			f()
		}
		must.Do(t, errors.Join(a.Connected(), b.Connected()))
		if a.Local() != b.Remote() || b.Local() != a.Remote() {
			t.Fatalf("%s - %s and %s - %s", a.Local(), a.Remote(), b.Local(), b.Remote())
		}
		echo(t, a, b)
		exchange(t, a, b)
		l.expectPlain(datapath.Counters{})
		l.enrolled(datapath.Counters{}, 0)
	})
}

// TestOutsiders connects to and from pods that are not attached and pods of
// another node: not one socket may enter the sockhash.
func TestOutsiders(t *testing.T) {
	modes(t, func(t *testing.T, s datapath.NodeSettings) {
		l := newLab(t, s, datapath.LoadOptions{})
		other := newLabAt(t, s, "10.89.0.0/16", "fd00:89::/64")
		must.Do(t, node.Connect(l.node, other.node,
			prefixes("10.88.0.0/16", "fd00:88::/64"), prefixes("10.89.0.0/16", "fd00:89::/64")))
		inside, plain := l.pod("inside", enabled), l.plainPod("plain")
		far := other.pod("far", enabled)
		for _, ipv6 := range []bool{false, true} {
			for _, c := range []struct {
				name           string
				client, server *pod
				at             *lab // of the pod that is attached
				want           string
			}{
				{"to a pod that is not attached", inside, plain, l, "remote_server"},
				{"from a pod that is not attached", plain, inside, l, "remote_client"},
				{"to another node", inside, far, l, "remote_server"},
				{"from another node", far, inside, l, "remote_client"},
			} {
				t.Run(fmt.Sprintf("%s, IPv6 %v", c.name, ipv6), func(t *testing.T) {
					tl := c.server.listen(t, c.server.at(ipv6, 0), traffic.SocketOptions{})
					before := c.at.counters()
					const connections = 20
					for range connections {
						a, b := c.client.pair(t, tl, traffic.SocketOptions{})
						echo(t, a, b)
						for _, lab := range []*lab{l, other} {
							if n := must.Get(lab.set.Enrolled())(t); n != 0 {
								t.Errorf("%d sockets in the sockhash", n)
							}
							if n := must.Get(lab.set.Live())(t); n != 0 {
								t.Errorf("%d live sockets", n)
							}
						}
						exchange(t, a, b)
						must.Do(t, errors.Join(a.Close(), b.Close()))
					}
					c.at.expectConnections(before, map[string]uint64{c.want: connections})
					// No program at all looks at their messages.
					for outcome, m := range c.at.counters().Since(before).Messages {
						if m.Messages != 0 {
							t.Errorf("%d messages counted as %s", m.Messages, outcome)
						}
					}
				})
			}
		}
	})
}

func prefixes(s ...string) []netip.Prefix {
	var p []netip.Prefix
	for _, prefix := range s {
		p = append(p, netip.MustParsePrefix(prefix))
	}
	return p
}

// TestSameTupleInTwoPods uses the same addresses and ports of the loopback
// interface in two pods at the same time.
func TestSameTupleInTwoPods(t *testing.T) {
	modes(t, func(t *testing.T, s datapath.NodeSettings) {
		l := newLab(t, s, datapath.LoadOptions{})
		pods := []*pod{l.pod("p", enabled), l.pod("q", enabled)}
		at, from := netip.MustParseAddrPort("127.0.0.1:6000"), netip.MustParseAddrPort("127.0.0.1:5000")
		var listeners []*traffic.Listener
		for _, p := range pods {
			listeners = append(listeners, p.listen(t, at, traffic.SocketOptions{}))
		}
		const rounds = 200
		var barrier [rounds]sync.WaitGroup
		for i := range barrier {
			barrier[i].Add(len(pods))
		}
		errs := make(chan error, len(pods))
		for i, p := range pods {
			go func() {
				var err error
				for round := range rounds {
					barrier[round].Done()
					barrier[round].Wait() // both connect at once
					if err == nil {
						err = loopbackRound(p, listeners[i], from, uint64(i*rounds+round))
					}
				}
				errs <- err
			}()
		}
		for range pods {
			must.Do(t, <-errs)
		}
		c := l.counters()
		// The kernel makes an initial sequence number of the tuple, a secret and the
		// time in units of 64 ns (secure_tcp_seq()), the same in all network
		// namespaces. So two handshakes at the same moment on two CPUs may have both
		// numbers in common: the first has the record, and the other is plain. What
		// its ends are counted as depends on how far the first is.
		twins := 2*rounds - c.Events["syn_recorded"]
		if twins > rounds/10 {
			t.Errorf("of %d clients, %d had another's numbers", 2*rounds, twins)
		}
		want := map[string]uint64{"enrolled": 2*rounds - twins}
		if twins > 0 {
			for _, outcome := range []string{"unproven", "remote_client", "remote_server"} {
				want[outcome] = min(c.Connections[outcome], 2*twins)
			}
		}
		l.expectConnections(datapath.Counters{}, want)
	})
}

// loopbackRound connects, exchanges messages that no other round has, and resets
// the connection so that the tuple is free at once.
func loopbackRound(p *pod, tl *traffic.Listener, from netip.AddrPort, seed uint64) error {
	a, b, err := p.host.Pair(tl, tl.Addr, traffic.SocketOptions{From: from})
	if err != nil {
		return err
	}
	defer b.Close()
	deadline := time.Now().Add(patience)
	err = errors.Join(a.SetDeadline(deadline), b.SetDeadline(deadline))
	plan := traffic.Plan{Seed: seed, Bytes: 5000, MaxWrite: 1000, Open: true}
	back := plan
	back.Seed += 1 << 32
	return errors.Join(err, traffic.Exchange(a, b, plan, back), a.Reset())
}

// TestBlockingSockets has ends without O_NONBLOCK, on which a read may return
// EAGAIN when they are enrolled: that takes a pod that accepts it.
func TestBlockingSockets(t *testing.T) {
	accepting := enabled
	accepting.Accepted = datapath.RiskBlocking
	for _, c := range []struct {
		name                     string
		client, server           datapath.PodSettings
		blockClient, blockServer bool
		want                     string
	}{
		{"client", enabled, enabled, true, false, "blocking"},
		{"server", enabled, enabled, false, true, "blocking"},
		{"both", enabled, enabled, true, true, "blocking"},
		{"client, accepted by the other pod", enabled, accepting, true, false, "blocking"},
		{"server, accepted by the other pod", accepting, enabled, false, true, "blocking"},
		{"client, accepted", accepting, enabled, true, false, "enrolled"},
		{"server, accepted", enabled, accepting, false, true, "enrolled"},
		{"both, accepted", accepting, accepting, true, true, "enrolled"},
		{"neither", enabled, enabled, false, false, "enrolled"},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := newLab(t, datapath.NodeSettings{Funnel: true}, datapath.LoadOptions{})
			client, server := l.pod("client", c.client), l.pod("server", c.server)
			tl := server.listen(t, server.at(false, 0), traffic.SocketOptions{Blocking: c.blockServer})
			a, b := client.pair(t, tl, traffic.SocketOptions{Blocking: c.blockClient})
			sent, got := traffic.NewStream(1), traffic.NewStream(1)
			for range 10 {
				write(t, a, sent, 1000)
				read(t, b, got, 1000)
				write(t, b, sent, 1000)
				read(t, a, got, 1000)
			}
			l.expectConnections(datapath.Counters{}, map[string]uint64{c.want: 1})
			want := uint64(0)
			if c.want == "enrolled" {
				want = 20
			}
			l.expect(datapath.Counters{}, "redirected", want)
		})
	}
}

// TestExcludedPorts excludes server ports, in the server's pod or the client's.
func TestExcludedPorts(t *testing.T) {
	excluding := enabled
	excluding.ExcludePorts = []datapath.PortRange{{First: 7000, Last: 7000}, {First: 8000, Last: 8010}, {First: 65535, Last: 65535}}
	for range datapath.MaxExcludePorts - 4 {
		excluding.ExcludePorts = append(excluding.ExcludePorts, datapath.PortRange{First: 1, Last: 1})
	}
	excluding.ExcludePorts = append(excluding.ExcludePorts, datapath.PortRange{First: 9000, Last: 9000}) // the last there can be
	ports := map[uint16]bool{
		6999: false, 7000: true, 7001: false, 7999: false, 8000: true, 8005: true, 8010: true, 8011: false,
		9000: true, 65534: false, 65535: true,
	}
	for _, c := range []struct {
		name           string
		client, server datapath.PodSettings
	}{
		{"by the server's pod", enabled, excluding},
		{"by the client's pod", excluding, enabled},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := newLab(t, datapath.NodeSettings{Funnel: true}, datapath.LoadOptions{})
			client, server := l.pod("client", c.client), l.pod("server", c.server)
			for port, excluded := range ports {
				tl := server.listen(t, server.at(false, port), traffic.SocketOptions{})
				before := l.counters()
				a, b := client.pair(t, tl, traffic.SocketOptions{})
				echo(t, a, b)
				want, redirected := "enrolled", uint64(2)
				if excluded {
					want, redirected = "excluded_port", 0
				}
				l.expectConnections(before, map[string]uint64{want: 1})
				l.expect(before, "redirected", redirected)
			}
			// A client's own port is no server port.
			tl := server.listen(t, server.at(false, 0), traffic.SocketOptions{})
			before := l.counters()
			a, b := client.pair(t, tl, traffic.SocketOptions{From: client.at(false, 8001)})
			echo(t, a, b)
			l.expectConnections(before, map[string]uint64{"enrolled": 1})
		})
	}
	t.Run("of a service, by the client's pod", func(t *testing.T) {
		l := newLab(t, datapath.NodeSettings{Funnel: true}, datapath.LoadOptions{})
		client, server := l.pod("client", excluding), l.pod("server", enabled)
		tl := server.listen(t, server.at(false, 6000), traffic.SocketOptions{})
		for _, port := range []uint16{80, 8000} {
			_, err := l.node.AddService(node.ServiceOptions{
				IP: netip.MustParseAddr("10.96.0.1"), Port: port, Backend: tl.Addr.Addr(), BackendPort: tl.Addr.Port(), Masquerade: true,
			})
			must.Do(t, err)
		}
		for port, want := range map[uint16]string{80: "enrolled", 8000: "excluded_port"} {
			before := l.counters()
			a, b := client.pairBy(t, tl, netip.AddrPortFrom(netip.MustParseAddr("10.96.0.1"), port), traffic.SocketOptions{})
			echo(t, a, b)
			l.expectConnections(before, map[string]uint64{want: 1})
		}
	})
}

// TestMaxConnections fills a datapath that is made for one connection.
func TestMaxConnections(t *testing.T) {
	modes(t, func(t *testing.T, s datapath.NodeSettings) {
		l := newLab(t, s, datapath.LoadOptions{MaxConnections: 1})
		client, server := l.pod("client", enabled), l.pod("server", enabled)
		tl := server.listen(t, server.at(false, 0), traffic.SocketOptions{})
		for range 3 {
			before := l.counters()
			a, b := client.pair(t, tl, traffic.SocketOptions{})
			echo(t, a, b)
			l.expectConnections(before, map[string]uint64{"enrolled": 1})
			for range 3 {
				before := l.counters()
				c, d := client.pair(t, tl, traffic.SocketOptions{})
				echo(t, c, d)
				exchange(t, c, d)
				l.expectConnections(before, map[string]uint64{"map_full": 1})
				l.expectPlain(before)
				must.Do(t, errors.Join(c.Close(), d.Close()))
			}
			before = l.counters()
			exchange(t, a, b)
			l.expectRedirected(before)
			must.Do(t, errors.Join(a.Close(), b.Close()))
			l.waitEmpty()
		}
	})
}

// TestReceiveLowWaterMark sets SO_RCVLOWAT, which the funnel would break.
func TestReceiveLowWaterMark(t *testing.T) {
	lowWaterMark := traffic.SocketOptions{Setup: func(fd int) error {
		return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVLOWAT, 50)
	}}
	modes(t, func(t *testing.T, s datapath.NodeSettings) {
		l := newLab(t, s, datapath.LoadOptions{})
		client, server := l.pod("client", enabled), l.pod("server", enabled)
		want := "enrolled"
		if s.Funnel {
			want = "rcvlowat"
		}
		for _, c := range []struct{ client, listener traffic.SocketOptions }{{client: lowWaterMark}, {listener: lowWaterMark}} {
			before := l.counters()
			tl := server.listen(t, server.at(false, 0), c.listener)
			a, b := client.pair(t, tl, c.client)
			echo(t, a, b)
			l.expectConnections(before, map[string]uint64{want: 1})
		}
	})
}

// TestLateAcknowledgement loses the first SYN-ACK. By the time of the next, a
// second later, somebody could have guessed the numbers: the connection is plain.
func TestLateAcknowledgement(t *testing.T) {
	modes(t, func(t *testing.T, s datapath.NodeSettings) {
		t.Parallel()
		l := newLab(t, s, datapath.LoadOptions{ClaimWindow: shortWindow})
		must.Do(t, l.normalHandshakes())
		client, server := l.pod("client", enabled), l.pod("server", enabled)
		const synAck = 2 | 16
		tl := server.listen(t, server.at(false, 0), traffic.SocketOptions{})
		stop := client.dropFlags(t, synAck)
		a := must.Get(client.host.Connect(tl.Addr, traffic.SocketOptions{}))(t)
		defer a.Close()
		l.wait("the SYN is recorded", func() (string, bool) { return "", l.counters().Events["syn_recorded"] == 1 })
		time.Sleep(shortWindow) // the first one may be still on its way
		stop()
		must.Do(t, a.Connected())
		b := must.Get(tl.Accept())(t)
		defer b.Close()
		echo(t, a, b)
		exchange(t, a, b)
		l.expectPlain(datapath.Counters{})
		l.enrolled(datapath.Counters{}, 0)
	})
}

// TestSYNCookies has a listener that answers with cookies, so that no request
// exists that could prove who is who: such connections are plain.
func TestSYNCookies(t *testing.T) {
	modes(t, func(t *testing.T, s datapath.NodeSettings) {
		l := newLab(t, s, datapath.LoadOptions{})
		client, server := l.pod("client", enabled), l.pod("server", enabled)
		server.sysctl(t, "net/ipv4/tcp_syncookies", "2") // always
		tl := server.listen(t, server.at(false, 0), traffic.SocketOptions{})
		for range 20 {
			a, b := client.pair(t, tl, traffic.SocketOptions{})
			echo(t, a, b)
			exchange(t, a, b)
		}
		l.expectPlain(datapath.Counters{})
		l.expectConnections(datapath.Counters{}, map[string]uint64{"remote_server": 20})
	})
}
