package node

import (
	"errors"
	"fmt"
	"net/netip"
	"sync"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// A Service is a set of rules in a table of its own. Close removes it.
type Service struct {
	thread *thread
	table  *nftables.Table
	once   sync.Once
	err    error
}

// ServiceOptions describe a Kubernetes-style ClusterIP.
type ServiceOptions struct {
	IP          netip.Addr // of the service
	Port        uint16     // 0: all ports, each to the same port of the backend
	Backend     netip.Addr // a pod's
	BackendPort uint16     // 0: Port
	Masquerade  bool       // the backend sees the node's address as the client's
}

// AddService makes a service on the node by DNAT, as kube-proxy does. Without
// Masquerade between pods of one bridge it needs [Node.HasBridgeNetfilter].
func (n *Node) AddService(o ServiceOptions) (*Service, error) {
	if o.BackendPort == 0 {
		o.BackendPort = o.Port
	}
	s, err := addRules(n.thread, ipFamily(o.IP.Is6()), func(c *nftables.Conn, t *nftables.Table) {
		match := append(matchAddr(o.IP), matchTCPPort(o.Port)...)
		dnat := append(match, toAddr(o.Backend, o.BackendPort)...)
		for _, hook := range []*nftables.ChainHook{nftables.ChainHookPrerouting, nftables.ChainHookOutput} {
			c.AddRule(&nftables.Rule{Table: t, Chain: natChain(c, t, hook, nftables.ChainPriorityNATDest), Exprs: dnat})
		}
		if o.Masquerade {
			chain := natChain(c, t, nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource)
			c.AddRule(&nftables.Rule{Table: t, Chain: chain, Exprs: append(matchOriginalAddr(o.IP), &expr.Masq{})})
		}
	})
	if err != nil {
		return nil, fmt.Errorf("add service %s: %w", o.IP, err)
	}
	n.mu.Lock()
	n.services = append(n.services, s)
	n.mu.Unlock()
	return s, nil
}

// Redirect sends TCP connections to port from, arriving at the pod or
// leaving it (outbound), to port to of the pod itself, as sidecar proxies do.
func (p *Pod) Redirect(ipv6, outbound bool, from, to uint16) (*Service, error) {
	hook := nftables.ChainHookPrerouting
	if outbound {
		hook = nftables.ChainHookOutput
	}
	s, err := addRules(p.thread, ipFamily(ipv6), func(c *nftables.Conn, t *nftables.Table) {
		c.AddRule(&nftables.Rule{Table: t, Chain: natChain(c, t, hook, nftables.ChainPriorityNATDest), Exprs: append(matchTCPPort(from),
			&expr.Immediate{Register: 1, Data: binaryutil.BigEndian.PutUint16(to)},
			&expr.Redir{RegisterProtoMin: 1})})
	})
	if err != nil {
		return nil, fmt.Errorf("redirect port %d of pod %s: %w", from, p.Name, err)
	}
	p.mu.Lock()
	p.services = append(p.services, s)
	p.mu.Unlock()
	return s, nil
}

// Close removes the rules. It may be called again. Connections that use them go on.
func (s *Service) Close() error {
	s.once.Do(func() {
		s.err = s.thread.do(func() error {
			c, err := nftables.New()
			if err != nil {
				return fmt.Errorf("remove rules: %w", err)
			}
			c.DelTable(s.table)
			if err := c.Flush(); err != nil && !errors.Is(err, unix.ENOENT) {
				return fmt.Errorf("remove rules: %w", err)
			}
			return nil
		})
	})
	return s.err
}

func addRules(t *thread, family nftables.TableFamily, add func(*nftables.Conn, *nftables.Table)) (*Service, error) {
	table := &nftables.Table{Name: "test-" + randomUID()[:8], Family: family}
	err := t.do(func() error {
		c, err := nftables.New()
		if err != nil {
			return err
		}
		add(c, c.AddTable(table))
		return c.Flush()
	})
	if err != nil {
		return nil, err
	}
	return &Service{thread: t, table: table}, nil
}

func ipFamily(ipv6 bool) nftables.TableFamily {
	if ipv6 {
		return nftables.TableFamilyIPv6
	}
	return nftables.TableFamilyIPv4
}

// natChain is the table's base chain on a hook; adding it again changes nothing.
func natChain(c *nftables.Conn, t *nftables.Table, hook *nftables.ChainHook, priority *nftables.ChainPriority) *nftables.Chain {
	return c.AddChain(&nftables.Chain{
		Name: fmt.Sprintf("hook%d", *hook), Table: t, Type: nftables.ChainTypeNAT, Hooknum: hook, Priority: priority,
	})
}

// matchAddr matches packets to addr.
func matchAddr(addr netip.Addr) []expr.Any {
	offset, length := uint32(16), uint32(4)
	if addr.Is6() {
		offset, length = 24, 16
	}
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: length},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: addr.AsSlice()},
	}
}

// matchOriginalAddr matches packets of connections that were made to addr.
func matchOriginalAddr(addr netip.Addr) []expr.Any {
	return []expr.Any{
		&expr.Ct{Register: 1, Key: expr.CtKeyDST, Direction: 0 /* original */},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: addr.AsSlice()},
	}
}

// matchTCPPort matches TCP, and unless port is 0 the destination port.
func matchTCPPort(port uint16) []expr.Any {
	match := []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_TCP}},
	}
	if port != 0 {
		match = append(match,
			&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.BigEndian.PutUint16(port)})
	}
	return match
}

func toAddr(addr netip.Addr, port uint16) []expr.Any {
	nat := &expr.NAT{Type: expr.NATTypeDestNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: 1}
	if addr.Is6() {
		nat.Family = unix.NFPROTO_IPV6
	}
	exprs := []expr.Any{&expr.Immediate{Register: 1, Data: addr.AsSlice()}}
	if port != 0 {
		nat.RegProtoMin = 2
		exprs = append(exprs, &expr.Immediate{Register: 2, Data: binaryutil.BigEndian.PutUint16(port)})
	}
	return append(exprs, nat)
}
