package datapath

import (
	"context"
	"errors"
	"fmt"
	"math/bits"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/features"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/bpf"
)

// LoadOptions are fixed when the datapath is loaded.
type LoadOptions struct {
	MaxConnections uint32 // 0 means DefaultMaxConnections
	// ClaimWindow is how long after its SYN a client may be recognised; 0 means
	// the 4 ms that are built in. Only probes and tests may wait longer, which an
	// emulated or overloaded machine makes them need: see cfg_claim_window_ns.
	ClaimWindow time.Duration
}

// leastRecords keeps the maps useful that are smaller than the number of connections:
// an LRU map, as that of handshakes is, sets elements aside for each CPU.
const leastRecords = 1024

// Load publishes the datapath below bpffs, or opens what is published already.
// The node's gate is closed at first.
//
// Loading takes some 0.3 s; other processes wait for it on a flock of
// <bpffs>/skipstack until ctx is done, then [ErrBusy] is returned. Returns an
// error wrapping [ErrUnsupported] where the kernel cannot run the programs, and
// [ErrNoBPFFS]. The caller closes the set.
func Load(ctx context.Context, bpffs string, o LoadOptions) (*Set, error) {
	if s, err := Open(bpffs); err == nil {
		return s, nil
	}
	// Where nothing can be loaded, nothing is left.
	if err := CheckKernel(); err != nil {
		return nil, err
	}
	unlock, err := lock(ctx, bpffs)
	if err != nil {
		return nil, err
	}
	defer unlock()
	s, err := Open(bpffs)
	if err == nil {
		return s, nil
	}
	damaged := errors.Is(err, ErrDamaged)
	if !damaged && !errors.Is(err, ErrNotLoaded) {
		return nil, err
	}
	if s, err = loadFresh(o, switchName); err != nil {
		return nil, err
	}
	if damaged {
		// Sockets keep their programs, and the guard; links stop with their pins.
		err := orphanGuard(bpffs, layout(bpffs))
		if err == nil {
			err = discard(layout(bpffs))
		}
		if err != nil {
			s.Close()
			return nil, fmt.Errorf("remove the rest of a damaged datapath: %w", err)
		}
	}
	if err := s.publish(bpffs); err != nil {
		s.Close()
		return nil, err
	}
	return s, retireOthers(bpffs)
}

// LoadPrivate loads a datapath that is not pinned: it is for the caller alone
// and gone when closed, and [SwitchNode] does not find it. Errors as for [Load].
func LoadPrivate(o LoadOptions) (*Set, error) {
	return loadFresh(o, "skipstack_priv")
}

func loadFresh(o LoadOptions, switchName string) (*Set, error) {
	if o.MaxConnections == 0 {
		o.MaxConnections = DefaultMaxConnections
	}
	spec, err := bpf.LoadDatapath()
	if err != nil {
		return nil, fmt.Errorf("read the embedded programs: %w", err)
	}
	resize(spec, o.MaxConnections)
	spec.Maps[bpf.DatapathMapSkipstackSwitch].Name = switchName
	s, err := load(spec, nil, o.ClaimWindow)
	if err != nil {
		return nil, err
	}
	ctl := bpf.DatapathControl{MaxConnections: o.MaxConnections, Build: bpf.Build()}
	if err := s.maps[bpf.DatapathMapSkipstackCtl].Put(uint32(0), ctl); err != nil {
		s.Close()
		return nil, fmt.Errorf("write the node's settings: %w", err)
	}
	return s, nil
}

// sizedMaps are those whose size depends on how many connections there may be.
var sizedMaps = []string{bpf.DatapathMapSocks, bpf.DatapathMapFunnelNext, bpf.DatapathMapConnections, bpf.DatapathMapQueues}

func resize(spec *ebpf.CollectionSpec, maxConnections uint32) {
	spec.Maps[bpf.DatapathMapSocks].MaxEntries = 2 * maxConnections
	spec.Maps[bpf.DatapathMapFunnelNext].MaxEntries = 2 * maxConnections
	spec.Maps[bpf.DatapathMapConnections].MaxEntries = max(maxConnections/4, leastRecords)
	spec.Maps[bpf.DatapathMapQueues].MaxEntries = max(maxConnections/8, leastRecords)
}

