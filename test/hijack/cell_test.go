package hijack_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/test/must"
	"github.com/skipstack/skipstack/test/node"
)

// cellOptions say what a process in a pod does before it makes sockets.
type cellOptions struct {
	// Nested: it makes a user namespace and a network namespace of its own, as
	// any pod may whose seccomp profile does not forbid it. TUN is a device that
	// everything is routed to but Addrs, which are the namespace's own.
	Nested  bool
	TUN     string
	Addrs   []netip.Addr
	Sysctls map[string]string
	// Repair: sockets come in repair mode, which takes CAP_NET_ADMIN in the network
	// namespace.
	Repair bool
}

// A cell makes sockets in a pod: they belong to the pod's cgroup and to the
// cell's network namespace, and cannot block.
type cell struct {
	conn   *net.UnixConn
	tun    *tun
	repair bool
	stock  []int
}

type cellRequest struct{ Sockets int }
type cellReply struct{ Error string }

const (
	cellSocket = 3 // descriptor
	cellBatch  = 200
)

func newCell(t *testing.T, p *node.Pod, o cellOptions) *cell {
	t.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	must.Do(t, err)
	ours, theirs := os.NewFile(uintptr(pair[0]), "cell"), os.NewFile(uintptr(pair[1]), "cell")
	defer theirs.Close()
	conn, err := net.FileConn(ours)
	must.Do(t, errors.Join(err, ours.Close()))
	c := &cell{conn: conn.(*net.UnixConn), repair: o.Repair}
	t.Cleanup(c.close)
	options, err := json.Marshal(o)
	must.Do(t, err)
	cmd := node.WorkerCommand("cell", string(options))
	cmd.ExtraFiles = []*os.File{theirs}
	_, err = p.Start(cmd, node.StartOptions{})
	must.Do(t, err)
	fds, err := c.receive() // ready
	must.Do(t, err)
	if o.TUN != "" {
		c.tun = &tun{fd: fds[0]}
	}
	return c
}

func (c *cell) close() {
	for _, fd := range c.stock {
		unix.Close(fd)
	}
	if c.tun != nil {
		c.tun.close()
	}
	c.conn.Close()
}

// receive reads a reply.
func (c *cell) receive() (fds []int, err error) {
	buf, oob := make([]byte, 4096), make([]byte, unix.CmsgSpace(4*cellBatch))
	n, on, flags, _, err := c.conn.ReadMsgUnix(buf, oob)
	if err != nil {
		return nil, fmt.Errorf("cell: %w", err)
	}
	if flags&unix.MSG_CTRUNC != 0 {
		return nil, errors.New("cell: no room for more descriptors")
	}
	var r cellReply
	if err := json.Unmarshal(buf[:n], &r); err != nil {
		return nil, fmt.Errorf("cell: %w", err)
	}
	if r.Error != "" {
		return nil, fmt.Errorf("cell: %s", r.Error)
	}
	messages, err := unix.ParseSocketControlMessage(oob[:on])
	if err != nil {
		return nil, fmt.Errorf("cell: %w", err)
	}
	for _, m := range messages {
		got, err := unix.ParseUnixRights(&m)
		if err != nil {
			return nil, fmt.Errorf("cell: %w", err)
		}
		fds = append(fds, got...)
	}
	return fds, nil
}

// prime makes sure that the next n sockets cost no time.
func (c *cell) prime(n int) error {
	for len(c.stock) < n {
		request, err := json.Marshal(cellRequest{cellBatch})
		if err != nil {
			return err
		}
		if _, err := c.conn.Write(request); err != nil {
			return fmt.Errorf("cell: %w", err)
		}
		fds, err := c.receive()
		c.stock = append(c.stock, fds...)
		if err != nil {
			return err
		}
		if _, err := c.receive(); err != nil { // it has closed its own descriptors
			return err
		}
	}
	return nil
}

// socket returns a new TCP socket, -1 with an error.
func (c *cell) socket() (int, error) {
	if err := c.prime(1); err != nil {
		return -1, err
	}
	fd := c.stock[len(c.stock)-1]
	c.stock = c.stock[:len(c.stock)-1]
	return fd, nil
}

// listen returns a new listener; it is closed with the test.
func (c *cell) listen(t *testing.T, at netip.AddrPort) int {
	t.Helper()
	fd, err := c.socket()
	must.Do(t, err)
	t.Cleanup(func() { unix.Close(fd) })
	if c.repair {
		must.Do(t, setRepair(fd, unix.TCP_REPAIR_OFF))
	}
	must.Do(t, unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1))
	must.Do(t, unix.Bind(fd, sockaddr(at)))
	must.Do(t, unix.Listen(fd, 1024))
	return fd
}

