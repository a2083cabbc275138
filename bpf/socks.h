/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
#ifndef SKIPSTACK_SOCKS_H
#define SKIPSTACK_SOCKS_H

#include "keys.h"

/* User space sets the sizes of the maps from maxConnections before loading:
 * `socks` and `funnel_next` hold two entries a connection, `connections` only
 * those whose client has not sent yet, `queues` those that have several messages
 * unread. */
#define DEFAULT_MAX_CONNECTIONS 262144

/* The sockets that may be redirected to, keyed by their own end and the secret.
 * Writer: sock_ops. Readers: sk_msg (redirect), and the splice guard, which looks
 * from the socket's side. Removed by the kernel when a socket leaves
 * TCP_ESTABLISHED for good; by sock_ops only before the first byte could have
 * been redirected to it. */
struct {
	__uint(type, BPF_MAP_TYPE_SOCKHASH);
	__uint(max_entries, 2 * DEFAULT_MAX_CONNECTIONS);
	__type(key, struct sock_key);
	__type(value, __u64);
} socks SEC(".maps");

#endif