// load loads the programs, on the given maps where there are any.
func load(spec *ebpf.CollectionSpec, maps map[string]*ebpf.Map, window time.Duration) (*Set, error) {
	if window != 0 {
		if err := spec.Variables[bpf.DatapathVarCfgClaimWindowNs].Set(uint64(window)); err != nil {
			return nil, fmt.Errorf("set the claim window: %w", err)
		}
	}
	shift := uint8(bits.TrailingZeros(uint(os.Getpagesize())))
	if err := spec.Variables[bpf.DatapathVarCfgPageShift].Set(shift); err != nil {
		return nil, fmt.Errorf("set the page size: %w", err)
	}
	coll, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: maps})
	if err != nil {
		return nil, explain(err)
	}
	defer coll.Close()
	s := &Set{maps: map[string]*ebpf.Map{}, progs: map[string]*ebpf.Program{}}
	for _, name := range mapNames {
		s.maps[name] = coll.DetachMap(name)
	}
	for _, name := range progNames {
		s.progs[name] = coll.DetachProgram(name)
	}
	err = link.RawAttachProgram(link.RawAttachProgramOptions{
		Target:  s.maps[bpf.DatapathMapSocks].FD(),
		Program: s.progs[bpf.DatapathProgRedirect],
		Attach:  ebpf.AttachSkMsgVerdict,
	})
	if err != nil {
		s.Close()
		return nil, fmt.Errorf("attach sk_msg to the sockhash: %w", err)
	}
	return s, nil
}

// CheckKernel returns an error wrapping [ErrUnsupported] if the kernel is certainly
// too old, or built without what the datapath takes. It takes no time, and it works
// where EPERM would hide the reason: kernels before 5.11 charge BPF programs and maps
// to RLIMIT_MEMLOCK, which is lifted meanwhile if the caller may.
func CheckKernel() error {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &limit); err == nil {
		infinite := unix.Rlimit{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY}
		if unix.Setrlimit(unix.RLIMIT_MEMLOCK, &infinite) == nil {
			defer unix.Setrlimit(unix.RLIMIT_MEMLOCK, &limit)
		}
	}
	switch err := haveCompareAndSwap(); {
	case errors.Is(err, unix.ENOSYS):
		return fmt.Errorf("%w: no bpf(2) (CONFIG_BPF_SYSCALL)", ErrUnsupported)
	case errors.Is(err, ebpf.ErrNotSupported):
		return fmt.Errorf("%w: no BPF compare-and-swap instruction; Linux 5.12 brought it, 6.1 is the oldest supported", ErrUnsupported)
	}
	// Programs of this type depend on what attaching sock_ops programs depends on;
	// those can be loaded without it (include/linux/bpf_types.h).
	if err := features.HaveProgramType(ebpf.CGroupSKB); errors.Is(err, ebpf.ErrNotSupported) {
		return fmt.Errorf("%w: no BPF programs on cgroups (CONFIG_CGROUP_BPF)", ErrUnsupported)
	}
	return nil
}

// Loadable returns an error where [EnsureBPFFS] or [Load] is known to fail, without
// loading or mounting anything. It takes no time.
func Loadable(bpffs string) error {
	if err := CheckKernel(); err != nil {
		return err
	}
	if err := features.HaveProgramType(ebpf.SkMsg); errors.Is(err, unix.EPERM) {
		return errNotPermitted
	}
	is, err := isBPFFS(bpffs)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrNoBPFFS, err)
	}
	if !is && LacksBPFFS("/proc") {
		return fmt.Errorf("%s: %w, and this kernel has none to mount (CONFIG_BPF_SYSCALL)", bpffs, ErrNoBPFFS)
	}
	return nil
}

var errNotPermitted = fmt.Errorf("load BPF programs: not permitted (needs root or CAP_BPF, CAP_NET_ADMIN, CAP_PERFMON, no "+
	"lockdown=confidentiality, and no seccomp filter that refuses bpf(2)): %w", unix.EPERM)

