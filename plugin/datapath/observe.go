package datapath

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/bpf"
)

// Observation is one look at a set: what its counters and its sockets say. The
// numbers agree with each other as far as traffic goes on while they are read.
type Observation struct {
	Node           NodeSettings
	Build          [16]byte
	MaxConnections uint32
	// Counters are the node's since the set was loaded. They include pods that
	// are gone.
	Counters Counters
	// Pods are those that are attached, by cgroup id. Unlike [Set.PodCounters]
	// it counts the messages of live connections too.
	Pods map[uint64]PodCounters
	// Settings are those of the pods that take part, by cgroup id.
	Settings map[uint64]PodSettings
	// Connections are the live ones, oldest first.
	Connections []Connection
	Sockets     Usage // of the sockhash
	Attached    Usage // of the map of pods
}

// Usage is how full a map is.
type Usage struct {
	Entries uint64 `json:"entries"`
	Max     uint64 `json:"max"`
}

// Connection is a pair of sockets that the handshake has shown to be the two ends
// of a connection. One of them is nil where it has closed already, or where it has
// not been recognised yet.
type Connection struct {
	Client, Server *Socket
}

// Age is how long ago the client's SYN came.
func (c Connection) Age() time.Duration {
	if c.Client != nil {
		return c.Client.Age
	}
	return c.Server.Age
}

// Accelerated tells if messages of the connection may be redirected, in at least
// one direction.
func (c Connection) Accelerated() bool {
	return c.Client != nil && c.Client.Mode == ModeRedirect || c.Server != nil && c.Server.Mode == ModeRedirect
}

// Mode is what has been decided about what a socket sends.
type Mode string

const (
	ModeUndecided Mode = "undecided" // a client that has not sent yet
	ModeRedirect  Mode = "redirect"  // to the peer, as long as no byte is overtaken
	ModePlain     Mode = "plain"     // by TCP, for life
)

// Socket is one end of a connection between two attached pods.
type Socket struct {
	Pod           uint64 // cgroup id
	Client        bool
	Enrolled      bool // is in the sockhash
	Mode          Mode
	Local, Remote netip.AddrPort // as this end sees them; NAT makes the other's differ
	Age           time.Duration
	State         uint8 // of TCP, include/net/tcp_states.h
	// Sent by this end. Passed is what went by TCP.
	Redirected, Passed Count
	PassedBy           map[string]uint64 // messages, by the labels of package bpf
	// Unread is how many bytes wait to be read by this end. Kernels before
	// 6.12.75 and 6.18.14 do not tell; there it is the memory that the waiting
	// bytes take, which is more where some of them came by TCP.
	Unread uint64
	// Next is what would become of a message sent now, by the labels of package
	// bpf, or "undecided".
	Next string

	record bpf.SocketsSocketRecord
}

const (
	tcpEstablished = 1 // include/net/tcp_states.h
	tcpCloseWait   = 8
)

var modes = [...]Mode{
	bpf.DatapathEndpointModeENDPOINT_UNDECIDED: ModeUndecided,
	bpf.DatapathEndpointModeENDPOINT_REDIRECT:  ModeRedirect,
	bpf.DatapathEndpointModeENDPOINT_PLAIN:     ModePlain,
}

// firstPass is the outcome that the first counter of passed messages stands for.
const firstPass = bpf.DatapathMessageOutcomeMESSAGE_PLAIN

// observations is how often Observe looks again when connections have closed
// meanwhile, which would be missed.
const observations = 5

// Observe looks at the set. It loads a BPF iterator for the time it takes, and
// costs the datapath nothing. Connections that come and go meanwhile are listed
// or not.
func (s *Set) Observe() (Observation, error) {
	var o Observation
	ctl, err := s.control()
	if err != nil {
		return o, err
	}
	o.Build, o.MaxConnections = ctl.Build, ctl.MaxConnections
	if o.Node, err = s.Node(); err != nil {
		return o, err
	}
	if o.Settings, err = s.podSettings(); err != nil {
		return o, err
	}
	var sockets []*Socket
	if o.Pods, err = s.PodCounters(); err != nil {
		return o, err
	}
	for try := 1; ; try++ {
		if sockets, err = s.sockets(); err != nil {
			return o, err
		}
		later, err := s.PodCounters()
		if err != nil {
			return o, err
		}
		// The earlier counters: what has closed since counts next time, and not twice now.
		if try == observations || maps.EqualFunc(o.Pods, later, PodCounters.equal) {
			break
		}
		o.Pods = later
	}
	if o.Counters, err = s.Counters(); err != nil {
		return o, err
	}
	o.Sockets.Max = uint64(s.maps[bpf.DatapathMapSocks].MaxEntries())
	o.Attached = Usage{uint64(len(o.Settings)), uint64(s.maps[bpf.DatapathMapPods].MaxEntries())}
	for _, k := range sockets {
		if k.Enrolled {
			o.Sockets.Entries++
		}
		if p, ok := o.Pods[k.Pod]; ok {
			o.Pods[k.Pod] = p.with(k)
		}
	}
	o.Connections = pair(sockets)
	for _, c := range o.Connections {
		for _, ends := range [][2]*Socket{{c.Client, c.Server}, {c.Server, c.Client}} {
			own, peer := ends[0], ends[1]
			if own != nil {
				own.Next = next(own, peer, o.Node, o.Settings)
				own.Unread = own.unread(o.Node.Funnel)
			}
		}
	}
	return o, nil
}

