package plugin

import (
	"context"
	"errors"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"

	"github.com/skipstack/skipstack/plugin/attachment"
	"github.com/skipstack/skipstack/plugin/datapath"
)

// Status serves STATUS, which decides whether the node is ready for pods. With
// onError "plain" it always is, because every ADD succeeds. With "fail" it fails
// with code 50 where an ADD is known to fail. It does not load the datapath to find
// out: runtimes ask every few seconds, and somebody may have unloaded it.
func (p *Plugin) Status(args *skel.CmdArgs) error {
	in, err := decodeInput(args.StdinData)
	if err != nil {
		return err
	}
	conf, confErr := in.config()
	if conf.OnError != OnErrorFail {
		return nil
	}
	err = within(p.budget, func(ctx context.Context) error { return p.status(ctx, conf, confErr) })
	if err != nil {
		return coded(types.ErrPluginNotAvailable, "pods cannot be accelerated, and onError is \"fail\"", err)
	}
	return nil
}

func (p *Plugin) status(ctx context.Context, conf Config, confErr error) error {
	if confErr != nil {
		return confErr
	}
	if conf.Mode == ModeOff {
		return nil // no ADD tries
	}
	if _, err := p.Cgroups.Root(conf.CgroupRoot); err != nil {
		return err
	}
	lock, err := attachment.NewStore(conf.RunDir).Lock(ctx)
	if err != nil {
		return err
	}
	if err := lock.Unlock(); err != nil {
		return err
	}
	set, err := p.Datapath.Open(conf.BPFFS)
	switch {
	case err == nil:
		defer set.Close()
		node, err := set.Node()
		if err != nil || node.Open {
			return err
		}
	case errors.Is(err, datapath.ErrNotLoaded), errors.Is(err, datapath.ErrDamaged):
		if err := p.Datapath.Loadable(conf.BPFFS); err != nil {
			return err
		}
	default:
		return err
	}
	v, err := p.Verdicts.Cached(conf.RunDir)
	if errors.Is(err, ErrNoVerdict) {
		return nil
	}
	if err != nil {
		return err
	}
	return v.Unfit()
}
