// Package plugin serves the CNI verbs of skipstack, a chained plugin: ADD, DEL,
// CHECK, GC, STATUS and VERSION of CNI specification 0.3.0 to 1.1.0.
//
// Pod networking comes first. ADD attaches the datapath to the pod's cgroup and
// passes the previous plugin's result on; where that is not possible the pod
// starts on plain TCP and one log line says why, unless the configuration asks
// for failure. Nothing here waits for another process, or for the kernel's
// verdict, longer than a fixed budget.
//
// # State
//
// An attachment has a record below the run directory (package attachment) and
// shares with the other attachments of its pod one pinned link, which is named by
// the pod's cgroup (package datapath). Records are the truth about who wants the
// link: see [Plugin.Add] for the order of changes.
package plugin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"runtime/debug"
	"time"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/skipstack/skipstack/plugin/attachment"
	"github.com/skipstack/skipstack/plugin/datapath"
	"github.com/skipstack/skipstack/plugin/podcgroup"
)

// Budget is how long ADD and DEL may take, locks included.
const Budget = 2 * time.Second

const (
	// A GC touches every attachment of a network and holds up nobody's pod.
	gcBudget = 30 * time.Second
	// sweepAtOnce bounds the dead links that one ADD removes.
	sweepAtOnce = 4
)

// Datapath is what the verbs and [Node] need of package datapath, which says what
// each method does.
type Datapath interface {
	Open(bpffs string) (Set, error)
	Load(ctx context.Context, bpffs string, o datapath.LoadOptions) (Set, error)
	Loadable(bpffs string) error
	EnsureBPFFS(ctx context.Context, path string) error
	BPFFSIdentity(path string) (dev, mountNS uint64, err error)
	HasLink(bpffs string, cgroupID uint64) (bool, error)
	DropPod(bpffs string, cgroupID uint64) error
	Sweep(bpffs string, limit int) error

	// For Node alone.
	Upgrade(ctx context.Context, bpffs string, o datapath.LoadOptions) (s Set, changed bool, err error)
	Published(bpffs string) (bool, error)
	Unload(ctx context.Context, bpffs string, force bool) (datapath.Remaining, error)
	SwitchNode(bpffs string, off bool) (sets int, err error)
	LiveInKernel() (sockets uint64, err error)
}

// Set is what they need of a datapath.Set.
type Set interface {
	Attach(cgroup *os.File, cgroupID uint64) (created bool, err error)
	Pod(cgroupID uint64) (settings datapath.PodSettings, known bool, err error)
	SetPod(cgroupID uint64, settings datapath.PodSettings) error
	Build() ([16]byte, error)
	Node() (datapath.NodeSettings, error)
	SetNode(datapath.NodeSettings) error
	MaxConnections() (uint32, error)
	PodCounters() (map[uint64]datapath.PodCounters, error)
	Observe() (datapath.Observation, error)
	Close() error
}

// Cgroups is what they need of package podcgroup.
type Cgroups interface {
	// Root returns the configured cgroup root, or finds it where none is.
	Root(configured string) (string, error)
	Find(ctx context.Context, root string, r podcgroup.Request) (*podcgroup.Pod, error)
}

// ErrNoVerdict is returned by Verdicts.Cached where this boot and this binary
// have no verdict yet.
var ErrNoVerdict = errors.New("the kernel has not been probed yet")

// Verdict is what they need to know of the kernel's verdict.
type Verdict struct {
	// Supported is false where the datapath would not be correct.
	Supported bool
	// Node is the gate that the verdict asks for.
	Node datapath.NodeSettings
	// Due tells that a probe could not tell, or not all, and that it is time for this
	// process to try it again.
	Due bool
	// Summary is one line for people, Document the whole for JSON.
	Summary  string
	Document any
}

// gate is what the verdict asks for, but for a guard that the configuration does
// not want.
func (v Verdict) gate(conf Config) datapath.NodeSettings {
	gate := v.Node
	gate.Open = gate.Open && v.Supported
	if conf.SpliceGuard == SpliceGuardOff {
		gate = unguarded(gate)
	}
	return gate
}

// over is the gate that the verdict asks for where one is open already. Programs of
// this build are to go by the verdict. Those of another have been found to do with
// what they have; that they do with less, this verdict cannot tell, but it may know of
// a risk that nobody knew of then.
func (v Verdict) over(conf Config, now datapath.NodeSettings, sameBuild bool) datapath.NodeSettings {
	want := v.gate(conf)
	if sameBuild || !now.Open {
		return want
	}
	switch splice := datapath.RiskSplice; {
	case now.Guard == datapath.NoGuard && now.Risks&splice != 0:
		want.Guard = datapath.NoGuard
	case want.Guard == datapath.NoGuard && want.Risks&splice == 0:
		want.Guard = now.Guard
	}
	want.Risks |= now.Risks
	want.MPTCPListeners = want.MPTCPListeners && now.MPTCPListeners
	return want
}

