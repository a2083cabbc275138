// Package conformance runs every socket behaviour that an application can rely on,
// over plain TCP and over accelerated connections, with the same code, and compares
// what is seen. A difference must be one of those in deviations_test.go, and each of
// those must be seen. The result is docs/conformance.md.
package conformance
