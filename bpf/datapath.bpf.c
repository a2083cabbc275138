//go:build ignore
// SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0)

/* The datapath: entry points only. docs/datapath.md explains why it is right.
 *
 * track     sock_ops, attached to each pod's cgroup: recognises connections
 *           whose ends are both on this node, and enrols them.
 * redirect  sk_msg of the sockhash: moves a message to the peer's receive
 *           queue when no byte can be overtaken, else lets TCP carry it.
 * funnel    sk_skb verdict of the sockhash, attached only where FIONREAD would
 *           not count bytes that came by TCP.
 */
#include "peers.h"
#include "queues.h"

char _license[] SEC("license") = "GPL";

/* counters_of returns a pod's counters, absent where user space has not made them. */
static __always_inline struct pod_counters *counters_of(__u64 pod)
{
	return bpf_map_lookup_elem(&pods_count, &pod);
}

static __always_inline struct endpoint *endpoint_of(struct bpf_sock *sk)
{
	return sk ? bpf_sk_storage_get(&endpoints, sk, 0, 0) : 0;
}

static __always_inline enum connection_state swap_state(struct connection *c,
							enum connection_state from,
							enum connection_state to)
{
	return __sync_val_compare_and_swap(&c->state, from, to);
}

/* refuse keeps a connection on TCP for life unless it was spliced already. */
static __always_inline void refuse(struct connection *c)
{
	if (swap_state(c, SYN_SEEN, PLAIN) == CLAIMING)
		swap_state(c, CLAIMING, PLAIN);
	swap_state(c, CLAIMED, PLAIN);
}

/* open_endpoint makes the socket's record and asks for its state changes. */
static __always_inline struct endpoint *open_endpoint(struct bpf_sock_ops *ctx, struct end_key own,
						      struct secret secret, __u64 pod,
						      __u64 now)
{
	struct bpf_sock *sk = ctx->sk;
	struct pod_counters *pc;
	struct endpoint *e;

	if (!sk)
		return 0;
	e = bpf_sk_storage_get(&endpoints, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!e)
		return 0;
	if (e->closed) /* disconnected and connected again */
		__builtin_memset(e, 0, sizeof(*e));
	e->own = own;
	e->secret = secret;
	e->pod = pod;
	e->since_ns = now;
	e->generation = read_switch(SWITCH_GENERATION) - 1; /* stale */
	/* Other programs' flags stay. */
	bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG);
	pc = counters_of(pod);
	if (pc)
		__sync_fetch_and_add(&pc->live, 1);
	return e;
}

/* insert puts the socket into the sockhash. Returns 0 or the reason why not. */
static __always_inline enum connection_outcome insert(struct bpf_sock_ops *ctx, struct endpoint *e)
{
	struct sock_key key = sock_key(e->own, e->secret);
	long err = bpf_sock_hash_update(ctx, &socks, &key, BPF_NOEXIST);

	if (!err) {
		e->enrolled = 1;
		return 0;
	}
	if (err == -7 /* E2BIG */)
		return CONNECTION_MAP_FULL;
	if (err == -16 /* EBUSY */)
		return CONNECTION_OTHER_OWNER;
	return CONNECTION_FAILED;
}

/* A listener in an enabled pod answers a SYN: write down both initial sequence
 * numbers, by which a client on this node will be recognised, and the request's
 * secret, which its SYN-ACK will carry. The program runs on the request sock, so
 * ctx->sk is not to be used and `reply` (the initial window) is left to others. */
