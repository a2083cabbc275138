package datapath_test

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/plugin/datapath"
	"github.com/skipstack/skipstack/test/datapath/traffic"
	"github.com/skipstack/skipstack/test/must"
	"github.com/skipstack/skipstack/test/node"
)

var churnTime = flag.Duration("churn", 30*time.Second, "how long TestConnectionChurn opens and closes connections, both modes together")

// TestConnectionChurn opens and closes connections as fast as the machine goes,
// with few bytes or none between, and each of the ways to end one.
func TestConnectionChurn(t *testing.T) {
	modes(t, func(t *testing.T, s datapath.NodeSettings) {
		l := newPublishedLab(t, s)
		// A SYN to a port whose last connection is not gone must be sent again.
		must.Do(t, l.normalHandshakes())
		client, server := l.pod("client", enabled), l.pod("server", enabled)
		for _, p := range []*pod{client, server} {
			// Else all ports are soon in TIME_WAIT.
			p.sysctl(t, "net/ipv4/ip_local_port_range", "1024 65535")
			p.sysctl(t, "net/ipv4/tcp_max_tw_buckets", "0")
		}
		before := l.counters()
		var connections, again atomic.Uint64
		end := time.Now().Add(*churnTime / 2)
		var wg sync.WaitGroup
		errs := make([]error, 4)
		for i := range errs {
			tl := server.listen(t, server.at(i%2 == 1, 0), traffic.SocketOptions{})
			wg.Go(func() {
				for errs[i] == nil && time.Now().Before(end) {
					errs[i] = briefConnection(client, tl, &again)
					connections.Add(1)
				}
			})
		}
		wg.Wait()
		must.Do(t, errors.Join(errs...))
		d := l.counters().Since(before)
		var all uint64
		for _, n := range d.Connections {
			all += n
		}
		t.Logf("%d connections: %v", connections.Load(), nonZero(d))
		if max(all, connections.Load())-min(all, connections.Load()) > again.Load() || d.Connections["enrolled"] == 0 || d.Messages["redirected"].Messages == 0 {
			t.Errorf("%d connections counted, want %d, some of them enrolled and used, but for %d with a second SYN-ACK: %v",
				all, connections.Load(), again.Load(), nonZero(d))
		}
		l.waitEmpty()
		for _, p := range []*pod{client, server} {
			must.Do(t, datapath.DropPod(l.node.BPFFS, p.id))
		}
		l.expectNothingKept()
	})
}

// briefConnection makes a connection, exchanges what it holds in memory, and ends
// it in one of the ways there are. It counts those whose SYN-ACK was sent again, which
// are not taken for what they are.
func briefConnection(client *pod, tl *traffic.Listener, again *atomic.Uint64) error {
	a, b, err := client.host.Pair(tl, tl.Addr, traffic.SocketOptions{})
	if err != nil {
		return err
	}
	info, err := b.Info()
	if err != nil {
		return err
	}
	if info.Total_retrans > 0 {
		again.Add(1)
	}
	deadline := time.Now().Add(patience)
	err = errors.Join(a.SetDeadline(deadline), b.SetDeadline(deadline))
	first, second := a, b
	if rand.IntN(2) == 0 {
		first, second = b, a
	}
	for range rand.IntN(3) {
		sent := make([]byte, 1+rand.IntN(2000))
		traffic.NewStream(rand.Uint64()).Next(sent)
		got := make([]byte, len(sent))
		_, writeErr := first.Write(sent)
		_, readErr := io.ReadFull(second, got)
		if err = errors.Join(err, writeErr, readErr); err == nil && string(got) != string(sent) {
			err = traffic.ErrCorrupt
		}
		first, second = second, first
	}
	switch rand.IntN(4) {
	case 0:
		return errors.Join(err, first.Reset(), second.Close())
	case 1:
		_, writeErr := first.Write([]byte("never read"))
		return errors.Join(err, writeErr, second.Close(), first.Close())
	case 2:
		return errors.Join(err, first.CloseWrite(), second.Close(), first.Close())
	default:
		return errors.Join(err, first.Close(), second.Close())
	}
}

// pushName is a worker that writes a stream to its third descriptor until it is
// killed.
const pushName = "push"

const pushWrite = 64 << 10 // at most, bytes

func push([]string) int {
	c := traffic.NewConn(3)
	err := c.Send(traffic.Plan{Bytes: 1 << 50, MaxWrite: pushWrite})
	fmt.Fprintln(os.Stderr, err)
	return 1
}

