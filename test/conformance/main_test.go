package conformance

import (
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/containernetworking/cni/libcni"

	"github.com/skipstack/skipstack/plugin/datapath"
	"github.com/skipstack/skipstack/plugin/verdict"
	"github.com/skipstack/skipstack/test/datapath/traffic"
	"github.com/skipstack/skipstack/test/must"
	"github.com/skipstack/skipstack/test/node"
	"github.com/skipstack/skipstack/test/probe"
)

// Signals to the process (SIGCHLD among them) go to its first thread, where they would
// interrupt a blocking call. What init locks stays on that thread, and is main.
func init() { runtime.LockOSThread() }

func TestMain(m *testing.M) {
	probe.Main()
	// The Go runtime preempts threads by a signal, which a system call that has
	// just begun may get: no signals but those of the test.
	os.Setenv("GODEBUG", "asyncpreemptoff=1")
	os.Exit(node.Main(m, node.MainOptions{
		Workers: map[string]node.Worker{traffic.WorkerName: traffic.Worker, helperName: helper, crowdName: crowd},
		Tools:   []string{"bridge", "host-local"},
	}))
}

const (
	patience = time.Minute // for what should take no time
	tick     = time.Millisecond
	// soon is how long to wait for something that only one of the modes may bring.
	soon = 5 * time.Second

	maxConnections = 65536
	// claimWindow lets clients be late on a busy machine.
	claimWindow = 10 * time.Minute
)

// A mode is how bytes get from one end of a connection to the other.
type mode string

const (
	plain       mode = "plain"
	accelerated mode = "accelerated"
	// switched is an accelerated connection that is switched off once it is made:
	// its bytes go by TCP, as they also do while a receiver is full.
	switched mode = "switched off"
)

var modes = []mode{plain, accelerated, switched}

// A role is the end at which a behaviour is looked at.
type role string

const (
	client role = "client"
	server role = "server"
)

var roles = []role{client, server}

// A rig is two pods between which connections of one mode are made, for the trials
// of one role: what its datapath counts comes from one trial only.
type rig struct {
	mode   mode
	role   role
	client *pod
	server *pod
	set    *datapath.Set // nil: plain
	// gate opens or closes the pods' gate.
	gate func(open bool) error
}

type pod struct {
	*node.Pod
	host *traffic.Host
}

// kernel is what is known of the kernel.
type kernel struct {
	*verdict.Verdict
}

// lab makes so many sets of rigs on a node of their own.
func lab(t *testing.T, lanes int) (kernel, chan []*rig) {
	t.Helper()
	n := node.ForTest(t, node.Options{})
	probed := probe.Kernel(t, n.CgroupRoot)
	list, err := n.Network(node.Network{})
	must.Do(t, err)
	free := make(chan []*rig, lanes)
	for range lanes {
		var rigs []*rig
		for _, m := range modes {
			for _, r := range roles {
				rigs = append(rigs, newRig(t, n, list, probed, m, r))
			}
		}
		free <- rigs
	}
	return kernel{probed}, free
}

func newRig(t *testing.T, n *node.Node, list *libcni.NetworkConfigList, v *verdict.Verdict, m mode, r role) *rig {
	t.Helper()
	g := &rig{mode: m, role: r}
	var cgroups []uint64
	g.gate = func(open bool) error {
		for _, id := range cgroups {
			err := g.set.SetPod(id, datapath.PodSettings{
				Enabled: true, SwitchedOff: !open, UnreadLimit: 16 << 20, Accepted: v.Risks | datapath.RiskBlocking,
			})
			if err != nil {
				return err
			}
		}
		return nil
	}
	if m != plain {
		var err error
		g.set, err = datapath.LoadPrivate(datapath.LoadOptions{MaxConnections: maxConnections, ClaimWindow: claimWindow})
		must.Do(t, err)
		must.Do(t, g.set.SetNode(v.NodeSettings()))
		t.Cleanup(func() {
			if !t.Failed() {
				g.waitEmpty(t)
			}
			must.Do(t, g.set.Close())
		})
	}
	for _, end := range []struct {
		name string
		pod  **pod
	}{{"client", &g.client}, {"server", &g.server}} {
		p, err := n.AddPod(t.Context(), fmt.Sprintf("%s-%s-%s", m, r, end.name), list, node.PodOptions{})
		must.Do(t, err)
		host, err := traffic.NewHost(p, node.StartOptions{})
		must.Do(t, err)
		t.Cleanup(func() { must.Do(t, host.Close()) })
		*end.pod = &pod{p, host}
		// Lost segments come again after milliseconds.
		must.Do(t, p.SetMinRTO(20*time.Millisecond))
		if g.set == nil {
			continue
		}
		dir, err := os.Open(p.Cgroup)
		must.Do(t, err)
		defer dir.Close()
		var st unix.Stat_t
		must.Do(t, unix.Fstat(int(dir.Fd()), &st))
		_, err = g.set.Attach(dir, st.Ino)
		must.Do(t, err)
		cgroups = append(cgroups, st.Ino)
	}
	must.Do(t, g.gate(true))
	return g
}

// waitEmpty waits until the datapath has let go of every socket.
func (g *rig) waitEmpty(t *testing.T) {
	t.Helper()
	for deadline := time.Now().Add(2 * patience); ; time.Sleep(tick) {
		live, err := g.set.Live()
		must.Do(t, err)
		members, err := g.set.Enrolled()
		must.Do(t, err)
		if live == 0 && members == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Errorf("%s, %s: %d sockets are still live, %d in the sockhash", g.mode, g.role, live, members)
			return
		}
	}
}

func (p *pod) addr() netip.Addr {
	a, ok := p.Addr(false)
	if !ok {
		panic("the pod has no address")
	}
	return a
}
