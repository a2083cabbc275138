package verdict

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"github.com/skipstack/skipstack/plugin/datapath"
)

// redirect asks whether redirected bytes arrive: all of them by redirecting,
// none by TCP.
func (p *prober) redirect(ctx context.Context) error {
	o, err := p.observe(ctx, expExchange, 1<<20, settle)
	if err != nil {
		return err
	}
	switch r := o.redirected(); {
	case o.Fault != "":
		p.v.set(ProbeRedirect, NotOK, "accelerated connections would corrupt data: "+o.Fault)
	case o.trouble != "":
		p.v.set(ProbeRedirect, CouldNotTell, o.trouble)
	case r.Bytes != o.Sent || o.ByTCP != 0:
		p.v.set(ProbeRedirect, NotOK, fmt.Sprintf("of %d bytes %d were redirected and TCP carried %d, so there is nothing to gain (%s)",
			o.Sent, r.Bytes, o.ByTCP, o.passed()))
	default:
		p.v.set(ProbeRedirect, OK, fmt.Sprintf("%d messages (%d bytes) skipped the stack and arrived", r.Messages, r.Bytes))
	}
	return nil
}

// leastTurns is how many messages must have gone each way for order to be shown.
const leastTurns = 30

// order asks whether bytes stay in order when redirecting and TCP take turns. On
// a busy machine a reader may come so late that nearly all goes one way, so there
// are rounds until enough went each way, or the budget is spent.
func (p *prober) order(ctx context.Context) error {
	var redirected, byTCP uint64
	tooFew := ""
	for {
		o, err := p.observe(ctx, expShuffle, shuffleUnread, settle)
		if err != nil {
			return err
		}
		redirected += o.redirected().Messages
		byTCP += o.takenTurns()
		switch {
		case o.Fault != "":
			p.v.set(ProbeOrder, NotOK, "accelerated connections would corrupt data: "+o.Fault)
			return nil
		case o.trouble != "" && tooFew != "":
			p.v.set(ProbeOrder, CouldNotTell, tooFew)
			return nil
		case o.trouble != "":
			p.v.set(ProbeOrder, CouldNotTell, o.trouble)
			return nil
		case redirected >= leastTurns && byTCP >= leastTurns:
			p.v.set(ProbeOrder, OK, fmt.Sprintf("%d redirected messages and %d by TCP took turns, and every byte arrived in order", redirected, byTCP))
			return nil
		}
		tooFew = fmt.Sprintf("%d messages were redirected and %d went by TCP: too few to tell (%s)", redirected, byTCP, o.passed())
	}
}

// charged asks whether the receiver pays for what it has not read, and whether
// the limit stops the sender.
func (p *prober) charged(ctx context.Context) error {
	o, err := p.observe(ctx, expFlood, floodUnread, settle)
	if err != nil {
		return err
	}
	const means = ": a pod that does not read could fill the node's memory"
	switch {
	case o.Fault != "":
		p.v.set(ProbeCharged, NotOK, "a receiver that reads late gets wrong data: "+o.Fault)
	case o.trouble != "":
		p.v.set(ProbeCharged, CouldNotTell, o.trouble)
	case o.redirected().Bytes < uint64(o.Unread):
		p.v.set(ProbeCharged, CouldNotTell, fmt.Sprintf("%d of %d bytes were redirected (%s)", o.redirected().Bytes, o.Unread, o.passed()))
	case o.Charged < o.Unread:
		p.v.set(ProbeCharged, NotOK, fmt.Sprintf("%d of %d unread redirected bytes are charged to the receiver%s", o.Charged, o.Unread, means))
	case !o.Stopped:
		p.v.set(ProbeCharged, NotOK, fmt.Sprintf("a sender got rid of %d bytes that nobody read%s", o.Accepted, means))
	case !o.Released:
		p.v.set(ProbeCharged, NotOK, "the charge for redirected bytes is not given back when they are read: connections would slow down and stall")
	default:
		p.v.set(ProbeCharged, OK, fmt.Sprintf("unread redirected bytes are charged to the receiver; its sender was stopped after %d bytes", o.Accepted))
	}
	return nil
}

// counted is what FIONREAD does with one kind of waiting bytes.
type counted struct {
	result Result
	why    string
}

// countWaiting asks it with an unread limit that makes the bytes go the wanted
// way, which redirected says.
func (p *prober) countWaiting(ctx context.Context, unreadLimit uint32, redirected uint64) (counted, error) {
	settle := settle
	if !p.node.Funnel {
		settle = settleAtOne
	}
	o, err := p.observe(ctx, expWaiting, unreadLimit, settle)
	switch {
	case err != nil:
		return counted{}, err
	case o.Fault != "":
		return counted{NotOK, o.Fault}, nil
	case o.trouble != "":
		return counted{CouldNotTell, o.trouble}, nil
	case o.redirected().Bytes != redirected:
		return counted{CouldNotTell, fmt.Sprintf("%d bytes were redirected where %d should have been (%s)", o.redirected().Bytes, redirected, o.passed())}, nil
	case o.Counted != o.Waiting:
		return counted{NotOK, fmt.Sprintf("FIONREAD says %d of %d bytes", o.Counted, o.Waiting)}, nil
	}
	return counted{OK, ""}, nil
}

