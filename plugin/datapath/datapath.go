// Package datapath loads, publishes, attaches, controls and counts the BPF
// programs of package bpf. What is pinned lives below one directory of a bpffs:
//
//	<bpffs>/skipstack/              flock: loading, upgrading, unloading
//	<bpffs>/skipstack/v2/maps/      2 is the [Layout] of the maps
//	<bpffs>/skipstack/v2/progs/
//	<bpffs>/skipstack/v2/guard/     the splice guard's programs and links, see [Guard]
//	<bpffs>/skipstack/v2/links/     one per attached pod, named by cgroup id
//	<bpffs>/skipstack/v2/parked/    links of pods that are gone while sockets of
//	                                theirs are still closing
//	<bpffs>/skipstack/guard-N       a splice guard that a set, since replaced, has
//	                                left to its sockets
//
// Nothing here knows of CNI, pods' names or state files.
package datapath

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/skipstack/skipstack/bpf"
)

// Layout is the version of the maps' contents. Programs of one layout replace
// each other in place; another layout is published beside it and retires it.
const Layout = 2

// DefaultMaxConnections is how many connections are accelerated at once.
const DefaultMaxConnections = 262144

// MaxExcludePorts is how many port ranges one pod may exclude.
const MaxExcludePorts = len(bpf.DatapathPod{}.Excluded)

var (
	// ErrNotLoaded is returned by [Open] where no datapath is published.
	ErrNotLoaded = errors.New("the datapath is not loaded")
	// ErrDamaged is returned by [Open] where pins are missing; [Load] replaces
	// what is left of them.
	ErrDamaged = errors.New("pins of the datapath are missing")
	// ErrInUse is returned by [Unload] while pods are attached.
	ErrInUse = errors.New("pods are attached")
	// ErrUnsupported is returned by [Load] where the kernel lacks something
	// that the datapath needs; the message names it.
	ErrUnsupported = errors.New("kernel not supported")
	// ErrNoBPFFS is returned where the directory is not a BPF file system.
	ErrNoBPFFS = errors.New("not a BPF file system")
	// ErrDisplaces is returned by [Set.Attach] where a program of other software
	// would no longer run for the pod.
	ErrDisplaces = errors.New("another program would no longer run for the pod")
	// ErrBusy is returned when another process holds the lock for too long.
	ErrBusy = errors.New("another process is loading or unloading the datapath")
)

// Risk is a set of named kernel shortcomings, or of those that a pod accepts.
type Risk uint32

// The risks. RiskBlocking concerns connections of blocking sockets, not the
// kernel, and is only ever accepted, never found.
const (
	RiskSplice    = Risk(bpf.DatapathRiskRISK_SPLICE)
	RiskFIONREAD  = Risk(bpf.DatapathRiskRISK_FIONREAD)
	RiskEpoll     = Risk(bpf.DatapathRiskRISK_EPOLL)
	RiskUncharged = Risk(bpf.DatapathRiskRISK_UNCHARGED)
	RiskBlocking  = Risk(bpf.DatapathRiskRISK_BLOCKING)
)

var riskNames = []struct {
	risk Risk
	name string
}{
	{RiskSplice, "splice"},
	{RiskFIONREAD, "fionread"},
	{RiskEpoll, "epoll"},
	{RiskUncharged, "uncharged"},
	{RiskBlocking, "blocking"},
}

// Names lists the names of the risks in the set.
func (r Risk) Names() []string {
	names := []string{}
	for _, n := range riskNames {
		if r&n.risk != 0 {
			names = append(names, n.name)
		}
	}
	return names
}

func (r Risk) String() string { return strings.Join(r.Names(), ", ") }

// ParseRisk returns the risk of that name.
func ParseRisk(name string) (Risk, bool) {
	for _, n := range riskNames {
		if n.name == name {
			return n.risk, true
		}
	}
	return 0, false
}

// PortRange is an inclusive range of server ports.
type PortRange struct{ First, Last uint16 }

// PodSettings is what the datapath knows of one pod.
type PodSettings struct {
	Enabled      bool        // false: attached, but never accelerated
	SwitchedOff  bool        // by the operator
	Accepted     Risk        // risks that this pod's configuration accepts
	UnreadLimit  uint32      // bytes that a receiver may leave unread
	ExcludePorts []PortRange // at most MaxExcludePorts
}

// NodeSettings is the node's gate.
type NodeSettings struct {
	Open           bool // a verdict is known, and it allows acceleration
	SwitchedOff    bool // by the operator; changed by [SwitchEverywhere], not by SetNode
	Risks          Risk // risks that this kernel has
	Funnel         bool // FIONREAD needs the sk_skb verdict program
	MPTCPListeners bool // accept(2) on an MPTCP listener is safe for sockets in a sockmap
	// Guard is attached while a pod is, or a socket is enrolled. Read back, Risks
	// has RiskSplice if it should be attached and is not.
	Guard Guard
}

