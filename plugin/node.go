package plugin

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/skipstack/skipstack/plugin/attachment"
	"github.com/skipstack/skipstack/plugin/datapath"
)

// reasonUnloaded is the reason of attachments that [Node.Unload] has ended.
const reasonUnloaded = "unloaded"

const (
	// lockWait is how long an operator's command waits for a lock.
	lockWait = 10 * time.Second
	// probeWait is how long one waits for a prober to finish.
	probeWait = 30 * time.Second
)

// ErrNoPod is returned by [Node.SwitchPod] for a pod that has no attachment.
var ErrNoPod = errors.New("no attachment of this pod is recorded on this node")

// Node does what the operator of a node can do by hand.
type Node struct {
	Deps
	lockWait, probeWait time.Duration
	proc                string
}

// NewNode returns a Node.
func NewNode(d Deps) *Node {
	return &Node{Deps: d, lockWait: lockWait, probeWait: probeWait, proc: "/proc"}
}

// Loaded is what [Node.Load] has found or done.
type Loaded struct {
	// Was is what was loaded before: "nothing", "this build", "another build".
	Was            string
	MaxConnections uint32
	Verdict        Verdict
	Node           datapath.NodeSettings
	// Plain is why pods without annotations stay plain with this configuration,
	// "" where they do not. The switch is not considered.
	Plain string
}

// Load loads the datapath or, where another build's is loaded, puts this build's
// in its place; probes the kernel where this boot and binary have no verdict; and
// opens the node's gate accordingly.
//
// The error wraps [datapath.ErrUnsupported] where the kernel cannot run the
// programs. A verdict that forbids acceleration is no error.
func (n *Node) Load(ctx context.Context, conf Config) (Loaded, error) {
	var out Loaded
	// The probe needs it. To find it missing later would leave the datapath loaded.
	if _, err := n.Cgroups.Root(conf.CgroupRoot); err != nil {
		return out, err
	}
	// Nor is the run directory to be made in vain.
	mounting, mounted := context.WithTimeout(ctx, n.lockWait)
	defer mounted()
	if err := n.Datapath.EnsureBPFFS(mounting, conf.BPFFS); err != nil {
		return out, err
	}
	probe, err := n.lockProbe(ctx, conf)
	if err != nil {
		return out, err
	}
	defer probe.Close()
	waiting, cancel := context.WithTimeout(ctx, n.lockWait)
	defer cancel()
	out.Was = "this build"
	if set, err := n.Datapath.Open(conf.BPFFS); err == nil {
		set.Close()
	} else if errors.Is(err, datapath.ErrNotLoaded) || errors.Is(err, datapath.ErrDamaged) {
		out.Was = "nothing"
	} else {
		return out, err
	}
	set, changed, err := n.Datapath.Upgrade(waiting, conf.BPFFS, datapath.LoadOptions{MaxConnections: conf.MaxConnections})
	if err != nil {
		return out, err
	}
	defer set.Close()
	if changed {
		out.Was = "another build"
	}
	if out.MaxConnections, err = set.MaxConnections(); err != nil {
		return out, err
	}
	if out.Verdict, err = n.verdict(ctx, conf); err != nil {
		return out, err
	}
	if out.Verdict, err = n.apply(ctx, conf, set, out.Verdict); err != nil {
		return out, err
	}
	if err := n.adopt(ctx, conf, set); err != nil {
		return out, err
	}
	if out.Node, err = set.Node(); err != nil {
		return out, err
	}
	out.Plain = plainOf(conf, out.Node)
	return out, nil
}

// Loaded returns nil if the datapath is loaded, this build's or another's. The error
// wraps [datapath.ErrNotLoaded] or [datapath.ErrDamaged] where it is not.
func (n *Node) Loaded(conf Config) error {
	set, err := n.Datapath.Open(conf.BPFFS)
	if err != nil {
		return err
	}
	return set.Close()
}

