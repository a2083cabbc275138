package conflist

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/conf"
	"github.com/skipstack/skipstack/plugin"
)

// bed is a node's file system, with the default directories.
type bed struct {
	t         testing.TB
	opts      Options
	conf, bin string
}

func newBed(t testing.TB, files map[string]string) *bed {
	t.Helper()
	root := t.TempDir()
	b := &bed{t, Options{Root: root}, filepath.Join(root, "etc/cni/net.d"), filepath.Join(root, "opt/cni/bin")}
	b.mkdir(b.conf)
	b.opts.Binary = filepath.Join(root, "build")
	b.write(b.opts.Binary, "version 1")
	for _, name := range []string{"bridge", "flannel", "ptp", "cilium-cni", "multus", "calico"} {
		b.plugin(b.bin, name)
	}
	for name, text := range files {
		b.write(filepath.Join(b.conf, name), text)
	}
	return b
}

func (b *bed) mkdir(path string) {
	b.t.Helper()
	if err := os.MkdirAll(path, 0o755); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bed) write(path, text string) {
	b.t.Helper()
	b.mkdir(filepath.Dir(path))
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bed) plugin(dir, name string) {
	b.t.Helper()
	b.write(filepath.Join(dir, name), "plugin")
	if err := os.Chmod(filepath.Join(dir, name), 0o755); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bed) install() Report {
	b.t.Helper()
	r, err := b.opts.Install(context.Background())
	if err != nil {
		b.t.Fatal(err)
	}
	return r
}

func (b *bed) uninstall(purge bool) Report {
	b.t.Helper()
	r, err := b.opts.Uninstall(context.Background(), purge)
	if err != nil {
		b.t.Fatal(err)
	}
	return r
}

// tree is what is in a directory: name, mode and content of each file.
func tree(t testing.TB, dir string) map[string]string {
	t.Helper()
	all := map[string]string{}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		info, err := e.Info()
		if err != nil {
			t.Fatal(err)
		}
		switch {
		case info.Mode()&fs.ModeSymlink != 0:
			to, err := os.Readlink(filepath.Join(dir, e.Name()))
			if err != nil {
				t.Fatal(err)
			}
			all[e.Name()] = "-> " + to
		case info.IsDir():
			all[e.Name()] = "directory"
		default:
			all[e.Name()] = info.Mode().String() + " " + string(read(t, filepath.Join(dir, e.Name())))
		}
	}
	return all
}

func wantTree(t testing.TB, dir string, want map[string]string) {
	t.Helper()
	got := tree(t, dir)
	for name := range got {
		if got[name] != want[name] {
			t.Errorf("%s is\n%.2000s\nwant\n%.2000s", filepath.Join(dir, name), got[name], want[name])
		}
	}
	for name := range want {
		if _, ok := got[name]; !ok {
			t.Errorf("%s is missing", filepath.Join(dir, name))
		}
	}
}

func sample(t testing.TB, name string) string {
	return string(read(t, filepath.Join("testdata/lists", name)))
}

func TestInstall(t *testing.T) {
	b := newBed(t, map[string]string{"10-flannel.conflist": sample(t, "flannel.conflist"), "99-other.conflist": sample(t, "podman.conflist"), "flannel-kubeconfig": "x"})
	file := filepath.Join(b.conf, "10-flannel.conflist")
	if err := os.Chmod(file, 0o640); err != nil {
		t.Fatal(err)
	}
	before, beforeBin := tree(t, b.conf), tree(t, b.bin)

	b.opts.DryRun = true
	dry := b.install()
	wantTree(t, b.conf, before)
	wantTree(t, b.bin, beforeBin)
	b.opts.DryRun = false

	r := b.install()
	if r.ConfDir != b.conf || r.BinDir != b.bin || r.Conflist != file || !r.Placed || len(r.Changes) != 1 || r.Binary != filepath.Join(b.bin, "skipstack") {
		t.Errorf("report %+v", r)
	}
	if len(dry.Changes) != 1 || !bytes.Equal(dry.Changes[0].After, r.Changes[0].After) || !dry.Placed {
		t.Errorf("a dry run said %+v", dry)
	}
	after := tree(t, b.conf)
	if want := "-rw-r----- " + string(read(t, "testdata/golden/flannel.conflist")); after["10-flannel.conflist"] != want {
		t.Errorf("got %s\nwant %s", after["10-flannel.conflist"], want)
	}
	if got := tree(t, b.bin)["skipstack"]; got != "-rwxr-xr-x version 1" {
		t.Errorf("binary %s", got)
	}

	again := b.install()
	if again.Placed || len(again.Changes) != 0 {
		t.Errorf("the second time did %+v", again)
	}
	wantTree(t, b.conf, after)

	b.write(b.opts.Binary, "version 2, longer")
	if up := b.install(); !up.Placed || len(up.Changes) != 0 || tree(t, b.bin)["skipstack"] != "-rwxr-xr-x version 2, longer" {
		t.Errorf("the upgrade did %+v", up)
	}

	b.opts.DryRun = true
	if dry := b.uninstall(false); len(dry.Changes) != 1 || !dry.Removed {
		t.Errorf("a dry run said %+v", dry)
	}
	wantTree(t, b.conf, after)
	b.opts.DryRun = false
	if r := b.uninstall(false); !r.Removed || r.Kept != "" {
		t.Errorf("uninstall did %+v", r)
	}
	wantTree(t, b.conf, before)
	wantTree(t, b.bin, beforeBin)
	if r := b.uninstall(false); r.Removed || len(r.Changes) != 0 {
		t.Errorf("the second uninstall did %+v", r)
	}
}