static __always_inline void syn_received(struct bpf_sock_ops *ctx, const struct control *ctl)
{
	struct tcp_request_sock *req = (void *)BPF_CORE_READ((struct bpf_sock_ops_kern *)ctx, sk);
	struct connection c = {.syn_ns = bpf_ktime_get_ns()};
	struct end_key client;
	struct sock *listener;
	struct pod *pod;

	if (!req)
		return;
	listener = BPF_CORE_READ(req, req.req.__req_common.skc_listener);
	if (!listener)
		return; /* a SYN cookie: this request is thrown away */
	pod = pod_of(BPF_CORE_READ(listener, sk_cgrp_data.cgroup), &c.server_pod);
	if (!pod || !pod_open(ctl, pod))
		return;

	if (excluded(pod, ctx->local_port))
		c.refusal = CONNECTION_EXCLUDED_PORT;
	else if (!ctl->mptcp_listeners && bpf_core_field_exists(req->is_mptcp) &&
		 BPF_CORE_READ(req, is_mptcp))
		c.refusal = CONNECTION_MPTCP;
	else if (ctl->funnel && BPF_CORE_READ(listener, sk_rcvlowat) > 1)
		c.refusal = CONNECTION_RCVLOWAT;
	else if (blocking(pod, BPF_CORE_READ(listener, sk_socket)))
		c.refusal = CONNECTION_BLOCKING;

	c.secret.server = BPF_CORE_READ(req, txhash);
	client.snd = BPF_CORE_READ(req, rcv_isn) + 1;
	client.rcv = BPF_CORE_READ(req, snt_isn) + 1;
	/* Never replace a record: whoever forges the numbers comes second. */
	if (!bpf_map_update_elem(&connections, &client, &c, BPF_NOEXIST))
		count_event(EVENT_SYN_RECORDED, 1);
}

/* client_refusal returns why this client may not enrol, 0 if it may. */
static __always_inline enum connection_outcome
client_refusal(struct bpf_sock_ops *ctx, struct tcp_sock *tp, struct end_key own,
	       const struct control *ctl, const struct connection *c, __u64 *pod_id)
{
	struct pod *pod;

	if (bpf_ktime_get_ns() - c->syn_ns > cfg_claim_window_ns)
		return CONNECTION_LATE_CLAIM;
	if (own.snd == own.rcv)
		return CONNECTION_SELF;
	if (tp->write_seq != tp->snd_nxt)
		return CONNECTION_EARLY_DATA;
	if (bpf_core_field_exists(tp->is_mptcp) && tp->is_mptcp)
		return CONNECTION_MPTCP;
	pod = pod_of(tp->inet_conn.icsk_inet.sk.sk_cgrp_data.cgroup, pod_id);
	if (!pod || !pod_open(ctl, pod))
		return CONNECTION_GATE_CLOSED;
	if (c->refusal)
		return c->refusal;
	if (excluded(pod, bpf_ntohl(ctx->remote_port)))
		return CONNECTION_EXCLUDED_PORT;
	if (ctl->funnel && tp->inet_conn.icsk_inet.sk.sk_rcvlowat > 1)
		return CONNECTION_RCVLOWAT;
	if (blocking(pod, tp->inet_conn.icsk_inet.sk.sk_socket))
		return CONNECTION_BLOCKING;
	return 0;
}

