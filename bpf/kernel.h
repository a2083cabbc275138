/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/* The parts of kernel structures that the datapath reads. Field offsets are
 * relocated when the object is loaded (CO-RE), so only names and types matter
 * here. Context structures and constants are stable and come from linux/bpf.h.
 */
#ifndef SKIPSTACK_KERNEL_H
#define SKIPSTACK_KERNEL_H

#include <linux/bpf.h>
#include <stdbool.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>

#define O_NONBLOCK 0x800 /* amd64, arm64, riscv: asm-generic/fcntl.h */
#define SOL_TCP 6
#define TCP_USER_TIMEOUT 18
#define SHUTDOWN_BOTH 3	   /* SHUTDOWN_MASK, include/net/sock.h */
#define SOCK_RCVBUF_LOCK 2 /* include/net/sock.h */

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

typedef struct {
	int counter;
} atomic_t;

typedef struct {
	__s64 counter;
} atomic64_t;

struct kernfs_node {
	__u64 id;
};

struct cgroup_subsys_state {
	struct cgroup *cgroup;
	struct cgroup_subsys_state *parent;
};

struct cgroup_root {
	int hierarchy_id; /* 0: cgroup v2 */
};

struct cgroup {
	struct cgroup_subsys_state self;
	struct kernfs_node *kn;
	struct cgroup_root *root;
};

struct page_counter {
	atomic64_t usage; /* pages */
	unsigned long max;
	struct page_counter *parent;
};

#define LRU_LISTS 5	    /* NR_LRU_LISTS, include/linux/mmzone.h */
#define LRU_INACTIVE_FILE 2 /* followed by LRU_ACTIVE_FILE */

struct mem_cgroup_per_node {
	unsigned long lru_zone_size[1][LRU_LISTS]; /* pages */
};

struct mem_cgroup {
	struct cgroup_subsys_state css;
	struct page_counter memory;
	struct mem_cgroup_per_node *nodeinfo[1]; /* as many as there are nodes */
	__u64 socket_pressure; /* jiffies; unsigned long before 6.17 */
	struct page_counter tcpmem; /* cgroup v1 */
	bool tcpmem_active;	    /* cgroup v1 */
	int tcpmem_pressure;	    /* cgroup v1 */
};

struct sock_cgroup_data {
	struct cgroup *cgroup;
};

struct inode {
	unsigned short i_mode;
};

struct file {
	unsigned int f_flags;
	struct inode *f_inode;
};

struct socket {
	struct file *file;
	struct sock *sk;
};

struct sk_buff_head {
	__u32 qlen;
};

struct proto {
	atomic64_t *memory_allocated;
	long *sysctl_mem;
};

struct netns_ipv4 {
	int sysctl_tcp_rmem[3];
};

struct net {
	struct netns_ipv4 ipv4;
};

typedef struct {
	struct net *net;
} possible_net_t;

struct sock_common {
	volatile unsigned char skc_state;
	struct proto *skc_prot;
	possible_net_t skc_net;
	atomic64_t skc_cookie;
	struct sock *skc_listener; /* of a request sock */
};

struct sock {
	struct sock_common __sk_common;
	struct sk_buff_head sk_receive_queue;
	struct {
		atomic_t rmem_alloc;
	} sk_backlog;
	int sk_rcvbuf;
	int sk_rcvlowat;
	__u8 sk_userlocks : 4;
	__u8 sk_shutdown;
	struct mem_cgroup *sk_memcg;
	struct socket *sk_socket;
	void *sk_user_data;
	struct sock_cgroup_data sk_cgrp_data;
};

struct inet_sock {
	struct sock sk;
};

struct inet_connection_sock {
	struct inet_sock icsk_inet;
	const void *icsk_ulp_ops;
};

struct tcp_sock {
	struct inet_connection_sock inet_conn;
	__u32 rcv_nxt;
	__u32 snd_una;
	__u32 snd_nxt;
	__u32 write_seq;
	__u32 snd_wnd;
	__u32 mss_cache;
	__u64 bytes_received;
	__u32 data_segs_in;
	bool is_mptcp;
};

struct request_sock {
	struct sock_common __req_common; /* rsk_listener is in here */
};

struct inet_request_sock {
	struct request_sock req;
};

struct tcp_request_sock {
	struct inet_request_sock req;
	__u32 txhash;
	__u32 rcv_isn;
	__u32 snt_isn;
	bool is_mptcp;
};

struct bpf_sock_ops_kern {
	struct sock *sk;
	struct sk_buff *skb;
};

struct list_head {
	struct list_head *next;
};

struct sk_psock {
	struct sk_buff_head ingress_skb;
	struct list_head ingress_msg; /* of struct sk_msg */
	struct list_head link; /* of struct sk_psock_link, one for each map it is in */
};

struct sk_psock_link {
	struct list_head list;
	struct bpf_map *map;
};

struct sk_buff {
	char cb[48]; /* struct tcp_skb_cb begins with seq and end_seq */
	__u8 sw_hash : 1;
	__u32 hash;
};

struct thread_info {
	__u32 status; /* x86 */
};

struct task_struct {
	struct thread_info thread_info;
	unsigned int flags;
	void *worker_private; /* of an io_uring worker: struct io_worker */
};

/* The registers of a process that is in a system call: one architecture's or the
 * other's. Relocation leaves out what follows "___". */
struct pt_regs___x86 {
	unsigned long orig_ax;
};

struct pt_regs___arm64 {
	__u64 pstate;
	__s32 syscallno;
};

struct io_wq_work {
	char unused;
};

struct io_worker {
	struct io_wq_work *cur_work;
};

struct io_kiocb {
	__u8 opcode;
	struct io_wq_work work;
};

#pragma clang attribute pop

#endif
