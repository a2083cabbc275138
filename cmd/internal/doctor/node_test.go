package doctor

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/plugin"
	"github.com/skipstack/skipstack/plugin/verdict"
)

func write(t *testing.T, root, name, content string) {
	t.Helper()
	path := filepath.Join(root, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o755); err != nil {
		t.Fatal(err)
	}
}

// symlink puts a link in place of what was there.
func symlink(t *testing.T, root, name, to string) {
	t.Helper()
	path := filepath.Join(root, name)
	os.Remove(path)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(to, path); err != nil {
		t.Fatal(err)
	}
}

// runs adds a process.
func runs(t *testing.T, root, pid, cmdline, mountNS string) {
	t.Helper()
	write(t, root, "proc/"+pid+"/cmdline", strings.ReplaceAll(cmdline, " ", "\x00"))
	symlink(t, root, "proc/"+pid+"/ns/mnt", mountNS)
}

// healthy is the file system of a node on which nothing is wrong. What a doctor of a
// private root cannot have, a BPF file system, is to be mounted.
func healthy(t *testing.T) string {
	t.Helper()
	root := t.TempDir()
	write(t, root, "proc/self/status", "Name:\tx\nCapEff:\t000001ffffffffff\nSeccomp:\t0\n")
	write(t, root, "proc/self/uid_map", "         0          0 4294967295\n")
	symlink(t, root, "proc/self/ns/mnt", "mnt:[1]")
	runs(t, root, "100", "/usr/bin/containerd --config x", "mnt:[1]")
	runs(t, root, "101", "/usr/bin/containerd-shim-runc-v2 -id x", "mnt:[1]")
	write(t, root, "sys/kernel/security/lockdown", "none [integrity] confidentiality\n")
	write(t, root, "etc/containerd/config.toml", "version = 2\n[plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.runc]\nruntime_type = 'io.containerd.runc.v2'\n")
	for _, dir := range []string{"sys/fs/bpf", "run/skipstack", "opt/cni/bin"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	symlink(t, root, "opt/cni/bin/skipstack", exe)
	return root
}

// Everything that the node may have is told, with why and what to do.
func TestChecks(t *testing.T) {
	noexec := func(flags int64, magic int64) func(string) (unix.Statfs_t, error) {
		return func(string) (unix.Statfs_t, error) {
			var st unix.Statfs_t
			st.Flags = flags
			st.Type = magic
			return st, nil
		}
	}
	for name, tc := range map[string]struct {
		change func(e *examination, root string)
		check  string
		result verdict.Result
		says   string
	}{
		"all rights":  {nil, checkPrivileges, verdict.OK, "root"},
		"no rights":   {func(_ *examination, r string) { write(t, r, "proc/self/status", "CapEff:\t0\n") }, checkPrivileges, verdict.NotOK, "run skipstack as root"},
		"some rights": {func(_ *examination, r string) { write(t, r, "proc/self/status", "CapEff:\t0000000000201000\n") }, checkPrivileges, verdict.NotOK, "lacks CAP_BPF, CAP_PERFMON,"},
		"seccomp": {func(_ *examination, r string) {
			write(t, r, "proc/self/status", "CapEff:\tffffffffffffffff\nSeccomp:\t2\n")
		}, checkPrivileges, verdict.OK, "seccomp"},
		"user namespace": {func(_ *examination, r string) { write(t, r, "proc/self/uid_map", "0 1000 1\n") }, checkPrivileges, verdict.NotOK, "in a user namespace"},
		"odd status":     {func(_ *examination, r string) { write(t, r, "proc/self/status", "x\n") }, checkPrivileges, verdict.CouldNotTell, "no capabilities"},
		"no proc":        {func(_ *examination, r string) { os.Remove(filepath.Join(r, "proc/self/status")) }, checkPrivileges, verdict.CouldNotTell, "no such file"},

		"bpffs to be":      {nil, checkBPFFS, verdict.OK, "the first pod's ADD mounts one"},
		"bpffs":            {func(e *examination, _ string) { e.node.statfs = noexec(0, unix.BPF_FS_MAGIC) }, checkBPFFS, verdict.OK, "mounted at /sys/fs/bpf"},
		"bpffs read-only":  {func(e *examination, _ string) { e.node.statfs = noexec(unix.ST_RDONLY, unix.BPF_FS_MAGIC) }, checkBPFFS, verdict.NotOK, "read-only"},
		"no bpffs":         {func(_ *examination, r string) { os.Remove(filepath.Join(r, "sys/fs/bpf")) }, checkBPFFS, verdict.NotOK, "no directory /sys/fs/bpf"},
		"no bpffs ever":    {func(_ *examination, r string) { write(t, r, "proc/filesystems", "nodev\tproc\n\text4\n") }, checkBPFFS, verdict.NotOK, "CONFIG_BPF_SYSCALL"},
		"some bpffs":       {func(_ *examination, r string) { write(t, r, "proc/filesystems", "nodev\tproc\nnodev\tbpf\n") }, checkBPFFS, verdict.OK, "mounts one"},
		"run directory":    {nil, checkRunDir, verdict.OK, "cannot be written by others"},
		"no run directory": {func(e *examination, r string) { e.Config.RunDir = filepath.Join(r, "run/none") }, checkRunDir, verdict.OK, "first pod's ADD makes it"},
		"something else":   {func(_ *examination, r string) { write(t, r, "sys/fs/bpf/x", "") }, checkBPFFS, verdict.NotOK, "not empty"},

		"integrity":   {nil, checkLockdown, verdict.OK, "integrity"},
		"no lockdown": {func(_ *examination, r string) { os.Remove(filepath.Join(r, "sys/kernel/security/lockdown")) }, checkLockdown, verdict.OK, "has none"},
		"not locked": {func(_ *examination, r string) {
			write(t, r, "sys/kernel/security/lockdown", "[none] integrity confidentiality\n")
		}, checkLockdown, verdict.OK, "none"},
		"confidentiality": {func(_ *examination, r string) {
			write(t, r, "sys/kernel/security/lockdown", "none integrity [confidentiality]\n")
		}, checkLockdown, verdict.NotOK, "all pods are plain"},
		"odd lockdown": {func(_ *examination, r string) { write(t, r, "sys/kernel/security/lockdown", "\x1b[2Jx") }, checkLockdown, verdict.CouldNotTell, "not understood"},

		"no LSM": {nil, checkSecurity, verdict.OK, "neither"},
		"SELinux": {func(_ *examination, r string) {
			write(t, r, "sys/fs/selinux/enforce", "1")
			write(t, r, "dev/kmsg", "6,1,1,-;hello\n")
		}, checkSecurity, verdict.OK, "SELinux enforces; nothing of skipstack's was refused"},
		"SELinux, no log": {func(_ *examination, r string) { write(t, r, "sys/fs/selinux/enforce", "1") }, checkSecurity, verdict.CouldNotTell, "cannot be read"},
		"SELinux refuses": {func(_ *examination, r string) {
			write(t, r, "var/log/audit/audit.log", `type=AVC msg=audit(1.2:3): avc:  denied  { map_create } for  pid=9 comm="skipstack" scontext=system_u:system_r:container_runtime_t:s0 tcontext=x tclass=bpf permissive=0`+"\n")
		}, checkSecurity, verdict.NotOK, "SELinux denied map_create scontext=system_u:system_r:container_runtime_t:s0 tclass=bpf"},
		"AppArmor refuses": {func(_ *examination, r string) {
			write(t, r, "dev/kmsg", `5,9,9,-;audit: type=1400 audit(1.2:3): apparmor="DENIED" operation="capable" profile="crio" pid=9 comm="skipstack" capability=39  capname="bpf"`+"\n")
		}, checkSecurity, verdict.NotOK, "AppArmor denied operation=capable profile=crio capname=bpf"},
		"AppArmor refuses others": {func(_ *examination, r string) {
			write(t, r, "sys/module/apparmor/parameters/enabled", "Y\n")
			write(t, r, "dev/kmsg", `5,9,9,-;audit: apparmor="DENIED" operation="open" profile="man" comm="less"`+"\n")
		}, checkSecurity, verdict.OK, "AppArmor is on; nothing"},
		"AppArmor confines the runtime": {func(_ *examination, r string) {
			write(t, r, "sys/module/apparmor/parameters/enabled", "Y\n")
			write(t, r, "proc/100/attr/current", "snap.microk8s (enforce)\n")
		}, checkSecurity, verdict.CouldNotTell, "containerd runs under the AppArmor profile snap.microk8s (enforce)"},
		"lockdown refused": {func(_ *examination, r string) {
			write(t, r, "dev/kmsg", "4,1,1,-;Lockdown: skipstack: use of bpf to read kernel RAM is restricted; see man kernel_lockdown.7\n")
		}, checkSecurity, verdict.NotOK, "lockdown: use of bpf"},

		"same mounts":  {nil, checkNamespace, verdict.OK, "containerd (process 100)"},
		"other mounts": {func(_ *examination, r string) { symlink(t, r, "proc/100/ns/mnt", "mnt:[2]") }, checkNamespace, verdict.NotOK, "nsenter -t 100 -m"},
		"out of reach": {func(_ *examination, r string) { os.Remove(filepath.Join(r, "proc/100/ns/mnt")) }, checkNamespace, verdict.CouldNotTell, "containerd"},
		"no runtime":   {func(e *examination, _ string) { e.node.processes = nil }, checkNamespace, verdict.OK, "no container runtime"},
		"k3s":          {func(e *examination, _ string) { e.node.processes = []process{{"100", "k3s-server"}} }, checkNamespace, verdict.OK, "k3s-server"},
		"this build":   {nil, checkPlugin, verdict.OK, "/opt/cni/bin/skipstack is this build"},
		"another build": {func(_ *examination, r string) {
			os.Remove(filepath.Join(r, "opt/cni/bin/skipstack"))
			write(t, r, "opt/cni/bin/skipstack", "x")
		}, checkPlugin, verdict.NotOK, "another build"},
		"not installed": {func(_ *examination, r string) { os.Remove(filepath.Join(r, "opt/cni/bin/skipstack")) }, checkPlugin, verdict.NotOK, "is not in /opt/cni/bin"},
		"not executable": {func(_ *examination, r string) {
			os.Remove(filepath.Join(r, "opt/cni/bin/skipstack"))
			write(t, r, "opt/cni/bin/skipstack/x", "")
		}, checkPlugin, verdict.NotOK, "not an executable file"},
		"no directory":         {func(e *examination, _ string) { e.o.BinDir = "/usr/libexec/cni" }, checkPlugin, verdict.NotOK, "no directory /usr/libexec/cni"},
		"noexec":               {func(e *examination, _ string) { e.node.statfs = noexec(unix.ST_NOEXEC, 0) }, checkPlugin, verdict.NotOK, "mounted noexec"},
		"read-only, installed": {func(e *examination, _ string) { e.node.statfs = noexec(unix.ST_RDONLY, 0) }, checkPlugin, verdict.OK, "this build"},
		"read-only": {func(e *examination, r string) {
			os.Remove(filepath.Join(r, "opt/cni/bin/skipstack"))
			e.node.statfs = noexec(unix.ST_RDONLY, 0)
		}, checkPlugin, verdict.NotOK, "which is read-only"},

		"conflist":     {nil, checkConflist, verdict.OK, "10-bridge.conflist is valid"},
		"no conflist":  {func(e *examination, _ string) { e.Conflist = Conflist{} }, checkConflist, verdict.NotOK, "no network configuration in /etc/cni/net.d"},
		"broken":       {func(e *examination, _ string) { e.Conflist = Conflist{Broken: "/x: no JSON"} }, checkConflist, verdict.NotOK, "/x: no JSON; containerd stops there"},
		"no entry":     {func(e *examination, _ string) { e.Conflist = Conflist{Used: "/x"} }, checkConflist, verdict.NotOK, "no entry of skipstack in /x"},
		"first":        {func(e *examination, _ string) { e.Conflist.First = true }, checkConflist, verdict.NotOK, "first plugin"},
		"not used":     {func(e *examination, _ string) { e.Conflist.Used = "/etc/cni/net.d/00-multus.conf" }, checkConflist, verdict.NotOK, "uses /etc/cni/net.d/00-multus.conf"},
		"capabilities": {func(e *examination, _ string) { e.Conflist.Missing = []string{"cgroupPath"} }, checkConflist, verdict.NotOK, "cgroupPath (pods are found by their UID alone)"},

		"no sandboxes": {nil, checkSandboxes, verdict.OK, "no runtime"},
		"gVisor": {func(_ *examination, r string) {
			write(t, r, "etc/containerd/config.toml", "[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.sandboxed]\nruntime_type = \"io.containerd.runsc.v1\"\n")
		}, checkSandboxes, verdict.NotOK, "gVisor (/etc/containerd/config.toml)"},
		"gVisor as BinaryName": {func(_ *examination, r string) {
			write(t, r, "etc/containerd/config.toml", "[plugins.x.y.options]\nBinaryName = \"/usr/local/bin/runsc\"\n")
		}, checkSandboxes, verdict.NotOK, "gVisor"},
		"Kata in CRI-O": {func(_ *examination, r string) {
			write(t, r, "etc/crio/crio.conf.d/50-kata", "[crio.runtime.runtimes.k]\nruntime_path = \"/usr/bin/containerd-shim-kata-v2\"\nruntime_type = \"vm\"\n")
		}, checkSandboxes, verdict.NotOK, "Kata Containers (/etc/crio/crio.conf.d/50-kata)"},
		"Kata runs": {func(e *examination, _ string) {
			e.node.processes = append(e.node.processes, process{"102", "containerd-shim-kata-v2"})
		}, checkSandboxes, verdict.NotOK, "Kata Containers (running containerd-shim-kata-v2)"},
		"both": {func(_ *examination, r string) {
			write(t, r, "opt/kata/bin/kata-runtime", "")
			write(t, r, "usr/local/bin/runsc", "")
		}, checkSandboxes, verdict.NotOK, "gVisor (/usr/local/bin/runsc), Kata Containers (/opt/kata/bin/kata-runtime)"},
		"bad TOML": {func(_ *examination, r string) { write(t, r, "etc/containerd/config.toml", "= x") }, checkSandboxes, verdict.CouldNotTell, "/etc/containerd/config.toml: read TOML"},
	} {
		t.Run(name, func(t *testing.T) {
			root := healthy(t)
			e := &examination{
				Report: &Report{Config: plugin.DefaultConfig(), Conflist: Conflist{Path: "/etc/cni/net.d/10-bridge.conflist", Used: "/etc/cni/net.d/10-bridge.conflist"}},
				o:      Options{Root: root, ConfDir: "/etc/cni/net.d", BinDir: "/opt/cni/bin"}, node: newHost(root),
			}
			e.Config.RunDir = filepath.Join(root, "run/skipstack") // not the machine's own
			if tc.change != nil {
				tc.change(e, root)
			}
			found := false
			for _, c := range e.checks("/sys/fs/cgroup", nil) {
				if strings.Contains(c.Detail, "\n") || strings.ContainsRune(c.Detail, 0x1b) || c.Detail == "" || strings.Contains(c.Detail, "%!") {
					t.Errorf("%s: the detail is not one line: %q", c.Name, c.Detail)
				}
				if c.Name != tc.check {
					continue
				}
				found = true
				if c.Result != tc.result || !strings.Contains(c.Detail, tc.says) {
					t.Errorf("%+v, want %s, %q", c, tc.result, tc.says)
				}
			}
			if !found {
				t.Errorf("no check %s", tc.check)
			}
		})
	}
}

// The conflist is the one that the runtime uses, or the one that has the entry.
func TestFindConflist(t *testing.T) {
	const entry = `{"type":"skipstack","capabilities":{"cgroupPath":true,"io.kubernetes.cri.pod-annotations":true,"bandwidth":true}}`
	list := func(plugins ...string) string {
		return fmt.Sprintf(`{"cniVersion":"1.0.0","name":"n","plugins":[%s]}`, strings.Join(plugins, ","))
	}
	const bridge = `{"type":"bridge"}`
	for name, tc := range map[string]struct {
		files      map[string]string
		path, used string
		first      bool
		missing    int
		broken     string
	}{
		"no directory": {},
		"the first":    {files: map[string]string{"10.conflist": list(bridge, entry), "20.conflist": list(bridge, entry)}, path: "10.conflist", used: "10.conflist"},
		"the second":   {files: map[string]string{"00-multus.conf": `{"cniVersion":"1.0.0","name":"m","type":"multus"}`, "10.conflist": list(bridge, entry)}, path: "10.conflist", used: "00-multus.conf"},
		"no entry":     {files: map[string]string{"10.conflist": list(bridge)}, used: "10.conflist"},
		"broken first": {files: map[string]string{"00.conflist": `{`, "05.conflist": list(), "10.conflist": list(bridge, entry)}, path: "10.conflist", used: "10.conflist", broken: "00.conflist: the container runtime cannot load it"},
		"broken alone": {files: map[string]string{"1.conflist": `{`}, broken: "error parsing"},
		"empty":        {files: map[string]string{"1.conflist": ""}, broken: "error parsing"},
		"no plugins":   {files: map[string]string{"1.conflist": list()}, broken: "1.conflist: "},
		"broken later": {files: map[string]string{"10.conflist": list(bridge), "20.conflist": `{`}, used: "10.conflist"},
		"not the kind": {files: map[string]string{"00.conflist.bak": list(bridge, entry), "README": "x"}},
		"at the start": {files: map[string]string{"10.conflist": list(entry, bridge)}, path: "10.conflist", used: "10.conflist", first: true},
		"capabilities": {files: map[string]string{"10.conflist": list(bridge, `{"type":"skipstack","capabilities":{"bandwidth":false}}`)}, path: "10.conflist", used: "10.conflist", missing: 3},
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "net.d")
			for file, content := range tc.files {
				write(t, dir, file, content)
			}
			got, err := FindConflist(dir)
			if err != nil {
				t.Fatal(err)
			}
			base := func(path string) string {
				if path == "" {
					return ""
				}
				return filepath.Base(path)
			}
			if base(got.Path) != tc.path || base(got.Used) != tc.used || got.First != tc.first || len(got.Missing) != tc.missing ||
				(got.Broken == "") != (tc.broken == "") || !strings.Contains(got.Broken, tc.broken) {
				t.Errorf("%+v", got)
			}
			if named := ReadConflist(got.Path); got.Path != "" && (named.First != got.First || len(named.Missing) != len(got.Missing) || named.Path != got.Path) {
				t.Errorf("named: %+v", named)
			}
		})
	}
	file := filepath.Join(t.TempDir(), "file")
	write(t, filepath.Dir(file), "file", "")
	if _, err := FindConflist(file); err == nil {
		t.Error("takes a file for a directory")
	}
}

