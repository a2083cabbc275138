package conformance

import (
	"fmt"
	"runtime/debug"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/skipstack/skipstack/plugin/datapath"
	"github.com/skipstack/skipstack/test/node"
)

// A behaviour is something that applications can rely on. It notes what can be
// seen, which must not depend on time or chance.
type behaviour struct {
	name string
	does string // what is done, for docs/conformance.md
	run  func(c *trial)
	// quiet: no bytes are sent, so none can be redirected.
	quiet bool
	// notEnrolled: why the connections stay plain by nature.
	notEnrolled string
	// mayStayPlain: so many connections may be plain, as long as another is not.
	mayStayPlain int
	// notSwitched: not tried in mode switched, because it has no moment for that.
	notSwitched bool
	// once: the behaviour has no client and server, or both at once.
	once bool
}

type group struct {
	name       string
	behaviours []behaviour
}

// groups is the table of all behaviours.
var groups = []group{
	{"Streams", streams},
	{"Ends of connections", ends},
	{"Readiness", readiness},
	{"Blocking calls and signals", blockings},
	{"Flags of recv and send", flags},
	{"Counts and state", counts},
	{"Options", options},
	{"Zero-copy", zeroCopies},
	{"Ancillary data", ancillaries},
	{"Descriptors", descriptors},
	{"io_uring", urings},
	{"Listening and ports", listening},
	{"Loss and filters", losses},
	{"Scale", scale},
}

// rowLimit is how long one behaviour may take.
const rowLimit = 8 * time.Minute

// A row is a behaviour's outcome.
type row struct {
	behaviour
	seen map[mode]string
}

// lanes is how many behaviours are tried at the same time: many of them wait.
const lanes = 2

func TestConformance(t *testing.T) {
	checkList(t)
	node.Need(t)
	k, free := lab(t, lanes)
	var mu sync.Mutex
	seen := map[string]row{}
	// When all that ran in parallel has ended.
	t.Cleanup(func() {
		if !t.Failed() {
			compareTable(t, seen)
		}
	})
	for _, g := range groups {
		t.Run(g.name, func(t *testing.T) {
			t.Parallel()
			for _, b := range g.behaviours {
				t.Run(b.name, func(t *testing.T) {
					t.Parallel()
					rigs := <-free
					defer func() { free <- rigs }()
					r := row{behaviour: b, seen: conductCalmly(t, rigs, b)}
					judge(t, k, r)
					mu.Lock()
					defer mu.Unlock()
					seen[b.name] = r
				})
			}
		})
	}
}

// conductCalmly conducts again if somebody else on the machine has meanwhile used so
// much of TCP's memory that nothing could be redirected.
func conductCalmly(t *testing.T, rigs []*rig, b behaviour) map[mode]string {
	t.Helper()
	for attempts := 10; ; attempts-- {
		seen, disturbed := conduct(t, rigs, b, attempts > 1)
		if !disturbed {
			return seen
		}
		t.Log("again: TCP on this machine is short of memory, connections of a row before came late, or a SYN-ACK did")
		time.Sleep(2 * time.Second)
	}
}

// conduct tries a behaviour in all modes and roles at once and returns what was
// seen in each mode.
func conduct(t *testing.T, rigs []*rig, b behaviour, mayAgain bool) (seenIn map[mode]string, disturbed bool) {
	t.Helper()
	type outcome struct {
		*trial
		failure string
	}
	var started []*trial
	ended := make(chan outcome, len(rigs))
	for _, g := range rigs {
		if b.once && g.role != client || b.notSwitched && g.mode == switched {
			continue
		}
		c := newTrial(t.Name(), g)
		started = append(started, c)
		go func() { ended <- outcome{c, c.conduct(b)} }()
	}
	limit := time.After(rowLimit)
	var failures []string
	seen := map[mode]map[role]string{}
	for _, c := range started {
		seen[c.rig.mode] = map[role]string{}
	}
	for range started {
		select {
		case o := <-ended:
			disturbed = disturbed || o.disturbed && mayAgain
			if o.failure != "" {
				failures = append(failures, fmt.Sprintf("%s %s: %s\nseen so far: %s", o.rig.mode, o.rig.role, o.failure, o.seen()))
			}
			seen[o.rig.mode][o.rig.role] = o.seen()
		case <-limit:
			for _, c := range started {
				t.Logf("%s %s has seen: %s", c.rig.mode, c.rig.role, c.seen())
			}
			t.Fatalf("not over after %s", rowLimit)
		}
	}
	if disturbed {
		return nil, true
	}
	if failures != nil {
		t.Fatal(strings.Join(failures, "\n"))
	}
	all := map[mode]string{}
	for m, byRole := range seen {
		all[m] = byRole[client]
		if s, ok := byRole[server]; ok && s != all[m] {
			all[m] = fmt.Sprintf("client: %s; server: %s", all[m], s)
		}
	}
	return all, false
}

