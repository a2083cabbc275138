// Package hijack attacks the datapath as the owner of a pod would: with
// namespaces, TUN devices and TCP_REPAIR of its own, with addresses that belong to
// others, and with knowledge of sequence numbers that it could not have. No
// socket of an attacker may be paired with a connection of a victim, and
// nobody's connection may break. docs/security.md draws on these tests.
//
// The sockets of a pod are made by a process in the pod (see cell) and passed to
// the test, which alone decides when each step of an attack happens.
package hijack
