package conformance

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/test/datapath/traffic"
)

// A trial is one behaviour tried in one mode and role.
type trial struct {
	name        string
	rig         *rig
	connections int  // that were made and can be accelerated
	closed      bool // the gate, in mode switched
	late        bool // a SYN-ACK was sent twice, and the second has another number
	disturbed   bool // by that, by a shortage of memory, or by a row before

	mu      sync.Mutex
	notes   []string
	cleanup []func()
}

func newTrial(name string, g *rig) *trial { return &trial{name: name, rig: g} }

// failed is what a trial panics with when it cannot go on.
type failed struct{ error }

func (c *trial) fatalf(format string, args ...any) {
	panic(failed{fmt.Errorf(format, args...)})
}

func (c *trial) check(err error) {
	if err != nil {
		_, file, line, _ := runtime.Caller(1)
		c.fatalf("%s:%d: %w", file[strings.LastIndexByte(file, '/')+1:], line, err)
	}
}

// note writes down what was seen.
func (c *trial) note(format string, args ...any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.notes = append(c.notes, fmt.Sprintf(format, args...))
}

func (c *trial) seen() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return strings.Join(c.notes, ", ")
}

// later runs f when the trial is over.
func (c *trial) later(f func()) { c.cleanup = append(c.cleanup, f) }

func (c *trial) close() {
	for len(c.cleanup) > 0 {
		f := c.cleanup[len(c.cleanup)-1]
		c.cleanup = c.cleanup[:len(c.cleanup)-1]
		f()
	}
}

// until waits for a condition.
func (c *trial) until(what string, condition func() bool) {
	for deadline := time.Now().Add(patience); !condition(); time.Sleep(tick) {
		if time.Now().After(deadline) {
			c.fatalf("waited in vain until %s", what)
		}
	}
}

// within waits some time for something that may not come.
func within(d time.Duration, condition func() bool) bool {
	for deadline := time.Now().Add(d); ; time.Sleep(tick) {
		if condition() {
			return true
		}
		if time.Now().After(deadline) {
			return false
		}
	}
}

// An end is one end of a connection. It sends a stream of known bytes and checks
// those of the other end.
type end struct {
	c         *trial
	fd        int
	peer      *end
	sent, got int64 // positions in its own and the other end's stream
	closed    bool
}

// socketOptions change the sockets of a pair before they are connected.
type socketOptions struct {
	blocking bool
	setup    func(fd int) error // of the listener and of the client
	backlog  int
	client   func(fd int) error // of the client alone
}

// pair makes a connection; a is the end that the trial looks at.
func (c *trial) pair() (a, b *end) { return c.pairWith(socketOptions{}) }

// blockingPair is a pair of blocking sockets.
func (c *trial) blockingPair() (a, b *end) { return c.pairWith(socketOptions{blocking: true}) }

func (c *trial) pairWith(o socketOptions) (a, b *end) {
	l := c.listen(o)
	defer unix.Close(l.FD)
	return c.connect(l, o)
}

// listen listens in the server's pod; the trial closes the descriptor.
func (c *trial) listen(o socketOptions) *traffic.Listener {
	l, err := c.rig.server.host.Listen(netip.AddrPortFrom(c.rig.server.addr(), 0),
		traffic.SocketOptions{Blocking: o.blocking, Setup: o.setup})
	c.check(err)
	if o.backlog > 0 {
		c.check(unix.Listen(l.FD, o.backlog))
	}
	return l
}

// connect connects to the listener and accepts.
func (c *trial) connect(l *traffic.Listener, o socketOptions) (a, b *end) {
	near := c.dial(l, o)
	far := c.accept(l, o)
	return c.ends(near, far)
}

// dial connects from the client's pod.
func (c *trial) dial(l *traffic.Listener, o socketOptions) *end {
	c.gate(true)
	fd := c.socket(c.rig.client, o)
	err := retry(func() error { return unix.Connect(fd, sockaddr(l.Addr)) })
	if err != nil && !errors.Is(err, unix.EINPROGRESS) {
		c.check(err)
	}
	e := &end{c: c, fd: fd}
	c.later(e.close)
	c.connected(e)
	return e
}

// connected waits until a connection is made.
func (c *trial) connected(e *end) {
	got, err := traffic.Poll(e.fd, unix.POLLOUT, patience)
	c.check(err)
	if got&unix.POLLOUT == 0 {
		c.fatalf("not connected in time")
	}
	c.check(e.err())
	c.connections++
}

func (c *trial) socket(p *pod, o socketOptions) int {
	typ := unix.SOCK_STREAM
	if !o.blocking {
		typ |= unix.SOCK_NONBLOCK
	}
	fd, err := p.host.Socket(unix.AF_INET, typ, unix.IPPROTO_TCP)
	c.check(err)
	for _, setup := range []func(int) error{o.setup, o.client} {
		if setup != nil {
			c.check(setup(fd))
		}
	}
	return fd
}

