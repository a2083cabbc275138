package conformance

import (
	"testing"

	"github.com/skipstack/skipstack/plugin/datapath"
)

// A deviation is a known difference from plain TCP.
type deviation struct {
	name    string // of the behaviour
	differs string // for users
	why     string // the kernel's reason, and the function
	where   *condition
	// switched: where the same is so when the connection is switched off; nil: nowhere.
	switched *condition
	// switchedOnly: it is so only then.
	switchedOnly bool
}

// A condition is something on which it depends whether a kernel deviates.
type condition struct {
	text string
	// holds tells if it is so; nil: nothing but the behaviour itself can tell, so
	// that either outcome is right.
	holds func(kernel) bool
}

var (
	unguarded = &condition{"where splice(2) cannot be guarded", func(k kernel) bool { return k.Risks&datapath.RiskSplice != 0 }}
	guarded   = &condition{"where splice(2) is guarded", func(k kernel) bool { return k.Risks&datapath.RiskSplice == 0 }}
	// Kernels without kTLS refuse to attach it to any socket.
	refusesTLS = &condition{text: "where splice(2) is guarded, and on some other kernels (seen on 6.12.117)"}
	funnelled  = &condition{"where FIONREAD needs the funnel (see datapath.md)", func(k kernel) bool { return k.Funnel }}
	always     = &condition{"everywhere", func(kernel) bool { return true }}
	uncounted  = &condition{"where FIONREAD does not count redirected bytes", func(k kernel) bool { return k.Risks&datapath.RiskFIONREAD != 0 }}
)

// Reasons that explain several deviations.
const (
	waitsOnce = "`tcp_msg_wait_data()` waits once, and `tcp_bpf_recvmsg()` and `tcp_bpf_recvmsg_parser()` answer any " +
		"wake-up that brought no bytes with EAGAIN. Sockets that are not O_NONBLOCK are accelerated only if the risk `blocking` is accepted"
	copiesAlways = "`sk_msg_recvmsg()` copies what is queued and knows of no flag but MSG_PEEK"
	noTarget     = "`sk_msg_recvmsg()` returns what is queued; only `tcp_recvmsg_locked()` has a target (`sock_rcvlowat()`)"
	noSegments   = "redirected bytes are queued on the socket by `bpf_tcp_ingress()`, never in a segment"
	noTLS        = "setsockopt(2) refuses TCP_ULP, or the keys, with EINVAL, and TLS libraries go on in user space"
	tlsTakes     = "the tls module takes redirected bytes for decrypted ones, so the splice guard refuses it; newer kernels take no keys for a socket that is in a sockmap"
	noControl    = "`tcp_bpf_recvmsg()` and `tcp_bpf_recvmsg_parser()` return no control data; `tcp_recvmsg()` does, by `tcp_recv_timestamp()` and `put_cmsg()`"
)

