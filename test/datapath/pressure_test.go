package datapath_test

import (
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/plugin/datapath"
	"github.com/skipstack/skipstack/test/datapath/traffic"
	"github.com/skipstack/skipstack/test/must"
	"github.com/skipstack/skipstack/test/node"
)

// overhead is what the kernel spends on a redirected message beyond its bytes.
const overhead = 1024

// TestNeverReads writes to receivers that do not read: the writers must be
// stopped, the kernel's memory stay bounded, connections outside the pods stay
// fast. Then the receivers read all.
func TestNeverReads(t *testing.T) {
	modes(t, func(t *testing.T, s datapath.NodeSettings) {
		for _, c := range []struct {
			size, connections int
			limit             uint32
		}{
			{1, 1, 16 << 20},
			{100, 1, 16 << 20},
			{64 << 10, 1, 16 << 20},
			{1, 200, 2 << 20},
			{100, 200, 2 << 20},
			{64 << 10, 200, 2 << 20},
		} {
			t.Run(fmt.Sprintf("%d bytes to %d", c.size, c.connections), func(t *testing.T) {
				neverReads(t, s, c.connections, c.size, c.limit)
			})
		}
	})
}

// TestManyNeverRead fills so many receivers that the limit of each would let all
// of them hold more than TCP may before it is short of memory.
func TestManyNeverRead(t *testing.T) {
	node.Need(t)
	// TCP's own part of each connection must find room, too.
	connections := int(max(200, min(1000, lowMark(t)>>20)))
	limit := lowMark(t) * 3 / 2 / int64(connections)
	m := neverReads(t, datapath.NodeSettings{Funnel: true}, connections, 64<<10, uint32(limit))
	// The other half of the machine's CPUs may be on its way over the mark.
	if most := uint64(lowMark(t)) + uint64(runtime.NumCPU())<<20; m["redirected"].Bytes > most {
		t.Errorf("%d bytes redirected, want at most %d: %v", m["redirected"].Bytes, most, m)
	}
	if m["memory"].Messages == 0 {
		t.Errorf("no message was counted as memory: %v", m)
	}
}

// TestManyMessagesNeverRead fills so many receivers with messages of one byte that the
// limit of each would let all of them cost more than TCP may hold. A sender that
// closes gives nothing back; receivers that have read do, whoever is silent.
func TestManyMessagesNeverRead(t *testing.T) {
	node.Need(t)
	const limit = 16 << 20
	l := newLab(t, datapath.NodeSettings{Funnel: true, MPTCPListeners: true}, datapath.LoadOptions{ClaimWindow: time.Minute})
	client, server := l.pod("client", withLimit(limit)), l.pod("server", withLimit(limit))
	tl := server.listen(t, server.at(false, 0), traffic.SocketOptions{})
	most := lowMark(t) / overhead
	connections := int(most*3/2/(limit/overhead)) + 1
	// What need not be reserved, and what the machine's CPUs reserve at once.
	slack := int64(2*connections*4 + 64*runtime.NumCPU())

	type link struct {
		traffic.Filler
		receiver *traffic.Conn
	}
	// redirected lets so many messages be sent on new connections, and counts
	// those that were redirected.
	redirected := func(connections, messages int) (links []*link, n int64) {
		before := l.counters()
		for i := range connections {
			k := &link{Filler: traffic.Filler{Stream: traffic.NewStream(uint64(i))}}
			k.Conn, k.receiver = client.pair(t, tl, traffic.SocketOptions{})
			must.Get(k.Fill(1, messages))(t)
			links = append(links, k)
		}
		now := l.counters().Since(before).Messages
		if int64(now["redirected"].Messages) < int64(connections*messages) && now["memory"].Messages == 0 {
			t.Errorf("messages passed, but not for want of memory: %v", now)
		}
		return links, int64(now["redirected"].Messages)
	}

	links, n := redirected(connections, limit/overhead)
	if n > most+slack || n < most/2 {
		t.Fatalf("%d messages wait, want at most %d, and half of it", n, most)
	}
	for i, k := range links {
		if i%2 == 0 {
			must.Do(t, k.Conn.CloseWrite())
		}
	}
	_, extra := redirected(connections, 200)
	if n+extra > most+slack {
		t.Errorf("with those of other senders %d messages wait, want at most %d", n+extra, most)
	}
	t.Logf("%d and %d messages waited, at most %d may", n, extra, most)
	for i, k := range links {
		must.Do(t, k.receiver.SetDeadline(time.Now().Add(lifetime)))
		must.Do(t, k.receiver.Receive(traffic.Plan{Seed: uint64(i), Bytes: k.Total, Open: i%2 != 0}))
	}
	wait(t, "there is room again", func() (string, bool) {
		const messages = 12000
		links, n := redirected(1, messages)
		must.Do(t, errors.Join(links[0].Conn.Close(), links[0].receiver.Close()))
		return fmt.Sprintf("%d messages of %d were redirected", n, messages), n == messages
	})
}

