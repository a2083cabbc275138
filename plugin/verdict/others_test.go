package verdict

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/plugin/datapath"
)

// load loads a program of somebody else's that does nothing.
func load(t *testing.T, kind ebpf.ProgramType, name string, more ...asm.Instruction) *ebpf.Program {
	t.Helper()
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: kind, Name: name, License: "GPL",
		Instructions: append(slices.Clone(more), asm.Mov.Imm(asm.R0, 1), asm.Return()),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}

func openDir(t *testing.T, path string) *os.File {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func attachFor(t *testing.T, target int, attach ebpf.AttachType, p *ebpf.Program, flags uint32) {
	t.Helper()
	err := link.RawAttachProgram(link.RawAttachProgramOptions{Target: target, Attach: attach, Program: p, Flags: flags})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := link.RawDetachProgram(link.RawDetachProgramOptions{Target: target, Attach: attach, Program: p}); err != nil {
			t.Error(err)
		}
	})
}

// found returns what is found of a program.
func found(t *testing.T, root string, p *ebpf.Program) []Other {
	t.Helper()
	info, err := p.Info()
	if err != nil {
		t.Fatal(err)
	}
	id, _ := info.ID()
	all, err := Others(context.Background(), root, "/proc")
	if err != nil {
		t.Fatal(err)
	}
	return slices.DeleteFunc(all, func(o Other) bool { return o.ProgramID != uint32(id) })
}

func child(t *testing.T, root, name string) string {
	t.Helper()
	path := filepath.Join(root, name)
	if err := os.Mkdir(path, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(path) })
	return path
}

// What Others says of a sock_ops program of somebody else's is what happens when
// ours is attached below.
func TestOtherSockOps(t *testing.T) {
	for _, tc := range []struct {
		sharing  Sharing
		flags    uint32
		conflict string
		runs     bool // the other's program runs for sockets of the child too
	}{
		{Multi, unix.BPF_F_ALLOW_MULTI, "", true},
		{Override, unix.BPF_F_ALLOW_OVERRIDE, "would not run for a pod", false},
		{Exclusive, 0, "without BPF_F_ALLOW_MULTI", true},
	} {
		t.Run(string(tc.sharing), func(t *testing.T) {
			root := cgroupRoot(t)
			pod := child(t, root, "pod")
			prog := load(t, ebpf.SockOps, "obi_sockmap_tracker")
			attachFor(t, int(openDir(t, root).Fd()), ebpf.AttachCGroupSockOps, prog, tc.flags)

			got := found(t, root, prog)
			if len(got) != 1 {
				t.Fatalf("found %+v", got)
			}
			o := got[0]
			self := fmt.Sprintf("(%d)", os.Getpid())
			if o.Type != "sock_ops" || o.Cgroup != "/" || o.Sharing != tc.sharing || o.Program != "obi_sockmap_tra" || o.Map != "" ||
				o.Product == "" || len(o.Processes) != 1 || !strings.HasSuffix(o.Processes[0], self) {
				t.Errorf("%+v", o)
			}
			if below := found(t, pod, prog); len(below) != 1 || below[0].Cgroup != "/.." || !below[0].Everywhere || below[0].Blocks != o.Blocks {
				t.Errorf("from below: %+v", below)
			}
			for at, want := range map[string]string{root: "/", pod: "/.."} {
				symlink := filepath.Join(t.TempDir(), "cgroup")
				if err := os.Symlink(at, symlink); err != nil {
					t.Fatal(err)
				}
				if via := found(t, symlink, prog); len(via) != 1 || via[0].Cgroup != want || via[0].Blocks != o.Blocks || !via[0].Everywhere {
					t.Errorf("by a symbolic link to %s: %+v", at, via)
				}
			}
			if !o.Everywhere || o.Blocks != (tc.sharing != Multi) || !strings.Contains(o.Conflict, tc.conflict) || (tc.conflict == "") != (o.Conflict == "") {
				t.Errorf("conflict %q, blocks %v", o.Conflict, o.Blocks)
			}

			// The kernel agrees.
			set, err := datapath.LoadPrivate(probeSet())
			if err != nil {
				t.Fatal(err)
			}
			defer set.Close()
			dir := openDir(t, pod)
			var st unix.Stat_t
			if err := unix.Fstat(int(dir.Fd()), &st); err != nil {
				t.Fatal(err)
			}
			_, err = set.Attach(dir, st.Ino)
			if blocked := errors.Is(err, unix.EPERM); blocked != (tc.sharing == Exclusive) || !blocked && err != nil {
				t.Errorf("attaching to a cgroup below: %v", err)
			}
			if runs := slices.Contains(effective(t, pod), o.ProgramID); runs != tc.runs {
				t.Errorf("the other program runs for the pod: %v", runs)
			}
			// Ours is nobody else's.
			if more := found(t, root, prog); len(more) != 1 {
				t.Errorf("found %+v", more)
			}
			all, err := Others(context.Background(), root, "/proc")
			if err != nil {
				t.Fatal(err)
			}
			for _, o := range all {
				if o.Program == "track" || o.Program == "redirect" || o.Program == "funnel" {
					t.Errorf("takes our own program for another's: %+v", o)
				}
			}
			if tc.sharing == Exclusive {
				if _, err := Run(context.Background(), Env{CgroupRoot: pod}); !errors.Is(err, unix.EPERM) || errors.Is(err, ErrPrivilege) {
					t.Errorf("probing below it: %v", err)
				}
			}
		})
	}
}

