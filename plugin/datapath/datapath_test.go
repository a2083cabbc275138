package datapath

import (
	"errors"
	"fmt"
	"io"
	"net"
	"testing"
	"time"

	"github.com/skipstack/skipstack/test/must"
)

// privateSet is a datapath with its gate open, for pods made by the test.
func privateSet(t *testing.T, n NodeSettings) *Set {
	t.Helper()
	cgroupRoot(t)
	s, err := LoadPrivate(LoadOptions{MaxConnections: 1000, ClaimWindow: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	n.Open = true
	if err := s.SetNode(n); err != nil {
		t.Fatal(err)
	}
	return s
}

var allPods = PodSettings{Enabled: true, UnreadLimit: 16 << 20}

func init() {
	scenarios["echo"] = func() error { return echo("tcp4", "127.0.0.1:0", 100, 1000) }
	scenarios["echo6"] = func() error { return echo("tcp6", "[::1]:0", 100, 1000) }
}

// echo sends messages to a server of its own and reads each of them back.
func echo(network, addr string, messages, size int) error {
	l, err := net.Listen(network, addr)
	if err != nil {
		return err
	}
	defer l.Close()
	served := make(chan error, 1)
	go func() {
		c, err := l.Accept()
		if err != nil {
			served <- err
			return
		}
		defer c.Close()
		buf := make([]byte, 64<<10)
		for {
			n, err := c.Read(buf)
			if errors.Is(err, io.EOF) {
				served <- nil
				return
			}
			if err == nil {
				_, err = c.Write(buf[:n])
			}
			if err != nil {
				served <- err
				return
			}
		}
	}()
	c, err := net.Dial(network, l.Addr().String())
	if err != nil {
		return err
	}
	defer c.Close()
	for i := range messages {
		msg, got := make([]byte, size), make([]byte, size)
		for j := range msg {
			msg[j] = byte(i + j)
		}
		if _, err := c.Write(msg); err != nil {
			return err
		}
		if _, err := io.ReadFull(c, got); err != nil {
			return err
		}
		if string(got) != string(msg) {
			return fmt.Errorf("message %d came back wrong", i)
		}
	}
	c.Close()
	return <-served
}

func TestEchoIsRedirected(t *testing.T) {
	for _, scenario := range []string{"echo", "echo6"} {
		t.Run(scenario, func(t *testing.T) {
			s := privateSet(t, NodeSettings{MPTCPListeners: true})
			cgroup, id := newCgroup(t, "echo")
			if _, err := s.Attach(cgroup, id); err != nil {
				t.Fatal(err)
			}
			if err := s.SetPod(id, allPods); err != nil {
				t.Fatal(err)
			}
			run(t, scenario, cgroup)
			c, err := s.Counters()
			if err != nil {
				t.Fatal(err)
			}
			if got := c.Messages["redirected"]; got != (Count{200, 200000}) {
				t.Errorf("redirected %+v, want all 200 messages of 1000 bytes; all counters: %+v", got, c)
			}
			// A socket closes, and its pod gets its counters, when the last segments have
			// gone to and fro; they may come after the end of its process.
			want := PodCounters{Enrolled: 2, Redirected: Count{200, 200000}}
			must.Wait(t, time.Minute, 10*time.Millisecond, func() error {
				if got := must.Get(s.PodCounters())(t)[id]; !got.equal(want) || got.Enrolled != want.Enrolled {
					return fmt.Errorf("pod's counters %+v, want %+v", got, want)
				}
				if n := must.Get(s.Enrolled())(t); n != 0 {
					return fmt.Errorf("%d sockets left in the sockhash", n)
				}
				return nil
			})
		})
	}
}