/* A client in an attached cgroup is connected. */
static __always_inline void client_established(struct bpf_sock_ops *ctx, const struct control *ctl)
{
	struct end_key own = {.snd = ctx->snd_nxt, .rcv = ctx->rcv_nxt};
	struct secret secret;
	struct connection *c;
	struct tcp_sock *tp;
	struct endpoint *e;
	struct bpf_sock *sk;
	__u64 pod = 0;
	enum connection_outcome why;

	c = bpf_map_lookup_elem(&connections, &own);
	if (!c) {
		count_connection(CONNECTION_REMOTE_SERVER);
		return;
	}
	sk = ctx->sk;
	if (!sk)
		return;
	e = endpoint_of(sk);
	if (e && !e->closed)
		return; /* attached to nested cgroups, the program runs twice */
	tp = bpf_skc_to_tcp_sock(sk);
	if (!tp)
		return;

	/* Whoever has no more than the numbers leaves the record to its owner.
	 * A repaired socket comes here without a segment that establishes it. */
	secret.server = c->secret.server;
	secret.client = ctx->sk_txhash;
	if (!sent_by(ctx, secret.server)) {
		count_connection(ctx->skb_len ? CONNECTION_UNPROVEN : CONNECTION_REPAIRED);
		return;
	}
	/* A record is claimed once. If a second socket has received the same
	 * SYN-ACK, one of the two is not the client, and neither is believed. */
	if (c->state == PLAIN)
		return; /* refused before */
	if (c->state != SYN_SEEN) {
		refuse(c);
		count_connection(CONNECTION_CONTESTED);
		return;
	}
	why = client_refusal(ctx, tp, own, ctl, c, &pod);
	if (why) {
		refuse(c);
		count_connection(why);
		return;
	}
	if (swap_state(c, SYN_SEEN, CLAIMING) != SYN_SEEN) {
		refuse(c);
		count_connection(CONNECTION_CONTESTED);
		return;
	}
	e = open_endpoint(ctx, own, secret, pod, c->syn_ns);
	if (!e) {
		refuse(c);
		count_connection(CONNECTION_FAILED);
		return;
	}
	e->is_client = 1;
	why = insert(ctx, e);
	if (why) {
		e->mode = ENDPOINT_PLAIN;
		refuse(c);
		count_connection(why);
		return;
	}
	c->client_sk = (unsigned long)sk;
	c->client_cookie = bpf_get_socket_cookie(ctx);
	c->client_pod = pod;
	c->secret.client = secret.client;
	if (swap_state(c, CLAIMING, CLAIMED) != CLAIMING)
		e->mode = ENDPOINT_PLAIN; /* contested meanwhile, and counted there */
}

/* A server's socket in an attached cgroup is connected: the client's first
 * acknowledgement has arrived, so a client on this node has run before. */
static __always_inline void server_established(struct bpf_sock_ops *ctx, const struct control *ctl)
{
	struct end_key own = {.snd = ctx->snd_nxt, .rcv = ctx->rcv_nxt}, client = mirror(own);
	struct secret secret;
	struct connection *c;
	struct tcp_sock *tp;
	struct endpoint *e;
	struct bpf_sock *sk;
	struct sock *peer;
	enum connection_outcome why;

	c = bpf_map_lookup_elem(&connections, &client);
	if (!c)
		return;
	sk = ctx->sk;
	if (!sk)
		return;
	e = endpoint_of(sk);
	if (e && !e->closed)
		return; /* attached to nested cgroups, the program runs twice */
	/* This socket must come from the request that the record is about. It
	 * has another number, too, when the SYN-ACK was sent a second time. */
	secret = c->secret;
	if (ctx->sk_txhash != secret.server) {
		count_connection(c->client_cookie ? CONNECTION_UNPROVEN : CONNECTION_REMOTE_CLIENT);
		return;
	}
	if (swap_state(c, SYN_SEEN, PLAIN) == SYN_SEEN) {
		bpf_map_delete_elem(&connections, &client);
		count_connection(CONNECTION_REMOTE_CLIENT);
		return;
	}
	if (!c->client_cookie) {
		/* Refused before anything was enrolled, or still being claimed
		 * by somebody who is not the sender of this acknowledgement. */
		refuse(c);
		bpf_map_delete_elem(&connections, &client);
		return;
	}
	/* From here on the client is in the sockhash, so this end is watched
	 * (see state_changed) even when it is not enrolled itself. */
	e = open_endpoint(ctx, own, secret, c->server_pod, c->syn_ns);
	if (!e) {
		refuse(c);
		count_connection(CONNECTION_FAILED);
		return;
	}
	e->peer_sk = c->client_sk;
	e->peer_cookie = c->client_cookie;
	e->peer_pod = c->client_pod;
	e->mode = ENDPOINT_PLAIN;
	peer = peer_of(e);
	if (c->state != CLAIMED || !peer || !mirrors(peer, own)) {
		refuse(c);
		count_connection(CONNECTION_LOST_RACE);
		return;
	}
	/* The acknowledgement must come from the socket that claimed. */
	if (!sent_by(ctx, secret.client)) {
		refuse(c);
		count_connection(CONNECTION_UNPROVEN);
		return;
	}
	tp = bpf_skc_to_tcp_sock(sk);
	why = tp && !(bpf_core_field_exists(tp->is_mptcp) && tp->is_mptcp) ?
		      insert(ctx, e) :
		      CONNECTION_MPTCP;
	if (why) {
		refuse(c);
		count_connection(why);
		return;
	}
	c->server_sk = (unsigned long)sk;
	c->server_cookie = bpf_get_socket_cookie(ctx);
	/* Whoever decides first wins. A client that has sent by TCP already
	 * keeps the connection there. */
	if (swap_state(c, CLAIMED, SPLICED) != CLAIMED) {
		struct sock_key key = sock_key(own, secret);

		/* Nothing can have been redirected to this socket yet. */
		bpf_map_delete_elem(&socks, &key);
		count_connection(CONNECTION_LOST_RACE);
		return;
	}
	e->mode = ENDPOINT_REDIRECT;
	count_connection(CONNECTION_ENROLLED);
}