// Unread limits that send both messages of the experiment by redirecting, both
// by TCP, or the first by redirecting and the second by TCP.
const (
	allRedirected  = 1 << 20
	noneRedirected = 0
	firstOnly      = 1
)

// fionread asks whether FIONREAD counts redirected bytes, and bytes that came by
// TCP on an enrolled socket: if not those, whether the funnel helps.
func (p *prober) fionread(ctx context.Context) error {
	const readers = "nginx, Java and .NET readers may stall"
	c, err := p.countWaiting(ctx, allRedirected, firstWaiting+secondWaiting)
	if err != nil {
		return err
	}
	switch c.result {
	case CouldNotTell:
		p.v.set(ProbeFIONREAD, CouldNotTell, c.why)
		p.v.set(ProbeMPTCP, CouldNotTell, "depends on probe fionread, which could not tell: MPTCP listeners (Go's default) stay on plain TCP")
		return nil
	case NotOK:
		p.v.set(ProbeFIONREAD, NotOK, fmt.Sprintf("FIONREAD does not count redirected bytes: %s (%s)", readers, c.why))
		p.v.set(ProbeMPTCP, NotOK, "this kernel may crash when a connection of an MPTCP listener (Go's default) is accelerated: they stay on plain TCP")
		return nil
	}
	p.v.set(ProbeMPTCP, OK, "connections of MPTCP listeners (Go's default) can be accelerated")
	if c, err = p.countArrived(ctx); err != nil {
		return err
	}
	if c.result == OK {
		p.v.set(ProbeFIONREAD, OK, "FIONREAD counts redirected bytes and bytes that came by TCP")
		return nil
	}
	if c.result == NotOK {
		if c, err = p.tryFunnel(ctx); err != nil {
			return err
		}
	}
	switch c.result {
	case OK:
		p.v.Funnel = true
		p.v.set(ProbeFIONREAD, OK, "FIONREAD counts redirected bytes, and with the sk_skb program on the sockhash also bytes that came by TCP")
	case NotOK:
		p.v.set(ProbeFIONREAD, NotOK, fmt.Sprintf("FIONREAD does not count bytes that came by TCP on an accelerated connection, "+
			"not even with an sk_skb program: %s (%s)", readers, c.why))
	default:
		p.v.set(ProbeFIONREAD, CouldNotTell, c.why)
	}
	return nil
}

// countArrived asks about bytes that came by TCP: alone, and behind redirected
// ones.
func (p *prober) countArrived(ctx context.Context) (counted, error) {
	c, err := p.countWaiting(ctx, noneRedirected, 0)
	if err == nil && c.result == OK {
		c, err = p.countWaiting(ctx, firstOnly, firstWaiting)
	}
	return c, err
}

// tryFunnel asks everything again with the sk_skb program attached. If that does
// not help, it is not what this kernel needs, and is taken away.
func (p *prober) tryFunnel(ctx context.Context) (c counted, err error) {
	p.node.Funnel = true
	if err := p.set.SetNode(p.node); err != nil {
		c = counted{NotOK, err.Error()}
	} else {
		c, err = p.countWaiting(ctx, allRedirected, firstWaiting+secondWaiting)
		if err == nil && c.result == OK {
			c, err = p.countArrived(ctx)
		}
		if err != nil {
			return c, err
		}
	}
	if c.result != OK {
		return c, p.reload()
	}
	return c, nil
}

// epoll asks whether waiting bytes wake their reader, redirected ones and those
// that came by TCP.
func (p *prober) epoll(ctx context.Context) error {
	for _, way := range []struct {
		unreadLimit uint32
		what        string
	}{{allRedirected, "redirected bytes"}, {noneRedirected, "bytes that came by TCP on an accelerated connection"}} {
		o, err := p.observe(ctx, expWake, way.unreadLimit, settle)
		if err != nil {
			return err
		}
		redirected := uint64(0)
		if way.unreadLimit == allRedirected {
			redirected = o.Sent
		}
		switch {
		case o.Fault != "":
			p.v.set(ProbeEpoll, NotOK, fmt.Sprintf("%s: %s: event loops (nginx, Go, Node.js, Netty) would hang", way.what, o.Fault))
			return nil
		case o.trouble != "":
			p.v.set(ProbeEpoll, CouldNotTell, fmt.Sprintf("%s: %s", way.what, o.trouble))
			return nil
		case o.redirected().Bytes != redirected:
			p.v.set(ProbeEpoll, CouldNotTell, fmt.Sprintf("%d bytes were redirected where %d should have been (%s)",
				o.redirected().Bytes, redirected, o.passed()))
			return nil
		}
	}
	p.v.set(ProbeEpoll, OK, "epoll, level and edge triggered, wakes for redirected bytes and for bytes that came by TCP")
	return nil
}

