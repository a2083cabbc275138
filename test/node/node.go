package node

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/plugin/attachment"
)

// closeTimeout bounds what Close and other cleaning up may take.
const closeTimeout = 2 * time.Minute

// Options describe a node; the zero value will do.
type Options struct {
	Name       string            // of its directory and cgroup; default: one that is not taken
	PluginDirs []string          // where CNI plugins are looked for after the node's own directory; default [ProgramDir]
	Plugins    map[string]string // name -> program, linked into the node's own CNI directory
	// DefaultPaths gives the node the paths that skipstack uses when nothing
	// is configured: /sys/fs/bpf, /run/skipstack and the cgroup2 root. There can
	// be one such node at a time; its name is "default".
	DefaultPaths bool
	Log          io.Writer // what plugins write to stderr; nil: dropped
}

// A Node is a private Kubernetes node: network namespace, cgroup subtree, bpffs,
// directories. Nodes of one [Machine] share nothing but the kernel. Its methods may
// be called from several goroutines. Close it after use.
type Node struct {
	Name       string
	Dir        string // everything below is removed by Close
	NetNS      string // path
	CgroupRoot string // kubepods is made here
	BPFFS      string
	RunDir     string // skipstack's; not made
	BinDir     string // CNI plugins of the node's own
	ConfDir    string // CNI configurations
	CacheDir   string // libcni's
	IPAMDir    string // host-local's

	ownPaths   bool // bpffs, run directory and cgroup root differ from skipstack's defaults
	pluginDirs []string
	log        io.Writer
	thread     *thread
	journal    bool       // attachments are recorded; see Here
	locks      []*os.File // held until Close

	mu       sync.Mutex
	pods     []*Pod
	services []*Service
	cgroups  []string
}

// New makes a node. The process must have called [Prepare].
func New(o Options) (n *Node, err error) {
	if !Isolated() {
		return nil, errors.New("make a node: the process is not isolated")
	}
	root, err := cgroupRoot()
	if err != nil {
		return nil, err
	}
	if o.DefaultPaths {
		o.Name = "default"
	}
	if o.Name == "" {
		o.Name = "node-" + randomUID()[:8]
	}
	if o.PluginDirs == nil && ProgramDir() != "" {
		o.PluginDirs = []string{ProgramDir()}
	}
	dir := filepath.Join(nodesDir, o.Name)
	n = &Node{
		Name: o.Name, Dir: dir,
		NetNS:      filepath.Join(dir, "netns"),
		CgroupRoot: filepath.Join(root, o.Name),
		BPFFS:      filepath.Join(dir, "bpf"),
		RunDir:     filepath.Join(dir, "run"),
		BinDir:     filepath.Join(dir, "bin"),
		ConfDir:    filepath.Join(dir, "net.d"),
		CacheDir:   filepath.Join(dir, "cache"),
		IPAMDir:    filepath.Join(dir, "ipam"),
		ownPaths:   true, pluginDirs: o.PluginDirs, log: o.Log,
	}
	if o.DefaultPaths {
		n.ownPaths = false
		n.CgroupRoot, n.BPFFS, n.RunDir = root, defaultBPFFS, defaultRunDir
	}
	if n.log == nil {
		n.log = io.Discard
	}
	if err := os.Mkdir(dir, 0o755); err != nil {
		return nil, fmt.Errorf("make node %s: %w", o.Name, err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("make node %s: %w", o.Name, err), n.Close())
			n = nil
		}
	}()
	for _, d := range []string{n.BinDir, n.ConfDir} {
		if err := os.Mkdir(d, 0o755); err != nil {
			return n, err
		}
	}
	if n.ownPaths {
		if err := os.Mkdir(n.BPFFS, 0o700); err != nil {
			return n, err
		}
		if _, err := n.Cgroup(""); err != nil {
			return n, err
		}
	}
	if err := unix.Mount("bpf", n.BPFFS, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700"); err != nil {
		return n, fmt.Errorf("mount bpf on %s: %w", n.BPFFS, err)
	}
	for name, program := range o.Plugins {
		if err := n.Install(name, program); err != nil {
			return n, err
		}
	}
	if n.thread, err = newNetNS(n.NetNS); err != nil {
		return n, err
	}
	return n, n.Do(setSysctls)
}

