package datapath

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/bpf"
)

func init() { scenarios["splicer"] = splicer }

// splicer has a connection whose server has bytes to read, tries to splice them at
// each line of its input, and prints what came of it. It ends with its input.
func splicer() error {
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	l, err := lc.Listen(context.Background(), "tcp4", "127.0.0.1:0")
	if err != nil {
		return err
	}
	defer l.Close()
	client, err := net.Dial("tcp4", l.Addr().String())
	if err != nil {
		return err
	}
	defer client.Close()
	server, err := l.Accept()
	if err != nil {
		return err
	}
	defer server.Close()
	if _, err := client.Write(make([]byte, 10)); err != nil {
		return err
	}
	var pipe [2]int
	if err := unix.Pipe(pipe[:]); err != nil {
		return err
	}
	raw, err := server.(*net.TCPConn).SyscallConn()
	if err != nil {
		return err
	}
	fmt.Println("ready")
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		err = raw.Control(func(fd uintptr) {
			if in.Text() == "ulp" {
				// One that no kernel has.
				fmt.Println(unix.SetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_ULP, "skipstack"))
				return
			}
			_, err := unix.Splice(int(fd), nil, pipe[1], nil, 10, unix.SPLICE_F_NONBLOCK)
			fmt.Println(err)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// spliced is a process of that scenario.
type spliced struct {
	t   *testing.T
	in  io.WriteCloser
	out *bufio.Scanner
	end func() error
}

func startSplicer(t *testing.T, cgroup *os.File) *spliced {
	t.Helper()
	cmd := start(t, "splicer", cgroup)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	p := &spliced{t, in, bufio.NewScanner(out), cmd.Wait}
	if got := p.line(); got != "ready" {
		t.Fatalf("the process said %q", got)
	}
	return p
}

func (p *spliced) line() string {
	p.t.Helper()
	if !p.out.Scan() {
		p.t.Fatal("the process said nothing")
	}
	return p.out.Text()
}

// splice lets it splice and returns the error.
func (p *spliced) splice() string { return p.tell("splice") }

// ulp lets it attach a ULP and returns the error.
func (p *spliced) ulp() string { return p.tell("ulp") }

func (p *spliced) tell(what string) string {
	p.t.Helper()
	fmt.Fprintln(p.in, what)
	return p.line()
}

// wantRefused checks that the guard refuses.
func (p *spliced) wantRefused(when string) {
	p.t.Helper()
	if got := [guardHooks]string{p.splice(), p.ulp()}; got != [guardHooks]string{unix.EINVAL.Error(), unix.EINVAL.Error()} {
		p.t.Errorf("%s: splice and ULP: %q, want %v", when, got, unix.EINVAL)
	}
}

func (p *spliced) stop() {
	p.t.Helper()
	p.in.Close()
	if err := p.end(); err != nil {
		p.t.Error(err)
	}
}

// guardSite is a published set with the guard wanted and one pod's cgroup.
type guardSite struct {
	*Set
	t      *testing.T
	bpffs  string
	cgroup *os.File
	id     uint64
	form   Guard
}

// eachGuard runs a test with each form that the kernel permits.
func eachGuard(t *testing.T, f func(s *guardSite)) {
	for _, form := range Guards() {
		t.Run(string(form), func(t *testing.T) {
			s := &guardSite{t: t, bpffs: newBPFFS(t), form: form}
			s.load()
			err := s.SetNode(s.node())
			if errors.Is(err, ErrGuard) && errors.Is(err, unix.EPERM) {
				if n, err := s.Node(); err != nil || n.Guard != NoGuard || n.Risks != RiskSplice || !n.Open {
					t.Errorf("without a guard: %+v, %v", n, err)
				}
				t.Skipf("needs a kernel that permits it: %v", err)
			}
			s.check(err)
			s.cgroup, s.id = newCgroup(t, "guard-"+string(form))
			f(s)
		})
	}
}

func (s *guardSite) load() {
	s.t.Helper()
	set, err := Load(s.t.Context(), s.bpffs, LoadOptions{MaxConnections: 500, ClaimWindow: time.Minute})
	s.check(err)
	s.t.Cleanup(func() { set.Close() })
	s.Set = set
}

func (s *guardSite) node() NodeSettings {
	return NodeSettings{Open: true, MPTCPListeners: true, Guard: s.form}
}

func (s *guardSite) check(err error) {
	s.t.Helper()
	if err != nil {
		s.t.Fatal(err)
	}
}

func (s *guardSite) attachPod() {
	s.t.Helper()
	_, err := s.Attach(s.cgroup, s.id)
	if errors.Is(err, ErrGuard) && errors.Is(err, unix.EBUSY) {
		// An emulated kernel may take long to let go of the guard that was there.
		s.swept("the guard is attached", s.linkPinned)
		err = nil
	}
	s.check(err)
	s.check(s.SetPod(s.id, allPods))
}

// wantGuard checks whether the guard is attached, and that the gate knows: a pod
// that accepts no risk is accelerated only while it is.
func (s *guardSite) wantGuard(when string, attached bool) {
	s.t.Helper()
	running, err := s.guardPins().attached()
	s.check(err)
	ctl, err := s.control()
	s.check(err)
	if risk := ctl.Risks&uint32(RiskSplice) != 0; running.all() != attached || running.any() != attached || risk == attached {
		s.t.Errorf("%s: attached %v, the gate knows of the risk: %v; want %v, %v", when, running, risk, attached, !attached)
	}
}

// wantRefused checks how many calls have been refused.
func (s *guardSite) wantRefused(when string, n uint64) {
	s.t.Helper()
	c, err := s.Counters()
	if got := [...]uint64{c.Events[EventSpliceRefused], c.Events[EventULPRefused]}; err != nil || got != [...]uint64{n, n} {
		s.t.Errorf("%s: %d calls refused, %v; want %d each", when, got, err, n)
	}
}

// eventually waits until the condition holds.
func (s *guardSite) eventually(what string, holds func() bool) {
	s.t.Helper()
	for end := time.Now().Add(time.Minute); !holds(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			s.t.Fatalf("waited in vain until %s: %v", what, tree(s.t, s.bpffs))
		}
	}
}

// swept sweeps until the condition holds: a socket is out of the sockhash a moment
// after its process has ended.
func (s *guardSite) swept(what string, holds func() bool) {
	s.t.Helper()
	s.eventually(what, func() bool {
		s.check(Sweep(s.bpffs, 0))
		return holds()
	})
}

// linkPinned tells if any of the guard's links is pinned.
func (s *guardSite) linkPinned() bool {
	for _, path := range s.guardPins().paths("link") {
		if _, err := os.Stat(path); err == nil {
			return true
		}
	}
	return false
}

// The guard comes with the first pod and goes when the last pod and the last socket
// have gone, whichever is later.
func TestGuardComesAndGoes(t *testing.T) {
	eachGuard(t, func(s *guardSite) {
		if n, err := s.Node(); err != nil || n != s.node() {
			s.t.Errorf("before the first pod: %+v, %v", n, err)
		}
		s.wantGuard("before the first pod", false)
		s.wantRefused("before the first pod", 0)
		s.attachPod()
		s.wantGuard("with a pod", true)
		p := startSplicer(s.t, s.cgroup)
		p.wantRefused("with a pod")
		s.wantRefused("with a pod", 1)
		s.check(DropPod(s.bpffs, s.id))
		s.check(Sweep(s.bpffs, 0))
		s.wantGuard("the pod is gone, its socket lives", true)
		p.wantRefused("the pod is gone")
		p.stop()
		s.swept("the guard is gone", func() bool { return !s.linkPinned() })
		s.wantGuard("all is gone", false)
		if n, err := s.Node(); err != nil || n != s.node() {
			s.t.Errorf("all is gone: %+v, %v", n, err)
		}
		s.wantRefused("all is gone", 2)

		s.attachPod()
		s.wantGuard("the next pod", true)
		s.check(DropPod(s.bpffs, s.id))
		s.wantGuard("the next pod is gone, which had no socket", false)
	})
}

// Somebody removes a pin of the guard: what was pinned is attached again, and what
// happens meanwhile is known.
func TestGuardIsRepaired(t *testing.T) {
	eachGuard(t, func(s *guardSite) {
		s.attachPod()
		p := startSplicer(s.t, s.cgroup)
		for hook, link := range s.guardPins().paths("link") {
			s.check(os.Remove(link))
			if n, err := s.Node(); err != nil || n.Risks != RiskSplice {
				s.t.Errorf("without %s: %+v, %v", link, n, err)
			}
			// The kernel lets go of what is unpinned a little later.
			s.eventually("it is not refused", func() bool {
				return [guardHooks]string{p.splice(), p.ulp()}[hook] == [guardHooks]unix.Errno{unix.EAGAIN, unix.ENOENT}[hook].Error()
			})
			s.check(Sweep(s.bpffs, 0))
			s.wantGuard("swept", true)
			p.wantRefused("swept")

			s.check(os.Remove(link))
			s.attachPod()
			s.wantGuard("attached again", true)
			p.wantRefused("attached again")
		}
		p.stop()
	})
}

// A guard that is no longer wanted stays for the sockets there are, and pods that
// do not accept the risk enrol no more.
func TestGuardIsNoLongerWanted(t *testing.T) {
	eachGuard(t, func(s *guardSite) {
		s.attachPod()
		p := startSplicer(s.t, s.cgroup)
		off := NodeSettings{Open: true, MPTCPListeners: true, Risks: RiskSplice}
		s.check(s.SetNode(off))
		if n, err := s.Node(); err != nil || n != off {
			s.t.Errorf("%+v, %v, want %+v", n, err, off)
		}
		p.wantRefused("no longer wanted")
		if n, err := s.Enrolled(); err != nil || n != 2 {
			s.t.Errorf("%d sockets are enrolled, %v", n, err)
		}
		other := startSplicer(s.t, s.cgroup)
		if n, err := s.Enrolled(); err != nil || n != 2 {
			s.t.Errorf("%d sockets are enrolled after one more connection, %v", n, err)
		}
		other.stop()
		s.check(s.SetNode(s.node()))
		s.wantGuard("wanted again", true)
		s.check(s.SetNode(off))
		p.stop()
		s.swept("the guard is gone", func() bool { return !s.linkPinned() })
		s.attachPod()
		if s.linkPinned() {
			s.t.Error("a guard that nobody wants is attached")
		}
		s.check(DropPod(s.bpffs, s.id))
	})
}

// Another build's guard takes the place of the one that runs.
func TestGuardIsUpgraded(t *testing.T) {
	eachGuard(t, func(s *guardSite) {
		s.attachPod()
		p := startSplicer(s.t, s.cgroup)
		old, err := s.guardPins().attached()
		s.check(err)
		p.wantRefused("with a pod")
		ctl, err := s.control()
		s.check(err)
		ctl.Build = [16]byte{1}
		s.check(s.maps[bpf.DatapathMapSkipstackCtl].Put(uint32(0), ctl))
		fresh, changed, err := Upgrade(s.t.Context(), s.bpffs, LoadOptions{ClaimWindow: time.Minute})
		s.check(err)
		defer fresh.Close()
		now, err := s.guardPins().attached()
		if err != nil || !changed {
			s.t.Errorf("changed: %v, %v", changed, err)
		}
		for hook, id := range old {
			if now[hook] == 0 || now[hook] == id {
				s.t.Errorf("program %d replaced by %d", id, now[hook])
			}
			s.eventually("the old guard is gone", func() bool {
				prog, err := ebpf.NewProgramFromID(id)
				prog.Close()
				return errors.Is(err, os.ErrNotExist)
			})
		}
		s.wantGuard("upgraded", true)
		p.wantRefused("upgraded")
		s.wantRefused("upgraded", 2)
		want := []string{string(s.form), string(s.form) + "-ulp", "link", "link-ulp", "refused"}
		slices.Sort(want)
		entries, err := os.ReadDir(s.guardPins().path(""))
		s.check(err)
		var got []string
		for _, e := range entries {
			got = append(got, e.Name())
		}
		slices.Sort(got)
		if !slices.Equal(got, want) {
			s.t.Errorf("pins %q, want %q", got, want)
		}
		p.stop()
	})
}

// A set that is damaged is replaced; its sockets keep their guard.
func TestGuardOutlivesItsSet(t *testing.T) {
	eachGuard(t, func(s *guardSite) {
		s.attachPod()
		p := startSplicer(s.t, s.cgroup)
		s.check(os.Remove(filepath.Join(s.dir, "maps", bpf.DatapathMapPods)))
		s.Close()
		s.load()
		p.wantRefused("damaged and loaded anew")
		s.check(Sweep(s.bpffs, 0))
		p.wantRefused("swept")
		left, err := Unload(s.t.Context(), s.bpffs, false)
		if err != nil || left.Sockets == 0 {
			s.t.Errorf("unloaded: %+v, %v", left, err)
		}
		p.wantRefused("unloaded")
		p.stop()
		s.swept("the guard is gone", func() bool {
			return !slices.ContainsFunc(tree(s.t, s.bpffs), func(pin string) bool { return strings.Contains(pin, orphanPrefix) })
		})
	})
}

// Unloading leaves the guard to the sockets that live, and leaves nothing after.
func TestGuardIsUnloaded(t *testing.T) {
	eachGuard(t, func(s *guardSite) {
		s.attachPod()
		p := startSplicer(s.t, s.cgroup)
		left, err := Unload(s.t.Context(), s.bpffs, true)
		if err != nil || left.Sockets != 2 {
			s.t.Errorf("%+v, %v", left, err)
		}
		p.wantRefused("unloaded by force")
		p.stop()
		s.swept("nothing is pinned", func() bool {
			left, err := Unload(s.t.Context(), s.bpffs, false)
			s.check(err)
			return left.Sockets == 0
		})
		if pins := tree(s.t, s.bpffs); len(pins) > 0 {
			s.t.Errorf("left %v", pins)
		}
	})
}