// accept takes the next connection.
func (c *trial) accept(l *traffic.Listener, o socketOptions) *end {
	c.acceptable(l)
	flags := unix.SOCK_CLOEXEC
	if !o.blocking {
		flags |= unix.SOCK_NONBLOCK
	}
	fd, _, err := unix.Accept4(l.FD, flags)
	c.check(err)
	e := &end{c: c, fd: fd}
	c.later(e.close)
	info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
	c.check(err)
	c.late = c.late || info.Total_retrans > 0
	return e
}

// acceptable waits until there is a connection to accept.
func (c *trial) acceptable(l *traffic.Listener) {
	got, err := traffic.Poll(l.FD, unix.POLLIN, patience)
	c.check(err)
	if got == 0 {
		c.fatalf("nothing to accept in time")
	}
}

// gate opens the pods' gate, which only connections of mode switched find closed.
func (c *trial) gate(open bool) {
	if c.rig.mode == switched {
		c.closed = !open
		c.check(c.rig.gate(open))
	}
}

// ends puts the end that the trial looks at first.
func (c *trial) ends(near, far *end) (a, b *end) {
	c.gate(false)
	near.peer, far.peer = far, near
	if c.rig.role == server {
		return far, near
	}
	return near, far
}

// pod is the pod of an end.
func (c *trial) pod(e *end) *pod {
	a, _ := c.rig.client, c.rig.server
	name, err := unix.Getsockname(e.fd)
	c.check(err)
	if addrPort(name).Addr() != a.addr() {
		return c.rig.server
	}
	return a
}

func (e *end) close() {
	if !e.closed {
		e.closed = true
		closeFD(e.fd)
	}
}

// closeFD closes a descriptor while no process is being started: until it executes its
// program, such a process has all of this one's, and a socket would stay open.
func closeFD(fd int) {
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	unix.Close(fd)
}

// period and pattern make the streams: position modulo period.
const period = 65521

var pattern = func() []byte {
	p := make([]byte, period+(1<<20))
	x := uint32(1)
	for i := range p {
		if i >= period {
			p[i] = p[i-period]
			continue
		}
		x = x*1664525 + 1013904223
		p[i] = byte(x >> 24)
	}
	return p
}()

// stream is n bytes, at most 1 MiB, of the stream at a position.
func stream(at int64, n int) []byte {
	from := at % period
	return pattern[from : from+int64(n)]
}

// bytesAt copies any number of bytes of the stream.
func bytesAt(at int64, n int) []byte {
	b := make([]byte, 0, n)
	for len(b) < n {
		b = append(b, stream(at+int64(len(b)), min(n-len(b), 1<<20))...)
	}
	return b
}

// outcome says what became of a call that returns a number of bytes.
func outcome(n int, err error) string {
	var errno unix.Errno
	switch {
	case errors.As(err, &errno):
		return unix.ErrnoName(errno)
	case err != nil:
		return err.Error()
	case n == 1:
		return "1 byte"
	}
	return fmt.Sprintf("%d bytes", n)
}

// errName is outcome of a call without number.
func errName(err error) string {
	if err == nil {
		return "ok"
	}
	return outcome(0, err)
}

// send is one send(2) of the stream's next bytes.
func (e *end) send(n, flags int) string {
	m, err := unix.SendmsgN(e.fd, bytesAt(e.sent, n), nil, nil, flags|unix.MSG_NOSIGNAL)
	if err == nil {
		e.sent += int64(m)
	}
	return outcome(m, err)
}

// recv is one recv(2), whose bytes are checked.
func (e *end) recv(n, flags int) string {
	buf := make([]byte, n)
	m, _, err := unix.Recvfrom(e.fd, buf, flags)
	if err != nil || m == 0 && n > 0 {
		if err == nil {
			return "end"
		}
		return outcome(m, err)
	}
	return e.took(buf[:m], flags&unix.MSG_PEEK != 0)
}

// took checks bytes that were received.
func (e *end) took(buf []byte, peeked bool) string {
	right := string(buf) == string(bytesAt(e.got, len(buf)))
	if !peeked {
		e.got += int64(len(buf))
	}
	if !right {
		return outcome(len(buf), nil) + ", wrong ones"
	}
	return outcome(len(buf), nil)
}

// write sends n bytes, whatever it takes.
func (e *end) write(n int) {
	for buf := bytesAt(e.sent, n); len(buf) > 0; {
		m, err := unix.SendmsgN(e.fd, buf, nil, nil, unix.MSG_NOSIGNAL)
		switch {
		case err == nil:
			e.sent += int64(m)
			buf = buf[m:]
		case errors.Is(err, unix.EAGAIN):
			e.await(unix.POLLOUT)
		case !errors.Is(err, unix.EINTR):
			e.c.fatalf("write: %w", err)
		}
	}
}