// conduct carries the behaviour out and says what went wrong with the trial, as
// opposed to what was seen in it.
func (c *trial) conduct(b behaviour) (failure string) {
	var before datapath.Counters
	defer func() {
		if r := recover(); r != nil {
			if f, ok := r.(failed); ok {
				failure = f.Error()
			} else {
				failure = fmt.Sprintf("%v\n%s", r, debug.Stack())
			}
		}
		c.close()
		if complaint := c.checkMode(b, before); failure == "" {
			failure = complaint
		}
	}()
	if c.rig.set != nil {
		var err error
		before, err = c.rig.set.Counters()
		c.check(err)
	}
	b.run(c)
	return ""
}

// checkMode makes sure that the trial was about what it should be about: a silent
// fallback would compare plain TCP with itself.
func (c *trial) checkMode(b behaviour, before datapath.Counters) string {
	if c.rig.set == nil {
		return ""
	}
	now, err := c.rig.set.Counters()
	if err != nil {
		return err.Error()
	}
	d := now.Since(before)
	enrolled, redirected := d.Connections["enrolled"], d.Messages["redirected"].Bytes
	// A row before may have left a handshake that ends only now.
	tooMany := enrolled > uint64(c.connections) || enrolled > 0 && b.notEnrolled != ""
	c.disturbed = c.late || d.Messages["memory"].Messages > 0 || tooMany
	switch {
	case b.notEnrolled != "":
		if enrolled != 0 || redirected != 0 {
			return fmt.Sprintf("%d connections were accelerated, %d bytes", enrolled, redirected)
		}
	case enrolled+uint64(b.mayStayPlain) < uint64(c.connections) || enrolled > uint64(c.connections):
		return fmt.Sprintf("%d of %d connections were accelerated: %v", enrolled, c.connections, nonZero(d))
	case c.connections == 0:
		return "it made no connection"
	case c.closed && redirected != 0:
		return fmt.Sprintf("%d bytes were redirected although the pods are switched off", redirected)
	case c.closed:
	case b.quiet && redirected != 0:
		return fmt.Sprintf("%d bytes were redirected of a behaviour that sends nothing", redirected)
	case !b.quiet && redirected == 0:
		return fmt.Sprintf("no bytes were redirected: %v", nonZero(d))
	}
	return ""
}

func nonZero(c datapath.Counters) string {
	var s []string
	for k, n := range c.Messages {
		if n.Messages > 0 {
			s = append(s, fmt.Sprintf("%s: %d messages, %d bytes", k, n.Messages, n.Bytes))
		}
	}
	for _, m := range []map[string]uint64{c.Connections, c.Events} {
		for k, n := range m {
			if n > 0 {
				s = append(s, fmt.Sprintf("%s: %d", k, n))
			}
		}
	}
	return strings.Join(s, "; ")
}

// judge compares what was seen with the list of deviations.
func judge(t *testing.T, k kernel, r row) {
	t.Helper()
	for _, m := range modes[1:] {
		seen, tried := r.seen[m]
		if !tried {
			continue
		}
		dev := listed(k, r.name, m)
		switch same := seen == r.seen[plain]; {
		case same && dev != nil && !dev.optional():
			t.Errorf("%s: the listed deviation has disappeared: like plain TCP it is %q", m, seen)
		case !same && dev == nil:
			t.Errorf("%s: a deviation that is not listed: %s\nplain TCP: %s", m, seen, r.seen[plain])
		case same:
			t.Logf("%s: same: %s", m, seen)
		default:
			t.Logf("%s: %s; plain TCP: %s", m, seen, r.seen[plain])
		}
	}
}