// explain names what the kernel lacks.
func explain(err error) error {
	if e := CheckKernel(); e != nil {
		return e
	}
	// Unprivileged, some errors of the library name old kernels instead.
	if errors.Is(err, unix.EPERM) || errors.Is(features.HaveProgramType(ebpf.SkMsg), unix.EPERM) {
		// What the library adds is of limits that do not apply any more.
		return errNotPermitted
	}
	if _, e := btf.LoadKernelSpec(); e != nil {
		return fmt.Errorf("%w: no type information (CONFIG_DEBUG_INFO_BTF): %w", ErrUnsupported, e)
	}
	for _, need := range []struct {
		have error
		what string
	}{
		{features.HaveProgramType(ebpf.SockOps), "no sock_ops programs (CONFIG_INET)"},
		{features.HaveProgramType(ebpf.SkMsg), "no sk_msg programs (CONFIG_NET_SOCK_MSG, CONFIG_BPF_STREAM_PARSER)"},
		{features.HaveMapType(ebpf.SockHash), "no sockhash maps (CONFIG_BPF_STREAM_PARSER)"},
		{features.HaveMapType(ebpf.SkStorage), "no socket storage maps"},
		{features.HaveV3ISA(), "no BPF instruction set v3"},
	} {
		if errors.Is(need.have, ebpf.ErrNotSupported) {
			return fmt.Errorf("%w: %s", ErrUnsupported, need.what)
		}
	}
	var refused *ebpf.VerifierError
	if errors.As(err, &refused) {
		return fmt.Errorf("%w: the verifier refused the programs: %w", ErrUnsupported, err)
	}
	return fmt.Errorf("load BPF programs: %w", err)
}

// lock takes the flock of <bpffs>/skipstack, which it makes.
func lock(ctx context.Context, bpffs string) (unlock func(), err error) {
	if err := checkBPFFS(bpffs); err != nil {
		return nil, err
	}
	dir := root(bpffs)
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return nil, fmt.Errorf("create %s: %w", dir, err)
	}
	f, err := flock(ctx, dir)
	if err != nil {
		return nil, err
	}
	// Under the lock, what is temporary belongs to nobody alive.
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), "tmp-") {
			discard(filepath.Join(dir, e.Name()))
		}
	}
	return func() { f.Close() }, nil
}

// publish pins the set under a temporary name and renames it into place, so
// that others see it whole or not at all. The lock is held.
func (s *Set) publish(bpffs string) (err error) {
	tmp := filepath.Join(root(bpffs), fmt.Sprintf("tmp-%d", os.Getpid()))
	defer func() {
		if err != nil {
			discard(tmp)
		}
	}()
	for _, d := range []string{"", "maps", "progs", "links", "parked", "guard"} {
		if err := os.Mkdir(filepath.Join(tmp, d), 0o700); err != nil {
			return fmt.Errorf("publish the datapath: %w", err)
		}
	}
	for name, m := range s.maps {
		if err := m.Pin(filepath.Join(tmp, "maps", name)); err != nil {
			return fmt.Errorf("pin map %s: %w", name, err)
		}
	}
	if err := s.pinPrograms(filepath.Join(tmp, "progs")); err != nil {
		return err
	}
	if err := os.Rename(tmp, layout(bpffs)); err != nil {
		return fmt.Errorf("publish the datapath: %w", err)
	}
	s.dir = layout(bpffs)
	return nil
}

func (s *Set) pinPrograms(dir string) error {
	for name, p := range s.progs {
		if err := p.Pin(filepath.Join(dir, name)); err != nil {
			return fmt.Errorf("pin program %s: %w", name, err)
		}
	}
	return nil
}

// discard removes pins and directories, and nothing but what is below path.
func discard(path string) error {
	if err := os.RemoveAll(path); err != nil {
		return fmt.Errorf("remove %s: %w", path, err)
	}
	return nil
}

// Upgrade publishes the programs of this build in place of another build's of
// the same layout, older or newer, and returns whether there was anything to
// do. Maps stay, so connections and settings do; sockets enrolled before keep
// the programs they have. Errors as for [Load]. The caller closes the set.
//
// Killed on the way, it leaves a mixture of programs that work on the same maps;
// the build recorded last is what a later call compares, so that it does all again.
func Upgrade(ctx context.Context, bpffs string, o LoadOptions) (s *Set, changed bool, err error) {
	old, err := Load(ctx, bpffs, o)
	if err != nil {
		return nil, false, err
	}
	ctl, err := old.control()
	if err != nil {
		old.Close()
		return nil, false, err
	}
	if ctl.Build == bpf.Build() {
		return old, false, nil
	}
	defer old.Close()
	unlock, err := lock(ctx, bpffs)
	if err != nil {
		return nil, false, err
	}
	defer unlock()
	s, err = old.replacePrograms(bpffs, ctl, o.ClaimWindow)
	return s, err == nil, err
}

