package plugin

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"

	"github.com/skipstack/skipstack/plugin/attachment"
	"github.com/skipstack/skipstack/plugin/datapath"
	"github.com/skipstack/skipstack/plugin/podcgroup"
)

// Add serves ADD. It prints the previous plugin's result, and fails only where
// there is none to print, or where the pod could not be accelerated and the
// configuration wants failure.
//
// The steps are in such an order that a process killed after any of them leaves
// something that DEL, GC or the next ADD repairs:
//
//  1. The datapath is loaded and published. Loading is atomic, belongs to no
//     pod, and has a lock of its own, so that the lock below is never held for
//     as long as it takes.
//  2. Under the lock of the run directory, the node's gate is opened if the
//     verdict is known. It belongs to no pod either.
//  3. The record is written as "attaching". From here on DEL and GC find the
//     attachment; they drop a link that may not exist yet, which is no error.
//  4. The link is attached. The datapath has no settings for the pod yet and
//     leaves its connections alone.
//  5. The pod's settings are written, and its new connections are accelerated.
//  6. The record is written as "attached". To whoever cleans up there is no
//     difference to "attaching".
//
// A record is removed last (see [Plugin.Del]), so nothing is ever attached without
// a record, unless somebody clears the run directory; then the link goes with its
// cgroup, in a sweep.
func (p *Plugin) Add(args *skel.CmdArgs) error {
	in, err := decodeInput(args.StdinData)
	if err != nil {
		return err
	}
	result, err := in.result()
	if err != nil {
		return err
	}

	// The result is at hand: from here on only onError "fail" fails the pod.
	a := &addition{p: p, args: args, in: in}
	a.conf, a.confErr = in.config()
	if err := within(p.budget, a.run); err != nil {
		var r *reported
		if !errors.As(err, &r) {
			// run is stuck somewhere, or has panicked outside its own net.
			p.fallback.Warn("pod is not accelerated", append(attrs(a.key()), "reason", reason(err))...)
			// It may do what this process leaves undone.
			if a.confErr == nil && a.conf.Mode != ModeOff {
				_ = p.Prober.Start(a.conf, true)
			}
		}
		if a.conf.OnError == OnErrorFail {
			code := types.ErrTryAgainLater
			if errors.Is(err, ErrConfig) {
				code = types.ErrInvalidNetworkConfig
			}
			return coded(code, "the pod cannot be accelerated, and onError is \"fail\"", err)
		}
	}
	if _, err := p.stdout.Write(result); err != nil {
		return types.NewError(types.ErrIOFailure, "print the result", err.Error())
	}
	return nil
}

// addition is one ADD after its result is known.
type addition struct {
	p       *Plugin
	args    *skel.CmdArgs
	in      *input
	conf    Config
	confErr error
}

func (a *addition) key() attachment.Key {
	return attachment.Key{Network: a.in.name, ContainerID: a.args.ContainerID, IfName: a.args.IfName}
}

// reported is an error that has been logged.
type reported struct{ err error }

func (e *reported) Error() string { return e.err.Error() }
func (e *reported) Unwrap() error { return e.err }

// left is the error of a pod that was left alone because somebody wanted so.
type left struct{ reason string }

func (e *left) Error() string { return e.reason }