/* funnel_done tells if the funnel has a position for a closed socket and needs
 * it no more. The FIN that closes a socket does so before the funnel has moved
 * the segment that it came with. */
static __always_inline bool funnel_done(const struct tcp_sock *tp)
{
	const struct sock *sk = &tp->inet_conn.icsk_inet.sk;

	return tp->data_segs_in && (!sk->sk_receive_queue.qlen || !sk->sk_socket);
}

static __always_inline void close_endpoint(struct bpf_sock_ops *ctx, struct bpf_sock *sk,
					   struct endpoint *e)
{
	struct tcp_sock *tp = bpf_skc_to_tcp_sock(sk);
	__u64 cookie = bpf_get_socket_cookie(ctx);
	struct pod_counters *pc;

	if (e->closed)
		return;
	e->closed = 1;
	if (e->is_client && e->mode != ENDPOINT_REDIRECT) /* else decide() has */
		bpf_map_delete_elem(&connections, &e->own);
	if (!tp || funnel_done(tp))
		bpf_map_delete_elem(&funnel_next, &cookie);
	give_back(cookie);
	pc = counters_of(e->pod);
	if (!pc)
		return;
	__sync_fetch_and_sub(&pc->live, 1);
	__sync_fetch_and_add(&pc->enrolled, e->enrolled);
	__sync_fetch_and_add(&pc->redirected.messages, e->redirected.messages);
	__sync_fetch_and_add(&pc->redirected.bytes, e->redirected.bytes);
	__sync_fetch_and_add(&pc->passed_bytes, e->passed_bytes);
	for (int i = 0; i < PASSES; i++)
		if (e->passed[i])
			__sync_fetch_and_add(&pc->passed[i], e->passed[i]);
}

/* abandon keeps a writer from waiting for a reader that is gone. A reader that
 * closes with redirected bytes unread sends FIN and leaves the window shut where
 * plain TCP sends RST, because the kernel looks only at sk_receive_queue; this
 * end would probe that window for minutes. Returns false while the peer may
 * still read. */
static __always_inline bool abandon(struct bpf_sock_ops *ctx, struct bpf_sock *sk,
				    const struct endpoint *e)
{
	struct tcp_sock *tp = bpf_skc_to_tcp_sock(sk);
	struct sock *peer = peer_of(e);
	int soon = 1; /* ms */

	if (peer && BPF_CORE_READ(peer, sk_shutdown) != SHUTDOWN_BOTH)
		return false;
	/* With an open window the next segment brings the RST. */
	if (!tp || tp->snd_wnd >= tp->mss_cache)
		return true;
	bpf_setsockopt(ctx, SOL_TCP, TCP_USER_TIMEOUT, &soon, sizeof(soon));
	count_event(EVENT_PEER_GONE_TIMEOUT, 1);
	return true;
}

