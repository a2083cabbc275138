// Package agent is the process that keeps skipstack in order on a node of a cluster:
// it loads the datapath, has the kernel probed, keeps the entry in the CNI
// configuration, sweeps what dead pods have left, and serves metrics.
//
// No pod needs it. What it does is done by ADD, too, or by hand with the command
// line; pods that run are not affected when it ends, however it ends.
package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/skipstack/skipstack/cmd/internal/conflist"
	"github.com/skipstack/skipstack/cmd/internal/metrics"
	"github.com/skipstack/skipstack/plugin"
)

// Node is what the agent needs of a [plugin.Node].
type Node interface {
	Load(ctx context.Context, conf plugin.Config) (plugin.Loaded, error)
	Sweep(ctx context.Context, conf plugin.Config) error
	Status(conf plugin.Config, cniCacheDir string) plugin.Report
	Probe(ctx context.Context, conf plugin.Config, load bool, held *os.File) (plugin.Verdict, error)
	Loaded(conf plugin.Config) error
}

// Options say what the agent does.
type Options struct {
	Node        Node
	Config      plugin.Config
	CNICacheDir string
	// Keep installs skipstack and keeps it installed; nil: the agent leaves the
	// runtime's directories alone.
	Keep    *conflist.Options
	Listen  string // address for HTTP; empty: none
	Pods    int    // see [metrics.Options]
	Version string
	Log     *slog.Logger
	// Interval is how often it sweeps and looks; 0: 30 s.
	Interval time.Duration
	// MountInfo is the process's mounts; empty: /proc/self/mountinfo.
	MountInfo string
}

const (
	defaultInterval = 30 * time.Second
	// The first and the longest time between two attempts at what has failed.
	retryFirst, retryMost = time.Second, time.Minute
	// stuckAfter is how many intervals may pass without a look before /healthz
	// says that the agent is stuck.
	stuckAfter = 10
	// shutdown is how long requests may take to end.
	shutdown = 2 * time.Second
)

// Run runs the agent until ctx ends, and then returns nil. The error is that of
// listening on Listen; whatever else fails is logged, shown by /readyz, and tried
// again.
func Run(ctx context.Context, o Options) error {
	o.Interval = cmp.Or(o.Interval, defaultInterval)
	o.MountInfo = cmp.Or(o.MountInfo, "/proc/self/mountinfo")
	a := &agent{Options: o, start: time.Now(), conflist: metrics.NewConflist()}
	a.beat()
	var listener net.Listener
	if o.Listen != "" {
		var err error
		if listener, err = (&net.ListenConfig{}).Listen(ctx, "tcp", o.Listen); err != nil {
			return fmt.Errorf("serve metrics: %w", err)
		}
		a.Log.Info("serving", "address", listener.Addr().String())
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var wg sync.WaitGroup
	if listener != nil {
		wg.Go(func() { a.serve(ctx, listener) })
	}
	if o.Keep != nil {
		wg.Go(func() { a.keep(ctx) })
	}
	wg.Go(func() {
		a.load(ctx)
		a.watch(ctx)
	})
	wg.Wait()
	a.Log.Info("ended; pods are not affected")
	return nil
}

type agent struct {
	Options
	start    time.Time
	conflist *metrics.Conflist

	mu       sync.Mutex
	beaten   time.Time
	loaded   bool // once, by this process
	loadErr  string
	verdict  string
	watchErr string
	keeper   conflist.KeeperState
	keepErr  string
	warned   map[string]bool // what has been logged and still holds
}

func (a *agent) beat() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.beaten = time.Now()
}

// load loads the datapath, and has the kernel probed, until both have worked. It
// does so once: who unloads the datapath by hand wants it so, and the next pod loads
// it again.
func (a *agent) load(ctx context.Context) {
	if why := hiddenMounts(a.MountInfo, a.Config.BPFFS); why != "" {
		a.Log.Warn("the container runtime may not see what is pinned", "bpffs", a.Config.BPFFS, "reason", why)
	}
	for wait := retryFirst; ; wait = min(2*wait, retryMost) {
		a.beat()
		got, err := a.Node.Load(ctx, a.Config)
		if ctx.Err() != nil {
			return
		}
		a.mu.Lock()
		a.loaded, a.loadErr, a.verdict = err == nil, text(err), got.Verdict.Summary
		a.mu.Unlock()
		if err == nil && !got.Verdict.Inconclusive() {
			a.Log.Info("the datapath is loaded", "was", got.Was, "verdict", got.Verdict.Summary,
				"maxConnections", got.MaxConnections, "switchedOff", got.Node.SwitchedOff)
			if got.Plain != "" {
				a.Log.Warn("pods stay plain unless they ask", "reason", got.Plain)
			}
			return
		}
		if err != nil {
			a.Log.Warn("load the datapath", "error", err.Error(), "retry", wait.String())
		} else {
			a.Log.Warn("the kernel's verdict is inconclusive", "verdict", got.Verdict.Summary, "retry", wait.String())
		}
		if !sleep(ctx, wait) {
			return
		}
	}
}