// read receives n bytes, whatever it takes.
func (e *end) read(n int) {
	buf := make([]byte, min(n, 1<<20))
	for n > 0 {
		m, _, err := unix.Recvfrom(e.fd, buf[:min(n, len(buf))], unix.MSG_DONTWAIT)
		switch {
		case err == nil && m > 0:
			if s := e.took(buf[:m], false); strings.Contains(s, "wrong") {
				e.c.fatalf("read: %s before byte %d", s, e.got)
			}
			n -= m
		case err == nil:
			e.c.fatalf("read: the stream ends %d bytes early", n)
		case errors.Is(err, unix.EAGAIN):
			e.await(unix.POLLIN)
		case !errors.Is(err, unix.EINTR):
			e.c.fatalf("read: %w", err)
		}
	}
}

// readEnd reads the end of the stream.
func (e *end) readEnd() {
	e.await(unix.POLLIN)
	if s := e.recv(1, unix.MSG_DONTWAIT); s != "end" {
		e.c.fatalf("the stream does not end: %s", s)
	}
}

// await waits until poll(2) reports one of the events.
func (e *end) await(events int16) {
	got, err := traffic.Poll(e.fd, events, patience)
	e.c.check(err)
	if got == 0 {
		e.c.fatalf("poll says nothing of %s at %s", eventNames(events), e.state())
	}
}

// state describes both ends for whoever has to find out why they do not go on.
func (e *end) state() string {
	var s []string
	for _, e := range []*end{e, e.peer} {
		if e == nil || e.closed {
			s = append(s, "(closed)")
			continue
		}
		info, err := unix.GetsockoptTCPInfo(e.fd, unix.IPPROTO_TCP, unix.TCP_INFO)
		if err != nil {
			s = append(s, err.Error())
			continue
		}
		s = append(s, fmt.Sprintf("(sent %d, got %d; poll %s, to read %s, to send %s, not sent %s, charged %d; state %d, unacknowledged %d, "+
			"lost %d, probes %d, backoff %d, retransmitted %d, received %d bytes by TCP, sent %d, window here %d, there %d)",
			e.sent, e.got, e.poll(allEvents), e.ioctl(unix.TIOCINQ), e.ioctl(unix.TIOCOUTQ), e.ioctl(siocOutQNSD), e.meminfo(), info.State,
			info.Unacked, info.Lost, info.Probes, info.Backoff, info.Total_retrans, info.Bytes_received, info.Bytes_sent, info.Rcv_wnd, info.Snd_wnd))
	}
	out := strings.Join(s, ", ")
	if e.c.rig.set != nil {
		n, err := e.c.rig.set.Counters()
		if err == nil {
			out += "; counted so far: " + nonZero(n)
		}
	}
	return out
}

// poll is what poll(2) says at once.
func (e *end) poll(events int16) string {
	got, err := traffic.Poll(e.fd, events, 0)
	e.c.check(err)
	return eventNames(got)
}

const allEvents = unix.POLLIN | unix.POLLPRI | unix.POLLOUT | unix.POLLRDHUP

func eventNames(events int16) string {
	var names []string
	for _, n := range []struct {
		event int16
		name  string
	}{
		{unix.POLLIN, "IN"}, {unix.POLLPRI, "PRI"}, {unix.POLLOUT, "OUT"}, {unix.POLLERR, "ERR"},
		{unix.POLLHUP, "HUP"}, {unix.POLLNVAL, "NVAL"}, {unix.POLLRDHUP, "RDHUP"},
	} {
		if events&n.event != 0 {
			names = append(names, n.name)
		}
	}
	if names == nil {
		return "nothing"
	}
	return strings.Join(names, "|")
}

// arrived waits until everything that the end has sent is where the other end can
// read it: redirected bytes are at once, others once they are acknowledged.
func (e *end) arrived() {
	e.c.until("all bytes are acknowledged", func() bool {
		n, err := unix.IoctlGetInt(e.fd, unix.TIOCOUTQ)
		e.c.check(err)
		return n == 0
	})
}

// deliver writes n bytes and waits until they have arrived.
func (e *end) deliver(n int) {
	e.write(n)
	e.arrived()
}

// warm sends a little in both directions: from then on, a client knows its peer.
func (e *end) warm() {
	e.write(10)
	e.peer.read(10)
	e.peer.write(10)
	e.read(10)
}

func (e *end) shutdown(how int) string { return errName(unix.Shutdown(e.fd, how)) }

// err is SO_ERROR.
func (e *end) err() error {
	n, err := unix.GetsockoptInt(e.fd, unix.SOL_SOCKET, unix.SO_ERROR)
	if err == nil && n != 0 {
		err = unix.Errno(n)
	}
	return err
}

