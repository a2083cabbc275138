package datapath_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/plugin/datapath"
	"github.com/skipstack/skipstack/test/datapath/traffic"
	"github.com/skipstack/skipstack/test/must"
	"github.com/skipstack/skipstack/test/node"
)

// stoppedPair is a connection whose client has written to a server that does not
// read, by redirecting and then by TCP, until it was stopped.
func (l *lab) stoppedPair(t *testing.T, client, server *pod) (a *traffic.Filler, b *traffic.Conn) {
	t.Helper()
	f := make([]traffic.Filler, 1)
	f[0].Stream = traffic.NewStream(0)
	f[0].Conn, b = client.pair(t, server.listen(t, server.at(false, 0), traffic.SocketOptions{}), traffic.SocketOptions{})
	fill(t, f, 64<<10, 100)
	if m := l.counters().Messages; m["redirected"].Bytes < 1<<20 || m["receiver_full"].Messages == 0 {
		t.Fatalf("the receiver is not full: %v", m)
	}
	return &f[0], b
}

// endsWithin is how soon a stopped writer must learn that its reader is gone. It waits
// for the next window probe, so that depends on how long it was stopped. But after a
// minute, when the kernel forgets the reader's socket, it would learn in any case.
const endsWithin = 45 * time.Second

// ends waits until the stopped writer has learned that its reader is gone.
func ends(t *testing.T, writer *traffic.Conn) {
	t.Helper()
	start := time.Now()
	must.Do(t, writer.SetWriteDeadline(start.Add(endsWithin)))
	buf := make([]byte, 64<<10)
	for {
		_, err := writer.Write(buf)
		if err == nil {
			continue
		}
		if !errors.Is(err, unix.ECONNRESET) && !errors.Is(err, unix.EPIPE) && !errors.Is(err, unix.ETIMEDOUT) {
			t.Fatalf("after %s: %v", time.Since(start), err)
		}
		t.Logf("%v after %s", err, time.Since(start))
		return
	}
}

