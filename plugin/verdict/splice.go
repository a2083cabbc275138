package verdict

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/plugin/uring"
)

// What the calls that splice do where bytes wait.
const (
	spliceRefused = "refused" // all say EINVAL: callers read(2) instead
	spliceWorks   = "works"   // all move the bytes
	spliceBlind   = "blind"   // at least one does not see them
)

const spliceSize = 700

// splicer is a call that moves up to n bytes from a descriptor to a pipe. It says EAGAIN,
// or 0, where it sees none.
type splicer struct {
	name string
	move func(in, out, n int) (int, error)
}

var splicers = []splicer{
	{"splice(2)", func(in, out, n int) (int, error) {
		moved, err := unix.Splice(in, nil, out, nil, n, unix.SPLICE_F_NONBLOCK)
		return int(moved), err
	}},
	{"sendfile(2)", func(in, out, n int) (int, error) { return unix.Sendfile(out, in, nil, n) }},
}

// spliceFrom lets bytes wait on a connection and tries to move them to a pipe.
func spliceFrom(l lab) (finding, error) {
	calls := splicers
	ring, why := l.ringSplicer()
	if why == "" {
		calls = append(slices.Clip(calls), ring)
	}
	f, err := l.spliceBy(calls)
	f.NoRing = why
	return f, err
}

// ringSplicer is io_uring's splice, or why it cannot be tried. The guard has to find
// out in another way that it is at work: a kernel thread moves the bytes.
func (l lab) ringSplicer() (s splicer, why string) {
	s = splicer{"io_uring's splice", l.spliceByRing}
	// The guard has no say in what goes from pipe to pipe.
	r, w, closePipe, err := newPipe()
	if err != nil {
		return s, err.Error()
	}
	defer closePipe()
	_, out, closeOther, err := newPipe()
	if err != nil {
		return s, err.Error()
	}
	defer closeOther()
	if _, err := unix.Write(w, []byte{1}); err != nil {
		return s, fmt.Sprintf("write a pipe: %v", err)
	}
	switch n, err := s.move(r, out, 1); {
	case errors.Is(err, uring.ErrRefused):
		return s, err.Error()
	case err != nil:
		return s, fmt.Sprintf("not even from pipe to pipe: %v", err)
	case n != 1:
		return s, fmt.Sprintf("from pipe to pipe it moves %d of 1 bytes", n)
	}
	return s, ""
}

func (l lab) spliceByRing(in, out, n int) (moved int, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and ends the thread, see uring.Ring
		moved, err = l.requestSplice(in, out, n)
	}()
	<-done
	return moved, err
}

func (l lab) requestSplice(in, out, n int) (moved int, err error) {
	ring, err := uring.New()
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, ring.Close()) }()
	err = ring.Submit(uring.Request{
		Op: uring.OpSplice, FD: int32(out), Offset: uring.NoOffset, Addr: uring.NoOffset,
		Len: uint32(n), Flags: unix.SPLICE_F_NONBLOCK, SpliceFD: int32(in),
	}, nil)
	if err != nil {
		return 0, err
	}
	var res int32
	ok, err := l.until(time.Until(l.deadline), func() (ok bool, err error) {
		res, ok, err = ring.Poll()
		return ok, err
	})
	switch {
	case err != nil:
		return 0, err
	case !ok:
		return 0, errDeadline
	case res < 0:
		return 0, unix.Errno(-res)
	}
	return int(res), nil
}

// spliceBy tries each of the calls.
func (l lab) spliceBy(calls []splicer) (finding, error) {
	f := finding{Connections: 1}
	client, server, err := l.connect(overIPv4())
	if err != nil {
		return finding{}, err
	}
	defer client.close()
	defer server.close()
	content := newPattern(6)
	outcomes := map[string]bool{}
	for i, call := range calls {
		msg := content.at(i*spliceSize, spliceSize)
		if err := l.send(client, msg); err != nil {
			return f, err
		}
		f.Sent += spliceSize
		// By TCP they take a moment to arrive.
		if _, err := l.wait(server, unix.POLLIN); err != nil {
			return f, err
		}
		outcome, err := l.move(server, msg, call)
		if err != nil {
			return asFault(f, err)
		}
		outcomes[outcome] = true
		if outcome != spliceRefused {
			f.NotRefused = append(f.NotRefused, call.name)
		}
	}
	f.Spliced = spliceBlind
	for _, same := range []string{spliceRefused, spliceWorks} {
		if len(outcomes) == 1 && outcomes[same] {
			f.Spliced = same
		}
	}
	for _, call := range calls {
		if f.Fault, err = spliceElsewhere(call); f.Fault != "" || err != nil {
			return f, err
		}
	}
	return f, f.settled(client)
}

// move moves the message that waits to a pipe, or else receives it.
func (l lab) move(from sock, msg []byte, call splicer) (outcome string, err error) {
	r, w, closePipe, err := newPipe()
	if err != nil {
		return "", err
	}
	defer closePipe()
	n, err := call.move(from.fd, w, len(msg))
	switch {
	case errors.Is(err, unix.EINVAL):
		return spliceRefused, l.expect(from, msg)
	case errors.Is(err, unix.EAGAIN) || err == nil && n == 0:
		return spliceBlind, l.expect(from, msg)
	case err != nil:
		return "", fmt.Errorf("%s: %w", call.name, err)
	}
	buf := make([]byte, n)
	if _, err := unix.Read(r, buf); err != nil {
		return "", fmt.Errorf("read a pipe: %w", err)
	}
	if string(buf) != string(msg[:n]) {
		return "", fmt.Errorf("%w: %s moved others", errWrong, call.name)
	}
	return spliceWorks, l.expect(from, msg[n:])
}

