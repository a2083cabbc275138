// Package traffic makes TCP sockets inside pods and drives them from one test.
//
// A [Host] is a process in a pod that opens sockets, which therefore belong to
// the pod's cgroup and network namespace, and hands them over. The test binds,
// connects, writes and reads them itself, so that both ends of a connection and
// all that happens between them are in one function.
//
// Test packages register [Worker] under [WorkerName].
package traffic