// lowMark is how much memory TCP may hold on the machine before it begins to
// save, in bytes. The sysctl is not to be seen in a private network namespace.
func lowMark(t *testing.T) int64 {
	t.Helper()
	var pages int64
	if _, err := fmt.Sscan(os.Getenv(tcpMemEnv), &pages); err != nil {
		t.Skip("needs /proc/sys/net/ipv4/tcp_mem: the first network namespace")
	}
	return pages * int64(os.Getpagesize())
}

const tcpMemEnv = "SKIPSTACK_TEST_TCP_MEM"

func neverReads(t *testing.T, s datapath.NodeSettings, connections, size int, limit uint32) map[string]datapath.Count {
	l := newLab(t, s, datapath.LoadOptions{})
	client, server := l.pod("client", withLimit(limit)), l.pod("server", withLimit(limit))
	bystander := newBystander(t, l)
	before := bystander.rate()

	// TCP's part is of no interest.
	small := traffic.SocketOptions{Setup: func(fd int) error {
		return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, 64<<10)
	}}
	tl := server.listen(t, server.at(false, 0), traffic.SocketOptions{})
	fillers, receivers := make([]traffic.Filler, connections), make([]*traffic.Conn, connections)
	for i := range fillers {
		fillers[i].Stream = traffic.NewStream(uint64(i))
		fillers[i].Conn, receivers[i] = client.pair(t, tl, small)
	}
	memory := kernelMemory(t)

	fill(t, fillers, size, int(limit)/(size+overhead)+100)
	m := l.counters().Messages
	held := m["redirected"].Bytes + overhead*m["redirected"].Messages
	if most := uint64(connections) * (uint64(limit) + uint64(size+overhead)); held > most {
		t.Errorf("%d bytes held with their overhead, want at most %d: %v", held, most, m)
	}
	if m["redirected"].Messages == 0 || m["receiver_full"].Messages+m["memory"].Messages == 0 {
		t.Errorf("no bytes redirected, or no end to it: %v", m)
	}
	for i, f := range fillers {
		if most := int64(limit) + int64(size+bufferSizes(t, f.Conn, receivers[i])); f.Total > most {
			t.Fatalf("connection %d took %d bytes, want at most %d", i, f.Total, most)
		}
		if _, err := unix.Write(f.Conn.FD, []byte{0}); !errors.Is(err, unix.EAGAIN) {
			t.Fatalf("write to the stopped connection %d: %v, want EAGAIN", i, err)
		}
	}
	grown := kernelMemory(t) - memory
	if most := int64(connections) * (int64(limit) + 1<<20); grown > most+noise {
		t.Errorf("the kernel's memory grew by %d MiB, want at most %d", grown>>20, most>>20)
	}
	t.Logf("%d MiB held, the kernel's memory grew by %d MiB, the bystander had %d MB/s", held>>20, grown>>20, before/1e6)
	bystander.atLeast(t, before/2)

	// All that was taken is delivered.
	errs, deadline := make(chan error, connections), time.Now().Add(lifetime)
	for i, r := range receivers {
		must.Do(t, r.SetDeadline(deadline))
		go func() {
			errs <- r.Receive(traffic.Plan{Seed: uint64(i), Bytes: fillers[i].Total, Open: true})
		}()
	}
	for range receivers {
		must.Do(t, <-errs)
	}
	for _, r := range receivers {
		nothing(t, r)
	}
	return m
}

// fill writes messages of the given size, so many to each connection and then
// larger ones, until all connections are stopped: not writable for a second.
// Acknowledgements that are under way make room, on a busy machine after a long time.
func fill(t *testing.T, fillers []traffic.Filler, size, messages int) {
	t.Helper()
	fillUntil(t, fillers, size, messages, time.Second)
}

