package cni_test

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/test/must"
	"github.com/skipstack/skipstack/test/node"
)

// kernels are imitated by answering a program's calls.
var kernels = map[string]answer{
	"no CGROUP_BPF": withoutCgroupBPF,
	// A seccomp profile, or a kernel that a lockdown keeps from BPF.
	"bpf(2) refused": func(c trap) unix.Errno { return only(unix.SYS_BPF, c, unix.EPERM) },
	// A sandbox that does not have it.
	"no bpf(2)": func(c trap) unix.Errno { return only(unix.SYS_BPF, c, unix.ENOSYS) },
	"no bpffs":  withoutBPFFSType,
	"no BPF_SYSCALL": func(c trap) unix.Errno {
		return cmp.Or(only(unix.SYS_BPF, c, unix.ENOSYS), withoutBPFFSType(c))
	},
}

// covers changes a process's own mounts. A machine whose hierarchies are hybrid has
// those of version 1 left; another cannot mount any in a cgroup namespace.
var covers = map[string]func() error{
	"no BTF": withoutBTF, "cgroup v1 only": unmountCgroup2, "no bpffs": withoutBPFFS, "no BPF_SYSCALL": withoutBPFFS,
}

// withoutBPFFSType is a kernel whose get_fs_type() finds no such file system.
func withoutBPFFSType(c trap) unix.Errno {
	if c.nr == unix.SYS_MOUNT && bytes.Equal(c.memory(2, 4), []byte("bpf\x00")) {
		return unix.ENODEV
	}
	return 0
}

func only(nr int32, c trap, errno unix.Errno) unix.Errno {
	if c.nr == nr {
		return errno
	}
	return 0
}

// withoutCgroupBPF is a kernel without CONFIG_CGROUP_BPF. Sources are of Linux 6.12.
func withoutCgroupBPF(c trap) unix.Errno {
	if c.nr != unix.SYS_BPF {
		return 0
	}
	offset, refused := 0, []uint32{}
	switch c.args[0] {
	case unix.BPF_MAP_CREATE: // map_create: bpf_map_types has no entry; include/linux/bpf_types.h
		refused = []uint32{unix.BPF_MAP_TYPE_CGROUP_STORAGE, unix.BPF_MAP_TYPE_PERCPU_CGROUP_STORAGE}
	case unix.BPF_PROG_LOAD: // find_prog_type: the same; sock_ops is not among them
		for _, t := range []ebpf.ProgramType{ebpf.CGroupSKB, ebpf.CGroupSock, ebpf.CGroupSockAddr, ebpf.CGroupDevice, ebpf.CGroupSysctl, ebpf.CGroupSockopt} {
			refused = append(refused, uint32(t))
		}
	case unix.BPF_PROG_ATTACH, unix.BPF_PROG_DETACH: // cgroup_bpf_prog_attach is a stub; include/linux/bpf-cgroup.h
		offset, refused = 8, []uint32{uint32(ebpf.AttachCGroupSockOps)}
	case unix.BPF_PROG_QUERY: // so is cgroup_bpf_prog_query
		offset, refused = 4, []uint32{uint32(ebpf.AttachCGroupSockOps)}
	case unix.BPF_LINK_CREATE: // so is cgroup_bpf_link_attach
		offset, refused = 8, []uint32{uint32(ebpf.AttachCGroupSockOps)}
	}
	if slices.Contains(refused, c.attr(offset)) {
		return unix.EINVAL
	}
	return 0
}