// Every sample that can be installed is there again after uninstall, byte for byte.
func TestInstallAndUninstallSamples(t *testing.T) {
	for _, path := range samples(t) {
		t.Run(filepath.Base(path), func(t *testing.T) {
			name := "10-net" + filepath.Ext(path)
			b := newBed(t, map[string]string{name: string(read(t, path)), "20-other.conf": sample(t, "terway.conf")})
			b.opts.BinDir = b.bin
			b.opts.DryRun = true // refuses without waiting for a better file
			_, refused := b.opts.Install(t.Context())
			b.opts.DryRun = false
			before := tree(t, b.conf)
			if refused != nil {
				if !errors.Is(refused, ErrRefused) {
					t.Error(refused)
				}
				wantTree(t, b.conf, before)
				return
			}
			r := b.install()
			active, err := b.opts.activeIn(b.conf)
			if err != nil || !Has(active.Text) {
				t.Errorf("%s: error %v, report %+v", active.Path, err, r)
			}
			if again := b.install(); len(again.Changes) != 0 {
				t.Errorf("the second time did %+v", again)
			}
			if strings.HasPrefix(filepath.Base(path), "installed") {
				return // it had the entry before
			}
			b.uninstall(true)
			wantTree(t, b.conf, before)
		})
	}
}

// A .conf becomes a .conflist, and that wins; uninstall gives the .conf back.
func TestConversion(t *testing.T) {
	for _, ext := range []string{".conf", ".json"} {
		t.Run(ext, func(t *testing.T) {
			b := newBed(t, map[string]string{"10-crio" + ext: sample(t, "crio-old-bridge.conf"), "87-podman.conflist": sample(t, "podman.conflist")})
			if err := os.Chmod(filepath.Join(b.conf, "10-crio"+ext), 0o600); err != nil {
				t.Fatal(err)
			}
			before := tree(t, b.conf)
			r := b.install()
			if r.Conflist != filepath.Join(b.conf, "10-crio.conflist") || len(r.Changes) != 3 {
				t.Errorf("report %+v", r)
			}
			installed := map[string]string{
				"10-crio.conflist":            "-rw------- " + string(read(t, "testdata/golden/crio-old-bridge.conf")),
				"10-crio" + ext + savedSuffix: before["10-crio"+ext],
				"87-podman.conflist":          before["87-podman.conflist"],
			}
			wantTree(t, b.conf, installed)
			if again := b.install(); len(again.Changes) != 0 {
				t.Errorf("the second time did %+v", again)
			}

			// The primary writes its file anew, as it was or changed.
			for _, text := range []string{sample(t, "crio-old-bridge.conf"), sample(t, "terway.conf")} {
				text = strings.ReplaceAll(text, "terway", "bridge")
				b.write(filepath.Join(b.conf, "10-crio"+ext), text)
				if ext == ".json" {
					continue // comes after the list: nothing to do
				}
				b.install()
				list := read(t, filepath.Join(b.conf, "10-crio.conflist"))
				if want, err := Convert([]byte(text), conf.Entry); err != nil || !bytes.Equal(list, want) {
					t.Errorf("error %v, got\n%s\nwant\n%s", err, list, want)
				}
				if got := tree(t, b.conf); len(got) != 3 || !strings.HasSuffix(got["10-crio.conf"+savedSuffix], text) {
					t.Errorf("left are %q", got)
				}
			}

			// An interrupted install: both are there.
			if ext == ".conf" {
				if err := os.Rename(filepath.Join(b.conf, "10-crio.conf"+savedSuffix), filepath.Join(b.conf, "10-crio.conf")); err != nil {
					t.Fatal(err)
				}
				b.uninstall(true)
				if got := tree(t, b.conf); len(got) != 2 || !strings.HasSuffix(got["10-crio.conf"], "bandwidth\": true}\n}") {
					t.Errorf("left are %q", got)
				}
				return
			}
			b.uninstall(true)
			if got := tree(t, b.conf); len(got) != 2 || got["10-crio.conflist"] != "" {
				t.Errorf("left are %q", got)
			}
		})
	}
}

