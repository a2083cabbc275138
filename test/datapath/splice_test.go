package datapath_test

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/plugin/datapath"
	"github.com/skipstack/skipstack/plugin/uring"
	"github.com/skipstack/skipstack/test/datapath/traffic"
	"github.com/skipstack/skipstack/test/must"
	"github.com/skipstack/skipstack/test/node"
)

// guarded is a test without a splice guard, and with each form of it, in one lab.
func guarded(t *testing.T, f func(l *lab) func(t *testing.T, guard datapath.Guard)) {
	l := newLab(t, datapath.NodeSettings{}, datapath.LoadOptions{})
	test := f(l)
	for _, guard := range append([]datapath.Guard{datapath.NoGuard}, datapath.Guards()...) {
		name := string(guard)
		if guard == datapath.NoGuard {
			name = "no guard"
		}
		t.Run(name, func(t *testing.T) {
			err := l.set.SetNode(datapath.NodeSettings{Open: true, Guard: guard})
			if errors.Is(err, datapath.ErrGuard) && errors.Is(err, unix.EPERM) {
				t.Skipf("needs a kernel that permits it: %v", err)
			}
			must.Do(t, err)
			test(t, guard)
		})
	}
}

// mover is a way of moving bytes from a socket to a pipe without read(2).
type mover struct {
	name string
	move func(t *testing.T, in, out, n int) (int, error)
}

// movers are all of them: tee(2) and vmsplice(2) do not take sockets, and
// copy_file_range(2) takes regular files.
var movers = []mover{
	{"splice", func(_ *testing.T, in, out, n int) (int, error) {
		moved, err := unix.Splice(in, nil, out, nil, n, unix.SPLICE_F_NONBLOCK)
		return int(moved), err
	}},
	{"splice from a blocking pipe", func(_ *testing.T, in, out, n int) (int, error) {
		moved, err := unix.Splice(in, nil, out, nil, n, 0)
		return int(moved), err
	}},
	{"sendfile", func(_ *testing.T, in, out, n int) (int, error) { return unix.Sendfile(out, in, nil, n) }},
	{"io_uring", func(t *testing.T, in, out, n int) (int, error) {
		return viaRing(t, uring.Request{Op: uring.OpSplice, FD: int32(out), Offset: uring.NoOffset, Addr: uring.NoOffset, Len: uint32(n), SpliceFD: int32(in)}, nil)
	}},
	{"32-bit splice", compat("splice")},
	{"32-bit sendfile", compat("sendfile")},
	{"32-bit sendfile64", compat("sendfile64")},
}

// viaRing makes one request of io_uring and returns its result.
func viaRing(t *testing.T, q uring.Request, buf []byte) (int, error) {
	t.Helper()
	ring, err := uring.New()
	if errors.Is(err, uring.ErrRefused) {
		t.Skipf("needs io_uring: %v", err)
	}
	must.Do(t, err)
	defer func() { must.Do(t, ring.Close()) }()
	must.Do(t, ring.Submit(q, buf))
	res := must.Get(ring.Wait())(t)
	if res < 0 {
		return 0, unix.Errno(-res)
	}
	return int(res), nil
}

// compat lets a 32-bit program do it.
func compat(call string) func(*testing.T, int, int, int) (int, error) {
	return func(t *testing.T, in, out, n int) (int, error) {
		program := filepath.Join(node.ProgramDir(), "compat")
		if _, err := os.Stat(program); err != nil {
			t.Skip("needs the 32-bit program of test/vm/compat, which virtual machines have")
		}
		cmd := exec.Command(program, call, fmt.Sprint(n))
		for _, fd := range []int{in, out} {
			dup := must.Get(unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0))(t)
			f := os.NewFile(uintptr(dup), "")
			defer f.Close()
			cmd.ExtraFiles = append(cmd.ExtraFiles, f)
		}
		said, err := cmd.CombinedOutput()
		must.Do(t, err)
		var moved, errno int
		if _, err := fmt.Sscan(string(said), &moved, &errno); err != nil {
			t.Fatalf("%q: %v", said, err)
		}
		if errno != 0 {
			return moved, unix.Errno(errno)
		}
		return moved, nil
	}
}

// Whatever moves bytes from an enrolled socket past read(2) does not see redirected
// ones. With a guard it says so, at once; sockets that are not enrolled are left
// alone, and so are other ways of reading.
func TestSpliceIsRefused(t *testing.T) {
	guarded(t, func(l *lab) func(*testing.T, datapath.Guard) {
		client, server := l.pod("client", enabled), l.pod("server", enabled)
		plain := l.plainPod("plain")
		return func(t *testing.T, guard datapath.Guard) { spliceIsRefused(t, l, client, server, plain, guard) }
	})
}

