// Command compat makes one system call by which bytes go from a socket to a pipe,
// and prints what it returned and the error's number. Built for a 32-bit
// architecture, it shows what such programs get on a 64-bit kernel.
//
//	compat splice|sendfile|sendfile64 BYTES 3<SOCKET 4>PIPE
package main

import (
	"fmt"
	"os"
	"strconv"
	"syscall"
)

const (
	socket, pipe = 3, 4

	sysSendfile64    = 239 // 386, arm
	spliceNonblocked = 2   // SPLICE_F_NONBLOCK
)

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: compat splice|sendfile|sendfile64 BYTES")
		os.Exit(2)
	}
	size, err := strconv.ParseUint(os.Args[2], 10, 16)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	var n uintptr
	var errno syscall.Errno
	switch os.Args[1] {
	case "splice":
		n, _, errno = syscall.Syscall6(syscall.SYS_SPLICE, socket, 0, pipe, 0, uintptr(size), spliceNonblocked)
	case "sendfile":
		n, _, errno = syscall.Syscall6(syscall.SYS_SENDFILE, pipe, socket, 0, uintptr(size), 0, 0)
	case "sendfile64":
		n, _, errno = syscall.Syscall6(sysSendfile64, pipe, socket, 0, uintptr(size), 0, 0)
	default:
		fmt.Fprintln(os.Stderr, "no call", os.Args[1])
		os.Exit(2)
	}
	if errno != 0 {
		n = 0
	}
	fmt.Println(n, int(errno))
}
