// Package doctor examines a node for `skipstack doctor`: what its kernel does with
// sockets in a sockhash, what else on the node has a say in it, what ADD would make
// of pods, and what acceleration would take in memory.
//
// It changes nothing. Probes run in a scratch cgroup and in namespaces of their own,
// which are gone when it returns.
package doctor

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/plugin"
	"github.com/skipstack/skipstack/plugin/attachment"
	"github.com/skipstack/skipstack/plugin/datapath"
	"github.com/skipstack/skipstack/plugin/podcgroup"
	"github.com/skipstack/skipstack/plugin/verdict"
)

// Kernel is what doctor asks of package verdict, which says what each does.
type Kernel interface {
	Run(ctx context.Context, cgroupRoot string) (*verdict.Verdict, error)
	Cached(runDir string) (*verdict.Verdict, error)
	Save(v *verdict.Verdict, runDir string) error
	Memory(ctx context.Context, cgroupRoot string, maxConnections uint32, funnel bool) (verdict.Memory, error)
	Others(ctx context.Context, cgroupRoot, proc string) ([]verdict.Other, error)
}

// Options say what to examine.
type Options struct {
	Root    string // directory below which the node's files are looked at; empty: /
	ConfDir string // of network configurations
	BinDir  string // of CNI plugins
	// Config is what the conflist has, Conflist where it is from, see [FindConflist].
	Config   plugin.Config
	Conflist Conflist
	// NoCache keeps the verdict from being stored for ADD.
	NoCache bool
	Deps    plugin.Deps
	Kernel  Kernel // nil: this one
}

// Report is what [Examine] has found. As JSON it is an object with verdict, risks
// and probes, among others.
type Report struct {
	Verdict    *verdict.Verdict
	ProbeError string        // why the kernel was not probed, "" where it was
	Lacks      string        // what skipstack cannot do without and the node certainly has not
	WrongRoot  bool          // the cgroup root that the configuration names is none
	Took       time.Duration // probing
	Stored     bool          // the verdict is ADD's from now on
	NotStored  string        // why it is not

	Node []verdict.Probe

	Others      []verdict.Other
	OthersError string // why there may be more

	Conflist     Conflist
	Config       plugin.Config
	Standing     plugin.Standing
	Update       plugin.Update  // what makes the loaded datapath go by the verdict, if that is stored
	Differs      []string       // in what it does not
	Pods, Asking plugin.Outlook // of a pod without annotations; with skipstack/mode: "on"
	Notes        []string       // about the outlook

	Memory      *verdict.Memory // nil: see MemoryError
	MemoryError string
}

// Exit codes by verdict.
const (
	ExitSafe        = 0
	ExitUnknown     = 1
	ExitUsage       = 2 // the configuration is wrong
	ExitUnsupported = 3
	ExitRisky       = 4
)

// ExitCode is that of the command.
func (r *Report) ExitCode() int {
	switch {
	case r.Lacks != "":
		return ExitUnsupported
	case r.WrongRoot:
		return ExitUsage
	case r.ProbeError != "" || r.Verdict.Inconclusive():
		return ExitUnknown
	case r.Verdict.Level == verdict.Safe:
		return ExitSafe
	case r.Verdict.Level == verdict.Risky:
		return ExitRisky
	}
	return ExitUnsupported
}

const (
	// probeRuns is how often the kernel is probed at most: on a busy machine a run
	// may not be able to tell.
	probeRuns = 2
	// othersWait bounds looking for other users, which takes longer the more
	// cgroups and BPF maps a node has.
	othersWait = time.Second
)

