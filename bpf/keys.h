/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
#ifndef SKIPSTACK_KEYS_H
#define SKIPSTACK_KEYS_H

#include "kernel.h"

/* One end of a connection as that end sees it right after the handshake: the
 * next sequence number to send and the next to receive, in host order. NAT
 * changes addresses and ports but not these, so the other end's key is the
 * mirror image, whatever lies between, in whatever network namespace. */
struct end_key {
	__u32 snd;
	__u32 rcv;
};

static __always_inline struct end_key mirror(struct end_key k)
{
	struct end_key m = {.snd = k.rcv, .rcv = k.snd};

	return m;
}

/* What ties two ends together beyond guessing: the random numbers that the
 * kernel gave the request that answered the SYN, and so the server's socket,
 * and the client's socket (txhash; see sent_by). */
struct secret {
	__u32 server;
	__u32 client;
};

/* A socket in the sockhash. Numbers that somebody guessed or overheard are not
 * enough to take the place of a socket that has left. */
struct sock_key {
	struct end_key end;
	struct secret secret;
};

static __always_inline struct sock_key sock_key(struct end_key end, struct secret secret)
{
	struct sock_key k = {.end = end, .secret = secret};

	return k;
}

#endif
