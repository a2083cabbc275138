package bench

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A server in a pod can be reached by others than its client. Whoever does not begin
// with the session's token is hung up on.

const (
	// tokenBytes is the length of a token.
	tokenBytes = 24
	// stopCheck is how often a server that waits for connections looks if it is to stop.
	stopCheck = 20 * time.Millisecond
	// tokenPatience is how long a connection may stay silent during a run.
	tokenPatience = 250 * time.Millisecond
)

func newToken() string {
	var b [tokenBytes / 2]byte
	rand.Read(b[:])
	return hex.EncodeToString(b[:])
}

// tokenInRequest says where the token is: a crr run has it in its requests, so that it
// costs no message of its own.
func (g *generator) tokenInRequest() bool {
	return g.point.Test == ConnectRequestResponse && !g.verify
}

// admit serves the connections that begin with the token until it is told to stop.
// Unlike [generator.server] it neither shuts the listener down nor fails because of
// others' connections.
func (g *generator) admit(l *socket, stopping *atomic.Bool) error {
	head := make([]byte, tokenBytes)
	if g.tokenInRequest() {
		head = make([]byte, g.point.RequestBytes)
	}
	response := message(g.point.ResponseBytes)
	for !stopping.Load() {
		if !l.ready(stopCheck) {
			continue
		}
		s, e := l.tryAccept()
		switch {
		case e == unix.EAGAIN || e == unix.EINTR || e == unix.ECONNABORTED:
			continue
		case e != 0:
			return fmt.Errorf("accept: %w", e)
		}
		n := 0
		if s.ready(tokenPatience) {
			n, _ = s.recv(head)
		}
		if !bytes.HasPrefix(head[:n], g.token) {
			s.close()
			continue
		}
		err := g.serve(s, func(s *socket) error {
			if !g.tokenInRequest() {
				return g.respond(s)
			}
			if n < len(head) {
				if ok, err := s.recvFull(head[n:]); err != nil || !ok {
					return errors.Join(errors.New("half a request"), err)
				}
			}
			if err := s.send(response); err != nil {
				return err
			}
			return g.respond(s)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// ready waits until the socket can be read; false if it cannot within the timeout.
func (s *socket) ready(timeout time.Duration) bool {
	p := unix.PollFd{Fd: int32(s.fd), Events: unix.POLLIN}
	ts := unix.NsecToTimespec(timeout.Nanoseconds())
	n, _, e := unix.RawSyscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&p)), 1, uintptr(unsafe.Pointer(&ts)), 0, 0, 0)
	return e == 0 && n > 0
}
