/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/* What is kept of a socket. It is apart from the maps so that an object which
 * only reads it does not make maps of its own. */
#ifndef SKIPSTACK_ENDPOINT_H
#define SKIPSTACK_ENDPOINT_H

#include "keys.h"

/* What became of a message that an application sent on an enrolled socket.
 * Labels for people are in labels.go; a test ties the two together. */
enum message_outcome {
	MESSAGE_REDIRECTED,
	MESSAGE_NOT_ENROLLED,	/* the socket has no endpoint record */
	MESSAGE_PLAIN,		/* the connection was decided to stay on TCP */
	MESSAGE_LOST_RACE,	/* sent before the server was enrolled: decides for TCP */
	MESSAGE_RECORD_MISSING, /* the connection's record was evicted */
	MESSAGE_UNACKNOWLEDGED, /* bytes sent by TCP have not all arrived */
	MESSAGE_NOT_READ,	/* bytes sent by TCP have not all been read */
	MESSAGE_RECEIVER_FULL,	/* the receiver has its limit of bytes unread */
	MESSAGE_MEMORY,		/* TCP or the receiver's memory cgroup is short of memory */
	MESSAGE_CLOSING,	/* this side has shut down sending */
	MESSAGE_ULP,		/* kTLS or another ULP owns the byte stream */
	MESSAGE_SWITCHED_OFF,	/* the node's or a pod's gate is closed */
	MESSAGE_PEER_GONE,	/* the receiving socket has left the sockhash */
	MESSAGE_OUTCOMES,
};

/* Of an enrolled socket's messages, those that went by TCP have one of these outcomes. */
#define FIRST_PASS MESSAGE_PLAIN
#define PASSES (MESSAGE_OUTCOMES - FIRST_PASS)

struct message_count {
	__u64 messages;
	__u64 bytes;
};

enum endpoint_mode {
	ENDPOINT_UNDECIDED, /* a client that has not sent yet */
	ENDPOINT_REDIRECT,
	ENDPOINT_PLAIN,
};

/* What an enrolled socket knows of itself and its peer. */
struct endpoint {
	struct end_key own;
	struct secret secret;
	enum endpoint_mode mode;
	__u8 is_client;
	__u8 enrolled; /* is, or was, in the sockhash */
	__u8 closed;   /* reached TCP_CLOSE; the record stays for those who still read */
	__u8 pressure; /* the receiver's memory cgroup is short of memory; cached, see below */
	/* The peer: its address is only a hint until the cookie has been
	 * compared, because the kernel may have reused the memory. */
	__u64 peer_sk;
	__u64 peer_cookie;
	__u64 pod;	/* cgroup id */
	__u64 peer_pod; /* cgroup id */
	/* Cached for one tick by refresh(). */
	__u64 checked;	  /* jiffies */
	__u64 peer_psock; /* address */
	__u64 low_mark;	  /* tcp_mem[0], pages */
	__u64 tightest;	  /* address of the usage that limits the receiver's memory cgroup, 0: none does */
	__u64 most;	  /* pages, of that usage */
	__u32 generation; /* of struct control */
	__u32 gate;	  /* 1: open */
	__u32 pod_limit;  /* bytes, of the receiver's pod */
	__u32 limit;	  /* bytes, in force */
	__u32 queued;	  /* messages redirected since the receiver was last seen empty */
	__u32 reserved;	  /* messages for which there is room in the receiver's queue, see queues.h */
	/* Statistics. */
	__u64 since_ns; /* CLOCK_MONOTONIC, of the SYN */
	struct message_count redirected;
	__u64 passed_bytes;
	__u32 passed[PASSES]; /* messages, by enum message_outcome - FIRST_PASS */
};

#endif