// fillUntil is fill with another time for which no connection is writable.
func fillUntil(t *testing.T, fillers []traffic.Filler, size, messages int, quiet time.Duration) {
	t.Helper()
	halves := make(chan error, 2)
	for _, half := range [][]traffic.Filler{fillers[:len(fillers)/2], fillers[len(fillers)/2:]} {
		go func() {
			var errs []error
			for i := range half {
				_, err := half[i].Fill(size, messages)
				errs = append(errs, err)
			}
			halves <- errors.Join(errs...)
		}()
	}
	must.Do(t, errors.Join(<-halves, <-halves))
	const looks = 50 // so many at least: this process may be kept from looking
	last, seen := time.Now(), 0
	wait(t, "the writers are stopped", func() (string, bool) {
		for i := range fillers {
			had := fillers[i].Total
			refused, err := fillers[i].Fill(64<<10, 1<<10)
			must.Do(t, err)
			if !refused {
				t.Fatalf("connection %d is not stopped after %d bytes", i, fillers[i].Total)
			}
			if fillers[i].Total != had || must.Get(traffic.Poll(fillers[i].Conn.FD, unix.POLLOUT, 0))(t) != 0 {
				last, seen = time.Now(), 0
			}
		}
		seen++
		return "they are not", seen > looks && time.Since(last) > quiet
	})
}

// noise is how much the kernel's memory may change for other reasons.
const noise = 64 << 20

// bufferSizes is what TCP may hold of a connection beyond redirected bytes.
func bufferSizes(t *testing.T, sender, receiver *traffic.Conn) int {
	t.Helper()
	return must.Get(unix.GetsockoptInt(sender.FD, unix.SOL_SOCKET, unix.SO_SNDBUF))(t) +
		must.Get(unix.GetsockoptInt(receiver.FD, unix.SOL_SOCKET, unix.SO_RCVBUF))(t)
}

// kernelMemory is what /proc/meminfo says of memory that the kernel itself uses,
// and TCP's buffers, in bytes.
func kernelMemory(t *testing.T) int64 {
	t.Helper()
	var sum int64
	for _, source := range []struct {
		file, format string
		unit         int64
	}{
		{"/proc/meminfo", "SUnreclaim: %d kB", 1 << 10},
		{"/proc/net/sockstat", "TCP: inuse %d orphan %d tw %d alloc %d mem %d", int64(os.Getpagesize())},
	} {
		found := false
		for line := range strings.Lines(string(must.Get(os.ReadFile(source.file))(t))) {
			var n [5]int64
			if read, _ := fmt.Sscanf(line, source.format, &n[0], &n[1], &n[2], &n[3], &n[4]); read > 0 && read == strings.Count(source.format, "%d") {
				sum += n[read-1] * source.unit
				found = true
			}
		}
		if !found {
			t.Fatalf("%s does not tell the kernel's memory", source.file)
		}
	}
	return sum
}

// A bystander is a stream between two pods that are not attached.
type bystander struct{ received atomic.Int64 }

func newBystander(t *testing.T, l *lab) *bystander {
	t.Helper()
	b := &bystander{}
	from, to := l.plainPod("bystander-client"), l.plainPod("bystander-server")
	c, s := from.pair(t, to.listen(t, to.at(false, 0), traffic.SocketOptions{}), traffic.SocketOptions{})
	ended := make(chan error, 2)
	go func() {
		buf := make([]byte, 64<<10)
		for {
			if _, err := c.Write(buf); err != nil {
				ended <- err
				return
			}
		}
	}()
	go func() {
		buf := make([]byte, 64<<10)
		for {
			n, err := s.Read(buf)
			b.received.Add(int64(n))
			if err != nil {
				ended <- err
				return
			}
		}
	}()
	t.Cleanup(func() {
		select {
		case err := <-ended:
			t.Errorf("the bystander's connection broke: %v", err)
		default:
		}
		c.Close()
		s.Close()
	})
	return b
}

// rate measures in bytes per second.
func (b *bystander) rate() int64 {
	start, from := time.Now(), b.received.Load()
	time.Sleep(100 * time.Millisecond)
	return int64(float64(b.received.Load()-from) / time.Since(start).Seconds())
}

