package verdict

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/features"
	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/plugin/attachment"
	"github.com/skipstack/skipstack/plugin/datapath"
)

const (
	// Times are those of an ordinary machine, where loading the programs and
	// starting the worker takes less than ordinaryStart; a slower one (busy, or
	// emulated) has proportionally more, but no more than slowest times as much.
	ordinaryStart = 400 * time.Millisecond
	slowest       = 20
	// hello is how long the first worker may take to answer.
	hello = 2 * time.Second

	// budget is how long all experiments may take, loading aside.
	budget = 2300 * time.Millisecond
	// patience is how long one attempt at an experiment may take at most, and
	// grace what its answer may take on top before the worker is given up.
	patience = 600 * time.Millisecond
	grace    = 100 * time.Millisecond
	// attempts at an experiment that does not come off, as may happen on a busy
	// machine.
	attempts = 10
	// settle is how long the kernel may take to report bytes that have arrived.
	// What it does in the sender's context takes no time.
	settle      = 150 * time.Millisecond
	settleAtOne = 10 * time.Millisecond
)

// probeSet is the datapath of a run, with plenty for the experiments. Nobody but the worker is in the
// scratch cgroup, and it may be slow.
func probeSet() datapath.LoadOptions {
	return datapath.LoadOptions{MaxConnections: 64, ClaimWindow: slowest * patience}
}

// Env is what Run works with.
type Env struct {
	// CgroupRoot is the cgroup2 mount, or a cgroup below it that may have
	// children. It gets a scratch cgroup for the time of the run.
	CgroupRoot string
	// Exe is the program that calls [Worker] when its first argument is
	// [WorkerArg]; empty means the running one.
	Exe string

	workerArgs []string // tests: in place of WorkerArg
}

// Run probes the kernel. On an ordinary machine it takes about half a second, and
// less than three whatever the kernel does. A probe that hangs is given up and
// takes no other with it.
//
// An error means that there is no verdict: the caller may not probe
// ([ErrPrivilege]), or ctx ended. The scratch cgroup and the worker are gone when
// Run returns; what killed callers have left is removed.
func Run(ctx context.Context, env Env) (*Verdict, error) {
	env, err := env.complete()
	if err != nil {
		return nil, err
	}
	v, err := newVerdict()
	if err != nil {
		return nil, err
	}
	if err := sweep(ctx, env.CgroupRoot); err != nil {
		return nil, err
	}
	if err := datapath.CheckKernel(); err != nil {
		v.unloadable(err)
		return v, nil
	}
	// Errors of loading may hide that it is not permitted: what looks for the
	// reason is not permitted either.
	if err := features.HaveProgramType(ebpf.SkMsg); errors.Is(err, fs.ErrPermission) {
		return nil, privilege(fmt.Errorf("load BPF programs: %w", err))
	}
	start := time.Now()
	set, err := datapath.LoadPrivate(probeSet())
	if errors.Is(err, datapath.ErrUnsupported) {
		v.unloadable(err)
		return v, nil
	}
	if err != nil {
		return nil, privilege(err)
	}
	v.set(ProbeLoad, OK, "the BPF programs load")
	p := &prober{env: env, set: set, v: v, start: start}
	err = p.probe(ctx)
	if err = errors.Join(err, p.close()); err != nil {
		return nil, err
	}
	v.conclude()
	return v, nil
}

// complete fills in what is not given, and checks what is.
func (e Env) complete() (Env, error) {
	if e.Exe == "" {
		e.Exe = "/proc/self/exe"
	}
	if e.workerArgs == nil {
		e.workerArgs = []string{WorkerArg}
	}
	return e, checkCgroup2(e.CgroupRoot)
}

// privilege marks errors of callers that may not do what they tried.
func privilege(err error) error {
	if errors.Is(err, fs.ErrPermission) {
		return fmt.Errorf("%w: %w", ErrPrivilege, err)
	}
	return err
}

// newVerdict says that nothing was tried.
func newVerdict() (*Verdict, error) {
	boot, err := attachment.BootID()
	if err != nil {
		return nil, err
	}
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return nil, fmt.Errorf("uname: %w", err)
	}
	v := &Verdict{
		Kernel:   unix.ByteSliceToString(uts.Release[:]),
		BootID:   boot,
		Build:    build(),
		ProbedAt: time.Now().UTC().Truncate(time.Second),
	}
	for _, k := range kinds {
		v.Probes = append(v.Probes, Probe{k.name, CouldNotTell, "not tried"})
	}
	return v, nil
}