// effective are the sock_ops programs that run for sockets of a cgroup.
func effective(t *testing.T, path string) []uint32 {
	t.Helper()
	r, err := link.QueryPrograms(link.QueryOptions{
		Target: int(openDir(t, path).Fd()), Attach: ebpf.AttachCGroupSockOps, QueryFlags: unix.BPF_F_QUERY_EFFECTIVE,
	})
	if err != nil {
		t.Fatal(err)
	}
	var ids []uint32
	for _, p := range r.Programs {
		ids = append(ids, uint32(p.ID))
	}
	return ids
}

// Programs of sockmaps, and a sock_ops program that fills one, attached by a link.
func TestOtherSockMap(t *testing.T) {
	root := cgroupRoot(t)
	m, err := ebpf.NewMap(&ebpf.MapSpec{Name: "somebodys", Type: ebpf.SockHash, KeySize: 8, ValueSize: 4, MaxEntries: 16})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	msg := load(t, ebpf.SkMsg, "somebodys_msg")
	attachFor(t, m.FD(), ebpf.AttachSkMsgVerdict, msg, 0)
	skb := load(t, ebpf.SkSKB, "somebodys_skb")
	attachFor(t, m.FD(), ebpf.AttachSkSKBVerdict, skb, 0)
	ops := load(t, ebpf.SockOps, "somebodys_ops", asm.LoadMapPtr(asm.R1, m.FD()))
	pod := child(t, root, "pod")
	l, err := link.AttachCgroup(link.CgroupOptions{Path: pod, Attach: ebpf.AttachCGroupSockOps, Program: ops})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()

	for kind, p := range map[string]*ebpf.Program{"sk_msg": msg, "sk_skb": skb} {
		got := found(t, root, p)
		if len(got) != 1 || got[0].Type != kind || got[0].Map != "somebodys" || got[0].Cgroup != "" || got[0].Blocks ||
			!strings.Contains(got[0].Conflict, "other_owner") {
			t.Errorf("%s: %+v", kind, got)
		}
	}
	got := found(t, root, ops)
	if len(got) != 1 || got[0].Cgroup != "/pod" || got[0].Everywhere || got[0].Sharing != Multi || !strings.Contains(got[0].Conflict, "a sockmap of its own") {
		t.Errorf("%+v", got)
	}
	symlink := filepath.Join(t.TempDir(), "cgroup")
	if err := os.Symlink(root, symlink); err != nil {
		t.Fatal(err)
	}
	if via := found(t, symlink, ops); len(via) != 1 || via[0].Cgroup != "/pod" {
		t.Errorf("by a symbolic link: %+v", via)
	}
	// Seen from beside, the link alone tells.
	got = found(t, child(t, root, "beside"), ops)
	if len(got) != 1 || !strings.Contains(got[0].Cgroup, "not below the cgroup root") {
		t.Errorf("%+v", got)
	}
}

// A cgroup that goes while it is looked at is passed over.
func TestCgroupRemovedMeanwhile(t *testing.T) {
	path := child(t, cgroupRoot(t), "pod")
	dir := openDir(t, path)
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	o := &others{progs: map[ebpf.ProgramID]*program{}, seen: map[uint64]bool{}}
	if err := o.cgroup(fmt.Sprintf("/proc/self/fd/%d", dir.Fd()), Other{}); err != nil || len(o.seen) != 1 {
		t.Errorf("%v, looked at %d", err, len(o.seen))
	}
}

func TestOthersEnds(t *testing.T) {
	root := cgroupRoot(t)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := Others(ctx, root, "/proc"); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

func TestMeasureMemory(t *testing.T) {
	root := cgroupRoot(t)
	small, err := MeasureMemory(context.Background(), Env{CgroupRoot: root}, 1000, false)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%+v", small)
	large, err := MeasureMemory(context.Background(), Env{CgroupRoot: root}, 2*datapath.DefaultMaxConnections, true)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%+v", large)
	for _, m := range []Memory{small, large} {
		// A psock alone is more than half a KiB at either end.
		if m.Measured != crowdConnections || m.Connection < 1<<10 || m.Connection > 16<<10 || m.Programs < 4<<10 ||
			m.Maximum != m.Maps+m.Programs+m.Connection*uint64(m.MaxConnections) {
			t.Errorf("%+v", m)
		}
	}
	if large.Connection <= small.Connection {
		t.Error("the funnel's record costs nothing")
	}
	if perConnection := (large.Maps - small.Maps) / (uint64(large.MaxConnections - small.MaxConnections)); perConnection < 16 || perConnection > 1024 {
		t.Errorf("maps take %d bytes for each connection", perConnection)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := MeasureMemory(ctx, Env{CgroupRoot: root}, 1000, false); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}
