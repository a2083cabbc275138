package datapath_test

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/plugin/datapath"
	"github.com/skipstack/skipstack/test/datapath/traffic"
	"github.com/skipstack/skipstack/test/must"
	"github.com/skipstack/skipstack/test/node"
	"github.com/skipstack/skipstack/test/probe"
)

func TestMain(m *testing.M) {
	probe.Main()
	if data, err := os.ReadFile("/proc/sys/net/ipv4/tcp_mem"); err == nil {
		os.Setenv(tcpMemEnv, string(data))
	}
	os.Exit(node.Main(m, node.MainOptions{
		Workers: map[string]node.Worker{traffic.WorkerName: traffic.Worker, pushName: push},
		Tools:   []string{"bridge", "host-local"},
	}))
}

const (
	patience = time.Minute      // for what should take no time
	lifetime = 10 * time.Minute // of a connection; calls on it fail afterwards
	tick     = 2 * time.Millisecond
)

// A lab is a node with a datapath.
type lab struct {
	t    *testing.T
	node *node.Node
	set  *datapath.Set
	list *libcni.NetworkConfigList
	pods []*pod
	// normalHandshakes lets SYNs and SYN-ACKs that are lost be sent again after a second:
	// see node.SlowHandshakes.
	normalHandshakes func() error
}

// A pod has an address on the node's network and a host to open sockets in it.
type pod struct {
	*node.Pod
	lab    *lab
	host   *traffic.Host
	cgroup *os.File
	id     uint64 // of the cgroup
}

// newLab makes a node whose gate is open, with a datapath of the test's own.
// (Switching a node off reaches every published datapath in the kernel, those of
// other tests that run on the machine too, but not this one.) At the test's end
// nothing may be left of any connection.
func newLab(t *testing.T, settings datapath.NodeSettings, o datapath.LoadOptions) *lab {
	t.Helper()
	l := emptyLab(t)
	if o.MaxConnections == 0 {
		o.MaxConnections = maxConnections
	}
	if o.ClaimWindow == 0 {
		o.ClaimWindow = claimWindow
	}
	l.set = must.Get(datapath.LoadPrivate(o))(t)
	l.open(settings)
	return l
}

// newLabAt is newLab with other addresses for the pods.
func newLabAt(t *testing.T, settings datapath.NodeSettings, subnets ...string) *lab {
	t.Helper()
	l := emptyLab(t, subnets...)
	l.set = must.Get(datapath.LoadPrivate(loadOptions))(t)
	l.open(settings)
	return l
}

// newPublishedLab is newLab with the datapath published on the node's bpffs.
func newPublishedLab(t *testing.T, settings datapath.NodeSettings) *lab {
	t.Helper()
	l := emptyLab(t)
	l.set = must.Get(datapath.Load(t.Context(), l.node.BPFFS, loadOptions))(t)
	l.open(settings)
	return l
}

const (
	maxConnections = 4096
	// claimWindow lets clients be late on a busy machine.
	claimWindow = time.Minute
	shortWindow = 4 * time.Millisecond // as in production
)

var loadOptions = datapath.LoadOptions{MaxConnections: maxConnections, ClaimWindow: claimWindow}

func emptyLab(t *testing.T, subnets ...string) *lab {
	t.Helper()
	n := node.ForTest(t, node.Options{})
	l := &lab{t: t, node: n, list: must.Get(n.Network(node.Network{Subnets: prefixes(subnets...)}))(t)}
	l.normalHandshakes = sync.OnceValue(must.Get(n.SlowHandshakes())(t))
	t.Cleanup(func() { must.Do(t, l.normalHandshakes()) })
	return l
}

// open opens the node's gate.
func (l *lab) open(settings datapath.NodeSettings) {
	l.t.Helper()
	l.t.Cleanup(l.close)
	settings.Open = true
	must.Do(l.t, l.set.SetNode(settings))
}

func (l *lab) close() {
	for _, p := range l.pods {
		must.Do(l.t, p.host.Close())
	}
	if !l.t.Failed() {
		l.waitEmpty()
	}
	must.Do(l.t, l.set.Close())
	for _, p := range l.pods {
		must.Do(l.t, p.cgroup.Close())
	}
	left := must.Get(datapath.Unload(context.Background(), l.node.BPFFS, true))(l.t)
	if left.Sockets != 0 && !l.t.Failed() {
		l.t.Errorf("unload says that %d sockets are still enrolled", left.Sockets)
	}
}

// waitEmpty waits until no socket is enrolled.
func (l *lab) waitEmpty() {
	l.t.Helper()
	l.wait("enrolled sockets are gone", func() (string, bool) {
		live := must.Get(l.set.Live())(l.t)
		members := must.Get(l.set.Enrolled())(l.t)
		return fmt.Sprintf("%d live, %d in the sockhash", live, members), live == 0 && members == 0
	})
}

