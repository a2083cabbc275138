package must_test

import (
	"errors"
	"runtime"
	"testing"
	"time"

	"github.com/skipstack/skipstack/test/must"
)

// A fake is a test that may fail.
type fake struct {
	testing.TB
	failed bool
}

func (f *fake) Helper() {}

func (f *fake) Fatal(...any) {
	f.failed = true
	runtime.Goexit()
}

// fails tells if f fails its test.
func fails(f func(t testing.TB)) bool {
	t := &fake{}
	done := make(chan struct{})
	go func() {
		defer close(done)
		f(t)
	}()
	<-done
	return t.failed
}

var errNo = errors.New("no")

func TestErrorFails(t *testing.T) {
	for _, err := range []error{nil, errNo} {
		if fails(func(t testing.TB) { must.Do(t, err) }) != (err != nil) {
			t.Errorf("Do: %v", err)
		}
		got := 0
		if fails(func(t testing.TB) { got = must.Get(1, err)(t) }) != (err != nil) || (got == 1) != (err == nil) {
			t.Errorf("Get: %v: %d", err, got)
		}
	}
}

func TestWait(t *testing.T) {
	calls := 0
	if fails(func(t testing.TB) {
		must.Wait(t, time.Hour, time.Nanosecond, func() error {
			if calls++; calls < 3 {
				return errNo
			}
			return nil
		})
	}) || calls != 3 {
		t.Errorf("it failed, or called %d times, want 3", calls)
	}
	if !fails(func(t testing.TB) { must.Wait(t, 0, time.Nanosecond, func() error { return errNo }) }) {
		t.Error("it does not end")
	}
}
