package plugin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"time"

	"github.com/skipstack/skipstack/plugin/datapath"
	"github.com/skipstack/skipstack/plugin/podcgroup"
	"github.com/skipstack/skipstack/plugin/podlog"
	"github.com/skipstack/skipstack/plugin/verdict"
)

// System returns the [Deps] of a real node. env is the environment that a
// detached prober gets, but for CNI's variables. Logs go to stderr where the
// configuration names no file.
func System(env []string, stderr io.Writer) Deps {
	return Deps{
		Datapath: kernel{},
		Cgroups:  cgroupfs{},
		Verdicts: probes{},
		// The running binary, even if an upgrade has replaced it since.
		Prober: detached{exe: "/proc/self/exe", env: env},
		Log:    func(conf Config) (*slog.Logger, io.Closer) { return openLog(conf, stderr) },
	}
}

func openLog(conf Config, stderr io.Writer) (*slog.Logger, io.Closer) {
	level, err := podlog.ParseLevel(conf.LogLevel)
	if err != nil {
		level = slog.LevelInfo
	}
	return podlog.New(podlog.Options{File: conf.LogFile, Stderr: stderr, Level: level, RunDir: conf.RunDir})
}

// probes is package verdict as [Verdicts].
type probes struct{}

func asVerdict(v *verdict.Verdict) Verdict {
	return Verdict{
		Supported: v.Level != verdict.Unsupported,
		Node:      v.NodeSettings(),
		Due:       v.Due(time.Now()),
		Summary:   v.String(),
		Document:  v,
	}
}

func (probes) Cached(runDir string) (Verdict, error) {
	v, err := verdict.Cached(runDir)
	if errors.Is(err, verdict.ErrNoVerdict) {
		return Verdict{}, fmt.Errorf("%w: %w", ErrNoVerdict, err)
	}
	if err != nil {
		return Verdict{}, err
	}
	return asVerdict(v), nil
}

func (probes) Probe(ctx context.Context, conf Config) (Verdict, error) {
	root, err := cgroupfs{}.Root(conf.CgroupRoot)
	if err != nil {
		return Verdict{}, err
	}
	v, err := conclusive(func() (*verdict.Verdict, error) {
		return verdict.Run(ctx, verdict.Env{CgroupRoot: root})
	})
	if err != nil {
		return Verdict{}, err
	}
	if earlier, err := verdict.Cached(conf.RunDir); err == nil {
		v.Recall(earlier)
	}
	return asVerdict(v), v.Save(conf.RunDir)
}

func (probes) GuardFailed(conf Config, was Verdict, err error) (Verdict, error) {
	v, ok := was.Document.(*verdict.Verdict)
	if !ok {
		return was, fmt.Errorf("record that the splice guard fails: the verdict is a %T", was.Document)
	}
	v.GuardFailed(err, time.Now())
	return asVerdict(v), v.Save(conf.RunDir)
}

// probeRuns is how often Probe probes at most: a busy machine may take a few runs.
const probeRuns = 3

// conclusive runs until the verdict is conclusive, or probeRuns times.
func conclusive(run func() (*verdict.Verdict, error)) (v *verdict.Verdict, err error) {
	for range probeRuns {
		if v, err = run(); err != nil || !v.Inconclusive() {
			break
		}
	}
	return v, err
}

// Inconclusive tells that the kernel counts as not supported only because probing
// could not tell. Who can wait for it may probe again, see
// [verdict.Verdict.Inconclusive].
func (v Verdict) Inconclusive() bool {
	d, ok := v.Document.(*verdict.Verdict)
	return ok && d.Inconclusive()
}

// Unfit returns nil if the datapath may be used on this kernel. The error wraps
// [datapath.ErrUnsupported] unless the verdict is inconclusive.
func (v Verdict) Unfit() error {
	switch {
	case v.Supported:
		return nil
	case v.Inconclusive():
		return fmt.Errorf("the kernel could not be judged, which will be tried again: %s", v.Summary)
	}
	return fmt.Errorf("%w: %s", datapath.ErrUnsupported, v.Summary)
}

// kernel is package datapath as a [Datapath].
type kernel struct{}

func asSet(s *datapath.Set, err error) (Set, error) {
	if err != nil {
		return nil, err // not a nil *datapath.Set in a non-nil interface
	}
	return s, nil
}

func (kernel) Open(bpffs string) (Set, error) { return asSet(datapath.Open(bpffs)) }

func (kernel) Load(ctx context.Context, bpffs string, o datapath.LoadOptions) (Set, error) {
	return asSet(datapath.Load(ctx, bpffs, o))
}

func (kernel) Upgrade(ctx context.Context, bpffs string, o datapath.LoadOptions) (Set, bool, error) {
	s, changed, err := datapath.Upgrade(ctx, bpffs, o)
	set, err := asSet(s, err)
	return set, changed, err
}

func (kernel) Loadable(bpffs string) error { return datapath.Loadable(bpffs) }

func (kernel) EnsureBPFFS(ctx context.Context, path string) error {
	return datapath.EnsureBPFFS(ctx, path)
}

func (kernel) BPFFSIdentity(path string) (dev, mountNS uint64, err error) {
	return datapath.BPFFSIdentity(path)
}

func (kernel) HasLink(bpffs string, cgroupID uint64) (bool, error) {
	return datapath.HasLink(bpffs, cgroupID)
}

func (kernel) DropPod(bpffs string, cgroupID uint64) error {
	return datapath.DropPod(bpffs, cgroupID)
}

func (kernel) Sweep(bpffs string, limit int) error { return datapath.Sweep(bpffs, limit) }

func (kernel) Published(bpffs string) (bool, error) { return datapath.Published(bpffs) }

func (kernel) Unload(ctx context.Context, bpffs string, force bool) (datapath.Remaining, error) {
	return datapath.Unload(ctx, bpffs, force)
}

func (kernel) LiveInKernel() (uint64, error) { return datapath.LiveInKernel() }

func (kernel) SwitchNode(bpffs string, off bool) (int, error) {
	return datapath.SwitchNode(bpffs, off)
}

// cgroupfs is package podcgroup as [Cgroups].
type cgroupfs struct{}

func (cgroupfs) Root(configured string) (string, error) {
	if configured != "" {
		return configured, podcgroup.CheckRoot(configured)
	}
	return podcgroup.FindRoot("/sys/fs/cgroup", "/proc")
}

func (cgroupfs) Find(ctx context.Context, root string, r podcgroup.Request) (*podcgroup.Pod, error) {
	return podcgroup.Finder{Root: root, Proc: "/proc"}.Find(ctx, r)
}
