package doctor

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containernetworking/cni/libcni"

	"github.com/skipstack/skipstack/plugin"
)

// Conflist is a network configuration that the examination goes by.
type Conflist struct {
	Path string // "": none has an entry of skipstack, and the defaults hold
	// Used is the file that a container runtime uses, "" where there is none. It may
	// be another one, as where Multus delegates to the network.
	Used string
	// Missing are the capabilities that skipstack knows and its entry does not
	// declare.
	Missing []string
	// Broken says which file before Used cannot be loaded, and why; "" for none.
	// containerd stops at it.
	Broken string
	First  bool // the entry is the first, so there is no prevResult
}

// capabilities are those that skipstack makes use of, and what is lost without.
var capabilities = []struct{ name, lost string }{
	{"cgroupPath", "pods are found by their UID alone"},
	{"io.kubernetes.cri.pod-annotations", "annotations of pods are not seen"},
	{"bandwidth", "bandwidth limits are seen in annotations alone"},
}

// FindConflist looks for the conflist that the container runtime uses: the first by
// name that can be loaded, as containerd (go-cni, opts.go) and CRI-O (ocicni) do.
// Where that has no entry of skipstack, it is the first that has.
func FindConflist(dir string) (Conflist, error) {
	var found Conflist
	files, err := libcni.ConfFiles(dir, []string{".conf", ".conflist", ".json"})
	if errors.Is(err, fs.ErrNotExist) || err == nil && len(files) == 0 {
		return found, nil
	}
	if err != nil {
		return found, fmt.Errorf("look for the network configuration: %w", err)
	}
	slices.Sort(files)
	for _, path := range files {
		var types []string
		raw, err := os.ReadFile(path)
		if err == nil {
			types, err = pluginTypes(path, raw)
		}
		if err != nil { // no runtime can load it
			if found.Used == "" && found.Broken == "" {
				found.Broken = fmt.Sprintf("%s: %v", path, err)
			}
			continue
		}
		if found.Used == "" {
			found.Used = path
		}
		if slices.Contains(types, plugin.Type) {
			found.Path = path
			found.describe(raw)
			break
		}
	}
	return found, nil
}

// ReadConflist describes a conflist that was named.
func ReadConflist(path string) Conflist {
	c := Conflist{Path: path, Used: path}
	if raw, err := os.ReadFile(path); err == nil {
		c.describe(raw)
	}
	return c
}

// pluginTypes lists the types of the plugins in a configuration, at least one. The
// error says why it cannot be loaded.
func pluginTypes(path string, raw []byte) ([]string, error) {
	if !strings.HasSuffix(path, ".conflist") {
		conf, err := libcni.NetworkPluginConfFromBytes(raw)
		if err != nil {
			return nil, err
		}
		if conf.Network.Type == "" {
			return nil, errors.New("it has no type")
		}
		return []string{conf.Network.Type}, nil
	}
	list, err := libcni.NetworkConfFromBytes(raw)
	if err != nil {
		return nil, err
	}
	if len(list.Plugins) == 0 {
		return nil, errors.New("it has no plugins")
	}
	var types []string
	for _, p := range list.Plugins {
		types = append(types, p.Network.Type)
	}
	return types, nil
}

// describe looks at skipstack's entry.
func (c *Conflist) describe(raw []byte) {
	type entry struct {
		Type         string          `json:"type"`
		Capabilities map[string]bool `json:"capabilities"`
	}
	var list struct {
		Plugins []entry `json:"plugins"`
	}
	// Numbers and the like in other entries are nothing to fail for.
	if json.NewDecoder(bytes.NewReader(raw)).Decode(&list) != nil {
		return
	}
	for i, e := range list.Plugins {
		if e.Type != plugin.Type {
			continue
		}
		c.First = i == 0
		for _, known := range capabilities {
			if !e.Capabilities[known.name] {
				c.Missing = append(c.Missing, known.name)
			}
		}
	}
}

// name is the conflist's, for people.
func (c Conflist) name() string {
	if c.Path == "" {
		return "no conflist, defaults"
	}
	return filepath.Clean(c.Path)
}
