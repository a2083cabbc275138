// Package cni tests the built skipstack binary as a container runtime uses it:
// through libcni with the upstream bridge, ptp and host-local plugins, and by
// running it with the variables and the standard input of a CNI call.
//
// Every test has a private node (package test/node). It looks at what a call
// prints, at the files, pins and cgroups it leaves, and at what becomes of real
// connections between pods. What the kernel's verdict implies is worked out from
// `skipstack load --json`, so the tests say the same on every kernel.
package cni
