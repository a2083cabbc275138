package bench

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/skipstack/skipstack/plugin/attachment"
	"github.com/skipstack/skipstack/plugin/datapath"
	"github.com/skipstack/skipstack/plugin/verdict"
	"github.com/skipstack/skipstack/test/node"
)

// errNotAllowed is returned where the pods of the bench may not be accelerated.
var errNotAllowed = errors.New("the bench's pods are not accelerated")

// A site is where the bench runs: two pods, and workers in them.
type site interface {
	// worker returns the worker of a role, which it starts when first asked.
	worker(role) (*remote, error)
	// target prepares a path and returns the server's address on it.
	target(Path) (netip.Addr, error)
	// counters reads what the datapath has counted.
	counters() (datapath.Counters, error)
	// facts are for the result's header.
	facts() Facts
}

// A localSite's pods share a file system.
type localSite interface {
	// socketPath is where an AF_UNIX server may listen.
	socketPath() string
}

const (
	// gateTimeout is how long a first probe of the kernel may take.
	gateTimeout = 30 * time.Second
	// serviceAddr is in the range that kubeadm gives to Services.
	serviceAddr = "10.96.0.10"
)

// requiredPlugins are needed in --cni-path.
var requiredPlugins = []string{"bridge", "host-local"}

// privateSite is a private node with two pods on a bridge, made by the real chain.
type privateSite struct {
	node           *node.Node
	client, server *node.Pod
	set            *datapath.Set
	command        func() *exec.Cmd
	stderr         io.Writer
	plugins        []string

	workers map[role]*remote
	service *node.Service
	verdict string
}

// privateOptions say how a private site is made.
type privateOptions struct {
	cniPath string
	program string           // skipstack's
	worker  func() *exec.Cmd // the worker's command
	stderr  io.Writer
	mode    string // annotation skipstack/mode of the pods
}

// newPrivateSite makes the node and its pods, and waits until the datapath says that
// their connections will be accelerated. Close the site after use, even on error.
func newPrivateSite(ctx context.Context, o privateOptions) (s *privateSite, err error) {
	pluginLog := &lockedBuffer{}
	s = &privateSite{command: o.worker, stderr: o.stderr, workers: map[role]*remote{}}
	s.node, err = node.New(node.Options{
		Name:       "bench",
		PluginDirs: []string{o.cniPath},
		Plugins:    map[string]string{node.PluginType: o.program},
		Log:        pluginLog,
	})
	if err != nil {
		return s, err
	}
	// splice: the workers call only send and recv. blocking: as netperf's, their
	// sockets block; one thread reads each, gets no signals, and takes EAGAIN.
	list, err := s.node.Network(node.Network{
		Name:      "skipstack-bench",
		Skipstack: map[string]any{"acceptRisks": []string{"splice", "blocking"}},
	})
	if err != nil {
		return s, err
	}
	for _, p := range list.Plugins {
		s.plugins = append(s.plugins, p.Network.Type)
	}
	annotations := map[string]string{"skipstack/mode": o.mode}
	for _, pod := range []struct {
		name string
		p    **node.Pod
	}{{string(serverPod), &s.server}, {string(clientPod), &s.client}} {
		if *pod.p, err = s.node.AddPod(ctx, pod.name, list, node.PodOptions{Namespace: "bench", Annotations: annotations}); err != nil {
			return s, err
		}
		// A new port for each run and a whole range of clients' ports: connections
		// in TIME_WAIT never get in the way.
		if err := (*pod.p).Do(widePortRange); err != nil {
			return s, err
		}
		if _, err := s.attached(list.Name, *pod.p); err != nil {
			return s, errors.Join(err, textError(pluginLog.String()))
		}
	}
	if err := s.waitForGate(ctx, list.Name); err != nil {
		return s, errors.Join(err, textError(pluginLog.String()))
	}
	return s, nil
}

func widePortRange() error {
	if err := os.WriteFile("/proc/sys/net/ipv4/ip_local_port_range", []byte("10000 65000"), 0); err != nil {
		return fmt.Errorf("widen the port range: %w", err)
	}
	return nil
}

// attached says that ADD has attached a pod, or why it has not.
func (s *privateSite) attached(network string, p *node.Pod) (attachment.Record, error) {
	record, err := attachment.NewStore(s.node.RunDir).Get(attachment.Key{Network: network, ContainerID: p.ID, IfName: node.IfName})
	if err != nil {
		return record, fmt.Errorf("read the attachment of pod %s: %w", p.Name, err)
	}
	if record.Status != attachment.Attached {
		return record, fmt.Errorf("%w: pod %s: %s: %s", errNotAllowed, p.Name, record.Status, record.Reason)
	}
	return record, nil
}

