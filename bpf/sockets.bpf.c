//go:build ignore
// SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0)

/* Lists the sockets that have an endpoint record, for people who ask. The
 * datapath has no part in it: this object is loaded for one listing, takes no
 * lock of a socket, and is gone afterwards. */
#include "endpoint.h"

char _license[] SEC("license") = "GPL";

/* What is only read here. */
#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct in6_addr {
	union {
		__u8 u6_addr8[16];
	} in6_u;
};

struct sock_common___addresses {
	__be32 skc_daddr;
	__be32 skc_rcv_saddr;
	__be16 skc_dport;
	__u16 skc_num;
	unsigned short skc_family;
	unsigned char skc_state;
	struct in6_addr skc_v6_daddr;
	struct in6_addr skc_v6_rcv_saddr;
};

struct tcp_sock___reader {
	__u32 copied_seq;
};

struct sk_psock___queue {
	__u32 msg_tot_len; /* since 6.12.75, 6.18.14 */
};

struct seq_file;

struct bpf_iter_meta {
	struct seq_file *seq;
};

#pragma clang attribute pop

/* The context of an iterator, include/linux/bpf.h and net/core/bpf_sk_storage.c. */
struct bpf_iter__bpf_sk_storage_map {
	struct bpf_iter_meta *meta;
	void *map;
	struct sock *sk;
	void *value;
} __attribute__((preserve_access_index));

#define AF_INET 2
#define AF_INET6 10

/* One socket as user space gets it. */
struct socket_record {
	struct endpoint endpoint;
	__u64 cookie;
	__u32 charged; /* for what waits to be read, in bytes */
	__u32 queued;  /* bytes that wait in the psock */
	__u8 local[16];
	__u8 remote[16];
	__u16 local_port;
	__u16 remote_port;
	__u16 family;
	__u8 state;
	__u8 ulp;	   /* another protocol, such as kTLS, owns the byte stream */
	__u8 queued_known; /* the kernel tells `queued` */
	__u32 segments; /* that came by TCP and are not read, nor moved by the funnel */
	__u32 moving;	/* that the funnel is moving */
	__u32 unread;	/* bytes of those segments, by sequence number */
	__u32 unacknowledged; /* bytes that this side has sent by TCP */
};

const struct socket_record *socket_record_type __attribute__((unused));

static __always_inline void read_addresses(struct socket_record *r, struct sock *sk)
{
	struct sock_common___addresses *c = (void *)&sk->__sk_common;

	r->family = BPF_CORE_READ(c, skc_family);
	r->state = BPF_CORE_READ(c, skc_state);
	r->local_port = BPF_CORE_READ(c, skc_num);
	r->remote_port = bpf_ntohs(BPF_CORE_READ(c, skc_dport));
	if (r->family == AF_INET6) {
		if (!bpf_core_field_exists(c->skc_v6_daddr))
			return;
		bpf_core_read(r->local, sizeof(r->local), &c->skc_v6_rcv_saddr);
		bpf_core_read(r->remote, sizeof(r->remote), &c->skc_v6_daddr);
		return;
	}
	bpf_core_read(r->local, 4, &c->skc_rcv_saddr);
	bpf_core_read(r->remote, 4, &c->skc_daddr);
}

static __always_inline void read_queues(struct socket_record *r, struct sock *sk)
{
	struct tcp_sock *tp = (void *)sk;
	struct sk_psock *psock = (void *)((unsigned long)BPF_CORE_READ(sk, sk_user_data) & ~7UL);
	struct sk_psock___queue *queue = (void *)psock;

	r->charged = BPF_CORE_READ(sk, sk_backlog.rmem_alloc.counter);
	r->segments = BPF_CORE_READ(sk, sk_receive_queue.qlen);
	r->unread = BPF_CORE_READ(tp, rcv_nxt) -
		    BPF_CORE_READ((struct tcp_sock___reader *)tp, copied_seq);
	r->unacknowledged = BPF_CORE_READ(tp, write_seq) - BPF_CORE_READ(tp, snd_una);
	r->ulp = BPF_CORE_READ(tp, inet_conn.icsk_ulp_ops) != 0;
	if (!r->endpoint.enrolled || !psock)
		return;
	r->moving = BPF_CORE_READ(psock, ingress_skb.qlen);
	if (bpf_core_field_exists(queue->msg_tot_len)) {
		r->queued_known = 1;
		r->queued = BPF_CORE_READ(queue, msg_tot_len);
	}
}

SEC("iter/bpf_sk_storage_map")
int list_sockets(struct bpf_iter__bpf_sk_storage_map *ctx)
{
	struct endpoint *e = ctx->value;
	struct sock *sk = ctx->sk;
	struct socket_record r;

	if (!sk || !e)
		return 0; /* the end of the list */
	__builtin_memset(&r, 0, sizeof(r));
	__builtin_memcpy(&r.endpoint, e, sizeof(r.endpoint));
	if (r.endpoint.closed)
		return 0;
	r.cookie = BPF_CORE_READ(sk, __sk_common.skc_cookie.counter);
	read_addresses(&r, sk);
	read_queues(&r, sk);
	bpf_seq_write(ctx->meta->seq, &r, sizeof(r));
	return 0;
}
