package doctor

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/plugin"
	"github.com/skipstack/skipstack/plugin/attachment"
	"github.com/skipstack/skipstack/plugin/datapath"
	"github.com/skipstack/skipstack/plugin/verdict"
)

// Names of the checks of the node.
const (
	checkPrivileges = "privileges"
	checkCgroup2    = "cgroup2"
	checkBPFFS      = "bpffs"
	checkRunDir     = "rundir"
	checkLockdown   = "lockdown"
	checkSecurity   = "security"
	checkPlugin     = "plugin"
	checkConflist   = "conflist"
	checkNamespace  = "namespace"
	checkSandboxes  = "sandboxes"
)

func ok(name, format string, args ...any) verdict.Probe {
	return verdict.Probe{Name: name, Result: verdict.OK, Detail: fmt.Sprintf(format, args...)}
}

func notOK(name, format string, args ...any) verdict.Probe {
	return verdict.Probe{Name: name, Result: verdict.NotOK, Detail: fmt.Sprintf(format, args...)}
}

func couldNotTell(name, format string, args ...any) verdict.Probe {
	return verdict.Probe{Name: name, Result: verdict.CouldNotTell, Detail: fmt.Sprintf(format, args...)}
}

// checks looks at the node. Each is one line: why, and what to do.
func (e *examination) checks(cgroupRoot string, rootErr error) []verdict.Probe {
	h := e.node
	cgroup := ok(checkCgroup2, "mounted at %s", cgroupRoot)
	if rootErr != nil {
		cgroup = notOK(checkCgroup2, "%s; all pods are plain", text(rootErr))
	}
	return []verdict.Probe{
		h.privileges(), cgroup, h.bpffs(e.Config.BPFFS), runDir(e.Config.RunDir), h.lockdown(), h.security(), h.namespace(),
		h.plugin(e.o.BinDir), e.conflist(), h.sandboxes(),
	}
}

func (h *host) path(name string) string { return filepath.Join(h.root, name) }

// read returns what is in a file, without white space around it.
func (h *host) read(name string) (string, error) {
	b, err := os.ReadFile(h.path(name))
	return strings.TrimSpace(string(b)), err
}

// needed are the capabilities that loading, attaching and probing take, by their
// numbers.
var needed = []struct {
	bit  int
	name string
}{
	{unix.CAP_BPF, "CAP_BPF"}, {unix.CAP_NET_ADMIN, "CAP_NET_ADMIN"},
	{unix.CAP_PERFMON, "CAP_PERFMON"}, {unix.CAP_SYS_ADMIN, "CAP_SYS_ADMIN"},
}

// privileges tells what this process may do. The plugin itself has what the
// container runtime gives it.
func (h *host) privileges() verdict.Probe {
	status, err := h.read("/proc/self/status")
	if err != nil {
		return couldNotTell(checkPrivileges, "%s", text(err))
	}
	// user_namespaces(7): the initial one maps all 2^32-1 ids to themselves.
	if ids, err := h.read("/proc/self/uid_map"); err == nil && strings.Join(strings.Fields(ids), " ") != "0 0 4294967295" {
		return notOK(checkPrivileges, "in a user namespace, where the kernel refuses these BPF programs: run it as root of the host")
	}
	field := func(name string) string {
		for line := range strings.Lines(status) {
			if value, ok := strings.CutPrefix(line, name+":"); ok {
				return strings.TrimSpace(value)
			}
		}
		return ""
	}
	effective, err := strconv.ParseUint(field("CapEff"), 16, 64)
	if err != nil {
		return couldNotTell(checkPrivileges, "/proc/self/status has no capabilities: %s", text(err))
	}
	var missing []string
	for _, c := range needed {
		if effective&(1<<c.bit) == 0 {
			missing = append(missing, c.name)
		}
	}
	switch {
	case len(missing) == len(needed):
		return notOK(checkPrivileges, "not root: run skipstack as root")
	case len(missing) > 0:
		return notOK(checkPrivileges, "this process lacks %s, as in a container: run it as root of the host", strings.Join(missing, ", "))
	case field("Seccomp") == "2":
		return ok(checkPrivileges, "root with all capabilities; a seccomp filter is in force, which may refuse bpf(2)")
	}
	return ok(checkPrivileges, "root with all capabilities that probing takes")
}

