package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os/exec"
	"strings"

	"github.com/skipstack/skipstack/test/node"
)

// privateOptions say how a private site is made.
type privateOptions struct {
	cniPath string
	program string           // skipstack's
	worker  func() *exec.Cmd // the worker's command
	stderr  io.Writer
	mode    string // annotation skipstack/mode of the pods
}

// chainPlugins make the pods' network, where they are in --cni-path.
var chainPlugins = []string{"bridge", "host-local"}

// wiredAddrs are the addresses of the server and the client where netlink makes the
// network.
var wiredAddrs = map[podName][]netip.Prefix{
	serverPod: {netip.MustParsePrefix("10.88.0.2/16"), netip.MustParsePrefix("fd00:88::2/64")},
	clientPod: {netip.MustParsePrefix("10.88.0.3/16"), netip.MustParsePrefix("fd00:88::3/64")},
}

// newPrivateSite makes a private node and its pods, and waits until the datapath says
// that their connections will be accelerated. Close the site after use, even on error.
func newPrivateSite(ctx context.Context, o privateOptions) (s *nodeSite, err error) {
	pluginLog := &lockedBuffer{}
	s = &nodeSite{command: o.worker, stderr: o.stderr, workers: map[role]*remote{}, services: true}
	defer func() {
		if err != nil {
			err = errors.Join(err, textError(pluginLog.String()))
		}
	}()
	s.node, err = node.New(node.Options{
		Name:       "bench",
		PluginDirs: []string{o.cniPath},
		Plugins:    map[string]string{node.PluginType: o.program},
		Log:        pluginLog,
	})
	if err != nil {
		return s, err
	}
	s.bpffs, s.runDir, s.program = s.node.BPFFS, s.node.RunDir, o.program
	missing := missingPlugin(o.cniPath, chainPlugins)
	if missing != "" {
		fmt.Fprintf(o.stderr, "bench: no CNI plugin %s in %s: making veth and bridge by netlink\n", missing, o.cniPath)
	}
	for _, pod := range []struct {
		name podName
		p    **node.Pod
	}{{serverPod, &s.server}, {clientPod, &s.client}} {
		*pod.p, err = s.node.NewPod(string(pod.name), node.PodOptions{
			Namespace: "bench", Annotations: map[string]string{"skipstack/mode": o.mode},
		})
		if err != nil {
			return s, err
		}
		// splice: the workers call only send and recv. blocking: as netperf's, their
		// sockets block; one thread reads each, gets no signals, and takes EAGAIN.
		network := node.Network{Name: "skipstack-bench", Skipstack: map[string]any{"acceptRisks": []string{"splice", "blocking"}}}
		if missing != "" {
			if network.PrevResult, err = (*pod.p).Wire("cni0", wiredAddrs[pod.name]); err != nil {
				return s, err
			}
		}
		list, err := s.node.Network(network)
		if err != nil {
			return s, err
		}
		if err := s.add(ctx, *pod.p, list); err != nil {
			return s, err
		}
	}
	s.place = "private node: " + strings.Join(s.plugins, " + ")
	if missing != "" {
		s.place = "private node: veth and bridge by netlink + " + strings.Join(s.plugins, " + ")
	}
	return s, s.waitForGate(ctx)
}
