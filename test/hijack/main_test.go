package hijack_test

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/plugin/datapath"
	"github.com/skipstack/skipstack/test/must"
	"github.com/skipstack/skipstack/test/node"
)

func TestMain(m *testing.M) {
	os.Exit(node.Main(m, node.MainOptions{
		Workers: map[string]node.Worker{"cell": cellWorker},
		Tools:   []string{"bridge", "host-local"},
	}))
}

const (
	tries    = 10000
	patience = 3 * time.Minute // for what should take no time, and for a segment that was lost
	// Attackers have more time than they would, whatever else the machine does.
	longWindow  = time.Hour
	shortWindow = 4 * time.Millisecond // as in production
)

// A lab is a node with an open datapath, and a TUN device behind which all
// other hosts are.
type lab struct {
	t     *testing.T
	node  *node.Node
	set   *datapath.Set
	list  *libcni.NetworkConfigList
	world *tun
}

// elsewhere are hosts that are not on the node.
var elsewhere = netip.MustParsePrefix("198.18.0.0/16")

func newLab(t *testing.T, o datapath.LoadOptions) *lab {
	t.Helper()
	n := node.ForTest(t, node.Options{})
	l := &lab{t: t, node: n}
	var err error
	l.list, err = n.Network(node.Network{})
	must.Do(t, err)
	if o.MaxConnections == 0 {
		o.MaxConnections = 65536
	}
	if o.ClaimWindow == 0 {
		o.ClaimWindow = longWindow
	}
	// Unlike a published one it is not found by SwitchNode in another program's test.
	l.set, err = datapath.LoadPrivate(o)
	must.Do(t, err)
	t.Cleanup(func() { must.Do(t, l.set.Close()) })
	// Else a pause of a second would let connections be counted as others than they are.
	normal, err := n.SlowHandshakes()
	must.Do(t, err)
	t.Cleanup(func() { must.Do(t, normal()) })
	must.Do(t, l.set.SetNode(datapath.NodeSettings{Open: true}))
	must.Do(t, n.Do(func() (err error) {
		if l.world, err = openTUN("world"); err != nil {
			return err
		}
		return errors.Join(up("world"), addAddr("world", elsewhere.Addr().Next()), addRoute("world", elsewhere))
	}))
	t.Cleanup(l.world.close)
	return l
}

type pod struct {
	*node.Pod
	addr netip.Addr
	mac  net.HardwareAddr
}

// pod makes a pod that takes part.
func (l *lab) pod(name string) *pod {
	l.t.Helper()
	p := l.plain(name)
	l.attach(p.Pod)
	return p
}

// plain makes a pod that takes no part.
func (l *lab) plain(name string) *pod {
	l.t.Helper()
	p, err := l.node.AddPod(l.t.Context(), name, l.list, node.PodOptions{})
	must.Do(l.t, err)
	made := &pod{Pod: p}
	made.addr, _ = p.Addr(false)
	must.Do(l.t, p.Do(func() error {
		link, err := netlink.LinkByName(node.IfName)
		if err == nil {
			made.mac = link.Attrs().HardwareAddr
		}
		return err
	}))
	return made
}

// island makes a pod that nothing connects to anything.
func (l *lab) island(name string) *pod {
	l.t.Helper()
	p, err := l.node.NewPod(name, node.PodOptions{})
	must.Do(l.t, err)
	l.attach(p)
	return &pod{Pod: p}
}

func (l *lab) attach(p *node.Pod) {
	l.t.Helper()
	dir, err := os.Open(p.Cgroup)
	must.Do(l.t, err)
	defer dir.Close()
	var st unix.Stat_t
	must.Do(l.t, unix.Fstat(int(dir.Fd()), &st))
	_, err = l.set.Attach(dir, st.Ino)
	must.Do(l.t, err)
	must.Do(l.t, l.set.SetPod(st.Ino, datapath.PodSettings{Enabled: true, UnreadLimit: 16 << 20}))
}

func (l *lab) counters() datapath.Counters {
	l.t.Helper()
	c, err := l.set.Counters()
	must.Do(l.t, err)
	return c
}