// bpffs tells whether ADD finds a BPF file system, or may mount one.
func (h *host) bpffs(path string) verdict.Probe {
	st, err := h.statfs(h.path(path))
	if errors.Is(err, fs.ErrNotExist) {
		return notOK(checkBPFFS, "there is no directory %s, so pods stay plain: name a BPF file system with the key bpffs", path)
	}
	if err != nil {
		return couldNotTell(checkBPFFS, "statfs %s: %s", path, text(err))
	}
	if uint32(st.Type) == unix.BPF_FS_MAGIC {
		if st.Flags&unix.ST_RDONLY != 0 {
			return notOK(checkBPFFS, "the BPF file system at %s is mounted read-only, so pods stay plain: mount -o remount,rw %s", path, path)
		}
		return ok(checkBPFFS, "mounted at %s", path)
	}
	entries, err := os.ReadDir(h.path(path))
	switch {
	case err != nil:
		return couldNotTell(checkBPFFS, "%s", text(err))
	case h.lacksBPFFS():
		return notOK(checkBPFFS, "%s, so pods stay plain", noBPFFS)
	case len(entries) > 0:
		return notOK(checkBPFFS, "%s is no BPF file system and not empty, so none is mounted there and pods stay plain: mount -t bpf bpf DIRECTORY, and name it with the key bpffs", path)
	}
	return ok(checkBPFFS, "none is mounted at %s yet: the first pod's ADD mounts one", path)
}

const noBPFFS = "the kernel has no BPF file system (CONFIG_BPF_SYSCALL)"

func (h *host) lacksBPFFS() bool { return datapath.LacksBPFFS(h.path("/proc")) }

// lockdown tells whether the kernel refuses to let BPF programs read its memory,
// kernel_lockdown(7).
func (h *host) lockdown() verdict.Probe {
	state, err := h.read("/sys/kernel/security/lockdown")
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return ok(checkLockdown, "the kernel has none, or securityfs is not mounted")
	case err != nil:
		return couldNotTell(checkLockdown, "%s", text(err))
	case strings.Contains(state, "[confidentiality]"):
		return notOK(checkLockdown, "confidentiality: BPF programs may not read kernel memory, so all pods are plain; boot with lockdown=integrity or without")
	case strings.Contains(state, "[integrity]"):
		return ok(checkLockdown, "integrity, which lets BPF programs read kernel memory")
	case strings.Contains(state, "[none]"):
		return ok(checkLockdown, "none")
	}
	return couldNotTell(checkLockdown, "not understood: %.60q", state)
}

// runtimes are the programs that run CNI plugins.
var runtimes = []string{"containerd", "crio", "dockerd", "cri-dockerd", "k3s", "k3s-server", "k3s-agent", "rke2", "podman"}

// process is one that matters here.
type process struct {
	pid  string
	name string // of its program
}

// listProcesses lists the node's processes; kernel threads have no name.
func (h *host) listProcesses() []process {
	var all []process
	files, _ := filepath.Glob(h.path("/proc/[0-9]*/cmdline"))
	for _, file := range files {
		line, err := os.ReadFile(file)
		if err != nil || len(line) == 0 {
			continue // it has ended
		}
		program, _, _ := bytes.Cut(line, []byte{0})
		// "k3s server" changes its title to that.
		first, _, _ := strings.Cut(string(program), " ")
		all = append(all, process{filepath.Base(filepath.Dir(file)), filepath.Base(first)})
	}
	return all
}

// runDir tells whether ADD uses the run directory, by what ADD itself goes by.
func runDir(path string) verdict.Probe {
	dir, err := attachment.OpenRunDir(path, false)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return ok(checkRunDir, "there is no %s yet: the first pod's ADD makes it", path)
	case err != nil && os.Geteuid() != 0: // ADD runs as root
		return couldNotTell(checkRunDir, "%s", text(err))
	case err != nil:
		return notOK(checkRunDir, "%s; until then pods stay plain", text(err))
	}
	dir.Close()
	return ok(checkRunDir, "%s cannot be written by others", path)
}

// runtime is a running container runtime.
func (h *host) runtime() (process, bool) {
	i := slices.IndexFunc(h.processes, func(p process) bool { return slices.Contains(runtimes, p.name) })
	if i < 0 {
		return process{}, false
	}
	return h.processes[i], true
}

// namespace tells whether the container runtime, which runs the plugin, sees the
// same mounts.
func (h *host) namespace() verdict.Probe {
	p, running := h.runtime()
	if !running {
		return ok(checkNamespace, "no container runtime is running")
	}
	own, err := os.Readlink(h.path("/proc/self/ns/mnt"))
	if err != nil {
		return couldNotTell(checkNamespace, "%s", text(err))
	}
	theirs, err := os.Readlink(h.path(filepath.Join("/proc", p.pid, "ns/mnt")))
	switch {
	case err != nil:
		return couldNotTell(checkNamespace, "%s (process %s): %s", p.name, p.pid, text(err))
	case own != theirs:
		return notOK(checkNamespace, "%s (process %s) is in another mount namespace, with another BPF file system and run directory: nsenter -t %s -m skipstack doctor",
			p.name, p.pid, p.pid)
	}
	return ok(checkNamespace, "%s (process %s) runs plugins in this mount namespace", p.name, p.pid)
}