func TestConversionRoundTrip(t *testing.T) {
	b := newBed(t, map[string]string{"00-multus.conf": sample(t, "multus-thin.conf"), "10-flannel.conflist": sample(t, "flannel.conflist")})
	before := tree(t, b.conf)
	b.install()
	b.uninstall(true)
	wantTree(t, b.conf, before)

	// A list that somebody has changed is not thrown away.
	b.install()
	list := filepath.Join(b.conf, "00-multus.conflist")
	text := bytes.Replace(read(t, list), []byte(`"plugins"`), []byte(`"disableCheck": true, "plugins"`), 1)
	b.write(list, string(text))
	_, err := b.opts.Uninstall(t.Context(), false)
	if !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "00-multus.conflist was changed") {
		t.Errorf("error %v", err)
	}
	if got := tree(t, b.conf); len(got) != 3 || strings.Contains(got["00-multus.conflist"], "skipstack") || !strings.Contains(got["00-multus.conflist"], "disableCheck") {
		t.Errorf("left are %q", got)
	}

	// And one that has nothing to do with it is in the way.
	b = newBed(t, map[string]string{"10-n.conf": sample(t, "crio-old-bridge.conf"), "10-n.conflist": sample(t, "podman.conflist")})
	before = tree(t, b.conf)
	if _, err := b.opts.Install(t.Context()); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "in the way") {
		t.Errorf("error %v", err)
	}
	wantTree(t, b.conf, before)
}

// A file of somebody's that has the name under which the .conf would be saved is left
// alone, by uninstall too.
func TestSavedInTheWay(t *testing.T) {
	text := sample(t, "crio-old-bridge.conf")
	b := newBed(t, map[string]string{"10.conf": text, "10.conf" + savedSuffix: "somebody's"})
	before, beforeBin := tree(t, b.conf), tree(t, b.bin)
	if _, err := b.opts.Install(t.Context()); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "in the way") {
		t.Errorf("error %v", err)
	}
	b.uninstall(true)
	wantTree(t, b.conf, before)
	wantTree(t, b.bin, beforeBin)

	b = newBed(t, map[string]string{"10.conf": text, "10.conf" + savedSuffix: text})
	b.install()
	b.uninstall(true)
	if got := tree(t, b.conf); len(got) != 1 || !strings.HasSuffix(got["10.conf"], text) {
		t.Errorf("left are %q", got)
	}
}

// immutable makes a file or directory so until the test ends.
func immutable(t *testing.T, path string) {
	t.Helper()
	const immutableFlag = 0x10 // FS_IMMUTABLE_FL of linux/fs.h
	set := func(on bool) error {
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		flags, err := unix.IoctlGetInt(int(f.Fd()), unix.FS_IOC_GETFLAGS)
		if err != nil {
			return err
		}
		flags &^= immutableFlag
		if on {
			flags |= immutableFlag
		}
		return unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, flags)
	}
	if err := set(true); err != nil {
		t.Skipf("%s cannot be made immutable here: %v", path, err)
	}
	t.Cleanup(func() {
		if err := set(false); err != nil {
			t.Error(err)
		}
	})
}

