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

	"github.com/containernetworking/cni/libcni"

	"github.com/skipstack/skipstack/plugin/attachment"
	"github.com/skipstack/skipstack/plugin/datapath"
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

// serviceAddr is in the range that kubeadm gives to Services.
const serviceAddr = "10.96.0.10"

// A nodeSite is two pods that the bench has made, on a private node or on this one.
type nodeSite struct {
	node           *node.Node
	client, server *node.Pod
	set            *datapath.Set
	bpffs, runDir  string // skipstack's
	program        string // the plugin's
	network        string // name
	shared         bool   // the node has pods of others
	services       bool   // NAT rules may be made on the node
	command        func() *exec.Cmd
	stderr         io.Writer
	plugins        []string
	place          string // for the facts

	workers map[role]*remote
	service *node.Service
	verdict string
	noEpoll bool // the kernel does not wake epoll(7) for redirected bytes
}

// add attaches a pod to its network.
func (s *nodeSite) add(ctx context.Context, p *node.Pod, list *libcni.NetworkConfigList) error {
	s.network, s.plugins = list.Name, nil
	for _, p := range list.Plugins {
		s.plugins = append(s.plugins, p.Network.Type)
	}
	if err := s.addInTime(ctx, p, list); err != nil {
		return err
	}
	// A new port for each run and a whole range of clients' ports: connections in
	// TIME_WAIT never get in the way.
	return p.Do(widePortRange)
}

// addTries is how often a pod is added that the plugin had no time to accelerate.
const addTries = 5

// addInTime adds a pod again where a busy machine used up the time that the plugin
// takes at most: the pod is plain then, which is right for a user's pod.
func (s *nodeSite) addInTime(ctx context.Context, p *node.Pod, list *libcni.NetworkConfigList) error {
	for try := 1; ; try++ {
		if _, err := p.Add(ctx, list, node.IfName); err != nil {
			return err
		}
		record, err := s.attached(p)
		why := outOfTime(record, err)
		if why == "" || try == addTries {
			return err
		}
		fmt.Fprintf(s.stderr, "bench: pod %s was not accelerated in time (%s): trying again\n", p.Name, why)
		if err := p.Del(ctx, list, node.IfName); err != nil {
			return err
		}
	}
}

// outOfTime says what kept an ADD so long that it ended before it was done, "" where
// that is not why the pod is not attached. It may have had no time to record it.
func outOfTime(record attachment.Record, err error) string {
	switch {
	case errors.Is(err, attachment.ErrNotFound):
		return "busy: nothing is recorded"
	case !errors.Is(err, errNotAllowed):
		return ""
	case record.Status == attachment.Attaching:
		return "busy: it is half attached"
	case strings.HasPrefix(record.Reason, "busy: "):
		return record.Reason
	}
	return ""
}

func widePortRange() error {
	if err := os.WriteFile("/proc/sys/net/ipv4/ip_local_port_range", []byte("10000 65000"), 0); err != nil {
		return fmt.Errorf("widen the port range: %w", err)
	}
	return nil
}

func (s *nodeSite) worker(r role) (*remote, error) {
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

func (s *nodeSite) target(path Path) (netip.Addr, error) {
	switch path {
	case PodIP, IPv6:
		if addr, ok := s.server.Addr(path == IPv6); ok {
			return addr, nil
		}
		return netip.Addr{}, fmt.Errorf("%w: the server pod has no such address", errNoPath)
	case Loopback:
		return netip.AddrFrom4([4]byte{127, 0, 0, 1}), nil
	case ServiceIP:
		addr := netip.MustParseAddr(serviceAddr)
		if s.service != nil {
			return addr, nil
		}
		backend, ok := s.server.Addr(false)
		switch {
		case !s.services:
			return addr, fmt.Errorf("%w: no NAT rules are added to a node in use", errNoPath)
		case !ok:
			return addr, fmt.Errorf("%w: the server pod has no IPv4 address", errNoPath)
		}
		var err error
		// Without br_netfilter the reply would not pass the translation.
		s.service, err = s.node.AddService(node.ServiceOptions{IP: addr, Backend: backend, Masquerade: !s.node.HasBridgeNetfilter()})
		return addr, err
	}
	return netip.Addr{}, fmt.Errorf("unknown path %q", path)
}

func (s *nodeSite) socketPath() string { return filepath.Join(s.node.Dir, "reference.sock") }

func (s *nodeSite) counters() (datapath.Counters, error) {
	if s.shared {
		return s.podCounters()
	}
	return s.set.Counters()
}

// cannot says why a point cannot be measured; "" if it can.
func (s *nodeSite) cannot(p Point) string {
	if s.noEpoll && p.Connections > 1 {
		return "many connections: this kernel does not wake epoll(7) for redirected bytes"
	}
	return ""
}

func (s *nodeSite) rules() *rules {
	if s.shared {
		return podRules
	}
	return counterRules
}

func (s *nodeSite) runTimes() (map[string]datapath.RunTime, error) { return s.set.RunTimes() }

func (s *nodeSite) facts() Facts {
	return Facts{
		Network: s.place, Plugins: s.plugins,
		BridgeNetfilter: s.node.HasBridgeNetfilter(), Verdict: s.verdict,
	}
}

// close removes everything, and returns an error that wraps node.ErrLeftover if the
// pods left something on the node.
func (s *nodeSite) close() error {
	var failed []error
	for _, w := range s.workers {
		failed = append(failed, w.close())
	}
	if s.set != nil {
		failed = append(failed, s.set.Close())
	}
	if s.node != nil && s.shared {
		if err := s.node.Close(); err != nil {
			return errors.Join(append(failed, fmt.Errorf("%w: %w (the next bench with --conflist tries again)", node.ErrLeftover, err))...)
		}
		if left := s.left(); len(left) > 0 {
			failed = append(failed, fmt.Errorf("%w:\n%s", node.ErrLeftover, strings.Join(left, "\n")))
		}
	} else if s.node != nil {
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
