package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/containernetworking/cni/libcni"

	"github.com/skipstack/skipstack/bpf"
	"github.com/skipstack/skipstack/plugin"
	"github.com/skipstack/skipstack/plugin/attachment"
	"github.com/skipstack/skipstack/plugin/datapath"
	"github.com/skipstack/skipstack/plugin/podcgroup"
	"github.com/skipstack/skipstack/plugin/regular"
	"github.com/skipstack/skipstack/test/node"
)

// hereDir has a directory for each bench that makes pods on this node itself.
const hereDir = "/run/skipstack-bench"

// hereOptions say how pods are made on this node.
type hereOptions struct {
	list       *libcni.NetworkConfigList
	config     plugin.Config // of skipstack's entry
	cgroupRoot string        // the cgroup2 mount
	cniPath    string
	dir        string           // normally hereDir
	worker     func() *exec.Cmd // the worker's command
	stderr     io.Writer
}

func (o hereOptions) node(log io.Writer) node.HereOptions {
	return node.HereOptions{
		Dir: o.dir, CgroupRoot: o.cgroupRoot, PluginDirs: []string{o.cniPath}, Log: log,
		Sweeping: func(pod, network string) {
			fmt.Fprintf(o.stderr, "bench: removing pod %s of network %s, which a killed bench left on this node\n", pod, network)
		},
	}
}

// findCgroupRoot finds the machine's cgroup2 mount.
func findCgroupRoot() (string, error) { return podcgroup.FindRoot("/sys/fs/cgroup", "/proc") }

// sweepHere removes what a killed bench with pods on this node itself left there, in front
// of a bench that makes none: that needs nothing of the node, and goes on where the sweep
// fails.
func (o options) sweepHere(ctx context.Context, c Config) error {
	root, err := findCgroupRoot()
	if err != nil {
		return nil // node.Isolate says so
	}
	cniPath, err := filepath.Abs(o.cniPath)
	if err != nil {
		return fmt.Errorf("--cni-path: %w", err)
	}
	err = node.SweepHere(ctx, hereOptions{dir: hereDir, cgroupRoot: root, cniPath: cniPath, stderr: c.ErrOut}.node(io.Discard))
	if ctx.Err() != nil {
		return errors.Join(errors.New("interrupted: nothing is proven, and nothing was created"), err)
	}
	if err != nil {
		fmt.Fprintf(c.ErrOut, "bench: not all that a killed bench left on this node could be removed: %s; `skipstack bench --quick` tries again, with --cni-path DIR by the plugins in DIR, too\n",
			strings.ReplaceAll(err.Error(), "\n", "; "))
	}
	return nil
}

// readChain reads the user's conflist and checks that it can be run: skipstack must be
// in it, and all its plugins in cniPath.
func readChain(conflist, cniPath string) (o hereOptions, err error) {
	raw, err := regular.Read(conflist, plugin.MaxConflist)
	if err != nil {
		return o, fmt.Errorf("--conflist: %w", err)
	}
	o.config, err = plugin.ParseConflist(raw)
	if errors.Is(err, plugin.ErrNoEntry) {
		return o, fmt.Errorf("--conflist %s: skipstack is not in it: append its entry to plugins, there would be nothing to compare", conflist)
	}
	if err != nil {
		return o, fmt.Errorf("--conflist %s: %w", conflist, err)
	}
	if o.config.Mode == plugin.ModeOff {
		return o, fmt.Errorf("--conflist %s: skipstack's mode is off in it: there would be nothing to compare; name a copy of the file with mode auto", conflist)
	}
	if raw, err = withCapabilities(raw); err == nil {
		o.list, err = libcni.NetworkConfFromBytes(raw)
	}
	if err != nil {
		return o, fmt.Errorf("--conflist %s: %w", conflist, err)
	}
	var types []string
	for _, p := range o.list.Plugins {
		types = append(types, p.Network.Type)
		if ipam := p.Network.IPAM.Type; ipam != "" {
			types = append(types, ipam)
		}
	}
	if missing := missingPlugin(cniPath, types); missing != "" {
		return o, fmt.Errorf("no CNI plugin %s in %s, which %s names: name its directory with --cni-path", missing, cniPath, conflist)
	}
	o.cniPath, o.dir, o.cgroupRoot = cniPath, hereDir, o.config.CgroupRoot
	if o.cgroupRoot == "" {
		o.cgroupRoot, err = findCgroupRoot()
	}
	return o, err
}

