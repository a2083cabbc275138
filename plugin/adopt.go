package plugin

import (
	"context"
	"errors"
	"fmt"

	"github.com/skipstack/skipstack/plugin/attachment"
	"github.com/skipstack/skipstack/plugin/datapath"
	"github.com/skipstack/skipstack/plugin/podcgroup"
)

// attach attaches the pod's cgroup and brings the record, by put, from "attaching" to
// "attached". unguarded is not nil if the pod is attached without a splice guard.
// The lock is held.
func (d *Deps) attach(store *attachment.Store, bpffs string, r *attachment.Record, set Set, pod *podcgroup.Pod,
	put func(attachment.Record) error, did func(step string)) (unguarded, err error) {
	r.BPFFSDev, r.MountNS, err = d.Datapath.BPFFSIdentity(bpffs)
	if err != nil {
		return nil, err
	}
	r.Status = attachment.Attaching
	if err := put(*r); err != nil {
		return nil, err
	}
	did("attaching recorded")
	if _, err := set.Attach(pod.Dir, pod.ID); errors.Is(err, datapath.ErrGuard) {
		unguarded = err
	} else if err != nil {
		return nil, err
	}
	did("link attached")
	if err := d.settle(store, bpffs, pod.ID, nil, set); err != nil {
		return nil, err
	}
	did("settings written")
	r.Status = attachment.Attached
	if err := put(*r); err != nil {
		return nil, err
	}
	did("attached recorded")
	return unguarded, nil
}

// adopt attaches the pods whose ADD had no time to, as happens when a node boots
// and many start at once. Their connections from now on are accelerated. It goes
// on after errors, which it returns joined.
func (n *Node) adopt(ctx context.Context, conf Config, set Set) error {
	root, err := n.Cgroups.Root(conf.CgroupRoot)
	if err != nil {
		return err
	}
	return n.eachPending(ctx, conf, func(store *attachment.Store, r attachment.Record) error {
		wanted, _ := pendingOf(r, conf)
		pod, err := n.Cgroups.Find(ctx, root, podcgroup.Request{Path: wanted.CgroupPath})
		if err != nil {
			return err
		}
		defer pod.Dir.Close()
		if pod.ID != wanted.CgroupID {
			return nil // another pod's by now
		}
		before := r
		r.CgroupID, r.CgroupPath, r.Settings = wanted.CgroupID, wanted.CgroupPath, wanted.Settings
		r.Reason, r.Pending = "", nil
		// A DEL that did not get the lock removes the record all the same, and
		// it must not come back.
		_, err = n.attach(store, conf.BPFFS, &r, set, pod, store.Replace, func(string) {})
		if err == nil {
			return nil
		}
		// As it was, so that nobody counts on a link that is not there.
		err = errors.Join(err, n.release(store, conf, r), store.Replace(before))
		if errors.Is(err, attachment.ErrNotFound) {
			return nil
		}
		return err
	})
}

// dismiss records that pods which wait for the datapath wait in vain.
func (n *Node) dismiss(ctx context.Context, conf Config, why error) error {
	return n.eachPending(ctx, conf, func(store *attachment.Store, r attachment.Record) error {
		if r.Status == attachment.Attaching {
			return nil // it may be attached
		}
		r.Reason, r.Pending = reason(why), nil
		err := store.Replace(r)
		if errors.Is(err, attachment.ErrNotFound) {
			return nil
		}
		return err
	})
}

// eachPending calls f for each record with something pending on this bpffs, with
// the lock held, but not all the time: ADDs come in between.
func (n *Node) eachPending(ctx context.Context, conf Config, f func(*attachment.Store, attachment.Record) error) error {
	store := attachment.NewStore(conf.RunDir)
	records, _ := store.List() // what cannot be read has nothing pending
	var errs []error
	for _, r := range records {
		if _, ok := pendingOf(r, conf); !ok {
			continue
		}
		err := func() error {
			lock, err := n.lock(ctx, conf)
			if err != nil {
				return err
			}
			defer lock.Unlock()
			r, err := store.Get(r.Key)
			if errors.Is(err, attachment.ErrNotFound) {
				return nil // deleted meanwhile
			}
			if _, ok := pendingOf(r, conf); err != nil || !ok {
				return err
			}
			return f(store, r)
		}()
		if err != nil {
			errs = append(errs, fmt.Errorf("attach pod %s/%s: %w", r.PodNamespace, r.PodName, err))
		}
		if errors.Is(err, attachment.ErrBusy) {
			break // the next would wait as long
		}
	}
	return errors.Join(errs...)
}

// pendingOf returns what is still to be attached: what an ADD left for later, or,
// to whoever holds the lock, what one that was killed did not finish.
func pendingOf(r attachment.Record, conf Config) (wanted attachment.Pending, ok bool) {
	switch {
	case r.Version > attachment.Version, r.Stale:
		return wanted, false
	case r.Status == attachment.Skipped && r.Pending != nil:
		wanted = *r.Pending
	case r.Status == attachment.Attaching:
		wanted = attachment.Pending{CgroupID: r.CgroupID, CgroupPath: r.CgroupPath, Settings: r.Settings}
	default:
		return wanted, false
	}
	return wanted, wishOf(attachment.Record{Settings: wanted.Settings}).BPFFS == conf.BPFFS
}

// pendingADD is an ADD whose attachment is still to be made.
type pendingADD struct {
	key attachment.Key
	at  int64
}

func pendingADDs(conf Config) (all []pendingADD) {
	records, _ := attachment.NewStore(conf.RunDir).List()
	for _, r := range records {
		if _, ok := pendingOf(r, conf); ok {
			all = append(all, pendingADD{r.Key, r.Created.UnixNano()})
		}
	}
	return all
}
