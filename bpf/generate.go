// Package bpf holds the datapath's C source, the object that was built from it,
// and the Go types generated from that object. It has no policy: see package
// datapath for loading and control.
package bpf

//go:generate go tool bpf2go -cc ${CLANG} -strip ${LLVM_STRIP} -cflags "-O2 -g -mcpu=v3 -Wall -Werror ${BPF_CFLAGS}" -target bpfel -go-package bpf -type counters -type control -type pod -type pod_counters -type endpoint -type connection -type funnel_position -type end_key -type secret -type sock_key -type port_range -type message_outcome -type connection_outcome -type event -type risk -type switch_slot -type connection_state -type endpoint_mode Datapath datapath.bpf.c
//go:generate go tool bpf2go -cc ${CLANG} -strip ${LLVM_STRIP} -cflags "-O2 -g -mcpu=v3 -Wall -Werror ${BPF_CFLAGS}" -target bpfel -no-global-types -go-package bpf -type refusal Guard guard.bpf.c
//go:generate go tool bpf2go -cc ${CLANG} -strip ${LLVM_STRIP} -cflags "-O2 -g -mcpu=v3 -Wall -Werror ${BPF_CFLAGS}" -target bpfel -go-package bpf -type socket_record Sockets sockets.bpf.c