// plugin tells whether the runtime can run the plugin's binary, and whether it is
// this one.
func (h *host) plugin(binDir string) verdict.Probe {
	dir := h.path(binDir)
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		return notOK(checkPlugin, "there is no directory %s: --cni-bin-dir names the runtime's", binDir)
	} else if err != nil {
		return couldNotTell(checkPlugin, "%s", text(err))
	}
	st, err := h.statfs(dir)
	if err != nil {
		return couldNotTell(checkPlugin, "statfs %s: %s", binDir, text(err))
	}
	if st.Flags&unix.ST_NOEXEC != 0 {
		return notOK(checkPlugin, "%s is on a file system that is mounted noexec: no runtime can run plugins from it; set another directory in the runtime's configuration", binDir)
	}
	path := filepath.Join(dir, plugin.Type)
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist) && st.Flags&unix.ST_RDONLY != 0:
		return notOK(checkPlugin, "skipstack is not in %s, which is read-only: install it in a writable directory and name that in the runtime's configuration", binDir)
	case errors.Is(err, fs.ErrNotExist):
		return notOK(checkPlugin, "skipstack is not in %s: with an entry in the conflist but no binary, pods do not start", binDir)
	case err != nil:
		return couldNotTell(checkPlugin, "%s", text(err))
	case !info.Mode().IsRegular() || info.Mode()&0o111 == 0:
		return notOK(checkPlugin, "%s is not an executable file: pods do not start with an entry in the conflist", filepath.Join(binDir, plugin.Type))
	}
	same, err := sameFile(path, "/proc/self/exe")
	switch {
	case err != nil:
		return couldNotTell(checkPlugin, "%s", text(err))
	case !same:
		return notOK(checkPlugin, "%s is another build than this doctor: run that one, or install this one", filepath.Join(binDir, plugin.Type))
	}
	return ok(checkPlugin, "%s is this build", filepath.Join(binDir, plugin.Type))
}

// sameFile compares contents.
func sameFile(a, b string) (bool, error) {
	var infos [2]os.FileInfo
	for i, path := range []string{a, b} {
		var err error
		if infos[i], err = os.Stat(path); err != nil {
			return false, err
		}
	}
	if os.SameFile(infos[0], infos[1]) || infos[0].Size() != infos[1].Size() {
		return os.SameFile(infos[0], infos[1]), nil
	}
	var sums [2][]byte
	for i, path := range []string{a, b} {
		f, err := os.Open(path)
		if err != nil {
			return false, err
		}
		sum := sha256.New()
		_, err = io.Copy(sum, f)
		f.Close()
		if err != nil {
			return false, err
		}
		sums[i] = sum.Sum(nil)
	}
	return bytes.Equal(sums[0], sums[1]), nil
}

// conflist tells what pods get of skipstack's entry.
func (e *examination) conflist() verdict.Probe {
	c := e.Conflist
	switch {
	case c.Broken != "":
		return notOK(checkConflist, "%s; containerd stops there: mend or remove it", c.Broken)
	case c.Path == "" && c.Used == "":
		return notOK(checkConflist, "no network configuration in %s: --cni-conf-dir or --config names another", e.o.ConfDir)
	case c.Path == "":
		return notOK(checkConflist, "no entry of skipstack in %s nor in other files of %s", c.Used, e.o.ConfDir)
	case c.First:
		return notOK(checkConflist, "skipstack is the first plugin of %s: without a prevResult its ADD fails; put it after the one that makes the interface", c.Path)
	case c.Used != c.Path:
		return notOK(checkConflist, "the runtime uses %s, which has no entry of skipstack, and not %s (unless it delegates to that, as Multus does)", c.Used, c.Path)
	case len(c.Missing) > 0:
		var lost []string
		for _, known := range capabilities {
			if slices.Contains(c.Missing, known.name) {
				lost = append(lost, fmt.Sprintf("%s (%s)", known.name, known.lost))
			}
		}
		return notOK(checkConflist, "the entry in %s does not declare capabilities: %s", c.Path, strings.Join(lost, ", "))
	}
	return ok(checkConflist, "the entry in %s is valid", c.Path)
}