// Untried is the verdict where no probe was made: every one could not tell, for the
// given reason. So the level is [Unsupported], and inconclusive.
func Untried(why string) (*Verdict, error) {
	v, err := newVerdict()
	if err != nil {
		return nil, err
	}
	for _, k := range kinds {
		v.set(k.name, CouldNotTell, "not tried: "+why)
	}
	v.conclude()
	return v, nil
}

func checkCgroup2(path string) error {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return &fs.PathError{Op: "find the cgroup2 mount: statfs", Path: path, Err: err}
	}
	if int64(st.Type) != unix.CGROUP2_SUPER_MAGIC {
		return fmt.Errorf("%s is not on a cgroup2 file system (mount -t cgroup2 none DIRECTORY)", path)
	}
	return nil
}

// unloadable is the verdict on a kernel that refuses the programs.
func (v *Verdict) unloadable(err error) {
	for _, k := range kinds {
		v.set(k.name, CouldNotTell, "not tried: the programs do not load")
	}
	v.set(ProbeLoad, NotOK, strings.TrimPrefix(err.Error(), datapath.ErrUnsupported.Error()+": "))
	v.conclude()
}

// set records a probe's outcome.
func (v *Verdict) set(name string, r Result, detail string) {
	detail, _, _ = strings.Cut(detail, "\n") // joined errors and the verifier's log have more
	i := slices.IndexFunc(v.Probes, func(p Probe) bool { return p.Name == name })
	v.Probes[i] = Probe{name, r, detail}
}

// prober carries experiments out.
type prober struct {
	env     Env
	v       *Verdict
	set     *datapath.Set
	scratch *scratch
	worker  *worker
	node    datapath.NodeSettings
	start   time.Time // of loading
	end     time.Time // of the budget
	left    int       // probes that share what is left of it, this one included

	slowness time.Duration // factor of all times
}

// close ends the worker first, whose sockets the datapath serves, and removes
// the cgroup last, which both use.
func (p *prober) close() error {
	errs := []error{p.endWorker(), p.set.Close()}
	if p.scratch != nil {
		errs = append(errs, p.scratch.remove(p.ending()))
	}
	return errors.Join(errs...)
}

func (p *prober) endWorker() error {
	if p.worker == nil {
		return nil
	}
	w := p.worker
	p.worker = nil
	return w.kill(p.ending())
}

// ending is how long the end of a worker, and of its cgroup, may take.
func (p *prober) ending() time.Duration { return time.Second * max(1, p.slowness) }

// probe makes the probes. Errors are about this process, not about the kernel.
func (p *prober) probe(ctx context.Context) (err error) {
	runtime.LockOSThread() // see startWorker
	defer runtime.UnlockOSThread()
	defer func() { err = errors.Join(err, p.endWorker()) }()
	if err := p.begin(ctx); err != nil {
		return err
	}
	judges := []func(context.Context) error{
		p.fionread, // tells how the datapath is to be set up for the others
		p.redirect, p.charged, p.epoll, p.splice,
		p.order, // may take what the others left of the budget
	}
	for i, judge := range judges {
		p.left = len(judges) - i
		if err := judge(ctx); err != nil {
			return err
		}
	}
	return nil
}

// begin makes the place where the experiments are made and starts the first
// worker.
func (p *prober) begin(ctx context.Context) (err error) {
	if p.scratch, err = newScratch(p.env.CgroupRoot); err != nil {
		return privilege(err)
	}
	if err := p.attach(); err != nil {
		return err
	}
	// The first worker must start: what keeps it from it is no verdict.
	p.slowness = min(1+time.Since(p.start)/ordinaryStart, slowest)
	if err := p.startWorker(ctx, hello+time.Since(p.start)); err != nil {
		return privilege(err)
	}
	p.slowness = min(1+time.Since(p.start)/ordinaryStart, slowest)
	p.end = time.Now().Add(budget * p.slowness)
	return nil
}

// attach opens the datapath's gate and attaches it to the scratch cgroup.
func (p *prober) attach() error {
	p.node = datapath.NodeSettings{Open: true}
	if err := p.set.SetNode(p.node); err != nil {
		return err
	}
	_, err := p.set.Attach(p.scratch.dir, p.scratch.id)
	return err
}

// reload starts over with a datapath that knows no funnel.
func (p *prober) reload() error {
	if err := p.set.Close(); err != nil {
		return err
	}
	set, err := datapath.LoadPrivate(probeSet())
	if err != nil {
		return err
	}
	p.set = set
	return p.attach()
}

func (p *prober) startWorker(ctx context.Context, within time.Duration) error {
	w, err := startWorker(p.env.Exe, p.env.workerArgs, p.scratch.dir)
	if err != nil {
		return err
	}
	p.worker = w
	r, err := p.await(ctx, within)
	if err == nil && r.Error != "" {
		err = errors.New(r.Error)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("start the probes' worker: %w", err), p.endWorker())
	}
	return nil
}