// Examine examines the node. Everything that is not to be found out is in the
// report; an error is returned only when ctx ends.
func Examine(ctx context.Context, o Options) (*Report, error) {
	o.Root = cmp.Or(o.Root, "/")
	if o.Kernel == nil {
		o.Kernel = kernel{}
	}
	e := &examination{o: o, node: newHost(o.Root), Report: &Report{Conflist: o.Conflist, Config: o.Config}}
	root, rootErr := o.Deps.Cgroups.Root(o.Config.CgroupRoot)
	if err := e.probe(ctx, root, rootErr); err != nil {
		return nil, err
	}
	if rootErr == nil {
		within, cancel := context.WithTimeout(ctx, othersWait)
		others, err := o.Kernel.Others(within, root, e.node.path("/proc"))
		cancel()
		e.Others, e.OthersError = others, text(err)
		if e.ProbeError == "" && e.Verdict.Level != verdict.Unsupported {
			e.measure(ctx, root)
		}
	} else {
		e.OthersError = rootErr.Error()
	}
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	e.Node = e.checks(root, rootErr)
	noCgroup2 := errors.Is(rootErr, podcgroup.ErrNoCgroup2)
	e.WrongRoot = noCgroup2 && e.Config.CgroupRoot != ""
	switch {
	case noCgroup2 && !e.WrongRoot:
		e.Lacks = text(rootErr)
	case e.node.lacksBPFFS():
		e.Lacks = noBPFFS
	}
	e.foresee(rootErr)
	return e.Report, nil
}

type examination struct {
	*Report
	o    Options
	node *host
}

func text(err error) string {
	if err == nil {
		return ""
	}
	line, _, _ := strings.Cut(err.Error(), "\n")
	return line
}

// probe finds the verdict, or the reason why there is none.
func (e *examination) probe(ctx context.Context, root string, rootErr error) (err error) {
	start := time.Now()
	err = rootErr
	for range probeRuns {
		if rootErr != nil {
			break
		}
		if e.Verdict, err = e.o.Kernel.Run(ctx, root); err != nil || !e.Verdict.Inconclusive() {
			break
		}
	}
	e.Took = time.Since(start)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		e.ProbeError, e.NotStored = text(err), "the kernel was not probed"
		e.Verdict, err = verdict.Untried(e.ProbeError)
		return err
	}
	e.NotStored = e.store()
	e.Stored = e.NotStored == ""
	return nil
}

// store stores the verdict where ADD looks for it, or says why not. It makes no run
// directory where skipstack is not in use, and a verdict that could tell less does
// not replace one that could tell all.
func (e *examination) store() string {
	if e.o.NoCache {
		return "--no-cache"
	}
	dir := e.Config.RunDir
	opened, err := attachment.OpenRunDir(dir, false)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Sprintf("there is no %s: skipstack is not in use here", dir)
	}
	if err != nil {
		return text(err)
	}
	opened.Close()
	if old, err := e.o.Kernel.Cached(dir); err == nil && e.Verdict.TellsLess(old) {
		return fmt.Sprintf("it could not tell all that the one of %s could", old.ProbedAt.Format(time.DateTime))
	}
	return text(e.o.Kernel.Save(e.Verdict, dir))
}

func (e *examination) measure(ctx context.Context, root string) {
	m, err := e.o.Kernel.Memory(ctx, root, e.Config.MaxConnections, e.Verdict.Funnel)
	if err != nil {
		e.MemoryError = text(err)
		return
	}
	e.Memory = &m
}

// foresee says what ADD would make of pods.
func (e *examination) foresee(rootErr error) {
	standing, err := plugin.NewNode(e.o.Deps).Standing(e.Config)
	if err != nil {
		e.Notes = append(e.Notes, "what is loaded cannot be looked at: "+text(err))
	}
	e.Standing = standing
	gate := e.Verdict.NodeSettings()
	gate.SwitchedOff = standing.Node.SwitchedOff
	if e.ProbeError == "" {
		e.compare()
	}
	if standing.Loaded && standing.Node.Open {
		gate = standing.Node
		if e.Stored {
			// What the next ADD has changed counts: the pods' connections follow at once.
			gate = standing.After(e.Config, e.Verdict)
		}
	}
	if standing.Loaded && standing.MaxConnections != e.Config.MaxConnections {
		e.Notes = append(e.Notes, fmt.Sprintf("the datapath was loaded for %d connections: maxConnections takes effect when it is loaded again", standing.MaxConnections))
	}
	obstacle := e.obstacle(rootErr)
	unknown := obstacle == "" && !gate.Open && e.ProbeError != ""
	if obstacle == "" && !gate.Open {
		obstacle = e.Verdict.String()
	}
	e.Pods, e.Asking = plugin.Foresee(e.Config, gate, obstacle)
	if unknown && e.Config.Mode != plugin.ModeOff {
		e.Pods = plugin.Outlook{Outcome: plugin.Unknown, Why: "the kernel was not probed"}
		e.Asking = e.Pods
	}
	for _, other := range e.Others {
		if other.Blocks && !other.Everywhere {
			e.Notes = append(e.Notes, fmt.Sprintf("pods below cgroup %s are plain: see program %s of other software", printable(other.Cgroup), printable(other.Program)))
		}
	}
	if e.Config.SpliceGuard == plugin.SpliceGuardOff && e.Verdict.Guard != datapath.NoGuard {
		e.Notes = append(e.Notes, "spliceGuard is off, which leaves the risk splice")
	}
	if e.Config.AcceptRisks&datapath.RiskBlocking == 0 && e.Config.Mode != plugin.ModeOff {
		e.Notes = append(e.Notes, "connections of blocking sockets stay plain, unless the risk blocking is accepted")
	}
}

