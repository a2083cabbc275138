/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/* What queued messages cost. The kernel allocates a struct sk_msg for each message
 * in a receiver's queue and charges it to nobody. A receiver's limit bounds what it
 * alone may cost; here is bounded what all of them together may.
 *
 * A sender reserves room for some messages at a time, in the name of the receiver,
 * and gives it back when it finds that nothing is left unread. What a sender that is
 * gone, or silent, has not given back is given back when the receiver closes, or
 * found when the room runs out. */
#ifndef SKIPSTACK_QUEUES_H
#define SKIPSTACK_QUEUES_H

#include "maps.h"

/* What a queued message costs beyond its bytes, in bytes: struct sk_msg. */
#define SK_MSG_OVERHEAD 1024

/* So many messages a receiver may always hold, as plain TCP leaves every socket a
 * page (tcp_rmem[0]): a request and its answer reserve nothing. */
#define UNRESERVED_MESSAGES 4

/* So many are reserved at once: a stream shares a counter with other CPUs seldom. */
#define RESERVE_STEP 64

/* How often what is reserved may be compared with what is there, in nanoseconds. */
#define SWEEP_INTERVAL 1000000000ULL

/* The messages that may wait in one receiver's queue, beyond UNRESERVED_MESSAGES. */
struct queue {
	__u64 receiver_sk;
	__u64 messages;
};

/* Keyed by the receiver's socket cookie.
 * Writer: sk_msg of the only sender, under its lock. Readers: sk_msg.
 * Deleted by the sender when the receiver has read all; by sock_ops when the
 * receiver closes; by sk_msg of any sender, when the room or the map runs out, if the
 * receiver has nothing unread or is gone. An absent one that cannot be made means
 * plain TCP. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, DEFAULT_MAX_CONNECTIONS / 8);
	__type(key, __u64);
	__type(value, struct queue);
} queues SEC(".maps");

struct reserved {
	__u64 messages; /* the sum over `queues` */
	__u64 swept_ns; /* CLOCK_MONOTONIC */
};

/* Writers: sk_msg, and sock_ops. Reader: sk_msg. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct reserved);
} queues_sum SEC(".maps");

static __always_inline struct reserved *reserved_sum(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&queues_sum, &zero);
}

/* give_back ends a receiver's reservation. Who deletes it subtracts it. */
static __always_inline void give_back(__u64 cookie)
{
	struct queue *q = bpf_map_lookup_elem(&queues, &cookie);
	struct reserved *sum = reserved_sum();
	__u64 messages;

	if (!q || !sum)
		return;
	messages = q->messages;
	if (!bpf_map_delete_elem(&queues, &cookie))
		__sync_fetch_and_sub(&sum->messages, messages);
}

/* has_messages tells if a socket has redirected messages in its queue. With the funnel
 * the end of the stream is one, too, until it has been read. */
static __always_inline bool has_messages(struct sock *sk)
{
	struct sk_psock *psock = (void *)((unsigned long)BPF_CORE_READ(sk, sk_user_data) & ~7UL);

	return psock && BPF_CORE_READ(psock, ingress_msg.next) != &psock->ingress_msg;
}

/* still_waiting adds a reservation up, or deletes it if nothing can be waiting. The
 * address is a hint, as in peers.h: a socket that is gone has no queue, or another's
 * cookie. */
static long still_waiting(struct bpf_map *map, const __u64 *cookie, struct queue *q, __u64 *sum)
{
	struct sock *receiver = (struct sock *)(unsigned long)q->receiver_sk;

	if (BPF_CORE_READ(receiver, __sk_common.skc_cookie.counter) == *cookie &&
	    has_messages(receiver))
		*sum += q->messages;
	else
		bpf_map_delete_elem(map, cookie);
	return 0;
}

/* sweep compares what is reserved with what is there, unless that was done a moment
 * ago. The new sum also rights what senders on other CPUs may have got wrong: one
 * that adds to a reservation while it is deleted adds to the sum alone. */
static __always_inline void sweep(struct reserved *sum)
{
	__u64 now = bpf_ktime_get_ns(), swept = sum->swept_ns, messages = 0;

	if (now - swept < SWEEP_INTERVAL ||
	    __sync_val_compare_and_swap(&sum->swept_ns, swept, now) != swept)
		return;
	bpf_for_each_map_elem(&queues, still_waiting, &messages, 0);
	sum->messages = messages;
}

/* has_room tells if the node has room for another step: TCP's buffers and all queued
 * messages together stay below the low mark of tcp_mem. */
static __always_inline bool has_room(const struct reserved *sum, const struct endpoint *e,
				     const struct tcp_sock *tp)
{
	__s64 pages = ((sum->messages + RESERVE_STEP) * SK_MSG_OVERHEAD) >> cfg_page_shift;

	pages += tp->inet_conn.icsk_inet.sk.__sk_common.skc_prot->memory_allocated->counter;
	return pages <= (__s64)e->low_mark;
}

/* reserve makes room for another step of messages to the receiver. Returns false if
 * the node has none. The sender's lock is held. */
static __always_inline bool reserve(struct endpoint *e, const struct tcp_sock *tp)
{
	struct queue first = {.receiver_sk = e->peer_sk}, *q;
	struct reserved *sum = reserved_sum();

	if (!sum)
		return false;
	if (!has_room(sum, e, tp)) {
		sweep(sum);
		if (!has_room(sum, e, tp))
			return false;
	}
	q = bpf_map_lookup_elem(&queues, &e->peer_cookie);
	if (!q) {
		if (bpf_map_update_elem(&queues, &e->peer_cookie, &first, BPF_NOEXIST))
			sweep(sum); /* full of what nobody gave back */
		q = bpf_map_lookup_elem(&queues, &e->peer_cookie);
		if (!q)
			return false;
	}
	q->messages += RESERVE_STEP;
	__sync_fetch_and_add(&sum->messages, RESERVE_STEP);
	e->reserved += RESERVE_STEP;
	return true;
}

#endif