// await waits for the worker's next reply.
func (p *prober) await(ctx context.Context, d time.Duration) (reply, error) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case r, ok := <-p.worker.replies:
		if !ok {
			return reply{}, fmt.Errorf("the worker ended: %s", p.worker.lastWords())
		}
		return r, nil
	case <-ctx.Done():
		return reply{}, ctx.Err()
	case <-timer.C:
		return reply{}, fmt.Errorf("no answer within %v", d)
	}
}

// observation is what an experiment and the datapath's counters say together.
type observation struct {
	finding
	count datapath.Counters
	// trouble is why there is no observation: the probe could not tell.
	trouble string
}

func (o observation) redirected() datapath.Count { return o.count.Messages["redirected"] }

// takenTurns is what enrolled sockets left to TCP because order or the receiver's
// limit asked for it.
func (o observation) takenTurns() uint64 {
	var n uint64
	for _, why := range []string{"receiver_full", "not_read", "unacknowledged"} {
		n += o.count.Messages[why].Messages
	}
	return n
}

// passed says why messages went by TCP.
func (o observation) passed() string {
	var why []string
	for label, n := range o.count.Messages {
		if n.Messages > 0 && label != "redirected" {
			why = append(why, fmt.Sprintf("%s %d", label, n.Messages))
		}
	}
	slices.Sort(why)
	return strings.Join(why, ", ")
}

// share is how long the next attempt may take, so that the probes that hang leave
// time to the others.
func (p *prober) share() time.Duration {
	return min(patience*p.slowness, time.Until(p.end)/time.Duration(p.left)-grace*p.slowness)
}

// observe makes an experiment, again if it does not come off. Its connections
// must be enrolled all, else it says nothing.
func (p *prober) observe(ctx context.Context, name string, unreadLimit uint32, settle time.Duration) (observation, error) {
	var o observation
	start := time.Now()
	for range attempts {
		var err error
		if o, err = p.attempt(ctx, name, unreadLimit, settle); err != nil || o.trouble == "" {
			return o, err
		}
		if hung := p.worker == nil; hung || time.Since(start) > patience*p.slowness {
			break
		}
	}
	return o, nil
}

func (p *prober) attempt(ctx context.Context, name string, unreadLimit uint32, settle time.Duration) (o observation, err error) {
	if err := ctx.Err(); err != nil {
		return o, err
	}
	within := p.share()
	if within <= 0 {
		o.trouble = "not tried: other probes took too long"
		return o, nil
	}
	if p.worker == nil {
		if err := p.startWorker(ctx, within); err != nil {
			o.trouble = err.Error()
			return o, ctx.Err()
		}
	}
	pod := datapath.PodSettings{Enabled: true, UnreadLimit: unreadLimit}
	if err := p.set.SetPod(p.scratch.id, pod); err != nil {
		return o, err
	}
	before, err := p.set.Counters()
	if err != nil {
		return o, err
	}
	r, err := p.ask(ctx, request{name, within, settle * p.slowness})
	if ctx.Err() != nil {
		return o, ctx.Err()
	}
	if err != nil {
		// Whatever it hangs in, it is not to take the next probe along.
		o.trouble = err.Error()
		return o, p.endWorker()
	}
	if r.Error != "" {
		o.trouble = r.Error
		return o, nil
	}
	after, err := p.set.Counters()
	if err != nil {
		return o, err
	}
	o.finding, o.count = r.Finding, after.Since(before)
	if enrolled := o.count.Connections["enrolled"]; enrolled != o.Connections && o.Fault == "" {
		o.trouble = fmt.Sprintf("%d of %d connections were enrolled (%s)", enrolled, o.Connections, refusals(o.count))
	}
	if o.count.Messages["memory"].Messages > 0 && o.Fault == "" {
		o.trouble = "TCP on this node is short of memory (net.ipv4.tcp_mem), so nothing is redirected now"
	}
	return o, nil
}

func (p *prober) ask(ctx context.Context, r request) (reply, error) {
	// The request fits into the pipe, so writing it does not block.
	if err := json.NewEncoder(p.worker.in).Encode(r); err != nil {
		return reply{}, fmt.Errorf("the worker ended: %s", p.worker.lastWords())
	}
	return p.await(ctx, r.Within+grace*p.slowness)
}

func refusals(c datapath.Counters) string {
	var why []string
	for label, n := range c.Connections {
		if n > 0 && label != "enrolled" {
			why = append(why, fmt.Sprintf("%s %d", label, n))
		}
	}
	slices.Sort(why)
	if len(why) == 0 {
		return "no reason was counted"
	}
	return strings.Join(why, ", ")
}
