// Package node builds private nodes for tests and for `skipstack bench`.
//
// It works in two steps. [Isolate] runs the program again as the first process
// of new mount, network, cgroup and PID namespaces, where /run, /sys/fs/bpf and
// the cgroup2 root are private and empty ([Prepare]). There, [New] makes as many
// nodes as are wanted: each has its own network namespace, bpffs, run directory,
// CNI directories and cgroup subtree. Pods are made and removed through libcni
// ([Node.AddPod], [Pod.Del]); their processes are born in the pod's cgroup and
// network namespace ([Pod.Start]).
//
// Nothing outlives the program: the namespaces end with it, the cgroups are
// removed by the process that called Isolate, and what a killed one left
// is swept by the next. [Machine.Leftovers] and [Node.Leftovers] check it.
//
// Test packages call [Main] from TestMain.
package node
