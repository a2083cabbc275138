package datapath_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/bpf"
	"github.com/skipstack/skipstack/plugin/datapath"
	"github.com/skipstack/skipstack/test/datapath/traffic"
	"github.com/skipstack/skipstack/test/must"
	"github.com/skipstack/skipstack/test/node"
)

// A flow is traffic over some connections between two pods.
type flow struct {
	l     *lab
	pairs [][2]*traffic.Conn
	load  *traffic.Load
	ended bool
}

const flowConnections = 8

// flow starts traffic both ways, which goes on until the test ends or stops it.
func (l *lab) flow(client, server *pod) *flow {
	l.t.Helper()
	tl := server.listen(l.t, server.at(false, 0), traffic.SocketOptions{})
	f := &flow{l: l}
	for range flowConnections {
		a, b := client.pair(l.t, tl, traffic.SocketOptions{})
		f.pairs = append(f.pairs, [2]*traffic.Conn{a, b})
	}
	f.load = traffic.StartLoad(f.pairs, traffic.Plan{MaxWrite: 16 << 10, Paced: 200 * time.Microsecond})
	l.t.Cleanup(f.stop)
	f.progress()
	return f
}

// stop ends the traffic; all bytes must have arrived.
func (f *flow) stop() {
	f.l.t.Helper()
	if f.ended {
		return
	}
	f.ended = true
	if err := f.load.Stop(); err != nil {
		f.l.t.Error(err)
	}
	for _, p := range f.pairs {
		if err := errors.Join(p[0].Close(), p[1].Close()); err != nil {
			f.l.t.Error(err)
		}
	}
}

// progress waits until every direction of every connection has gone on.
func (f *flow) progress() {
	f.l.t.Helper()
	before := f.load.Received()
	f.l.wait("every connection has gone on", func() (string, bool) {
		if err := f.load.Err(); err != nil {
			f.l.t.Fatal(err)
		}
		for i, n := range f.load.Received() {
			if n < before[i]+50_000 {
				return fmt.Sprintf("direction %d: %d bytes", i, n-before[i]), false
			}
		}
		return "", true
	})
}

// redirects waits until the traffic is redirected: a connection returns from TCP
// to redirecting at the first message that finds all before it acknowledged.
func (f *flow) redirects() {
	f.l.t.Helper()
	f.l.wait("the traffic is redirected", func() (string, bool) {
		before := f.l.counters()
		f.progress()
		m := f.l.counters().Since(before).Messages
		return fmt.Sprint(m), m["redirected"].Messages > total(m)*9/10 && m["switched_off"].Messages == 0
	})
}

// plain fails the test unless the traffic goes by TCP because a gate is closed.
func (f *flow) plain() {
	f.l.t.Helper()
	f.progress() // what was being sent is sent
	before := f.l.counters()
	f.progress()
	m := f.l.counters().Since(before).Messages
	if all := total(m); m["switched_off"].Messages != all {
		f.l.t.Errorf("%d messages counted as switched_off of %d: %v", m["switched_off"].Messages, all, m)
	}
}

func total(m map[string]datapath.Count) (n uint64) {
	for _, c := range m {
		n += c.Messages
	}
	return n
}