// withCapabilities makes skipstack's entry ask for what the bench passes to it as a
// container runtime: the pods' cgroups and annotations.
func withCapabilities(raw []byte) ([]byte, error) {
	var list map[string]any
	if err := json.Unmarshal(raw, &list); err != nil {
		return nil, err
	}
	plugins, ok := list["plugins"].([]any)
	if !ok {
		return nil, errors.New("it is the configuration of a single plugin, not a list of plugins")
	}
	for _, p := range plugins {
		entry, _ := p.(map[string]any)
		if entry["type"] != plugin.Type {
			continue
		}
		capabilities, _ := entry["capabilities"].(map[string]any)
		if capabilities == nil {
			capabilities = map[string]any{}
		}
		capabilities["cgroupPath"], capabilities["io.kubernetes.cri.pod-annotations"] = true, true
		entry["capabilities"] = capabilities
	}
	return json.Marshal(list)
}

// newHereSite makes two pods on this node by the user's chain. Close the site after use,
// even on error.
func newHereSite(ctx context.Context, o hereOptions) (s *nodeSite, err error) {
	pluginLog := &lockedBuffer{}
	s = &nodeSite{command: o.worker, stderr: o.stderr, workers: map[role]*remote{}, shared: true, bpffs: o.config.BPFFS, runDir: o.config.RunDir, program: filepath.Join(o.cniPath, plugin.Type)}
	defer func() {
		if err != nil {
			err = errors.Join(err, textError(pluginLog.String()))
		}
	}()
	if s.node, err = node.Here(ctx, o.node(pluginLog)); err != nil {
		return s, err
	}
	own, err := filepath.Rel(o.cgroupRoot, s.node.CgroupRoot)
	if err != nil {
		return s, fmt.Errorf("find the bench's cgroup: %w", err)
	}
	for _, pod := range []struct {
		name podName
		p    **node.Pod
	}{{serverPod, &s.server}, {clientPod, &s.client}} {
		cgroup := "kubepods/burstable/pod-bench-" + string(pod.name)
		*pod.p, err = s.node.NewPod(string(pod.name), node.PodOptions{
			Namespace: "skipstack-bench", Annotations: map[string]string{"skipstack/mode": "on"},
			Cgroup: cgroup, CgroupPath: "/" + filepath.Join(own, cgroup),
		})
		if err != nil {
			return s, err
		}
		if err := s.add(ctx, *pod.p, o.list); err != nil {
			return s, err
		}
	}
	s.place = fmt.Sprintf("this node, network %s: %s", o.list.Name, strings.Join(s.plugins, " + "))
	return s, s.waitForGate(ctx)
}

// podCounters is what the datapath counted of the two pods of the bench. On a node
// with others it cannot be told apart why messages of theirs were passed: that is
// counted for all pods together.
func (s *nodeSite) podCounters() (datapath.Counters, error) {
	c := datapath.Counters{Messages: map[string]datapath.Count{}, Connections: map[string]uint64{}, Events: map[string]uint64{}}
	all, err := s.set.Counters()
	if err != nil {
		return c, err
	}
	c.Events[lateClaim] = all.Connections[lateClaim] // of all pods: an event that explains, no proof
	// A connection's messages are counted when it has closed, which the kernel may
	// get to a moment after the processes.
	for deadline := time.Now().Add(time.Second); ; time.Sleep(time.Millisecond) {
		pods, err := s.set.PodCounters()
		if err != nil {
			return c, err
		}
		var all datapath.PodCounters
		for _, p := range []*node.Pod{s.client, s.server} {
			record, err := s.attached(p)
			if err != nil {
				return c, err
			}
			n := pods[record.CgroupID]
			all.Live += n.Live
			all.Enrolled += n.Enrolled
			all.Redirected = datapath.Count{Messages: all.Redirected.Messages + n.Redirected.Messages, Bytes: all.Redirected.Bytes + n.Redirected.Bytes}
			all.Passed = datapath.Count{Messages: all.Passed.Messages + n.Passed.Messages, Bytes: all.Passed.Bytes + n.Passed.Bytes}
		}
		if all.Live > 0 && time.Now().Before(deadline) {
			continue
		}
		c.Messages[redirectedLabel], c.Messages[passedLabel] = all.Redirected, all.Passed
		c.Connections[enrolledLabel] = all.Enrolled
		return c, nil
	}
}

