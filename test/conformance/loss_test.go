package conformance

import (
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/test/node"
)

var losses = []behaviour{
	{name: "loss and retransmission", once: true, does: "a tenth of all segments is lost in both directions, random writes both ways, then both ends", run: func(c *trial) {
		a, b := c.pair()
		c.drop(c.rig.client, 10)
		c.drop(c.rig.server, 10)
		exchangeRandom(a, b, 512<<10)
		c.note("%s", a.shutdown(unix.SHUT_WR))
		b.readEnd()
		b.close()
		a.readEnd()
		c.note("all bytes, both ends")
	}},
	{name: "loss with a full receiver", does: "a tenth of all segments is lost while a reader without room catches up", run: func(c *trial) {
		a, b := c.pair()
		a.fill()
		c.drop(c.rig.client, 10)
		c.drop(c.rig.server, 10)
		b.read(int(a.sent))
		a.write(100_000)
		a.close()
		b.read(100_000)
		b.readEnd()
		c.note("all bytes, then the end")
	}},
	{name: "the end is lost", does: "the network is down while one end closes, and comes back", run: func(c *trial) {
		a, b := c.pair()
		a.warm()
		stopClient, stopServer := c.drop(c.rig.client, 100), c.drop(c.rig.server, 100)
		b.close()
		c.note("%s", a.recv(1, unix.MSG_DONTWAIT))
		stopClient()
		stopServer()
		a.await(unix.POLLRDHUP)
		c.note("%s", a.recv(1, 0))
	}},
	{name: "packet filters", does: "a filter in the network drops all segments of an established connection: do bytes arrive?", run: func(c *trial) {
		a, b := c.pair()
		a.warm()
		stopClient, stopServer := c.drop(c.rig.client, 100), c.drop(c.rig.server, 100)
		b.write(10)
		c.note("%t", within(300*time.Millisecond, func() bool { return a.recv(10, unix.MSG_PEEK) != "EAGAIN" }))
		stopClient()
		stopServer()
		a.read(10)
		c.note("without the filter they do")
	}},
	{name: "interface counters", does: "1 MB is sent: do the counters of the pod's interface, which captures and accounting rest on, rise by as much?", run: func(c *trial) {
		a, b := c.pair()
		a.warm()
		before := c.transmitted(a)
		for range 50 {
			a.write(20_000)
			b.read(20_000)
		}
		c.note("%t", c.transmitted(a)-before >= 1_000_000)
	}},
}

// transmitted is how many bytes the interface of the end's pod has sent.
func (c *trial) transmitted(e *end) (n uint64) {
	c.check(c.pod(e).Do(func() error {
		link, err := netlink.LinkByName(node.IfName)
		if err == nil {
			n = link.Attrs().Statistics.TxBytes
		}
		return err
	}))
	return n
}

// drop makes a pod lose that share of the TCP segments that arrive at it, in
// percent, until the returned function is called or the trial is over.
func (c *trial) drop(p *pod, percent uint32) (stop func()) {
	rules, err := p.LoseTCP(percent)
	c.check(err)
	stop = func() { c.check(rules.Close()) }
	c.later(stop)
	return stop
}