func (p PodCounters) equal(q PodCounters) bool {
	return p.Live == q.Live && p.Redirected == q.Redirected && p.Passed == q.Passed
}

// with adds a live socket.
func (p PodCounters) with(k *Socket) PodCounters {
	if k.Enrolled {
		p.Enrolled++
	}
	if k.Mode == ModeRedirect {
		p.Accelerated++
	}
	p.Redirected = p.Redirected.Plus(k.Redirected)
	p.Passed = p.Passed.Plus(k.Passed)
	for label, n := range k.PassedBy {
		p.PassedBy[label] += n
	}
	return p
}

// passes labels counters of passed messages, and sums them up.
func passes[N uint32 | uint64](counters []N) (by map[string]uint64, sum uint64) {
	by = map[string]uint64{}
	for i, n := range counters {
		by[bpf.MessageLabels[int(firstPass)+i]] = uint64(n)
		sum += uint64(n)
	}
	return by, sum
}

// podSettings reads the settings of every pod.
func (s *Set) podSettings() (map[uint64]PodSettings, error) {
	pods := map[uint64]PodSettings{}
	var id uint64
	var v bpf.DatapathPod
	it := s.maps[bpf.DatapathMapPods].Iterate()
	for it.Next(&id, &v) {
		pods[id] = settingsOf(v)
	}
	if err := it.Err(); err != nil {
		return nil, fmt.Errorf("read the pods' settings: %w", err)
	}
	return pods, nil
}

// sockets lists the open sockets that have an endpoint record.
func (s *Set) sockets() ([]*Socket, error) {
	spec, err := bpf.LoadSockets()
	if err != nil {
		return nil, fmt.Errorf("read the embedded iterator: %w", err)
	}
	coll, err := ebpf.NewCollection(spec)
	if err != nil {
		return nil, fmt.Errorf("load the iterator of sockets: %w", err)
	}
	defer coll.Close()
	it, err := link.AttachIter(link.IterOptions{
		Program: coll.Programs[bpf.SocketsProgListSockets],
		Map:     s.maps[bpf.DatapathMapEndpoints],
	})
	if err != nil {
		return nil, fmt.Errorf("attach the iterator of sockets: %w", err)
	}
	defer it.Close()
	file, err := it.Open()
	if err != nil {
		return nil, fmt.Errorf("list sockets: %w", err)
	}
	defer file.Close()
	raw, err := io.ReadAll(file)
	if err != nil {
		return nil, fmt.Errorf("list sockets: %w", err)
	}
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		return nil, fmt.Errorf("read the clock: %w", err)
	}
	return decodeSockets(raw, uint64(ts.Nano()))
}

// end identifies one end of a connection.
type end struct{ snd, rcv, server, client uint32 }

func endOf(r *bpf.SocketsSocketRecord) end {
	e := &r.Endpoint
	return end{e.Own.Snd, e.Own.Rcv, e.Secret.Server, e.Secret.Client}
}

func (e end) mirror() end { return end{e.rcv, e.snd, e.server, e.client} }

// decodeSockets reads what the iterator wrote. The kernel may list a socket twice
// when others of its hash bucket come and go.
func decodeSockets(raw []byte, now uint64) ([]*Socket, error) {
	size := binary.Size(bpf.SocketsSocketRecord{})
	if len(raw)%size != 0 {
		return nil, fmt.Errorf("list sockets: %d bytes are not a multiple of %d", len(raw), size)
	}
	sockets := make([]*Socket, 0, len(raw)/size)
	seen := map[uint64]bool{}
	for r := bytes.NewReader(raw); ; {
		k := &Socket{}
		if err := binary.Read(r, binary.NativeEndian, &k.record); errors.Is(err, io.EOF) {
			return sockets, nil
		} else if err != nil {
			return nil, fmt.Errorf("list sockets: %w", err)
		}
		if seen[k.record.Cookie] {
			continue
		}
		seen[k.record.Cookie] = true
		e := &k.record.Endpoint
		k.Pod, k.Client, k.Enrolled, k.State = e.Pod, e.IsClient != 0, e.Enrolled != 0, k.record.State
		k.Mode = modes[min(int(e.Mode), len(modes)-1)]
		k.Local = addrPort(k.record.Family, k.record.Local, k.record.LocalPort)
		k.Remote = addrPort(k.record.Family, k.record.Remote, k.record.RemotePort)
		k.Age = time.Duration(now - min(now, e.SinceNs))
		k.Redirected = Count{e.Redirected.Messages, e.Redirected.Bytes}
		k.Passed.Bytes = e.PassedBytes
		k.PassedBy, k.Passed.Messages = passes(e.Passed[:])
		sockets = append(sockets, k)
	}
}

