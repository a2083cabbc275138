package datapath

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/bpf"
)

// Guard is a form of the splice guard: the programs that refuse splice(2) and
// sendfile(2) from enrolled sockets, where they would not see redirected bytes, and
// TCP_ULP on them, because kTLS would take those for decrypted.
type Guard string

const (
	NoGuard      Guard = ""
	GuardLSM     Guard = "lsm"      // BPF LSM: CONFIG_BPF_LSM, and bpf among the kernel's LSMs
	GuardFmodRet Guard = "fmod_ret" // on the functions that call the LSMs
)

// Guards lists the forms, the one to be preferred first. A form that attaches need
// not work: the BPF LSM attaches where the kernel never calls it.
func Guards() []Guard { return []Guard{GuardLSM, GuardFmodRet} }

// ErrGuard is wrapped by errors of [Set.SetNode] and [Set.Attach] that say that
// the splice guard is not attached, and nothing else: what was asked for is done,
// with [RiskSplice] present.
var ErrGuard = errors.New("the splice guard cannot be attached")

// guardWait is how long a process waits for others that attach pods: they need
// no more than milliseconds.
const guardWait = 5 * time.Second

// The guard's programs, by what they are called at.
const (
	guardReads = iota // read(2) and its like: splices are refused
	guardULP          // setsockopt(2)
	guardHooks
)

// guardNames are the programs' names in the object file.
var guardNames = map[Guard][guardHooks]string{
	GuardLSM:     {bpf.GuardProgGuardLsm, bpf.GuardProgGuardLsmUlp},
	GuardFmodRet: {bpf.GuardProgGuardFmodRet, bpf.GuardProgGuardFmodRetUlp},
}

// guardPrograms are a form of the guard and its count of refused calls.
type guardPrograms struct {
	progs   [guardHooks]*ebpf.Program
	refused *ebpf.Map
}

func (p *guardPrograms) Close() {
	if p == nil {
		return
	}
	for _, prog := range p.progs {
		prog.Close()
	}
	p.refused.Close()
}

// loadGuard loads the guard's programs for the sockets of one sockhash. They go on
// counting in refused, unless that is nil.
func loadGuard(form Guard, socks, refused *ebpf.Map) (*guardPrograms, error) {
	names, ok := guardNames[form]
	if !ok {
		return nil, fmt.Errorf("%w: no form %q", ErrGuard, form)
	}
	spec, err := bpf.LoadGuard()
	if err != nil {
		return nil, fmt.Errorf("read the embedded guard: %w", err)
	}
	maps.DeleteFunc(spec.Programs, func(name string, _ *ebpf.ProgramSpec) bool { return !slices.Contains(names[:], name) })
	spec.Maps[bpf.GuardMapSocks].MaxEntries = socks.MaxEntries()
	replacements := map[string]*ebpf.Map{bpf.GuardMapSocks: socks}
	if refused != nil {
		replacements[bpf.GuardMapSkipstackGuard] = refused
	}
	coll, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: replacements})
	if err != nil {
		return nil, fmt.Errorf("%w: load its %s programs: %w", ErrGuard, form, err)
	}
	defer coll.Close()
	p := &guardPrograms{refused: coll.DetachMap(bpf.GuardMapSkipstackGuard)}
	for hook, name := range names {
		p.progs[hook] = coll.DetachProgram(name)
	}
	return p, nil
}

// A program whose link was unpinned a moment ago is still attached: bpffs lets go
// of a link after a grace period, and until then the kernel says EBUSY.
const (
	lettingGo     = 500 * time.Millisecond
	lettingGoPoll = 5 * time.Millisecond
)

func attachGuard(form Guard, prog *ebpf.Program) (l link.Link, err error) {
	for end := time.Now().Add(lettingGo); ; time.Sleep(lettingGoPoll) {
		if form == GuardLSM {
			l, err = link.AttachLSM(link.LSMOptions{Program: prog})
		} else {
			l, err = link.AttachTracing(link.TracingOptions{Program: prog, AttachType: ebpf.AttachModifyReturn})
		}
		if !errors.Is(err, unix.EBUSY) || time.Now().After(end) {
			break
		}
	}
	if err != nil {
		return nil, fmt.Errorf("%w: attach its %s program: %w", ErrGuard, form, err)
	}
	return l, nil
}