func (e *end) set(level, option, value int) {
	e.c.check(unix.SetsockoptInt(e.fd, level, option, value))
}

func (e *end) get(level, option int) int {
	n, err := unix.GetsockoptInt(e.fd, level, option)
	e.c.check(err)
	return n
}

func (e *end) ioctl(request uint) string {
	n, err := unix.IoctlGetInt(e.fd, request)
	if err != nil {
		return errName(err)
	}
	return strconv.Itoa(n)
}

// reset closes with RST.
func (e *end) reset() {
	e.c.check(unix.SetsockoptLinger(e.fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}))
	e.close()
}

// fill writes until the socket takes no more, which must happen.
func (e *end) fill() {
	const most = 256 << 20
	refused := 0
	deadline := time.Now().Add(patience)
	for start := e.sent; e.sent-start < most; {
		m, err := unix.SendmsgN(e.fd, stream(e.sent, 64<<10), nil, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
		if errors.Is(err, unix.EAGAIN) {
			// Acknowledgements that are under way make room, on a busy machine after
			// a long time; and so do the probes that use up the rest of the
			// receiver's window.
			if refused++; !e.stopped() {
				refused = 0
			}
			if refused == 5 {
				return
			}
			if time.Now().After(deadline) {
				e.c.fatalf("the socket has neither room nor a shut window: %s", e.state())
			}
			_, err := traffic.Poll(e.fd, unix.POLLOUT, 50*time.Millisecond)
			e.c.check(err)
			continue
		}
		e.c.check(err)
		e.sent += int64(m)
		refused = 0
	}
	e.c.fatalf("the socket took %d bytes that nobody reads", most)
}

// stopped tells if the receiver keeps the end from sending: its window is shut, or what
// it was sent is acknowledged and the rest does not fit the window, or it drops what it
// is sent, as it does where redirected bytes fill its buffer.
func (e *end) stopped() bool {
	const unanswered = 6 // retransmissions: more than a second
	info, err := unix.GetsockoptTCPInfo(e.fd, unix.IPPROTO_TCP, unix.TCP_INFO)
	e.c.check(err)
	return info.Snd_wnd == 0 || info.Unacked == 0 && info.Notsent_bytes > 0 || info.Backoff >= unanswered
}

// A call is a system call on a thread of its own, which may block.
type call struct {
	c    *trial
	nr   int
	tid  int
	done chan string
	got  string
	over bool
}

// start makes a system call with that number on a new thread.
func (c *trial) start(nr int, f func() string) *call {
	k := &call{c: c, nr: nr, done: make(chan string, 1)}
	started := make(chan int)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		started <- unix.Gettid()
		defer func() {
			if r := recover(); r != nil {
				k.done <- fmt.Sprint(r)
			}
		}()
		k.done <- f()
	}()
	k.tid = <-started
	return k
}

// returned tells if the call is over.
func (k *call) returned() bool {
	if !k.over {
		select {
		case k.got = <-k.done:
			k.over = true
		default:
		}
	}
	return k.over
}

// blocked waits until the thread sleeps in its system call, or the call is over.
func (k *call) blocked() bool {
	task := fmt.Sprintf("/proc/self/task/%d/", k.tid)
	asleep := false
	k.c.until("the call blocks or returns", func() bool {
		if k.returned() {
			return true
		}
		stat, err := os.ReadFile(task + "stat")
		if err != nil || len(stat) == 0 {
			return false
		}
		// proc_pid_stat(5): the state follows the name in parentheses.
		_, after, _ := strings.Cut(string(stat), ") ")
		nr, err := os.ReadFile(task + "syscall")
		asleep = err == nil && (after[0] == 'S' || after[0] == 'D') && strings.HasPrefix(string(nr), strconv.Itoa(k.nr)+" ")
		return asleep
	})
	return asleep
}

// mustBlock is for calls that have to wait for what comes next.
func (k *call) mustBlock() {
	if !k.blocked() {
		k.c.fatalf("the call did not block: %s", k.got)
	}
}

// result waits for the call's end.
func (k *call) result() string {
	if !within(patience, k.returned) {
		return "never returns"
	}
	return k.got
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
}

func addrPort(sa unix.Sockaddr) netip.AddrPort {
	if sa, ok := sa.(*unix.SockaddrInet4); ok {
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	}
	return netip.AddrPort{}
}

func retry(f func() error) error {
	for {
		if err := f(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// switches is how often the thread has gone to sleep, or could have.
func (k *call) switches() string {
	status, err := os.ReadFile(fmt.Sprintf("/proc/self/task/%d/status", k.tid))
	if err != nil {
		return ""
	}
	_, n, _ := strings.Cut(string(status), "\nvoluntary_ctxt_switches:")
	n, _, _ = strings.Cut(n, "\n")
	return n
}
