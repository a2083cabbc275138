package plugin

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/skipstack/skipstack/plugin/attachment"
	"github.com/skipstack/skipstack/plugin/datapath"
)

// wants says whether a record claims its cgroup's link. One that is attaching
// does: it may be that of an ADD that was killed and has attached it. One from before
// the node was booted speaks of another cgroup, whatever its id.
func wants(r attachment.Record) bool {
	return !r.Stale && (r.Status == attachment.Attaching || r.Status == attachment.Attached)
}

func wishOf(r attachment.Record) wish {
	var w wish
	if json.Unmarshal(r.Settings, &w) != nil {
		return wish{} // asks for nothing, so the pod is plain
	}
	return w
}

// settle brings the datapath in line with the records of a pod's cgroup, all but
// the one of key without: the link goes where no record wants it, else the pod
// gets the strictest of what its records ask for. A skipped attachment's record
// counts for the latter, so that "off" on one network holds although another
// network's attachment keeps the link.
//
// The lock is held. Doing it again does no harm. A caller that has the datapath
// open passes it as set, which may be nil.
func (d *Deps) settle(store *attachment.Store, bpffs string, cgroupID uint64, without *attachment.Key, set Set) error {
	records, err := store.ByCgroup(cgroupID)
	records = slices.DeleteFunc(records, func(r attachment.Record) bool {
		w := wishOf(r)
		return r.Stale || without != nil && r.Key == *without || w.BPFFS != "" && w.BPFFS != bpffs
	})
	if !slices.ContainsFunc(records, wants) {
		if err != nil {
			// An unreadable record may want the link. It goes with its cgroup.
			return err
		}
		return d.Datapath.DropPod(bpffs, cgroupID)
	}
	var wishes []wish
	for _, r := range records {
		wishes = append(wishes, wishOf(r))
	}
	if err != nil {
		wishes = append(wishes, wish{}) // for what could not be read
	}
	if set == nil {
		set, err = d.Datapath.Open(bpffs)
		if errors.Is(err, datapath.ErrNotLoaded) {
			return nil
		}
		if err != nil {
			return err
		}
		defer set.Close()
	}
	return setPod(set, cgroupID, wishes)
}

// setPod keeps what the operator has switched off by hand.
func setPod(set Set, cgroupID uint64, wishes []wish) error {
	settings := strictest(wishes)
	current, _, err := set.Pod(cgroupID)
	if err != nil {
		return fmt.Errorf("read the pod's settings: %w", err)
	}
	settings.SwitchedOff = current.SwitchedOff
	if err := set.SetPod(cgroupID, settings); err != nil {
		return fmt.Errorf("write the pod's settings: %w", err)
	}
	return nil
}

// release undoes what a record stands for, but for the record itself. The lock is
// held; conf is asked where the record does not say.
func (d *Deps) release(store *attachment.Store, conf Config, r attachment.Record) error {
	if r.CgroupID == 0 || r.Stale {
		return nil
	}
	bpffs := wishOf(r).BPFFS
	if bpffs == "" {
		bpffs = conf.BPFFS
	}
	return d.settle(store, bpffs, r.CgroupID, &r.Key, nil)
}
