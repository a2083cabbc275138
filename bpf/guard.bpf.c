//go:build ignore
// SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0)

/* The splice guard. tcp_splice_read() looks at sk_receive_queue alone, so a
 * process that moves bytes from an enrolled socket with splice(2) would never see
 * redirected ones. The guard refuses with EINVAL, which programs take for "not
 * possible here" and read(2) instead.
 *
 * It refuses TCP_ULP, too, with which kTLS begins: the tls module takes redirected
 * bytes for decrypted ones, and competes with the funnel for the others, which ends in
 * a BUG() of the kernel (seen on 6.18.15; newer kernels take no keys for a socket
 * that is in a sockmap). TLS libraries go on in user space.
 *
 * Two programs in two forms; user space attaches the first form that works:
 *
 * guard_lsm, guard_lsm_ulp            BPF LSM, where the kernel runs with "bpf" among its LSMs.
 * guard_fmod_ret, guard_fmod_ret_ulp  fmod_ret on the functions that call the LSMs.
 *
 * The first runs for every read(2) and write(2) of the node, so what is cheap to
 * find out comes first. The second runs for every setsockopt(2).
 */
#include "socks.h"

#include <bpf/bpf_tracing.h>

char _license[] SEC("license") = "GPL";

#define EINVAL 22
#define ENOTCONN 107
#define TCP_ULP 31 /* include/uapi/linux/tcp.h */
#define MAY_READ 4 /* include/linux/fs.h */
#define S_IFMT 0170000
#define S_IFSOCK 0140000

/* System calls that move bytes from a socket to a pipe: splice(2), and sendfile(2)
 * if its target is a pipe. tee(2) and vmsplice(2) read from no socket. */
#define X86_SPLICE 275
#define X86_SENDFILE 40
#define X86_X32_BIT 0x40000000
#define I386_SPLICE 313
#define I386_SENDFILE 187
#define I386_SENDFILE64 239
#define ARM64_SPLICE 76
#define ARM64_SENDFILE 71
#define ARM_SPLICE 340
#define ARM_SENDFILE 187
#define ARM_SENDFILE64 239

#define TS_COMPAT 2	      /* arch/x86/include/asm/thread_info.h */
#define PSR_MODE32_BIT 0x10   /* arch/arm64/include/uapi/asm/ptrace.h */
#define PF_IO_WORKER 0x10     /* include/linux/sched.h */
#define IORING_OP_SPLICE 30   /* include/uapi/linux/io_uring.h */

/* A socket is in one map but for the programs of others. */
#define MAX_LINKS 8

enum refusal {
	REFUSAL_SPLICE,
	REFUSAL_ULP,
	REFUSALS,
};

/* How many calls were refused, by what was asked for. Refusals are rare, as programs
 * do not ask again after one, so all CPUs share a counter.
 * Writer: the guard. Reader: user space. A guard that takes another's place goes on
 * with its map. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, REFUSALS);
	__type(key, enum refusal);
	__type(value, __u64);
} skipstack_guard SEC(".maps");

static __always_inline int refuse(enum refusal what)
{
	__u64 *refused = bpf_map_lookup_elem(&skipstack_guard, &what);

	if (refused)
		__sync_fetch_and_add(refused, 1);
	return -EINVAL;
}

/* io_uring_splices tells if an io_uring worker is carrying out a splice, for which
 * its registers say nothing. io_uring leaves splices to its workers always, as
 * they may block (io_splice(), io_uring/splice.c). */
static __always_inline bool io_uring_splices(struct task_struct *task)
{
	struct io_worker *worker = task->worker_private;
	struct io_wq_work *work;
	struct io_kiocb *req;

	if (!bpf_core_field_exists(struct io_worker, cur_work) ||
	    !bpf_core_field_exists(struct io_kiocb, opcode) ||
	    !bpf_core_field_exists(struct io_kiocb, work))
		return false;
	work = BPF_CORE_READ(worker, cur_work);
	req = (void *)work - bpf_core_field_offset(struct io_kiocb, work);
	return work && BPF_CORE_READ(req, opcode) == IORING_OP_SPLICE;
}

