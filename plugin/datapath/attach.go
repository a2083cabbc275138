package datapath

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/bpf"
)

func linkPath(dir, sub string, id uint64) string {
	return filepath.Join(dir, sub, strconv.FormatUint(id, 10))
}

// linkIDs lists the cgroup ids by which the pins of a directory are named.
func linkIDs(dir string) ([]uint64, error) {
	f, err := os.Open(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	defer f.Close()
	names, err := f.Readdirnames(-1)
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	ids := make([]uint64, 0, len(names))
	for _, name := range names {
		if id, err := strconv.ParseUint(name, 10, 64); err == nil {
			ids = append(ids, id)
		}
	}
	return ids, nil
}

// linked tells if the pin at path is a link to that cgroup. A link whose cgroup
// was removed reports cgroup id 0.
func linked(path string, id uint64) (bool, error) {
	l, err := link.LoadPinnedLink(path, nil)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("open link %s: %w", path, err)
	}
	defer l.Close()
	info, err := l.Info()
	if err != nil {
		return false, fmt.Errorf("read link %s: %w", path, err)
	}
	cg := info.Cgroup()
	return cg != nil && cg.CgroupId == id, nil
}

// Attach attaches the sock_ops program to the cgroup and pins the link, unless
// that was done before; created tells. The pod takes no part before [Set.SetPod].
// cgroupID is the inode number of the open directory. An error that wraps
// [ErrGuard] says that the pod is attached, but not guarded; one that wraps
// [ErrDisplaces] that it is not, as other software's program would pay for it.
func (s *Set) Attach(cgroup *os.File, cgroupID uint64) (created bool, err error) {
	var guardErr error
	if s.dir != "" {
		// Held to the end, so that nobody detaches the guard in between.
		g := s.guardPins()
		unlock, err := g.lock()
		if err != nil {
			return false, err
		}
		defer unlock()
		if guardErr = g.settle(true); guardErr != nil && !errors.Is(guardErr, ErrGuard) {
			return false, guardErr
		}
	}
	if created, err = s.attach(cgroup, cgroupID); err != nil {
		return false, err
	}
	none := bpf.DatapathPodCounters{}
	err = s.maps[bpf.DatapathMapPodsCount].Update(cgroupID, none, ebpf.UpdateNoExist)
	if err != nil && !errors.Is(err, ebpf.ErrKeyExist) {
		return false, fmt.Errorf("make counters for cgroup %d: %w", cgroupID, err)
	}
	return created, guardErr
}

func (s *Set) attach(cgroup *os.File, cgroupID uint64) (created bool, err error) {
	if s.dir != "" {
		pin := linkPath(s.dir, "links", cgroupID)
		// A pod that was dropped while its sockets lived is back.
		if err := os.Rename(linkPath(s.dir, "parked", cgroupID), pin); err != nil && !errors.Is(err, os.ErrNotExist) {
			return false, fmt.Errorf("take up a parked link: %w", err)
		}
		live, err := linked(pin, cgroupID)
		if err != nil {
			return false, err
		}
		if live {
			return false, nil
		}
		if err := os.Remove(pin); err != nil && !errors.Is(err, os.ErrNotExist) {
			return false, fmt.Errorf("remove a dead link: %w", err)
		}
	}
	var before []ebpf.ProgramID
	if s.dir != "" {
		if before, err = effective(cgroup); err != nil {
			return false, err
		}
	}
	track, err := s.program(bpf.DatapathProgTrack)
	if err != nil {
		return false, err
	}
	defer track.Close()
	l, err := link.AttachCgroup(link.CgroupOptions{
		Path:    fmt.Sprintf("/proc/self/fd/%d", cgroup.Fd()), // the directory that was looked at
		Program: track,
		Attach:  ebpf.AttachCGroupSockOps,
	})
	if errors.Is(err, unix.EPERM) {
		// hierarchy_allows_attach(), kernel/bpf/cgroup.c.
		return false, fmt.Errorf("attach sock_ops to cgroup %s: %w (another program may be attached above without BPF_F_ALLOW_MULTI: "+
			"`skipstack doctor` names it)", cgroup.Name(), err)
	}
	if err != nil {
		return false, fmt.Errorf("attach sock_ops to cgroup %s: %w", cgroup.Name(), err)
	}
	info, err := l.Info()
	if err == nil && info.Cgroup().CgroupId != cgroupID {
		err = fmt.Errorf("the link's cgroup is %d, not %d", info.Cgroup().CgroupId, cgroupID)
	}
	if err == nil && s.dir != "" {
		err = displaced(cgroup, before)
	}
	if err == nil && s.dir != "" {
		err = l.Pin(linkPath(s.dir, "links", cgroupID))
	}
	if err != nil {
		l.Close()
		return false, fmt.Errorf("attach sock_ops to cgroup %s: %w", cgroup.Name(), err)
	}
	if s.dir == "" {
		s.links = append(s.links, l)
		return true, nil
	}
	return true, l.Close()
}

