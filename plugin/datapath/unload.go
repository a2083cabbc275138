package datapath

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// Remaining is what [Unload] had to leave in place.
type Remaining struct {
	Sockets uint64 // enrolled, still open
}

// Published says whether there is a datapath below bpffs, of whatever build and
// layout, whole or not. The error wraps [ErrNoBPFFS] where bpffs is none.
func Published(bpffs string) (bool, error) {
	if err := checkBPFFS(bpffs); err != nil {
		return false, err
	}
	_, err := os.Stat(root(bpffs))
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("look for the datapath: %w", err)
	}
	return true, nil
}

// Unload takes the datapath away. Where pods are attached it returns an error
// wrapping [ErrInUse] unless told to force it.
//
// Sockets that are enrolled stay so until they close: from now on they send by
// TCP, and the links and programs that they need stay pinned for as long as
// there are any. Call it again, or [Load] to go on after all. Nothing loaded is
// no error.
func Unload(ctx context.Context, bpffs string, force bool) (Remaining, error) {
	if _, err := os.Stat(root(bpffs)); errors.Is(err, os.ErrNotExist) {
		return Remaining{}, nil
	}
	unlock, err := lock(ctx, bpffs)
	if err != nil {
		return Remaining{}, err
	}
	defer unlock()
	if err := Sweep(bpffs, 0); err != nil {
		return Remaining{}, err
	}
	if ids, err := Links(bpffs); err != nil {
		return Remaining{}, err
	} else if len(ids) > 0 && !force {
		return Remaining{}, fmt.Errorf("unload: %w: %d", ErrInUse, len(ids))
	}
	var left Remaining
	err = eachLayout(bpffs, func(p pinned) error {
		sockets, err := p.unload()
		left.Sockets += sockets
		return err
	})
	orphans, orphansErr := sweepOrphans(bpffs)
	left.Sockets += orphans
	err = errors.Join(err, orphansErr)
	if err == nil && left.Sockets == 0 {
		err = os.Remove(root(bpffs))
	}
	return left, err
}

func (p pinned) unload() (sockets uint64, err error) {
	if s, err := openSet(p.dir); err == nil {
		defer s.Close()
		if n, err := s.Node(); err == nil {
			n.Open = false
			if err := s.SetNode(n); err != nil {
				return 0, err
			}
		}
	}
	ids, err := linkIDs(filepath.Join(p.dir, "links"))
	if err != nil {
		return 0, err
	}
	var errs []error
	for _, id := range ids {
		errs = append(errs, p.drop(id))
	}
	parked, err := linkIDs(filepath.Join(p.dir, "parked"))
	errs = append(errs, err)
	for _, id := range parked {
		sockets += p.live(id)
	}
	running, err := guardPins{dir: p.dir}.attached()
	errs = append(errs, err)
	if sockets == 0 && running.any() && p.socks != nil {
		// Those whose pods' cgroups went first do not count as live.
		sockets = members(p.socks)
	}
	if err := errors.Join(errs...); err != nil || sockets > 0 {
		return sockets, err
	}
	return 0, discard(p.dir)
}
