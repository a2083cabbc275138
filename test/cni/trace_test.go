package cni_test

import (
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/test/must"
	"github.com/skipstack/skipstack/test/trace"
)

// trace runs the plugin and asks at each of its system calls what is to become of
// it. A plugin that sticks is left so until end is called, which kills it, or the test
// ends; any other has ended when trace returns, with code -1 if it was killed.
func (s *site) trace(c call, at func(trace.Step) trace.Fate) (got outcome, end func()) {
	s.t.Helper()
	in, out, errs := s.file(s.stdin(c)), s.file(""), s.file("")
	for _, f := range []*os.File{in, out, errs} {
		defer f.Close()
	}
	status, end, err := trace.Run(program(), os.ProcAttr{Env: s.env(c), Files: []*os.File{in, out, errs}}, at)
	must.Do(s.t, err)
	end = sync.OnceFunc(end)
	s.t.Cleanup(end)
	got = outcome{call: c, code: status.ExitStatus()}
	for f, to := range map[*os.File]*string{out: &got.stdout, errs: &got.stderr} {
		text := make([]byte, 64<<10)
		n, _ := f.ReadAt(text, 0)
		*to = string(text[:n])
	}
	return got, end
}

// file is an open file without a name.
func (s *site) file(content string) *os.File {
	s.t.Helper()
	fd := must.Get(unix.MemfdCreate("test", unix.MFD_CLOEXEC))(s.t)
	f := os.NewFile(uintptr(fd), "memfd")
	must.Get(f.WriteString(content))(s.t)
	must.Get(f.Seek(0, 0))(s.t)
	return f
}
