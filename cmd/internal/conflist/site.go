package conflist

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"
)

// Site is where a node's container runtime has its CNI configuration and plugins.
type Site struct {
	ConfDir string `json:"confDir"`
	BinDir  string `json:"binDir"`
}

// place is a configuration directory and the directories that its plugins may be in.
type place struct {
	confDir string
	binDirs []string
}

// usual are the directories of distributions that set no others in the runtime's
// configuration, or where that is not to be found.
func usual() []place {
	return []place{
		// k3s, and k3d, whose nodes run it: pkg/agent/config/config.go. Older
		// releases had plugins in data/current/bin.
		{"/var/lib/rancher/k3s/agent/etc/cni/net.d", []string{"/var/lib/rancher/k3s/data/cni", "/var/lib/rancher/k3s/data/current/bin"}},
		// microk8s: microk8s-resources/default-args/containerd-template.toml
		{"/var/snap/microk8s/current/args/cni-network", []string{"/var/snap/microk8s/current/opt/cni/bin"}},
		// OpenShift, whose machine config points CRI-O to where Multus writes.
		{"/etc/kubernetes/cni/net.d", []string{"/var/lib/cni/bin", "/opt/cni/bin"}},
		// Older releases of minikube: pkg/minikube/cni/cni.go
		{"/etc/cni/net.mk", []string{"/opt/cni/bin"}},
		// kubeadm, kind, minikube, Bottlerocket, EKS, AKS, RKE2; GKE's plugins are in
		// /home/kubernetes/bin, Debian's and Fedora's packages' in /usr.
		{"/etc/cni/net.d", []string{"/opt/cni/bin", "/home/kubernetes/bin", "/usr/lib/cni", "/usr/libexec/cni"}},
	}
}

// configured are the directories that container runtimes are configured to use.
// Files that are not there or not as expected say nothing.
func configured(root string) []place {
	var places []place
	for _, path := range []string{
		"/etc/containerd/config.toml",
		"/var/lib/rancher/k3s/agent/etc/containerd/config.toml",
		"/var/lib/rancher/rke2/agent/etc/containerd/config.toml",
	} {
		type cni struct {
			CNI struct {
				ConfDir string   `toml:"conf_dir"`
				BinDir  string   `toml:"bin_dir"`
				BinDirs []string `toml:"bin_dirs"`
			} `toml:"cni"`
		}
		var conf struct {
			Plugins struct {
				V1 cni `toml:"cri"`
				V2 cni `toml:"io.containerd.grpc.v1.cri"`
				V3 cni `toml:"io.containerd.cri.v1.runtime"`
			} `toml:"plugins"`
		}
		if !readTOML(filepath.Join(root, path), &conf) {
			continue
		}
		for _, c := range []cni{conf.Plugins.V1, conf.Plugins.V2, conf.Plugins.V3} {
			places = appendPlace(places, c.CNI.ConfDir, append(c.CNI.BinDirs, c.CNI.BinDir))
		}
	}
	// crio.conf(5); of the drop-in files the last that sets a key wins.
	var crio struct {
		CRIO struct {
			Network struct {
				Dir     string   `toml:"network_dir"`
				BinDirs []string `toml:"plugin_dirs"`
			} `toml:"network"`
		} `toml:"crio"`
	}
	drops, _ := filepath.Glob(filepath.Join(root, "/etc/crio/crio.conf.d/*"))
	for _, path := range append([]string{filepath.Join(root, "/etc/crio/crio.conf")}, drops...) {
		readTOML(path, &crio)
	}
	return appendPlace(places, crio.CRIO.Network.Dir, crio.CRIO.Network.BinDirs)
}

func appendPlace(places []place, confDir string, binDirs []string) []place {
	binDirs = slices.DeleteFunc(binDirs, func(dir string) bool { return !filepath.IsAbs(dir) })
	if len(binDirs) == 0 && confDir == "" {
		return places
	}
	if !filepath.IsAbs(confDir) {
		confDir = "/etc/cni/net.d" // the default of both
	}
	return append(places, place{confDir, binDirs})
}

func readTOML(path string, v any) bool {
	text, err := os.ReadFile(path)
	return err == nil && toml.Unmarshal(text, v) == nil
}

// places are all those that may be meant: what runtimes are configured to use comes
// first. Paths are below root.
func (o Options) places() []place {
	all := append(configured(o.Root), usual()...)
	for i := range all {
		all[i].confDir = filepath.Join(o.Root, all[i].confDir)
		dirs := make([]string, len(all[i].binDirs))
		for j, dir := range all[i].binDirs {
			dirs[j] = filepath.Join(o.Root, dir)
		}
		all[i].binDirs = dirs
	}
	return all
}

// confDirs are the existing directories of those that o means, each once.
func (o Options) confDirs(places []place) []string {
	if o.ConfDir != "" {
		return []string{o.ConfDir}
	}
	var dirs, seen []string
	for _, p := range places {
		real, err := filepath.EvalSymlinks(p.confDir)
		if info, statErr := os.Stat(p.confDir); err != nil || statErr != nil || !info.IsDir() || slices.Contains(seen, real) {
			continue
		}
		dirs, seen = append(dirs, p.confDir), append(seen, real)
	}
	return dirs
}

