package cni_test

import (
	"errors"
	"math/rand/v2"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"

	"github.com/skipstack/skipstack/plugin/datapath"
	"github.com/skipstack/skipstack/test/datapath/traffic"
	"github.com/skipstack/skipstack/test/must"
	"github.com/skipstack/skipstack/test/node"
)

// A pod has an address and a process that opens sockets in it.
type pod struct {
	*node.Pod
	host *traffic.Host
}

// pod makes a pod and attaches it to the network.
func (s *site) pod(name string, list *libcni.NetworkConfigList, o node.PodOptions) *pod {
	s.t.Helper()
	p := must.Get(s.NewPod(name, o))(s.t)
	s.attach(p, list, node.IfName)
	return s.peopled(p)
}

// peopled starts a process in the pod.
func (s *site) peopled(p *node.Pod) *pod {
	s.t.Helper()
	return s.peopledIn(p, p.ContainerCgroup)
}

// twoPods makes a client and a server.
func (s *site) twoPods(list *libcni.NetworkConfigList, o node.PodOptions) (client, server *pod) {
	s.t.Helper()
	return s.pod("client", list, o), s.pod("server", list, o)
}

// close removes the pod, as a runtime does.
func (s *site) close(p *pod) {
	s.t.Helper()
	must.Do(s.t, p.host.Close())
	for i, other := range s.pods {
		if other == p {
			s.pods = append(s.pods[:i], s.pods[i+1:]...)
			break
		}
	}
	id, mark := p.cgroupID(s.t), s.log.len()
	must.Do(s.t, p.Close(s.t.Context()))
	if late(s.log.since(mark)) {
		s.waitLinkSwept(id)
	}
}

func (p *pod) cgroupID(t *testing.T) uint64 {
	t.Helper()
	return inode(t, p.Cgroup)
}

// at is the pod's address with a port.
func (p *pod) at(ipv6 bool, port uint16) netip.AddrPort {
	addr, ok := p.Addr(ipv6)
	if !ok {
		panic("the pod has no such address")
	}
	return netip.AddrPortFrom(addr, port)
}

// A route is one way of connecting from a process to a server.
type route struct {
	client, server *traffic.Host
	listen         netip.AddrPort
	// by is where the client connects to; nil: where the server listens.
	by       func(*traffic.Listener) netip.AddrPort
	listener traffic.SocketOptions
	socket   traffic.SocketOptions
}

func direct(client, server *pod) route {
	return route{client: client.host, server: server.host, listen: server.at(false, 0)}
}

func (r route) port(port uint16) route {
	r.listen = netip.AddrPortFrom(r.listen.Addr(), port)
	return r
}

func (r route) blocking() route {
	r.listener.Blocking, r.socket.Blocking = true, true
	return r
}

// exchangeBytes is what goes each way over one connection.
const exchangeBytes = 128 << 10

// exchange makes a connection, sends random bytes both ways, checks every one of
// them, and returns what the datapath counted meanwhile.
func (s *site) exchange(r route) datapath.Counters {
	s.t.Helper()
	before := s.counters()
	l := must.Get(r.server.Listen(r.listen, r.listener))(s.t)
	defer l.Close()
	by := l.Addr
	if r.by != nil {
		by = r.by(l)
	}
	client, server, err := r.client.Pair(l, by, r.socket)
	must.Do(s.t, err)
	plan := func() traffic.Plan {
		return traffic.Plan{Seed: rand.Uint64(), Bytes: exchangeBytes, MaxWrite: 16 << 10}
	}
	// Blocking sockets know no deadline.
	stop := time.AfterFunc(patience, func() { client.Reset(); server.Reset() })
	if r.socket.Blocking {
		// One way only: a blocking read that another thread's write wakes may
		// return EAGAIN, which is the risk "blocking".
		ab, sent := plan(), make(chan error)
		go func() { sent <- client.Send(ab) }()
		err = errors.Join(server.Receive(ab), <-sent)
	} else {
		err = traffic.Exchange(client, server, plan(), plan())
	}
	err = errors.Join(err, client.Close(), server.Close())
	if !stop.Stop() {
		s.t.Fatal("the connection hung:", err)
	}
	must.Do(s.t, err)
	return s.counters().Since(before)
}