static __always_inline void state_changed(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct endpoint *e = endpoint_of(sk);

	if (!e || !sk)
		return;
	switch (ctx->args[1]) {
	case BPF_TCP_CLOSE_WAIT:
	case BPF_TCP_CLOSING:
	case BPF_TCP_LAST_ACK:
		/* A peer that is only half closed may yet go with bytes
		 * unread: look again at each segment it sends, answers to
		 * window probes among them. So may the peer of a client that
		 * has not sent and learns with its first message who that is. */
		if (e->peer_sk ? !abandon(ctx, sk, e) : e->mode == ENDPOINT_UNDECIDED)
			bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags |
							       BPF_SOCK_OPS_PARSE_ALL_HDR_OPT_CB_FLAG);
		break;
	case BPF_TCP_CLOSE:
		close_endpoint(ctx, sk, e);
		break;
	}
}

static __always_inline void segment_received(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct endpoint *e = endpoint_of(sk);

	if (e && sk && e->peer_sk)
		abandon(ctx, sk, e);
}

SEC("sockops")
int track(struct bpf_sock_ops *ctx)
{
	const struct control *ctl;

	switch (ctx->op) {
	case BPF_SOCK_OPS_STATE_CB:
		state_changed(ctx); /* whatever the gate: members stay members */
		return 1;
	case BPF_SOCK_OPS_PARSE_HDR_OPT_CB:
		segment_received(ctx);
		return 1;
	case BPF_SOCK_OPS_RWND_INIT:
	case BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB:
	case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
		break;
	default:
		return 1;
	}
	ctl = control();
	if (!ctl)
		return 1;
	if (ctx->op == BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB) {
		/* Looks at the gate through the record, which a closed one
		 * never lets come about. */
		server_established(ctx, ctl);
		return 1;
	}
	if (!node_open(ctl) || read_switch(SWITCH_RETIRED))
		return 1;
	if (ctx->op == BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB)
		client_established(ctx, ctl);
	else if (!ctx->is_fullsock)
		syn_received(ctx, ctl);
	return 1;
}

/* decide settles a client's mode at its first message. */
static __always_inline enum message_outcome decide(struct endpoint *e)
{
	struct connection *c = bpf_map_lookup_elem(&connections, &e->own);
	struct sock *peer;

	e->mode = ENDPOINT_PLAIN;
	if (!c)
		return MESSAGE_RECORD_MISSING;
	if (swap_state(c, CLAIMED, PLAIN) != SPLICED)
		return MESSAGE_LOST_RACE;
	e->peer_sk = c->server_sk;
	e->peer_cookie = c->server_cookie;
	e->peer_pod = c->server_pod;
	peer = peer_of(e);
	if (!peer || !mirrors(peer, e->own))
		return MESSAGE_RECORD_MISSING;
	e->mode = ENDPOINT_REDIRECT;
	bpf_map_delete_elem(&connections, &e->own); /* the server needs it no more */
	return MESSAGE_REDIRECTED;
}

/* overtakes tells why a redirected message could be read before bytes that
 * were sent by TCP earlier, MESSAGE_REDIRECTED if it cannot. The socket's lock
 * is held. The other way round needs no care: tcp_bpf_recvmsg() drains
 * redirected messages before it looks at sk_receive_queue. */
static __always_inline enum message_outcome overtakes(const struct tcp_sock *tp,
						      const struct endpoint *e, struct sock *peer,
						      const struct control *ctl)
{
	/* Not a byte has gone by TCP, which the sequence number alone could
	 * not tell once it has wrapped. */
	if (tp->write_seq == e->own.snd && !e->passed_bytes)
		return MESSAGE_REDIRECTED;
	if (tp->write_seq != tp->snd_una)
		return MESSAGE_UNACKNOWLEDGED;
	if (BPF_CORE_READ(peer, sk_receive_queue.qlen))
		return MESSAGE_NOT_READ;
	if (ctl->funnel) {
		struct sk_psock *psock = (struct sk_psock *)(unsigned long)e->peer_psock;

		if (!psock || BPF_CORE_READ(psock, ingress_skb.qlen))
			return MESSAGE_NOT_READ;
	}
	return MESSAGE_REDIRECTED;
}

