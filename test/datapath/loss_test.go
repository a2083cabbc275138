package datapath_test

import (
	"testing"
	"time"

	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/test/must"
)

// drop makes the pod lose the given share of the TCP segments that arrive at it,
// in percent, until the returned function is called or the test ends. Only
// segments longer than atLeast bytes, headers included, are lost.
func (p *pod) drop(t *testing.T, percent uint32, atLeast uint16) (stop func()) {
	t.Helper()
	return p.filter(t,
		// Length of the packet.
		&expr.Meta{Key: expr.MetaKeyLEN, Register: 1},
		&expr.Byteorder{SourceRegister: 1, DestRegister: 1, Op: expr.ByteorderHton, Len: 4, Size: 4},
		&expr.Cmp{Op: expr.CmpOpGte, Register: 1, Data: binaryutil.BigEndian.PutUint32(uint32(atLeast))},
		&expr.Numgen{Register: 1, Modulus: 100, Type: unix.NFT_NG_RANDOM},
		&expr.Byteorder{SourceRegister: 1, DestRegister: 1, Op: expr.ByteorderHton, Len: 4, Size: 4},
		&expr.Cmp{Op: expr.CmpOpLt, Register: 1, Data: binaryutil.BigEndian.PutUint32(percent)},
	)
}

// dropFlags makes the pod lose TCP segments that arrive with exactly these of
// the flags SYN, ACK, FIN and RST.
func (p *pod) dropFlags(t *testing.T, flags byte) (stop func()) {
	t.Helper()
	const syn, ack, fin, rst = 2, 16, 1, 4
	return p.filter(t,
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 13, Len: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 1, Mask: []byte{syn | ack | fin | rst}, Xor: []byte{0}},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{flags}},
	)
}

// filter drops TCP segments that arrive at the pod, over any interface, and match.
func (p *pod) filter(t *testing.T, match ...expr.Any) (stop func()) {
	t.Helper()
	rules := must.Get(p.DropTCP(match...))(t)
	stop = func() {
		t.Helper()
		must.Do(t, rules.Close())
	}
	t.Cleanup(stop)
	return stop
}

// fastRecovery lets connections that are made in the pod from now on retransmit after
// milliseconds, so that tests with loss do not take minutes.
func (p *pod) fastRecovery(t *testing.T) {
	t.Helper()
	must.Do(t, p.SetMinRTO(5*time.Millisecond))
}
