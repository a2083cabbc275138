/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
#ifndef SKIPSTACK_PODS_H
#define SKIPSTACK_PODS_H

#include "maps.h"

/* Sockets belong to the cgroup their process was in, usually a container's,
 * one below the pod's; a process manager inside the container adds more. */
#define MAX_CGROUPS_BELOW_POD 12

/* pod_of finds the innermost attached cgroup that holds the given one. */
static __always_inline struct pod *pod_of(struct cgroup *cgroup, __u64 *id)
{
	for (int i = 0; i < MAX_CGROUPS_BELOW_POD && cgroup; i++) {
		struct cgroup_subsys_state *parent;
		struct pod *pod;

		*id = BPF_CORE_READ(cgroup, kn, id);
		pod = bpf_map_lookup_elem(&pods, id);
		if (pod)
			return pod;
		parent = BPF_CORE_READ(cgroup, self.parent);
		cgroup = parent ? BPF_CORE_READ(parent, cgroup) : 0;
	}
	return 0;
}

static __always_inline bool node_open(const struct control *ctl)
{
	return ctl->open && !read_switch(SWITCH_OFF);
}

/* pod_open tells if a pod takes part, given that the node does. */
static __always_inline bool pod_open(const struct control *ctl, const struct pod *pod)
{
	return pod->enabled && !pod->switched_off && !(ctl->risks & ~pod->accepted);
}

static __always_inline bool excluded(const struct pod *pod, __u32 port)
{
	for (__u32 i = 0; i < MAX_EXCLUDED_PORT_RANGES; i++) {
		if (i >= pod->excluded_ranges)
			break;
		if (port >= pod->excluded[i].first && port <= pod->excluded[i].last)
			return true;
	}
	return false;
}

/* blocking tells if reads from the socket would wait, which the pod does not accept.
 * A socket without a file counts as such whatever the pod accepts: it is the kernel's
 * own (NFS, NVMe over TCP), or being closed, and drivers in the kernel keep something
 * else in sk_user_data than a sockmap does. */
static __always_inline bool blocking(const struct pod *pod, struct socket *socket)
{
	struct file *file = BPF_CORE_READ(socket, file);

	return !file || (!(pod->accepted & RISK_BLOCKING) && !(BPF_CORE_READ(file, f_flags) & O_NONBLOCK));
}

#endif
