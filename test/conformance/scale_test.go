package conformance

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/test/node"
)

var scale = []behaviour{
	{name: "10000 connections", once: true, notSwitched: true, does: "open at once, between four pairs of processes; bytes go both ways on each, in several rounds", run: func(c *trial) {
		const processes, each = 4, 2500 // a process may have but few descriptors
		var clients, servers []*member
		for range processes {
			s := c.join(c.rig.server, "server", c.rig.server.addr().String(), fmt.Sprint(each))
			servers = append(servers, s)
			addr := s.says()
			clients = append(clients, c.join(c.rig.client, "client", addr, fmt.Sprint(each)))
		}
		for _, m := range clients {
			m.expect("connected")
		}
		for _, m := range clients {
			m.next()
		}
		for _, m := range clients {
			m.expect("talked")
		}
		if c.rig.set != nil {
			live, err := c.rig.set.Live()
			c.check(err)
			if live < 2*processes*each {
				c.fatalf("%d sockets are enrolled at once", live)
			}
		}
		c.connections += processes * each
		for _, m := range clients {
			m.next()
		}
		for _, m := range append(clients, servers...) {
			m.expect("closed")
			m.end()
		}
		c.note("all connected, all bytes, all closed")
	}},
	{name: "connect and close, 2000 times", once: true, notSwitched: true, does: "a request and its answer on each connection", run: func(c *trial) {
		l := c.listen(socketOptions{})
		defer unix.Close(l.FD)
		for range 2000 {
			near, far := c.connect(l, socketOptions{})
			if c.rig.role == server {
				near, far = far, near
			}
			near.warm()
			near.close()
			far.close()
			c.cleanup = c.cleanup[:0]
		}
		c.note("all bytes")
	}},
}

// crowdName is a process in a pod with many connections.
const crowdName = "crowd"

// A member is such a process.
type member struct {
	c       *trial
	process *node.Process
	out     *bufio.Reader
	in      io.WriteCloser
	text    bytes.Buffer
}

// join starts a member in a pod.
func (c *trial) join(p *pod, args ...string) *member {
	cmd := node.WorkerCommand(crowdName, args...)
	m := &member{c: c}
	out, err := cmd.StdoutPipe()
	c.check(err)
	m.out = bufio.NewReader(out)
	m.in, err = cmd.StdinPipe()
	c.check(err)
	cmd.Stderr = &m.text
	m.process, err = p.Start(cmd, node.StartOptions{})
	c.check(err)
	c.later(func() { _ = m.process.Kill() })
	return m
}

// says is the next line that the member prints.
func (m *member) says() string {
	line, err := m.out.ReadString('\n')
	if err != nil {
		_ = m.process.Kill()
		m.c.fatalf("a member of the crowd: %w: %s", err, m.text.Bytes())
	}
	return strings.TrimSpace(line)
}

func (m *member) expect(line string) {
	if s := m.says(); s != line {
		m.c.fatalf("a member of the crowd says %q, want %q", s, line)
	}
}

// next lets the member go on.
func (m *member) next() {
	_, err := io.WriteString(m.in, "\n")
	m.c.check(err)
}

func (m *member) end() { m.c.check(m.process.Wait()) }