// setSysctls prepares a node's network namespace as kubelet and kube-proxy do.
func setSysctls() error {
	for _, name := range []string{
		"net/ipv4/ip_forward",
		"net/ipv6/conf/all/forwarding",
		// DNAT between two pods of one bridge needs replies to pass conntrack.
		bridgeNetfilter,
		"net/bridge/bridge-nf-call-ip6tables",
	} {
		if err := setSysctl(name, "1"); err != nil {
			return err
		}
	}
	return nil
}

// setSysctl sets a sysctl of the calling thread's network namespace. One that the
// kernel does not have is left out.
func setSysctl(name, value string) error {
	if err := os.WriteFile("/proc/sys/"+name, []byte(value), 0); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("set sysctl %s: %w", name, err)
	}
	return nil
}

const bridgeNetfilter = "net/bridge/bridge-nf-call-iptables"

// HasBridgeNetfilter says whether packets between pods of one bridge pass
// netfilter, so that a [Service] without masquerade works between them.
func (n *Node) HasBridgeNetfilter() bool {
	_, err := os.Stat("/proc/sys/" + bridgeNetfilter)
	return err == nil
}

// Install links program into the node's CNI directory under a plugin's name.
func (n *Node) Install(name, program string) error {
	program, err := filepath.Abs(program)
	if err != nil {
		return fmt.Errorf("install plugin %s: %w", name, err)
	}
	info, err := os.Stat(program)
	if err != nil {
		return fmt.Errorf("install plugin %s: %w", name, err)
	}
	if info.IsDir() || info.Mode()&0o111 == 0 {
		return fmt.Errorf("install plugin %s: %s is not a program", name, program)
	}
	if err := os.Symlink(program, filepath.Join(n.BinDir, name)); err != nil {
		return fmt.Errorf("install plugin %s: %w", name, err)
	}
	return nil
}

// Do runs f on a thread in the node's network namespace: sockets, netlink and
// /proc/sys/net are the node's there. f must not call Do or start something on this
// node itself, nor leave by runtime.Goexit (as t.FailNow does).
func (n *Node) Do(f func() error) error { return n.thread.do(f) }

// Cgroup makes a cgroup below the node's root, with its parents, and returns its
// directory. Close removes it.
func (n *Node) Cgroup(path string) (string, error) {
	dir := filepath.Join(n.CgroupRoot, path)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", fmt.Errorf("make a cgroup: %w", err)
	}
	top := dir
	if !n.ownPaths {
		first, _, _ := strings.Cut(strings.TrimPrefix(filepath.Clean("/"+path), "/"), "/")
		top = filepath.Join(n.CgroupRoot, first)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.cgroups = append(n.cgroups, top)
	return dir, nil
}

// Close removes everything the node has: pods (with DEL), services, namespaces,
// mounts, cgroups, files. It may be called again.
func (n *Node) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
	defer cancel()
	failed := []error{n.closePods(ctx)}
	if !n.journal { // else the run directory is the machine's, and stays
		prober, err := n.waitForProber(ctx)
		failed = append(failed, err)
		defer prober.Close()
	}
	n.mu.Lock()
	services, cgroups := n.services, n.cgroups
	n.services, n.cgroups = nil, nil
	n.mu.Unlock()
	for _, s := range services {
		failed = append(failed, s.Close())
	}
	if n.thread != nil {
		failed = append(failed, n.thread.close())
		n.thread = nil
	}
	for i := len(cgroups) - 1; i >= 0; i-- {
		failed = append(failed, removeCgroup(ctx, cgroups[i]))
	}
	if isFS(n.BPFFS, unix.BPF_FS_MAGIC) && isMountPoint(n.BPFFS) {
		if err := unix.Unmount(n.BPFFS, unix.MNT_DETACH); err != nil {
			failed = append(failed, fmt.Errorf("unmount %s: %w", n.BPFFS, err))
		}
	}
	if n.journal {
		if err := errors.Join(failed...); err != nil {
			return errors.Join(err, n.unlock()) // the next SweepHere tries again
		}
		return errors.Join(os.RemoveAll(n.Dir), n.unlock(), removeEmpty(filepath.Dir(n.Dir)))
	}
	failed = append(failed, removeNetNS(n.NetNS), os.RemoveAll(n.RunDir), os.RemoveAll(n.Dir))
	return errors.Join(failed...)
}