// Of so many handshakes, and of those in so long a time, one is quick enough for the
// connection to be enrolled.
const (
	handshakes = 10
	stall      = 30 * time.Second
)

// wantAccelerated checks that connections are enrolled and their bytes redirected.
// A connection whose handshake takes milliseconds, on a machine that is busy with
// other things, stays plain by design: one of several must do. So does one while
// the machine's TCP is short of memory.
func (s *site) wantAccelerated(what string, r route) {
	s.t.Helper()
	seen := map[string]uint64{}
	start := time.Now()
	for tries := 0; tries < handshakes || time.Since(start) < stall; tries++ {
		d := s.exchange(r)
		if d.Messages["memory"].Messages > 0 && time.Since(start) < patience {
			tries--
			time.Sleep(tick)
			continue
		}
		for label, n := range d.Connections {
			if n > 0 {
				seen[label] += n
			}
		}
		if d.Connections["enrolled"] == 0 {
			continue
		}
		if got := d.Messages["redirected"].Bytes; got < exchangeBytes/4 {
			s.t.Errorf("%s: %d bytes redirected of an enrolled connection's %d: %v", what, got, 2*exchangeBytes, d.Messages)
		}
		return
	}
	s.t.Errorf("%s: no connection was enrolled: %v", what, seen)
}

// wantPlain checks that connections work and are not accelerated.
func (s *site) wantPlain(what string, r route) {
	s.t.Helper()
	for range 3 {
		d := s.exchange(r)
		if n, m := d.Connections["enrolled"], d.Messages["redirected"]; n != 0 || m.Messages != 0 {
			s.t.Errorf("%s: %d connections enrolled, %d bytes redirected, want plain TCP", what, n, m.Bytes)
			return
		}
	}
}

func (s *site) wantAcceleratedIf(accelerated bool, what string, r route) {
	s.t.Helper()
	if accelerated {
		s.wantAccelerated(what, r)
	} else {
		s.wantPlain(what, r)
	}
}

// network makes a conflist of the node with skipstack's entry.
func (s *site) network(w node.Network) *libcni.NetworkConfigList {
	s.t.Helper()
	if w.Skipstack == nil {
		w.Skipstack = accepting
	}
	return must.Get(s.Network(w))(s.t)
}

// accepting is an entry that accepts every risk of a kernel, so that pods are
// accelerated on every kernel that is supported.
var accepting = map[string]any{"acceptRisks": []string{"splice", "fionread", "epoll", "uncharged"}}

// peopledIn starts a process in one of the pod's cgroups.
func (s *site) peopledIn(p *node.Pod, cgroup string) *pod {
	s.t.Helper()
	own := &pod{Pod: p, host: must.Get(traffic.NewHost(p, node.StartOptions{Cgroup: cgroup}))(s.t)}
	s.pods = append(s.pods, own)
	return own
}

// addrOf is the IPv4 address of eth0 in the pod, for pods that CNI was not asked
// to attach through the fixture.
func (s *site) addrOf(p *pod) netip.AddrPort {
	s.t.Helper()
	var found netip.Addr
	must.Do(s.t, p.Do(func() error {
		ifc, err := net.InterfaceByName(node.IfName)
		if err != nil {
			return err
		}
		addrs, err := ifc.Addrs()
		for _, a := range addrs {
			if prefix, err := netip.ParsePrefix(a.String()); err == nil && prefix.Addr().Is4() {
				found = prefix.Addr()
			}
		}
		return err
	}))
	return netip.AddrPortFrom(found, 0)
}
