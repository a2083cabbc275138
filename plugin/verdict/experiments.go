package verdict

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"runtime"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// experiment does something with connections and says what it saw. A fault is
// part of the finding; an error says that there is no finding.
type experiment func(lab) (finding, error)

// Names of the experiments.
const (
	expExchange = "exchange"
	expShuffle  = "shuffle"
	expWaiting  = "waiting"
	expFlood    = "flood"
	expWake     = "wake"
	expCrowd    = "crowd"
	expSplice   = "splice"
	expProxy    = "proxy"
)

var experiments = map[string]experiment{
	expExchange: exchange,
	expShuffle:  shuffle,
	expWaiting:  countWaiting,
	expFlood:    flood,
	expWake:     wake,
	expCrowd:    crowd,
	expSplice:   spliceFrom,
	expProxy:    proxy,
}

// asFault tells faults of the kernel from experiments that did not come off.
func asFault(f finding, err error) (finding, error) {
	if errors.Is(err, errWrong) {
		f.Fault = err.Error()
		return f, nil
	}
	return f, err
}

// settled adds what TCP carried on the sockets.
func (f *finding) settled(socks ...sock) error {
	for _, s := range socks {
		n, err := byTCP(s)
		if err != nil {
			return err
		}
		f.ByTCP += n
	}
	return nil
}

// exchange sends messages of several sizes to and fro, and a last one that the
// end of the stream follows at once.
func exchange(l lab) (finding, error) {
	var f finding
	for _, a := range []addresses{overIPv4(), overIPv6(), dualStack()} {
		err := f.exchangeOver(l, a)
		if noIPv6(err) && a.name != overIPv4().name {
			continue
		}
		if err != nil {
			return asFault(f, fmt.Errorf("%s: %w", a.name, err))
		}
	}
	return f, nil
}

func (f *finding) exchangeOver(l lab, a addresses) error {
	client, server, err := l.connect(a)
	if err != nil {
		return err
	}
	defer client.close()
	defer server.close()
	f.Connections++
	content := newPattern(f.Connections)
	offset := 0
	for _, size := range []int{1, 100, 4096, 60000} {
		for _, dir := range []struct{ from, to sock }{{client, server}, {server, client}} {
			msg := content.at(offset%(patternLength-size), size)
			offset += size
			if err := l.send(dir.from, msg); err != nil {
				return err
			}
			f.Sent += uint64(size)
			if err := l.expect(dir.to, msg); err != nil {
				return err
			}
		}
	}
	last := content.at(7, 1000)
	if err := l.send(client, last); err != nil {
		return err
	}
	f.Sent += uint64(len(last))
	if err := f.settled(client, server); err != nil { // before FIN
		return err
	}
	if err := unix.Shutdown(client.fd, unix.SHUT_WR); err != nil {
		return fmt.Errorf("shutdown: %w", err)
	}
	if err := l.expect(server, last); err != nil {
		return err
	}
	return l.expectEOF(server)
}

const (
	// shuffleUnread is the parent's limit of unread bytes for shuffle: small, so
	// that redirecting and TCP take turns all the time.
	shuffleUnread      = 8 << 10
	shuffleConnections = 4
	shuffleBytes       = 1 << 20 // at most, each way on each connection
	shuffleMessage     = 5000    // at most
	shuffleWindow      = 4 << 10
)

// shuffle sends messages of random sizes both ways on several connections at
// once, to readers that let bytes pile up, and compares every byte. Before, it
// stages the two states in which a redirected message could be read too early.
func shuffle(l lab) (finding, error) {
	var f finding
	for _, stage := range []func(lab, *finding) error{stageUnread, stageUnsent} {
		if err := stage(l, &f); err != nil {
			return asFault(f, err)
		}
	}
	var flows []*flow
	var socks []sock
	defer func() {
		for _, s := range socks {
			s.close()
		}
	}()
	for i := range uint64(shuffleConnections) {
		a := overIPv4()
		if i >= 2 {
			// A small window leaves bytes that TCP is to carry with the sender.
			// In a buffer that does not grow by itself the clamp stays in force.
			a.window, a.buffer = shuffleWindow, 64<<10
		}
		client, server, err := l.connect(a)
		if err != nil {
			return f, err
		}
		socks = append(socks, client, server)
		f.Connections++
		for j, fl := range []*flow{newFlow(l, client, server, 2*i), newFlow(l, server, client, 2*i+1)} {
			fl.rush = (i+uint64(j))%2 == 1
			flows = append(flows, fl)
		}
	}
	// A slow machine sends less, but reads all of it.
	stop := time.Now().Add(time.Until(l.deadline) / 3)
	var wg sync.WaitGroup
	errs := make([]error, 2*len(flows))
	for i, fl := range flows {
		wg.Go(func() { errs[2*i] = fl.write(stop) })
		wg.Go(func() { errs[2*i+1] = fl.read() })
	}
	wg.Wait()
	for _, fl := range flows {
		f.Sent += uint64(fl.sent)
	}
	for _, err := range errs { // one fault says more than the timeouts it leads to
		if errors.Is(err, errWrong) {
			return asFault(f, err)
		}
	}
	if err := errors.Join(errs...); err != nil {
		return f, err
	}
	return f, f.settled(socks...)
}