// plainOf says why a pod that asks for nothing stays plain, whatever the switch.
func plainOf(conf Config, node datapath.NodeSettings) string {
	settings, why := decide(conf, runtimeConfig{})
	switch {
	case why == reasonMode:
		return "mode is off"
	case why != "":
		return why
	case !node.Open:
		return "the kernel is not supported"
	}
	node.SwitchedOff = false
	return whyPlain(node, settings)
}

// probeRounds is how often Probe tries to set the gate and to attach pods at most:
// some may be impossible to attach, and a lock that somebody holds is waited for in
// each round for lockWait.
const probeRounds = 12

// Probe is the detached child of an ADD: it finds the verdict out, opens the
// node's gate if the datapath is loaded, or if it may load it, and attaches the
// pods whose ADD had no time to. held is the probe lock that the child has
// inherited, or nil; Probe closes it.
func (n *Node) Probe(ctx context.Context, conf Config, load bool, held *os.File) (v Verdict, err error) {
	if held == nil {
		if held, err = n.lockProbe(ctx, conf); err != nil {
			return Verdict{}, err
		}
	}
	for range probeRounds {
		before := pendingADDs(conf)
		v, err = n.probe(ctx, conf, load, held)
		// An ADD that gave up after the last look for pods started no prober,
		// because this one held the lock.
		came := func(a pendingADD) bool { return !slices.Contains(before, a) }
		if !isBusy(err) && (!v.Supported || !slices.ContainsFunc(pendingADDs(conf), came)) {
			break
		}
		again, lockErr := lockProbe(ended(), conf.RunDir)
		if lockErr != nil {
			break // another prober looks
		}
		held = again
	}
	return v, err
}

func (n *Node) probe(ctx context.Context, conf Config, load bool, held *os.File) (Verdict, error) {
	// To the end, so that an Unload that waits for the lock comes after all.
	defer held.Close()
	v, err := n.verdict(ctx, conf)
	if err != nil {
		return v, err
	}
	if err := v.Unfit(); err != nil && !v.Inconclusive() {
		if err := n.dismiss(ctx, conf, err); err != nil {
			return v, err
		}
	}
	set, err := n.Datapath.Open(conf.BPFFS)
	if load && v.Supported && (errors.Is(err, datapath.ErrNotLoaded) || errors.Is(err, datapath.ErrDamaged)) {
		waiting, cancel := context.WithTimeout(ctx, n.lockWait)
		defer cancel()
		if err := n.Datapath.EnsureBPFFS(waiting, conf.BPFFS); err != nil {
			return v, err
		}
		set, err = n.Datapath.Load(waiting, conf.BPFFS, datapath.LoadOptions{MaxConnections: conf.MaxConnections})
	}
	if errors.Is(err, datapath.ErrNotLoaded) {
		return v, nil // unloaded meanwhile; the next ADD loads it and finds the verdict
	}
	if err != nil {
		return v, err
	}
	if v.Unfit() == nil {
		set, err = n.renew(ctx, conf, set)
	}
	defer set.Close()
	if err == nil {
		v, err = n.update(ctx, conf, set, v)
	}
	return v, errors.Join(err, n.adopt(ctx, conf, set))
}

// renew puts this build's programs in the place of another's, behind a gate that is
// closed: to open it is for a verdict on the programs that are there, and those may be
// what it was closed for. It returns the set to go on with, and closes the other.
func (n *Node) renew(ctx context.Context, conf Config, set Set) (Set, error) {
	now, err := set.Node()
	if err == nil && now.Open {
		return set, nil
	}
	build, buildErr := set.Build()
	if err = errors.Join(err, buildErr); err != nil || build == datapath.Build() {
		return set, err
	}
	waiting, cancel := context.WithTimeout(ctx, n.lockWait)
	defer cancel()
	fresh, _, err := n.Datapath.Upgrade(waiting, conf.BPFFS, datapath.LoadOptions{MaxConnections: conf.MaxConnections})
	if err != nil {
		return set, fmt.Errorf("replace another build's programs: %w", err)
	}
	set.Close()
	return fresh, nil
}