var (
	redirectedLabel = bpf.MessageLabels[bpf.DatapathMessageOutcomeMESSAGE_REDIRECTED]
	enrolledLabel   = bpf.ConnectionLabels[bpf.DatapathConnectionOutcomeCONNECTION_ENROLLED]
)

// passedLabel is for messages that were passed, whatever the reason.
const passedLabel = "passed"

// podRules judge by the counters of the two pods.
var podRules = &rules{
	lateness: clientLate,
	late: func(p Point, accelerated bool, m measured, counted datapath.Counters) bool {
		return accelerated && p.Test != ConnectRequestResponse && counted.Events[lateClaim] > 0 && !allEnrolled(counted, m.client.Conns)
	},
	prove: provePods,
}

// allEnrolled tells if both ends of all connections were, but for the few that a busy
// machine keeps from it.
func allEnrolled(c datapath.Counters, connections uint64) bool {
	return float64(c.Connections[enrolledLabel]) >= enough*2*float64(connections)
}

// provePods is [prove] where only the two pods' own counters are known. A stream whose
// messages were redirected or passed is taken to have had a full receiver, if at
// least half were redirected.
func provePods(p Point, plain, accelerated *Evidence) (Proof, string) {
	if reason := notPlain(plain); reason != "" {
		return Failed, "plain runs: " + reason
	}
	if accelerated.Payload == 0 {
		return Failed, "nothing was sent"
	}
	if !allEnrolled(accelerated.Counters, accelerated.Connection) {
		return Failed, fmt.Sprintf("of the ends of %d connections %d were enrolled", accelerated.Connection, accelerated.Counters.Connections[enrolledLabel])
	}
	part := func(bytes uint64) float64 { return float64(bytes) / float64(accelerated.Payload) }
	redirected, passed := accelerated.redirected(), accelerated.Counters.Messages[passedLabel].Bytes
	switch {
	case part(redirected) >= enough && part(accelerated.TCP) <= 1-enough:
		return Proven, ""
	case p.Test == Stream && part(redirected) >= leastOverflow && part(redirected+passed) >= enough && part(accelerated.TCP) <= part(passed)+1-enough:
		return Overflow, ""
	}
	return Failed, fmt.Sprintf("of %d bytes sent %d were redirected, %d passed, and %d went by TCP", accelerated.Payload, redirected, passed, accelerated.TCP)
}

// here is the bench on this node itself.
func here(ctx context.Context, c Config, o options, with hereOptions) error {
	with.stderr, with.worker = c.ErrOut, func() *exec.Cmd { return selfWorker(c.Env) }
	ctx, c, stop := untilClosed(ctx, c)
	defer stop()
	fmt.Fprintf(c.ErrOut, "bench: making two pods on this node in network %s\n", with.list.Name)
	site, err := newHereSite(ctx, with)
	report, err := o.session(ctx, c, site, err)
	err = errors.Join(err, site.close())
	if report != nil {
		err = errors.Join(err, o.writeFiles(ctx, report, c.Out))
	}
	return o.verdict(ctx, report, err)
}

// left says what DEL should have removed of the pods on this node.
func (s *nodeSite) left() []string {
	var left []string
	for _, p := range []*node.Pod{s.client, s.server} {
		if p == nil || s.network == "" {
			continue
		}
		if _, err := attachment.NewStore(s.runDir).Get(s.key(p)); !errors.Is(err, attachment.ErrNotFound) {
			left = append(left, fmt.Sprintf("attachment of pod %s (%v)", p.Name, err))
		}
	}
	return left
}
