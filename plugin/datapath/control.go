package datapath

import (
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/skipstack/skipstack/bpf"
)

// SetPod writes a pod's settings; its live connections follow within one
// message. More than [MaxExcludePorts] ranges are refused.
func (s *Set) SetPod(cgroupID uint64, p PodSettings) error {
	if len(p.ExcludePorts) > MaxExcludePorts {
		return fmt.Errorf("exclude %d port ranges: at most %d are possible", len(p.ExcludePorts), MaxExcludePorts)
	}
	v := bpf.DatapathPod{
		Enabled:        flag(p.Enabled),
		SwitchedOff:    flag(p.SwitchedOff),
		Accepted:       uint32(p.Accepted),
		UnreadLimit:    p.UnreadLimit,
		ExcludedRanges: uint32(len(p.ExcludePorts)),
	}
	for i, r := range p.ExcludePorts {
		v.Excluded[i] = bpf.DatapathPortRange{First: r.First, Last: r.Last}
	}
	if err := s.maps[bpf.DatapathMapPods].Put(cgroupID, v); err != nil {
		return fmt.Errorf("write the settings of cgroup %d: %w", cgroupID, err)
	}
	return nextGeneration(s.maps[bpf.DatapathMapSkipstackSwitch])
}

// Pod reads a pod's settings, and whether there are any.
func (s *Set) Pod(cgroupID uint64) (PodSettings, bool, error) {
	var v bpf.DatapathPod
	err := s.maps[bpf.DatapathMapPods].Lookup(cgroupID, &v)
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return PodSettings{}, false, nil
	}
	if err != nil {
		return PodSettings{}, false, fmt.Errorf("read the settings of cgroup %d: %w", cgroupID, err)
	}
	return settingsOf(v), true, nil
}

func settingsOf(v bpf.DatapathPod) PodSettings {
	p := PodSettings{
		Enabled:     v.Enabled != 0,
		SwitchedOff: v.SwitchedOff != 0,
		Accepted:    Risk(v.Accepted),
		UnreadLimit: v.UnreadLimit,
	}
	for _, r := range v.Excluded[:min(int(v.ExcludedRanges), MaxExcludePorts)] {
		p.ExcludePorts = append(p.ExcludePorts, PortRange{r.First, r.Last})
	}
	return p
}

// Node reads the node's gate.
func (s *Set) Node() (NodeSettings, error) {
	ctl, err := s.control()
	if err != nil {
		return NodeSettings{}, err
	}
	var off uint32
	if err := s.maps[bpf.DatapathMapSkipstackSwitch].Lookup(bpf.DatapathSwitchSlotSWITCH_OFF, &off); err != nil {
		return NodeSettings{}, fmt.Errorf("read the switch: %w", err)
	}
	n := NodeSettings{
		Open:           ctl.Open != 0,
		SwitchedOff:    off != 0,
		Risks:          Risk(ctl.Risks),
		Funnel:         ctl.Funnel != 0,
		MPTCPListeners: ctl.MptcpListeners != 0,
		Guard:          s.guard,
	}
	if s.dir != "" {
		n.Risks, n.Guard = s.guardPins().risks(n.Risks)
	}
	return n, nil
}

// SetNode opens or closes the node's gate, but for SwitchedOff. The funnel is
// attached before the gate opens and never detached: enrolled sockets need it
// for as long as they live. So does the guard, which goes with the last of them
// when it is no longer wanted.
//
// An error that wraps [ErrGuard] says that all is done, but without a guard and
// with RiskSplice. Of a private set the guard is attached at once.
func (s *Set) SetNode(n NodeSettings) error {
	if s.dir == "" {
		guardErr := s.setPrivateGuard(n.Guard)
		if guardErr != nil {
			n.Risks |= RiskSplice
		}
		if err := s.writeNode(n); err != nil {
			return err
		}
		return guardErr
	}
	g := s.guardPins()
	var guard *guardPrograms
	var guardErr error
	if n.Guard != NoGuard && n.Guard != g.wanted() {
		if guard, guardErr = g.load(n.Guard); guardErr != nil {
			n.Guard = NoGuard
			n.Risks |= RiskSplice
		}
		defer guard.Close()
	}
	unlock, err := g.lock()
	if err != nil {
		return err
	}
	defer unlock()
	running, err := g.attached()
	if err != nil {
		return err
	}
	// Killed in between, it must leave a gate that is closed, or knows of the risk.
	steps := []func() error{
		func() error { return g.want(n.Guard, guard) },
		func() error { return s.writeNode(n) },
	}
	if n.Guard == NoGuard {
		slices.Reverse(steps)
	} else {
		n.Risks &^= RiskSplice
		if !running.all() {
			n.Risks |= RiskSplice // until settle has attached it
		}
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return err
		}
	}
	if err := g.settle(false); err != nil {
		return err
	}
	return guardErr
}

