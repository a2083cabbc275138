package plugin

import (
	"context"
	"errors"
	"fmt"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"

	"github.com/skipstack/skipstack/plugin/attachment"
	"github.com/skipstack/skipstack/plugin/datapath"
)

// Check serves CHECK. CRI-O runs it after every ADD and kills the pod on error, so
// with onError "plain" it fails for one thing only: the attachment is recorded,
// the datapath is loaded, and the pod's link is gone. A pod that was skipped is as
// it should be.
//
// With onError "fail", a record that is missing or half written and a datapath
// that is not loaded are errors too.
//
// prevResult is not asked for: nothing in it is skipstack's.
func (p *Plugin) Check(args *skel.CmdArgs) error {
	in, err := decodeInput(args.StdinData)
	if err != nil {
		return err
	}
	key := attachment.Key{Network: in.name, ContainerID: args.ContainerID, IfName: args.IfName}
	conf, confErr := in.config()
	strict := conf.OnError == OnErrorFail
	if confErr != nil && strict {
		return coded(types.ErrInvalidNetworkConfig, "configuration refused, and onError is \"fail\"", confErr)
	}
	err = within(p.budget, func(context.Context) error { return p.check(conf, key) })
	switch {
	case errors.Is(err, errLinkGone):
		return coded(types.ErrTryAgainLater, "the pod is not accelerated as it was at ADD", err)
	case err != nil && strict:
		return coded(types.ErrTryAgainLater, "cannot tell that the pod is accelerated, and onError is \"fail\"", err)
	case err != nil:
		log, closer := p.Log(conf)
		defer closer.Close()
		log.With(attrs(key)...).Info("CHECK passes without having seen the pod's link", "reason", reason(err))
	}
	return nil
}

var errLinkGone = errors.New("the pod's link is gone")

// check returns an error wrapping errLinkGone if that is certain, and any other
// where it could not tell.
func (p *Plugin) check(conf Config, key attachment.Key) error {
	record, err := attachment.NewStore(conf.RunDir).Get(key)
	if err != nil {
		return err
	}
	switch {
	case record.Status == attachment.Skipped:
		return nil
	case record.Stale:
		return errors.New(reasonReboot)
	case record.Status == attachment.Attaching:
		return errors.New("its ADD has not finished")
	}
	bpffs := wishOf(record).BPFFS
	if bpffs == "" {
		bpffs = conf.BPFFS
	}
	dev, _, err := p.Datapath.BPFFSIdentity(bpffs)
	if err != nil {
		return err
	}
	if record.BPFFSDev != 0 && dev != record.BPFFSDev {
		return fmt.Errorf("%s is another bpffs (device %d) than at ADD (device %d): unmounted since, or seen from another mount namespace",
			bpffs, dev, record.BPFFSDev)
	}
	set, err := p.Datapath.Open(bpffs)
	if err != nil {
		if errors.Is(err, datapath.ErrNotLoaded) {
			err = fmt.Errorf("%w: `skipstack load` loads it, but pods that were attached have to be restarted", err)
		}
		return err
	}
	set.Close()
	has, err := p.Datapath.HasLink(bpffs, record.CgroupID)
	if err != nil {
		return err
	}
	if !has {
		return fmt.Errorf("%w: it was removed from %s, cgroup %s (id %d): restart the pod", errLinkGone, bpffs, record.CgroupPath, record.CgroupID)
	}
	return nil
}