// What the kernel denies in spite of the modes is a refusal, and the binary is then as
// it was, too.
func TestImmutable(t *testing.T) {
	for _, tc := range []struct{ name, path, binary string }{
		{"the directory", "etc/cni/net.d", ""},
		{"the list", "etc/cni/net.d/10.conflist", ""},
		{"the list, with another binary", "etc/cni/net.d/10.conflist", "version 0"},
		{"the plugins", "opt/cni/bin", ""},
		{"a single plugin's file", "etc/cni/net.d/05.conf", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b := newBed(t, map[string]string{"10.conflist": sample(t, "flannel.conflist")})
			if strings.HasSuffix(tc.path, ".conf") {
				b.write(filepath.Join(b.opts.Root, tc.path), sample(t, "crio-old-bridge.conf"))
			}
			if tc.binary != "" {
				b.write(filepath.Join(b.bin, plugin.Type), tc.binary)
			}
			before, beforeBin := tree(t, b.conf), tree(t, b.bin)
			immutable(t, filepath.Join(b.opts.Root, tc.path))
			if _, err := b.opts.Install(t.Context()); !errors.Is(err, ErrRefused) || !errors.Is(err, fs.ErrPermission) {
				t.Errorf("error %v", err)
			}
			wantTree(t, b.conf, before)
			wantTree(t, b.bin, beforeBin)
		})
	}
}

// Where it cannot be right nothing is changed, not even the binary placed.
func TestRefused(t *testing.T) {
	flannel := sample(t, "flannel.conflist")
	for _, tc := range []struct {
		name    string
		files   map[string]string
		prepare func(b *bed)
		want    string
		force   bool
	}{
		{name: "Cilium", files: map[string]string{"05-cilium.conflist": sample(t, "cilium.conflist")}, want: "cni.exclusive"},
		{name: "Cilium, forced", files: map[string]string{"05-cilium.conflist": sample(t, "cilium.conflist")}, force: true},
		{name: "link out", prepare: func(b *bed) {
			b.write(filepath.Join(b.opts.Root, "flannel"), flannel)
			b.link("../../../flannel", "10-flannel.conflist")
		}, want: "link out of the directory"},
		{name: "absolute link out", prepare: func(b *bed) {
			b.write(filepath.Join(b.opts.Root, "flannel"), flannel)
			b.link(filepath.Join(b.opts.Root, "flannel"), "10-flannel.conflist")
		}, want: "link out of the directory"},
		{name: "mounted ConfigMap", prepare: func(b *bed) {
			b.write(filepath.Join(b.conf, "..data/10-flannel.conflist"), flannel)
			b.link("..data/10-flannel.conflist", "10-flannel.conflist")
		}, want: "link out of the directory"},
		{name: "link inside", prepare: func(b *bed) {
			b.write(filepath.Join(b.conf, "flannel.txt"), flannel)
			b.link("flannel.txt", "10-flannel.conflist")
		}, force: true},
		{name: "loop", prepare: func(b *bed) { b.link("10-flannel.conflist", "10-flannel.conflist") }, want: "10-flannel.conflist"},
		{name: "dangling link", prepare: func(b *bed) { b.link("nowhere", "10-flannel.conflist") }, want: "cannot read it"},
		{name: "FIFO", prepare: func(b *bed) {
			if err := unix.Mkfifo(filepath.Join(b.conf, "10-flannel.conflist"), 0o600); err != nil {
				b.t.Fatal(err)
			}
			b.opts.BinDir = b.bin
		}, want: "not a regular file"},
		{name: "too large", files: map[string]string{"10-flannel.conflist": flannel + strings.Repeat(" ", plugin.MaxConflist)}, want: "larger than"},
		{name: "first is broken", files: map[string]string{"10-flannel.conflist": "{", "20.conflist": flannel}, want: "10-flannel.conflist: the container runtime cannot load it"},
		{name: "first is broken, another by name", files: map[string]string{"10-flannel.conflist": "{", "20.conflist": flannel}, prepare: func(b *bed) { b.opts.Conflist = "20.conflist" }, force: true},
		{name: "no network", want: "has the primary plugin started"},
		{name: "plugin not there", files: map[string]string{"10.conflist": strings.ReplaceAll(flannel, `"flannel"`, `"other"`)}, want: "--cni-bin-dir"},
		{name: "plugin with a path", files: map[string]string{"10.conflist": strings.ReplaceAll(flannel, `"flannel"`, `"../bin/flannel"`)}, want: "--cni-bin-dir"},
		{name: "binary is a directory", files: map[string]string{"10.conflist": flannel}, prepare: func(b *bed) { b.mkdir(filepath.Join(b.bin, "skipstack")) }, want: "not a regular file"},
		{name: "binary is a link", files: map[string]string{"10.conflist": flannel}, prepare: func(b *bed) {
			if err := os.Symlink("flannel", filepath.Join(b.bin, "skipstack")); err != nil {
				b.t.Fatal(err)
			}
		}, want: "symbolic link"},
		{name: "another name", files: map[string]string{"10.conflist": flannel}, prepare: func(b *bed) { b.opts.Conflist = "20.conflist" }, want: "20.conflist"},
		{name: "a path for a name", files: map[string]string{"10.conflist": flannel}, prepare: func(b *bed) { b.opts.Conflist = "../net.d/10.conflist" }, want: "not the name"},
		{name: "a list by name", files: map[string]string{"05.conflist": sample(t, "podman.conflist"), "10.conflist": flannel}, prepare: func(b *bed) { b.opts.Conflist = "10.conflist" }, force: true},
		{name: "two sites", files: map[string]string{"10.conflist": flannel}, prepare: func(b *bed) {
			b.write(filepath.Join(b.opts.Root, "var/lib/rancher/k3s/agent/etc/cni/net.d/10.conflist"), flannel)
		}, want: "--cni-conf-dir"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b := newBed(t, tc.files)
			if tc.prepare != nil {
				tc.prepare(b)
			}
			b.opts.Force = tc.force
			before, beforeBin := tree2(t, b.conf), tree2(t, b.bin)
			_, err := b.opts.Install(t.Context())
			if tc.want == "" {
				if err != nil {
					t.Fatal(err)
				}
				b.uninstall(true)
			} else if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %v, want %q", err, tc.want)
			}
			wantSameTree(t, b.conf, before)
			wantSameTree(t, b.bin, beforeBin)
		})
	}
}

