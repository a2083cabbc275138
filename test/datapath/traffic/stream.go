package traffic

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"math/rand/v2"
	"time"
)

// ErrCorrupt is returned where bytes that arrived are not those that were sent.
var ErrCorrupt = errors.New("corrupt stream")

// A Stream is an endless sequence of random bytes that its seed determines.
type Stream struct {
	seed   uint64
	source *rand.ChaCha8
	at     int64
	expect []byte
}

// NewStream returns the stream of that seed, at its beginning.
func NewStream(seed uint64) *Stream {
	var key [32]byte
	binary.LittleEndian.PutUint64(key[:], seed)
	return &Stream{seed: seed, source: rand.NewChaCha8(key)}
}

// At is how many bytes have been taken.
func (s *Stream) At() int64 { return s.at }

// Next fills p with the next bytes.
func (s *Stream) Next(p []byte) {
	_, _ = s.source.Read(p) // never fails
	s.at += int64(len(p))
}

// Check takes the next len(p) bytes and compares them with p. The error wraps
// [ErrCorrupt] and tells where in the stream the wrong bytes belong.
func (s *Stream) Check(p []byte) error {
	if len(p) == 0 {
		return nil
	}
	if cap(s.expect) < len(p) {
		s.expect = make([]byte, len(p))
	}
	want := s.expect[:len(p)]
	before := s.at
	s.Next(want)
	if bytes.Equal(want, p) {
		return nil
	}
	i := 0
	for p[i] == want[i] {
		i++
	}
	return fmt.Errorf("%w at byte %d: %s", ErrCorrupt, before+int64(i), s.locate(p[i:], before+int64(i)))
}

// locate says where in the stream some bytes come from.
func (s *Stream) locate(p []byte, at int64) string {
	const sample, beyond = 16, 32 << 20
	if len(p) < sample {
		return fmt.Sprintf("%d wrong bytes", len(p))
	}
	all := make([]byte, at+beyond)
	NewStream(s.seed).Next(all)
	i := int64(bytes.Index(all, p[:sample]))
	switch {
	case i < 0:
		return "bytes of no part of the stream"
	case i < at:
		return fmt.Sprintf("%d bytes back, read twice", at-i)
	default:
		return fmt.Sprintf("%d bytes ahead, read too early or after a loss", i-at)
	}
}

// A Plan describes one direction of a connection.
type Plan struct {
	Seed     uint64 // of the stream, the sizes and the pauses
	Bytes    int64
	MaxWrite int           // sizes of writes are 1 to MaxWrite, small ones as often as large ones
	Slow     bool          // the reader pauses and reads little at a time
	Open     bool          // the writer does not shut down sending at the end
	Paced    time.Duration // the writer's mean pause between two writes
}

func (p Plan) random(salt uint64) *rand.Rand { return rand.New(rand.NewPCG(p.Seed, salt)) }

// size is from 1 to most, each power of two equally likely.
func size(r *rand.Rand, most int) int {
	n := 1 << r.IntN(bits.Len(uint(most)))
	return min(n+r.IntN(n), most)
}

// Send writes the plan's bytes and, unless told otherwise, shuts down sending.
func (c *Conn) Send(p Plan) error {
	r, s := p.random(1), NewStream(p.Seed)
	buf := make([]byte, p.MaxWrite)
	for s.At() < p.Bytes {
		msg := buf[:min(int64(size(r, p.MaxWrite)), p.Bytes-s.At())]
		s.Next(msg)
		if n, err := c.Write(msg); err != nil {
			return fmt.Errorf("send: %d of %d bytes: %w", s.At()-int64(len(msg)-n), p.Bytes, err)
		}
		if p.Paced > 0 {
			time.Sleep(time.Duration(r.Int64N(int64(2 * p.Paced))))
		}
	}
	if p.Open {
		return nil
	}
	return c.CloseWrite()
}

// Receive reads and checks the plan's bytes and, unless the sender does not end
// the stream, the end.
func (c *Conn) Receive(p Plan) error {
	r, s := p.random(2), NewStream(p.Seed)
	buf := make([]byte, 256<<10)
	pause := s.At()
	for s.At() < p.Bytes || !p.Open {
		part := buf
		if p.Slow {
			part = buf[:size(r, len(buf))]
			// The next pause comes after up to 256 KiB.
			if s.At() >= pause {
				time.Sleep(time.Duration(1+r.IntN(8)) * time.Millisecond)
				pause = s.At() + r.Int64N(256<<10)
			}
		}
		n, err := c.Read(part)
		if n > 0 {
			if err := s.Check(part[:n]); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			if s.At() != p.Bytes {
				return fmt.Errorf("%w: end after %d of %d bytes", ErrCorrupt, s.At(), p.Bytes)
			}
			return nil
		}
		if err != nil {
			return fmt.Errorf("receive: %d of %d bytes: %w", s.At(), p.Bytes, err)
		}
	}
	if s.At() != p.Bytes {
		return fmt.Errorf("%w: %d bytes instead of %d", ErrCorrupt, s.At(), p.Bytes)
	}
	return nil
}

// Exchange carries out both plans, one in each direction, at once.
func Exchange(a, b *Conn, ab, ba Plan) error {
	errs := make(chan error, 4)
	go func() { errs <- a.Send(ab) }()
	go func() { errs <- b.Receive(ab) }()
	go func() { errs <- b.Send(ba) }()
	go func() { errs <- a.Receive(ba) }()
	return errors.Join(<-errs, <-errs, <-errs, <-errs)
}