// Accelerates tells if connections of a pod are accelerated, as the programs
// themselves decide (pod_open in bpf/pods.h).
func (n NodeSettings) Accelerates(p PodSettings) bool {
	return n.Open && !n.SwitchedOff && p.Enabled && !p.SwitchedOff && n.Risks&^p.Accepted == 0
}

// Set is an open datapath. Close it after use: what is pinned stays.
type Set struct {
	dir   string // of the pins, "" for a private set
	maps  map[string]*ebpf.Map
	progs map[string]*ebpf.Program
	links []link.Link // of a private set

	guard      Guard // of a private set
	guardLinks []link.Link
	refused    *ebpf.Map // what the guard has counted; nil: none was attached yet
}

// Close releases the descriptors. A private set is gone with it, and so are
// its links.
func (s *Set) Close() error {
	errs := []error{closeAll(s.links), closeAll(s.guardLinks), s.refused.Close()}
	for _, m := range s.maps {
		errs = append(errs, m.Close())
	}
	for _, p := range s.progs {
		errs = append(errs, p.Close())
	}
	return errors.Join(errs...)
}

func root(bpffs string) string   { return filepath.Join(bpffs, "skipstack") }
func layout(bpffs string) string { return filepath.Join(root(bpffs), fmt.Sprintf("v%d", Layout)) }

// mapNames are the maps that are pinned and that every set of this layout has.
var mapNames = []string{
	bpf.DatapathMapConnections,
	bpf.DatapathMapEndpoints,
	bpf.DatapathMapFunnelNext,
	bpf.DatapathMapPods,
	bpf.DatapathMapPodsCount,
	bpf.DatapathMapQueues,
	bpf.DatapathMapQueuesSum,
	bpf.DatapathMapSkipstackCount,
	bpf.DatapathMapSkipstackCtl,
	bpf.DatapathMapSkipstackSwitch,
	bpf.DatapathMapSocks,
}

var progNames = []string{bpf.DatapathProgFunnel, bpf.DatapathProgRedirect, bpf.DatapathProgTrack}

// Open opens the published datapath.
//
// Returns an error wrapping [ErrNotLoaded] where there is none, [ErrDamaged]
// where it is not whole. The caller closes the set.
func Open(bpffs string) (*Set, error) {
	return openSet(layout(bpffs))
}

// program opens one of a set: of a published one what is pinned now, as an upgrade may
// have replaced it since the set was opened. The caller closes it.
func (s *Set) program(name string) (*ebpf.Program, error) {
	if s.dir == "" {
		return s.progs[name].Clone()
	}
	p, err := ebpf.LoadPinnedProgram(filepath.Join(s.dir, "progs", name), nil)
	if err != nil {
		return nil, fmt.Errorf("open program %s: %w", name, err)
	}
	return p, nil
}

func openSet(dir string) (*Set, error) {
	if _, err := os.Stat(dir); err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("open %s: %w", dir, ErrNotLoaded)
		}
		return nil, fmt.Errorf("open the datapath: %w", err)
	}
	s := &Set{dir: dir, maps: map[string]*ebpf.Map{}, progs: map[string]*ebpf.Program{}}
	for _, name := range mapNames {
		m, err := ebpf.LoadPinnedMap(filepath.Join(dir, "maps", name), nil)
		if err != nil {
			return nil, s.openFailed(err)
		}
		s.maps[name] = m
	}
	for _, name := range progNames {
		p, err := ebpf.LoadPinnedProgram(filepath.Join(dir, "progs", name), nil)
		if err != nil {
			return nil, s.openFailed(err)
		}
		s.progs[name] = p
	}
	return s, nil
}

func (s *Set) openFailed(err error) error {
	s.Close()
	if errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return fmt.Errorf("open the datapath: %w", err)
}

// Build identifies this binary's programs, see [bpf.Build].
func Build() [16]byte { return bpf.Build() }

// Build identifies the object file that the programs come from; compare with
// [Build].
func (s *Set) Build() ([16]byte, error) {
	ctl, err := s.control()
	return ctl.Build, err
}

// MaxConnections is the number of connections the maps were made for.
func (s *Set) MaxConnections() (uint32, error) {
	ctl, err := s.control()
	return ctl.MaxConnections, err
}

func (s *Set) control() (bpf.DatapathControl, error) {
	var ctl bpf.DatapathControl
	if err := s.maps[bpf.DatapathMapSkipstackCtl].Lookup(uint32(0), &ctl); err != nil {
		return ctl, fmt.Errorf("read the node's settings: %w", err)
	}
	return ctl, nil
}