func (b *bed) link(to, name string) {
	b.t.Helper()
	if err := os.Symlink(to, filepath.Join(b.conf, name)); err != nil {
		b.t.Fatal(err)
	}
}

// tree2 is tree for directories with other things than files.
func tree2(t testing.TB, dir string) map[string]string {
	t.Helper()
	all := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		all[path] = e.Type().String()
		if e.Type().IsRegular() {
			all[path] += string(read(t, path))
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func wantSameTree(t testing.TB, dir string, want map[string]string) {
	t.Helper()
	if got := tree2(t, dir); fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("%s has\n%q\nand had\n%q", dir, got, want)
	}
}

// The directories of known distributions are found by looking.
func TestFind(t *testing.T) {
	flannel := sample(t, "flannel.conflist")
	for _, tc := range []struct {
		name      string
		conf, bin string
		others    map[string]string // further files
	}{
		{name: "default", conf: "etc/cni/net.d", bin: "opt/cni/bin"},
		{name: "k3s", conf: "var/lib/rancher/k3s/agent/etc/cni/net.d", bin: "var/lib/rancher/k3s/data/cni"},
		{name: "k3s, an older release", conf: "var/lib/rancher/k3s/agent/etc/cni/net.d", bin: "var/lib/rancher/k3s/data/current/bin"},
		{name: "microk8s", conf: "var/snap/microk8s/current/args/cni-network", bin: "var/snap/microk8s/current/opt/cni/bin"},
		{name: "GKE", conf: "etc/cni/net.d", bin: "home/kubernetes/bin"},
		{name: "OpenShift", conf: "etc/kubernetes/cni/net.d", bin: "var/lib/cni/bin"},
		{name: "minikube", conf: "etc/cni/net.mk", bin: "opt/cni/bin"},
		{name: "Debian", conf: "etc/cni/net.d", bin: "usr/lib/cni"},
		{name: "both, containerd says which", conf: "etc/cni/net.mk", bin: "opt/cni/bin", others: map[string]string{
			"etc/cni/net.d/87-podman.conflist": sample(t, "podman.conflist"),
			"etc/containerd/config.toml":       "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".cni]\n  bin_dir = \"/opt/cni/bin\"\n  conf_dir = \"/etc/cni/net.mk\"\n",
		}},
		{name: "containerd 2", conf: "srv/cni", bin: "srv/bin", others: map[string]string{
			"etc/containerd/config.toml": "version = 3\n[plugins.'io.containerd.cri.v1.runtime'.cni]\n  bin_dirs = ['/nowhere', '/srv/bin']\n  conf_dir = '/srv/cni'\n",
		}},
		{name: "Debian's containerd, with two copies of the plugin", conf: "etc/cni/net.d", bin: "usr/lib/cni", others: map[string]string{
			"etc/containerd/config.toml": "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".cni]\n  bin_dir = \"/usr/lib/cni\"\n",
			"opt/cni/bin/flannel":        "plugin",
		}},
		{name: "CRI-O", conf: "srv/net.d", bin: "usr/libexec/cni", others: map[string]string{
			"etc/crio/crio.conf":            "[crio.network]\nnetwork_dir = \"/etc/cni/net.d\"\nplugin_dirs = [\"/opt/cni/bin\"]\n",
			"etc/crio/crio.conf.d/10-x":     "[crio.network]\nnetwork_dir = \"/srv/net.d\"\nplugin_dirs = [\n\t\"/opt/cni/bin\",\n\t\"/usr/libexec/cni\",\n]\n",
			"etc/cni/net.d/10-y.conflist":   sample(t, "podman.conflist"),
			"etc/crio/crio.conf.d/00-early": "[crio.network]\nnetwork_dir = \"/not/this\"\n",
		}},
		{name: "a broken configuration of containerd", conf: "etc/cni/net.d", bin: "opt/cni/bin", others: map[string]string{"etc/containerd/config.toml": "]["}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b := &bed{t: t, opts: Options{Root: t.TempDir()}}
			for name, text := range tc.others {
				b.write(filepath.Join(b.opts.Root, name), text)
			}
			b.mkdir(filepath.Join(b.opts.Root, "opt/cni/bin"))
			b.write(filepath.Join(b.opts.Root, tc.conf, "10-flannel.conflist"), flannel)
			b.plugin(filepath.Join(b.opts.Root, tc.bin), "flannel")
			got, err := b.opts.Find()
			want := Site{filepath.Join(b.opts.Root, tc.conf), filepath.Join(b.opts.Root, tc.bin)}
			if err != nil || got != want {
				t.Errorf("got %+v, error %v, want %+v", got, err, want)
			}
		})
	}
}

