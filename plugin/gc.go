package plugin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"

	"github.com/skipstack/skipstack/plugin/attachment"
)

// GC serves GC: it removes what is recorded of this network's attachments that
// are not listed as valid, and what no attachment owns: links of dead cgroups,
// and what killed processes have left in the run directory. Errors are joined;
// one does not keep it from the rest.
func (p *Plugin) GC(args *skel.CmdArgs) error {
	in, err := decodeInput(args.StdinData)
	if err != nil {
		return err
	}
	valid, err := in.validAttachments()
	if err != nil {
		return err
	}
	conf, _ := in.config() // valid keys hold, as for DEL
	err = within(max(gcBudget, p.budget), func(ctx context.Context) error {
		return p.gc(ctx, conf, in.name, valid)
	})
	if err != nil {
		return coded(types.ErrTryAgainLater, "not everything could be removed", err)
	}
	return nil
}

// validAttachments reads the list from the raw JSON, for the library's type cannot
// tell an absent list from an empty one. Absent, it is an error: taking it for
// empty would remove what is in use. libcni sends null where the runtime has no
// attachment.
func (in *input) validAttachments() (map[attachment.Key]bool, error) {
	const name = "cni.dev/valid-attachments"
	var raw json.RawMessage
	for _, m := range in.members {
		if m.key == name {
			raw = m.value
		}
	}
	if raw == nil {
		return nil, types.NewError(types.ErrInvalidNetworkConfig, name+" is missing", "nothing was removed")
	}
	bad := func(detail string) error {
		return types.NewError(types.ErrInvalidNetworkConfig, name+" cannot be read", detail+"; nothing was removed")
	}
	var list []*struct {
		ContainerID *string `json:"containerID"`
		IfName      *string `json:"ifname"`
	}
	if err := json.Unmarshal(raw, &list); err != nil {
		return nil, bad(err.Error())
	}
	valid := map[attachment.Key]bool{}
	for i, a := range list {
		if a == nil || a.ContainerID == nil || a.IfName == nil {
			return nil, bad(fmt.Sprintf("element %d has no containerID or ifname", i))
		}
		valid[attachment.Key{Network: in.name, ContainerID: *a.ContainerID, IfName: *a.IfName}] = true
	}
	return valid, nil
}

func (p *Plugin) gc(ctx context.Context, conf Config, network string, valid map[attachment.Key]bool) error {
	store := attachment.NewStore(conf.RunDir)
	lockCtx, cancel := context.WithTimeout(ctx, p.budget)
	defer cancel()
	lock, err := store.Lock(lockCtx)
	if err != nil {
		return err
	}
	defer lock.Unlock()

	// First, so that what cannot be read does not count below.
	errs := []error{store.Repair()}
	records, err := store.ListNetwork(network)
	errs = append(errs, err)
	for _, r := range records {
		if valid[r.Key] {
			continue
		}
		err := safely(func() error {
			if err := p.release(store, conf, r); err != nil {
				return err
			}
			return store.Delete(r.Key)
		})
		if err != nil {
			errs = append(errs, fmt.Errorf("container %s, interface %s: %w", r.ContainerID, r.IfName, err))
		}
	}
	errs = append(errs, p.Datapath.Sweep(conf.BPFFS, 0))
	return errors.Join(errs...)
}