// differs tells if the node's gate, which is open, is not what the verdict asks for.
// The guard, and the risk that goes with it, are left out where the verdict has one:
// the configuration of another network may not want it.
func (v Verdict) differs(conf Config, node datapath.NodeSettings, sameBuild bool) bool {
	want := v.over(conf, node, sameBuild)
	want.Funnel = want.Funnel || node.Funnel // it stays
	want.SwitchedOff = node.SwitchedOff
	if v.Node.Guard != datapath.NoGuard {
		want.Risks &^= datapath.RiskSplice
		node.Risks &^= datapath.RiskSplice
		want.Guard = node.Guard
	}
	return want != node
}

// unguarded is the gate without the splice guard, and with the risk that is left.
func unguarded(gate datapath.NodeSettings) datapath.NodeSettings {
	if gate.Guard != datapath.NoGuard {
		gate.Guard = datapath.NoGuard
		gate.Risks |= datapath.RiskSplice
	}
	return gate
}

// Verdicts finds the kernel's verdict.
type Verdicts interface {
	// Cached returns the verdict of this boot and binary, or [ErrNoVerdict].
	Cached(runDir string) (Verdict, error)
	// Probe finds it out and caches it. That takes up to seconds. What it cannot
	// tell, it takes from a cached one that could.
	Probe(ctx context.Context, conf Config) (Verdict, error)
	// GuardFailed caches a verdict in place of v that is without its guard, which
	// could not be attached, and due for another look after some time.
	GuardFailed(conf Config, v Verdict, err error) (Verdict, error)
}

// Prober starts a detached process that probes and opens the node's gate.
type Prober interface {
	// Start returns at once. It does nothing where such a process runs. With
	// load, the process also loads the datapath where it is not loaded.
	Start(conf Config, load bool) error
}

// Deps are what [Plugin] and [Node] work with.
type Deps struct {
	Datapath Datapath
	Cgroups  Cgroups
	Verdicts Verdicts
	Prober   Prober
	// Log returns the log of a configuration, which never is standard output.
	Log func(Config) (*slog.Logger, io.Closer)
}

// Plugin serves CNI verbs.
type Plugin struct {
	Deps
	stdout   io.Writer
	fallback *slog.Logger // for what cannot wait for the configured log
	budget   time.Duration
	step     func(name string) // tests: called after each step
}

// New returns a Plugin that prints results to stdout, and to fallback what it has
// to say when the log of the configuration is not to be had.
func New(d Deps, stdout io.Writer, fallback *slog.Logger) *Plugin {
	return &Plugin{Deps: d, stdout: stdout, fallback: fallback, budget: Budget}
}

func (p *Plugin) did(step string) {
	if p.step != nil {
		p.step(step)
	}
}

// errBudget is returned by within when it has left f to itself.
var errBudget = errors.New("not done in time")

// within runs f and waits for it no longer than the budget, whatever f does. The
// context ends a little earlier, so that what heeds it can still clean up and
// say why. Where f does not heed it, the caller goes on and the process exits:
// f must be such that it may be killed at any point.
func within(budget time.Duration, f func(ctx context.Context) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), budget-budget/8)
	defer cancel()
	timer := time.NewTimer(budget)
	defer timer.Stop()
	done := make(chan error, 1)
	go func() {
		defer close(done)
		done <- safely(func() error { return f(ctx) })
	}()
	select {
	case err, returned := <-done:
		if !returned { // runtime.Goexit, which no panic handler sees
			return errors.New("ended before it was done")
		}
		return err
	case <-timer.C:
		return fmt.Errorf("%w: %v", errBudget, budget)
	}
}

// panicked is a recovered panic.
type panicked struct {
	value any
	stack []byte
}

func (e *panicked) Error() string { return fmt.Sprintf("panic: %v", e.value) }

// safely turns a panic of f into an error: a bug in the acceleration must not
// take the pod's networking with it.
func safely(f func() error) (err error) {
	defer func() {
		if v := recover(); v != nil {
			err = &panicked{value: v, stack: debug.Stack()}
		}
	}()
	return f()
}

// reason is the text that a record and a log line give for a failure.
func reason(err error) string {
	switch {
	case errors.Is(err, ErrConfig):
		return "config: " + err.Error()
	case isBusy(err):
		return "busy: " + err.Error()
	case errors.Is(err, datapath.ErrUnsupported):
		return "kernel: " + err.Error()
	case errors.Is(err, podcgroup.ErrNoCgroup2), errors.Is(err, podcgroup.ErrNotFound),
		errors.Is(err, podcgroup.ErrAmbiguous), errors.Is(err, podcgroup.ErrRefused):
		return "cgroup: " + err.Error()
	default:
		return err.Error()
	}
}

// isBusy tells a failure for want of time.
func isBusy(err error) bool {
	return errors.Is(err, attachment.ErrBusy) || errors.Is(err, datapath.ErrBusy)
}

// coded makes the error that fails a verb where the configuration wants failure.
func coded(code uint, msg string, err error) *types.Error {
	return types.NewError(code, msg, reason(err))
}

func attrs(key attachment.Key) []any {
	return []any{"network", key.Network, "container", key.ContainerID, "ifname", key.IfName}
}
