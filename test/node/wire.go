package node

import (
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/vishvananda/netlink"
)

// Wire connects the pod to a bridge of the node by a veth pair named [IfName], as the
// plugin bridge does, where that plugin is not at hand. The bridge has the first
// address of each subnet and is made when first used; addrs are the pod's. The
// result is what bridge would have returned: make it a [Network]'s PrevResult.
func (p *Pod) Wire(bridge string, addrs []netip.Prefix) (*types100.Result, error) {
	result, err := p.wire(bridge, addrs)
	if err != nil {
		return nil, fmt.Errorf("wire pod %s: %w", p.Name, err)
	}
	return result, nil
}

func (p *Pod) wire(bridge string, addrs []netip.Prefix) (*types100.Result, error) {
	pod, err := os.Open(p.NetNS)
	if err != nil {
		return nil, err
	}
	defer pod.Close()
	var k [4]byte
	rand.Read(k[:])
	name := fmt.Sprintf("veth%x", k)
	var bridgeMAC, vethMAC, podMAC net.HardwareAddr
	err = p.node.Do(func() error {
		master, err := bridgeLink(bridge, addrs)
		if err != nil {
			return err
		}
		err = netlink.LinkAdd(&netlink.Veth{
			LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: IfName, PeerNamespace: netlink.NsFd(int(pod.Fd())),
		})
		if err != nil {
			return fmt.Errorf("add veth: %w", err)
		}
		p.mu.Lock()
		p.veths = append(p.veths, name)
		p.mu.Unlock()
		link, err := netlink.LinkByName(name)
		if err == nil {
			err = errors.Join(netlink.LinkSetMaster(link, master), netlink.LinkSetHairpin(link, true), netlink.LinkSetUp(link))
		}
		if err != nil {
			return fmt.Errorf("connect veth to bridge %s: %w", bridge, err)
		}
		bridgeMAC, vethMAC = master.Attrs().HardwareAddr, link.Attrs().HardwareAddr
		return nil
	})
	if err != nil {
		return nil, err
	}
	err = p.Do(func() error {
		link, err := netlink.LinkByName(IfName)
		if err != nil {
			return fmt.Errorf("find link %s: %w", IfName, err)
		}
		if err := netlink.LinkSetUp(link); err != nil {
			return fmt.Errorf("bring up link %s: %w", IfName, err)
		}
		podMAC = link.Attrs().HardwareAddr
		for _, addr := range addrs {
			if err := addAddr(IfName, addr); err != nil {
				return err
			}
			if err := netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: gateway(addr).AsSlice()}); err != nil {
				return fmt.Errorf("route through %s: %w", gateway(addr), err)
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	result := &types100.Result{CNIVersion: types100.ImplementedSpecVersion, Interfaces: []*types100.Interface{
		{Name: bridge, Mac: bridgeMAC.String()},
		{Name: name, Mac: vethMAC.String()},
		{Name: IfName, Mac: podMAC.String(), Sandbox: p.NetNS},
	}}
	for _, addr := range addrs {
		result.IPs = append(result.IPs, &types100.IPConfig{
			Interface: types100.Int(2), Gateway: gateway(addr).AsSlice(),
			Address: net.IPNet{IP: addr.Addr().AsSlice(), Mask: net.CIDRMask(addr.Bits(), addr.Addr().BitLen())},
		})
	}
	return result, nil
}

// gateway is the first address of a subnet.
func gateway(in netip.Prefix) netip.Addr { return in.Masked().Addr().Next() }

// bridgeLink finds or makes a bridge in the calling thread's network namespace.
func bridgeLink(name string, addrs []netip.Prefix) (netlink.Link, error) {
	if link, err := netlink.LinkByName(name); err == nil {
		return link, nil
	}
	if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: name}}); err != nil {
		return nil, fmt.Errorf("add bridge %s: %w", name, err)
	}
	link, err := netlink.LinkByName(name)
	if err == nil {
		err = netlink.LinkSetUp(link)
	}
	if err != nil {
		return nil, fmt.Errorf("bring up bridge %s: %w", name, err)
	}
	for _, addr := range addrs {
		if err := addAddr(name, netip.PrefixFrom(gateway(addr), addr.Bits())); err != nil {
			return nil, err
		}
	}
	return link, nil
}

// unwire removes the veths that Wire made.
func (p *Pod) unwire(names []string) error {
	var failed []error
	for _, name := range names {
		failed = append(failed, p.node.Do(func() error {
			link, err := netlink.LinkByName(name)
			if errors.As(err, &netlink.LinkNotFoundError{}) {
				return nil
			}
			if err == nil {
				err = netlink.LinkDel(link)
			}
			if err != nil {
				return fmt.Errorf("remove veth %s: %w", name, err)
			}
			return nil
		}))
	}
	return errors.Join(failed...)
}
