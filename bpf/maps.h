/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
#ifndef SKIPSTACK_MAPS_H
#define SKIPSTACK_MAPS_H

#include "config.h"
#include "counters.h"
#include "socks.h"

enum connection_state {
	SYN_SEEN, /* a listener in an enabled pod is answering this SYN */
	CLAIMING, /* a client is filling in its part */
	CLAIMED,  /* the client is enrolled */
	SPLICED,  /* the server is enrolled: both directions may redirect */
	PLAIN,	  /* stays on TCP for life */
};

/* A connection between its SYN and the client's first message. */
struct connection {
	enum connection_state state; /* changed only by compare-and-swap */
	enum connection_outcome refusal; /* why the server cannot enrol, 0 if it can */
	struct secret secret;
	__u64 syn_ns;  /* CLOCK_MONOTONIC */
	__u64 client_sk;
	__u64 client_cookie;
	__u64 client_pod;
	__u64 server_sk;
	__u64 server_cookie;
	__u64 server_pod;
};

/* Keyed by the client's end.
 * Writers: sock_ops. Readers: sock_ops, sk_msg of the client.
 * Deleted by whoever decides last (the client's first message; sock_ops when
 * the client is remote or the client's socket closes), or evicted: an absent
 * record means plain TCP, which is always right. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, DEFAULT_MAX_CONNECTIONS / 4);
	__type(key, struct end_key);
	__type(value, struct connection);
} connections SEC(".maps");

/* Writers: sock_ops, and sk_msg under the socket's lock. Readers: the same.
 * Removed by the kernel with the socket. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct endpoint);
} endpoints SEC(".maps");

#define MAX_PODS 16384

/* Keyed by the cgroup id of the pod.
 * Writer and deleter: user space (ADD, DEL, on, off). Readers: sock_ops, sk_msg. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_PODS);
	__type(key, __u64);
	__type(value, struct pod);
} pods SEC(".maps");

/* What a pod's connections have done. */
struct pod_counters {
	__u64 live; /* sockets with an endpoint record that have not closed */
	/* Of connections that have closed. */
	__u64 enrolled;
	struct message_count redirected;
	__u64 passed_bytes;
	__u64 passed[PASSES]; /* messages, by enum message_outcome - FIRST_PASS */
};

/* Keyed by the cgroup id of the pod.
 * Created and deleted by user space with the pod's link. Writer: sock_ops. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_PODS);
	__type(key, __u64);
	__type(value, struct pod_counters);
} pods_count SEC(".maps");

/* Where the funnel stands in the byte stream of one socket. */
struct funnel_position {
	__u32 next; /* first sequence number not yet moved */
	__u32 pad;
	__u64 pod; /* cgroup id; lets user space sweep entries of pods that are gone */
};

/* Keyed by socket cookie: socket storage is not to be had in sk_skb programs.
 * Only of sockets that have received bytes by TCP.
 * Writer: the funnel. Deleted by sock_ops when the socket closes; by user space
 * for pods whose cgroup went first. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 2 * DEFAULT_MAX_CONNECTIONS);
	__type(key, __u64);
	__type(value, struct funnel_position);
} funnel_next SEC(".maps");

#endif
