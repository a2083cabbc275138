// Package must fails a test where something did not go well.
package must

import (
	"testing"
	"time"
)

// Do fails the test if there is an error.
func Do(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// Get returns v, or fails the test that is given afterwards: must.Get(f())(t).
func Get[T any](v T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		Do(t, err)
		return v
	}
}

// Wait calls f, with a pause in between, until it finds nothing to complain about. The
// test fails if it still does after the limit.
func Wait(t testing.TB, limit, pause time.Duration, f func() error) {
	t.Helper()
	for deadline := time.Now().Add(limit); ; time.Sleep(pause) {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}