// waitForGate waits until the kernel's verdict is in and the node's gate open, and
// checks what follows for the two pods.
func (s *privateSite) waitForGate(ctx context.Context, network string) error {
	ctx, cancel := context.WithTimeout(ctx, gateTimeout)
	defer cancel()
	for {
		v, err := verdict.Cached(s.node.RunDir)
		if err == nil && v.Level == verdict.Unsupported {
			return fmt.Errorf("%w: the kernel's verdict is %s", errNotAllowed, v)
		}
		var settings datapath.NodeSettings
		if err == nil && s.set == nil {
			s.set, err = datapath.Open(s.node.BPFFS)
		}
		if err == nil {
			settings, err = s.set.Node()
		}
		if err == nil && settings.Open {
			s.verdict = v.String()
			return errors.Join(s.accelerated(network, s.client, settings), s.accelerated(network, s.server, settings))
		}
		select {
		case <-ctx.Done():
			return errors.Join(fmt.Errorf("%w: no verdict on this kernel after %v", errNotAllowed, gateTimeout), err)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// accelerated checks that connections of a pod will be accelerated.
func (s *privateSite) accelerated(network string, p *node.Pod, n datapath.NodeSettings) error {
	record, err := s.attached(network, p)
	if err != nil {
		return err
	}
	settings, known, err := s.set.Pod(record.CgroupID)
	if err != nil {
		return err
	}
	if !known || !n.Accelerates(settings) {
		return fmt.Errorf("%w: pod %s: the kernel's verdict is %s, the pod accepts [%s]", errNotAllowed, p.Name, s.verdict, settings.Accepted)
	}
	return nil
}

func (s *privateSite) worker(r role) (*remote, error) {
	if w := s.workers[r]; w != nil {
		return w, nil
	}
	pod := s.server
	if r.pod == clientPod {
		pod = s.client
	}
	var where node.StartOptions
	if !r.accelerated {
		// As deep as the pod's own, outside it.
		dir, err := s.node.Cgroup(filepath.Join("plain/burstable", "pod"+pod.UID, pod.ID))
		if err != nil {
			return nil, err
		}
		where.Cgroup = dir
	}
	cmd := s.command()
	cmd.Env = workerEnv(cmd.Env)
	cmd.Stderr = s.stderr
	w, err := newRemote(r, cmd, func(cmd *exec.Cmd) (func() error, error) {
		p, err := pod.Start(cmd, where)
		if err != nil {
			return nil, err
		}
		return p.Wait, nil
	})
	if err != nil {
		return nil, err
	}
	s.workers[r] = w
	return w, nil
}

func (s *privateSite) target(path Path) (netip.Addr, error) {
	switch path {
	case PodIP, IPv6:
		if addr, ok := s.server.Addr(path == IPv6); ok {
			return addr, nil
		}
		return netip.Addr{}, fmt.Errorf("the server pod has no address for path %s", path)
	case Loopback:
		return netip.AddrFrom4([4]byte{127, 0, 0, 1}), nil
	case ServiceIP:
		addr := netip.MustParseAddr(serviceAddr)
		if s.service != nil {
			return addr, nil
		}
		backend, _ := s.server.Addr(false)
		var err error
		// Without br_netfilter the reply would not pass the translation.
		s.service, err = s.node.AddService(node.ServiceOptions{IP: addr, Backend: backend, Masquerade: !s.node.HasBridgeNetfilter()})
		return addr, err
	}
	return netip.Addr{}, fmt.Errorf("unknown path %q", path)
}

func (s *privateSite) socketPath() string { return filepath.Join(s.node.Dir, "reference.sock") }

func (s *privateSite) counters() (datapath.Counters, error) { return s.set.Counters() }

func (s *privateSite) runTimes() (map[string]datapath.RunTime, error) { return s.set.RunTimes() }

func (s *privateSite) facts() Facts {
	return Facts{
		Network: "private node: " + strings.Join(s.plugins, " + "), Plugins: s.plugins,
		BridgeNetfilter: s.node.HasBridgeNetfilter(), Verdict: s.verdict,
	}
}

// close removes everything, and returns an error that wraps node.ErrLeftover if the
// pods left something on the node.
func (s *privateSite) close() error {
	var failed []error
	for _, w := range s.workers {
		failed = append(failed, w.close())
	}
	if s.set != nil {
		failed = append(failed, s.set.Close())
	}
	if s.node != nil {
		left, err := s.node.ClosePods()
		failed = append(failed, err)
		if len(left) > 0 {
			failed = append(failed, fmt.Errorf("%w:\n%s", node.ErrLeftover, strings.Join(left, "\n")))
		}
		failed = append(failed, s.node.Close())
	}
	return errors.Join(failed...)
}

// A lockedBuffer collects what plugins say.
type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return strings.TrimSpace(b.buf.String())
}

func textError(s string) error {
	if s == "" {
		return nil
	}
	return errors.New(s)
}
