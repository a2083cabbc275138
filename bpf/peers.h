/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/* Reading the other end of a connection. The peer's lock is not held and its
 * memory may be reused at any time (TCP sockets are SLAB_TYPESAFE_BY_RCU), so
 * everything is probe-read and nothing read here can do harm when stale: it
 * decides between redirecting and TCP, never where bytes go. */
#ifndef SKIPSTACK_PEERS_H
#define SKIPSTACK_PEERS_H

#include "maps.h"
#include "pods.h"

/* What a queued message costs beyond its bytes: struct sk_msg, which the
 * kernel charges to nobody. */
#define SK_MSG_OVERHEAD 1024

/* Every receiver may leave this much unread, however small its memory cgroup. */
#define LEAST_LIMIT (256 * 1024)

/* A receiver may hold this part of its memory cgroup. */
#define MEMORY_SHARE 32

#define MAX_CGROUP_DEPTH 16

static __always_inline struct sock *peer_of(const struct endpoint *e)
{
	struct sock *peer = (struct sock *)(unsigned long)e->peer_sk;

	if (!peer || BPF_CORE_READ(peer, __sk_common.skc_cookie.counter) != e->peer_cookie)
		return 0;
	return peer;
}

/* sent_by tells if the segment that the program looks at was sent on this node by
 * the request or the socket with that txhash. The kernel draws it at random and
 * marks each skb with it (tcp_make_synack(), skb_set_hash_from_sk()); NAT,
 * bridges, veth and loopback leave the mark alone, and where something clears it
 * the connection stays plain. It is in no packet, but for 20 bits in the flow
 * label of IPv6, and no program can set it: a segment from a TUN device or a raw
 * socket does not have it, one from another host has its network card's. A hash
 * that was computed from headers (sw_hash) is no evidence either: whoever sends
 * the packet has a say in those. */
static __always_inline bool sent_by(struct bpf_sock_ops *ctx, __u32 number)
{
	struct sk_buff *skb = BPF_CORE_READ((struct bpf_sock_ops_kern *)ctx, skb);

	return skb && number && BPF_CORE_READ(skb, hash) == number &&
	       !BPF_CORE_READ_BITFIELD_PROBED(skb, sw_hash);
}

/* mirrors tells if a peer that a record named really is the other end of a
 * connection on which `own` has not sent a byte. A record that is evicted while
 * it is being read may become another connection's: the kernel recycles map
 * elements at once. */
static __always_inline bool mirrors(struct sock *peer, struct end_key own)
{
	return BPF_CORE_READ((struct tcp_sock *)peer, rcv_nxt) == own.snd;
}

/* What a memory cgroup and those above it leave to a socket. */
struct memory {
	unsigned long pages; /* the least maximum */
	bool pressure;
};

/* walk goes from a page counter to the root. struct page_counter leads from a
 * memory cgroup to its parent and is at the same place in each, so with it the
 * walk can look at the cgroups themselves: socket_pressure tells, as a time,
 * until when one is short (mem_cgroup_under_socket_pressure(),
 * include/linux/memcontrol.h). */
static __always_inline struct memory walk(struct page_counter *counter, __u64 now)
{
	struct memory m = {.pages = ~0UL};

	for (int i = 0; i < MAX_CGROUP_DEPTH && counter; i++) {
		struct mem_cgroup *memcg =
			(void *)counter - bpf_core_field_offset(struct mem_cgroup, memory);
		unsigned long max = BPF_CORE_READ(counter, max);

		if (max < m.pages)
			m.pages = max;
		if ((__s64)(BPF_CORE_READ(memcg, socket_pressure) - now) > 0)
			m.pressure = true;
		counter = BPF_CORE_READ(counter, parent);
	}
	return m;
}

/* walk_v1 looks at the TCP memory limits that only cgroup v1 has. */
static __always_inline void walk_v1(struct mem_cgroup *memcg, struct memory *m)
{
	struct page_counter *counter;

	if (!bpf_core_field_exists(memcg->tcpmem) || !BPF_CORE_READ(memcg, tcpmem_active))
		return;
	counter = &memcg->tcpmem;
	for (int i = 0; i < MAX_CGROUP_DEPTH && counter; i++) {
		unsigned long max = BPF_CORE_READ(counter, max);

		memcg = (void *)counter - bpf_core_field_offset(struct mem_cgroup, tcpmem);
		if (max < m->pages)
			m->pages = max;
		if (BPF_CORE_READ(memcg, tcpmem_pressure))
			m->pressure = true;
		counter = BPF_CORE_READ(counter, parent);
	}
}

/* refresh brings what changes slowly up to date: whether both pods still take
 * part, the receiver's limit, and whether its memory is short. */
static __always_inline void refresh(struct endpoint *e, struct sock *peer, const struct control *ctl,
				    __u32 generation, __u64 now)
{
	struct mem_cgroup *memcg;
	struct memory m = {.pages = ~0UL};
	__u32 limit, room;
	bool locked;

	if (e->generation != generation) {
		struct pod *own = bpf_map_lookup_elem(&pods, &e->pod);
		struct pod *other = bpf_map_lookup_elem(&pods, &e->peer_pod);

		e->generation = generation;
		e->gate = node_open(ctl) && own && other && pod_open(ctl, own) && pod_open(ctl, other);
		e->pod_limit = other ? other->unread_limit : 0;
	}

	limit = e->pod_limit;
	locked = BPF_CORE_READ_BITFIELD_PROBED(peer, sk_userlocks) & SOCK_RCVBUF_LOCK;
	room = locked ? BPF_CORE_READ(peer, sk_rcvbuf) :
			BPF_CORE_READ(peer, __sk_common.skc_net.net, ipv4.sysctl_tcp_rmem[2]);
	/* What comes by TCP when the limit is reached must find room, or it is
	 * dropped (tcp_try_rmem_schedule()) and the sender waits for its
	 * retransmission timer instead of for the window. The funnel empties
	 * the queue whose first segment is always taken. */
	if (!ctl->funnel)
		room /= 2;
	else if (!locked)
		room = limit;
	if (room < limit)
		limit = room;
	e->pressure = 0;
	/* The memory cgroup of a server's socket is set by accept(2); until
	 * then nobody would pay for more than a little. */
	if (!BPF_CORE_READ(peer, sk_socket) && limit > LEAST_LIMIT)
		limit = LEAST_LIMIT;
	/* The low bits are flags in some kernels. */
	memcg = (void *)((unsigned long)BPF_CORE_READ(peer, sk_memcg) & ~7UL);
	if (memcg) {
		m = walk(&memcg->memory, now);
		walk_v1(memcg, &m);
		e->pressure = m.pressure;
	}
	if (m.pages < ((unsigned long)limit * MEMORY_SHARE) >> cfg_page_shift) {
		__u32 share = (m.pages << cfg_page_shift) / MEMORY_SHARE;

		if (share < LEAST_LIMIT)
			share = LEAST_LIMIT;
		if (share < limit)
			limit = share;
	}
	e->limit = limit;
	e->peer_psock = (unsigned long)BPF_CORE_READ(peer, sk_user_data) & ~7UL;
	e->checked = now;
}

#endif