// watch sweeps and looks until ctx ends.
func (a *agent) watch(ctx context.Context) {
	for {
		a.beat()
		err := a.Node.Sweep(ctx, a.Config)
		if ctx.Err() != nil {
			return
		}
		report := a.Node.Status(a.Config, a.CNICacheDir)
		a.beat()
		a.mu.Lock()
		a.watchErr = text(err)
		a.mu.Unlock()
		now := map[string]bool{}
		if err != nil {
			now["sweep: "+err.Error()] = true
		}
		for _, s := range report.Elsewhere {
			now[s] = true
		}
		for _, s := range report.Problems {
			now[s] = true
		}
		if report.NotLoaded != "" {
			now[report.NotLoaded] = true
		}
		if s := a.lookAgain(ctx, report); s != "" {
			now[s] = true
		}
		for s := range now {
			if !a.warned[s] { // not every 30 s
				a.Log.Warn("the node", "problem", s)
			}
		}
		a.warned = now
		if !sleep(ctx, a.Interval) {
			return
		}
	}
}

// lookAgain has the kernel probed again where a probe could not tell: on a node
// whose pods stay, no ADD would. It loads nothing. It returns what went wrong.
func (a *agent) lookAgain(ctx context.Context, report plugin.Report) string {
	if !report.Due || report.Loaded == nil || !report.Loaded.SameBuild {
		return ""
	}
	v, err := a.Node.Probe(ctx, a.Config, false, nil)
	a.beat()
	if err != nil {
		if ctx.Err() != nil {
			return ""
		}
		return "probe again: " + err.Error()
	}
	a.mu.Lock()
	a.verdict = v.Summary
	a.mu.Unlock()
	a.Log.Info("the kernel was probed again", "verdict", v.Summary)
	return ""
}

// keep keeps skipstack installed.
func (a *agent) keep(ctx context.Context) {
	k := conflist.Keeper{Options: *a.Keep, Log: a.Log, Notify: func(s conflist.KeeperState) {
		a.mu.Lock()
		a.keeper = s
		a.mu.Unlock()
		a.conflist.Set(s.Present, s.Repairs)
	}}
	for wait := retryFirst; ; wait = min(2*wait, retryMost) {
		err := k.Run(ctx)
		if ctx.Err() != nil {
			return
		}
		if err == nil {
			err = errors.New("it has ended")
		}
		a.mu.Lock()
		a.keepErr = err.Error()
		a.mu.Unlock()
		a.Log.Error("keep the CNI configuration", "error", err.Error(), "retry", wait.String())
		if !sleep(ctx, wait) {
			return
		}
		a.mu.Lock()
		a.keepErr = ""
		a.mu.Unlock()
	}
}

// condition is one of the things that make the agent ready.
type condition struct {
	Name   string `json:"name"`
	OK     bool   `json:"ok"`
	Detail string `json:"detail,omitempty"`
}

// conditions say whether everything is as it should be. A kernel that is not
// supported is: its pods use TCP, and no restart of the agent would change that.
func (a *agent) conditions() []condition {
	// Somebody may have unloaded it since.
	gone := text(a.Node.Loaded(a.Config))
	a.mu.Lock()
	defer a.mu.Unlock()
	datapath := condition{"datapath", a.loaded && gone == "", cmp.Or(a.loadErr, a.verdict, "loading")}
	if a.loaded && gone != "" {
		datapath.Detail = gone + ": the next pod loads it, or a restart of the agent"
	}
	all := []condition{
		datapath,
		{"sweep", a.watchErr == "", a.watchErr},
	}
	if a.Keep != nil {
		all = append(all, condition{"conflist", a.keeper.Present && a.keepErr == "",
			cmp.Or(a.keepErr, a.keeper.Reason, a.keeper.Conflist, "looking")})
	}
	return all
}

// stuck says for how long nothing has happened, 0 if that is all right.
func (a *agent) stuck() time.Duration {
	a.mu.Lock()
	defer a.mu.Unlock()
	// Probing may take half a minute, and a retry comes after one at most.
	if idle := time.Since(a.beaten); idle > stuckAfter*max(a.Interval, retryMost/2) {
		return idle
	}
	return 0
}

func (a *agent) registry() *prometheus.Registry {
	r := prometheus.NewRegistry()
	r.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	r.MustRegister(a.conflist, metrics.New(metrics.Options{
		Look:    func() plugin.Report { return a.Node.Status(a.Config, a.CNICacheDir) },
		Version: a.Version,
		Pods:    a.Pods,
	}))
	return r
}

func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// sleep returns false if ctx ended.
func sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}
