package bench

import (
	"bytes"
	"errors"
	"sync/atomic"
	"time"
)

const (
	// streamBuffer is what a stream's reader offers to each recv, as netperf does by
	// default (its receive size is the default SO_RCVBUF).
	streamBuffer = 128 << 10
	// tcpInfoEvery is which connections of a crr run are asked for TCP_INFO:
	// asking each one would add a system call to what is measured.
	tcpInfoEvery = 16
)

// streamSlack is how much longer than its own window a stream's client sends: the
// server's window begins when it has accepted the connection.
const streamSlack = 3 * time.Millisecond

// message returns a message to send. It has been written to: the pages of fresh memory
// are all the same page of zeroes, which stays in the CPU's nearest cache and makes
// copying big messages cheaper than an application has it.
func message(size int) []byte {
	const pattern = "skipstack bench "
	return bytes.Repeat([]byte(pattern), size/len(pattern)+1)[:size]
}

// A window is when a run counts. Each side has its own, from its first connection on.
type window struct{ from, until time.Duration }

// A tally is what one side of a run did.
type tally struct {
	// In the window.
	Transactions uint64     `json:"transactions"` // client of rr and crr
	Read         uint64     `json:"read"`         // bytes; server of a stream
	Elapsed      int64      `json:"elapsed_ns"`   // from the first to the last thing counted
	CPU          cpuTime    `json:"cpu"`
	Latency      *histogram `json:"latency,omitempty"`

	// In the whole run, warm-up included.
	Sent     uint64 `json:"sent"`     // payload bytes
	Received uint64 `json:"received"` // payload bytes
	TCPSent  uint64 `json:"tcp_sent"` // payload bytes that went by TCP
	Asked    uint64 `json:"asked"`    // payload bytes sent by the connections that TCPSent covers
	Conns    uint64 `json:"conns"`
	Again    uint64 `json:"again"` // EAGAIN from blocking sockets
}

// add adds a connection that is about to be closed.
func (t *tally) add(s *socket, askTCP bool) error {
	t.Sent += s.sent
	t.Received += s.received
	t.Again += s.again
	t.Conns++
	if askTCP {
		sent, err := s.tcpSent()
		if err != nil {
			return err
		}
		t.TCPSent += sent
		t.Asked += s.sent
	}
	return nil
}

// A generator runs one side of one point on a locked thread.
type generator struct {
	point       Point
	nonBlocking bool
	congestion  string // TCP's congestion control; empty: the default
	verify      bool   // the verification pass instead of the point's test
	warmUp      time.Duration
	length      time.Duration
	token       []byte        // connections begin with it; in a crr run it is part of the request
	opened      chan<- window // gets the window when it is known; has room for it
	tally       tally

	base    time.Time
	window  window
	started time.Duration // when the first thing was counted
}

// now reads the clock, by the vDSO and not by a system call.
func (g *generator) now() time.Duration { return time.Since(g.base) }

// open fixes the window when the first connection is there.
func (g *generator) open() {
	if g.window.until == 0 {
		from := g.now() + g.warmUp
		g.window = window{from, from + g.length}
		g.opened <- g.window
	}
}

// client runs the client's side against a server.
func (g *generator) client(server endpoint) error {
	if g.point.Test == ConnectRequestResponse && !g.verify {
		return g.connectRequestResponse(server)
	}
	if g.point.Connections > 1 && !g.verify {
		return g.manyClient(server)
	}
	s, err := g.connect(server)
	if err != nil {
		return err
	}
	defer s.close()
	g.open()
	switch {
	case g.verify:
		err = verify(s, true)
	case g.point.Test == Stream:
		err = g.streamOut(s)
	default:
		err = g.requestResponse(s)
	}
	if err == nil {
		err = g.finish(s)
	}
	return errors.Join(err, g.tally.add(s, true))
}