/* classify decides about one message; MESSAGE_REDIRECTED means that it may be. */
static __always_inline enum message_outcome classify(struct sk_msg_md *msg, struct bpf_sock *sk,
						     struct endpoint *e)
{
	const struct control *ctl = control();
	enum message_outcome why;
	struct tcp_sock *tp;
	struct sock *peer;
	__u64 now, unread;
	__u32 generation;

	if (!ctl)
		return MESSAGE_SWITCHED_OFF;
	if (e->mode == ENDPOINT_UNDECIDED) {
		why = decide(e);
		if (why != MESSAGE_REDIRECTED)
			return why;
	}
	if (e->mode != ENDPOINT_REDIRECT)
		return MESSAGE_PLAIN;
	/* After shutdown(SHUT_WR) TCP must answer with EPIPE. */
	if (sk->state != BPF_TCP_ESTABLISHED && sk->state != BPF_TCP_CLOSE_WAIT)
		return MESSAGE_CLOSING;
	tp = bpf_skc_to_tcp_sock(sk);
	if (!tp)
		return MESSAGE_CLOSING;
	if (tp->inet_conn.icsk_ulp_ops)
		return MESSAGE_ULP;
	peer = (struct sock *)(unsigned long)e->peer_sk;
	now = bpf_jiffies64();
	generation = read_switch(SWITCH_GENERATION);
	if (e->checked != now || e->generation != generation) {
		/* In between, the sockhash has the last word on whether the
		 * peer is there: what is read of a socket that is gone decides
		 * nothing, because its key is missing. */
		peer = peer_of(e);
		if (!peer)
			return MESSAGE_PEER_GONE;
		refresh(e, peer, ctl, generation, now);
		bpf_probe_read_kernel(&e->low_mark, sizeof(e->low_mark),
				      tp->inet_conn.icsk_inet.sk.__sk_common.skc_prot->sysctl_mem);
	}
	if (!e->gate)
		return MESSAGE_SWITCHED_OFF;
	/* A ULP at the receiver would take redirected bytes for what it has decrypted. */
	if (BPF_CORE_READ((struct inet_connection_sock *)peer, icsk_ulp_ops))
		return MESSAGE_ULP;
	why = overtakes(tp, e, peer, ctl);
	if (why != MESSAGE_REDIRECTED)
		return why;
	unread = BPF_CORE_READ(peer, sk_backlog.rmem_alloc.counter);
	if (!unread) {
		if (e->reserved)
			give_back(e->peer_cookie);
		e->queued = e->reserved = 0;
	}
	if (unread + (__u64)SK_MSG_OVERHEAD * e->queued >= e->limit)
		return MESSAGE_RECEIVER_FULL;
	/* All of TCP on the node: what one receiver may hold is bounded above,
	 * what all of them hold is bounded here and by reserve(). */
	if (e->pressure ||
	    tp->inet_conn.icsk_inet.sk.__sk_common.skc_prot->memory_allocated->counter >
		    (__s64)e->low_mark)
		return MESSAGE_MEMORY;
	if (short_of_memory(e, msg->size))
		return MESSAGE_MEMORY;
	if (e->queued >= UNRESERVED_MESSAGES + e->reserved && !reserve(e, tp))
		return MESSAGE_MEMORY;
	return MESSAGE_REDIRECTED;
}

/* count_pass counts a message of an enrolled socket that goes by TCP. */
static __always_inline void count_pass(struct endpoint *e, enum message_outcome why, __u32 bytes)
{
	__u32 i = why - FIRST_PASS;

	e->passed_bytes += bytes;
	if (i < PASSES)
		e->passed[i]++;
}

