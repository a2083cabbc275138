package node

import (
	"fmt"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
)

// LoseTCP makes the pod lose that share of the TCP segments that arrive at it, over
// any interface, in percent. Close what is returned to end that; the pod's end
// does, too.
func (p *Pod) LoseTCP(percent uint32) (*Service, error) {
	return p.DropTCP(
		&expr.Numgen{Register: 1, Modulus: 100, Type: 1 /* NFT_NG_RANDOM */},
		&expr.Byteorder{SourceRegister: 1, DestRegister: 1, Op: expr.ByteorderHton, Len: 4, Size: 4},
		&expr.Cmp{Op: expr.CmpOpLt, Register: 1, Data: binaryutil.BigEndian.PutUint32(percent)},
	)
}

// DropTCP drops the TCP segments that arrive at the pod, over any interface, and match.
func (p *Pod) DropTCP(match ...expr.Any) (*Service, error) {
	s, err := addRules(p.thread, nftables.TableFamilyINet, func(c *nftables.Conn, t *nftables.Table) {
		chain := c.AddChain(&nftables.Chain{
			Name: "input", Table: t, Type: nftables.ChainTypeFilter,
			Hooknum: nftables.ChainHookInput, Priority: nftables.ChainPriorityFilter,
		})
		exprs := append(matchTCPPort(0), match...)
		c.AddRule(&nftables.Rule{Table: t, Chain: chain, Exprs: append(exprs, &expr.Verdict{Kind: expr.VerdictDrop})})
	})
	if err != nil {
		return nil, fmt.Errorf("drop segments that arrive at pod %s: %w", p.Name, err)
	}
	p.mu.Lock()
	p.services = append(p.services, s)
	p.mu.Unlock()
	return s, nil
}