func (g *generator) connect(server endpoint) (*socket, error) {
	s, err := newSocket(server.domain(), g.nonBlocking)
	if err != nil {
		return nil, err
	}
	if g.point.NoDelay {
		err = s.setNoDelay()
	}
	if err == nil {
		err = s.setCongestionControl(g.congestion)
	}
	if err == nil {
		err = s.connect(server.sockaddr())
	}
	if err == nil && len(g.token) > 0 && !g.tokenInRequest() {
		err = s.send(g.token)
	}
	if err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

// finish ends the connection in order: after it, the server has read everything.
func (g *generator) finish(s *socket) error {
	if err := s.shutdownWrite(); err != nil {
		return err
	}
	switch n, err := s.recv(make([]byte, 1)); {
	case err != nil:
		return err
	case n > 0:
		return errors.New("the server sent more than it was asked for")
	}
	return nil
}

// transaction counts one transaction of the client; more is false after the window.
func (g *generator) transaction(before, now time.Duration) (more bool) {
	switch {
	case g.started != 0:
		if now > g.window.until {
			return false
		}
		g.tally.Transactions++
		g.tally.Latency.add(int64(now - before))
		g.tally.Elapsed = int64(now - g.started)
	case now >= g.window.from:
		g.started = now
	}
	return true
}

func (g *generator) requestResponse(s *socket) error {
	request, response := message(g.point.RequestBytes), message(g.point.ResponseBytes)
	g.tally.Latency = newHistogram()
	for before := g.now(); ; {
		if err := s.send(request); err != nil {
			return err
		}
		if ok, err := s.recvFull(response); err != nil || !ok {
			return errors.Join(errors.New("no response"), err)
		}
		now := g.now()
		if !g.transaction(before, now) {
			return nil
		}
		before = now
	}
}

func (g *generator) connectRequestResponse(server endpoint) error {
	request, response := message(g.point.RequestBytes), message(g.point.ResponseBytes)
	copy(request, g.token)
	g.tally.Latency = newHistogram()
	for before := g.now(); ; {
		s, err := g.connect(server)
		if err != nil {
			return err
		}
		g.open()
		if err := s.send(request); err != nil {
			s.close()
			return err
		}
		if ok, err := s.recvFull(response); err != nil || !ok {
			s.close()
			return errors.Join(errors.New("no response"), err)
		}
		if err := g.tally.add(s, g.tally.Conns%tcpInfoEvery == 0); err != nil {
			s.close()
			return err
		}
		s.close()
		now := g.now()
		if !g.transaction(before, now) {
			return nil
		}
		before = now
	}
}

// streamOut sends in turn on each connection until the window is over. The server
// counts what arrives.
func (g *generator) streamOut(sockets ...*socket) error {
	data := message(g.point.RequestBytes)
	var over atomic.Bool
	timer := time.AfterFunc(g.warmUp+g.length+streamSlack, func() { over.Store(true) })
	defer timer.Stop()
	for !over.Load() {
		for _, s := range sockets {
			if err := s.send(data); err != nil {
				return err
			}
		}
	}
	return nil
}

// server serves connections one after the other until the listener is shut down.
func (g *generator) server(l *socket) error {
	if g.point.Connections > 1 && !g.verify {
		return g.manyServer(l)
	}
	for {
		s, err := l.accept()
		if errors.Is(err, errStopped) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := g.serve(s, g.respond); err != nil {
			return err
		}
	}
}

// serve serves one connection and closes it; respond serves one of rr and crr.
func (g *generator) serve(s *socket, respond func(*socket) error) error {
	defer s.close()
	g.open()
	var err error
	switch {
	case g.verify:
		err = verify(s, false)
	case g.point.Test == Stream:
		err = g.streamIn(s)
	default:
		err = respond(s)
	}
	return errors.Join(err, g.tally.add(s, g.point.Test != ConnectRequestResponse || g.tally.Conns%tcpInfoEvery == 0))
}

// respond answers requests until the client has ended the stream.
func (g *generator) respond(s *socket) error {
	request, response := message(g.point.RequestBytes), message(g.point.ResponseBytes)
	for {
		ok, err := s.recvFull(request)
		if err != nil || !ok {
			return err
		}
		if err := s.send(response); err != nil {
			return err
		}
	}
}

// streamIn reads to the end of the stream and counts what it read in the window.
func (g *generator) streamIn(s *socket) error {
	buf := make([]byte, streamBuffer)
	for {
		if more, err := g.streamRead(s, buf); err != nil || !more {
			return err
		}
	}
}

// streamRead reads once; more is false at the end of the stream.
func (g *generator) streamRead(s *socket, buf []byte) (more bool, err error) {
	n, err := s.recv(buf)
	if err != nil {
		return false, err
	}
	now := g.now()
	switch {
	case now > g.window.until:
	case g.started != 0:
		g.tally.Read += uint64(n)
		g.tally.Elapsed = int64(now - g.started)
	case now >= g.window.from:
		g.started = now
	}
	return n > 0, nil
}