// verdict returns the cached verdict or probes: without one, and where the last
// probe could not tell, which may go better now. What could tell too little to
// judge the kernel is tried again at once, the rest when it is due. The probe lock
// is held.
func (n *Node) verdict(ctx context.Context, conf Config) (Verdict, error) {
	v, err := n.Verdicts.Cached(conf.RunDir)
	if err == nil && !v.Inconclusive() && !v.Due {
		return v, nil
	}
	return n.Verdicts.Probe(ctx, conf)
}

// lockProbe keeps out other probers, and whoever loads or unloads by hand.
func (n *Node) lockProbe(ctx context.Context, conf Config) (*os.File, error) {
	ctx, cancel := context.WithTimeout(ctx, n.probeWait)
	defer cancel()
	return lockProbe(ctx, conf.RunDir)
}

// apply sets the node's gate to what the verdict says, as setGate does.
func (n *Node) apply(ctx context.Context, conf Config, set Set, v Verdict) (Verdict, error) {
	lock, err := n.lock(ctx, conf)
	if err != nil {
		return v, err
	}
	defer lock.Unlock()
	return n.setGate(conf, set, v, v.gate(conf))
}

// update is apply where nobody has asked for it. A gate that is open stays as it is
// while the verdict is inconclusive, and is not opened further for the programs of
// another build, see [Verdict.over].
func (n *Node) update(ctx context.Context, conf Config, set Set, v Verdict) (Verdict, error) {
	lock, err := n.lock(ctx, conf)
	if err != nil {
		return v, err
	}
	defer lock.Unlock()
	now, err := set.Node()
	if err != nil || now.Open && v.Inconclusive() {
		return v, err
	}
	build, err := set.Build()
	if err != nil {
		return v, err
	}
	return n.setGate(conf, set, v, v.over(conf, now, build == datapath.Build()))
}

// setGate sets the node's gate. Where the splice guard cannot be loaded, it returns
// the verdict without it, and an error that wraps [datapath.ErrGuard]. The lock is
// held.
func (n *Node) setGate(conf Config, set Set, v Verdict, gate datapath.NodeSettings) (Verdict, error) {
	err := set.SetNode(gate)
	if !errors.Is(err, datapath.ErrGuard) {
		return v, err
	}
	if node, nodeErr := set.Node(); nodeErr != nil || node.Guard != datapath.NoGuard {
		return v, errors.Join(err, nodeErr) // each pod that is attached tries again
	}
	v, recordErr := n.Verdicts.GuardFailed(conf, v, err)
	return v, errors.Join(err, recordErr)
}

func (n *Node) lock(ctx context.Context, conf Config) (*attachment.Lock, error) {
	ctx, cancel := context.WithTimeout(ctx, n.lockWait)
	defer cancel()
	return attachment.NewStore(conf.RunDir).Lock(ctx)
}

// Unloaded is what [Node.Unload] has done.
type Unloaded struct {
	Was      bool   // whether anything was loaded
	Detached int    // pods that were attached until now
	Sockets  uint64 // that live on by TCP and keep the programs until they close
}