// withoutBTF hides what the kernel and its packages have of type information.
func withoutBTF() error {
	var failed []error
	for _, dir := range []string{"/sys/kernel/btf", "/boot", "/lib/modules", "/usr/lib/modules", "/usr/lib/debug"} {
		if _, err := os.Stat(dir); err == nil {
			failed = append(failed, unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64k"))
		}
	}
	return errors.Join(failed...)
}

// withoutBPFFS hides the BPF file systems, and that the kernel has such.
func withoutBPFFS() error {
	for {
		var st unix.Statfs_t
		if err := unix.Statfs("/sys/fs/bpf", &st); err != nil {
			return err
		}
		if uint32(st.Type) != unix.BPF_FS_MAGIC {
			break
		}
		if err := unix.Unmount("/sys/fs/bpf", unix.MNT_DETACH); err != nil {
			return err
		}
	}
	all, err := os.ReadFile("/proc/filesystems")
	if err != nil {
		return err
	}
	const list = "/run/filesystems" // of the private machine
	if err := os.WriteFile(list, bytes.ReplaceAll(all, []byte("nodev\tbpf\n"), nil), 0o444); err != nil {
		return err
	}
	return errors.Join(unix.Mount(list, "/proc/filesystems", "", unix.MS_BIND, ""), os.Remove(list))
}

// On nodes that cannot have acceleration pods start, plain, and one line says what is
// missing. Doctor says it too.
func TestNodesThatLackSomething(t *testing.T) {
	node.Need(t)
	for name, tc := range map[string]struct {
		says   string
		doctor string
		exit   int // doctor's
	}{
		"no BTF":         {"CONFIG_DEBUG_INFO_BTF", "CONFIG_DEBUG_INFO_BTF", 3},
		"no CGROUP_BPF":  {"CONFIG_CGROUP_BPF", "CONFIG_CGROUP_BPF", 3},
		"no BPF_SYSCALL": {"CONFIG_BPF_SYSCALL", "CONFIG_BPF_SYSCALL", 3},
		"no bpf(2)":      {"CONFIG_BPF_SYSCALL", "CONFIG_BPF_SYSCALL", 3},
		"no bpffs":       {"CONFIG_BPF_SYSCALL", "CONFIG_BPF_SYSCALL", 3},
		"cgroup v1 only": {"no cgroup v2 hierarchy", "no cgroup v2 hierarchy", 3},
		// It may be the caller that may not, so nothing is claimed of the kernel.
		"bpf(2) refused": {"no seccomp filter that refuses bpf(2)", "a seccomp filter is in force, which may refuse bpf(2)", 1},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t, options{Options: node.Options{DefaultPaths: true}, unprobed: true})
			list := s.network(node.Network{Skipstack: map[string]any{}})
			cni, rec := s.libcni()
			rec.handicap = name
			// start makes a pod by libcni, as a runtime does, and returns what was logged.
			start := func(podName string) (p *pod, log []string) {
				own := must.Get(s.NewPod(podName, node.PodOptions{}))(t)
				s.onTime(own.ID, func() error {
					rec.calls = nil
					_, err := cni.AddNetworkList(t.Context(), list, own.RuntimeConf(node.IfName))
					return err
				}, func() { must.Do(t, cni.DelNetworkList(t.Context(), list, own.RuntimeConf(node.IfName))) })
				if len(rec.calls) != 2 || !sameJSON(t, rec.calls[0].stdout, rec.calls[1].stdout) {
					t.Fatalf("the bridge's result is not the chain's: %+v", rec.calls)
				}
				if r := s.record(own.ID); r.Status != "skipped" || !strings.Contains(r.Reason, tc.says) {
					t.Errorf("record %s (%s), want %q", r.Status, r.Reason, tc.says)
				}
				return s.peopledIn(own, own.ContainerCgroup), logLines(rec.calls[1].stderr)
			}
			a, log := start("first")
			if len(log) != 1 || !strings.Contains(log[0], tc.says) {
				t.Errorf("%d lines, want one with %q: %q", len(log), tc.says, log)
			}
			// The same reason is not said for each pod.
			b, log := start("second")
			if len(log) > 1 {
				t.Errorf("%d lines: %q", len(log), log)
			}
			s.wantPlain(name, route{client: a.host, server: b.host, listen: s.addrOf(b)})
			for _, p := range []*pod{a, b} {
				must.Do(t, cni.CheckNetworkList(t.Context(), list, p.RuntimeConf(node.IfName)))
			}
			must.Do(t, cni.GetStatusNetworkList(t.Context(), list))
			for _, p := range []*pod{a, b} {
				rec.calls = nil
				must.Do(t, cni.DelNetworkList(t.Context(), list, p.RuntimeConf(node.IfName)))
				for _, c := range rec.calls {
					if c.stderr != "" {
						t.Errorf("DEL by %s said %s", c.plugin, c.stderr)
					}
				}
			}
			s.waitProber()
			if left := must.Get(filepath.Glob(filepath.Join(s.BPFFS, "skipstack", "*")))(t); len(left) > 0 {
				t.Errorf("pinned: %v", left)
			}

			// Where the operator wants pods to fail, they do, and the node is not ready.
			p := s.light()
			strict := p.call(`"onError":"fail"`)
			strict.handicap, strict.cgroupRoot = name, "-"
			s.want(11, s.run(strict.add()))
			s.want(0, s.run(strict.del()))
			s.want(50, s.run(call{verb: "STATUS", members: strict.members, handicap: name, cgroupRoot: "-"}))

			doctor := func(args ...string) outcome {
				args = append([]string{"doctor", "--no-cache", "--cni-conf-dir", s.ConfDir}, args...)
				return s.exec(s.handicapped(t.Context(), name, []string{"PATH=" + os.Getenv("PATH")}, args...))
			}
			got := doctor()
			if text := strings.Join(strings.Fields(got.stdout), " "); got.code != tc.exit || got.stderr != "" || !strings.Contains(text, tc.doctor) {
				t.Errorf("doctor: exit %d, want %d, and %q in:\n%s%s", got.code, tc.exit, tc.doctor, got.stdout, got.stderr)
			}
			got = doctor("--json")
			e := parse(t, got)
			if e.Verdict != "unsupported" || e.Inconclusive != (tc.exit == 1) || e.Outlook.Pods.Outcome == "accelerated" || e.Outlook.Asking.Outcome == "accelerated" {
				t.Errorf("exit %d, %+v", got.code, e)
			}
		})
	}
}

func sameJSON(t *testing.T, a, b []byte) bool {
	t.Helper()
	var x, y any
	must.Do(t, json.Unmarshal(a, &x))
	must.Do(t, json.Unmarshal(b, &y))
	return reflect.DeepEqual(x, y)
}