// replacePrograms loads this build's programs on the maps of the set and puts
// them in place. The lock is held.
func (s *Set) replacePrograms(bpffs string, ctl bpf.DatapathControl, window time.Duration) (_ *Set, err error) {
	spec, err := bpf.LoadDatapath()
	if err != nil {
		return nil, fmt.Errorf("read the embedded programs: %w", err)
	}
	for name, m := range s.maps {
		spec.Maps[name].MaxEntries = m.MaxEntries()
	}
	fresh, err := load(spec, s.maps, window)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			fresh.Close()
		}
	}()
	fresh.dir = s.dir
	if ctl.Funnel != 0 {
		if err := fresh.attachFunnel(fresh.progs[bpf.DatapathProgFunnel]); err != nil {
			return nil, err
		}
	}
	tmp := filepath.Join(root(bpffs), fmt.Sprintf("tmp-%d", os.Getpid()))
	if err := os.Mkdir(tmp, 0o700); err != nil {
		return nil, fmt.Errorf("pin the new programs: %w", err)
	}
	defer discard(tmp)
	if err := fresh.pinPrograms(tmp); err != nil {
		return nil, err
	}
	if err := fresh.exchangePrograms(tmp); err != nil {
		return nil, err
	}
	fresh.renewGuard()
	if err := fresh.recordBuild(); err != nil {
		return nil, err
	}
	return fresh, nil
}

// exchangePrograms exchanges the pinned programs for those of a directory, which are
// the set's, and has the links go by them. Nobody attaches a pod meanwhile.
func (s *Set) exchangePrograms(dir string) error {
	unlock, err := s.guardPins().lock()
	if err != nil {
		return err
	}
	defer unlock()
	// simple_rename_exchange(), fs/libfs.c: bpffs has it since Linux 5.17.
	progs := filepath.Join(s.dir, "progs")
	if err := unix.Renameat2(unix.AT_FDCWD, dir, unix.AT_FDCWD, progs, unix.RENAME_EXCHANGE); err != nil {
		return fmt.Errorf("exchange %s and %s: %w", dir, progs, err)
	}
	var errs []error
	for _, dir := range []string{"links", "parked"} {
		ids, err := linkIDs(filepath.Join(s.dir, dir))
		errs = append(errs, err)
		for _, id := range ids {
			errs = append(errs, updateLink(linkPath(s.dir, dir, id), s.progs[bpf.DatapathProgTrack]))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("update the pods' links: %w", err)
	}
	return nil
}

func (s *Set) recordBuild() error {
	unlock, err := s.guardPins().lock()
	if err != nil {
		return err
	}
	defer unlock()
	ctl, err := s.control()
	if err != nil {
		return err
	}
	ctl.Build = bpf.Build()
	if err := s.maps[bpf.DatapathMapSkipstackCtl].Put(uint32(0), ctl); err != nil {
		return fmt.Errorf("record the build: %w", err)
	}
	return nil
}

func updateLink(path string, prog *ebpf.Program) error {
	l, err := link.LoadPinnedLink(path, nil)
	if errors.Is(err, os.ErrNotExist) {
		return nil // the pod went meanwhile
	}
	if err != nil {
		return fmt.Errorf("open link %s: %w", path, err)
	}
	defer l.Close()
	if err := l.Update(prog); err != nil && !errors.Is(err, unix.ENOLINK) { // ENOLINK: the cgroup is gone
		return fmt.Errorf("update link %s: %w", path, err)
	}
	return nil
}

// retireOthers keeps sets of other layouts from enrolling new connections.
// They go on serving the ones they have.
func retireOthers(bpffs string) error {
	dirs, err := filepath.Glob(filepath.Join(root(bpffs), "v*"))
	if err != nil {
		return err
	}
	var errs []error
	for _, dir := range dirs {
		retired := uint32(1)
		if dir == layout(bpffs) {
			retired = 0
		}
		m, err := ebpf.LoadPinnedMap(filepath.Join(dir, "maps", bpf.DatapathMapSkipstackSwitch), nil)
		if err != nil {
			if !errors.Is(err, os.ErrNotExist) {
				errs = append(errs, fmt.Errorf("open the switch of %s: %w", dir, err))
			}
			continue
		}
		if err := m.Put(bpf.DatapathSwitchSlotSWITCH_RETIRED, retired); err != nil {
			errs = append(errs, fmt.Errorf("retire %s: %w", dir, err))
		}
		m.Close()
	}
	return errors.Join(errs...)
}