// binDirs are the existing directories that may hold the plugins of a configuration
// directory, the likeliest first. confDir may be empty: then all.
func (o Options) binDirs(places []place, confDir string) []string {
	if o.BinDir != "" {
		return []string{o.BinDir}
	}
	var dirs []string
	add := func(p place) {
		for _, dir := range p.binDirs {
			if info, err := os.Stat(dir); err == nil && info.IsDir() && !slices.Contains(dirs, dir) {
				dirs = append(dirs, dir)
			}
		}
	}
	for _, p := range places {
		if confDir == "" || p.confDir == confDir {
			add(p)
		}
	}
	if len(dirs) == 0 { // a directory that nobody knows
		for _, p := range places {
			add(p)
		}
	}
	return dirs
}

// Find says where the node's runtime has its configuration and plugins, by looking:
// at the runtimes' own configuration and at the directories of known distributions.
//
// The error wraps [ErrNoNetwork] where no directory has a network configuration, and
// [ErrRefused] where it cannot be told which is meant.
func (o Options) Find() (Site, error) {
	site, _, err := o.find()
	return site, err
}

// find also returns the name of the file that the runtime uses.
func (o Options) find() (Site, string, error) {
	places := o.places()
	dirs := o.confDirs(places)
	type result struct {
		network Network
		err     error
	}
	active := map[string]result{}
	var with []string
	for _, dir := range dirs {
		network, err := o.activeIn(dir)
		if errors.Is(err, ErrNoNetwork) {
			continue
		}
		active[dir] = result{network, err}
		with = append(with, dir)
	}
	if len(with) > 1 {
		// One that a runtime was told to use is meant.
		told := configured(o.Root)
		chosen := slices.DeleteFunc(slices.Clone(with), func(dir string) bool {
			return !slices.ContainsFunc(told, func(p place) bool { return filepath.Join(o.Root, p.confDir) == dir })
		})
		if len(chosen) == 1 {
			with = chosen
		}
	}
	switch len(with) {
	case 0:
		looked := o.ConfDir
		if looked == "" {
			all := make([]string, len(places))
			for i, p := range places {
				all[i] = p.confDir
			}
			slices.Sort(all)
			looked = strings.Join(slices.Compact(all), ", ")
		}
		if o.Conflist != "" {
			return Site{}, "", fmt.Errorf("%w %s in %s", ErrNoNetwork, o.Conflist, looked)
		}
		return Site{}, "", fmt.Errorf("%w in %s: has the primary plugin started? --cni-conf-dir names another directory", ErrNoNetwork, looked)
	case 1:
	default:
		return Site{}, "", refuse("there are networks in %s: say which is meant with --cni-conf-dir", strings.Join(with, " and "))
	}
	site := Site{ConfDir: with[0]}
	used := active[site.ConfDir]
	if used.err != nil {
		return site, "", used.err
	}
	var err error
	site.BinDir, err = o.binDir(places, site.ConfDir, used.network)
	return site, filepath.Base(used.network.Path), err
}

// activeIn is the network configuration in dir that the runtime uses, or that o names.
func (o Options) activeIn(path string) (Network, error) {
	root, err := os.OpenRoot(path)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) && o.ConfDir == "" {
			err = ErrNoNetwork
		}
		return Network{}, err
	}
	defer root.Close()
	return o.active(&dir{root: root})
}

func (o Options) active(d *dir) (Network, error) {
	if o.Conflist != "" {
		if !IsNetwork(o.Conflist) {
			return Network{}, refuse("%s is not the name of a network configuration in %s", o.Conflist, d.root.Name())
		}
		if _, err := d.root.Lstat(o.Conflist); errors.Is(err, fs.ErrNotExist) {
			return Network{}, fmt.Errorf("%w %s", ErrNoNetwork, d.path(o.Conflist))
		}
		n, err := load(d.path(o.Conflist))
		if err != nil {
			err = refuse("%s: %w", d.path(o.Conflist), err)
		}
		return n, err
	}
	found, broken, err := d.loadable()
	switch {
	case err != nil:
		return Network{}, err
	case broken != nil:
		return Network{}, refuse("%w; containerd stops there: mend or remove it, or name another with --conflist", broken)
	case len(found) == 0:
		return Network{}, fmt.Errorf("%w in %s", ErrNoNetwork, d.root.Name())
	}
	return found[0], nil
}

// binDir is the directory that has the network's first plugin.
func (o Options) binDir(places []place, confDir string, n Network) (string, error) {
	if o.BinDir != "" {
		return o.BinDir, nil
	}
	primary := n.Types[0]
	dirs := o.binDirs(places, confDir)
	for _, dir := range dirs {
		if filepath.Base(primary) != primary {
			break
		}
		if info, err := os.Stat(filepath.Join(dir, primary)); err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0 {
			return dir, nil
		}
	}
	looked := "no known directory"
	if len(dirs) > 0 {
		looked = strings.Join(dirs, ", ")
	}
	return "", refuse("the plugin %q of %s is not in %s: say where plugins are with --cni-bin-dir", primary, n.Path, looked)
}