// crowd is the member's program.
func crowd(args []string) int {
	var n int
	if _, err := fmt.Sscan(args[2], &n); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	run := crowdServer
	if args[0] == "client" {
		run = crowdClient
	}
	if err := run(args[1], n); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

const crowdMessage = 100

// crowdServer accepts n connections and echoes until all are closed.
func crowdServer(addr string, n int) error {
	ip, err := netip.ParseAddr(addr)
	if err != nil {
		return err
	}
	l, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return err
	}
	if err := errors.Join(unix.Bind(l, sockaddr(netip.AddrPortFrom(ip, 0))), unix.Listen(l, 4096)); err != nil {
		return err
	}
	name, err := unix.Getsockname(l)
	if err != nil {
		return err
	}
	fmt.Println(addrPort(name))
	ep, err := crowdWatch(l)
	if err != nil {
		return err
	}
	buf := make([]byte, 4096)
	for closed := 0; closed < n; {
		ready, err := crowdWait(ep)
		if err != nil {
			return err
		}
		for _, fd := range ready {
			if fd == l {
				// One at a time: epoll says it again.
				conn, _, err := unix.Accept4(l, unix.SOCK_NONBLOCK)
				if errors.Is(err, unix.EAGAIN) {
					continue
				}
				if err == nil {
					err = unix.EpollCtl(ep, unix.EPOLL_CTL_ADD, conn, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(conn)})
				}
				if err != nil {
					return fmt.Errorf("accept: %w", err)
				}
				continue
			}
			m, err := unix.Read(fd, buf)
			switch {
			case errors.Is(err, unix.EAGAIN):
			case err != nil:
				return fmt.Errorf("server: read: %w", err)
			case m == 0:
				closed++
				unix.Close(fd)
			default:
				if w, err := unix.Write(fd, buf[:m]); err != nil || w != m {
					return fmt.Errorf("server: write: %d of %d: %w", w, m, err)
				}
			}
		}
	}
	fmt.Println("closed")
	return nil
}

// crowdClient opens n connections, sends on each, in rounds, and closes them.
func crowdClient(to string, n int) error {
	addr, err := netip.ParseAddrPort(to)
	if err != nil {
		return err
	}
	fds := make([]int, n)
	for i := range fds {
		// Blocking while it connects, so that the backlog is never overrun.
		if fds[i], err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK, 0); err != nil {
			return err
		}
		if err := unix.Connect(fds[i], sockaddr(addr)); err != nil && !errors.Is(err, unix.EINPROGRESS) {
			return fmt.Errorf("connect: %w", err)
		}
		if s := pollFor(fds[i], unix.POLLOUT); s != "OUT" {
			return fmt.Errorf("connection %d: poll says %s", i, s)
		}
	}
	fmt.Println("connected")
	stdin := bufio.NewReader(os.Stdin)
	if _, err := stdin.ReadString('\n'); err != nil {
		return err
	}
	buf := make([]byte, crowdMessage+1)
	for round := range 3 {
		for i, fd := range fds {
			message := bytesAt(int64(i+round), crowdMessage)
			if m, err := unix.Write(fd, message); err != nil || m != crowdMessage {
				return fmt.Errorf("client: write: %d bytes: %w", m, err)
			}
		}
		for i, fd := range fds {
			for got := 0; got < crowdMessage; {
				m, err := unix.Read(fd, buf[got:])
				if errors.Is(err, unix.EAGAIN) {
					if s := pollFor(fd, unix.POLLIN); s != "IN" {
						return fmt.Errorf("connection %d: poll says %s after %d bytes", i, s, got)
					}
					continue
				}
				if err != nil || m == 0 {
					return fmt.Errorf("client: read: %d bytes: %w", m, err)
				}
				got += m
			}
			if string(buf[:crowdMessage]) != string(bytesAt(int64(i+round), crowdMessage)) {
				return fmt.Errorf("connection %d: wrong bytes", i)
			}
		}
	}
	fmt.Println("talked")
	if _, err := stdin.ReadString('\n'); err != nil {
		return err
	}
	for _, fd := range fds {
		unix.Close(fd)
	}
	fmt.Println("closed")
	return nil
}

func crowdWatch(fd int) (ep int, err error) {
	if ep, err = unix.EpollCreate1(0); err != nil {
		return -1, err
	}
	return ep, unix.EpollCtl(ep, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(fd)})
}

func crowdWait(ep int) ([]int, error) {
	var events [128]unix.EpollEvent
	for {
		n, err := unix.EpollWait(ep, events[:], -1)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, err
		}
		var ready []int
		for _, e := range events[:n] {
			ready = append(ready, int(e.Fd))
		}
		return ready, nil
	}
}
