package cni_test

import (
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/test/must"
	"github.com/skipstack/skipstack/test/trace"
)

// trace runs the plugin and asks at each of its system calls what is to become of
// it. A plugin that sticks is left so until end is called, which kills it; any
// other has ended when trace returns.
func (s *site) trace(c call, at func(trace.Step) trace.Fate) (status syscall.WaitStatus, stdout string, end func()) {
	s.t.Helper()
	in, out, null := s.file(s.stdin(c)), s.file(""), must.Get(os.OpenFile(os.DevNull, os.O_WRONLY, 0))(s.t)
	for _, f := range []*os.File{in, out, null} {
		defer f.Close()
	}
	status, end, err := trace.Run(program(), os.ProcAttr{Env: s.env(c), Files: []*os.File{in, out, null}}, at)
	must.Do(s.t, err)
	text := make([]byte, 64<<10)
	n, _ := out.ReadAt(text, 0)
	return status, string(text[:n]), end
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