// run accelerates the pod, or returns why not after it has cleaned up, recorded
// and logged that. Pods that somebody wants left alone are no failure.
func (a *addition) run(ctx context.Context) error {
	log, closer := a.p.Log(a.conf)
	defer closer.Close()
	pod := parsePodArgs(a.args.Args)
	log = log.With(append(attrs(a.key()), "pod", pod.namespace+"/"+pod.name)...)
	store := attachment.NewStore(a.conf.RunDir)
	record := attachment.Record{
		Key:          a.key(),
		PodNamespace: pod.namespace,
		PodName:      pod.name,
		PodUID:       pod.uid,
		NetNS:        a.args.Netns,
		Created:      time.Now().UTC(),
	}

	j := &job{addition: a, log: log, store: store, record: record, podUID: pod.uid}
	err := safely(func() error { return j.do(ctx) })
	var l *left
	switch {
	case err == nil:
		log.Debug("pod attached", "cgroup", j.record.CgroupPath)
		for _, n := range j.notes {
			log.Warn(n.text, "error", n.err.Error())
		}
		if j.plain != "" {
			log.Info("pod is not accelerated", "reason", j.plain)
		}
		return nil
	case errors.As(err, &l):
		log.Info("pod is not accelerated", "reason", l.reason)
		return nil
	}
	// A pod that fails is made anew.
	j.pending = isBusy(err) && j.record.CgroupID != 0 && j.conf.OnError == OnErrorPlain
	fields := []any{"reason", reason(err)}
	for _, n := range j.notes {
		fields = append(fields, n.about, n.err.Error())
	}
	// do's context may have ended; there is a little time left.
	end, cancel := context.WithTimeout(context.WithoutCancel(ctx), a.p.budget/16)
	defer cancel()
	if undoErr := safely(func() error { return j.giveUp(end, err) }); undoErr != nil {
		fields = append(fields, "cleanup", undoErr.Error())
	}
	log.Warn("pod is not accelerated", fields...)
	if j.pending {
		j.startProber(true)
	}
	var pan *panicked
	if errors.As(err, &pan) {
		log.Debug("stack of the panic", "stack", string(pan.stack))
	}
	return &reported{err}
}

// job is the part of an ADD that changes things.
type job struct {
	*addition
	log    *slog.Logger
	store  *attachment.Store
	record attachment.Record
	podUID string
	notes  []note
	probed bool // a moment ago, in vain
	// unguarded says that the splice guard was not to be had for the node's gate.
	unguarded bool
	// pending says that the pod could be attached later, see [Node.adopt].
	pending bool
	plain   string // why the pod is plain although it is attached
}

// note is trouble that by itself does not keep the pod from being attached. It is
// a log line of its own only where there is no other.
type note struct {
	about, text string
	err         error
}

func (j *job) do(ctx context.Context) error {
	p := j.p
	if j.confErr != nil {
		return j.confErr
	}
	rc, err := j.in.runtimeConfig()
	if err != nil {
		return err
	}
	settings, why := decide(j.conf, rc)
	j.record.Settings = newWish(j.conf.BPFFS, settings).encode()
	p.did("decided")

	pod, err := j.findCgroup(ctx, rc)
	if why != "" {
		if err == nil {
			pod.Dir.Close()
			j.record.CgroupID, j.record.CgroupPath = pod.ID, pod.Path
		}
		return j.leave(ctx, why)
	}
	if err != nil {
		return err
	}
	defer pod.Dir.Close()
	j.record.CgroupID, j.record.CgroupPath = pod.ID, pod.Path
	p.did("cgroup found")

	set, verdict, err := j.open(ctx)
	if err != nil {
		return err
	}
	defer set.Close()
	p.did("datapath open")

	gate, err := j.attach(ctx, set, pod, verdict)
	if err != nil {
		return err
	}
	j.compareSize(set)
	switch {
	case !gate.Open:
		j.startProber(false)
	case j.unguarded || j.outdated(set, gate):
		j.lookAgain()
	}
	p.did("done")
	return nil
}

func (j *job) findCgroup(ctx context.Context, rc runtimeConfig) (*podcgroup.Pod, error) {
	root, err := j.p.Cgroups.Root(j.conf.CgroupRoot)
	if err != nil {
		return nil, err
	}
	return j.p.Cgroups.Find(ctx, root, podcgroup.Request{Path: rc.cgroupPath, PodUID: j.podUID, NetNS: j.args.Netns})
}

