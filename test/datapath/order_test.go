package datapath_test

import (
	"errors"
	"fmt"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/plugin/datapath"
	"github.com/skipstack/skipstack/test/datapath/traffic"
	"github.com/skipstack/skipstack/test/must"
)

// gate opens or closes the node's gate: with it closed, enrolled connections
// send by TCP.
func (l *lab) gate(open bool) {
	l.t.Helper()
	n := must.Get(l.set.Node())(l.t)
	n.Open = open
	must.Do(l.t, l.set.SetNode(n))
}

// expect fails the test unless exactly so many messages had the outcome since
// the earlier reading.
func (l *lab) expect(before datapath.Counters, outcome string, messages uint64) {
	l.t.Helper()
	d := l.counters().Since(before)
	if got := d.Messages[outcome].Messages; got != messages {
		l.t.Errorf("%d messages counted as %s, want %d: %v", got, outcome, messages, nonZero(d))
	}
}

// enrolled fails the test unless exactly so many connections were enrolled since
// the earlier reading.
func (l *lab) enrolled(before datapath.Counters, connections uint64) {
	l.t.Helper()
	d := l.counters().Since(before)
	if got := d.Connections["enrolled"]; got != connections {
		l.t.Errorf("%d connections enrolled, want %d: %v", got, connections, nonZero(d))
	}
}

// next waits until the next message of the lab's only client would become that.
func (l *lab) next(outcome string) {
	l.t.Helper()
	l.wait("the next message would be "+outcome, func() (string, bool) {
		o := l.observe()
		if len(o.Connections) != 1 || o.Connections[0].Client == nil {
			return fmt.Sprintf("%+v", o.Connections), false
		}
		next := o.Connections[0].Client.Next
		return next, next == outcome
	})
}

// nonZero is what was counted at all.
func nonZero(c datapath.Counters) map[string]uint64 {
	n := map[string]uint64{}
	for k, v := range c.Messages {
		n["message "+k] = v.Messages
	}
	for k, v := range c.Connections {
		n["connection "+k] = v
	}
	for k, v := range c.Events {
		n["event "+k] = v
	}
	for k, v := range n {
		if v == 0 {
			delete(n, k)
		}
	}
	return n
}

// write sends the stream's next n bytes at once, which the socket must take.
func write(t *testing.T, c *traffic.Conn, s *traffic.Stream, n int) {
	t.Helper()
	buf := make([]byte, n)
	s.Next(buf)
	if got, err := unix.Write(c.FD, buf); err != nil || got != n {
		t.Fatalf("write %d bytes: %d, %v", n, got, err)
	}
}

// read reads and checks the stream's next n bytes.
func read(t *testing.T, c *traffic.Conn, s *traffic.Stream, n int) {
	t.Helper()
	buf := make([]byte, n)
	for got := 0; got < n; {
		m, err := c.Read(buf[got:])
		if err == nil {
			err = s.Check(buf[got : got+m])
		}
		if err != nil {
			t.Fatalf("read %d bytes: %d, %v", n, got, err)
		}
		got += m
	}
}

// drained waits until the peer's kernel has all bytes that c sent by TCP.
func drained(t *testing.T, c *traffic.Conn) {
	t.Helper()
	wait(t, "all segments are acknowledged", func() (string, bool) {
		n := must.Get(unix.IoctlGetInt(c.FD, unix.TIOCOUTQ))(t)
		return fmt.Sprintf("%d bytes are not", n), n == 0
	})
}

// TestLostSegmentIsNotOvertaken sends a message by TCP, which the network loses,
// and then one that could be redirected.
func TestLostSegmentIsNotOvertaken(t *testing.T) {
	modes(t, func(t *testing.T, s datapath.NodeSettings) {
		l := newLab(t, s, datapath.LoadOptions{})
		client, server := l.pod("client", enabled), l.pod("server", enabled)
		a, b := client.pair(t, server.listen(t, server.at(false, 0), traffic.SocketOptions{}), traffic.SocketOptions{})
		sent, got := traffic.NewStream(1), traffic.NewStream(1)
		write(t, a, sent, 100)
		read(t, b, got, 100)

		stop := server.drop(t, 100, 0)
		l.gate(false)
		write(t, a, sent, 100)
		l.gate(true)
		before := l.counters()
		write(t, a, sent, 100)
		l.expect(before, "unacknowledged", 1)
		stop()
		read(t, b, got, 200)

		drained(t, a)
		before = l.counters()
		write(t, a, sent, 100)
		l.expect(before, "redirected", 1)
		read(t, b, got, 100)
	})
}