// Messages of the stages: the first fills the receiver's limit, so that the
// second goes by TCP, and what becomes of the third depends.
const (
	stageFirst  = shuffleUnread + 1000
	stageSecond = 700
	stageThird  = 500
)

// stage sends the first two messages and reads the first.
func (l lab) stage(f *finding, content pattern, cork bool) (client, server sock, err error) {
	if client, server, err = l.connect(overIPv4()); err != nil {
		return sock{}, sock{}, err
	}
	f.Connections++
	f.Sent += stageFirst + stageSecond + stageThird
	err = l.send(client, content.at(0, stageFirst))
	if err == nil && cork {
		err = l.cork(client, 1)
	}
	if err == nil {
		err = l.send(client, content.at(stageFirst, stageSecond))
	}
	if err == nil {
		err = l.expect(server, content.at(0, stageFirst))
	}
	if err != nil {
		client.close()
		server.close()
	}
	return client, server, err
}

// stageUnread sends a message when one that went by TCP has arrived but has not
// been read.
func stageUnread(l lab, f *finding) error {
	content := newPattern(100)
	client, server, err := l.stage(f, content, false)
	if err != nil {
		return err
	}
	defer client.close()
	defer server.close()
	if err := l.arrived(client); err != nil {
		return err
	}
	if err := l.send(client, content.at(stageFirst+stageSecond, stageThird)); err != nil {
		return err
	}
	if err := f.settled(client); err != nil {
		return err
	}
	return l.expect(server, content.at(stageFirst, stageSecond+stageThird))
}

// stageUnsent sends a message when TCP still holds back the one before.
func stageUnsent(l lab, f *finding) error {
	content := newPattern(101)
	client, server, err := l.stage(f, content, true)
	if err != nil {
		return err
	}
	defer client.close()
	defer server.close()
	if err := l.send(client, content.at(stageFirst+stageSecond, stageThird)); err != nil {
		return err
	}
	if err := l.cork(client, 0); err != nil {
		return err
	}
	if err := f.settled(client); err != nil {
		return err
	}
	return l.expect(server, content.at(stageFirst, stageSecond+stageThird))
}

// cork makes TCP hold back what does not fill a segment.
func (l lab) cork(s sock, on int) error {
	if err := unix.SetsockoptInt(s.fd, unix.IPPROTO_TCP, unix.TCP_CORK, on); err != nil {
		return fmt.Errorf("setsockopt(TCP_CORK): %w", err)
	}
	return nil
}

// flow is one direction of a connection.
type flow struct {
	lab
	from, to sock
	content  pattern
	seed     uint64
	rush     bool // neither side waits for the other

	mu       sync.Mutex
	changed  sync.Cond
	sent     int
	received int
	stuck    bool // the writer sends no more before the reader reads, or at all
	over     bool // the reader reads no more
}

func newFlow(l lab, from, to sock, seed uint64) *flow {
	f := &flow{lab: l, from: from, to: to, seed: seed, content: newPattern(seed)}
	f.changed.L = &f.mu
	return f
}

// tell changes what the other side waits for.
func (f *flow) tell(change func()) {
	f.mu.Lock()
	change()
	f.mu.Unlock()
	f.changed.Broadcast()
}

