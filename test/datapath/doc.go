// Package datapath tests the datapath over real sockets in pods of private nodes.
//
// Each test says what bytes must arrive and what must have been counted on the
// way, so that a silent fall-back to TCP fails like a lost byte. The pods'
// cgroups are attached directly through package plugin/datapath; the CNI verbs
// have tests of their own. test/mutate takes rules out of the C source one by
// one and shows that a test here fails without each of them.
package datapath