var enabled = datapath.PodSettings{Enabled: true, UnreadLimit: 16 << 20}

func withLimit(bytes uint32) datapath.PodSettings {
	s := enabled
	s.UnreadLimit = bytes
	return s
}

// pod makes a pod and attaches it.
func (l *lab) pod(name string, s datapath.PodSettings) *pod {
	l.t.Helper()
	p := l.plainPod(name)
	if created := must.Get(l.set.Attach(p.cgroup, p.id))(l.t); !created {
		l.t.Fatalf("pod %s was attached before", name)
	}
	must.Do(l.t, l.set.SetPod(p.id, s))
	return p
}

// plainPod makes a pod that is not attached.
func (l *lab) plainPod(name string) *pod {
	l.t.Helper()
	p := &pod{Pod: must.Get(l.node.AddPod(l.t.Context(), name, l.list, node.PodOptions{}))(l.t), lab: l}
	p.cgroup, p.id = openCgroup(l.t, p.Cgroup)
	p.host = must.Get(traffic.NewHost(p.Pod, node.StartOptions{}))(l.t)
	l.pods = append(l.pods, p)
	return p
}

func openCgroup(t *testing.T, dir string) (*os.File, uint64) {
	t.Helper()
	f := must.Get(os.Open(dir))(t)
	var st unix.Stat_t
	must.Do(t, unix.Fstat(int(f.Fd()), &st))
	return f, st.Ino
}

// at is the pod's address with a port.
func (p *pod) at(ipv6 bool, port uint16) netip.AddrPort {
	addr, ok := p.Addr(ipv6)
	if !ok {
		panic("the pod has no such address")
	}
	return netip.AddrPortFrom(addr, port)
}

// sysctl sets a sysctl of the pod's network namespace.
func (p *pod) sysctl(t *testing.T, name, value string) {
	t.Helper()
	must.Do(t, p.Do(func() error { return os.WriteFile("/proc/sys/"+name, []byte(value), 0) }))
}

func (l *lab) counters() datapath.Counters {
	l.t.Helper()
	return must.Get(l.set.Counters())(l.t)
}

// listen listens in the pod until the test ends.
func (p *pod) listen(t *testing.T, addr netip.AddrPort, o traffic.SocketOptions) *traffic.Listener {
	t.Helper()
	l := must.Get(p.host.Listen(addr, o))(t)
	t.Cleanup(func() { l.Close() })
	return l
}

// pair connects a client in pod p to the listener; both ends are closed at the
// test's end.
func (p *pod) pair(t *testing.T, l *traffic.Listener, o traffic.SocketOptions) (client, server *traffic.Conn) {
	t.Helper()
	return p.pairBy(t, l, l.Addr, o)
}

// pairBy is pair with another address for the listener.
func (p *pod) pairBy(t *testing.T, l *traffic.Listener, by netip.AddrPort, o traffic.SocketOptions) (client, server *traffic.Conn) {
	t.Helper()
	client, server, err := p.host.Pair(l, by, o)
	must.Do(t, err)
	t.Cleanup(func() { client.Close(); server.Close() })
	deadline := time.Now().Add(lifetime)
	for _, c := range []*traffic.Conn{client, server} {
		if err := c.SetDeadline(deadline); err != nil && !errors.Is(err, os.ErrNoDeadline) { // blocking sockets have none
			t.Fatal(err)
		}
	}
	return client, server
}

// dial connects from pod p and leaves it to the caller to accept. The connection
// is closed at the test's end.
func (p *pod) dial(t *testing.T, l *traffic.Listener) (client *traffic.Conn) {
	t.Helper()
	client = must.Get(p.host.Dial(l.Addr, traffic.SocketOptions{}))(t)
	t.Cleanup(func() { client.Close() })
	return client
}

// wait waits until the condition holds.
func (l *lab) wait(what string, condition func() (state string, ok bool)) {
	l.t.Helper()
	wait(l.t, what, condition)
}

func wait(t *testing.T, what string, condition func() (state string, ok bool)) {
	t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(tick) {
		state, ok := condition()
		if ok {
			return
		}
		if time.Now().After(deadline) {
			t.Errorf("waited in vain until %s: %s", what, state)
			return
		}
	}
}

// modes runs a test without the funnel and with it.
func modes(t *testing.T, f func(t *testing.T, s datapath.NodeSettings)) {
	for _, funnel := range []bool{false, true} {
		name := "plain receive queue"
		if funnel {
			name = "funnel"
		}
		t.Run(name, func(t *testing.T) {
			f(t, datapath.NodeSettings{Funnel: funnel, MPTCPListeners: true})
		})
	}
}