/* splices tells if the task is in a system call that splices. */
static __always_inline bool splices(struct task_struct *task)
{
	void *regs;

	if (task->flags & PF_IO_WORKER)
		return io_uring_splices(task);
	regs = (void *)bpf_task_pt_regs(task);
	if (bpf_core_field_exists(struct pt_regs___x86, orig_ax)) {
		__u32 nr = ((struct pt_regs___x86 *)regs)->orig_ax;

		if (bpf_core_field_exists(task->thread_info.status) &&
		    task->thread_info.status & TS_COMPAT)
			return nr == I386_SPLICE || nr == I386_SENDFILE || nr == I386_SENDFILE64;
		nr &= ~X86_X32_BIT;
		return nr == X86_SPLICE || nr == X86_SENDFILE;
	}
	if (bpf_core_field_exists(struct pt_regs___arm64, syscallno)) {
		__u32 nr = ((struct pt_regs___arm64 *)regs)->syscallno;

		if (((struct pt_regs___arm64 *)regs)->pstate & PSR_MODE32_BIT)
			return nr == ARM_SPLICE || nr == ARM_SENDFILE || nr == ARM_SENDFILE64;
		return nr == ARM64_SPLICE || nr == ARM64_SENDFILE;
	}
	return false;
}

/* enrolled tells if the socket is in the sockhash, by the list of maps that the
 * kernel keeps with it: nothing has to be written down, so nothing can be stale.
 * The process holds a reference to the socket. What hangs on it is freed only
 * after a grace period or read with probe reads. */
static __always_inline bool enrolled(struct sock *sk)
{
	struct sk_psock *psock = (void *)((unsigned long)sk->sk_user_data & ~7UL);
	struct list_head *at;

	if (!psock)
		return false;
	at = BPF_CORE_READ(psock, link.next);
	for (int i = 0; i < MAX_LINKS; i++) {
		struct sk_psock_link *link = (void *)at - bpf_core_field_offset(struct sk_psock_link, list);

		/* The head of the list, where it ends, is a link of no map. */
		if (BPF_CORE_READ(link, map) == (void *)&socks)
			return true;
		at = BPF_CORE_READ(at, next);
	}
	return false;
}

/* guard returns what the hook is to return: what programs before this one have
 * returned, 0 if all is well. */
static __always_inline int guard(struct file *file, int mask, int before)
{
	struct socket *socket;

	if (before || !(mask & MAY_READ) || (file->f_inode->i_mode & S_IFMT) != S_IFSOCK)
		return before;
	if (!splices(bpf_get_current_task_btf()))
		return 0;
	socket = bpf_sock_from_file(file);
	if (!socket || !socket->sk)
		return 0;
	return enrolled(socket->sk) ? refuse(REFUSAL_SPLICE) : 0;
}

SEC("lsm/file_permission")
int BPF_PROG(guard_lsm, struct file *file, int mask, int before)
{
	return guard(file, mask, before);
}

SEC("fmod_ret/security_file_permission")
int BPF_PROG(guard_fmod_ret, struct file *file, int mask, int before)
{
	return guard(file, mask, before);
}

/* guard_ulp is guard for setsockopt(2). A socket that is about to be connected may be
 * enrolled between here and where its lock is taken; tls_init() refuses it likewise. */
static __always_inline int guard_ulp(struct socket *socket, int level, int optname, int before)
{
	struct sock *sk = socket->sk;

	if (before || level != SOL_TCP || optname != TCP_ULP || !sk)
		return before;
	if (sk->__sk_common.skc_state == BPF_TCP_SYN_SENT)
		return -ENOTCONN;
	return enrolled(sk) ? refuse(REFUSAL_ULP) : 0;
}

SEC("lsm/socket_setsockopt")
int BPF_PROG(guard_lsm_ulp, struct socket *socket, int level, int optname, int before)
{
	return guard_ulp(socket, level, optname, before);
}

SEC("fmod_ret/security_socket_setsockopt")
int BPF_PROG(guard_fmod_ret_ulp, struct socket *socket, int level, int optname, int before)
{
	return guard_ulp(socket, level, optname, before);
}
