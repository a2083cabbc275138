package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containernetworking/cni/libcni"
	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/plugin/datapath"
	"github.com/skipstack/skipstack/test/node"
)

// dir is below /run, which is private here and which every user may enter.
const dir = "/run/software"

const (
	patience = 30 * time.Second // for what comes about by itself
	tick     = 10 * time.Millisecond
)

// A lab is a node with networks of all rules.
type lab struct {
	*suite
	software
	node  *node.Node
	set   *datapath.Set
	risks []string // of this kernel
	bound bool     // the software is mounted
}

// Rules under which the pods of a run are made.
const (
	plain    = "plain"           // without skipstack
	cautious = "none"            // no risk accepted
	standard = "kernel"          // those of the kernel
	bold     = "kernel,blocking" // and blocking sockets
)

func newLab(s *suite) (l *lab, err error) {
	l = &lab{suite: s, software: software{root: filepath.Join(dir, "root")}}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.close())
		}
	}()
	if err := os.MkdirAll(l.root, 0o755); err != nil {
		return nil, err
	}
	unpacked := filepath.Join(s.cache, "root")
	if _, err := os.Stat(unpacked); err == nil {
		if err := unix.Mount(unpacked, l.root, "", unix.MS_BIND, ""); err != nil {
			return nil, fmt.Errorf("mount %s: %w", unpacked, err)
		}
		l.bound = true
	}
	log := io.Discard
	if s.verbose {
		log = s.errs
	}
	if l.node, err = node.New(node.Options{Log: log}); err != nil {
		return nil, err
	}
	// The verdict and the datapath.
	out, err := exec.Command(filepath.Join(node.ProgramDir(), node.PluginType), "load",
		"--bpffs", l.node.BPFFS, "--run-dir", l.node.RunDir, "--cgroup-root", l.node.CgroupRoot).CombinedOutput()
	if err != nil {
		return nil, fmt.Errorf("skipstack load: %w: %s", err, out)
	}
	if l.set, err = datapath.Open(l.node.BPFFS); err != nil {
		return nil, err
	}
	settings, err := l.set.Node()
	if err != nil {
		return nil, err
	}
	if !settings.Open {
		return nil, fmt.Errorf("no pod can be accelerated on this kernel: %s", out)
	}
	l.risks = settings.Risks.Names()
	fmt.Fprintf(s.out, "this kernel's risks: %v\n", l.risks)
	return l, nil
}

func (l *lab) close() error {
	var errs []error
	if l.set != nil {
		errs = append(errs, l.set.Close())
	}
	if l.node != nil {
		_, err := datapath.Unload(context.Background(), l.node.BPFFS, true)
		errs = append(errs, err, l.node.Close())
	}
	if l.bound {
		errs = append(errs, unix.Unmount(l.root, 0))
	}
	return errors.Join(append(errs, os.RemoveAll(dir))...)
}

// network is the pods' network under the given rules. All share one bridge.
func (l *lab) network(rules string) (*libcni.NetworkConfigList, error) {
	accepted := []string{}
	if rules == standard || rules == bold {
		accepted = append(accepted, l.risks...)
	}
	if rules == bold {
		accepted = append(accepted, datapath.RiskBlocking.String())
	}
	list, err := l.node.Network(node.Network{Skipstack: map[string]any{"mode": "auto", "acceptRisks": accepted}})
	if err == nil && rules == plain {
		return node.WithoutSkipstack(list)
	}
	return list, err
}

// attempts at a run whose share is too low: a machine that is busy with other
// things answers handshakes late, or is short of memory for TCP.
const attempts = 5

// try runs a case under all rules that concern it.
func (l *lab) try(c testCase) (rows []row, err error) {
	if c.share == 0 {
		c.share = 0.9
	}
	var rules []string
	switch {
	case c.splices:
		rules = []string{cautious}
	case c.blocking != "":
		rules = []string{standard, bold}
	default:
		rules = []string{standard}
	}
	want, err := l.run(c, plain)
	if err != nil {
		return nil, fmt.Errorf("plain: %w", err)
	}
	if want.redirected != 0 {
		return nil, fmt.Errorf("plain: %d bytes were redirected", want.redirected)
	}
	if l.verbose {
		fmt.Fprintf(l.out, "  result: %s, at the end %q\n", digest([]byte(want.result)), tail([]byte(want.result), 200))
	}
	for _, r := range rules {
		for attempt := 1; ; attempt++ {
			got, runErr := l.run(c, r)
			if runErr != nil {
				err = errors.Join(err, fmt.Errorf("accepted risks %s: %w", r, runErr))
				break
			}
			one := row{testCase: c, rules: r, payload: got.payload(), share: got.share(), same: got.result == want.result}
			again := false
			one.note, again, runErr = l.judge(c, r, want, got)
			if l.verbose || runErr != nil {
				fmt.Fprintf(l.out, "  %s: connections %v, messages %v, %d bytes on the wire, %d plain\n", r, some(got.counters.Connections), some(got.counters.Messages), got.wire, want.wire)
			}
			if runErr != nil && again && attempt < attempts {
				fmt.Fprintf(l.out, "  %s: %v; once more\n", r, runErr)
				continue
			}
			if runErr != nil {
				err = errors.Join(err, fmt.Errorf("accepted risks %s: %w", r, runErr))
			}
			rows = append(rows, one)
			break
		}
	}
	return rows, err
}