// compare says whether the loaded datapath goes by the verdict, and what makes it.
func (e *examination) compare() {
	update, differs := e.Standing.Compare(e.Config, e.Verdict)
	e.Differs = differs
	if e.Stored {
		e.Update = update
	}
	load := "`skipstack load`"
	if e.Conflist.Path != "" {
		load = fmt.Sprintf("`skipstack load --config %s`", e.Conflist.Path)
	}
	if e.Standing.Loaded && !e.Standing.SameBuild {
		e.Notes = append(e.Notes, fmt.Sprintf("the loaded programs are of another build than this verdict: %s puts this build's in their place", load))
		return
	}
	if len(differs) == 0 {
		return
	}
	note := fmt.Sprintf("the loaded datapath goes by an earlier verdict (%s)", strings.Join(differs, "; "))
	switch {
	case e.Verdict.Inconclusive():
		note += ", and goes on so, as this one is inconclusive"
	case !e.Stored:
		note += ", and goes on so, as this one is not stored"
	case update == plugin.UpdateByADD:
		note += fmt.Sprintf(": the ADD of the next pod has it changed in the background, %s changes it at once", load)
	default:
		note += fmt.Sprintf(": %s changes it", load)
	}
	e.Notes = append(e.Notes, note)
}

// obstacle is why no pod can be attached to, "" where nothing is in the way.
func (e *examination) obstacle(rootErr error) string {
	if rootErr != nil {
		return "cgroup: " + text(rootErr)
	}
	for _, o := range e.Others {
		if !o.Blocks || !o.Everywhere {
			continue
		}
		does := "keeps others from being attached below it"
		if o.Sharing == verdict.Override {
			does = "would not run for pods that skipstack is attached to"
		}
		return fmt.Sprintf("sock_ops program %s of other software at cgroup %s %s", printable(o.Program), printable(o.Cgroup), does)
	}
	for _, c := range e.Node {
		if (c.Name == checkBPFFS || c.Name == checkRunDir) && c.Result == verdict.NotOK {
			return c.Detail
		}
	}
	return ""
}

// kernel is the running one.
type kernel struct{}

func (kernel) Run(ctx context.Context, root string) (*verdict.Verdict, error) {
	return verdict.Run(ctx, verdict.Env{CgroupRoot: root})
}

func (kernel) Cached(runDir string) (*verdict.Verdict, error) { return verdict.Cached(runDir) }

func (kernel) Save(v *verdict.Verdict, runDir string) error { return v.Save(runDir) }

func (kernel) Memory(ctx context.Context, root string, maxConnections uint32, funnel bool) (verdict.Memory, error) {
	return verdict.MeasureMemory(ctx, verdict.Env{CgroupRoot: root}, maxConnections, funnel)
}

func (kernel) Others(ctx context.Context, root, proc string) ([]verdict.Other, error) {
	return verdict.Others(ctx, root, proc)
}

// host is the file system of the node.
type host struct {
	root      string
	statfs    func(path string) (unix.Statfs_t, error)
	processes []process
}

func newHost(root string) *host {
	h := &host{root: root, statfs: func(path string) (st unix.Statfs_t, err error) {
		return st, unix.Statfs(path, &st)
	}}
	h.processes = h.listProcesses()
	return h
}