// The binary stays while the runtime remembers pods that were made with it.
func TestBinaryInUse(t *testing.T) {
	b := newBed(t, map[string]string{"10.conflist": sample(t, "flannel.conflist")})
	b.install()
	cache := filepath.Join(b.opts.Root, plugin.DefaultCNICacheDir, "results")
	remember := func(id string, list []byte) {
		b.write(filepath.Join(cache, "cbr0-"+id+"-eth0"), fmt.Sprintf(`{"kind":"cniCacheV1","containerId":%q,"config":%q,"ifName":"eth0","networkName":"cbr0"}`, id, base64.StdEncoding.EncodeToString(list)))
	}
	remember("old", []byte(sample(t, "flannel.conflist")))
	remember("pod1", read(t, "testdata/golden/flannel.conflist"))
	b.write(filepath.Join(cache, "ancient"), "{")
	r := b.uninstall(false)
	if r.Removed || !strings.Contains(r.Kept, "pod1") || !strings.Contains(r.Kept, "1 pod") || Has(read(t, filepath.Join(b.conf, "10.conflist"))) {
		t.Errorf("report %+v", r)
	}
	if err := os.Remove(filepath.Join(cache, "cbr0-pod1-eth0")); err != nil {
		t.Fatal(err)
	}
	if r := b.uninstall(false); !r.Removed {
		t.Errorf("report %+v", r)
	}
	b.install()
	remember("pod2", read(t, "testdata/golden/flannel.conflist"))
	if r := b.uninstall(true); !r.Removed {
		t.Errorf("report %+v", r)
	}

	// Nor does it go while Multus delegates to a list that has it.
	b.install()
	b.write(filepath.Join(b.conf, "00-multus.conf"), sample(t, "multus-delegates-to-skipstack.conf"))
	if r := b.uninstall(true); r.Removed || !strings.Contains(r.Kept, "00-multus.conf names it") {
		t.Errorf("report %+v", r)
	}
}

// While another skipstack is at it, one waits, and then says so.
func TestLock(t *testing.T) {
	b := newBed(t, map[string]string{"10.conflist": sample(t, "flannel.conflist")})
	d, err := openDir(t.Context(), b.conf, false)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := b.opts.Install(ctx); !errors.Is(err, ErrBusy) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error %v", err)
	}
	d.close()
	b.install()
}