// effective are the sock_ops programs that run for sockets of a cgroup.
func effective(cgroup *os.File) ([]ebpf.ProgramID, error) {
	r, err := link.QueryPrograms(link.QueryOptions{
		Target: int(cgroup.Fd()), Attach: ebpf.AttachCGroupSockOps, QueryFlags: unix.BPF_F_QUERY_EFFECTIVE,
	})
	if err != nil {
		return nil, fmt.Errorf("list the sock_ops programs of cgroup %s: %w", cgroup.Name(), err)
	}
	ids := make([]ebpf.ProgramID, len(r.Programs))
	for i, p := range r.Programs {
		ids[i] = p.ID
	}
	return ids, nil
}

// displaced returns an error wrapping [ErrDisplaces] if one of the programs runs no
// longer. One that was attached to a cgroup above with BPF_F_ALLOW_OVERRIDE does not
// run below any other, compute_effective_progs() in kernel/bpf/cgroup.c.
func displaced(cgroup *os.File, before []ebpf.ProgramID) error {
	now, err := effective(cgroup)
	if err != nil {
		return err
	}
	for _, id := range before {
		if slices.Contains(now, id) {
			continue
		}
		p, err := ebpf.NewProgramFromID(id)
		if errors.Is(err, os.ErrNotExist) {
			continue // its owner has taken it away meanwhile
		}
		if err != nil {
			return fmt.Errorf("%w: program %d: %w", ErrDisplaces, id, err)
		}
		defer p.Close()
		name := "?"
		if info, err := p.Info(); err == nil {
			name = info.Name
		}
		return fmt.Errorf("%w: sock_ops program %d (%q) was attached to a cgroup above with BPF_F_ALLOW_OVERRIDE", ErrDisplaces, id, name)
	}
	return nil
}

// HasLink tells if a live link to the cgroup is pinned.
func HasLink(bpffs string, cgroupID uint64) (bool, error) {
	return linked(linkPath(layout(bpffs), "links", cgroupID), cgroupID)
}

// Links lists the cgroup ids of the pinned links, dead ones included.
func Links(bpffs string) ([]uint64, error) {
	return linkIDs(filepath.Join(layout(bpffs), "links"))
}

// pinned is what can be opened of a published set, however little: cleaning up
// must work where loading does not.
type pinned struct {
	dir                                       string
	pods, count, switches, funnel, ctl, socks *ebpf.Map
}

func openPinned(dir string) pinned {
	open := func(name string) *ebpf.Map {
		m, err := ebpf.LoadPinnedMap(filepath.Join(dir, "maps", name), nil)
		if err != nil {
			return nil
		}
		return m
	}
	return pinned{
		dir:      dir,
		pods:     open(bpf.DatapathMapPods),
		count:    open(bpf.DatapathMapPodsCount),
		switches: open(bpf.DatapathMapSkipstackSwitch),
		funnel:   open(bpf.DatapathMapFunnelNext),
		ctl:      open(bpf.DatapathMapSkipstackCtl),
		socks:    open(bpf.DatapathMapSocks),
	}
}

// settleGuard detaches the guard if the last socket is gone with the last pod, and
// attaches it again if somebody has removed its pin.
func (p pinned) settleGuard() error {
	g := guardPins{dir: p.dir, ctl: p.ctl, switches: p.switches, socks: p.socks}
	if _, err := os.Stat(g.path("")); errors.Is(err, os.ErrNotExist) {
		return nil // a set that knows no guard
	}
	unlock, err := g.lock()
	if err != nil {
		return err
	}
	defer unlock()
	if err := g.settle(false); !errors.Is(err, ErrGuard) {
		return err
	}
	return nil // the pods' risk says so
}