// setPrivateGuard puts the wanted form, or none, in the place of what a private
// set has. Nobody else attaches pods to such a set.
func (s *Set) setPrivateGuard(form Guard) error {
	if form == s.guard {
		return nil
	}
	var fresh []link.Link
	if form != NoGuard {
		guard, err := loadGuard(form, s.maps[bpf.DatapathMapSocks], s.refused)
		if err != nil {
			return err
		}
		defer guard.Close() // the links hold the programs
		for _, prog := range guard.progs {
			l, err := attachGuard(form, prog)
			if err != nil {
				return errors.Join(err, closeAll(fresh))
			}
			fresh = append(fresh, l)
		}
		if s.refused == nil {
			s.refused, guard.refused = guard.refused, nil
		}
	}
	if err := closeAll(s.guardLinks); err != nil {
		return fmt.Errorf("detach the splice guard: %w", err)
	}
	s.guard, s.guardLinks = form, fresh
	return nil
}

func closeAll(links []link.Link) error {
	var errs []error
	for _, l := range links {
		errs = append(errs, l.Close())
	}
	return errors.Join(errs...)
}

// guardPins is the splice guard of a published set:
//
//	guard/lsm or guard/fmod_ret   the program for reads, in the form that is wanted; none: no guard
//	guard/link                    exists while it is attached
//	guard/...-ulp                 the same of the program for setsockopt(2)
//	guard/refused                 the numbers of calls refused; stays when the form goes
//
// While a form is wanted, the bit RiskSplice of control.risks says that the guard is
// not attached, so no socket can be enrolled unguarded. The layout directory's lock
// is held by whoever changes any of these, or attaches a pod.
type guardPins struct {
	dir                  string // of the layout
	ctl, switches, socks *ebpf.Map
}

func (g guardPins) path(name string) string { return filepath.Join(g.dir, "guard", name) }

// paths are those of something that each program has.
func (g guardPins) paths(name string) [guardHooks]string {
	return [guardHooks]string{guardReads: g.path(name), guardULP: g.path(name + "-ulp")}
}

func (g guardPins) lock() (unlock func(), err error) {
	ctx, cancel := context.WithTimeout(context.Background(), guardWait)
	defer cancel()
	f, err := flock(ctx, g.dir)
	if err != nil {
		return nil, err
	}
	return func() { f.Close() }, nil
}

// wanted is the form whose programs are pinned.
func (g guardPins) wanted() Guard {
	for _, form := range Guards() {
		if exist(g.paths(string(form))) {
			return form
		}
	}
	return NoGuard
}

func exist(paths [guardHooks]string) bool {
	for _, path := range paths {
		if _, err := os.Stat(path); err != nil {
			return false
		}
	}
	return true
}

// want pins the programs of a form, which may be nil if they are pinned already, and
// unpins those of the others.
func (g guardPins) want(form Guard, guard *guardPrograms) error {
	if err := os.Mkdir(filepath.Join(g.dir, "guard"), 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return fmt.Errorf("pin the splice guard: %w", err)
	}
	if guard != nil {
		if err := pinOver(g.path("refused"), guard.refused.Pin); err != nil {
			return fmt.Errorf("pin the splice guard's counter: %w", err)
		}
		for hook, path := range g.paths(string(form)) {
			if err := pinOver(path, guard.progs[hook].Pin); err != nil {
				return fmt.Errorf("pin the splice guard: %w", err)
			}
		}
	}
	for _, other := range Guards() {
		if other == form {
			continue
		}
		if err := unpin(g.paths(string(other))); err != nil {
			return fmt.Errorf("unpin the splice guard: %w", err)
		}
	}
	return nil
}

