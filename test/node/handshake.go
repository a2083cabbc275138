package node

import (
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// SlowHandshakes lets TCP in the node's pods wait 15 seconds or longer before it sends a
// SYN or a SYN-ACK again, until stop is called. A SYN-ACK has another number then
// (tcp_rtx_synack() in net/ipv4/tcp_output.c), so that on a machine that stands still for
// a second, amid a handshake, skipstack would rightly take the client for somebody else.
func (n *Node) SlowHandshakes() (stop func() error, err error) {
	const (
		op, reply = 0, 4  // struct bpf_sock_ops
		jiffies   = 15000 // up to 2 minutes, which is the most
	)
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.SockOps, AttachType: ebpf.AttachCGroupSockOps,
		Instructions: asm.Instructions{
			asm.LoadMem(asm.R2, asm.R1, op, asm.Word),
			asm.JNE.Imm(asm.R2, unix.BPF_SOCK_OPS_TIMEOUT_INIT, "end"),
			asm.Mov.Imm(asm.R3, jiffies),
			asm.StoreMem(asm.R1, reply, asm.R3, asm.Word),
			asm.Mov.Imm(asm.R0, 1).WithSymbol("end"),
			asm.Return(),
		},
	})
	if err != nil {
		return nil, fmt.Errorf("slow handshakes down: %w", err)
	}
	defer prog.Close() // the link holds it
	l, err := link.AttachCgroup(link.CgroupOptions{Path: n.CgroupRoot, Attach: ebpf.AttachCGroupSockOps, Program: prog})
	if err != nil {
		return nil, fmt.Errorf("slow handshakes down: %w", err)
	}
	return l.Close, nil
}