func (p pinned) close() {
	for _, m := range []*ebpf.Map{p.pods, p.count, p.switches, p.funnel, p.ctl, p.socks} {
		m.Close()
	}
}

// live is how many enrolled sockets the pod has.
func (p pinned) live(id uint64) uint64 {
	var c bpf.DatapathPodCounters
	if p.count == nil || p.count.Lookup(id, &c) != nil {
		return 0
	}
	return c.Live
}

// closeGate ends a pod's part: its connections go on by TCP.
func (p pinned) closeGate(id uint64) error {
	if p.pods == nil {
		return nil
	}
	if err := p.pods.Delete(id); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("remove the settings of cgroup %d: %w", id, err)
	}
	if p.switches == nil {
		return nil
	}
	return nextGeneration(p.switches)
}

// remove unpins the link and forgets the pod. Sockets that never told of their
// end (their cgroup went first) leave entries in the funnel's map.
func (p pinned) remove(sub string, id uint64) error {
	if err := os.Remove(linkPath(p.dir, sub, id)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("unpin the link of cgroup %d: %w", id, err)
	}
	if p.live(id) > 0 && p.funnel != nil {
		var cookie uint64
		var pos bpf.DatapathFunnelPosition
		var old []uint64
		for it := p.funnel.Iterate(); it.Next(&cookie, &pos); {
			if pos.Pod == id {
				old = append(old, cookie)
			}
		}
		for _, c := range old {
			p.funnel.Delete(c)
		}
	}
	if p.count != nil {
		if err := p.count.Delete(id); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("remove the counters of cgroup %d: %w", id, err)
		}
	}
	return nil
}

// drop closes the pod's gate, and unpins its link or, while sockets of the pod
// are enrolled, parks it: they still need the program when they close.
func (p pinned) drop(id uint64) error {
	if err := p.closeGate(id); err != nil {
		return err
	}
	if p.live(id) == 0 {
		return p.remove("links", id)
	}
	err := os.Rename(linkPath(p.dir, "links", id), linkPath(p.dir, "parked", id))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}

// sweep removes the link if its cgroup is gone, or if it is parked and the
// pod's last socket has closed.
func (p pinned) sweep(sub string, id uint64) error {
	live, err := linked(linkPath(p.dir, sub, id), id)
	if err != nil {
		return err
	}
	if live && (sub == "links" || p.live(id) > 0) {
		return nil
	}
	return errors.Join(p.closeGate(id), p.remove(sub, id))
}

func eachLayout(bpffs string, f func(pinned) error) error {
	dirs, err := filepath.Glob(filepath.Join(root(bpffs), "v*"))
	errs := []error{err}
	for _, dir := range dirs {
		p := openPinned(dir)
		errs = append(errs, f(p))
		p.close()
	}
	return errors.Join(errs...)
}

// DropPod ends a pod's part in acceleration. Absent is no error, and neither the
// cgroup nor the programs need exist.
func DropPod(bpffs string, cgroupID uint64) error {
	return eachLayout(bpffs, func(p pinned) error { return errors.Join(p.drop(cgroupID), p.settleGuard()) })
}

// Sweep removes links whose cgroup is gone, parked links whose sockets are, and the
// splice guard when it has none to guard.
// It looks at no more than limit links of each kind, chosen at random, so that
// an ADD can afford it; 0 means all.
func Sweep(bpffs string, limit int) error {
	_, orphansErr := sweepOrphans(bpffs)
	err := eachLayout(bpffs, func(p pinned) error {
		var errs []error
		for _, sub := range []string{"parked", "links"} {
			ids, err := linkIDs(filepath.Join(p.dir, sub))
			errs = append(errs, err)
			rand.Shuffle(len(ids), func(i, j int) { ids[i], ids[j] = ids[j], ids[i] })
			if limit > 0 && len(ids) > limit {
				ids = ids[:limit]
			}
			for _, id := range ids {
				errs = append(errs, p.sweep(sub, id))
			}
		}
		return errors.Join(append(errs, p.settleGuard())...)
	})
	return errors.Join(orphansErr, err)
}