// TestGates closes and opens each gate under traffic: everything goes on by TCP
// and in order, and then the same connections are redirected again.
func TestGates(t *testing.T) {
	modes(t, func(t *testing.T, s datapath.NodeSettings) {
		l := newLab(t, s, datapath.LoadOptions{})
		client, server := l.pod("client", enabled), l.pod("server", enabled)
		set := func(p *pod, change func(*datapath.PodSettings)) func() {
			return func() {
				settings, _, err := l.set.Pod(p.id)
				must.Do(t, err)
				change(&settings)
				must.Do(t, l.set.SetPod(p.id, settings))
			}
		}
		risks := func(r datapath.Risk) func() {
			return func() {
				n := must.Get(l.set.Node())(t)
				n.Risks = r
				must.Do(t, l.set.SetNode(n))
			}
		}
		f := l.flow(client, server)
		f.redirects()
		for _, gate := range []struct {
			name      string
			off, back func()
		}{
			{"node", func() { l.gate(false) }, func() { l.gate(true) }},
			{"risk of the node", risks(datapath.RiskSplice), risks(0)},
			{"client's pod", set(client, func(s *datapath.PodSettings) { s.SwitchedOff = true }),
				set(client, func(s *datapath.PodSettings) { s.SwitchedOff = false })},
			{"server's pod", set(server, func(s *datapath.PodSettings) { s.SwitchedOff = true }),
				set(server, func(s *datapath.PodSettings) { s.SwitchedOff = false })},
			{"mode of the client's pod", set(client, func(s *datapath.PodSettings) { s.Enabled = false }),
				set(client, func(s *datapath.PodSettings) { s.Enabled = true })},
			{"mode of the server's pod", set(server, func(s *datapath.PodSettings) { s.Enabled = false }),
				set(server, func(s *datapath.PodSettings) { s.Enabled = true })},
		} {
			t.Run(gate.name, func(t *testing.T) {
				gate.off()
				f.plain()
				// New connections are plain for life.
				before := l.counters()
				a, b := client.pair(t, server.listen(t, server.at(false, 0), traffic.SocketOptions{}), traffic.SocketOptions{})
				l.enrolled(before, 0)
				gate.back()
				f.redirects()
				echo(t, a, b)
			})
		}
		f.stop()
	})
}

// TestGatesUnderChurn opens and closes gates at random while connections come
// and go.
func TestGatesUnderChurn(t *testing.T) {
	modes(t, func(t *testing.T, s datapath.NodeSettings) {
		l := newLab(t, s, datapath.LoadOptions{})
		client, server := l.pod("client", enabled), l.pod("server", enabled)
		tl := server.listen(t, server.at(false, 0), traffic.SocketOptions{})
		const connections, atOnce = 400, 10
		room := make(chan struct{}, atOnce)
		ended := make(chan error, connections)
		go func() {
			for range connections {
				room <- struct{}{}
				a, b, err := client.host.Pair(tl, tl.Addr, traffic.SocketOptions{})
				if err != nil {
					ended <- err
					continue
				}
				go func() {
					deadline := time.Now().Add(patience)
					err := errors.Join(a.SetDeadline(deadline), b.SetDeadline(deadline))
					plan := func() traffic.Plan {
						return traffic.Plan{Seed: rand.Uint64(), Bytes: rand.Int64N(200_000), MaxWrite: 10_000, Paced: 50 * time.Microsecond}
					}
					err = errors.Join(err, traffic.Exchange(a, b, plan(), plan()), a.Close(), b.Close())
					<-room
					ended <- err
				}()
			}
		}()
		for left := connections; left > 0; {
			select {
			case err := <-ended:
				must.Do(t, err)
				left--
			case <-time.After(time.Duration(rand.IntN(3000)) * time.Microsecond):
				settings := enabled
				settings.SwitchedOff = rand.IntN(4) == 0
				settings.UnreadLimit = 1 << (10 + rand.IntN(14))
				must.Do(t, l.set.SetPod([]*pod{client, server}[rand.IntN(2)].id, settings))
				l.gate(rand.IntN(4) != 0)
			}
		}
		m := l.counters().Messages
		if m["redirected"].Messages == 0 || m["switched_off"].Messages == 0 || m["receiver_full"].Messages == 0 {
			t.Errorf("not every outcome was seen: %v", m)
		}
	})
}

// linksIn lists the pins of links in a directory of the published datapath.
func (l *lab) linksIn(dir string) []string {
	l.t.Helper()
	return must.Get(filepath.Glob(filepath.Join(l.node.BPFFS, "skipstack/*", dir, "*")))(l.t)
}

// expectLinks fails the test unless there are so many links of pods, and of pods
// that are gone.
func (l *lab) expectLinks(links, parked int) {
	l.t.Helper()
	if got, gone := l.linksIn("links"), l.linksIn("parked"); len(got) != links || len(gone) != parked {
		l.t.Errorf("links %v, parked %v; want %d and %d", got, gone, links, parked)
	}
}