// noGuard is what it means that splice(2) is neither refused nor works.
const noGuard = "splice(2) from an accelerated connection does not see redirected bytes, " +
	"so proxies that use it (Go's io.Copy between TCP connections, HAProxy) would hang"

// splice asks whether splice(2) from an accelerated connection sees redirected
// bytes, and if not, which form of the guard makes it say so.
func (p *prober) splice(ctx context.Context) error {
	forms := append([]datapath.Guard{datapath.NoGuard}, datapath.Guards()...)
	inUse, unknown := guardAttached()
	before, err := readTime()
	if err != nil {
		return err
	}
	guard, result, why, err := chooseGuard(forms, func(form datapath.Guard) (Result, string, error) {
		p.node.Guard = form
		err := p.set.SetNode(p.node)
		if errors.Is(err, datapath.ErrGuard) {
			return NotOK, guardTrouble(err), nil
		}
		if err != nil {
			return "", "", err
		}
		return p.trySplice(ctx)
	})
	if err != nil {
		return err
	}
	if result == OK {
		p.v.Guard = guard
		if guard != datapath.NoGuard && unknown == nil {
			cost, err := guardCost(before, inUse)
			if err != nil {
				return err
			}
			why += "; " + cost
		}
		p.v.set(ProbeSplice, OK, why)
		return nil
	}
	p.node.Guard = datapath.NoGuard
	p.v.set(ProbeSplice, result, noGuard+" (no splice guard: "+why+")")
	return p.set.SetNode(p.node)
}

// chooseGuard returns the first form that is ok, with what try said of it. If none
// is, the result is that none is ok, or that try could not tell of some, and why
// is what it said of all real ones.
func chooseGuard(forms []datapath.Guard, try func(datapath.Guard) (Result, string, error)) (datapath.Guard, Result, string, error) {
	all := NotOK
	var whys []string
	for _, form := range forms {
		result, why, err := try(form)
		if err != nil {
			return datapath.NoGuard, "", "", err
		}
		switch {
		case result == OK:
			return form, OK, why, nil
		case result == CouldNotTell:
			all = CouldNotTell
		}
		if form != datapath.NoGuard || result == CouldNotTell {
			whys = append(whys, strings.TrimPrefix(fmt.Sprintf("%s: %s", form, why), ": "))
		}
	}
	return datapath.NoGuard, all, strings.Join(whys, "; "), nil
}

// guardTrouble is why a guard cannot be attached, in a few words.
func guardTrouble(err error) string {
	if errors.Is(err, fs.ErrPermission) {
		return "the kernel does not permit it"
	}
	return strings.TrimPrefix(err.Error(), datapath.ErrGuard.Error()+": ")
}

// trySplice asks with the guard that is attached.
func (p *prober) trySplice(ctx context.Context) (Result, string, error) {
	o, err := p.observe(ctx, expSplice, allRedirected, settle)
	switch {
	case err != nil:
		return "", "", err
	case o.Fault != "":
		return NotOK, o.Fault, nil
	case o.trouble != "":
		return CouldNotTell, o.trouble, nil
	case o.redirected().Bytes != o.Sent:
		return CouldNotTell, fmt.Sprintf("%d bytes were redirected where %d should have been (%s)", o.redirected().Bytes, o.Sent, o.passed()), nil
	case o.Spliced == spliceBlind:
		return NotOK, "it does not refuse " + strings.Join(o.NotRefused, ", "), nil
	}
	tried := o.finding
	if o, err = p.observe(ctx, expProxy, allRedirected, settle); err != nil {
		return "", "", err
	}
	switch {
	case o.Fault != "":
		return NotOK, "a Go io.Copy proxy fails: " + o.Fault, nil
	case o.trouble != "":
		return CouldNotTell, "a Go io.Copy proxy: " + o.trouble, nil
	case o.redirected().Messages == 0:
		return CouldNotTell, fmt.Sprintf("nothing was redirected (%s)", o.passed()), nil
	}
	did := "splice(2) from an accelerated connection sees redirected bytes"
	if tried.Spliced == spliceRefused {
		did = fmt.Sprintf("splice(2), also io_uring's, and sendfile(2) from an accelerated connection are refused (guard: %s)", p.node.Guard)
		if tried.NoRing != "" {
			did = fmt.Sprintf("splice(2) and sendfile(2) from an accelerated connection are refused (guard: %s; io_uring's was not tried: %s)",
				p.node.Guard, tried.NoRing)
		}
	}
	p.v.RingUntried = tried.NoRing != "" && filtered()
	return OK, did + ", and a Go io.Copy proxy passes", nil
}
