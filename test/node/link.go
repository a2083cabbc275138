package node

import (
	"crypto/rand"
	"fmt"
	"net"
	"net/netip"
	"os"

	"github.com/vishvananda/netlink"
)

// Connect links two nodes by a veth pair and routes each other's pod subnets over it,
// so that their pods reach each other as those of two machines do.
func Connect(a, b *Node, aPods, bPods []netip.Prefix) error {
	var k [3]byte
	rand.Read(k[:])
	name := fmt.Sprintf("up%x", k)
	far, err := os.Open(b.NetNS)
	if err != nil {
		return fmt.Errorf("connect nodes %s and %s: %w", a.Name, b.Name, err)
	}
	defer far.Close()
	err = a.Do(func() error {
		return netlink.LinkAdd(&netlink.Veth{
			LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: name, PeerNamespace: netlink.NsFd(int(far.Fd())),
		})
	})
	if err != nil {
		return fmt.Errorf("connect nodes %s and %s: add veth: %w", a.Name, b.Name, err)
	}
	for _, end := range []struct {
		node      *Node
		own, peer byte
		remote    []netip.Prefix
	}{{a, 1, 2, bPods}, {b, 2, 1, aPods}} {
		err := end.node.Do(func() error { return uplink(name, k, end.own, end.peer, end.remote) })
		if err != nil {
			return fmt.Errorf("connect nodes %s and %s: %w", a.Name, b.Name, err)
		}
	}
	return nil
}

// uplink configures one end of a connection between nodes, in the calling thread's
// network namespace.
func uplink(name string, k [3]byte, own, peer byte, remote []netip.Prefix) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find link %s: %w", name, err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("bring up link %s: %w", name, err)
	}
	ipv4 := func(end byte) netip.Addr { return netip.AddrFrom4([4]byte{172, 31, k[0], k[1]&^3 | end}) }
	ipv6 := func(end byte) netip.Addr { return netip.AddrFrom16([16]byte{0xfd, 1, k[0], k[1], k[2], 15: end}) }
	for _, local := range []netip.Prefix{netip.PrefixFrom(ipv4(own), 30), netip.PrefixFrom(ipv6(own), 64)} {
		if err := addAddr(name, local); err != nil {
			return err
		}
	}
	for _, subnet := range remote {
		via := ipv4(peer)
		if subnet.Addr().Is6() {
			via = ipv6(peer)
		}
		dst := &net.IPNet{IP: subnet.Addr().AsSlice(), Mask: net.CIDRMask(subnet.Bits(), subnet.Addr().BitLen())}
		if err := netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: dst, Gw: via.AsSlice()}); err != nil {
			return fmt.Errorf("route %s: %w", subnet, err)
		}
	}
	return nil
}