// write sends until the stream is long enough, or time is up.
func (f *flow) write(stop time.Time) error {
	random := rand.New(rand.NewPCG(f.seed, 1))
	sent := 0
	defer func() { f.tell(func() { f.stuck = true }) }()
	for sent < shuffleBytes && time.Now().Before(stop) {
		msg := f.content.at(sent, min(1+random.IntN(shuffleMessage), shuffleBytes-sent))
		n, err := unix.SendmsgN(f.from.fd, msg, nil, nil, unix.MSG_NOSIGNAL)
		switch err {
		case nil:
			sent += n
			f.tell(func() { f.sent = sent })
			if f.rush {
				continue
			}
			if err := f.pause(random.IntN(8)); err != nil {
				return err
			}
		case unix.EINTR:
		case unix.EAGAIN:
			f.tell(func() { f.stuck = true })
			if _, err := f.wait(f.from, unix.POLLOUT); err != nil {
				return fmt.Errorf("send: %w (after %d bytes)", err, sent)
			}
			f.tell(func() { f.stuck = false })
		default:
			return fmt.Errorf("send: %w", err)
		}
	}
	if err := unix.Shutdown(f.from.fd, unix.SHUT_WR); err != nil {
		return fmt.Errorf("shutdown: %w", err)
	}
	return nil
}

// pause brings about the states in which a message may be redirected, or must
// not: all that was sent has arrived, but not been read; or it has been read too.
func (f *flow) pause(what int) error {
	if what > 2 {
		return nil
	}
	if what == 0 {
		f.tell(func() { f.stuck = true })
		f.mu.Lock()
		for f.received < f.sent && !f.over {
			f.changed.Wait()
		}
		f.stuck = false
		f.mu.Unlock()
	}
	// An acknowledgement may be delayed for long.
	_, err := f.until(500*time.Microsecond, func() (bool, error) {
		n, err := unacknowledged(f.from)
		return n == 0, err
	})
	return err
}

// pileUp waits until the writer is n bytes ahead, or can go no further.
func (f *flow) pileUp(n int) {
	f.mu.Lock()
	for !f.stuck && f.sent-f.received < n {
		f.changed.Wait()
	}
	f.mu.Unlock()
}

// read reads to the end of the stream, which must come when all was read that was
// sent.
func (f *flow) read() error {
	random := rand.New(rand.NewPCG(f.seed, 2))
	buf := make([]byte, 4*shuffleMessage)
	defer func() { f.tell(func() { f.over = true }) }()
	for got := 0; ; {
		if !f.rush || random.IntN(16) == 0 {
			f.pileUp(random.IntN(3 * shuffleUnread))
		}
		for batch := 1 + random.IntN(8); batch > 0; batch-- {
			n, err := f.recv(f.to, buf[:1+random.IntN(len(buf))])
			if err == io.EOF {
				return f.complete(got)
			}
			if err != nil {
				return fmt.Errorf("%w (after %d bytes)", err, got)
			}
			if !f.content.matches(got, buf[:n]) {
				return fmt.Errorf("%w: between byte %d and %d", errWrong, got, got+n)
			}
			got += n
			f.tell(func() { f.received = got })
		}
	}
}

// complete tells if the stream may end after so many bytes.
func (f *flow) complete(got int) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if got != f.sent {
		return fmt.Errorf("%w: the stream ends after %d of %d bytes", errWrong, got, f.sent)
	}
	return nil
}

// Sizes of the messages of countWaiting.
const (
	firstWaiting  = 1500
	secondWaiting = 1000
)

// countWaiting sends two messages and asks FIONREAD how many bytes wait. The
// parent's limit decides which of them is redirected.
func countWaiting(l lab) (finding, error) {
	f := finding{Connections: 1}
	client, server, err := l.connect(overIPv4())
	if err != nil {
		return finding{}, err
	}
	defer client.close()
	defer server.close()
	content := newPattern(3)
	for _, size := range []int{firstWaiting, secondWaiting} {
		if err := l.send(client, content.at(int(f.Sent), size)); err != nil {
			return f, err
		}
		f.Sent += uint64(size)
	}
	f.Waiting = int(f.Sent)
	if err := l.arrived(client); err != nil {
		return f, err
	}
	_, err = l.until(l.settle, func() (bool, error) {
		f.Counted, err = waiting(server)
		return f.Counted == f.Waiting, err
	})
	if err != nil {
		return f, err
	}
	if err := f.settled(client); err != nil {
		return f, err
	}
	if err := l.expect(server, content.at(0, f.Waiting)); err != nil {
		return asFault(f, err)
	}
	if n, err := waiting(server); err != nil || n != 0 {
		f.Fault = fmt.Sprintf("FIONREAD says %d when all was read", n)
		return f, err
	}
	return f, nil
}

// arrived waits until the peer has acknowledged what was sent by TCP.
func (l lab) arrived(s sock) error {
	ok, err := l.until(time.Until(l.deadline), func() (bool, error) {
		n, err := unacknowledged(s)
		return n == 0, err
	})
	if err == nil && !ok {
		err = fmt.Errorf("send: %w", errDeadline)
	}
	return err
}