var deviations = []deviation{
	{
		name:     "empty recv with nothing waiting",
		differs:  "recv(2) into no room returns 0 where plain TCP returns EAGAIN or waits",
		why:      "`tcp_bpf_recvmsg()` and `tcp_bpf_recvmsg_parser()` return at once if the length is 0",
		switched: always,
	},
	{
		name:     "recv into a half-bad address",
		differs:  "the bytes that have room are received where plain TCP returns EFAULT",
		why:      "`sk_msg_recvmsg()` returns what `copy_page_to_iter()` could copy; `tcp_recvmsg_locked()` copies a segment whole or not at all",
		switched: funnelled,
	},
	{
		name:     "send from a bad address",
		differs:  "send(2) returns 0 where plain TCP returns EFAULT; nothing is sent by either",
		why:      "`tcp_bpf_sendmsg()` drops the error of `sk_msg_memcopy_from_iter()` since it was changed to add up what that returns",
		where:    &condition{text: "on kernels since about 6.12.1"},
		switched: always,
	},
	{
		name:     "close with bytes unread",
		differs:  "the other end reads the end of the stream where plain TCP reports ECONNRESET. A writer that waits gets an error, as with plain TCP",
		why:      "`__tcp_close()` sends RST for what is unread in `sk_receive_queue`, and redirected bytes are not there",
		switched: funnelled,
	},
	{
		name:     "signal with SA_RESTART",
		differs:  "a blocking recv returns EAGAIN where plain TCP goes on waiting",
		why:      waitsOnce,
		switched: always,
	},
	{
		name:     "signal without SA_RESTART",
		differs:  "a blocking recv returns EAGAIN where plain TCP returns EINTR",
		why:      waitsOnce,
		switched: always,
	},
	{
		name:     "signal without SA_RESTART and SO_RCVTIMEO",
		differs:  "a blocking recv returns EAGAIN where plain TCP returns EINTR",
		why:      waitsOnce,
		switched: always,
	},
	{
		name:     "two readers",
		differs:  "of two threads that wait in recv, the one that finds no bytes returns EAGAIN where it goes on waiting with plain TCP",
		why:      waitsOnce,
		switched: always,
	},
	{
		name:     "shutdown(SHUT_RD) by another thread while recv waits",
		differs:  "the waiting recv returns EAGAIN where plain TCP returns 0; the next one returns 0",
		why:      waitsOnce,
		switched: always,
	},
	{
		name:     "shutdown(SHUT_WR) by another thread while recv waits",
		differs:  "the waiting recv returns EAGAIN where it goes on with plain TCP",
		why:      waitsOnce,
		switched: always,
	},
	{
		name:     "RST while recv waits",
		differs:  "the waiting recv returns EAGAIN where plain TCP returns ECONNRESET; the next one reports the error",
		why:      waitsOnce,
		switched: always,
	},
	{
		name:     "SO_PEEK_OFF",
		differs:  "MSG_PEEK always begins at the first unread byte",
		why:      copiesAlways + "; `tcp_recvmsg_locked()` has `sk_peek_offset()`",
		where:    &condition{text: "on kernels whose plain TCP has SO_PEEK_OFF (6.9)"},
		switched: funnelled,
	},
	{
		name:     "MSG_TRUNC",
		differs:  "the bytes are dropped and counted, as with plain TCP, but also copied into the buffer",
		why:      copiesAlways,
		switched: funnelled,
	},
	{
		name:     "MSG_TRUNC without a buffer",
		differs:  "EFAULT, and the bytes stay",
		why:      copiesAlways,
		switched: funnelled,
	},
	{
		name:     "MSG_WAITALL",
		differs:  "a blocking recv returns what is there, as it may after a signal",
		why:      noTarget,
		switched: funnelled,
	},
	{
		name:    "SO_RCVLOWAT",
		differs: "readable from the first byte on",
		why:     "`tcp_poll()` asks `sk_msg_is_readable()`, which looks at no mark",
	},
	{
		name:    "SO_RCVLOWAT, blocking",
		differs: "a blocking recv returns with the first byte",
		why:     noTarget,
	},
	{
		name:    "MSG_OOB",
		differs: "the urgent byte arrives in the stream; there is no POLLPRI, and recv(MSG_OOB) returns ordinary bytes",
		why:     "`tcp_bpf_sendmsg()` redirects it as any other, without `tcp_mark_urg()`; " + copiesAlways,
	},
	{
		name:     "SO_OOBINLINE and SIOCATMARK",
		differs:  "the urgent byte arrives in the stream, unmarked",
		why:      "`tcp_bpf_sendmsg()` redirects it as any other, without `tcp_mark_urg()`",
		switched: funnelled,
	},
	{
		name:     "SO_RCVLOWAT",
		differs:  "as with plain TCP, but a recv below the mark returns EAGAIN",
		why:      "`tcp_data_ready()` lets the funnel move bytes to where they are read only from the mark on",
		switched: funnelled, switchedOnly: true,
	},
	{
		name:     "MSG_OOB",
		differs:  "POLLPRI comes, but the urgent byte arrives in the stream, and recv(MSG_OOB) returns ordinary bytes",
		why:      copiesAlways,
		switched: funnelled, switchedOnly: true,
	},
	{
		name:     "TCP_ZEROCOPY_RECEIVE",
		differs:  "nothing is mapped or copied while bytes wait; recv(2) returns them",
		why:      "the funnel has moved them from `sk_receive_queue`",
		switched: funnelled, switchedOnly: true,
	},
	{
		name:    "FIONREAD",
		differs: "0 while redirected bytes wait",
		why:     "`tcp_ioctl()` counts sequence numbers only, before `tcp_bpf_ioctl()` came",
		where:   uncounted,
	},
	{
		name:    "FIONREAD at the end",
		differs: "0 while redirected bytes wait",
		why:     "`tcp_ioctl()` counts sequence numbers only, before `tcp_bpf_ioctl()` came",
		where:   uncounted,
	},
	{
		name:    "TCP_INFO's byte counts",
		differs: "redirected bytes are not counted",
		why:     noSegments + ", which `tcp_get_info()` counts",
	},
	{
		name:    "/proc/net/tcp",
		differs: "redirected bytes that wait to be read are not in Recv-Q, nor in what ss(8) shows",
		why:     "`get_tcp4_sock()` and `tcp_diag_get_info()` subtract sequence numbers",
	},
	{
		name:    "SO_ATTACH_FILTER",
		differs: "redirected bytes pass by a socket's own packet filter",
		why:     noSegments + ", which `tcp_filter()` could look at",
	},
	{
		name:     "kTLS",
		differs:  noTLS,
		why:      tlsTakes,
		where:    refusesTLS,
		switched: always,
	},
	{
		name:     "kTLS on a connection in use",
		differs:  noTLS,
		why:      tlsTakes,
		where:    refusesTLS,
		switched: always,
	},
	{
		name:     "kTLS at the receiver",
		differs:  noTLS,
		why:      tlsTakes,
		where:    refusesTLS,
		switched: always,
	},
	{
		name:     "splice to a pipe",
		differs:  "EAGAIN, or no end of waiting, while redirected bytes wait: they can be received only. This is the risk `splice`",
		why:      "`tcp_splice_read()` looks at `sk_receive_queue` only",
		where:    unguarded,
		switched: funnelled,
	},
	{
		name:     "splice to a pipe",
		differs:  "EINVAL, which programs take for \"not possible here\"; the bytes can be received",
		why:      "`tcp_splice_read()` looks at `sk_receive_queue` only, so the splice guard refuses it on accelerated connections",
		where:    guarded,
		switched: always,
	},
	{
		name:     "splice to a pipe at the end",
		differs:  "EINVAL, as everywhere in such a connection",
		why:      "the splice guard refuses it",
		where:    guarded,
		switched: always,
	},
	{
		name:     "io_uring splice",
		differs:  "EAGAIN, or no end of waiting, while redirected bytes wait",
		why:      "`tcp_splice_read()` looks at `sk_receive_queue` only",
		where:    unguarded,
		switched: funnelled,
	},
	{
		name:     "io_uring splice",
		differs:  "EINVAL",
		why:      "`tcp_splice_read()` looks at `sk_receive_queue` only, so the splice guard refuses it on accelerated connections",
		where:    guarded,
		switched: always,
	},
	{
		name:    "MSG_ZEROCOPY's completion",
		differs: "the bytes are copied at once and no completion comes",
		why:     "`tcp_bpf_sendmsg()` copies and knows no MSG_ZEROCOPY (`msg_zerocopy_realloc()` is in `tcp_sendmsg_locked()`)",
	},
	{
		name:    "TCP_ZEROCOPY_RECEIVE",
		differs: "nothing is mapped or copied while redirected bytes wait; recv(2) returns them",
		why:     "`tcp_zerocopy_receive()` looks at `sk_receive_queue` only",
	},
	{
		name:     "io_uring send with zero copy",
		differs:  "EOPNOTSUPP at the client",
		why:      "`sock_replace_proto()` takes SOCK_SUPPORT_ZC from a socket that enters a sockmap; a server's is marked again by `inet_accept()`",
		where:    &condition{text: "on kernels that have it (6.0)"},
		switched: always,
	},
	{
		name:     "SO_TIMESTAMP",
		differs:  "no receive timestamps come with redirected bytes",
		why:      noControl,
		switched: funnelled,
	},
	{
		name:     "SO_TIMESTAMPING, receive",
		differs:  "no receive timestamps come with redirected bytes",
		why:      noControl,
		switched: funnelled,
	},
	{
		name:    "SO_TIMESTAMPING, transmit",
		differs: "no transmit timestamps of redirected bytes",
		why:     noSegments + ", which `tcp_tx_timestamp()` could mark",
	},
	{
		name:     "TCP_INQ",
		differs:  "the number of bytes that are left does not come with redirected bytes",
		why:      noControl,
		switched: funnelled,
	},
	{
		name:     "unknown control data",
		differs:  "ignored where plain TCP returns EINVAL",
		why:      "`tcp_bpf_sendmsg()` looks at no control data; `tcp_sendmsg_locked()` does, by `sock_cmsg_send()`",
		switched: always,
	},
	{
		name:    "receiver in a page fault",
		differs: "the sender waits until the page is there, even if it must not",
		why:     "`bpf_tcp_ingress()` takes the receiver's `lock_sock()`, which the receiver holds; segments would wait in its backlog",
	},
	{
		name:    "interface counters",
		differs: "redirected bytes are not on the interface: tcpdump(8), accounting and conntrack do not see them",
		why:     noSegments,
	},
	{
		name:    "packet filters",
		differs: "redirected bytes arrive: filters, policers and traffic control in the network see connections begin and end, but none of their bytes",
		why:     noSegments,
	},
}

// listed finds the deviation that this kernel may show.
func listed(k kernel, name string, m mode) *deviation {
	for i, d := range deviations {
		if d.name == name && d.in(m) && d.where.possible(k) && (m != switched || d.switched.possible(k)) {
			return &deviations[i]
		}
	}
	return nil
}

// in tells if the deviation may be seen in that mode on some kernel.
func (d *deviation) in(m mode) bool {
	if m == switched {
		return d.switched != nil
	}
	return m == accelerated && !d.switchedOnly
}

// possible tells if the condition may hold.
func (c *condition) possible(k kernel) bool { return c == nil || c.holds == nil || c.holds(k) }

// optional tells that the kernel need not show the deviation.
func (d *deviation) optional() bool { return d.where != nil && d.where.holds == nil }

// checkList makes sure that names are unique and every deviation has a behaviour.
func checkList(t *testing.T) {
	t.Helper()
	names := map[string]bool{}
	for _, g := range groups {
		for _, b := range g.behaviours {
			if names[b.name] {
				t.Errorf("two behaviours are called %q", b.name)
			}
			names[b.name] = true
		}
	}
	for _, d := range deviations {
		if !names[d.name] {
			t.Errorf("a deviation of %q, which is no behaviour", d.name)
		}
	}
}
