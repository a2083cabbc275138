package datapath_test

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/skipstack/skipstack/plugin/datapath"
	"github.com/skipstack/skipstack/test/datapath/traffic"
	"github.com/skipstack/skipstack/test/must"
	"github.com/skipstack/skipstack/test/node"
)

func (l *lab) observe() datapath.Observation {
	l.t.Helper()
	return must.Get(l.set.Observe())(l.t)
}

// sums adds up what pods have done.
func sums(o datapath.Observation) (sum datapath.PodCounters) {
	sum.PassedBy = map[string]uint64{}
	for _, p := range o.Pods {
		sum.Live += p.Live
		sum.Accelerated += p.Accelerated
		sum.Redirected.Messages += p.Redirected.Messages
		sum.Redirected.Bytes += p.Redirected.Bytes
		sum.Passed.Messages += p.Passed.Messages
		sum.Passed.Bytes += p.Passed.Bytes
		for label, n := range p.PassedBy {
			sum.PassedBy[label] += n
		}
	}
	return sum
}

// observeAgreement waits until the pods' counters add up to the node's: a socket that
// closes is counted down first and adds what it has done then.
func (l *lab) observeAgreement() (o datapath.Observation) {
	l.t.Helper()
	l.wait("the pods' counters add up to the node's", func() (string, bool) {
		o = l.observe()
		err := disagreement(o)
		return fmt.Sprint(err), err == nil
	})
	return o
}

func disagreement(o datapath.Observation) error {
	var errs []error
	sum := sums(o)
	if got := o.Counters.Messages["redirected"]; got != sum.Redirected {
		errs = append(errs, fmt.Errorf("the node redirected %v, its pods %v", got, sum.Redirected))
	}
	var passed datapath.Count
	for label, n := range o.Counters.Messages {
		if label == "redirected" || label == "not_enrolled" {
			continue
		}
		passed.Messages += n.Messages
		passed.Bytes += n.Bytes
		if n.Messages != sum.PassedBy[label] {
			errs = append(errs, fmt.Errorf("%s: the node passed %d messages, its pods %d", label, n.Messages, sum.PassedBy[label]))
		}
	}
	if passed != sum.Passed {
		errs = append(errs, fmt.Errorf("the node passed %v, its pods %v", passed, sum.Passed))
	}
	return errors.Join(errs...)
}

func carry(t *testing.T, from, to *traffic.Conn, size int) {
	t.Helper()
	must.Get(from.Write(make([]byte, size)))(t)
	must.Get(io.ReadFull(to, make([]byte, size)))(t)
}

// The listing shows what two sockets know themselves: addresses, bytes each way,
// bytes unread. It holds while they live and adds up after they have closed.
func TestObserve(t *testing.T) {
	modes(t, func(t *testing.T, settings datapath.NodeSettings) {
		l := newLab(t, settings, datapath.LoadOptions{})
		a, b := l.pod("a", enabled), l.pod("b", enabled)
		listener := b.listen(t, b.at(false, 0), traffic.SocketOptions{})
		client, server := a.pair(t, listener, traffic.SocketOptions{})

		o := l.observe()
		if len(o.Connections) != 1 || o.Connections[0].Client == nil || o.Connections[0].Server == nil {
			t.Fatalf("connections: %+v", o.Connections)
		}
		if c := o.Connections[0]; c.Client.Mode != datapath.ModeUndecided || c.Client.Next != "undecided" {
			t.Errorf("a client that has not sent: %+v", c.Client)
		}

		carry(t, client, server, 1000)
		carry(t, client, server, 500)
		carry(t, server, client, 70000)
		must.Get(server.Write(make([]byte, 1234)))(t)
		o = l.observeAgreement()
		if len(o.Connections) != 1 {
			t.Fatalf("connections: %+v", o.Connections)
		}
		c := o.Connections[0]
		for _, end := range []struct {
			name  string
			got   *datapath.Socket
			conn  *traffic.Conn
			pod   uint64
			bytes uint64
		}{{"client", c.Client, client, a.id, 1500}, {"server", c.Server, server, b.id, 71234}} {
			got := end.got
			if got.Local != end.conn.Local() || got.Remote != end.conn.Remote() {
				t.Errorf("%s: %v to %v, its socket says %v to %v", end.name, got.Local, got.Remote, end.conn.Local(), end.conn.Remote())
			}
			if got.Pod != end.pod || !got.Enrolled || got.Mode != datapath.ModeRedirect {
				t.Errorf("%s: %+v", end.name, got)
			}
			if sent := got.Redirected.Bytes + got.Passed.Bytes; sent != end.bytes {
				t.Errorf("%s: sent %d bytes, the listing says %d", end.name, end.bytes, sent)
			}
			if got.Passed.Messages == 0 && got.Next != "redirected" {
				t.Errorf("%s: the next message would be %s", end.name, got.Next)
			}
			if got.Age <= 0 || got.Age > time.Hour {
				t.Errorf("%s: is %v old", end.name, got.Age)
			}
		}
		if c.Client.Unread != 1234 || c.Server.Unread != 0 {
			t.Errorf("unread: client %d, server %d, want 1234 and 0", c.Client.Unread, c.Server.Unread)
		}
		if o.Sockets.Entries != uint64(must.Get(l.set.Enrolled())(t)) || o.Sockets.Max != 2*maxConnections || o.Attached.Entries != 2 {
			t.Errorf("maps: %+v, %+v", o.Sockets, o.Attached)
		}
		if p := o.Pods[a.id]; p.Accelerated != 1 || p.Live != 1 || p.Enrolled != 1 {
			t.Errorf("pod a: %+v", p)
		}

		off := enabled
		off.SwitchedOff = true
		must.Do(t, l.set.SetPod(b.id, off))
		carry(t, client, server, 10)
		o = l.observeAgreement()
		if got := o.Connections[0].Client; got.PassedBy["switched_off"] != 1 || got.Next != "switched_off" {
			t.Errorf("a pod that is switched off: %+v", got)
		}

		before := sums(o)
		must.Do(t, client.Close())
		must.Do(t, server.Close())
		l.waitEmpty()
		o = l.observeAgreement()
		if after := sums(o); len(o.Connections) != 0 || after.Redirected != before.Redirected || after.Passed != before.Passed {
			t.Errorf("after the end %+v, %d connections; before %+v", after, len(o.Connections), before)
		}
	})
}

