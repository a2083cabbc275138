package bench

import (
	"errors"
	"fmt"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Many connections at once are served by one thread on each side with a
// level-triggered epoll(7), as event loops do. A latency then includes the wait for the
// other connections' turns.

// A poller waits for any of several sockets.
type poller struct {
	fd      int
	events  []unix.EpollEvent
	sockets []*socket
}

func newPoller(sockets []*socket) (*poller, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("make an epoll: %w", err)
	}
	p := &poller{fd, make([]unix.EpollEvent, len(sockets)), sockets}
	for i, s := range sockets {
		// Fd is the user's data: here the index of the socket.
		if err := unix.EpollCtl(fd, unix.EPOLL_CTL_ADD, s.fd, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(i)}); err != nil {
			p.close()
			return nil, fmt.Errorf("add to an epoll: %w", err)
		}
	}
	return p, nil
}

func (p *poller) close() { unix.RawSyscall(unix.SYS_CLOSE, uintptr(p.fd), 0, 0) }

// wait calls ready with each socket that has something to read.
func (p *poller) wait(ready func(i int, s *socket) error) error {
	n, _, e := unix.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(p.fd), uintptr(unsafe.Pointer(&p.events[0])), uintptr(len(p.events)), ^uintptr(0), 0, 0)
	if e == unix.EINTR {
		return nil
	}
	if e != 0 {
		return fmt.Errorf("wait for sockets: %w", e)
	}
	for _, event := range p.events[:n] {
		if err := ready(int(event.Fd), p.sockets[event.Fd]); err != nil {
			return err
		}
	}
	return nil
}

func closeAll(sockets []*socket) {
	for _, s := range sockets {
		s.close()
	}
}

// manyClient is the client's side of several connections.
func (g *generator) manyClient(server endpoint) (err error) {
	var sockets []*socket
	defer func() { closeAll(sockets) }()
	for range g.point.Connections {
		s, err := g.connect(server)
		if err != nil {
			return err
		}
		sockets = append(sockets, s)
	}
	g.open()
	if g.point.Test == Stream {
		err = g.streamOut(sockets...)
	} else {
		err = g.manyRequests(sockets)
	}
	for _, s := range sockets {
		if err == nil {
			err = g.finish(s)
		}
		err = errors.Join(err, g.tally.add(s, true))
	}
	return err
}

func (g *generator) manyRequests(sockets []*socket) error {
	p, err := newPoller(sockets)
	if err != nil {
		return err
	}
	defer p.close()
	request, response := message(g.point.RequestBytes), message(g.point.ResponseBytes)
	g.tally.Latency = newHistogram()
	before := make([]time.Duration, len(sockets))
	for i, s := range sockets {
		before[i] = g.now()
		if err := s.send(request); err != nil {
			return err
		}
	}
	for outstanding := len(sockets); outstanding > 0; {
		err := p.wait(func(i int, s *socket) error {
			if ok, err := s.recvFull(response); err != nil || !ok {
				return errors.Join(errors.New("no response"), err)
			}
			now := g.now()
			if !g.transaction(before[i], now) {
				outstanding--
				return nil
			}
			before[i] = now
			return s.send(request)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// manyServer accepts the point's connections, and serves them until all have ended or
// the listener is shut down before all are there.
func (g *generator) manyServer(l *socket) error {
	var sockets []*socket
	defer func() { closeAll(sockets) }()
	for range g.point.Connections {
		s, err := l.accept()
		if errors.Is(err, errStopped) {
			return nil
		}
		if err != nil {
			return err
		}
		sockets = append(sockets, s)
	}
	g.open()
	p, err := newPoller(sockets)
	if err != nil {
		return err
	}
	defer p.close()
	request, response := message(g.point.RequestBytes), message(g.point.ResponseBytes)
	serve := func(s *socket) (more bool, err error) {
		if more, err = s.recvFull(request); more && err == nil {
			err = s.send(response)
		}
		return more, err
	}
	if g.point.Test == Stream {
		buf := make([]byte, streamBuffer)
		serve = func(s *socket) (bool, error) { return g.streamRead(s, buf) }
	}
	for open := len(sockets); open > 0; {
		err := p.wait(func(_ int, s *socket) error {
			more, err := serve(s)
			if err != nil || more {
				return err
			}
			open--
			if err := unix.EpollCtl(p.fd, unix.EPOLL_CTL_DEL, s.fd, nil); err != nil {
				return fmt.Errorf("remove from an epoll: %w", err)
			}
			// The client waits for the end.
			return errors.Join(g.tally.add(s, true), s.shutdownWrite())
		})
		if err != nil {
			return err
		}
	}
	// As with one connection, it ends by being told to.
	if s, err := l.accept(); !errors.Is(err, errStopped) {
		if err == nil {
			s.close()
			err = errors.New("one connection too many")
		}
		return err
	}
	return nil
}