// cellWorker is the process in the pod.
func cellWorker(args []string) int {
	f := os.NewFile(cellSocket, "test")
	conn, err := net.FileConn(f)
	if err != nil {
		fmt.Fprintln(os.Stderr, "cell:", err)
		return 1
	}
	var o cellOptions
	if err := json.Unmarshal([]byte(args[0]), &o); err != nil {
		fmt.Fprintln(os.Stderr, "cell:", err)
		return 1
	}
	if o.Nested && os.Getenv(nestedEnv) == "" {
		return nest(args, f)
	}
	syscall.CloseOnExec(cellSocket)
	if err := o.serve(conn.(*net.UnixConn)); err != nil {
		return reply(conn.(*net.UnixConn), err, nil)
	}
	return 0
}

const nestedEnv = "SKIPSTACK_TEST_NESTED"

// nest runs the cell again in new namespaces.
func nest(args []string, conn *os.File) int {
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), nestedEnv+"=1")
	cmd.Stderr = os.Stderr
	cmd.ExtraFiles = []*os.File{conn}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER | unix.CLONE_NEWNET,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
		Pdeathsig:   unix.SIGKILL,
	}
	if err := cmd.Run(); err != nil {
		fmt.Fprintln(os.Stderr, "nested cell:", err)
		return 1
	}
	return 0
}

func reply(conn *net.UnixConn, err error, fds []int) int {
	r := cellReply{}
	if err != nil {
		r.Error = err.Error()
	}
	b, _ := json.Marshal(r)
	if _, _, err := conn.WriteMsgUnix(b, unix.UnixRights(fds...), nil); err != nil {
		fmt.Fprintln(os.Stderr, "cell:", err)
		return 1
	}
	return 0
}

func (o cellOptions) serve(conn *net.UnixConn) error {
	fds, err := o.prepare()
	if err != nil {
		return err
	}
	reply(conn, nil, fds)
	buf := make([]byte, 4096)
	for {
		n, err := conn.Read(buf)
		if err != nil {
			return nil // the test has ended
		}
		var r cellRequest
		if err := json.Unmarshal(buf[:n], &r); err != nil {
			return err
		}
		fds, err := o.sockets(r.Sockets)
		reply(conn, err, fds)
		for _, fd := range fds {
			unix.Close(fd)
		}
		reply(conn, nil, nil) // a socket that is closed by the test is closed now
	}
}

func (o cellOptions) prepare() ([]int, error) {
	if o.Nested {
		lo, err := netlink.LinkByName("lo")
		if err == nil {
			err = netlink.LinkSetUp(lo)
		}
		if err != nil {
			return nil, fmt.Errorf("bring up lo: %w", err)
		}
	}
	for name, value := range o.Sysctls {
		if err := os.WriteFile("/proc/sys/"+strings.ReplaceAll(name, ".", "/"), []byte(value), 0); err != nil {
			return nil, fmt.Errorf("set sysctl: %w", err)
		}
	}
	dev := "lo"
	var fds []int
	if o.TUN != "" {
		dev = o.TUN
		t, err := openTUN(o.TUN)
		if err != nil {
			return nil, err
		}
		fds = []int{t.fd}
		if err := up(o.TUN); err != nil {
			return nil, err
		}
	}
	for _, addr := range o.Addrs {
		if err := addAddr(dev, addr); err != nil {
			return nil, err
		}
	}
	if o.TUN != "" && o.Nested {
		return fds, addRoute(o.TUN, netip.MustParsePrefix("0.0.0.0/0"))
	}
	return fds, nil
}

func (o cellOptions) sockets(n int) ([]int, error) {
	var fds []int
	for range n {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return fds, fmt.Errorf("make a socket: %w", err)
		}
		fds = append(fds, fd)
		if !o.Repair {
			continue
		}
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_REPAIR, unix.TCP_REPAIR_ON); err != nil {
			return fds, fmt.Errorf("enter repair mode: %w", err)
		}
	}
	return fds, nil
}

func up(dev string) error {
	link, err := netlink.LinkByName(dev)
	if err == nil {
		err = netlink.LinkSetUp(link)
	}
	if err != nil {
		return fmt.Errorf("bring up %s: %w", dev, err)
	}
	return nil
}

func addAddr(dev string, addr netip.Addr) error {
	link, err := netlink.LinkByName(dev)
	if err == nil {
		err = netlink.AddrAdd(link, &netlink.Addr{IPNet: &net.IPNet{IP: addr.AsSlice(), Mask: net.CIDRMask(32, 32)}})
	}
	if err != nil {
		return fmt.Errorf("add %s to %s: %w", addr, dev, err)
	}
	return nil
}

func addRoute(dev string, to netip.Prefix) error    { return route(dev, to, netlink.RouteAdd) }
func removeRoute(dev string, to netip.Prefix) error { return route(dev, to, netlink.RouteDel) }

func route(dev string, to netip.Prefix, f func(*netlink.Route) error) error {
	link, err := netlink.LinkByName(dev)
	if err == nil {
		err = f(&netlink.Route{
			LinkIndex: link.Attrs().Index, Scope: netlink.SCOPE_LINK,
			Dst: &net.IPNet{IP: to.Addr().AsSlice(), Mask: net.CIDRMask(to.Bits(), 32)},
		})
	}
	if err != nil {
		return fmt.Errorf("route %s to %s: %w", to, dev, err)
	}
	return nil
}