// TestReaderGoes stops a writer and then takes its reader away, which has not
// read everything: the writer must end soon.
func TestReaderGoes(t *testing.T) {
	modes(t, func(t *testing.T, s datapath.NodeSettings) {
		t.Run("close", func(t *testing.T) {
			t.Parallel()
			l := newLab(t, s, datapath.LoadOptions{})
			client, server := l.pod("client", withLimit(1<<20)), l.pod("server", withLimit(1<<20))
			a, b := l.stoppedPair(t, client, server)
			must.Do(t, b.Close())
			ends(t, a.Conn)
		})
		t.Run("close after reading some", func(t *testing.T) {
			t.Parallel()
			l := newLab(t, s, datapath.LoadOptions{})
			client, server := l.pod("client", withLimit(1<<20)), l.pod("server", withLimit(1<<20))
			a, b := l.stoppedPair(t, client, server)
			read(t, b, traffic.NewStream(0), 100_000)
			must.Do(t, b.Close())
			ends(t, a.Conn)
		})
		t.Run("the client goes", func(t *testing.T) {
			t.Parallel()
			l := newLab(t, s, datapath.LoadOptions{})
			client, server := l.pod("client", withLimit(1<<20)), l.pod("server", withLimit(1<<20))
			a, b := client.pair(t, server.listen(t, server.at(false, 0), traffic.SocketOptions{}), traffic.SocketOptions{})
			echo(t, a, b)
			f := []traffic.Filler{{Conn: b, Stream: traffic.NewStream(0)}}
			fill(t, f, 64<<10, 100)
			must.Do(t, a.Close())
			ends(t, b)
		})
		t.Run("close long after half-close", func(t *testing.T) {
			t.Parallel()
			l := newLab(t, s, datapath.LoadOptions{})
			client, server := l.pod("client", withLimit(1<<20)), l.pod("server", withLimit(1<<20))
			a, b := client.pair(t, server.listen(t, server.at(false, 0), traffic.SocketOptions{}), traffic.SocketOptions{})
			must.Do(t, b.CloseWrite())
			eof(t, a)
			f := []traffic.Filler{{Conn: a, Stream: traffic.NewStream(0)}}
			fill(t, f, 64<<10, 100)
			// Long enough for window probes to become rare.
			time.Sleep(3 * time.Second)
			must.Do(t, b.Close())
			ends(t, a)
		})
		t.Run("half-close while stopped, then close", func(t *testing.T) {
			t.Parallel()
			l := newLab(t, s, datapath.LoadOptions{})
			client, server := l.pod("client", withLimit(1<<20)), l.pod("server", withLimit(1<<20))
			a, b := l.stoppedPair(t, client, server)
			must.Do(t, b.CloseWrite())
			eof(t, a.Conn)
			time.Sleep(time.Second)
			must.Do(t, b.Close())
			ends(t, a.Conn)
		})
		t.Run("both have shut down sending", func(t *testing.T) {
			t.Parallel()
			l := newLab(t, s, datapath.LoadOptions{})
			client, server := l.pod("client", withLimit(1<<20)), l.pod("server", withLimit(1<<20))
			a, b := l.stoppedPair(t, client, server)
			must.Do(t, a.Conn.CloseWrite())
			must.Do(t, b.Close())
			must.Wait(t, endsWithin, tick, func() error {
				events := must.Get(traffic.Poll(a.Conn.FD, unix.POLLOUT, 0))(t)
				if events&(unix.POLLERR|unix.POLLHUP) != unix.POLLERR|unix.POLLHUP {
					return fmt.Errorf("the writer's socket has no error: %#x", events)
				}
				return nil
			})
		})
		t.Run("kill", func(t *testing.T) {
			t.Parallel()
			l := newLab(t, s, datapath.LoadOptions{})
			client, server := l.pod("client", withLimit(1<<20)), l.pod("server", withLimit(1<<20))
			victim := must.Get(traffic.NewHost(server.Pod, node.StartOptions{}))(t)
			a, b := l.stoppedPair(t, client, server)
			must.Do(t, victim.Hold(b))
			must.Do(t, b.Close())
			must.Do(t, victim.Kill())
			ends(t, a.Conn)
		})
		t.Run("slow reader stays", func(t *testing.T) {
			t.Parallel()
			l := newLab(t, s, datapath.LoadOptions{})
			client, server := l.pod("client", withLimit(1<<20)), l.pod("server", withLimit(1<<20))
			a, b := client.pair(t, server.listen(t, server.at(false, 0), traffic.SocketOptions{}), traffic.SocketOptions{})
			must.Do(t, b.CloseWrite())
			eof(t, a)
			slowReader(t, l, a, b, 6*time.Second)
		})
		t.Run("slow reader stays that half-closes late", func(t *testing.T) {
			t.Parallel()
			l := newLab(t, s, datapath.LoadOptions{})
			client, server := l.pod("client", withLimit(1<<20)), l.pod("server", withLimit(1<<20))
			a, b := client.pair(t, server.listen(t, server.at(false, 0), traffic.SocketOptions{}), traffic.SocketOptions{})
			go func() {
				time.Sleep(time.Second)
				_ = b.CloseWrite()
			}()
			slowReader(t, l, a, b, 6*time.Second)
		})
	})
}

// slowReader does not read for a time, with its window shut, and then reads all.
func slowReader(t *testing.T, l *lab, a, b *traffic.Conn, stall time.Duration) {
	t.Helper()
	f := []traffic.Filler{{Conn: a, Stream: traffic.NewStream(0)}}
	fill(t, f, 64<<10, 100)
	time.Sleep(stall)
	if _, err := unix.Write(a.FD, []byte{0}); !errors.Is(err, unix.EAGAIN) {
		t.Fatalf("write after %s: %v, want EAGAIN", stall, err)
	}
	must.Do(t, a.CloseWrite())
	must.Do(t, b.Receive(traffic.Plan{Bytes: f[0].Total}))
	if n := l.counters().Events["peer_gone_timeout"]; n != 0 {
		t.Errorf("the writer was cut off %d times from a reader that was there", n)
	}
}

// eof reads the end of the stream.
func eof(t *testing.T, c *traffic.Conn) {
	t.Helper()
	if n, err := c.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Fatalf("read %d bytes, %v, want the end", n, err)
	}
}