func (s *Set) writeNode(n NodeSettings) error {
	ctl, err := s.control()
	if err != nil {
		return err
	}
	if n.Funnel && ctl.Funnel == 0 {
		funnel, err := s.program(bpf.DatapathProgFunnel)
		if err != nil {
			return err
		}
		defer funnel.Close()
		if err := s.attachFunnel(funnel); err != nil {
			return err
		}
	}
	ctl.Open = flag(n.Open)
	ctl.Risks = uint32(n.Risks)
	ctl.Funnel |= flag(n.Funnel)
	ctl.MptcpListeners = flag(n.MPTCPListeners)
	if err := s.maps[bpf.DatapathMapSkipstackCtl].Put(uint32(0), ctl); err != nil {
		return fmt.Errorf("write the node's settings: %w", err)
	}
	return nextGeneration(s.maps[bpf.DatapathMapSkipstackSwitch])
}

func (s *Set) attachFunnel(funnel *ebpf.Program) error {
	err := link.RawAttachProgram(link.RawAttachProgramOptions{
		Target:  s.maps[bpf.DatapathMapSocks].FD(),
		Program: funnel,
		Attach:  ebpf.AttachSkSKBVerdict,
	})
	if err != nil {
		return fmt.Errorf("attach sk_skb to the sockhash: %w", err)
	}
	return nil
}

// nextGeneration makes every connection look at the settings again. A random
// value needs no lock between processes that change it at once.
func nextGeneration(m switchMap) error {
	if err := m.Put(bpf.DatapathSwitchSlotSWITCH_GENERATION, rand.Uint32()); err != nil {
		return fmt.Errorf("announce new settings: %w", err)
	}
	return nil
}

func flag(b bool) uint32 {
	if b {
		return 1
	}
	return 0
}

// switchName is what the kernel keeps of the map's name. Every layout has it,
// with slots of the same meaning.
const switchName = "skipstack_switc"

// SwitchNode switches acceleration off or on for the node, and returns how many
// sets of programs it reached. From then on every message of every connection
// goes by TCP, which stays in order.
//
// Off reaches every set in the kernel, those too whose pins are gone (bpffs
// unmounted) or are in another mount namespace: its maps are found by their id.
// On reaches the sets published below bpffs.
//
// An error says what was not reached, though all were tried. It wraps
// [fs.ErrPermission] where the process lacks privileges.
func SwitchNode(bpffs string, off bool) (int, error) {
	if off {
		return switchAll(kernelSwitches(ebpf.MapGetNextID, openSwitch), off)
	}
	return switchAll(pinnedSwitches(root(bpffs)), off)
}

// LiveInKernel is how many enrolled sockets all sets of programs in the kernel have:
// also those whose pins are gone, or are in another mount namespace. A set whose pins
// are gone lives on in its sockets, of which each holds the sk_msg program; that leads
// to the sockhash. An error says what could not be counted.
func LiveInKernel() (uint64, error) {
	var errs []error
	sockhashes := map[ebpf.MapID]uint64{}
	for id, err := ebpf.ProgramGetNextID(0); !errors.Is(err, fs.ErrNotExist); id, err = ebpf.ProgramGetNextID(id) {
		if err != nil {
			errs = append(errs, fmt.Errorf("list BPF programs: %w", err))
			break
		}
		if err := countSockets(id, sockhashes); err != nil {
			errs = append(errs, fmt.Errorf("count the sockets of BPF program %d: %w", id, err))
		}
	}
	var sum uint64
	for _, n := range sockhashes {
		sum += n
	}
	return sum, errors.Join(errs...)
}