// atLeast waits until the bystander is that fast.
func (b *bystander) atLeast(t *testing.T, rate int64) (now int64) {
	t.Helper()
	wait(t, "the bystander is fast", func() (string, bool) {
		now = b.rate()
		return fmt.Sprintf("%d bytes/s, want %d", now, rate), now >= rate
	})
	return now
}

// TestSmallReceiveBuffer sets SO_RCVBUF: an application that wants little to be
// queued gets that.
func TestSmallReceiveBuffer(t *testing.T) {
	modes(t, func(t *testing.T, s datapath.NodeSettings) {
		l := newLab(t, s, datapath.LoadOptions{})
		client, server := l.pod("client", enabled), l.pod("server", enabled)
		const size, rcvbuf = 1000, 2 * 16 << 10 // the kernel doubles what it is told
		tl := server.listen(t, server.at(false, 0), traffic.SocketOptions{Setup: func(fd int) error {
			return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, rcvbuf/2)
		}})
		f := []traffic.Filler{{Stream: traffic.NewStream(0)}}
		var b *traffic.Conn
		f[0].Conn, b = client.pair(t, tl, traffic.SocketOptions{})
		fill(t, f, size, 1000)
		m := l.counters().Messages
		want := uint64(rcvbuf)
		if !s.Funnel {
			want /= 2 // the rest is for what comes by TCP
		}
		if got := m["redirected"].Messages * (size + overhead); got < want || got > want+size+overhead {
			t.Errorf("%d bytes queued with their overhead, want %d: %v", got, want, m)
		}
		if got := must.Get(unix.GetsockoptInt(b.FD, unix.SOL_SOCKET, unix.SO_RCVBUF))(t); got != rcvbuf {
			t.Errorf("SO_RCVBUF is %d, want %d", got, rcvbuf)
		}
		must.Do(t, b.Receive(traffic.Plan{Bytes: f[0].Total, Open: true}))
	})
}

// TestBlockingSend writes to a receiver that does not read, over a blocking
// socket: the write waits, for as long as SO_SNDTIMEO says, and goes on when the
// receiver reads.
func TestBlockingSend(t *testing.T) {
	modes(t, func(t *testing.T, s datapath.NodeSettings) {
		l := newLab(t, s, datapath.LoadOptions{})
		settings := withLimit(1 << 20)
		settings.Accepted = datapath.RiskBlocking
		client, server := l.pod("client", settings), l.pod("server", settings)
		o := traffic.SocketOptions{Blocking: true, Setup: func(fd int) error {
			wait := unix.NsecToTimeval(int64(300 * time.Millisecond))
			return errors.Join(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, 64<<10),
				unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &wait))
		}}
		tl := server.listen(t, server.at(false, 0), traffic.SocketOptions{})
		a, b := client.pair(t, tl, o)
		l.enrolled(datapath.Counters{}, 1)

		f := traffic.Filler{Conn: a, Stream: traffic.NewStream(0)}
		start := time.Now()
		refused := must.Get(f.Fill(64<<10, 1000))(t)
		if took := time.Since(start); !refused || took < 300*time.Millisecond {
			t.Errorf("the write did not wait: refused %v after %s, %d bytes", refused, took, f.Total)
		}
		if m := l.counters().Messages; m["receiver_full"].Messages == 0 || m["redirected"].Bytes < 1<<20 {
			t.Errorf("the receiver was not full: %v", m)
		}
		must.Do(t, unix.SetsockoptTimeval(a.FD, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &unix.Timeval{Sec: int64(patience.Seconds())}))
		const more = 100
		wrote := make(chan error, 1)
		go func() {
			refused, err := f.Fill(64<<10, more)
			if refused {
				err = errors.New("a write timed out")
			}
			wrote <- errors.Join(err, a.CloseWrite())
		}()
		got, buf := traffic.NewStream(0), make([]byte, 64<<10)
		for {
			n, err := b.Read(buf)
			must.Do(t, got.Check(buf[:n]))
			if errors.Is(err, io.EOF) {
				break
			}
			must.Do(t, err)
		}
		must.Do(t, <-wrote)
		if got.At() != f.Total {
			t.Errorf("%d bytes arrived of %d", got.At(), f.Total)
		}
	})
}