// TestDropPod takes a pod's part in acceleration away under traffic, and gives it
// back; then for good.
func TestDropPod(t *testing.T) {
	modes(t, func(t *testing.T, s datapath.NodeSettings) {
		l := newPublishedLab(t, s)
		client, server := l.pod("client", enabled), l.pod("server", enabled)
		f := l.flow(client, server)
		f.redirects()
		for _, p := range []*pod{client, server} {
			must.Do(t, datapath.DropPod(l.node.BPFFS, p.id))
			l.expectLinks(1, 1)
			f.plain()
			// A link that sockets still need stays.
			must.Do(t, datapath.Sweep(l.node.BPFFS, 0))
			l.expectLinks(1, 1)

			if created := must.Get(l.set.Attach(p.cgroup, p.id))(t); created {
				t.Error("a second link was made beside the parked one")
			}
			must.Do(t, l.set.SetPod(p.id, enabled))
			l.expectLinks(2, 0)
			f.redirects()
		}
		for _, p := range []*pod{client, server} {
			must.Do(t, datapath.DropPod(l.node.BPFFS, p.id))
		}
		l.expectLinks(0, 2)
		f.plain()
		if n := must.Get(l.set.Live())(t); n != 2*flowConnections {
			t.Errorf("%d live sockets, want %d", n, 2*flowConnections)
		}
		f.stop()
		l.waitEmpty()
		must.Do(t, datapath.Sweep(l.node.BPFFS, 0))
		l.expectLinks(0, 0)
		if pods := must.Get(l.set.PodCounters())(t); len(pods) != 0 {
			t.Errorf("counters are left: %v", pods)
		}
		l.expectNothingKept()
	})
}

// expectNothingKept fails the test if the maps keep something of connections that
// are gone.
func (l *lab) expectNothingKept() {
	l.t.Helper()
	for _, name := range []string{"connections", "funnel_next", "pods", "queues"} {
		m := must.Get(ebpf.LoadPinnedMap(l.pin(name), nil))(l.t)
		defer m.Close()
		// A program may still be at the last socket's end.
		l.wait("map "+name+" is empty", func() (string, bool) {
			n := 0
			var key, value []byte
			for it := m.Iterate(); it.Next(&key, &value); {
				n++
			}
			return fmt.Sprintf("%d entries", n), n == 0
		})
	}
}

// pin is the path of a map of the published datapath.
func (l *lab) pin(name string) string {
	return filepath.Join(l.node.BPFFS, "skipstack", fmt.Sprintf("v%d", datapath.Layout), "maps", name)
}

// TestRoomIsGivenBack reserves room for a burst of messages, which is given back by
// the first message after it was read, or when the receiver closes.
func TestRoomIsGivenBack(t *testing.T) {
	modes(t, func(t *testing.T, s datapath.NodeSettings) {
		l := newPublishedLab(t, s)
		client, server := l.pod("client", enabled), l.pod("server", enabled)
		tl := server.listen(t, server.at(false, 0), traffic.SocketOptions{})
		sum, queues := must.Get(ebpf.LoadPinnedMap(l.pin("queues_sum"), nil))(t), must.Get(ebpf.LoadPinnedMap(l.pin("queues"), nil))(t)
		defer sum.Close()
		defer queues.Close()
		reserved := func() (messages uint64) {
			var v struct{ Messages, SweptNs uint64 }
			must.Do(t, sum.Lookup(uint32(0), &v))
			return v.Messages
		}
		for name, end := range map[string]func(f *traffic.Filler, b *traffic.Conn){
			"read": func(f *traffic.Filler, b *traffic.Conn) {
				must.Do(t, b.Receive(traffic.Plan{Bytes: f.Total, Open: true}))
				must.Get(f.Fill(1, 1))(t)
			},
			"receiver closes": func(_ *traffic.Filler, b *traffic.Conn) { must.Do(t, b.Close()) },
			"sender closes first": func(f *traffic.Filler, b *traffic.Conn) {
				must.Do(t, f.Conn.Close())
				if n := reserved(); n == 0 {
					t.Error("given back by a sender that has closed")
				}
				must.Do(t, b.Close())
			},
		} {
			f := &traffic.Filler{Stream: traffic.NewStream(0)}
			var b *traffic.Conn
			f.Conn, b = client.pair(t, tl, traffic.SocketOptions{})
			must.Get(f.Fill(1, 300))(t)
			if n := reserved(); n < 290 || n > 300+64 {
				t.Errorf("%s: room for %d messages is reserved for 300", name, n)
			}
			end(f, b)
			l.wait(name+": the room is given back", func() (string, bool) {
				n, err := reserved(), queues.NextKey(nil, new(uint64))
				return fmt.Sprintf("for %d messages it is not (%v)", n, err), n == 0 && errors.Is(err, ebpf.ErrKeyNotExist)
			})
		}
	})
}