// TestWriterKilled kills a process while it sends. Its peer reads what was sent,
// without a gap and up to the write that was under way, and then the end.
func TestWriterKilled(t *testing.T) {
	modes(t, func(t *testing.T, s datapath.NodeSettings) {
		l := newLab(t, s, datapath.LoadOptions{})
		client, server := l.pod("client", enabled), l.pod("server", enabled)
		tl := server.listen(t, server.at(false, 0), traffic.SocketOptions{})
		for round := range 10 {
			a, b := client.pair(t, tl, traffic.SocketOptions{})
			victim, from, reader := client, a, b
			if round%2 == 1 {
				victim, from, reader = server, b, a
			}
			before := l.counters()
			cmd := node.WorkerCommand(pushName)
			cmd.ExtraFiles = []*os.File{from.File}
			proc := must.Get(victim.Start(cmd, node.StartOptions{}))(t)
			must.Do(t, from.Close()) // the process has it
			got, buf, least := traffic.NewStream(0), make([]byte, 64<<10), rand.Int64N(20<<20)
			var killed sync.WaitGroup
			for dead := false; ; {
				n, err := reader.Read(buf)
				must.Do(t, got.Check(buf[:n]))
				if errors.Is(err, io.EOF) {
					break
				}
				must.Do(t, err)
				if !dead && got.At() > least {
					dead = true
					killed.Go(func() { _ = proc.Kill() })
				}
			}
			killed.Wait()
			m := l.counters().Since(before).Messages
			var sent uint64
			for _, c := range m {
				sent += c.Bytes
			}
			// The write that was interrupted is counted whole, and may have been sent
			// in part.
			if lost := int64(sent) - got.At(); m["redirected"].Bytes == 0 || lost < 0 || lost > pushWrite {
				t.Errorf("round %d: %d bytes arrived of %d that were sent: %v", round, got.At(), sent, m)
			}
			must.Do(t, reader.Close())
		}
	})
}

// TestCgroupRecreated removes a pod's cgroup, while a socket that was born in it
// lives on elsewhere, and makes one of the same name.
func TestCgroupRecreated(t *testing.T) {
	modes(t, func(t *testing.T, s datapath.NodeSettings) {
		l := newPublishedLab(t, s)
		client, server := l.pod("client", enabled), l.pod("server", enabled)
		tl := server.listen(t, server.at(false, 0), traffic.SocketOptions{})
		for round := range 3 {
			a, b := client.pair(t, tl, traffic.SocketOptions{})
			echo(t, a, b)
			oldID := client.id
			must.Do(t, client.host.Close())
			must.Do(t, client.cgroup.Close())
			for _, dir := range []string{client.ContainerCgroup, client.Cgroup} {
				wait(t, "the cgroup is removed", func() (string, bool) {
					err := unix.Rmdir(dir)
					return fmt.Sprint(err), err == nil
				})
			}
			must.Do(t, os.MkdirAll(client.ContainerCgroup, 0o755))
			echo(t, a, b) // of nobody's pod now

			client.cgroup, client.id = openCgroup(t, client.Cgroup)
			if client.id == oldID {
				t.Fatal("the new cgroup has the old one's id")
			}
			if created := must.Get(l.set.Attach(client.cgroup, client.id))(t); !created {
				t.Fatal("the new cgroup was attached before")
			}
			must.Do(t, l.set.SetPod(client.id, enabled))
			client.host = must.Get(traffic.NewHost(client.Pod, node.StartOptions{}))(t)
			before := l.counters()
			c, d := client.pair(t, tl, traffic.SocketOptions{})
			echo(t, c, d)
			l.expectConnections(before, map[string]uint64{"enrolled": 1})
			l.expectRedirected(before)
			echo(t, a, b)
			// The old cgroup keeps its program for the socket's sake.
			must.Do(t, datapath.Sweep(l.node.BPFFS, 0))
			l.expectLinks(3, 0)
			exchange(t, a, b)
			exchange(t, c, d)
			for _, conn := range []*traffic.Conn{a, b, c, d} {
				must.Do(t, conn.Close())
			}
			wait(t, "the old cgroup's link is swept", func() (string, bool) {
				must.Do(t, datapath.Sweep(l.node.BPFFS, 0))
				links := l.linksIn("links")
				return fmt.Sprint(links), len(links) == 2
			})
			t.Logf("round %d: cgroup %d, then %d", round, oldID, client.id)
		}
		l.waitEmpty()
		for _, p := range []*pod{client, server} {
			must.Do(t, datapath.DropPod(l.node.BPFFS, p.id))
		}
		l.expectLinks(0, 0)
		l.expectNothingKept()
	})
}
