/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/* Reading the other end of a connection. The peer's lock is not held and its
 * memory may be reused at any time (TCP sockets are SLAB_TYPESAFE_BY_RCU), so
 * everything is probe-read and nothing read here can do harm when stale: it
 * decides between redirecting and TCP, never where bytes go. */
#ifndef SKIPSTACK_PEERS_H
#define SKIPSTACK_PEERS_H

#include "maps.h"
#include "pods.h"

/* Every receiver may leave this much unread, however small its memory cgroup. */
#define LEAST_LIMIT (256 * 1024)

/* A receiver may hold this part of its memory cgroup. */
#define MEMORY_SHARE 32

/* And all receivers together so much that this part of it is left, which is at
 * least and at most so many bytes: for the application, and for what comes by TCP
 * meanwhile, which the kernel charges even beyond the maximum. */
#define RESERVED_SHARE 4
#define LEAST_RESERVE (1ULL << 20)
#define MOST_RESERVE (64ULL << 20)

/* With so much room, more than any machine copies in a tick, the usage need not
 * be read for each message. */
#define PLENTY (1ULL << 30)

#define MAX_CGROUP_DEPTH 16
#define MAX_ZONES 8

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
	/* The usage that is nearest to its maximum. */
	unsigned long usage; /* address */
	__s64 most;	     /* pages, less a reserve */
	__s64 room;	     /* pages, to that */
};

/* consider takes a counter into account that the socket's bytes are charged to. */
static __always_inline void consider(struct memory *m, struct page_counter *counter, __s64 reclaimable)
{
	unsigned long reserve = BPF_CORE_READ(counter, max) / RESERVED_SHARE;
	__s64 max = BPF_CORE_READ(counter, max), room;

	if (reserve < LEAST_RESERVE >> cfg_page_shift)
		reserve = LEAST_RESERVE >> cfg_page_shift;
	if (reserve > MOST_RESERVE >> cfg_page_shift)
		reserve = MOST_RESERVE >> cfg_page_shift;
	max += reclaimable - reserve;
	room = max - BPF_CORE_READ(counter, usage.counter);
	if (room >= m->room)
		return;
	m->room = room;
	m->most = max;
	m->usage = (unsigned long)counter + bpf_core_field_offset(counter->usage);
}

/* page_cache is how much of the memory cgroup's own memory the kernel could take
 * back for the asking: half of the pages of files on the first node. The rest
 * may be dirty, or be needed. */
static __always_inline __s64 page_cache(struct mem_cgroup *memcg)
{
	struct mem_cgroup_per_node *node = BPF_CORE_READ(memcg, nodeinfo[0]);
	__u32 zone = LRU_LISTS * sizeof(unsigned long), size;
	unsigned long file[2];
	unsigned long pages = 0;

	if (!bpf_core_field_exists(node->lru_zone_size))
		return 0;
	size = bpf_core_field_size(node->lru_zone_size);
	for (int i = 0; i < MAX_ZONES && zone * (i + 1) <= size; i++) {
		if (bpf_probe_read_kernel(file, sizeof(file),
					  (void *)node + bpf_core_field_offset(node->lru_zone_size) +
						  zone * i + LRU_INACTIVE_FILE * sizeof(file[0])))
			break;
		pages += file[0] + file[1];
	}
	return pages / 2;
}

/* walk goes from a page counter to the root. struct page_counter leads from a
 * memory cgroup to its parent and is at the same place in each, so with it the
 * walk can look at the cgroups themselves: socket_pressure tells, as a time,
 * until when one is short (mem_cgroup_under_socket_pressure(),
 * include/linux/memcontrol.h). */
static __always_inline void walk(struct mem_cgroup *memcg, struct memory *m, __u64 now)
{
	/* Cgroup v1 charges sockets to tcpmem only. */
	bool charged = !BPF_CORE_READ(memcg, css.cgroup, root, hierarchy_id);
	__s64 reclaimable = charged ? page_cache(memcg) : 0;
	struct page_counter *counter = &memcg->memory;

	for (int i = 0; i < MAX_CGROUP_DEPTH && counter; i++) {
		unsigned long max = BPF_CORE_READ(counter, max);

		memcg = (void *)counter - bpf_core_field_offset(struct mem_cgroup, memory);
		if (max < m->pages)
			m->pages = max;
		if ((__s64)(BPF_CORE_READ(memcg, socket_pressure) - now) > 0)
			m->pressure = true;
		if (charged)
			consider(m, counter, reclaimable);
		counter = BPF_CORE_READ(counter, parent);
	}
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
		consider(m, counter, 0);
		counter = BPF_CORE_READ(counter, parent);
	}
}

/* short_of_memory tells if the receiver's memory cgroup has no room for so many
 * bytes. Redirecting them would charge them at once, where TCP can wait: without
 * room, send(2) would fail with ENOMEM, or the kernel would kill a process of
 * the receiver. What the counter says changes with each message, of all
 * connections, so it is read for each. */
static __always_inline bool short_of_memory(const struct endpoint *e, __u32 bytes)
{
	__s64 usage;

	if (!e->tightest)
		return false;
	if (bpf_probe_read_kernel(&usage, sizeof(usage), (void *)(unsigned long)e->tightest))
		return true;
	return usage + (bytes >> cfg_page_shift) + 1 > (__s64)e->most;
}

/* refresh brings what changes slowly up to date: whether both pods still take
 * part, the receiver's limit, and whether its memory is short. */
static __always_inline void refresh(struct endpoint *e, struct sock *peer, const struct control *ctl,
				    __u32 generation, __u64 now)
{
	struct mem_cgroup *memcg;
	struct memory m = {.pages = ~0UL, .room = PLENTY >> cfg_page_shift};
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
	e->tightest = 0;
	/* The memory cgroup of a server's socket is set by accept(2); until
	 * then nobody would pay for more than a little. */
	if (!BPF_CORE_READ(peer, sk_socket) && limit > LEAST_LIMIT)
		limit = LEAST_LIMIT;
	/* The low bits are flags in some kernels. */
	memcg = (void *)((unsigned long)BPF_CORE_READ(peer, sk_memcg) & ~7UL);
	if (memcg) {
		walk(memcg, &m, now);
		walk_v1(memcg, &m);
		e->pressure = m.pressure;
		e->tightest = m.usage;
		e->most = m.most;
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