// TestNothingIsKept ends connections in every way and looks for what the maps
// keep of them.
func TestNothingIsKept(t *testing.T) {
	modes(t, func(t *testing.T, s datapath.NodeSettings) {
		l := newPublishedLab(t, s)
		client, server := l.pod("client", enabled), l.pod("server", enabled)
		plain := l.plainPod("plain")
		tl := server.listen(t, server.at(false, 0), traffic.SocketOptions{})
		out := plain.listen(t, plain.at(false, 0), traffic.SocketOptions{})
		ends := map[string]func(a, b *traffic.Conn){
			"close":         func(a, b *traffic.Conn) { must.Do(t, errors.Join(a.Close(), b.Close())) },
			"server closes": func(a, b *traffic.Conn) { must.Do(t, errors.Join(b.Close(), a.Close())) },
			"reset":         func(a, b *traffic.Conn) { must.Do(t, errors.Join(a.Reset(), b.Close())) },
			"server resets": func(a, b *traffic.Conn) { must.Do(t, errors.Join(b.Reset(), a.Close())) },
			"half-close": func(a, b *traffic.Conn) {
				must.Do(t, a.CloseWrite())
				if _, err := b.Write([]byte{1}); err != nil {
					t.Error(err)
				}
				must.Do(t, errors.Join(b.Close(), a.Close()))
			},
		}
		for _, end := range ends {
			for _, bytes := range []int{0, 1, 1000} {
				for _, gate := range []bool{true, false} {
					for _, accepted := range []bool{true, false} {
						var a, b *traffic.Conn
						if accepted {
							a, b = client.pair(t, tl, traffic.SocketOptions{})
						} else {
							a = client.dial(t, tl)
						}
						l.gate(gate)
						for _, c := range []*traffic.Conn{a, b} {
							if c != nil && bytes > 0 {
								write(t, c, traffic.NewStream(0), bytes)
							}
						}
						if !accepted {
							b = must.Get(tl.Accept())(t)
						}
						end(a, b)
						l.gate(true)
					}
				}
			}
			// Refused ones.
			a, b := plain.pair(t, tl, traffic.SocketOptions{})
			end(a, b)
			a, b = client.pair(t, out, traffic.SocketOptions{})
			end(a, b)
			a, b = client.pair(t, tl, traffic.SocketOptions{Setup: tcpOption(unix.TCP_QUICKACK, 0)})
			end(a, b)
			a, b = client.pair(t, tl, traffic.SocketOptions{Blocking: true})
			end(a, b)
		}
		l.waitEmpty()
		for _, p := range []*pod{client, server} {
			must.Do(t, datapath.DropPod(l.node.BPFFS, p.id))
		}
		l.expectLinks(0, 0)
		l.expectNothingKept()
	})
}

