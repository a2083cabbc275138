package runtimes_test

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/plugin/datapath"
	"github.com/skipstack/skipstack/test/must"
	"github.com/skipstack/skipstack/test/node"
	"github.com/skipstack/skipstack/test/report"
	"github.com/skipstack/skipstack/test/runtimes/containerd"
	"github.com/skipstack/skipstack/test/runtimes/cri"
)

// A site is a node with a runtime.
type site struct {
	*node.Node
	t      *testing.T
	daemon *containerd.Daemon
	client *cri.Client
}

// eachRuntime runs a test on a new node for each runtime.
func eachRuntime(t *testing.T, f func(s *site)) {
	node.Need(t)
	for _, series := range series {
		p := must.Get(programs(t.Context(), series))(t)
		t.Run("containerd "+p.Version, func(t *testing.T) { f(newSite(t, p)) })
	}
}

func newSite(t *testing.T, p *containerd.Programs) *site {
	t.Helper()
	s := &site{Node: node.ForTest(t, node.Options{DefaultPaths: true}), t: t}

	// The sockets' names must be short, and what a killed test leaves must go with
	// the private machine.
	dir := must.Get(os.MkdirTemp("/run", "cd"))(t)
	t.Cleanup(func() {
		// The last two are what runc and the runtime make where nothing tells them.
		for _, d := range []string{dir, "/run/containerd", "/run/netns"} {
			wait(t, func() error { return os.RemoveAll(d) }) // shims that end may still write there
		}
	})
	for _, program := range []string{"bridge", "host-local", "loopback", "portmap", "skipstack"} {
		must.Do(t, s.Install(program, filepath.Join(node.ProgramDir(), program)))
	}
	s.writeConflist()
	image := filepath.Join(dir, "image.tar")
	must.Do(t, containerd.WriteImage(image, filepath.Join(node.ProgramDir(), "peer")))
	s.daemon = must.Get(containerd.New(containerd.Options{
		Programs: p, Dir: dir, CNIBin: s.BinDir, CNIConf: s.ConfDir, Enter: must.Get(enterV1())(t),
	}))(t)
	s.start()
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("containerd says:\n%s", s.daemon.Log())
		}
		must.Do(t, s.daemon.Stop())
	})
	must.Do(t, s.daemon.Import(t.Context(), image))
	s.client = must.Get(cri.Dial(s.daemon.Socket(), filepath.Join(dir, "logs")))(t)
	t.Cleanup(func() { must.Do(t, s.client.Close()) })
	wait(t, func() error { return s.client.NetworkReady(t.Context()) })
	t.Attr(report.AttrRuntime, fmt.Sprintf("containerd %s, runc %s", p.Version, must.Get(runcVersion(t.Context(), p))(t)))
	t.Attr(report.AttrCgroups, must.Get(cgroups())(t))
	return s
}

// works says for docs/support.md what the test has seen so far.
func (s *site) works(what string) {
	if !s.t.Failed() {
		s.t.Attr(report.AttrWorks, what)
	}
}

func runcVersion(ctx context.Context, p *containerd.Programs) (string, error) {
	cmd := exec.CommandContext(ctx, "env", "runc", "--version")
	cmd.Env = []string{"PATH=" + p.Path}
	out, err := cmd.Output()
	if f := strings.Fields(string(out)); err == nil && len(f) >= 3 {
		return f[2], nil
	}
	return "", fmt.Errorf("runc --version says %q, %w", out, err)
}

// cgroups says what the runtimes see. runc needs controllers of cgroup v2 where
// there is no v1, and a controller that is bound to v1 on the machine is to be had
// in no private view: so these tests run in whatever view the machine has. Package
// test/cni runs the plugin in both.
func cgroups() (string, error) {
	v1, err := hierarchies()
	if len(v1) > 0 {
		return "hybrid: v1 and v2", err
	}
	return "v2", err
}

// start starts the runtime in the node's network namespace.
func (s *site) start() {
	s.t.Helper()
	must.Do(s.t, s.Do(func() error { return s.daemon.Start(context.WithoutCancel(s.t.Context())) }))
}