// open opens the datapath, or loads it. The verdict is nil where it is not known
// or not needed.
func (j *job) open(ctx context.Context) (Set, *Verdict, error) {
	p, conf := j.p, j.conf
	set, err := p.Datapath.Open(conf.BPFFS)
	loaded := err == nil
	if err != nil && !errors.Is(err, datapath.ErrNotLoaded) && !errors.Is(err, datapath.ErrDamaged) {
		return nil, nil, err
	}
	closeSet := func() {
		if set != nil {
			set.Close()
		}
	}
	if loaded {
		node, err := set.Node()
		if err != nil {
			closeSet()
			return nil, nil, err
		}
		if node.Open {
			return set, nil, nil
		}
	}

	verdict, err := j.verdict()
	if err != nil {
		closeSet()
		return nil, nil, err
	}
	if loaded {
		return set, verdict, nil
	}
	// Loading may take longer than there is time, and this process end before it.
	j.pending = conf.OnError == OnErrorPlain
	if err := j.recordLoading(ctx); err != nil {
		return nil, nil, err
	}
	if err := p.Datapath.EnsureBPFFS(ctx, conf.BPFFS); err != nil {
		return nil, nil, err
	}
	set, err = p.Datapath.Load(ctx, conf.BPFFS, datapath.LoadOptions{MaxConnections: conf.MaxConnections})
	if err != nil {
		if verdict == nil {
			// The kernel may lack something, or the machine be too busy to load
			// in time. The prober has time, and the next ADDs need not try.
			j.startProber(true)
		}
		return nil, nil, err
	}
	return set, verdict, nil
}

// verdict returns nil where the kernel has not been judged yet, and an error where
// the verdict says that the datapath must not be used.
func (j *job) verdict() (*Verdict, error) {
	v, err := j.p.Verdicts.Cached(j.conf.RunDir)
	if errors.Is(err, ErrNoVerdict) {
		return nil, nil
	}
	if err != nil {
		j.notes = append(j.notes, note{"verdict", "the kernel is probed again: its verdict cannot be read", err})
		return nil, nil
	}
	if v.Inconclusive() {
		// It lapses after a minute. The next ADD then has it tried again; this
		// pod is accelerated with the others once that has told.
		j.probed = true
		j.notes = append(j.notes, note{"verdict", "pods stay plain until the kernel is judged", v.Unfit()})
		return nil, nil
	}
	if err := v.Unfit(); err != nil {
		return nil, err
	}
	return &v, nil
}

func (j *job) compareSize(set Set) {
	if n, err := set.MaxConnections(); err == nil && n != j.conf.MaxConnections {
		j.log.Warn("maxConnections is fixed when the datapath is loaded: unload it to change it",
			"configured", j.conf.MaxConnections, "loaded", n)
	}
}

// startProber cannot fail an ADD: the next one tries again.
func (j *job) startProber(load bool) {
	if j.probed {
		return
	}
	if err := j.p.Prober.Start(j.conf, load); err != nil {
		j.notes = append(j.notes, note{"prober", "the kernel cannot be probed, so pods stay plain: `skipstack doctor` looks for the cause, `skipstack load` tries again", err})
	}
}

// outdated tells if the gate, which is open, should be looked at again: this binary has
// no verdict yet, as after an upgrade; a probe of its verdict could not tell, some time
// ago; or the gate does not go by it.
func (j *job) outdated(set Set, gate datapath.NodeSettings) bool {
	v, err := j.p.Verdicts.Cached(j.conf.RunDir)
	if err != nil {
		return errors.Is(err, ErrNoVerdict)
	}
	if v.Inconclusive() {
		return false // until it lapses
	}
	build, err := set.Build()
	return err == nil && (v.Due || v.differs(j.conf, gate, build == datapath.Build()))
}

// lookAgain has the prober bring the gate up to date.
func (j *job) lookAgain() {
	if err := j.p.Prober.Start(j.conf, false); err != nil {
		j.notes = append(j.notes, note{"prober", "the kernel cannot be probed again, so pods go by what is known: `skipstack load` tries again", err})
	}
}