// TestUnload unloads and loads under traffic.
func TestUnload(t *testing.T) {
	modes(t, func(t *testing.T, s datapath.NodeSettings) {
		l := newPublishedLab(t, s)
		client, server := l.pod("client", enabled), l.pod("server", enabled)
		f := l.flow(client, server)
		f.redirects()
		if _, err := datapath.Unload(t.Context(), l.node.BPFFS, false); !errors.Is(err, datapath.ErrInUse) {
			t.Fatalf("unload with pods attached: %v", err)
		}
		f.redirects()
		left := must.Get(datapath.Unload(t.Context(), l.node.BPFFS, true))(t)
		if left.Sockets != 2*flowConnections {
			t.Errorf("%d sockets left, want %d", left.Sockets, 2*flowConnections)
		}
		l.expectLinks(0, 2)
		f.plain()

		must.Do(t, l.set.Close())
		l.set = must.Get(datapath.Load(t.Context(), l.node.BPFFS, loadOptions))(t)
		f.plain()
		for _, p := range []*pod{client, server} {
			must.Get(l.set.Attach(p.cgroup, p.id))(t)
			must.Do(t, l.set.SetPod(p.id, enabled))
		}
		l.gate(true)
		f.redirects()

		left = must.Get(datapath.Unload(t.Context(), l.node.BPFFS, true))(t)
		if left.Sockets != 2*flowConnections {
			t.Errorf("%d sockets left, want %d", left.Sockets, 2*flowConnections)
		}
		f.plain()
		f.stop()
		l.waitEmpty()
		left = must.Get(datapath.Unload(t.Context(), l.node.BPFFS, false))(t)
		if _, err := os.Stat(filepath.Join(l.node.BPFFS, "skipstack")); left.Sockets != 0 || !errors.Is(err, os.ErrNotExist) {
			t.Errorf("after the last socket: %+v, %v", left, err)
		}
	})
}

// TestUpgrade replaces the programs under traffic, several times, while
// connections are made.
func TestUpgrade(t *testing.T) {
	modes(t, func(t *testing.T, s datapath.NodeSettings) {
		l := newPublishedLab(t, s)
		client, server := l.pod("client", enabled), l.pod("server", enabled)
		f := l.flow(client, server)
		f.redirects()
		tl := server.listen(t, server.at(false, 0), traffic.SocketOptions{})
		ctl := must.Get(ebpf.LoadPinnedMap(l.pin("skipstack_ctl"), nil))(t)
		defer ctl.Close()
		stop, churned := make(chan struct{}), make(chan error, 1)
		go func() {
			var err error
			for err == nil {
				select {
				case <-stop:
					churned <- nil
					return
				default:
				}
				var a, b *traffic.Conn
				if a, b, err = client.host.Pair(tl, tl.Addr, traffic.SocketOptions{}); err == nil {
					plan := traffic.Plan{Seed: 1, Bytes: 10_000, MaxWrite: 1000}
					err = errors.Join(traffic.Exchange(a, b, plan, plan), a.Close(), b.Close())
				}
			}
			churned <- err
		}()
		for range 3 {
			var settings bpf.DatapathControl
			must.Do(t, ctl.Lookup(uint32(0), &settings))
			settings.Build[0]++ // what is published comes from another build
			must.Do(t, ctl.Put(uint32(0), settings))
			fresh, changed, err := datapath.Upgrade(t.Context(), l.node.BPFFS, loadOptions)
			must.Do(t, err)
			if build := must.Get(fresh.Build())(t); !changed || build != bpf.Build() {
				t.Errorf("upgraded: %v, build %x", changed, build)
			}
			must.Do(t, l.set.Close())
			l.set = fresh
			f.redirects() // the old connections
			before := l.counters()
			a, b := client.pair(t, server.listen(t, server.at(false, 0), traffic.SocketOptions{}), traffic.SocketOptions{})
			echo(t, a, b)
			l.expectRedirected(before)
		}
		if _, changed, err := datapath.Upgrade(t.Context(), l.node.BPFFS, datapath.LoadOptions{}); changed || err != nil {
			t.Errorf("upgraded to the same build: %v, %v", changed, err)
		}
		close(stop)
		must.Do(t, <-churned)
		// The switch reaches old and new programs alike.
		l.gate(false)
		f.plain()
		l.gate(true)
		f.redirects()
		f.stop()
	})
}