// Unload takes the datapath away. While pods are attached it returns an error
// wrapping [datapath.ErrInUse] unless forced, and then first records them as
// skipped, so that CHECK does not complain of links that are meant to be gone.
// No connection loses a byte: what is enrolled goes on by TCP. The error wraps
// [datapath.ErrNoBPFFS] where the configured BPF file system is none.
func (n *Node) Unload(ctx context.Context, conf Config, force bool) (Unloaded, error) {
	var out Unloaded
	if _, err := n.Datapath.Published(conf.BPFFS); err != nil {
		return out, fmt.Errorf("nothing was loaded at %s: %w", conf.BPFFS, err)
	}
	// A prober that is under way would load the datapath again.
	probe, err := n.lockProbe(ctx, conf)
	if err != nil {
		return out, err
	}
	defer probe.Close()
	lock, err := n.lock(ctx, conf)
	if err != nil {
		return out, err
	}
	defer lock.Unlock()

	if out.Was, err = n.Datapath.Published(conf.BPFFS); err != nil {
		return out, err
	}
	store := attachment.NewStore(conf.RunDir)
	if err := n.Datapath.Sweep(conf.BPFFS, 0); err != nil {
		return out, err
	}
	records, listErr := store.List()
	var ours []attachment.Record
	var pods []string
	for _, r := range records {
		if bpffs := wishOf(r).BPFFS; !wants(r) || bpffs != "" && bpffs != conf.BPFFS {
			continue
		}
		ours = append(ours, r)
		// After the sweep a record without a link is that of a dead pod.
		if has, err := n.Datapath.HasLink(conf.BPFFS, r.CgroupID); err != nil {
			return out, err
		} else if has {
			pods = append(pods, podName(r))
		}
	}
	// A pod has an attachment for each of its networks.
	slices.Sort(pods)
	pods = slices.Compact(pods)
	if len(pods) > 0 && !force {
		return out, fmt.Errorf("%w: %d (%s)", datapath.ErrInUse, len(pods), list(pods))
	}
	for _, r := range ours {
		r.Status, r.Reason = attachment.Skipped, reasonUnloaded
		if r.Version > attachment.Version {
			continue // a newer version's; its CHECK has to cope
		}
		if err := store.Put(r); err != nil {
			return out, err
		}
	}
	out.Detached = len(pods)
	waiting, cancel := context.WithTimeout(ctx, n.lockWait)
	defer cancel()
	left, err := n.Datapath.Unload(waiting, conf.BPFFS, force)
	out.Sockets = left.Sockets
	return out, errors.Join(err, listErr)
}

func podName(r attachment.Record) string {
	if r.PodName == "" {
		return r.ContainerID
	}
	return r.PodNamespace + "/" + r.PodName
}

func list(names []string) string {
	const most = 5
	if len(names) > most {
		return strings.Join(names[:most], ", ") + ", ..."
	}
	return strings.Join(names, ", ")
}

// Switched is what [Node.Switch] or [Node.SwitchPod] has done.
type Switched struct {
	Sets    int    // sets of programs that were reached, for the node
	Pods    int    // pods that were switched, for a pod
	Sockets uint64 // enrolled sockets that stay so until they close

	// Left counts those sockets again. Call it as long as that is of interest.
	Left func() (uint64, error)
}

// Switch switches acceleration on or off for the node, at once and for live
// connections too, which go on by TCP. It needs neither the lock nor the run
// directory: it is the brake.
func (n *Node) Switch(conf Config, off bool) (Switched, error) {
	sets, err := n.Datapath.SwitchNode(conf.BPFFS, off)
	if err != nil {
		return Switched{Sets: sets}, fmt.Errorf("not every set of programs was switched, but %d: %w", sets, err)
	}
	if sets == 0 {
		return Switched{}, fmt.Errorf("%w at %s: nothing to switch", datapath.ErrNotLoaded, conf.BPFFS)
	}
	out := Switched{Sets: sets, Left: func() (uint64, error) { return n.Sockets(conf) }}
	if out.Sockets, err = out.Left(); err != nil {
		state := "on"
		if off {
			state = "off"
		}
		return out, fmt.Errorf("acceleration is switched %s, but the enrolled sockets that are left cannot be counted: %w", state, err)
	}
	return out, nil
}