// some leaves out what is zero.
func some[V comparable](m map[string]V) map[string]V {
	var zero V
	m = maps.Clone(m)
	maps.DeleteFunc(m, func(_ string, v V) bool { return v == zero })
	return m
}

// judge says whether a run was what it should be; again, if a busy machine might
// be to blame.
func (l *lab) judge(c testCase, rules string, want, got outcome) (note string, again bool, err error) {
	if got.result != want.result {
		return "", false, fmt.Errorf("another result than over plain TCP: %s", difference(want.result, got.result))
	}
	count := got.counters.Connections
	switch {
	case rules == cautious && slices.Contains(l.risks, datapath.RiskSplice.String()):
		if got.redirected != 0 || count["enrolled"] != 0 {
			return "", false, fmt.Errorf("%d connections enrolled although risk splice is not accepted", count["enrolled"])
		}
		return "plain: risk splice is not accepted", false, nil
	case rules == standard && c.blocking != "":
		note = "plain by default: " + c.blocking
		if got.redirected != 0 || count["enrolled"] != 0 {
			return "", false, fmt.Errorf("%d connections enrolled although %s", count["enrolled"], c.blocking)
		}
		if count["blocking"] == 0 {
			return "", true, fmt.Errorf("no connection was counted as blocking: %v", some(count))
		}
		return note, false, nil
	}
	if count["enrolled"] == 0 {
		return "", true, errors.New("no connection was enrolled")
	}
	if got.share() < c.share {
		return "", true, fmt.Errorf("%.1f %% accelerated, want %.1f %%", 100*got.share(), 100*c.share)
	}
	// What went by either way is what plain TCP carried.
	if most, least := want.wire+want.wire/4+64<<10, want.wire-want.wire/4; got.payload() > most || got.payload()+64<<10 < least {
		return "", true, fmt.Errorf("%d bytes of payload, %d over plain TCP", got.payload(), want.wire)
	}
	return "", false, nil
}

// difference shows the first line in which two results differ.
func difference(want, got string) string {
	w, g := strings.Split(want, "\n"), strings.Split(got, "\n")
	for i := range max(len(w), len(g)) {
		a, b := "(nothing)", "(nothing)"
		if i < len(w) {
			a = w[i]
		}
		if i < len(g) {
			b = g[i]
		}
		if a != b {
			return fmt.Sprintf("line %d: %q, want %q", i+1, b, a)
		}
	}
	return "none"
}

// An outcome is what a run gave.
type outcome struct {
	result     string
	counters   datapath.Counters
	redirected uint64 // bytes
	wire       uint64 // bytes of payload that went by TCP
}

func (o outcome) payload() uint64 { return o.redirected + o.wire }

func (o outcome) share() float64 {
	if o.payload() == 0 {
		return 0
	}
	return float64(o.redirected) / float64(o.payload())
}

// run runs a case once in new pods, and checks that they leave nothing behind.
func (l *lab) run(c testCase, rules string) (o outcome, err error) {
	list, err := l.network(rules)
	if err != nil {
		return o, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), l.limit)
	defer cancel()
	s := &scene{lab: l, ctx: ctx, list: list, pods: map[string]*pod{}}
	if s.dir, err = os.MkdirTemp(dir, "run-"); err != nil {
		return o, err
	}
	defer os.RemoveAll(s.dir)
	defer func() { err = errors.Join(err, s.close()) }()
	if err := os.Chmod(s.dir, 0o777); err != nil { // some software insists on another user
		return o, err
	}
	before, err := l.set.Counters()
	if err != nil {
		return o, err
	}
	if o.result, err = c.run(s); err != nil {
		return o, errors.Join(err, s.logs())
	}
	s.stop()
	for _, p := range s.pods {
		n, err := p.sent()
		if err != nil {
			return o, err
		}
		o.wire += n
	}
	after, err := l.set.Counters()
	if err != nil {
		return o, err
	}
	o.counters = after.Since(before)
	o.redirected = o.counters.Messages["redirected"].Bytes
	return o, s.settled(o)
}

// settled waits until no socket is enrolled any more, and compares the pods'
// counters with the node's.
func (s *scene) settled(o outcome) error {
	var state string
	for deadline := time.Now().Add(patience); ; time.Sleep(tick) {
		members, err := s.set.Enrolled()
		if err != nil {
			return err
		}
		pods, err := s.set.PodCounters()
		if err != nil {
			return err
		}
		var live, redirected uint64
		for _, p := range pods {
			live += p.Live
			redirected += p.Redirected.Bytes
		}
		if members == 0 && live == 0 && redirected == o.redirected {
			return nil
		}
		state = fmt.Sprintf("%d sockets in the sockhash, %d live, the pods' counters say %d bytes redirected, the node's %d", members, live, redirected, o.redirected)
		if time.Now().After(deadline) {
			return fmt.Errorf("after all processes had ended: %s", state)
		}
	}
}