// expect compares what became of connections since an earlier reading; what is
// not named must be 0.
func (l *lab) expect(before datapath.Counters, want map[string]uint64) {
	l.t.Helper()
	for label, got := range l.counters().Since(before).Connections {
		if got != want[label] {
			l.t.Errorf("connections counted as %s: %d, want %d", label, got, want[label])
		}
	}
}

// expectPlain fails if a message was redirected since an earlier reading.
func (l *lab) expectPlain(before datapath.Counters) {
	l.t.Helper()
	if got := l.counters().Since(before).Messages["redirected"]; got.Messages != 0 {
		l.t.Errorf("%d messages redirected, want none", got.Messages)
	}
}

// learn and forget an address's hardware address, in the caller's network namespace.
func learn(addr netip.Addr, mac net.HardwareAddr) error {
	return neighbour(addr, mac, netlink.NeighSet)
}
func forget(addr netip.Addr) error { return neighbour(addr, nil, netlink.NeighDel) }

func neighbour(addr netip.Addr, mac net.HardwareAddr, f func(*netlink.Neigh) error) error {
	link, err := netlink.LinkByName(node.IfName)
	if err == nil {
		err = f(&netlink.Neigh{LinkIndex: link.Attrs().Index, State: netlink.NUD_PERMANENT, IP: addr.AsSlice(), HardwareAddr: mac})
	}
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("set neighbour %s: %w", addr, err)
	}
	return nil
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	return &unix.SockaddrInet4{Addr: a.Addr().As4(), Port: int(a.Port())}
}

func wait(fd int, events int16) error {
	p := []unix.PollFd{{Fd: int32(fd), Events: events}}
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); {
		n, err := unix.Poll(p, 1000)
		if n > 0 {
			return nil
		}
		if err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("poll: %w", err)
		}
	}
	return fmt.Errorf("poll: %w", os.ErrDeadlineExceeded)
}

func accept(listener int) (int, error) {
	if err := wait(listener, unix.POLLIN); err != nil {
		return -1, fmt.Errorf("accept: %w", err)
	}
	fd, _, err := unix.Accept4(listener, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("accept: %w", err)
	}
	return fd, nil
}

// connect starts to connect.
func connect(fd int, to netip.AddrPort) error {
	if err := unix.Connect(fd, sockaddr(to)); err != nil && !errors.Is(err, unix.EINPROGRESS) {
		return fmt.Errorf("connect to %s: %w", to, err)
	}
	return nil
}

func established(fd int) error {
	if err := wait(fd, unix.POLLOUT); err != nil {
		return err
	}
	info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
	if err != nil {
		return fmt.Errorf("read a socket's state: %w", err)
	}
	if info.State != unix.BPF_TCP_ESTABLISHED {
		return fmt.Errorf("the socket is in state %d, not established", info.State)
	}
	return nil
}

func send(fd int, s string) error {
	if n, err := unix.Write(fd, []byte(s)); err != nil || n != len(s) {
		return fmt.Errorf("send %q: %d bytes, %w", s, n, err)
	}
	return nil
}

// read waits for exactly the given bytes.
func read(fd int, want string) error {
	got := ""
	for len(got) < len(want) {
		if err := wait(fd, unix.POLLIN); err != nil {
			return fmt.Errorf("read %q, have %q: %w", want, got, err)
		}
		buf := make([]byte, 4096)
		n, err := unix.Read(fd, buf)
		if err != nil || n == 0 {
			return fmt.Errorf("read %q, have %q: end of stream, %w", want, got, err)
		}
		got += string(buf[:n])
	}
	if got != want {
		return fmt.Errorf("read %q, want %q", got, want)
	}
	return nil
}

// silent fails if something is readable.
func silent(fd int) error {
	buf := make([]byte, 4096)
	n, err := unix.Read(fd, buf)
	if n > 0 {
		return fmt.Errorf("stolen: %q", buf[:n])
	}
	if n == 0 || !errors.Is(err, unix.EAGAIN) {
		return fmt.Errorf("read: %d, %w", n, err)
	}
	return nil
}
