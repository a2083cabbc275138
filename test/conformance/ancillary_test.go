package conformance

import (
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

var ancillaries = []behaviour{
	{name: "SO_TIMESTAMP", does: "receive timestamps with the bytes", run: func(c *trial) {
		a, b := c.pair()
		a.set(unix.SOL_SOCKET, unix.SO_TIMESTAMPNS, 1)
		c.note("%s", a.timestamped(b))
	}},
	{name: "SO_TIMESTAMPING, receive", does: "software receive timestamps with the bytes", run: func(c *trial) {
		a, b := c.pair()
		a.set(unix.SOL_SOCKET, unix.SO_TIMESTAMPING, unix.SOF_TIMESTAMPING_RX_SOFTWARE|unix.SOF_TIMESTAMPING_SOFTWARE)
		c.note("%s", a.timestamped(b))
	}},
	{name: "SO_TIMESTAMPING, transmit", does: "software transmit timestamps in the error queue", run: func(c *trial) {
		a, b := c.pair()
		a.warm()
		a.set(unix.SOL_SOCKET, unix.SO_TIMESTAMPING, unix.SOF_TIMESTAMPING_TX_SOFTWARE|unix.SOF_TIMESTAMPING_TX_ACK|
			unix.SOF_TIMESTAMPING_SOFTWARE|unix.SOF_TIMESTAMPING_OPT_ID|unix.SOF_TIMESTAMPING_OPT_TSONLY)
		a.deliver(10)
		b.read(10)
		got := within(soon, func() bool {
			_, oobn, _, _, err := unix.Recvmsg(a.fd, make([]byte, 10), make([]byte, 500), unix.MSG_ERRQUEUE)
			return err == nil && oobn > 0
		})
		c.note("timestamp: %t", got)
	}},
	{name: "TCP_INQ", does: "the number of bytes that are left, with the bytes", run: func(c *trial) {
		a, b := c.pair()
		a.set(unix.IPPROTO_TCP, unix.TCP_INQ, 1)
		b.deliver(100)
		c.note("%s", a.control(0))
	}},
	{name: "SCM_RIGHTS", does: "descriptors cannot be sent over TCP: what sendmsg(2) says of control data", run: func(c *trial) {
		a, b := c.pair()
		_, err := unix.SendmsgN(a.fd, bytesAt(0, 10), unix.UnixRights(a.fd), nil, unix.MSG_NOSIGNAL)
		c.note("%s", errName(err))
		if err == nil {
			a.sent += 10
		}
		a.deliver(10)
		c.note("%s", b.recv(100, 0))
	}},
	{name: "unknown control data", does: "SOL_SOCKET control data that is no option", run: func(c *trial) {
		a, b := c.pair()
		oob := make([]byte, unix.CmsgSpace(4))
		h := (*unix.Cmsghdr)(pointer(oob))
		h.Level, h.Type = unix.SOL_SOCKET, 9999
		h.SetLen(unix.CmsgLen(4))
		_, err := unix.SendmsgN(a.fd, bytesAt(0, 10), oob, nil, unix.MSG_NOSIGNAL)
		c.note("%s", errName(err))
		if err == nil {
			a.sent += 10
		}
		a.deliver(10)
		c.note("%s", b.recv(100, 0))
	}},
}

// timestamped receives until a timestamp comes along. The kernel begins to take them
// a while after the first socket has asked.
func (e *end) timestamped(from *end) (last string) {
	within(soon, func() bool {
		from.deliver(10)
		last = e.control(0)
		return strings.Contains(last, "timestamp")
	})
	return last
}

// control names the control messages that come with 10 bytes.
func (e *end) control(flags int) string {
	buf, oob := make([]byte, 10), make([]byte, 500)
	n, oobn, _, _, err := unix.Recvmsg(e.fd, buf, oob, flags)
	e.c.check(err)
	s := e.took(buf[:n], false)
	messages, err := unix.ParseSocketControlMessage(oob[:oobn])
	e.c.check(err)
	var names []string
	for _, m := range messages {
		switch {
		case m.Header.Level == unix.SOL_SOCKET && m.Header.Type == unix.SCM_TIMESTAMPNS:
			names = append(names, "a timestamp")
		case m.Header.Level == unix.SOL_SOCKET && m.Header.Type == unix.SCM_TIMESTAMPING:
			names = append(names, "timestamps")
		case m.Header.Level == unix.IPPROTO_TCP && m.Header.Type == unix.TCP_CM_INQ:
			names = append(names, "bytes left")
		default:
			names = append(names, fmt.Sprintf("level %d type %d", m.Header.Level, m.Header.Type))
		}
	}
	if names == nil {
		return s + " with nothing"
	}
	slices.Sort(names)
	return s + " with " + strings.Join(names, " and ")
}