// TestNestedCgroups attaches the pod's cgroup and its container's, so that the
// program runs twice for each socket: the second run must change nothing.
func TestNestedCgroups(t *testing.T) {
	modes(t, func(t *testing.T, s datapath.NodeSettings) {
		l := newLab(t, s, datapath.LoadOptions{})
		client, server := l.pod("client", enabled), l.pod("server", enabled)
		for _, p := range []*pod{client, server} {
			inner, id := openCgroup(t, p.ContainerCgroup)
			defer inner.Close()
			must.Get(l.set.Attach(inner, id))(t)
			must.Do(t, l.set.SetPod(id, enabled))
		}
		f := l.flow(client, server)
		f.redirects()
		l.enrolled(datapath.Counters{}, flowConnections)
		if n := must.Get(l.set.Live())(t); n != 2*flowConnections {
			t.Errorf("%d live sockets, want %d", n, 2*flowConnections)
		}
		l.gate(false)
		f.plain()
		f.stop()
		l.waitEmpty()
		l.expectConnections(datapath.Counters{}, map[string]uint64{"enrolled": flowConnections})
		l.wait("the pods' counters say how many sockets were enrolled", func() (string, bool) {
			var enrolled uint64
			for _, p := range must.Get(l.set.PodCounters())(t) {
				enrolled += p.Enrolled
			}
			return fmt.Sprintf("%d, want %d", enrolled, 2*flowConnections), enrolled == 2*flowConnections
		})
	})
}

// TestSwitchWithoutPins unmounts the BPF file system under traffic. The programs
// go on in the sockets that have them, and can still be switched off.
func TestSwitchWithoutPins(t *testing.T) {
	modes(t, func(t *testing.T, s datapath.NodeSettings) {
		l := newPublishedLab(t, s)
		client, server := l.pod("client", enabled), l.pod("server", enabled)
		f := l.flow(client, server)
		f.redirects()
		own := mapID(t, l.pin("skipstack_switch"))
		must.Do(t, l.set.Close())
		must.Do(t, unix.Unmount(l.node.BPFFS, 0))
		l.set = must.Get(datapath.LoadPrivate(datapath.LoadOptions{MaxConnections: 1}))(t) // to close at the end

		byTCP := func() (n uint64) {
			for _, p := range f.pairs {
				n += must.Get(p[0].Info())(t).Bytes_sent + must.Get(p[1].Info())(t).Bytes_sent
			}
			return n
		}
		// Now and then a reader may be so late that its queue is full.
		l.wait("nothing goes by TCP although the pins are gone", func() (string, bool) {
			before := byTCP()
			f.progress()
			n := byTCP() - before
			return fmt.Sprintf("%d bytes", n), n == 0
		})
		restore := node.OtherSwitches(own)
		sets, err := datapath.SwitchNode(l.node.BPFFS, true)
		must.Do(t, restore())
		if err != nil || sets < 1 {
			t.Fatalf("switched %d sets off: %v", sets, err)
		}
		l.wait("all goes by TCP after the switch", func() (string, bool) {
			before := byTCP()
			f.progress()
			n := byTCP() - before
			return fmt.Sprintf("%d bytes", n), n >= 2*flowConnections*50_000
		})
		f.stop()
	})
}

// TestSwitchNode switches the published datapath off and on by its pins.
func TestSwitchNode(t *testing.T) {
	l := newPublishedLab(t, datapath.NodeSettings{Funnel: true})
	client, server := l.pod("client", enabled), l.pod("server", enabled)
	f := l.flow(client, server)
	f.redirects()
	restore := node.OtherSwitches(mapID(t, l.pin("skipstack_switch")))
	must.Get(datapath.SwitchNode(l.node.BPFFS, true))(t)
	must.Do(t, restore())
	f.plain()
	if n := must.Get(l.set.Node())(t); !n.SwitchedOff {
		t.Errorf("the node is not switched off: %+v", n)
	}
	if sets := must.Get(datapath.SwitchNode(l.node.BPFFS, false))(t); sets != 1 {
		t.Errorf("%d sets switched on, want 1", sets)
	}
	f.redirects()
	f.stop()
}

func mapID(t *testing.T, pin string) ebpf.MapID {
	t.Helper()
	m := must.Get(ebpf.LoadPinnedMap(pin, nil))(t)
	defer m.Close()
	id, ok := must.Get(m.Info())(t).ID()
	if !ok {
		t.Fatal("the kernel does not tell a map's id")
	}
	return id
}
