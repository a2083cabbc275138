package doctor

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"

	"github.com/skipstack/skipstack/plugin/verdict"
)

// sandboxed are programs of runtimes whose pods have a TCP stack of their own: their
// sockets are not this kernel's.
var sandboxed = []struct{ part, product string }{
	{"runsc", "gVisor"}, {"kata", "Kata Containers"}, {"firecracker", "Firecracker"},
}

func product(name string) string {
	for _, s := range sandboxed {
		if strings.Contains(strings.ToLower(name), s.part) {
			return s.product
		}
	}
	return ""
}

// runtimeConfigs are where container runtimes have their configuration.
var runtimeConfigs = []string{
	"/etc/containerd/config.toml", "/etc/containerd/conf.d/*.toml",
	"/var/lib/rancher/k3s/agent/etc/containerd/config.toml",
	"/var/lib/rancher/rke2/agent/etc/containerd/config.toml",
	"/etc/crio/crio.conf", "/etc/crio/crio.conf.d/*",
}

// sandboxes tells whether pods of some runtime class cannot be accelerated.
func (h *host) sandboxes() verdict.Probe {
	found := map[string][]string{} // by product: where it was found
	add := func(name, where string) {
		if p := product(name); p != "" && !slices.Contains(found[p], where) {
			found[p] = append(found[p], where)
		}
	}
	var unread []string
	for _, pattern := range runtimeConfigs {
		files, _ := filepath.Glob(h.path(pattern))
		for _, file := range files {
			var values []string
			raw, err := os.ReadFile(file)
			if err == nil {
				values, err = runtimeValues(raw)
			}
			where := "/" + strings.TrimPrefix(strings.TrimPrefix(file, h.root), "/")
			if err != nil {
				unread = append(unread, fmt.Sprintf("%s: %s", where, text(err)))
			}
			for _, v := range values {
				add(v, where)
			}
		}
	}
	for _, p := range h.processes {
		add(p.name, "running "+p.name)
	}
	for _, pattern := range []string{
		"/usr/bin/", "/usr/local/bin/", "/usr/local/sbin/", "/opt/kata/bin/", "/var/lib/rancher/k3s/data/current/bin/",
	} {
		for _, name := range []string{"runsc", "containerd-shim-runsc-v1", "kata-runtime", "containerd-shim-kata-v2"} {
			if _, err := os.Stat(h.path(pattern + name)); err == nil {
				add(name, pattern+name)
			}
		}
	}
	if len(found) > 0 {
		var all []string
		for _, s := range sandboxed {
			if where := found[s.product]; len(where) > 0 {
				all = append(all, fmt.Sprintf("%s (%s)", s.product, where[0]))
			}
		}
		return notOK(checkSandboxes, "pods of %s have a TCP stack of their own and are always plain", strings.Join(all, ", "))
	}
	if len(unread) > 0 {
		return couldNotTell(checkSandboxes, "%s", strings.Join(unread, "; "))
	}
	return ok(checkSandboxes, "no runtime with a TCP stack of its own was found")
}

// runtimeValues are the strings in a runtime's configuration that name runtimes' programs.
func runtimeValues(raw []byte) ([]string, error) {
	var doc map[string]any
	if err := toml.Unmarshal(raw, &doc); err != nil {
		return nil, fmt.Errorf("read TOML: %w", err)
	}
	var values []string
	var walk func(v any)
	walk = func(v any) {
		switch v := v.(type) {
		case map[string]any:
			for key, value := range v {
				s, isString := value.(string)
				switch key {
				// containerd, and CRI-O: crio.conf(5).
				case "runtime_type", "runtime_path", "BinaryName", "runtime_root":
					if isString {
						values = append(values, s)
					}
				}
				walk(value)
			}
		case []any:
			for _, value := range v {
				walk(value)
			}
		}
	}
	walk(doc)
	slices.Sort(values)
	return values, nil
}