func addrPort(family uint16, addr [16]byte, port uint16) netip.AddrPort {
	if family == unix.AF_INET6 {
		return netip.AddrPortFrom(netip.AddrFrom16(addr).Unmap(), port)
	}
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte(addr[:4])), port)
}

// pair finds the two ends of each connection.
func pair(sockets []*Socket) []Connection {
	servers := map[end]*Socket{}
	for _, k := range sockets {
		if !k.Client {
			servers[endOf(&k.record).mirror()] = k
		}
	}
	var all []Connection
	for _, k := range sockets {
		if k.Client {
			id := endOf(&k.record)
			all = append(all, Connection{Client: k, Server: servers[id]})
			delete(servers, id)
		}
	}
	for _, k := range servers {
		all = append(all, Connection{Server: k})
	}
	slices.SortFunc(all, func(a, b Connection) int {
		return cmp.Or(cmp.Compare(b.Age(), a.Age()), cmp.Compare(a.cookie(), b.cookie()))
	})
	return all
}

func (c Connection) cookie() uint64 {
	if c.Client != nil {
		return c.Client.record.Cookie
	}
	return c.Server.record.Cookie
}

// unread is what FIONREAD would say, if it counted all of it. Where the funnel is
// attached, what came by TCP is moved to the queue of redirected bytes.
func (k *Socket) unread(funnel bool) uint64 {
	r := &k.record
	tcp := uint64(r.Unread)
	if tcp > 0 && k.State != tcpEstablished { // a FIN counts as one
		tcp--
	}
	switch {
	case !k.Enrolled:
		return tcp
	case r.QueuedKnown == 0:
		return uint64(r.Charged)
	case funnel:
		return uint64(r.Queued)
	}
	return uint64(r.Queued) + tcp
}

// next follows classify() in bpf/datapath.bpf.c, which decides when a message is
// sent, on what it would find.
func next(own, peer *Socket, node NodeSettings, pods map[uint64]PodSettings) string {
	outcome := func() bpf.DatapathMessageOutcome {
		e := &own.record.Endpoint
		accelerates := func(pod uint64) bool {
			settings, ok := pods[pod]
			return ok && node.Accelerates(settings)
		}
		switch {
		case own.Mode != ModeRedirect:
			return bpf.DatapathMessageOutcomeMESSAGE_PLAIN
		case own.State != tcpEstablished && own.State != tcpCloseWait:
			return bpf.DatapathMessageOutcomeMESSAGE_CLOSING
		case own.record.Ulp != 0:
			return bpf.DatapathMessageOutcomeMESSAGE_ULP
		case peer == nil || !peer.Enrolled:
			return bpf.DatapathMessageOutcomeMESSAGE_PEER_GONE
		case !accelerates(own.Pod) || !accelerates(peer.Pod):
			return bpf.DatapathMessageOutcomeMESSAGE_SWITCHED_OFF
		case e.PassedBytes > 0 && own.record.Unacknowledged > 0:
			return bpf.DatapathMessageOutcomeMESSAGE_UNACKNOWLEDGED
		case e.PassedBytes > 0 && (peer.record.Segments > 0 || node.Funnel && peer.record.Moving > 0):
			return bpf.DatapathMessageOutcomeMESSAGE_NOT_READ
		case e.Limit > 0 && peer.record.Charged > 0 &&
			uint64(peer.record.Charged)+messageOverhead*uint64(e.Queued) >= uint64(e.Limit):
			return bpf.DatapathMessageOutcomeMESSAGE_RECEIVER_FULL
		case e.Pressure != 0:
			return bpf.DatapathMessageOutcomeMESSAGE_MEMORY
		}
		return bpf.DatapathMessageOutcomeMESSAGE_REDIRECTED
	}
	if own.Mode == ModeUndecided {
		return string(ModeUndecided)
	}
	return bpf.MessageLabels[outcome()]
}

// messageOverhead is SK_MSG_OVERHEAD of bpf/peers.h.
const messageOverhead = 1024