// SwitchPod does the same for one pod, which stays switched until it is deleted
// or the datapath unloaded. The error wraps [ErrNoPod] for a pod that has no
// attachment. Other errors say what could not be switched, though all was tried.
func (n *Node) SwitchPod(ctx context.Context, conf Config, namespace, name string, off bool) (Switched, error) {
	lock, err := n.lock(ctx, conf)
	if err != nil {
		return Switched{}, err
	}
	defer lock.Unlock()
	records, listErr := attachment.NewStore(conf.RunDir).List()
	cgroups := map[string]map[uint64]bool{} // by the BPF file system of the link
	why := ""
	for _, r := range records {
		if r.PodNamespace != namespace || r.PodName != name || r.Stale {
			continue
		}
		if !wants(r) {
			why = fmt.Sprintf(": it was skipped (%s)", r.Reason)
			continue
		}
		bpffs := cmp.Or(wishOf(r).BPFFS, conf.BPFFS)
		if cgroups[bpffs] == nil {
			cgroups[bpffs] = map[uint64]bool{}
		}
		cgroups[bpffs][r.CgroupID] = true
	}
	if len(cgroups) == 0 {
		return Switched{}, errors.Join(fmt.Errorf("%w: %s/%s%s", ErrNoPod, namespace, name, why), listErr)
	}
	errs := []error{listErr} // what cannot be read may be the pod's too
	places := slices.Sorted(maps.Keys(cgroups))
	out := Switched{Left: func() (sum uint64, err error) {
		var errs []error
		for _, bpffs := range places {
			sockets, err := n.socketsOf(bpffs, cgroups[bpffs])
			sum += sockets
			errs = append(errs, err)
		}
		return sum, errors.Join(errs...)
	}}
	for _, bpffs := range places {
		pods, sockets, err := n.switchCgroups(bpffs, cgroups[bpffs], off)
		out.Pods += pods
		out.Sockets += sockets
		errs = append(errs, err)
	}
	err = errors.Join(errs...)
	if out.Pods == 0 && err == nil {
		err = fmt.Errorf("%w: %s/%s is recorded, but %s has no settings of it", ErrNoPod, namespace, name, strings.Join(places, ", "))
	}
	return out, err
}

// switchCgroups switches those that have settings, and returns how many, and how
// many sockets of theirs are enrolled.
func (n *Node) switchCgroups(bpffs string, cgroups map[uint64]bool, off bool) (pods int, sockets uint64, err error) {
	set, err := n.Datapath.Open(bpffs)
	if err != nil {
		return 0, 0, err
	}
	defer set.Close()
	var errs []error
	for _, id := range slices.Sorted(maps.Keys(cgroups)) {
		settings, known, err := set.Pod(id)
		if err == nil && known {
			settings.SwitchedOff = off
			if err = set.SetPod(id, settings); err == nil {
				pods++
			}
		}
		errs = append(errs, err)
	}
	sockets, err = live(set, cgroups)
	return pods, sockets, errors.Join(append(errs, err)...)
}

// socketsOf counts the enrolled sockets of some cgroups.
func (n *Node) socketsOf(bpffs string, cgroups map[uint64]bool) (uint64, error) {
	set, err := n.Datapath.Open(bpffs)
	if err != nil {
		return 0, err
	}
	defer set.Close()
	return live(set, cgroups)
}

// live counts the enrolled sockets of some cgroups; nil means all.
func live(set Set, cgroups map[uint64]bool) (sum uint64, err error) {
	counters, err := set.PodCounters()
	for id, c := range counters {
		if cgroups == nil || cgroups[id] {
			sum += c.Live
		}
	}
	return sum, err
}

// Sockets counts the enrolled sockets of the set of programs published below the
// configuration's BPF file system. Where there is none, as after it was unmounted, or
// where pins of it are missing, it counts those of all sets in the kernel.
func (n *Node) Sockets(conf Config) (uint64, error) {
	sockets, err := n.socketsOf(conf.BPFFS, nil)
	if errors.Is(err, datapath.ErrNotLoaded) || errors.Is(err, datapath.ErrDamaged) || errors.Is(err, datapath.ErrNoBPFFS) {
		return n.Datapath.LiveInKernel()
	}
	return sockets, err
}
