package bench

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"
)

// An endpoint is a server's address: TCP, or the path of an AF_UNIX socket.
type endpoint struct {
	TCP  netip.AddrPort `json:"tcp"`
	Unix string         `json:"unix,omitempty"`
}

func (e endpoint) String() string {
	if e.Unix != "" {
		return e.Unix
	}
	return e.TCP.String()
}

func (e endpoint) domain() int {
	switch {
	case e.Unix != "":
		return unix.AF_UNIX
	case e.TCP.Addr().Is6():
		return unix.AF_INET6
	}
	return unix.AF_INET
}

// sockaddr encodes the address for the kernel.
func (e endpoint) sockaddr() []byte {
	var b []byte
	switch e.domain() {
	case unix.AF_UNIX:
		b = make([]byte, 2+len(e.Unix)+1)
		copy(b[2:], e.Unix)
	case unix.AF_INET6:
		b = make([]byte, unix.SizeofSockaddrInet6)
		copy(b[8:], e.TCP.Addr().AsSlice())
	default:
		b = make([]byte, unix.SizeofSockaddrInet4)
		copy(b[4:], e.TCP.Addr().AsSlice())
	}
	binary.NativeEndian.PutUint16(b, uint16(e.domain()))
	if e.Unix == "" {
		binary.BigEndian.PutUint16(b[2:], e.TCP.Port())
	}
	return b
}

// any is where a server for clients of this endpoint listens: on all addresses of
// its family, on a port of the kernel's choice.
func (e endpoint) any() endpoint {
	switch e.domain() {
	case unix.AF_INET6:
		return endpoint{TCP: netip.AddrPortFrom(netip.IPv6Unspecified(), 0)}
	case unix.AF_INET:
		return endpoint{TCP: netip.AddrPortFrom(netip.IPv4Unspecified(), 0)}
	}
	return e
}

// withPort is the endpoint on the port that the kernel chose.
func (e endpoint) withPort(port uint16) endpoint {
	if e.Unix == "" {
		e.TCP = netip.AddrPortFrom(e.TCP.Addr(), port)
	}
	return e
}

// remove removes what a listener leaves in the file system.
func (e endpoint) remove() error {
	if e.Unix == "" {
		return nil
	}
	if err := os.Remove(e.Unix); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove a socket: %w", err)
	}
	return nil
}
