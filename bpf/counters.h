/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
#ifndef SKIPSTACK_COUNTERS_H
#define SKIPSTACK_COUNTERS_H

#include "endpoint.h"

/* What became of a connection at its handshake. */
enum connection_outcome {
	CONNECTION_ENROLLED,	     /* both ends are in the sockhash and may redirect */
	CONNECTION_REMOTE_SERVER,    /* no enabled listener on this node answered */
	CONNECTION_REMOTE_CLIENT,    /* no enabled client on this node claimed it */
	CONNECTION_BLOCKING,	     /* an end is not O_NONBLOCK and the risk is not accepted, or has no file */
	CONNECTION_EXCLUDED_PORT,
	CONNECTION_MPTCP,
	CONNECTION_RCVLOWAT,	     /* SO_RCVLOWAT over 1, where the funnel would break it */
	CONNECTION_EARLY_DATA,	     /* bytes were queued before the handshake ended */
	CONNECTION_REPAIRED,	     /* TCP_REPAIR: no handshake took place */
	CONNECTION_UNPROVEN,	     /* its segment is not the other end's own (sent_by) */
	CONNECTION_SELF,	     /* the socket is connected to itself */
	CONNECTION_GATE_CLOSED,	     /* the client's pod does not take part */
	CONNECTION_LATE_CLAIM,	     /* the client answered after the claim window */
	CONNECTION_CONTESTED,	     /* a second socket claimed the same record */
	CONNECTION_LOST_RACE,	     /* the client sent before the server was enrolled */
	CONNECTION_MAP_FULL,
	CONNECTION_OTHER_OWNER,	     /* the socket is in somebody else's sockmap (-EBUSY) */
	CONNECTION_FAILED,	     /* any other error of the kernel */
	CONNECTION_OUTCOMES,
};

/* Other things worth counting. */
enum event {
	EVENT_SYN_RECORDED,	 /* SYN records written */
	EVENT_PEER_GONE_TIMEOUT, /* TCP_USER_TIMEOUT set because the peer is gone */
	EVENT_FUNNELED,		 /* skbs moved by the sk_skb verdict program */
	EVENT_TRIMMED_BYTES,	 /* bytes of retransmissions that were already moved */
	EVENTS,
};

/* Keeps the enumerations in the object's BTF, from which the Go types are made. */
const enum message_outcome *message_outcome_type __attribute__((unused));
const enum event *event_type __attribute__((unused));

struct counters {
	struct message_count message[MESSAGE_OUTCOMES];
	__u64 connection[CONNECTION_OUTCOMES];
	__u64 event[EVENTS];
};

/* Writers: all programs, each on its own CPU. Reader: user space, which sums
 * over CPUs. Never cleared. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct counters);
} skipstack_count SEC(".maps");

static __always_inline struct counters *counters(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&skipstack_count, &zero);
}

static __always_inline void count_message(enum message_outcome o, __u32 bytes)
{
	struct counters *c = counters();

	if (!c)
		return;
	c->message[o].messages++;
	c->message[o].bytes += bytes;
}

static __always_inline void count_connection(enum connection_outcome o)
{
	struct counters *c = counters();

	if (c && o < CONNECTION_OUTCOMES)
		c->connection[o]++;
}

static __always_inline void count_event(enum event e, __u64 n)
{
	struct counters *c = counters();

	if (c)
		c->event[e] += n;
}

#endif
