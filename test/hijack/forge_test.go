package hijack_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"
)

// Queues of a socket in repair mode, enum in linux/tcp.h.
const (
	receiveQueue = 1
	sendQueue    = 2
)

// setSeq chooses where a queue of a socket in repair mode begins.
func setSeq(fd, queue int, seq uint32) error {
	err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_REPAIR_QUEUE, queue)
	if err == nil {
		err = unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_QUEUE_SEQ, int(int32(seq)))
	}
	if err != nil {
		return fmt.Errorf("choose a sequence number: %w", err)
	}
	return nil
}

// setWindow opens the windows of a connected socket in repair mode; struct
// tcp_repair_window in linux/tcp.h.
func setWindow(fd int, next uint32) error {
	var w []byte
	for _, v := range []uint32{next, 65535, 65535, 65535, next} { // snd_wl1, snd_wnd, max_window, rcv_wnd, rcv_wup
		w = binary.NativeEndian.AppendUint32(w, v)
	}
	if err := unix.SetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_REPAIR_WINDOW, string(w)); err != nil {
		return fmt.Errorf("open the windows: %w", err)
	}
	return nil
}

func setRepair(fd, mode int) error {
	if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_REPAIR, mode); err != nil {
		return fmt.Errorf("set repair mode: %w", err)
	}
	return nil
}

// numbers returns the initial sequence numbers of a client that has neither sent
// nor received a byte.
func numbers(fd int) (own, peer uint32, err error) {
	err = setRepair(fd, unix.TCP_REPAIR_ON)
	for _, q := range []struct {
		queue int
		isn   *uint32
	}{{sendQueue, &own}, {receiveQueue, &peer}} {
		if err == nil {
			err = unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_REPAIR_QUEUE, q.queue)
		}
		if err == nil {
			var v int
			v, err = unix.GetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_QUEUE_SEQ)
			*q.isn = uint32(v) - 1
		}
	}
	if err == nil {
		err = setRepair(fd, unix.TCP_REPAIR_OFF_NO_WP)
	}
	return own, peer, err
}

// vanish closes a socket without a word to the other end.
func vanish(fd int) error {
	return errors.Join(setRepair(fd, unix.TCP_REPAIR_ON), unix.Close(fd))
}

// forced makes a client whose initial sequence number is chosen, and which
// starts an ordinary handshake. The cell's sockets come in repair mode.
func (c *cell) forced(from, to netip.AddrPort, isn uint32) (int, error) {
	fd, err := c.socket()
	if err == nil {
		err = unix.Bind(fd, sockaddr(from))
	}
	if err == nil {
		err = setSeq(fd, sendQueue, isn)
	}
	if err == nil {
		err = setRepair(fd, unix.TCP_REPAIR_OFF)
	}
	if err == nil {
		err = connect(fd, to)
	}
	return fd, err
}

// forged makes a client that has been through a handshake with a server that does
// not exist: the test answers through the TUN device.
func (c *cell) forged(from, to netip.AddrPort, own, peer uint32) (int, error) {
	fd, err := c.forced(from, to, own)
	if err != nil {
		return fd, err
	}
	if _, err := c.tun.receive(func(s segment) bool { return s.flags == syn && s.seq == own }); err != nil {
		return fd, err
	}
	err = c.tun.send(segment{src: to, dst: from, flags: syn | ack, seq: peer, ack: own + 1})
	if err == nil {
		err = established(fd)
	}
	return fd, err
}

// restored makes a connected client without any handshake.
func (c *cell) restored(from, to netip.AddrPort, own, peer uint32) (int, error) {
	fd, err := c.socket()
	if err == nil {
		err = unix.Bind(fd, sockaddr(from))
	}
	if err == nil {
		err = setSeq(fd, sendQueue, own+1)
	}
	if err == nil {
		err = setSeq(fd, receiveQueue, peer+1)
	}
	if err == nil {
		err = connect(fd, to)
	}
	if err == nil {
		err = setWindow(fd, peer+1)
	}
	if err == nil {
		err = setRepair(fd, unix.TCP_REPAIR_OFF_NO_WP)
	}
	if err == nil {
		err = established(fd)
	}
	return fd, err
}

// timeWait leaves a connection in TIME_WAIT at a listener of the cell. The
// listener will answer a SYN of the same addresses and ports that begins with
// own with peer: tcp_timewait_state_process() takes tw_snd_nxt + 65535 + 2.
func (c *cell) timeWait(listener, from netip.AddrPort, own, peer uint32) error {
	next, expected := peer-65537-1, own-1000
	fd, err := c.restored(listener, from, next-1, expected-1)
	if err := errors.Join(err, unix.Close(fd)); err != nil {
		return err
	}
	if _, err := c.tun.receive(func(s segment) bool { return s.flags == fin|ack && s.seq == next }); err != nil {
		return err
	}
	err = c.tun.send(segment{src: from, dst: listener, flags: fin | ack, seq: expected, ack: next + 1})
	if err == nil {
		_, err = c.tun.receive(func(s segment) bool { return s.flags == ack && s.ack == expected+1 })
	}
	return err
}

// timeWaitHere is timeWait where the client's address is the cell's as well.
func (c *cell) timeWaitHere(listener, from netip.AddrPort, own, peer uint32) error {
	next, expected := peer-65537-1, own-1000
	a, errA := c.restored(listener, from, next-1, expected-1)
	b, errB := c.restored(from, listener, expected-1, next-1)
	err := errors.Join(errA, errB, unix.Close(a))
	if err == nil {
		err = wait(b, unix.POLLRDHUP)
	}
	return errors.Join(err, unix.Close(b))
}

// half opens a connection to a listener of the cell up to the listener's answer,
// both numbers chosen.
func (c *cell) half(listener, from netip.AddrPort, own, peer uint32) error {
	if err := c.timeWait(listener, from, own, peer); err != nil {
		return err
	}
	s, err := c.tun.ask(segment{src: from, dst: listener, flags: syn, seq: own})
	if err == nil && s.seq != peer {
		err = fmt.Errorf("the listener answers with %d, not %d", s.seq, peer)
	}
	return err
}

// ask sends a SYN and waits for its answer.
func (t *tun) ask(s segment) (answer segment, err error) {
	if err := t.send(s); err != nil {
		return answer, err
	}
	return t.receive(func(a segment) bool {
		return a.flags == syn|ack && a.src == s.dst && a.dst == s.src && a.ack == s.seq+1
	})
}
