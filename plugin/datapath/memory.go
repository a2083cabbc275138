package datapath

import (
	"fmt"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"

	"github.com/skipstack/skipstack/bpf"
)

// mostMade bounds the maps that MapMemory makes; what is larger is in proportion.
const mostMade = DefaultMaxConnections

// MapMemory returns how many bytes of kernel memory the maps of a datapath for
// that many connections take while there are none, by the kernel's own account. It
// makes such maps and throws them away. Linux 6.4 is the first to tell what maps
// take; older kernels give an estimate.
func MapMemory(maxConnections uint32) (uint64, error) {
	made := min(maxConnections, mostMade)
	spec, err := bpf.LoadDatapath()
	if err != nil {
		return 0, fmt.Errorf("read the embedded programs: %w", err)
	}
	resize(spec, made)
	var sum uint64
	for _, name := range mapNames {
		m, err := ebpf.NewMap(spec.Maps[name])
		if err != nil {
			return 0, fmt.Errorf("make map %s: %w", name, err)
		}
		n, err := memoryOf(m)
		m.Close()
		if err != nil {
			return 0, err
		}
		if slices.Contains(sizedMaps, name) {
			n = n * uint64(maxConnections) / uint64(made)
		}
		sum += n
	}
	return sum, nil
}

// Memory returns how many bytes of kernel memory the maps, with what is in them
// now, and the programs of the set take; see [MapMemory].
func (s *Set) Memory() (maps, programs uint64, err error) {
	for _, m := range s.maps {
		n, err := memoryOf(m)
		if err != nil {
			return 0, 0, err
		}
		maps += n
	}
	for name, p := range s.progs {
		info, err := p.Info()
		if err != nil {
			return 0, 0, fmt.Errorf("look at program %s: %w", name, err)
		}
		n, _ := info.Memlock()
		programs += n
	}
	return maps, programs, nil
}

func memoryOf(m *ebpf.Map) (uint64, error) {
	info, err := m.Info()
	if err != nil {
		return 0, fmt.Errorf("look at a map: %w", err)
	}
	n, _ := info.Memlock()
	return n, nil
}

// SocketMemory returns how many bytes of kernel memory an enrolled socket takes
// beyond what TCP does. storage is what the socket is charged for storage
// (SK_MEMINFO_OPTMEM of SO_MEMINFO), which holds what the datapath knows of it. The
// rest is charged to nobody: its size is taken from the kernel's type information.
func SocketMemory(storage uint64, funnel bool) (uint64, error) {
	kernel, err := btf.LoadKernelSpec()
	if err != nil {
		return 0, fmt.Errorf("read the kernel's type information: %w", err)
	}
	size := func(name string) uint64 {
		var t *btf.Struct
		if e := kernel.TypeByName(name, &t); e != nil {
			err = fmt.Errorf("read the kernel's type information: %w", e)
			return 0
		}
		return uint64(t.Size)
	}
	spec, e := bpf.LoadDatapath()
	if e != nil {
		return 0, fmt.Errorf("read the embedded programs: %w", e)
	}
	round := func(n uint64) uint64 { return (n + 7) &^ 7 }
	// sk_psock_init(), sk_psock_init_link(), net/core/skmsg.c; sock_hash_alloc_elem(),
	// net/core/sock_map.c; bpf_local_storage_alloc(), kernel/bpf/bpf_local_storage.c.
	list := size("bpf_local_storage")
	sum := slab(size("sk_psock")) + slab(size("sk_psock_link")) +
		slab(round(size("bpf_shtab_elem")+uint64(spec.Maps[bpf.DatapathMapSocks].KeySize))) +
		slab(list) + slab(storage-min(list, storage))
	if funnel { // alloc_htab_elem(), kernel/bpf/hashtab.c
		m := spec.Maps[bpf.DatapathMapFunnelNext]
		sum += slab(size("htab_elem") + round(uint64(m.KeySize)) + round(uint64(m.ValueSize)))
	}
	return sum, err
}

// slab is the size of the kmalloc cache that serves n bytes: powers of two from 8
// on, 96 and 192, include/linux/slab.h.
func slab(n uint64) uint64 {
	switch {
	case n == 0:
		return 0
	case n > 64 && n <= 96:
		return 96
	case n > 128 && n <= 192:
		return 192
	}
	size := uint64(8)
	for size < n {
		size *= 2
	}
	return size
}
