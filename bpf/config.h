/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
#ifndef SKIPSTACK_CONFIG_H
#define SKIPSTACK_CONFIG_H

#include "kernel.h"

/* Fixed when the programs are loaded. */

/* How long after the SYN a client may claim its record, in nanoseconds. A
 * client on this node needs 12 to 30 us; the longer a record can be claimed,
 * the more time somebody has to guess it. */
const volatile __u64 cfg_claim_window_ns = 4000000;

/* log2 of the page size, the unit of the kernel's memory limits. */
const volatile __u8 cfg_page_shift = 12;

/* Kernel shortcomings, as bits. Present ones are in control.risks, those that
 * a pod's configuration accepts are in pod.accepted. */
enum risk {
	RISK_SPLICE = 1,
	RISK_FIONREAD = 2,
	RISK_EPOLL = 4,
	RISK_UNCHARGED = 8,
	RISK_BLOCKING = 16, /* concerns a connection, not the kernel: never in control.risks */
};

const enum risk *risk_type __attribute__((unused));

/* Slots of skipstack_switch. They keep their meaning in every version, so that
 * each version of the tool can switch off and retire the programs of any other. */
enum switch_slot {
	SWITCH_OFF,	   /* 1: the operator switched the node off */
	SWITCH_GENERATION, /* a new value after each change here, in `pods` or in skipstack_ctl */
	SWITCH_RETIRED,	   /* 1: another set of programs enrols new connections */
	SWITCH_SLOTS,
};

/* Writer: user space, one slot at a time. Readers: all programs. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, SWITCH_SLOTS);
	__type(key, __u32);
	__type(value, __u32);
} skipstack_switch SEC(".maps");

const enum switch_slot *switch_slot_type __attribute__((unused));

static __always_inline __u32 read_switch(enum switch_slot slot)
{
	__u32 key = slot;
	__u32 *value = bpf_map_lookup_elem(&skipstack_switch, &key);

	return value ? *value : 0;
}

/* What is known of the node. */
struct control {
	__u32 open;	       /* a verdict on this kernel is known and allows acceleration */
	__u32 risks;	       /* enum risk bits present on this kernel */
	__u32 funnel;	       /* the sk_skb verdict program is attached to the sockhash */
	__u32 mptcp_listeners; /* 0 where accept(2) on an MPTCP listener oopses once the accepted
				* socket is in a sockmap (fixed in 6.1.159, 6.12.60, 6.18) */
	__u32 max_connections;
	__u8 build[16]; /* identifies the object file that the programs come from */
};

/* Writer: user space. Readers: all programs. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct control);
} skipstack_ctl SEC(".maps");

static __always_inline struct control *control(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&skipstack_ctl, &zero);
}

struct port_range {
	__u16 first;
	__u16 last;
};

#define MAX_EXCLUDED_PORT_RANGES 16

/* One pod's settings. */
struct pod {
	__u32 enabled;	    /* 0: mode off */
	__u32 switched_off; /* by the operator */
	__u32 accepted;	    /* enum risk bits */
	__u32 unread_limit; /* bytes that a receiver in this pod may leave unread */
	__u32 excluded_ranges;
	struct port_range excluded[MAX_EXCLUDED_PORT_RANGES];
};

#endif