func unpin(paths [guardHooks]string) error {
	var errs []error
	for _, path := range paths {
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// pinOver pins something in the place of whatever is there.
func pinOver(path string, pin func(string) error) error {
	// Left by a process that was killed. The lock is held.
	fresh := path + "-new"
	if err := os.Remove(fresh); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := pin(fresh); err != nil {
		return err
	}
	return os.Rename(fresh, path)
}

// load loads a form, which goes on counting where the one before stopped.
func (g guardPins) load(form Guard) (*guardPrograms, error) {
	refused, err := g.refused()
	if err != nil {
		return nil, err
	}
	defer refused.Close()
	return loadGuard(form, g.socks, refused)
}

// refused opens the count of refused calls. It is nil where no guard of this kind was
// ever wanted.
func (g guardPins) refused() (*ebpf.Map, error) {
	m, err := ebpf.LoadPinnedMap(g.path("refused"), nil)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("open the splice guard's counter: %w", err)
	}
	if m.MaxEntries() != uint32(bpf.GuardRefusalREFUSALS) { // of a build that counted other things
		return nil, m.Close()
	}
	return m, nil
}

// guardRefusals is how many calls the guard has refused since the set was loaded.
func (s *Set) guardRefusals() (n [bpf.GuardRefusalREFUSALS]uint64, err error) {
	m := s.refused
	if s.dir != "" {
		if m, err = s.guardPins().refused(); err != nil {
			return n, err
		}
		defer m.Close()
	}
	if m == nil {
		return n, nil
	}
	for what := range n {
		if err := m.Lookup(uint32(what), &n[what]); err != nil {
			return n, fmt.Errorf("read the splice guard's counter: %w", err)
		}
	}
	return n, nil
}

// attached returns the programs that the pinned links run.
func (g guardPins) attached() (ids guardIDs, err error) {
	for hook, path := range g.paths("link") {
		if ids[hook], err = linkProgram(path); err != nil {
			return ids, err
		}
	}
	return ids, nil
}

// guardIDs are the programs that are attached, 0 where there is none.
type guardIDs [guardHooks]ebpf.ProgramID

// all tells if the whole guard is attached.
func (ids guardIDs) all() bool { return !slices.Contains(ids[:], 0) }

// any tells if some of it is.
func (ids guardIDs) any() bool { return ids != guardIDs{} }

func linkProgram(path string) (ebpf.ProgramID, error) {
	l, err := link.LoadPinnedLink(path, nil)
	if errors.Is(err, os.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("open the splice guard's link: %w", err)
	}
	defer l.Close()
	info, err := l.Info()
	if err != nil {
		return 0, fmt.Errorf("read the splice guard's link: %w", err)
	}
	return info.Program, nil
}

// hasPods tells if a pod is attached, or one that is gone has sockets.
func (g guardPins) hasPods() bool {
	for _, sub := range []string{"links", "parked"} {
		f, err := os.Open(filepath.Join(g.dir, sub))
		if err != nil {
			continue
		}
		_, err = f.Readdirnames(1)
		f.Close()
		if err != io.EOF {
			return true
		}
	}
	return false
}

// hasMembers tells if a sockhash holds a socket. What cannot be read may.
func hasMembers(socks *ebpf.Map) bool {
	var first bpf.DatapathSockKey
	return socks == nil || !errors.Is(socks.NextKey(nil, &first), ebpf.ErrKeyNotExist)
}

// settle attaches the guard if it is wanted and a socket is or may be enrolled,
// replaces it if it is another program's, and detaches it if no socket is enrolled
// and none can be, or will be guarded. arriving tells that a pod is about to be
// attached. The lock is held.
func (g guardPins) settle(arriving bool) error {
	running, err := g.attached()
	if err != nil {
		return err
	}
	form, members := g.wanted(), hasMembers(g.socks)
	inUse := members || arriving || g.hasPods()
	switch {
	case form != NoGuard && inUse:
		guardErr := g.attach(form, running)
		// One that runs, but is not the wanted one, guards as well.
		if err := g.setRisk(guardErr != nil && !running.all()); err != nil {
			return err
		}
		return guardErr
	case running.any() && !members:
		if form != NoGuard {
			if err := g.setRisk(true); err != nil {
				return err
			}
		}
		if err := unpin(g.paths("link")); err != nil {
			return fmt.Errorf("detach the splice guard: %w", err)
		}
	case form != NoGuard && !running.all():
		return g.setRisk(true)
	}
	return nil
}

func (g guardPins) attach(form Guard, running guardIDs) error {
	links := g.paths("link")
	for hook, path := range g.paths(string(form)) {
		if err := attachPinned(form, path, links[hook], running[hook]); err != nil {
			return err
		}
	}
	return nil
}

// attachPinned attaches a pinned program, and pins its link, unless it is what runs.
func attachPinned(form Guard, path, linkPath string, running ebpf.ProgramID) error {
	prog, err := ebpf.LoadPinnedProgram(path, nil)
	if err != nil {
		return fmt.Errorf("%w: open its program: %w", ErrGuard, err)
	}
	defer prog.Close()
	info, err := prog.Info()
	if err != nil {
		return fmt.Errorf("%w: read its program: %w", ErrGuard, err)
	}
	if id, ok := info.ID(); ok && id == running {
		return nil
	}
	l, err := attachGuard(form, prog)
	if err != nil {
		return err
	}
	defer l.Close()
	if err := pinOver(linkPath, l.Pin); err != nil {
		return fmt.Errorf("%w: pin its link: %w", ErrGuard, err)
	}
	return nil
}

// setRisk brings the bit RiskSplice up to date.
func (g guardPins) setRisk(present bool) error {
	if g.ctl == nil {
		return nil // damaged: nothing is enrolled by it any more
	}
	var ctl bpf.DatapathControl
	if err := g.ctl.Lookup(uint32(0), &ctl); err != nil {
		return fmt.Errorf("read the node's settings: %w", err)
	}
	risks := ctl.Risks &^ uint32(RiskSplice)
	if present {
		risks |= uint32(RiskSplice)
	}
	if risks == ctl.Risks {
		return nil
	}
	ctl.Risks = risks
	if err := g.ctl.Put(uint32(0), ctl); err != nil {
		return fmt.Errorf("write the node's settings: %w", err)
	}
	if g.switches == nil {
		return nil
	}
	return nextGeneration(g.switches)
}

// risks is what pods meet: the guard comes with the first one.
func (g guardPins) risks(r Risk) (Risk, Guard) {
	form := g.wanted()
	if form == NoGuard {
		return r, form
	}
	if exist(g.paths("link")) || !g.hasPods() {
		return r &^ RiskSplice, form
	}
	return r | RiskSplice, form
}

func (s *Set) guardPins() guardPins {
	return guardPins{
		dir: s.dir, ctl: s.maps[bpf.DatapathMapSkipstackCtl],
		switches: s.maps[bpf.DatapathMapSkipstackSwitch], socks: s.maps[bpf.DatapathMapSocks],
	}
}

// renewGuard puts this build's programs in the place of another's. Where that fails
// the other goes on: what becomes of it is for this build's verdict to say.
func (s *Set) renewGuard() {
	g := s.guardPins()
	form := g.wanted()
	if form == NoGuard {
		return
	}
	guard, err := g.load(form)
	if err != nil {
		return
	}
	defer guard.Close()
	if unlock, err := g.lock(); err == nil {
		defer unlock()
		if g.want(form, guard) == nil {
			_ = g.settle(false)
		}
	}
}

// orphanPrefix begins the names of guards' links, in the directory of all layouts,
// whose set was replaced while it had sockets.
const orphanPrefix = "guard-"

// orphanGuard keeps the guard of a set that is about to be discarded, for the
// sockets that it may have.
func orphanGuard(bpffs, dir string) error {
	for _, pin := range (guardPins{dir: dir}).paths("link") {
		id, err := linkProgram(pin)
		if err != nil {
			return err
		}
		if id == 0 {
			continue
		}
		if err := os.Rename(pin, filepath.Join(root(bpffs), fmt.Sprintf("%s%d", orphanPrefix, id))); err != nil {
			return err
		}
	}
	return nil
}

// sweepOrphans detaches guards whose last socket is gone, and returns how many sockets
// the others guard. A guard's programs lead to its sockhash.
func sweepOrphans(bpffs string) (left uint64, err error) {
	entries, err := os.ReadDir(root(bpffs))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return 0, fmt.Errorf("look for splice guards: %w", err)
	}
	var errs []error
	sockhashes := map[ebpf.MapID]uint64{} // each has several programs
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), orphanPrefix) {
			continue
		}
		path := filepath.Join(root(bpffs), e.Name())
		if socks, n := guarded(path); n > 0 {
			sockhashes[socks] = n
			continue
		}
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, fmt.Errorf("detach a splice guard: %w", err))
		}
	}
	for _, n := range sockhashes {
		left += n
	}
	return left, errors.Join(errs...)
}

// guarded is how many sockets the guard of a pinned link guards, and their sockhash; at
// least 1, of sockhash 0, where that cannot be told.
func guarded(path string) (ebpf.MapID, uint64) {
	const unknown = 1
	id, err := linkProgram(path)
	if err != nil {
		return 0, unknown
	}
	prog, err := ebpf.NewProgramFromID(id)
	if err != nil {
		return 0, unknown
	}
	defer prog.Close()
	info, err := prog.Info()
	if err != nil {
		return 0, unknown
	}
	ids, _ := info.MapIDs()
	for _, id := range ids {
		m, err := ebpf.NewMapFromID(id)
		if err != nil {
			return 0, unknown
		}
		n := uint64(0)
		if m.Type() == ebpf.SockHash {
			n = members(m)
		}
		m.Close()
		if n > 0 {
			return id, n
		}
	}
	return 0, 0
}

// members counts the sockets of a sockhash.
func members(socks *ebpf.Map) uint64 {
	n, err := countKeys(socks)
	if err != nil && n == 0 {
		n = 1
	}
	return uint64(n)
}