// eofIsWrong is for readers that know how much is to come.
func eofIsWrong(err error) error {
	if err == io.EOF {
		return fmt.Errorf("%w: end of stream", errWrong)
	}
	return err
}

const (
	// floodUnread is the parent's limit of unread bytes for flood.
	floodUnread = 32 << 10
	// floodFirst is sent first, and is surely redirected.
	floodFirst = 32 << 10
	// floodBuffer is SO_SNDBUF and SO_RCVBUF, or how much is enough for floodStop would
	// be up to net.ipv4.tcp_rmem and tcp_wmem, which new network namespaces have from
	// the node (tcp_sk_init(), net/ipv4/tcp_ipv4.c).
	floodBuffer = 64 << 10
	// floodStop is more than the limit and TCP's own buffers can take up.
	floodStop = 4 << 20
	floodSize = 8 << 10 // of a message
)

// flood sends to a receiver that does not read, then lets it read.
func flood(l lab) (finding, error) {
	f := finding{Connections: 1}
	a := overIPv4()
	a.buffer = floodBuffer
	client, server, err := l.connect(a)
	if err != nil {
		return finding{}, err
	}
	defer client.close()
	defer server.close()
	if err := setBuffer(client.fd, unix.SO_SNDBUFFORCE, unix.SO_SNDBUF, floodBuffer); err != nil {
		return f, fmt.Errorf("setsockopt(SO_SNDBUF): %w", err)
	}
	content := newPattern(4)
	for f.Unread < floodFirst {
		msg := content.at(f.Unread, min(floodSize, floodFirst-f.Unread))
		if err := l.send(client, msg); err != nil {
			return f, err
		}
		f.Unread += len(msg)
	}
	// What is redirected is charged at once; TCP may take a moment to deliver.
	_, err = l.until(l.settle, func() (bool, error) {
		f.Charged, err = charged(server)
		return f.Charged >= f.Unread, err
	})
	if err != nil {
		return f, err
	}
	f.Accepted = f.Unread
	for f.Accepted < floodStop && !f.Stopped {
		n, err := unix.SendmsgN(client.fd, content.at(f.Accepted, floodSize), nil, nil, unix.MSG_NOSIGNAL)
		switch err {
		case nil:
			f.Accepted += n
		case unix.EINTR:
		case unix.EAGAIN:
			// Acknowledgements may make room once more.
			more, err := l.until(10*time.Millisecond, func() (bool, error) {
				fds := []unix.PollFd{{Fd: int32(client.fd), Events: unix.POLLOUT}}
				n, err := unix.Poll(fds, 0)
				if err == unix.EINTR {
					err = nil
				}
				return n > 0, err
			})
			if err != nil {
				return f, fmt.Errorf("poll: %w", err)
			}
			f.Stopped = !more
		default:
			return f, fmt.Errorf("send: %w", err)
		}
	}
	f.Sent = uint64(f.Accepted)
	if !f.Stopped {
		return f, f.settled(client) // reading it all would tell no more
	}
	return asFault(f, f.drain(l, client, server, content))
}

// drain reads all that was accepted, which makes the receiver's charge go. The end of
// the stream comes later: a FIN that comes alone is a segment that is charged, too, and
// some kernels keep that until the socket is closed, which harms nobody.
func (f *finding) drain(l lab, client, server sock, content pattern) error {
	buf := make([]byte, 64<<10)
	for got := 0; got < f.Accepted; {
		n, err := l.recv(server, buf)
		if err != nil {
			return fmt.Errorf("%w (after %d of %d bytes)", eofIsWrong(err), got, f.Accepted)
		}
		if !content.matches(got, buf[:n]) {
			return fmt.Errorf("%w: between byte %d and %d", errWrong, got, got+n)
		}
		got += n
	}
	var err error
	f.Released, err = l.until(100*time.Millisecond, func() (bool, error) {
		n, err := charged(server)
		return n == 0, err
	})
	if err != nil {
		return err
	}
	if err := unix.Shutdown(client.fd, unix.SHUT_WR); err != nil {
		return fmt.Errorf("shutdown: %w", err)
	}
	if err := l.expectEOF(server); err != nil {
		return err
	}
	return f.settled(client)
}

