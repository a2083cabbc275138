package conflist

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containernetworking/cni/libcni"

	"github.com/skipstack/skipstack/plugin"
	"github.com/skipstack/skipstack/plugin/regular"
)

// Network is a network configuration that container runtimes can load.
type Network struct {
	Path  string
	Text  []byte
	Types []string // of its plugins, in order; at least one
}

// Networks lists the network configurations that runtimes can load from a directory,
// in the order of their names, as containerd (go-cni, opts.go) and CRI-O (ocicni.go)
// do: the first is the one that pods are made with, unless CRI-O is told another by
// cni_default_network. No directory is no error, and no network.
//
// broken, if not nil, says which file comes before the first of them, or alone, and
// cannot be loaded, and why: containerd stops there, CRI-O goes on.
func Networks(path string) (found []Network, broken, err error) {
	root, err := os.OpenRoot(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, nil
	}
	if err != nil {
		return nil, nil, err
	}
	defer root.Close()
	return (&dir{root: root}).loadable()
}

func (d *dir) loadable() (found []Network, broken, err error) {
	names, err := d.networks()
	if err != nil {
		return nil, nil, err
	}
	for _, name := range names {
		n, err := load(d.path(name))
		if err != nil {
			if _, statErr := d.root.Lstat(name); errors.Is(statErr, fs.ErrNotExist) {
				continue // removed meanwhile
			}
			if len(found) == 0 && broken == nil {
				broken = fmt.Errorf("%s: %w", d.path(name), err)
			}
			continue
		}
		found = append(found, n)
	}
	return found, broken, nil
}

// networks are the names of the files that runtimes load, in their order.
func (d *dir) networks() ([]string, error) {
	names, err := d.names()
	return slices.DeleteFunc(names, func(name string) bool { return !IsNetwork(name) }), err
}

// IsNetwork says whether a file of this name is one that runtimes load. A path is not.
func IsNetwork(name string) bool {
	return name == filepath.Base(name) && slices.Contains([]string{".conf", ".conflist", ".json"}, filepath.Ext(name))
}

// load reads a file as runtimes do: symbolic links lead anywhere. The error wraps
// errNotLoadable where the text may be half written.
func load(path string) (Network, error) {
	text, err := regular.Read(path, plugin.MaxConflist)
	if err != nil {
		return Network{}, fmt.Errorf("the container runtime cannot read it: %w", err)
	}
	types, err := pluginTypes(path, text)
	if err != nil {
		return Network{}, fmt.Errorf("%w: %w", errNotLoadable, err)
	}
	return Network{path, text, types}, nil
}

// pluginTypes lists the types of the plugins in a configuration, at least one. The
// error says why it cannot be loaded.
func pluginTypes(path string, text []byte) ([]string, error) {
	if !strings.HasSuffix(path, ".conflist") {
		conf, err := libcni.NetworkPluginConfFromBytes(text)
		if err != nil {
			return nil, err
		}
		return []string{conf.Network.Type}, nil
	}
	list, err := libcni.NetworkConfFromBytes(text)
	if err != nil {
		return nil, err
	}
	plugins := list.Plugins
	if !list.LoadOnlyInlinedPlugins && filepath.Base(list.Name) == list.Name {
		// Since libcni 1.3 a network may have plugins in files of their own.
		more, err := libcni.NetworkPluginConfsFromFiles(filepath.Dir(path), list.Name)
		if err != nil {
			return nil, err
		}
		plugins = append(plugins, more...)
	}
	if len(plugins) == 0 {
		return nil, errors.New("it has no plugins")
	}
	var types []string
	for _, p := range plugins {
		types = append(types, p.Network.Type)
	}
	return types, nil
}
