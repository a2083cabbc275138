package bench

import (
	"errors"
	"fmt"
	"math/rand/v2"
)

// The verification pass: the client sends messages of random sizes with content that
// depends on the position in the stream, the server checks every byte and sends as
// many back, which the client checks.
const (
	verifyMessages = 200
	verifyLargest  = 1 << 20
)

func verifySizes() []int {
	r := rand.New(rand.NewPCG(1, 2))
	sizes := make([]int, verifyMessages)
	for i := range sizes {
		sizes[i] = 1 + r.IntN(verifyLargest>>r.IntN(20))
	}
	return sizes
}

// fill writes the bytes of a stream from position at on.
func fill(buf []byte, seed, at uint64) {
	for i := range buf {
		p := at + uint64(i)
		word := (p>>3 + seed) * 0x9e3779b97f4a7c15
		buf[i] = byte(word >> (8 * (p & 7)))
	}
}

// verify checks one side; first says who sends first.
func verify(s *socket, first bool) error {
	out, in := make([]byte, verifyLargest), make([]byte, verifyLargest)
	want := make([]byte, verifyLargest)
	own, peer := uint64(1), uint64(2)
	if !first {
		own, peer = peer, own
	}
	for _, n := range verifySizes() {
		send := func() error {
			fill(out[:n], own, s.sent)
			return s.send(out[:n])
		}
		receive := func() error {
			fill(want[:n], peer, s.received)
			at := s.received
			if ok, err := s.recvFull(in[:n]); err != nil || !ok {
				return errors.Join(fmt.Errorf("no message at byte %d", at), err)
			}
			for i := range n {
				if in[i] != want[i] {
					return fmt.Errorf("byte %d is %#x, not %#x", at+uint64(i), in[i], want[i])
				}
			}
			return nil
		}
		steps := []func() error{send, receive}
		if !first {
			steps[0], steps[1] = receive, send
		}
		for _, step := range steps {
			if err := step(); err != nil {
				return err
			}
		}
	}
	return nil
}