// writeConflist writes the bridge conflist of conf/ as an administrator changes it:
// both address families, and portmap in front of skipstack.
func (s *site) writeConflist() {
	s.t.Helper()
	list := must.Get(s.ConflistFile("../../conf/10-bridge-accept-splice.conflist"))(s.t)
	var raw map[string]any
	must.Do(s.t, json.Unmarshal(list.Bytes, &raw))
	plugins := raw["plugins"].([]any)
	ipam := plugins[0].(map[string]any)["ipam"].(map[string]any)
	ipam["ranges"] = append(ipam["ranges"].([]any), []any{map[string]any{"subnet": "fd00:85::/64"}})
	ipam["routes"] = append(ipam["routes"].([]any), map[string]any{"dst": "::/0"})
	portmap := map[string]any{"type": "portmap", "backend": "nftables", "capabilities": map[string]any{"portMappings": true}}
	raw["plugins"] = []any{plugins[0], portmap, plugins[1]}
	must.Do(s.t, os.WriteFile(filepath.Join(s.ConfDir, "10-bridge.conflist"), must.Get(json.Marshal(raw))(s.t), 0o600))
}

func random() string {
	var b [8]byte
	rand.Read(b[:])
	return hex.EncodeToString(b[:])
}

// A pod is a sandbox with its place in the cgroup tree.
type pod struct {
	*cri.Pod
	s        *site
	name     string
	uid      string
	cgroup   string // directory
	cgroupID uint64
	ip, ip6  string
}

// pod makes a pod as a kubelet with the cgroupfs driver does: its cgroup first.
func (s *site) pod(name string, o cri.PodOptions) *pod {
	s.t.Helper()
	return must.Get(s.newPod(name, o))(s.t)
}

func (s *site) newPod(name string, o cri.PodOptions) (*pod, error) {
	p := &pod{s: s, name: name, uid: fmt.Sprintf("%s-%s-%s", random()[:8], random()[:4], random())}
	parent := "kubepods/burstable/pod" + p.uid
	dir, err := s.Cgroup(parent)
	if err != nil {
		return nil, err
	}
	p.cgroup = dir
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return nil, err
	}
	p.cgroupID = st.Ino
	o.Name, o.UID, o.CgroupParent = name, p.uid, "/"+parent
	if p.Pod, err = s.client.RunPod(s.t.Context(), o); err != nil {
		return nil, err
	}
	s.t.Cleanup(func() {
		if err := p.remove(); err != nil {
			s.t.Errorf("remove pod %s: %v", name, err)
		}
	})
	addrs, err := p.Addresses(s.t.Context())
	if err != nil {
		return nil, err
	}
	if len(addrs) != 2 {
		return nil, fmt.Errorf("pod %s has the addresses %s, want two", name, join(addrs))
	}
	p.ip, p.ip6 = addrs[0], addrs[1]
	return p, nil
}

// remove is what a kubelet does: the pod, then its cgroup.
func (p *pod) remove() error {
	err := p.Remove(context.WithoutCancel(p.s.t.Context()))
	if rmErr := unix.Rmdir(p.cgroup); rmErr != nil && !errors.Is(rmErr, unix.ENOENT) {
		err = errors.Join(err, fmt.Errorf("remove %s: %w", p.cgroup, rmErr))
	}
	return err
}

// run starts a container of the pod.
func (p *pod) run(name string, attempt uint32, args ...string) *cri.Container {
	p.s.t.Helper()
	return must.Get(p.Start(p.s.t.Context(), name, attempt, containerd.Image, args...))(p.s.t)
}

// A conversation is what peer's talk prints.
type conversation struct {
	Bytes, SentByTCP, ReceivedByTCP uint64
	Failure                         string
}

const messages = 500

// talk lets a program in the container talk to a server, which may be starting.
func (s *site) talk(c *cri.Container, addr string) conversation {
	s.t.Helper()
	var r conversation
	wait(s.t, func() error { return c.Run(s.t.Context(), &r, "/peer", "talk", addr, strconv.Itoa(messages)) })
	if r.Failure != "" {
		s.t.Fatalf("%s: %s", addr, r.Failure)
	}
	return r
}

