package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/test/runtimes/containerd"
	"github.com/skipstack/skipstack/test/vm/job"
	"github.com/skipstack/skipstack/test/vm/machine"
)

// release is the Debian release of the root file system.
const release = "trixie"

// packages are what a node has installed. containerd is added from elsewhere, as
// the release's is older than version 2.
var packages = []string{
	"base-files", "base-passwd", "bash", "coreutils", "dbus", "etcd-server", "findutils", "grep", "iproute2", "iptables",
	"kmod", "mount", "nftables", "procps", "runc", "sed", "systemd-sysv", "util-linux",
}

// modules are what a node has loaded.
var modules = []string{
	"nfit", "nd_pmem", "overlay", "autofs4", "veth", "bridge", "br_netfilter", "nf_conntrack_netlink",
	"nf_tables", "nft_chain_nat", "nft_nat", "nft_masq", "nft_redir", "nft_ct", "nft_limit", "nft_log",
	"nft_reject_inet", "nft_reject_ipv4", "nft_reject_ipv6", "nft_fib_inet", "nft_fib_ipv4", "nft_fib_ipv6", "nft_numgen", "nft_hash", "nft_compat",
	"xt_addrtype", "xt_comment", "xt_conntrack", "xt_limit", "xt_mark", "xt_MASQUERADE", "xt_multiport", "xt_nat", "xt_nfacct", "xt_recent",
	"xt_REDIRECT", "xt_statistic", "xt_tcpudp", "ipt_REJECT", "ip6t_REJECT",
}

// masked are units of systemd's that a node which lives for minutes can do without.
var masked = []string{
	"getty.target", "ldconfig.service", "modprobe@.service", "systemd-hibernate-clear.service", "systemd-journal-catalog-update.service",
	"systemd-journal-flush.service", "systemd-logind.service", "systemd-random-seed.service", "systemd-update-done.service",
	"systemd-user-sessions.service",
}

const (
	memory   = 4096    // MiB
	diskSize = 2 << 30 // bytes
	params   = "systemd.show_status=no systemd.getty_auto=no systemd.firstboot=off systemd.journald.max_level_kmsg=emerg "
)

// system has the files that make an administrator's part of the node, by their
// path below the root.
//
//go:embed system
var system embed.FS

// base is where Debian's part of the root file system is: other packages, another one.
func (l *lab) base() string {
	sum := sha256.Sum256([]byte(strings.Join(packages, " ")))
	return filepath.Join(l.cache, fmt.Sprintf("rootfs-%s-%x", release, sum[:4]))
}

// makeDisk makes an image of the root file system, in memory: the virtual machine maps
// it, and where the kernel drops pages of files soon would read them again and again.
// The caller closes the file.
func (l *lab) makeDisk(ctx context.Context, work string) (_ *os.File, err error) {
	fd, err := unix.MemfdCreate("disk", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("memfd_create: %w", err)
	}
	disk := os.NewFile(uintptr(fd), fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), fd))
	if err := l.format(ctx, work, disk); err != nil {
		disk.Close()
		return nil, err
	}
	return disk, nil
}

// format makes a file system of what the node has.
func (l *lab) format(ctx context.Context, work string, disk *os.File) error {
	root := filepath.Join(work, "root")
	if out, err := exec.CommandContext(ctx, "cp", "-al", l.base(), root).CombinedOutput(); err != nil {
		return fmt.Errorf("copy the root file system: %w: %s", err, out)
	}
	t := &tree{root: root}
	l.fill(t, work)
	if t.err != nil {
		return t.err
	}
	if err := disk.Truncate(diskSize); err != nil {
		return err
	}
	// Files belong to root, whoever unpacked them.
	args := []string{"mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-d", root, disk.Name()}
	if os.Geteuid() != 0 {
		args = append([]string{"unshare", "--map-root-user"}, args...)
	}
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Env = append(os.Environ(), "PATH="+os.Getenv("PATH")+":/usr/sbin:/sbin")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("mke2fs (of package e2fsprogs): %w: %s", err, bytes.TrimSpace(out))
	}
	return os.RemoveAll(root)
}