// countSockets adds the sockhashes of a program, if it is a sk_msg program of ours, and
// how many sockets they have.
func countSockets(id ebpf.ProgramID, sockhashes map[ebpf.MapID]uint64) error {
	prog, err := ebpf.NewProgramFromID(id)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // gone meanwhile
	}
	if err != nil {
		return err
	}
	defer prog.Close()
	if prog.Type() != ebpf.SkMsg {
		return nil
	}
	info, err := prog.Info()
	if err != nil {
		return err
	}
	ids, _ := info.MapIDs()
	ours := false
	for _, id := range ids {
		m, err := openSwitch(id)
		if err != nil {
			return err
		}
		if m != nil {
			ours = true
			m.Close()
		}
	}
	if !ours {
		return nil
	}
	for _, id := range ids {
		m, err := ebpf.NewMapFromID(id)
		if err != nil {
			return err
		}
		if m.Type() == ebpf.SockHash {
			var n int
			n, err = countKeys(m)
			sockhashes[id] = uint64(n)
		}
		if err = errors.Join(err, m.Close()); err != nil {
			return err
		}
	}
	return nil
}

// switchMap is what switching needs of an [ebpf.Map].
type switchMap interface {
	Put(key, value any) error
	Close() error
}

// switchAll passes over maps that were gone before they could be opened.
func switchAll(maps iter.Seq2[switchMap, error], off bool) (int, error) {
	var errs []error
	sets := 0
	for m, err := range maps {
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		err = m.Put(bpf.DatapathSwitchSlotSWITCH_OFF, flag(off))
		if err != nil {
			err = fmt.Errorf("write the switch: %w", err)
		} else {
			sets++
			err = nextGeneration(m)
		}
		errs = append(errs, err, m.Close())
	}
	return sets, errors.Join(errs...)
}

// kernelSwitches are the switches among all maps of the kernel. open returns nil
// for any other map.
func kernelSwitches(next func(ebpf.MapID) (ebpf.MapID, error), open func(ebpf.MapID) (switchMap, error)) iter.Seq2[switchMap, error] {
	return func(yield func(switchMap, error) bool) {
		for id, err := next(0); ; id, err = next(id) {
			if errors.Is(err, fs.ErrNotExist) {
				return
			}
			if err != nil {
				yield(nil, fmt.Errorf("list BPF maps: %w", err))
				return
			}
			m, err := open(id)
			if (m != nil || err != nil) && !yield(m, err) {
				return
			}
		}
	}
}

// openSwitch returns the map if it is a switch of ours, else nil.
func openSwitch(id ebpf.MapID) (switchMap, error) {
	m, err := ebpf.NewMapFromID(id)
	if err != nil {
		return nil, fmt.Errorf("open BPF map %d: %w", id, err)
	}
	if m.Type() != ebpf.Array || m.KeySize() != 4 || m.ValueSize() != 4 || m.MaxEntries() < 3 {
		return nil, m.Close()
	}
	info, err := m.Info()
	if err != nil {
		m.Close()
		// Not wrapped: where /proc is missing, the map is there all the same.
		return nil, fmt.Errorf("read the name of BPF map %d: %v", id, err)
	}
	if info.Name != switchName {
		return nil, m.Close()
	}
	return m, nil
}

// pinnedSwitches are those of the sets, of any layout, that are published in dir.
func pinnedSwitches(dir string) iter.Seq2[switchMap, error] {
	return func(yield func(switchMap, error) bool) {
		// Unlike filepath.Glob this reports a directory that may not be read.
		entries, err := os.ReadDir(dir)
		if err != nil {
			yield(nil, fmt.Errorf("look for the datapath: %w", err))
			return
		}
		for _, e := range entries {
			if !strings.HasPrefix(e.Name(), "v") {
				continue
			}
			pin := filepath.Join(dir, e.Name(), "maps", bpf.DatapathMapSkipstackSwitch)
			m, err := ebpf.LoadPinnedMap(pin, nil)
			if err != nil {
				if !yield(nil, fmt.Errorf("open %s: %w", pin, err)) {
					return
				}
				continue
			}
			if !yield(m, nil) {
				return
			}
		}
	}
}