// attach does steps 2 to 6 of [Plugin.Add] and returns the node's gate.
func (j *job) attach(ctx context.Context, set Set, pod *podcgroup.Pod, verdict *Verdict) (gate datapath.NodeSettings, err error) {
	p, conf := j.p, j.conf
	lock, err := j.lock(ctx)
	if err != nil {
		return gate, err
	}
	defer lock.Unlock()
	p.did("locked")

	err = openGate(set, conf, verdict)
	// Nobody else would try again to load what is missing.
	j.unguarded = errors.Is(err, datapath.ErrGuard)
	if err = j.unlessGuard(err); err != nil {
		return gate, err
	}
	p.did("gate opened")

	if err := j.clear(pod.ID); err != nil {
		return gate, err
	}
	unguarded, err := p.attach(j.store, conf.BPFFS, &j.record, set, pod, j.store.Put, p.did)
	if err = j.unlessGuard(errors.Join(err, unguarded)); err != nil {
		return gate, err
	}
	if gate, err = set.Node(); err != nil {
		return gate, err
	}
	settings, _, err := set.Pod(pod.ID)
	if err != nil {
		return gate, err
	}
	j.plain = whyPlain(gate, settings)

	// Links of pods whose DEL never came, or could not do its work in time.
	if err := p.Datapath.Sweep(conf.BPFFS, sweepAtOnce); err != nil {
		j.log.Warn("links of dead cgroups are left", "error", err.Error())
	}
	p.did("swept")
	return gate, nil
}

// lock takes the lock. Who waits long for it may be left to itself when there is no more
// time, so that the record comes first: a prober that is asked for before the record is
// there, and that runs already, may have taken its last look.
func (j *job) lock(ctx context.Context) (*attachment.Lock, error) {
	if j.conf.OnError != OnErrorPlain {
		return j.store.Lock(ctx) // no prober: the pod is made anew
	}
	soon, cancel := context.WithTimeout(ctx, j.p.budget/4)
	defer cancel()
	lock, err := j.store.Lock(soon)
	if !errors.Is(err, attachment.ErrBusy) || ctx.Err() != nil {
		return lock, err
	}
	j.pending = true
	if err := j.recordWithoutLock(reason(err)); err != nil {
		j.log.Debug("the wait for the lock cannot be recorded", "error", err.Error())
	}
	j.p.did("waiting recorded")
	return j.store.Lock(ctx)
}

// unlessGuard makes a note of a splice guard that cannot be attached: pods that do
// not accept the risk are plain then.
func (j *job) unlessGuard(err error) error {
	if !errors.Is(err, datapath.ErrGuard) {
		return err
	}
	j.notes = append(j.notes, note{"guard", "splice(2) is not guarded", err})
	return nil
}

// openGate opens the node's gate if the verdict is known, and takes the splice
// guard away if the configuration does not want it. The verdict is about the programs
// of this build: the prober puts them in the place of another's first. The lock is held.
func openGate(set Set, conf Config, verdict *Verdict) error {
	node, err := set.Node()
	switch {
	case err != nil:
		return err
	case !node.Open && verdict != nil:
		if build, err := set.Build(); err != nil || build != datapath.Build() {
			return err
		}
		return set.SetNode(verdict.gate(conf))
	case conf.SpliceGuard == SpliceGuardOff && node.Guard != datapath.NoGuard:
		return set.SetNode(unguarded(node))
	}
	return nil
}

// whyPlain says why the datapath leaves the connections of an attached pod alone,
// "" where it does not. A gate that is closed is about to be opened.
func whyPlain(node datapath.NodeSettings, pod datapath.PodSettings) string {
	switch {
	case !node.Open || node.Accelerates(pod):
		return ""
	case node.SwitchedOff:
		return "switched off on this node: `skipstack on` switches it on"
	case pod.SwitchedOff:
		return "switched off: `skipstack on --pod` switches it on"
	case !pod.Enabled:
		return "another network of the pod keeps it plain"
	}
	return fmt.Sprintf("the kernel has risks that are not accepted: %s (key acceptRisks, or annotation %s)",
		node.Risks&^pod.Accepted, annotationMode)
}