func spliceIsRefused(t *testing.T, l *lab, client, server, plain *pod, guard datapath.Guard) {
	before := l.counters()
	a, b := client.pair(t, server.listen(t, server.at(false, 0), traffic.SocketOptions{}), traffic.SocketOptions{})
	c, d := plain.pair(t, server.listen(t, server.at(false, 0), traffic.SocketOptions{}), traffic.SocketOptions{})
	if n := l.counters().Since(before).Connections["enrolled"]; n != 1 {
		t.Fatalf("%d connections are enrolled, want 1", n)
	}
	msg := []byte("some bytes")
	want := error(unix.EAGAIN) // as if nothing had come
	if guard != datapath.NoGuard {
		want = unix.EINVAL
	}
	for _, m := range movers {
		t.Run(m.name, func(t *testing.T) {
			for _, way := range [][2]*traffic.Conn{{a, b}, {b, a}} {
				_, w := pipe(t)
				must.Get(way[0].Write(msg))(t)
				before, refusals := l.counters(), uint64(0)
				if guard != datapath.NoGuard {
					refusals = 1
				}
				if n, err := m.move(t, way[1].FD, w, len(msg)); n > 0 || err != want {
					t.Errorf("%d, %v; want %v", n, err, want)
				}
				if n := l.counters().Since(before).Events[datapath.EventSpliceRefused]; n != refusals {
					t.Errorf("%d refusals counted, want %d", n, refusals)
				}
				wantBytes(t, way[1], msg)
			}
			r, w := pipe(t)
			must.Get(c.Write(msg))(t)
			must.Get(traffic.Poll(d.FD, unix.POLLIN, patience))(t)
			n, err := m.move(t, d.FD, w, len(msg))
			if n != len(msg) || err != nil {
				t.Fatalf("from a socket that is not enrolled: %d, %v", n, err)
			}
			wantBytes(t, r, msg)
		})
	}
	t.Run("io_uring read", func(t *testing.T) {
		must.Get(a.Write(msg))(t)
		buf := make([]byte, len(msg))
		n, err := viaRing(t, uring.Request{Op: uring.OpRead, RequestFlags: uring.ForceAsync, FD: int32(b.FD), Offset: uring.NoOffset}, buf)
		if n != len(msg) || err != nil || !bytes.Equal(buf, msg) {
			t.Errorf("%d, %v, %q", n, err, buf)
		}
	})
	t.Run("to the socket", func(t *testing.T) {
		r, w := pipe(t)
		must.Get(w0(w).Write(msg))(t)
		if n, err := unix.Splice(int(r.Fd()), nil, a.FD, nil, len(msg), 0); int(n) != len(msg) || err != nil {
			t.Fatalf("%d, %v", n, err)
		}
		wantBytes(t, b, msg)
	})
	t.Run("tee", func(t *testing.T) {
		r, w := pipe(t)
		r2, w2 := pipe(t)
		must.Get(w0(w).Write(msg))(t)
		if n, err := unix.Tee(int(r.Fd()), w2, len(msg), 0); int(n) != len(msg) || err != nil {
			t.Fatalf("%d, %v", n, err)
		}
		wantBytes(t, r2, msg)
	})
}

// pipe makes a pipe that is closed with the test.
func pipe(t *testing.T) (r *os.File, w int) {
	t.Helper()
	r, f, err := os.Pipe()
	must.Do(t, err)
	t.Cleanup(func() { r.Close(); f.Close() })
	// Fd makes it blocking, which the emptiness of a pipe does not matter to.
	return r, int(f.Fd())
}

// w0 writes to a descriptor.
type w0 int

func (w w0) Write(b []byte) (int, error) { return unix.Write(int(w), b) }

func wantBytes(t *testing.T, from io.Reader, want []byte) {
	t.Helper()
	got := make([]byte, len(want))
	if n, err := io.ReadFull(from, got); err != nil || !bytes.Equal(got, want) {
		t.Errorf("%d bytes, %v: %q, want %q", n, err, got, want)
	}
}

func goConn(t *testing.T, c *traffic.Conn) *net.TCPConn {
	t.Helper()
	conn := must.Get(c.Go())(t)
	t.Cleanup(func() { conn.Close() })
	return conn
}

// splicePatience is how long a proxy may take on an emulated machine, and how long
// one that does not work is watched.
const (
	splicePatience = time.Minute
	spliceWatch    = 2 * time.Second
)

// A Go proxy moves bytes with splice(2) unless that is refused. Without a guard
// nothing gets through. Both proxies are between accelerated connections.
func TestGoProxies(t *testing.T) {
	guarded(t, func(l *lab) func(*testing.T, datapath.Guard) {
		client, proxy, server := l.pod("client", enabled), l.pod("proxy", enabled), l.pod("server", enabled)
		return func(t *testing.T, guard datapath.Guard) { goProxies(t, l, client, proxy, server, guard) }
	})
}

