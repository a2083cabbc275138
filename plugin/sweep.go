package plugin

import (
	"context"
	"errors"

	"github.com/skipstack/skipstack/plugin/attachment"
	"github.com/skipstack/skipstack/plugin/datapath"
)

// Sweep removes the links of pods whose cgroup is gone, and repairs what processes
// that were killed have left in the run directory. ADD does a little of it each time.
// Nothing loaded, and nothing to sweep, is no error.
//
// It also attaches the pods whose ADD had no time to.
func (n *Node) Sweep(ctx context.Context, conf Config) error {
	if err := n.sweep(ctx, conf); err != nil {
		return err
	}
	set, err := n.Datapath.Open(conf.BPFFS)
	if errors.Is(err, datapath.ErrNotLoaded) {
		return nil
	}
	if err != nil {
		return err
	}
	defer set.Close()
	return n.adopt(ctx, conf, set)
}

func (n *Node) sweep(ctx context.Context, conf Config) error {
	lock, err := n.lock(ctx, conf)
	if err != nil {
		return err
	}
	defer lock.Unlock()
	return errors.Join(n.Datapath.Sweep(conf.BPFFS, 0), attachment.NewStore(conf.RunDir).Repair())
}
