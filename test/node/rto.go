package node

import (
	"fmt"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// SetMinRTO lets TCP in the pod send lost segments again after that time, of whole
// milliseconds, instead of the kernel's 200 ms: over IPv4, for connections that are
// made from now on, but not to the pod's own address on an interface.
//
// It is an attribute of routes (tcp_rto_min() in net/ipv4/tcp_output.c heeds it if it
// is locked); the sysctl tcp_rto_min_us came with Linux 6.11.
func (p *Pod) SetMinRTO(d time.Duration) error {
	err := p.Do(func() error {
		routes, err := netlink.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
		if err != nil {
			return err
		}
		for _, r := range routes {
			if r.Type != unix.RTN_UNICAST && r.Type != unix.RTN_LOCAL {
				continue
			}
			r.RtoMin, r.RtoMinLock = int(d.Milliseconds()), true
			if err := netlink.RouteReplace(&r); err != nil {
				return fmt.Errorf("replace route %v: %w", r, err)
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("set pod %s's shortest retransmission timeout: %w", p.Name, err)
	}
	return nil
}