// accelerated checks that a conversation went past the stack: of what arrived, TCP
// has seen next to nothing, and the pods' counters say so too. On a busy machine a
// client may claim its connection too late, which stays plain then, by design: another
// conversation follows, but not for ever.
func (s *site) accelerated(c *cri.Container, addr string, pods ...*pod) {
	s.t.Helper()
	for _, p := range pods {
		s.attached(p, true)
	}
	var before uint64
	var r conversation
	for range 10 {
		before = s.redirected(pods...)
		claims := s.lateClaims()
		r = s.talk(c, addr)
		if s.lateClaims() == claims {
			break
		}
	}
	if r.Bytes == 0 || r.SentByTCP > r.Bytes/50 || r.ReceivedByTCP > r.Bytes/50 {
		s.t.Errorf("%s: of %d bytes each way %d were sent and %d received by TCP", addr, r.Bytes, r.SentByTCP, r.ReceivedByTCP)
	}
	// A pod's counters have the connection when it has closed.
	wait(s.t, func() error {
		if n := s.redirected(pods...) - before; n < 2*r.Bytes*98/100 {
			return fmt.Errorf("%s: the counters have %d redirected bytes of 2 * %d", addr, n, r.Bytes)
		}
		return nil
	})
}

// plain checks that a conversation went by TCP.
func (s *site) plain(c *cri.Container, addr string) {
	s.t.Helper()
	if r := s.talk(c, addr); r.Bytes == 0 || r.SentByTCP != r.Bytes || r.ReceivedByTCP != r.Bytes {
		s.t.Errorf("%s: of %d bytes each way %d were sent and %d received by TCP", addr, r.Bytes, r.SentByTCP, r.ReceivedByTCP)
	}
}

func (s *site) redirected(pods ...*pod) (bytes uint64) {
	s.t.Helper()
	set := must.Get(datapath.Open(s.BPFFS))(s.t)
	defer set.Close()
	all := must.Get(set.PodCounters())(s.t)
	for _, p := range pods {
		bytes += all[p.cgroupID].Redirected.Bytes
	}
	return bytes
}

// lateClaims counts the connections whose client answered after the claim window.
func (s *site) lateClaims() uint64 {
	s.t.Helper()
	set := must.Get(datapath.Open(s.BPFFS))(s.t)
	defer set.Close()
	return must.Get(set.Counters())(s.t).Connections["late_claim"]
}

// waitOpen waits until the kernel's verdict has opened the node's gate.
func (s *site) waitOpen() {
	s.t.Helper()
	wait(s.t, func() error {
		set, err := datapath.Open(s.BPFFS)
		if err != nil {
			return err
		}
		defer set.Close()
		n, err := set.Node()
		if err == nil && !n.Open {
			err = errors.New("the gate is closed")
		}
		return err
	})
	// It is kept for the program that probed, which this test is not.
	kept := must.Get(filepath.Glob(filepath.Join(s.RunDir, "verdict-*.json")))(s.t)
	if len(kept) != 1 {
		s.t.Fatalf("verdicts: %q, want one", kept)
	}
	var v struct {
		Verdict string
		Risks   []string
	}
	must.Do(s.t, json.Unmarshal(must.Get(os.ReadFile(kept[0]))(s.t), &v))
	s.t.Attr(report.AttrVerdict, report.Verdict(v.Verdict, v.Risks))
}

// attached checks if a pod's cgroup has a link. One whose ADD had no time gets it later,
// which is waited for.
func (s *site) attached(p *pod, want bool) {
	s.t.Helper()
	look := func() error {
		got, err := datapath.HasLink(s.BPFFS, p.cgroupID)
		if err == nil && got != want {
			err = fmt.Errorf("pod %s is attached: %v, want %v", p.name, got, want)
		}
		return err
	}
	if want {
		wait(s.t, look)
	} else {
		must.Do(s.t, look())
	}
}
