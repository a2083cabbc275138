package verdict

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/plugin/datapath"
)

// Memory is the kernel memory that acceleration takes, in bytes. Unread redirected
// bytes are not in it: they take the place of bytes that TCP would hold.
type Memory struct {
	MaxConnections uint32 `json:"maxConnections"` // that all this is for
	Maps           uint64 `json:"maps"`           // of a datapath without connections
	Programs       uint64 `json:"programs"`
	Connection     uint64 `json:"connection"` // of one connection, beyond what TCP takes
	Maximum        uint64 `json:"maximum"`    // with MaxConnections
	Measured       uint64 `json:"measured"`   // connections that were made to find out
}

// MeasureMemory makes connections in a scratch cgroup, as [Run] does, and works
// out what a datapath for maxConnections takes. funnel is [Verdict.Funnel].
//
// The error wraps [datapath.ErrUnsupported] where the programs do not load,
// [ErrPrivilege] where the caller may not. Nothing is left when it returns.
func MeasureMemory(ctx context.Context, env Env, maxConnections uint32, funnel bool) (m Memory, err error) {
	if env, err = env.complete(); err != nil {
		return m, err
	}
	start := time.Now()
	o := probeSet()
	o.MaxConnections = crowdConnections
	set, err := datapath.LoadPrivate(o)
	if err != nil {
		return m, privilege(err)
	}
	p := &prober{env: env, set: set, start: start, left: 1}
	defer func() { err = errors.Join(err, p.close()) }()
	if _, m.Programs, err = set.Memory(); err != nil {
		return m, err
	}
	if m.Maps, err = datapath.MapMemory(maxConnections); err != nil {
		return m, privilege(err)
	}
	runtime.LockOSThread() // see startWorker
	defer runtime.UnlockOSThread()
	if err := p.begin(ctx); err != nil {
		return m, err
	}
	defer func() { err = errors.Join(err, p.endWorker()) }()
	got, err := p.observe(ctx, expCrowd, allRedirected, settle)
	if err != nil {
		return m, err
	}
	if why := cmp.Or(got.trouble, got.Fault); why != "" {
		return m, fmt.Errorf("measure what a connection takes: %s", why)
	}
	socket, err := datapath.SocketMemory(got.Storage/(2*got.Connections), funnel)
	if err != nil {
		return m, err
	}
	m.MaxConnections, m.Connection, m.Measured = maxConnections, 2*socket, got.Connections
	m.Maximum = m.Maps + m.Programs + m.Connection*uint64(maxConnections)
	return m, nil
}

// crowdConnections is how many connections are made to see what they take.
const crowdConnections = 64

// crowd makes connections and sums up what the kernel charges to their sockets
// for storage.
func crowd(l lab) (finding, error) {
	var f finding
	var socks []sock
	defer func() {
		for _, s := range socks {
			s.close()
		}
	}()
	for range crowdConnections {
		client, server, err := l.connect(overIPv4())
		if err != nil {
			return f, err
		}
		socks = append(socks, client, server)
		f.Connections++
		// A connection that has sent is one that is in use.
		msg := []byte{byte(f.Connections)}
		if err := l.send(client, msg); err != nil {
			return f, err
		}
		f.Sent++
		if err := l.expect(server, msg); err != nil {
			return asFault(f, err)
		}
	}
	if err := f.settled(socks...); err != nil {
		return f, err
	}
	for _, s := range socks {
		n, err := storage(s)
		if err != nil {
			return f, err
		}
		f.Storage += n
	}
	return f, nil
}

// storage is what the kernel charges to the socket for options and socket storage.
func storage(s sock) (uint64, error) {
	// enum sk_meminfo, include/uapi/linux/sock_diag.h.
	const optmem, vars = 6, 9
	var buf [vars * 4]byte
	size := uint32(len(buf))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(s.fd), unix.SOL_SOCKET, unix.SO_MEMINFO,
		uintptr(unsafe.Pointer(&buf)), uintptr(unsafe.Pointer(&size)), 0)
	if errno != 0 {
		return 0, fmt.Errorf("getsockopt(SO_MEMINFO): %w", errno)
	}
	if size < (optmem+1)*4 {
		return 0, fmt.Errorf("getsockopt(SO_MEMINFO): %d bytes", size)
	}
	return uint64(binary.NativeEndian.Uint32(buf[optmem*4:])), nil
}