func FuzzDenial(f *testing.F) {
	f.Add(`avc:  denied  { map_create prog_load } for  pid=9 comm="skipstack" scontext=a tclass=bpf`)
	f.Add(`apparmor="DENIED" operation="exec" name="/opt/cni/bin/skipstack" comm="containerd`)
	f.Add("Lockdown: skipstack: \x1b[2J")
	f.Add(`denied avc: skipstack"`)
	f.Fuzz(func(t *testing.T, line string) {
		got, found := denial(line)
		if found != (got != "") || strings.ContainsAny(got, "\n\x1b\x00") || len(got) > 1000 {
			t.Errorf("%v, %q", found, got)
		}
	})
}

func FuzzConflist(f *testing.F) {
	f.Add([]byte(`{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"bridge"},{"type":"skipstack","capabilities":{"x":1}}]}`))
	f.Add([]byte(`{"plugins":[{"type":1}]}`))
	f.Add([]byte(`[]`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		var c Conflist
		c.describe(raw)
		if len(c.Missing) > len(capabilities)*(1+strings.Count(strings.ToLower(string(raw)), "skipstack")) {
			t.Errorf("%+v", c)
		}
	})
}

func FuzzRuntimeConfig(f *testing.F) {
	f.Add([]byte("[a.b]\nruntime_type = 'io.containerd.kata.v2'\n[[c]]\nBinaryName = 'runsc'\n"))
	f.Add([]byte("runtime_type = 1"))
	f.Add([]byte("="))
	f.Fuzz(func(t *testing.T, raw []byte) {
		if values, err := runtimeValues(raw); err != nil && values != nil {
			t.Errorf("%v, %v", values, err)
		}
	})
}