// echo sends a message from a to b and back.
func echo(t *testing.T, a, b *traffic.Conn) {
	t.Helper()
	sent, got := traffic.NewStream(7), traffic.NewStream(7)
	write(t, a, sent, 100)
	read(t, b, got, 100)
	write(t, b, sent, 100)
	read(t, a, got, 100)
}

// TestHalfClose shuts down sending at one end: writes there fail with EPIPE, the
// other end reads everything and then the end, and can still send.
func TestHalfClose(t *testing.T) {
	modes(t, func(t *testing.T, s datapath.NodeSettings) {
		l := newLab(t, s, datapath.LoadOptions{})
		client, server := l.pod("client", enabled), l.pod("server", enabled)
		tl := server.listen(t, server.at(false, 0), traffic.SocketOptions{})
		for _, from := range []string{"client", "server"} {
			t.Run(from, func(t *testing.T) {
				a, b := client.pair(t, tl, traffic.SocketOptions{})
				echo(t, a, b)
				if from == "server" {
					a, b = b, a
				}
				before := l.counters()
				sent, got := traffic.NewStream(1), traffic.NewStream(1)
				for range 10 {
					write(t, a, sent, 10_000)
				}
				must.Do(t, a.CloseWrite())
				for _, n := range []int{1, 100_000} {
					if n, err := unix.Write(a.FD, make([]byte, n)); !errors.Is(err, unix.EPIPE) {
						t.Errorf("write after shutdown: %d, %v, want EPIPE", n, err)
					}
				}
				l.expect(before, "redirected", 10)
				read(t, b, got, 100_000)
				eof(t, b)
				eof(t, b)
				// The other direction is open.
				before = l.counters()
				sent, got = traffic.NewStream(2), traffic.NewStream(2)
				for range 3 {
					write(t, b, sent, 50_000)
				}
				l.expect(before, "redirected", 3)
				must.Do(t, b.Close())
				read(t, a, got, 150_000)
				eof(t, a)
			})
		}
	})
}

// TestCloseDelivers closes with bytes under way, by redirecting and by TCP.
func TestCloseDelivers(t *testing.T) {
	modes(t, func(t *testing.T, s datapath.NodeSettings) {
		for _, gate := range []bool{true, false} {
			name, outcome := "redirected", "redirected"
			if !gate {
				name, outcome = "TCP", "switched_off"
			}
			t.Run(name, func(t *testing.T) {
				l := newLab(t, s, datapath.LoadOptions{})
				client, server := l.pod("client", enabled), l.pod("server", enabled)
				a, b := client.pair(t, server.listen(t, server.at(false, 0), traffic.SocketOptions{}), traffic.SocketOptions{})
				echo(t, a, b)
				l.gate(gate)
				before := l.counters()
				sent, buf := traffic.NewStream(0), make([]byte, 5_000)
				for range 20 {
					sent.Next(buf)
					must.Get(a.Write(buf))(t)
				}
				if n := l.counters().Since(before).Messages; n[outcome].Bytes != 100_000 {
					t.Errorf("%d bytes counted as %s, want 100000: %v", n[outcome].Bytes, outcome, n)
				}
				must.Do(t, a.Close())
				must.Do(t, b.Receive(traffic.Plan{Bytes: 100_000}))
			})
		}
	})
}

// TestReset closes with SO_LINGER 0: the other end gets ECONNRESET.
func TestReset(t *testing.T) {
	modes(t, func(t *testing.T, s datapath.NodeSettings) {
		l := newLab(t, s, datapath.LoadOptions{})
		client, server := l.pod("client", enabled), l.pod("server", enabled)
		tl := server.listen(t, server.at(false, 0), traffic.SocketOptions{})
		for _, from := range []string{"client", "server"} {
			t.Run(from, func(t *testing.T) {
				a, b := client.pair(t, tl, traffic.SocketOptions{})
				echo(t, a, b)
				if from == "server" {
					a, b = b, a
				}
				must.Do(t, a.Reset())
				if n, err := b.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
					t.Errorf("read %d bytes, %v, want ECONNRESET", n, err)
				}
				if n, err := unix.Write(b.FD, bytes.Repeat([]byte{0}, 100)); !errors.Is(err, unix.EPIPE) {
					t.Errorf("write: %d, %v, want EPIPE", n, err)
				}
			})
		}
		l.enrolled(datapath.Counters{}, 2)
	})
}
