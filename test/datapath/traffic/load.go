package traffic

import (
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"
)

// A Load is traffic in both directions of some connections that goes on until it
// is stopped.
type Load struct {
	stop     chan struct{}
	received []atomic.Int64 // by each end of each connection
	wg       sync.WaitGroup
	mu       sync.Mutex
	errs     []error
}

// StartLoad starts traffic as the plan says, but for Bytes, Open and Seed. The
// caller stops it and closes the connections.
func StartLoad(pairs [][2]*Conn, p Plan) *Load {
	l := &Load{stop: make(chan struct{}), received: make([]atomic.Int64, 2*len(pairs))}
	for i, pair := range pairs {
		for end := range pair {
			p.Seed = uint64(2*i + end)
			from, to, received := pair[end], pair[1-end], &l.received[2*i+end]
			l.wg.Go(func() { l.direction(from, to, p, received) })
		}
	}
	return l
}

func (l *Load) direction(from, to *Conn, p Plan, received *atomic.Int64) {
	sent := make(chan int64, 1)
	l.wg.Go(func() {
		n, err := l.send(from, p)
		l.failed(p, err)
		sent <- n
	})
	got, err := l.receive(to, p, received)
	l.failed(p, err)
	if want := <-sent; err == nil && want != got {
		l.failed(p, fmt.Errorf("%w: %d bytes arrived of %d", ErrCorrupt, got, want))
	}
}

func (l *Load) failed(p Plan, err error) {
	if err == nil {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.errs = append(l.errs, fmt.Errorf("direction %d: %w", p.Seed, err))
}

func (l *Load) send(c *Conn, p Plan) (int64, error) {
	r, s := p.random(1), NewStream(p.Seed)
	buf := make([]byte, p.MaxWrite)
	for {
		select {
		case <-l.stop:
			return s.At(), c.CloseWrite()
		default:
		}
		msg := buf[:size(r, p.MaxWrite)]
		s.Next(msg)
		if _, err := c.Write(msg); err != nil {
			return s.At(), fmt.Errorf("send: %w", err)
		}
		if p.Paced > 0 {
			time.Sleep(time.Duration(r.Int64N(int64(2 * p.Paced))))
		}
	}
}

func (l *Load) receive(c *Conn, p Plan, received *atomic.Int64) (int64, error) {
	s, buf := NewStream(p.Seed), make([]byte, 64<<10)
	for {
		n, err := c.Read(buf)
		if err := s.Check(buf[:n]); err != nil {
			return s.At(), err
		}
		received.Store(s.At())
		if errors.Is(err, io.EOF) {
			return s.At(), nil
		}
		if err != nil {
			return s.At(), fmt.Errorf("receive after %d bytes: %w", s.At(), err)
		}
	}
}

// Received is how many bytes have arrived in each direction of each connection.
func (l *Load) Received() []int64 {
	n := make([]int64, len(l.received))
	for i := range n {
		n[i] = l.received[i].Load()
	}
	return n
}

// Err says what has gone wrong so far.
func (l *Load) Err() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return errors.Join(l.errs...)
}

// Stop ends the traffic, waits until everything has arrived, and says what went
// wrong.
func (l *Load) Stop() error {
	close(l.stop)
	l.wg.Wait()
	return l.Err()
}
