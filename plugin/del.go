package plugin

import (
	"context"
	"errors"
	"log/slog"

	"github.com/containernetworking/cni/pkg/skel"

	"github.com/skipstack/skipstack/plugin/attachment"
)

// Del serves DEL. It needs the attachment's record and nothing else: no netns,
// prevResult, cgroup, loaded datapath or valid own keys. Without a record there
// is nothing to do, so it may be repeated, may come before ADD, and may come
// after a reboot.
//
// The record tells a sandbox from its successor in the same cgroup: as long as
// another record wants the link, the link stays.
//
// It never fails once the configuration is JSON: a pod that cannot be deleted is
// worse than a link that is left to the sweep of a later ADD or GC, as one is
// when the lock is not to be had in time. The record is removed in any case, and
// last, so that a DEL killed before is simply repeated.
func (p *Plugin) Del(args *skel.CmdArgs) error {
	in, err := decodeInput(args.StdinData)
	if err != nil {
		return err
	}
	key := attachment.Key{Network: in.name, ContainerID: args.ContainerID, IfName: args.IfName}
	conf, _ := in.config() // whatever is wrong with it, the valid keys hold
	err = within(p.budget, func(ctx context.Context) error {
		log, closer := p.Log(conf)
		defer closer.Close()
		log = log.With(attrs(key)...)
		store := attachment.NewStore(conf.RunDir)
		del := func(ctx context.Context) error {
			return safely(func() error { return p.del(ctx, log, store, conf, key) })
		}
		err := del(ctx)
		if errors.Is(err, attachment.ErrBusy) {
			// ctx may have ended before the lock was tried at all, or while nobody held
			// it any more: there is a little time left.
			end, cancel := context.WithTimeout(context.WithoutCancel(ctx), p.budget/16)
			defer cancel()
			err = del(end)
		}
		if err != nil {
			log.Warn("pod's link is left to the sweep", "error", reason(err))
			// Removing one record needs no lock.
			return store.Delete(key)
		}
		return nil
	})
	if err != nil {
		p.fallback.Warn("attachment is left to GC", append(attrs(key), "error", reason(err))...)
	}
	return nil
}

func (p *Plugin) del(ctx context.Context, log *slog.Logger, store *attachment.Store, conf Config, key attachment.Key) error {
	// Looking first spares the repeated DELs that runtimes send the lock.
	if _, err := store.Get(key); errors.Is(err, attachment.ErrNotFound) {
		return nil
	}
	lock, err := store.Lock(ctx)
	if err != nil {
		return err
	}
	defer lock.Unlock()
	p.did("locked")
	record, err := store.Get(key)
	if errors.Is(err, attachment.ErrNotFound) {
		return nil
	}
	if err == nil {
		err = p.release(store, conf, record)
	}
	if err != nil {
		return err
	}
	p.did("link released")
	if err := store.Delete(key); err != nil {
		return err
	}
	p.did("record deleted")
	log.Debug("pod detached", "pod", record.PodNamespace+"/"+record.PodName)
	return nil
}