// fill adds to the root file system what Debian's packages leave to their
// installation, and what is the node's own.
func (l *lab) fill(t *tree, work string) {
	for _, name := range []string{"passwd", "group"} {
		t.copy(filepath.Join(l.base(), "usr/share/base-passwd", name+".master"), "etc/"+name, 0o644)
	}
	for _, name := range []string{"iptables", "ip6tables"} {
		for _, suffix := range []string{"", "-save", "-restore"} {
			t.link(name+"-nft"+suffix, "usr/sbin/"+name+suffix)
		}
	}
	t.add(fs.WalkDir(system, "system", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data, err := system.ReadFile(path)
		t.write(strings.TrimPrefix(path, "system/"), data, 0o644)
		return err
	}))
	for _, unit := range masked {
		t.link("/dev/null", "etc/systemd/system/"+unit)
	}
	for _, unit := range []string{"uplink", "skipstack-test"} {
		t.link("../"+unit+".service", "etc/systemd/system/multi-user.target.wants/"+unit+".service")
	}

	for _, name := range []string{"containerd", "containerd-shim-runc-v2", "ctr"} {
		t.copy(filepath.Join(l.containerd.Dir, name), "usr/bin/"+name, 0o755)
	}
	for _, name := range components {
		t.copy(filepath.Join(l.kubernetes, name), "usr/local/bin/"+name, 0o755)
	}
	for _, name := range []string{"bridge", "loopback", "host-local", "portmap"} {
		t.copy(l.bin(name), "opt/cni/bin/"+name, 0o755)
	}
	for _, name := range []string{"guest", "skipstack", "inside.test"} {
		t.copy(l.bin(name), "opt/test/"+name, 0o755)
	}
	image := filepath.Join(work, "image.tar")
	t.add(containerd.WriteImage(image, l.bin("peer")))
	t.copy(image, "opt/test/image.tar", 0o644)

	args := []string{"-test.v=test2json", "-test.timeout=" + l.limit.String()}
	if l.tests != "" {
		args = append(args, "-test.run", l.tests)
	}
	script, err := json.Marshal(job.Script{Runs: []job.Run{{
		Name: "kubelet", Path: "/opt/test/inside.test", Args: args, Dir: "/opt/test", Timeout: l.limit + time.Minute,
		Env: []string{"PATH=/usr/local/bin:/usr/sbin:/usr/bin"},
	}}})
	t.add(err)
	t.write(strings.TrimPrefix(job.ScriptPath, "/"), script, 0o644)
}

// makeInitramfs makes what loads the modules and changes to the disk.
func (l *lab) makeInitramfs(ctx context.Context, path string) (err error) {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	a := machine.NewArchive(f)
	guest, err := os.ReadFile(l.bin("guest"))
	if err != nil {
		return err
	}
	if err := a.File("init", 0o755, guest); err != nil {
		return err
	}
	script := job.Script{Disk: "/dev/pmem0"}
	if script.Modules, err = a.Modules(ctx, l.kernel, modules); err != nil {
		return err
	}
	text, err := json.Marshal(script)
	if err != nil {
		return err
	}
	if err := a.File(strings.TrimPrefix(job.ScriptPath, "/"), 0o644, text); err != nil {
		return err
	}
	return a.Close()
}

// A tree is a root file system in the making. Its files may be hard links to the
// cache's, so they are replaced, never written to. The first error stays.
type tree struct {
	root string
	err  error
}

func (t *tree) add(err error) {
	if t.err == nil {
		t.err = err
	}
}

// place makes room for a file.
func (t *tree) place(name string) (path string, ok bool) {
	if t.err != nil {
		return "", false
	}
	path = filepath.Join(t.root, name)
	t.add(os.MkdirAll(filepath.Dir(path), 0o755))
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.add(err)
	}
	return path, t.err == nil
}

func (t *tree) write(name string, data []byte, mode fs.FileMode) {
	if path, ok := t.place(name); ok {
		t.add(os.WriteFile(path, data, mode))
	}
}

func (t *tree) copy(from, name string, mode fs.FileMode) {
	if t.err != nil {
		return
	}
	data, err := os.ReadFile(from)
	t.add(err)
	t.write(name, data, mode)
}

func (t *tree) link(target, name string) {
	if path, ok := t.place(name); ok {
		t.add(os.Symlink(target, path))
	}
}