SEC("sk_msg")
int redirect(struct sk_msg_md *msg)
{
	struct bpf_sock *sk = msg->sk;
	enum message_outcome why;
	__u32 size = msg->size;
	struct endpoint *e;
	struct sock_key to;

	e = endpoint_of(sk);
	if (!e || !sk) {
		count_message(MESSAGE_NOT_ENROLLED, size);
		return SK_PASS;
	}
	why = classify(msg, sk, e);
	if (why == MESSAGE_REDIRECTED) {
		to = sock_key(mirror(e->own), e->secret);
		/* The helper's verdict is not ours: SK_DROP for a missing key
		 * would lose the message. */
		if (bpf_msg_redirect_hash(msg, &socks, &to, BPF_F_INGRESS) != SK_PASS)
			why = MESSAGE_PEER_GONE;
	}
	if (why == MESSAGE_REDIRECTED) {
		e->queued++;
		e->redirected.messages++;
		e->redirected.bytes += size;
	} else {
		count_pass(e, why, size);
	}
	count_message(why, size);
	return SK_PASS;
}

#define TRIM_STEP 4095 /* bpf_skb_adjust_room() refuses more, net/core/filter.c */
#define TRIM_STEPS 40  /* 160 KiB: more than an skb holds without BIG TCP */

/* position finds where the funnel stands in the socket's byte stream: at the
 * start of it when this is the first segment that came by TCP. */
static __always_inline struct funnel_position *position(const struct tcp_sock *tp, __u64 *cookie)
{
	struct funnel_position *f = bpf_map_lookup_elem(&funnel_next, cookie), first = {};

	if (f)
		return f;
	first.next = tp->rcv_nxt - (__u32)tp->bytes_received;
	pod_of(tp->inet_conn.icsk_inet.sk.sk_cgrp_data.cgroup, &first.pod);
	bpf_map_update_elem(&funnel_next, cookie, &first, BPF_NOEXIST);
	return bpf_map_lookup_elem(&funnel_next, cookie);
}

/* advance moves the position behind a segment and returns how many bytes at the
 * segment's beginning were moved before. */
static __always_inline __s32 advance(struct __sk_buff *skb, const struct tcp_sock *tp, __u64 *cookie)
{
	struct funnel_position *f;
	__s32 overlap;
	__u32 seq[2]; /* struct tcp_skb_cb: seq, end_seq */

	if (bpf_probe_read_kernel(seq, sizeof(seq),
				  (void *)skb + bpf_core_field_offset(struct sk_buff, cb)))
		return 0;
	f = position(tp, cookie);
	if (!f)
		return 0;
	overlap = f->next - seq[0];
	f->next = seq[1];
	return overlap;
}

SEC("sk_skb/verdict")
int funnel(struct __sk_buff *skb)
{
	__u64 cookie = bpf_get_socket_cookie(skb);
	struct bpf_sock *sk = skb->sk;
	struct tcp_sock *tp;
	__s32 overlap = 0;

	if (!sk)
		return SK_PASS;
	tp = bpf_skc_to_tcp_sock(sk);
	if (!tp)
		return SK_PASS;
	if (skb->len) { /* not a FIN alone */
		count_event(EVENT_FUNNELED, 1);
		overlap = advance(skb, tp, &cookie);
	}
	/* The last segment of a closed socket; see close_endpoint. */
	if (sk->state == BPF_TCP_CLOSE && !tp->inet_conn.icsk_inet.sk.sk_receive_queue.qlen)
		bpf_map_delete_elem(&funnel_next, &cookie);
	if (overlap <= 0)
		return SK_PASS;
	/* tcp_read_skb() hands over whole skbs; of a retransmission that is
	 * partly old, the reader has the first bytes already. */
	count_event(EVENT_TRIMMED_BYTES, overlap);
	for (int i = 0; i < TRIM_STEPS && overlap > 0; i++) {
		__s32 step = overlap > TRIM_STEP ? TRIM_STEP : overlap;

		if (bpf_skb_adjust_room(skb, -step, 0, 0))
			break;
		overlap -= step;
	}
	return SK_PASS;
}