// TestUnreadSegmentIsNotOvertaken leaves a message that came by TCP unread in
// the receive queue and then sends one that could be redirected. Where the
// funnel moves arrived bytes into the queue of redirected ones, it cannot do so
// before accept(2).
func TestUnreadSegmentIsNotOvertaken(t *testing.T) {
	modes(t, func(t *testing.T, s datapath.NodeSettings) {
		for _, accepted := range []bool{true, false} {
			name := "accepted"
			if !accepted {
				name = "not accepted"
			}
			t.Run(name, func(t *testing.T) {
				l := newLab(t, s, datapath.LoadOptions{})
				client, server := l.pod("client", enabled), l.pod("server", enabled)
				tl := server.listen(t, server.at(false, 0), traffic.SocketOptions{})
				a := client.dial(t, tl)
				var b *traffic.Conn
				accept := func() {
					b = must.Get(tl.Accept())(t)
					t.Cleanup(func() { b.Close() })
				}
				if accepted {
					accept()
				}
				sent, got := traffic.NewStream(1), traffic.NewStream(1)
				l.wait("the server is enrolled", func() (string, bool) {
					return "", l.counters().Connections["enrolled"] == 1
				})
				l.gate(false)
				write(t, a, sent, 100)
				drained(t, a)
				l.gate(true)
				if accepted && s.Funnel {
					l.next("redirected") // the segment is acknowledged before it is moved
				}
				before := l.counters()
				write(t, a, sent, 100)
				if accepted && s.Funnel {
					l.expect(before, "redirected", 1)
				} else {
					l.expect(before, "not_read", 1)
				}
				if !accepted {
					accept()
				}
				// Half a message at a time: what came by TCP is read in parts.
				for range 4 {
					read(t, b, got, 50)
				}
				before = l.counters()
				drained(t, a)
				write(t, a, sent, 100)
				l.expect(before, "redirected", 1)
				read(t, b, got, 100)
				nothing(t, b)
			})
		}
	})
}

// nothing fails the test if there is something to read.
func nothing(t *testing.T, c *traffic.Conn) {
	t.Helper()
	buf := make([]byte, 1)
	if n, err := unix.Read(c.FD, buf); !errors.Is(err, unix.EAGAIN) {
		t.Errorf("read %d bytes, %v, where nothing was sent", n, err)
	}
}

// TestReadAheadOfAccept fills a connection before accept(2), by redirecting and
// then by TCP, and reads it in small parts while more comes by TCP.
func TestReadAheadOfAccept(t *testing.T) {
	modes(t, func(t *testing.T, s datapath.NodeSettings) {
		l := newLab(t, s, datapath.LoadOptions{})
		client, server := l.pod("client", enabled), l.pod("server", enabled)
		tl := server.listen(t, server.at(false, 0), traffic.SocketOptions{})
		a := client.dial(t, tl)
		l.wait("the server is enrolled", func() (string, bool) {
			return "", l.counters().Connections["enrolled"] == 1
		})
		sent, got := traffic.NewStream(1), traffic.NewStream(1)
		before := l.counters()
		// A socket without a reader may hold 256 KiB.
		for range 5 {
			write(t, a, sent, 64<<10)
		}
		l.expect(before, "redirected", 4)
		l.expect(before, "receiver_full", 1)
		l.gate(false)
		b := must.Get(tl.Accept())(t)
		defer b.Close()
		read(t, b, got, 4*64<<10+10)
		write(t, a, sent, 1000)
		read(t, b, got, 10)
		drained(t, a)
		read(t, b, got, 64<<10-20)
		read(t, b, got, 1000)
		nothing(t, b)
	})
}