// A receiver that does not read is shown as full, and as having what FIONREAD says.
func TestObserveFullReceiver(t *testing.T) {
	modes(t, func(t *testing.T, settings datapath.NodeSettings) {
		l := newLab(t, settings, datapath.LoadOptions{})
		a, b := l.pod("a", enabled), l.pod("b", withLimit(64<<10))
		listener := b.listen(t, b.at(false, 0), traffic.SocketOptions{})
		client, server := a.pair(t, listener, traffic.SocketOptions{})
		carry(t, client, server, 1)
		if l.observe().Connections[0].Client.Mode != datapath.ModeRedirect {
			t.Fatalf("the connection is plain: %+v", l.counters().Connections)
		}
		for range 6 {
			must.Get(client.Write(make([]byte, 16<<10)))(t)
		}
		// What went by TCP takes a moment to arrive.
		l.wait("all is there to be read", func() (string, bool) {
			got := l.observe().Connections[0]
			// Kernels before 6.12.75 tell the memory that it takes, see Socket.Unread.
			return fmt.Sprint(got.Server.Unread), got.Server.Unread >= 6*16<<10 && got.Server.Unread < 2*6*16<<10
		})
		got := l.observe().Connections[0].Client
		if got.PassedBy["receiver_full"] == 0 {
			t.Errorf("no message was passed because the receiver is full: %v", got.PassedBy)
		}
		if got.Next == "redirected" {
			t.Errorf("the next message would be %s", got.Next)
		}
		l.observeAgreement()
	})
}

// NAT makes the ends see different addresses, of different families perhaps.
func TestObserveBehindNAT(t *testing.T) {
	l := newLab(t, datapath.NodeSettings{MPTCPListeners: true}, datapath.LoadOptions{})
	a, b := l.pod("a", enabled), l.pod("b", enabled)
	listener := b.listen(t, b.at(false, 0), traffic.SocketOptions{})
	service := netip.MustParseAddrPort("10.96.0.10:80")
	must.Get(l.node.AddService(node.ServiceOptions{
		IP: service.Addr(), Port: service.Port(), Backend: listener.Addr.Addr(), BackendPort: listener.Addr.Port(), Masquerade: true,
	}))(t)
	client, server := a.pairBy(t, listener, service, traffic.SocketOptions{})
	carry(t, client, server, 10)
	o := l.observe()
	if len(o.Connections) != 1 || o.Connections[0].Client == nil || o.Connections[0].Server == nil {
		t.Fatalf("connections: %+v", o.Connections)
	}
	c := o.Connections[0]
	if c.Client.Remote != service || c.Server.Local != listener.Addr || c.Client.Pod != a.id || c.Server.Pod != b.id {
		t.Errorf("client %+v, server %+v", c.Client, c.Server)
	}
}

// Connections may come and go while they are listed.
func TestObserveWhileConnectionsVanish(t *testing.T) {
	l := newLab(t, datapath.NodeSettings{MPTCPListeners: true}, datapath.LoadOptions{})
	a, b := l.pod("a", enabled), l.pod("b", enabled)
	listener := b.listen(t, b.at(false, 0), traffic.SocketOptions{})
	done := make(chan struct{})
	var wg sync.WaitGroup
	var failed error
	wg.Go(func() {
		defer close(done)
		for range 200 {
			client, server, err := a.host.Pair(listener, listener.Addr, traffic.SocketOptions{})
			if err != nil {
				failed = err
				return
			}
			_, err = client.Write(make([]byte, 100))
			client.Close()
			server.Close()
			if err != nil {
				failed = err
				return
			}
		}
	})
	ids := map[uint64]bool{a.id: true, b.id: true}
	looks := 0
	for going := true; going; looks++ {
		select {
		case <-done:
			going = false
		default:
		}
		for _, c := range l.observe().Connections {
			for _, end := range []*datapath.Socket{c.Client, c.Server} {
				if end != nil && (!ids[end.Pod] || !end.Local.IsValid() || end.Redirected.Bytes > 100) {
					t.Errorf("nonsense: %+v", end)
				}
			}
		}
	}
	wg.Wait()
	must.Do(t, failed)
	l.waitEmpty()
	o := l.observeAgreement()
	if sum := sums(o); sum.Redirected.Bytes+sum.Passed.Bytes == 0 {
		t.Errorf("after 200 connections: %+v", sum)
	}
	t.Logf("%d looks", looks)
}