// wake lets epoll wait for bytes, level and edge triggered.
func wake(l lab) (finding, error) {
	var f finding
	for _, w := range []waker{{name: "level-triggered"}, {name: "edge-triggered", flags: unix.EPOLLET}} {
		w.lab = l
		if err := w.run(&f); err != nil {
			return asFault(f, err)
		}
		if f.Fault != "" {
			break
		}
	}
	return f, nil
}

// waker is one connection whose receiver is watched by epoll.
type waker struct {
	lab
	name           string
	flags          uint32
	client, server sock
	epoll          int
}

func (w *waker) run(f *finding) (err error) {
	if w.client, w.server, err = w.connect(overIPv4()); err != nil {
		return err
	}
	defer w.client.close()
	defer w.server.close()
	f.Connections++
	if w.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return fmt.Errorf("epoll_create: %w", err)
	}
	defer unix.Close(w.epoll)
	event := unix.EpollEvent{Events: unix.EPOLLIN | w.flags, Fd: int32(w.server.fd)}
	if err := unix.EpollCtl(w.epoll, unix.EPOLL_CTL_ADD, w.server.fd, &event); err != nil {
		return fmt.Errorf("epoll_ctl: %w", err)
	}
	content := newPattern(5)
	f.Fault, err = w.rounds(f, content)
	if err != nil || f.Fault != "" {
		return err
	}
	return f.settled(w.client)
}

// rounds returns a fault if epoll is silent, or not when it should be.
func (w *waker) rounds(f *finding, content pattern) (fault string, err error) {
	const size = 500
	send := func() error {
		err := w.send(w.client, content.at(int(f.Sent), size))
		f.Sent += size
		return err
	}
	start := int(f.Sent)
	for _, round := range []string{"the first bytes", "bytes that came after everything was read"} {
		// The reader sleeps before the bytes are sent.
		woken, err := w.sleepWhile(send)
		if err != nil {
			return "", err
		}
		if !woken {
			return w.missed(round)
		}
		if w.flags&unix.EPOLLET != 0 {
			if err := send(); err != nil {
				return "", err
			}
		}
		// Level: still reported. Edge: reported because more came.
		if n, err := w.events(w.settle); err != nil {
			return "", err
		} else if n == 0 {
			return w.missed("bytes that came while others were unread")
		}
		if err := w.expect(w.server, content.at(start, int(f.Sent)-start)); err != nil {
			return "", err
		}
		start = int(f.Sent)
		silent, err := w.until(w.settle, func() (bool, error) {
			n, err := w.events(0)
			return n == 0, err
		})
		if err != nil {
			return "", err
		}
		if !silent {
			return w.name + " epoll goes on reporting a connection that has nothing to read", nil
		}
	}
	return "", nil
}

// missed tells a fault from bytes that did not come.
func (w *waker) missed(what string) (fault string, err error) {
	_, _, err = unix.Recvfrom(w.server.fd, make([]byte, 1), unix.MSG_PEEK)
	if err != nil {
		return "", fmt.Errorf("receive %s: %w", what, err)
	}
	return fmt.Sprintf("%s epoll does not report %s", w.name, what), nil
}

// events waits no longer than d for an event.
func (w *waker) events(d time.Duration) (int, error) {
	end := time.Now().Add(d)
	var got [1]unix.EpollEvent
	for {
		left := max(0, time.Until(end))
		n, err := unix.EpollWait(w.epoll, got[:], int(left.Milliseconds()))
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return 0, fmt.Errorf("epoll_wait: %w", err)
		}
		return n, nil
	}
}

// sleepWhile calls act while another thread sleeps in epoll_wait, and tells if
// that thread woke.
func (w *waker) sleepWhile(act func() error) (woken bool, err error) {
	type result struct {
		n   int
		err error
	}
	thread, done := make(chan int, 1), make(chan result, 1)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		thread <- unix.Gettid()
		n, err := w.events(w.settle)
		done <- result{n, err}
	}()
	tid := <-thread
	// It matters little if it does not sleep yet: then it finds an event.
	_, _ = w.until(20*time.Millisecond, func() (bool, error) { return sleeps(tid), nil })
	if err := act(); err != nil {
		return false, err
	}
	r := <-done
	if r.err == nil && r.n == 0 {
		// On an overloaded machine the sleep may have ended before the act.
		r.n, r.err = w.events(w.settle)
	}
	return r.n > 0, r.err
}

// sleeps tells if a thread of this process waits in the kernel.
func sleeps(tid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/self/task/%d/stat", tid))
	if err != nil {
		return false
	}
	_, rest, _ := strings.Cut(string(stat), ") ")
	return strings.HasPrefix(rest, "S")
}