// waitForProber waits until no child of an ADD probes the kernel any more: it would
// write to the run directory. The caller closes the lock, which keeps others out.
func (n *Node) waitForProber(ctx context.Context) (*os.File, error) {
	f, err := os.Open(filepath.Join(n.RunDir, attachment.ProbeLock))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("wait for the prober: %w", err)
	}
	for unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) != nil {
		if err := sleep(ctx, 5*time.Millisecond); err != nil {
			return f, fmt.Errorf("wait for the prober, which holds %s: %w", f.Name(), err)
		}
	}
	return f, nil
}

// ClosePods closes the node's pods and returns [Node.Leftovers].
func (n *Node) ClosePods() (left []string, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
	defer cancel()
	if err := n.closePods(ctx); err != nil {
		return nil, err
	}
	return n.Leftovers()
}

// closePods closes the node's pods, the youngest first.
func (n *Node) closePods(ctx context.Context) error {
	n.mu.Lock()
	pods := slices.Clone(n.pods)
	n.mu.Unlock()
	var failed []error
	for i := len(pods) - 1; i >= 0; i-- {
		failed = append(failed, pods[i].Close(ctx))
	}
	return errors.Join(failed...)
}

func isMountPoint(dir string) bool {
	var here, above unix.Stat_t
	return unix.Stat(dir, &here) == nil && unix.Stat(filepath.Dir(dir), &above) == nil && here.Dev != above.Dev
}

// Leftovers says, one line each, what pods that are gone have left on the node:
// links, leases, attached BPF links and attachments. Call it after [Pod.Close]. What
// the datapath keeps for the next pod (maps, programs, the bridge) does not count.
func (n *Node) Leftovers() ([]string, error) {
	var left []string
	err := n.Do(func() error {
		names, err := linkNames()
		for _, name := range names {
			if strings.HasPrefix(name, "veth") {
				left = append(left, "link: "+name)
			}
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	// One directory for each layout of the maps that is in use.
	links, err := filepath.Glob(filepath.Join(n.BPFFS, "skipstack/*/links/*"))
	if err != nil {
		return nil, fmt.Errorf("list pins: %w", err)
	}
	for _, path := range links {
		left = append(left, "pin: "+path)
	}
	for _, dir := range []struct{ kind, path string }{
		{"attachment", filepath.Join(n.RunDir, "attachments")},
		{"attachment", filepath.Join(n.RunDir, "cgroups")},
		{"pod cgroup", filepath.Join(n.CgroupRoot, "kubepods")},
		{"result", filepath.Join(n.CacheDir, "results")},
		{"lease", n.IPAMDir},
	} {
		found, err := filesBelow(dir.path)
		if err != nil {
			return nil, err
		}
		for _, path := range found {
			if isLeft(dir.kind, path) {
				left = append(left, dir.kind+": "+path)
			}
		}
	}
	return left, nil
}

// isLeft tells what a pod leaves from what its network keeps.
func isLeft(kind, path string) bool {
	base := filepath.Base(path)
	switch kind {
	case "pod cgroup":
		return strings.Contains(base, "pod") && !strings.HasPrefix(base, "kubepods")
	case "lease": // host-local names a lease by its address
		return strings.Count(base, ".") == 3 || strings.Contains(base, ":")
	}
	return true
}
