package doctor

import (
	"bytes"
	"encoding/json"
	"fmt"
	"path/filepath"
	"slices"

	"github.com/skipstack/skipstack/cmd/internal/conflist"
	"github.com/skipstack/skipstack/plugin"
	"github.com/skipstack/skipstack/plugin/regular"
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

// FindConflist looks for the network that the container runtime uses. Where that has
// no entry of skipstack, it is the first that has.
func FindConflist(dir string) (Conflist, error) {
	networks, broken, err := conflist.Networks(dir)
	if err != nil {
		return Conflist{}, fmt.Errorf("look for the network configuration: %w", err)
	}
	var found Conflist
	if broken != nil {
		found.Broken = broken.Error()
	}
	if len(networks) > 0 {
		found.Used = networks[0].Path
	}
	at := slices.IndexFunc(networks, func(n conflist.Network) bool { return slices.Contains(n.Types, plugin.Type) })
	if at >= 0 {
		found.Path = networks[at].Path
		found.describe(networks[at].Text)
	}
	return found, nil
}

// ReadConflist describes a conflist that was named.
func ReadConflist(path string) Conflist {
	c := Conflist{Path: path, Used: path}
	if raw, err := regular.Read(path, plugin.MaxConflist); err == nil {
		c.describe(raw)
	}
	return c
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