func goProxies(t *testing.T, l *lab, client, proxy, server *pod, guard datapath.Guard) {
	front := proxy.listen(t, proxy.at(false, 0), traffic.SocketOptions{})
	back := server.listen(t, server.at(false, 0), traffic.SocketOptions{})
	for name, connect := range map[string]func(*testing.T) (a, b *net.TCPConn){
		"L4": func(t *testing.T) (a, b *net.TCPConn) {
			a1, p1 := client.pair(t, front, traffic.SocketOptions{})
			p2, b1 := proxy.pair(t, back, traffic.SocketOptions{})
			go traffic.Join(goConn(t, p1), goConn(t, p2))
			return goConn(t, a1), goConn(t, b1)
		},
		"CONNECT": func(t *testing.T) (a, b *net.TCPConn) { return connectProxy(t, client, proxy, front, back) },
	} {
		t.Run(name, func(t *testing.T) {
			before := l.counters()
			a, b := connect(t)
			if n := l.counters().Since(before).Connections["enrolled"]; n != 2 {
				t.Fatalf("%d connections are enrolled, want 2", n)
			}
			wait := splicePatience
			if guard == datapath.NoGuard {
				wait = spliceWatch
			}
			err := errors.Join(a.SetDeadline(time.Now().Add(wait)), b.SetDeadline(time.Now().Add(wait)))
			must.Do(t, err)
			content := make([]byte, 1<<20)
			rand.Read(content)
			err = errors.Join(traffic.Relayed(a, b, content), traffic.Relayed(b, a, content))
			if guard == datapath.NoGuard {
				if !errors.Is(err, os.ErrDeadlineExceeded) {
					t.Errorf("without a guard the proxy should hang: %v", err)
				}
				return
			}
			must.Do(t, err)
			must.Do(t, errors.Join(a.CloseWrite(), b.CloseWrite()))
			for _, c := range []*net.TCPConn{a, b} {
				if n, err := c.Read(make([]byte, 1)); n != 0 || err != io.EOF {
					t.Errorf("%d, %v, want the end of the stream", n, err)
				}
			}
			if m := l.counters().Since(before).Messages["redirected"]; m.Bytes < 1<<20 {
				t.Errorf("only %d bytes were redirected", m.Bytes)
			}
		})
	}
}

// connectProxy connects the client to the listener at the back by way of an HTTP
// proxy that serves CONNECT on the one in front.
func connectProxy(t *testing.T, client, proxy *pod, front, back *traffic.Listener) (a, b *net.TCPConn) {
	t.Helper()
	// The proxy's own listener is a duplicate: http.Server closes it.
	file := os.NewFile(uintptr(must.Get(unix.FcntlInt(uintptr(front.FD), unix.F_DUPFD_CLOEXEC, 0))(t)), "listener")
	listener := must.Get(net.FileListener(file))(t)
	must.Do(t, file.Close())
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		to, err := netip.ParseAddrPort(r.Host)
		var out *traffic.Conn
		if err == nil && r.Method == http.MethodConnect {
			out, err = proxy.host.Dial(to, traffic.SocketOptions{})
		}
		if err != nil || out == nil {
			http.Error(w, fmt.Sprint(err), http.StatusBadGateway)
			return
		}
		conn, err := out.Go()
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadGateway)
			return
		}
		w.WriteHeader(http.StatusOK)
		in, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			conn.Close()
			return
		}
		traffic.Join(in.(*net.TCPConn), conn)
	})}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(listener) }()
	t.Cleanup(func() {
		srv.Close()
		if err := <-served; !errors.Is(err, http.ErrServerClosed) {
			t.Error(err)
		}
	})
	a = goConn(t, client.dialed(t, front))
	must.Do(t, a.SetDeadline(time.Now().Add(splicePatience)))
	fmt.Fprintf(a, "CONNECT %s HTTP/1.1\r\nHost: %s\r\n\r\n", back.Addr, back.Addr)
	var head strings.Builder
	for !strings.HasSuffix(head.String(), "\r\n\r\n") {
		var one [1]byte
		if _, err := a.Read(one[:]); err != nil {
			t.Fatalf("the proxy's answer: %q, %v", head.String(), err)
		}
		head.WriteByte(one[0])
	}
	if !strings.HasPrefix(head.String(), "HTTP/1.1 200 ") {
		t.Fatalf("the proxy's answer: %q", head.String())
	}
	return a, goConn(t, must.Get(back.Accept())(t))
}

// dialed connects, and leaves it to a server to accept.
func (p *pod) dialed(t *testing.T, l *traffic.Listener) *traffic.Conn {
	t.Helper()
	return must.Get(p.host.Dial(l.Addr, traffic.SocketOptions{}))(t)
}