// newPipe makes a pipe that does not block.
func newPipe() (r, w int, closePipe func(), err error) {
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_NONBLOCK|unix.O_CLOEXEC); err != nil {
		return 0, 0, nil, fmt.Errorf("pipe: %w", err)
	}
	return p[0], p[1], func() { unix.Close(p[0]); unix.Close(p[1]) }, nil
}

// spliceElsewhere returns a fault if the call does not work on a socket that nobody
// accelerates.
func spliceElsewhere(call splicer) (fault string, err error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return "", fmt.Errorf("socketpair: %w", err)
	}
	defer unix.Close(pair[0])
	defer unix.Close(pair[1])
	_, w, closePipe, err := newPipe()
	if err != nil {
		return "", err
	}
	defer closePipe()
	if _, err := unix.Write(pair[0], []byte{1}); err != nil {
		return "", fmt.Errorf("write: %w", err)
	}
	n, err := call.move(pair[1], w, 1)
	if errors.Is(err, errDeadline) {
		return "", fmt.Errorf("%s: %w", call.name, err)
	}
	if err != nil || n != 1 {
		return fmt.Sprintf("%s from a socket that is not accelerated fails: %v", call.name, err), nil
	}
	return "", nil
}

// proxySize is what goes through the proxy each way.
const proxySize = 60_000

// proxy sends through a Go proxy, which moves bytes from connection to connection
// with splice(2) as long as that is not refused.
func proxy(l lab) (finding, error) {
	f := finding{Connections: 2}
	client, front, err := l.dialGo()
	if err != nil {
		return f, err
	}
	defer client.Close()
	defer front.Close()
	back, server, err := l.dialGo()
	if err != nil {
		return f, err
	}
	defer back.Close()
	defer server.Close()
	var copying sync.WaitGroup
	defer copying.Wait() // after the connections are closed
	defer func() {
		for _, c := range []net.Conn{client, front, back, server} {
			c.Close()
		}
	}()
	for _, way := range []struct{ to, from *net.TCPConn }{{back, front}, {front, back}} {
		copying.Go(func() {
			if _, err := io.Copy(way.to, way.from); err == nil {
				_ = way.to.CloseWrite()
			}
		})
	}
	content := newPattern(8)
	msg := content.at(0, proxySize)
	for _, way := range []struct{ from, to *net.TCPConn }{{client, server}, {server, client}} {
		if err := through(way.from, way.to, msg); err != nil {
			return asFault(f, err)
		}
		f.Sent += 2 * proxySize // by its sender and by the proxy
	}
	if err := f.settledGo(client, front, back, server); err != nil { // before FIN
		return f, err
	}
	for _, way := range []struct{ from, to *net.TCPConn }{{client, server}, {server, client}} {
		if err := way.from.CloseWrite(); err != nil {
			return f, err
		}
		if n, err := way.to.Read(make([]byte, 1)); errors.Is(err, os.ErrDeadlineExceeded) {
			return f, fmt.Errorf("the end of the stream: %w", errDeadline)
		} else if n != 0 || err != io.EOF {
			return asFault(f, fmt.Errorf("%w: %d bytes, %v where the stream should end", errWrong, n, err))
		}
	}
	return f, nil
}

// through sends and receives at once: what is on the way may be more than fits.
func through(from, to *net.TCPConn, msg []byte) error {
	sent := make(chan error, 1)
	go func() {
		_, err := from.Write(msg)
		sent <- err
	}()
	buf := make([]byte, len(msg))
	n, err := io.ReadFull(to, buf)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return fmt.Errorf("%w: %d of %d bytes arrived", errDeadline, n, len(msg))
	}
	if err != nil {
		return fmt.Errorf("%w: %d of %d bytes arrived: %w", errWrong, n, len(msg), err)
	}
	if string(buf) != string(msg) {
		return fmt.Errorf("%w: the content of %d bytes differs", errWrong, len(msg))
	}
	return <-sent
}

// dialGo makes a connection of Go's own, as most proxies have.
func (l lab) dialGo() (client, server *net.TCPConn, err error) {
	ctx, cancel := context.WithDeadline(context.Background(), l.deadline)
	defer cancel()
	var lc net.ListenConfig
	lc.SetMultipathTCP(false) // whether that is safe is another question
	listener, err := lc.Listen(ctx, "tcp4", "127.0.0.1:0")
	if err != nil {
		return nil, nil, err
	}
	defer listener.Close()
	if err := listener.(*net.TCPListener).SetDeadline(l.deadline); err != nil {
		return nil, nil, err
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp4", listener.Addr().String())
	if err != nil {
		return nil, nil, err
	}
	client = conn.(*net.TCPConn)
	accepted, err := listener.Accept()
	if err == nil {
		server = accepted.(*net.TCPConn)
		err = errors.Join(client.SetDeadline(l.deadline), server.SetDeadline(l.deadline))
	}
	if err != nil {
		client.Close()
		return nil, nil, err
	}
	return client, server, nil
}

// settledGo is settled for Go's connections.
func (f *finding) settledGo(conns ...*net.TCPConn) error {
	for _, c := range conns {
		raw, err := c.SyscallConn()
		if err != nil {
			return err
		}
		var settleErr error
		if err := raw.Control(func(fd uintptr) { settleErr = f.settled(sock{int(fd)}) }); err != nil {
			return err
		}
		if settleErr != nil {
			return settleErr
		}
	}
	return nil
}
