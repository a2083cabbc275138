package plugin

import (
	"context"
	"errors"

	"github.com/skipstack/skipstack/plugin/attachment"
)

// Sweep removes the links of pods whose cgroup is gone, and repairs what processes
// that were killed have left in the run directory. ADD does a little of it each time.
// Nothing loaded, and nothing to sweep, is no error.
func (n *Node) Sweep(ctx context.Context, conf Config) error {
	lock, err := n.lock(ctx, conf)
	if err != nil {
		return err
	}
	defer lock.Unlock()
	return errors.Join(n.Datapath.Sweep(conf.BPFFS, 0), attachment.NewStore(conf.RunDir).Repair())
}
