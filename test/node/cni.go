package node

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"os"
	"os/exec"
	"syscall"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"
	"golang.org/x/sys/unix"
)

// PluginType is skipstack's `type` in a conflist.
const PluginType = "skipstack"

// A Network describes a conflist for [Node.Network].
type Network struct {
	Name    string         // default "pods"
	Version string         // cniVersion; default 1.1.0
	Plugin  string         // bridge (default) or ptp
	Subnets []netip.Prefix // one for each address family; default 10.88.0.0/16 and fd00:88::/64
	// Skipstack is the plugin's entry without type and capabilities; nil: a
	// network without skipstack. The node's paths are filled in.
	Skipstack map[string]any
	// PrevResult: the pod's interface is there, as [Pod.Wire] makes it; the list has
	// no plugin but skipstack, which gets this result.
	PrevResult *types100.Result
}

// Network makes the conflist of a network on this node: bridge or ptp with
// host-local, and skipstack if wanted.
func (n *Node) Network(w Network) (*libcni.NetworkConfigList, error) {
	if w.Name == "" {
		w.Name = "pods"
	}
	if w.Version == "" {
		w.Version = "1.1.0"
	}
	if w.Plugin == "" {
		w.Plugin = "bridge"
	}
	if w.Subnets == nil {
		w.Subnets = []netip.Prefix{netip.MustParsePrefix("10.88.0.0/16"), netip.MustParsePrefix("fd00:88::/64")}
	}
	var ranges, routes []any
	for _, subnet := range w.Subnets {
		ranges = append(ranges, []any{map[string]any{"subnet": subnet.String()}})
		dst := "0.0.0.0/0"
		if subnet.Addr().Is6() {
			dst = "::/0"
		}
		routes = append(routes, map[string]any{"dst": dst})
	}
	main := map[string]any{"type": w.Plugin, "ipam": map[string]any{"type": "host-local", "ranges": ranges, "routes": routes}}
	if w.Plugin == "bridge" {
		main["bridge"], main["isGateway"], main["hairpinMode"] = "cni0", true, true
	}
	plugins := []any{main}
	if w.PrevResult != nil {
		plugins = nil
	}
	if w.Skipstack != nil {
		own := map[string]any{"type": PluginType, "capabilities": map[string]any{
			"cgroupPath": true, "io.kubernetes.cri.pod-annotations": true,
		}}
		maps.Copy(own, w.Skipstack)
		if w.PrevResult != nil {
			own["prevResult"] = w.PrevResult
		}
		plugins = append(plugins, own)
	}
	list, err := json.Marshal(map[string]any{"cniVersion": w.Version, "name": w.Name, "plugins": plugins})
	if err != nil {
		return nil, fmt.Errorf("make a conflist: %w", err)
	}
	return n.Conflist(list)
}

// Conflist parses a conflist and adapts it to the node: host-local keeps its leases
// in the node's directory, and skipstack gets the node's paths unless they
// are skipstack's defaults ([Options.DefaultPaths]). Keys that are set stay.
func (n *Node) Conflist(list []byte) (*libcni.NetworkConfigList, error) {
	return editConflist(list, func(plugin map[string]any) bool {
		if ipam, ok := plugin["ipam"].(map[string]any); ok && ipam["type"] == "host-local" {
			setDefault(ipam, "dataDir", n.IPAMDir)
		}
		if plugin["type"] == PluginType && n.ownPaths {
			setDefault(plugin, "bpffs", n.BPFFS)
			setDefault(plugin, "runDir", n.RunDir)
			setDefault(plugin, "cgroupRoot", n.CgroupRoot)
		}
		return true
	})
}

// ConflistFile is [Node.Conflist] on a file's content.
func (n *Node) ConflistFile(path string) (*libcni.NetworkConfigList, error) {
	list, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read a conflist: %w", err)
	}
	return n.Conflist(list)
}

// WithoutSkipstack returns the same network without the skipstack entry: its pods
// share the bridge with those of list, and are plain.
func WithoutSkipstack(list *libcni.NetworkConfigList) (*libcni.NetworkConfigList, error) {
	return editConflist(list.Bytes, func(plugin map[string]any) bool { return plugin["type"] != PluginType })
}

// editConflist lets edit change each plugin of a conflist, or drop it.
func editConflist(list []byte, edit func(plugin map[string]any) (keep bool)) (*libcni.NetworkConfigList, error) {
	var raw map[string]any
	if err := json.Unmarshal(list, &raw); err != nil {
		return nil, fmt.Errorf("parse a conflist: %w", err)
	}
	plugins, _ := raw["plugins"].([]any)
	kept := []any{}
	for _, p := range plugins {
		if plugin, ok := p.(map[string]any); !ok || edit(plugin) {
			kept = append(kept, p)
		}
	}
	raw["plugins"] = kept
	edited, err := json.Marshal(raw)
	if err != nil {
		return nil, fmt.Errorf("edit a conflist: %w", err)
	}
	parsed, err := libcni.NetworkConfFromBytes(edited)
	if err != nil {
		return nil, fmt.Errorf("parse a conflist: %w", err)
	}
	return parsed, nil
}

func setDefault(m map[string]any, key string, value any) {
	if _, ok := m[key]; !ok {
		m[key] = value
	}
}

// CNI returns a libcni whose plugins run in the node's network namespace.
func (n *Node) CNI() *libcni.CNIConfig {
	dirs := append([]string{n.BinDir}, n.pluginDirs...)
	return libcni.NewCNIConfigWithCacheDir(dirs, n.CacheDir, &pluginExec{thread: n.thread, log: n.log})
}

// pluginExec is libcni's default Exec, but for the thread that plugins are started on,
// whose network namespace they get, and for what it does when they are interrupted.
type pluginExec struct {
	thread *thread
	log    io.Writer
	version.PluginDecoder
}

// streamsDelay is how long processes that a plugin has started may hold its standard
// streams when it has ended, or was killed.
const streamsDelay = 3 * time.Second

func (e *pluginExec) FindInPath(plugin string, paths []string) (string, error) {
	return invoke.FindInPath(plugin, paths)
}

func (e *pluginExec) ExecPlugin(ctx context.Context, path string, stdin []byte, environ []string) ([]byte, error) {
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, path)
	cmd.Env, cmd.Stdin, cmd.Stdout, cmd.Stderr = environ, bytes.NewReader(stdin), &stdout, &stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
	cmd.WaitDelay = streamsDelay
	err := e.thread.do(cmd.Start)
	if err == nil {
		err = cmd.Wait()
	}
	if errors.Is(err, exec.ErrWaitDelay) {
		err = nil // the plugin itself has succeeded
	}
	if _, logErr := e.log.Write(stderr.Bytes()); err == nil && logErr != nil {
		return nil, fmt.Errorf("log of plugin %s: %w", path, logErr)
	}
	if err == nil {
		return stdout.Bytes(), nil
	}
	var coded types.Error
	if json.Unmarshal(stdout.Bytes(), &coded) == nil && (coded.Code != 0 || coded.Msg != "") {
		return nil, &coded
	}
	return nil, errors.Join(fmt.Errorf("plugin %s: %w", path, err), textError(stdout.String()), textError(stderr.String()))
}

// textError makes an error of what a plugin printed, if it printed something.
func textError(s string) error {
	if s == "" {
		return nil
	}
	return errors.New(s)
}