// clear undoes what an earlier ADD of the same attachment has left, if that was
// on another cgroup or bpffs than this one's. The lock is held.
func (j *job) clear(cgroupID uint64) error {
	old, err := j.store.Get(j.key())
	switch {
	case errors.Is(err, attachment.ErrNotFound):
		return nil
	case errors.Is(err, attachment.ErrCorrupt):
		return j.store.Delete(j.key())
	case err != nil:
		return err
	}
	if old.CgroupID != cgroupID || wishOf(old).BPFFS != j.conf.BPFFS {
		if err := j.p.release(j.store, j.conf, old); err != nil {
			return err
		}
	}
	if old.Version > attachment.Version {
		return j.store.Delete(j.key()) // Put would not replace it
	}
	return nil
}

// leave records a pod that somebody wants left alone. If another attachment
// keeps the link of its cgroup, the pod is accelerated no longer.
func (j *job) leave(ctx context.Context, why string) error {
	err := func() error {
		lock, err := j.store.Lock(ctx)
		if err != nil {
			return err
		}
		defer lock.Unlock()
		if err := j.clear(j.record.CgroupID); err != nil {
			return err
		}
		j.record.Status, j.record.Reason = attachment.Skipped, why
		if err := j.store.Put(j.record); err != nil {
			return err
		}
		j.p.did("skip recorded")
		if j.record.CgroupID == 0 {
			return nil
		}
		return j.p.settle(j.store, j.conf.BPFFS, j.record.CgroupID, nil, nil)
	}()
	if errors.Is(err, attachment.ErrBusy) {
		err = errors.Join(err, j.recordWithoutLock(why))
	}
	if err != nil {
		return &left{fmt.Sprintf("%s; other attachments of the pod may not heed it: %v", why, err)}
	}
	return &left{why}
}

// giveUp makes sure that a pod which could not be accelerated is plain, and
// records why.
func (j *job) giveUp(ctx context.Context, cause error) error {
	lock, err := j.store.Lock(ctx)
	if errors.Is(err, attachment.ErrBusy) {
		return j.recordWithoutLock(reason(cause))
	}
	if err != nil {
		return err
	}
	defer lock.Unlock()
	// If this fails, the record stays as it is, for DEL to try again.
	if err := j.clear(0); err != nil {
		return err
	}
	return j.store.Put(j.skipped(reason(cause)))
}

// recordLoading records that the pod is plain until the datapath is loaded. That
// replaces the record of an earlier ADD: from before the node was booted it would
// say that the pod is attached, and nobody would adopt it.
func (j *job) recordLoading(ctx context.Context) error {
	const why = "busy: the datapath is being loaded"
	ctx, cancel := context.WithTimeout(ctx, j.p.budget/16)
	defer cancel()
	lock, err := j.store.Lock(ctx)
	if errors.Is(err, attachment.ErrBusy) {
		return j.recordWithoutLock(why)
	}
	if err != nil {
		return err
	}
	defer lock.Unlock()
	if err := j.clear(0); err != nil {
		// The earlier record stays, so that DEL tries again, as does attach.
		j.log.Debug("the earlier attachment cannot be undone before the datapath is loaded", "error", err.Error())
		return nil
	}
	return j.store.Put(j.skipped(why))
}

// skipped is the record of an attachment that has no part in any cgroup.
func (j *job) skipped(why string) attachment.Record {
	r := j.record
	if j.pending {
		r.Pending = &attachment.Pending{CgroupID: r.CgroupID, CgroupPath: r.CgroupPath, Settings: r.Settings}
	}
	r.Status, r.Reason = attachment.Skipped, why
	r.CgroupID, r.CgroupPath, r.BPFFSDev, r.MountNS, r.Settings = 0, "", 0, 0, nil
	return r
}

// recordWithoutLock records a pod that was skipped because the lock was not to be
// had. A record needs the lock for what it says of a cgroup only, and this one
// says nothing; one that is there already may say something, and stays. What one says
// from before the node was booted holds no longer.
func (j *job) recordWithoutLock(why string) error {
	old, err := j.store.Get(j.key())
	if err == nil && !old.Stale || err != nil && !errors.Is(err, attachment.ErrNotFound) {
		return err
	}
	return j.store.Put(j.skipped(why))
}
