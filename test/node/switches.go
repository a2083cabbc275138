package node

import (
	"errors"
	"math/rand/v2"

	"github.com/cilium/ebpf"

	"github.com/skipstack/skipstack/bpf"
)

// OtherSwitches returns what brings the switches of all datapaths in the kernel,
// but for the one whose map is own (0 for none), back to where they are now:
// switching off reaches the machine's own datapath, and those of other tests.
//
// restore is called once, soon. It closes the maps.
func OtherSwitches(own ebpf.MapID) (restore func() error) {
	name := bpf.DatapathMapSkipstackSwitch[:15] // what the kernel keeps of it
	type kept struct {
		m   *ebpf.Map
		off uint32
	}
	var all []kept
	for id, err := ebpf.MapGetNextID(0); err == nil; id, err = ebpf.MapGetNextID(id) {
		m, err := ebpf.NewMapFromID(id)
		if err != nil {
			continue // it has just gone
		}
		k := kept{m: m}
		info, err := m.Info()
		if err == nil && info.Name == name && id != own && m.Lookup(bpf.DatapathSwitchSlotSWITCH_OFF, &k.off) == nil {
			all = append(all, k)
		} else {
			m.Close()
		}
	}
	return func() error {
		var errs []error
		for _, k := range all {
			errs = append(errs,
				k.m.Put(bpf.DatapathSwitchSlotSWITCH_OFF, k.off),
				k.m.Put(bpf.DatapathSwitchSlotSWITCH_GENERATION, rand.Uint32()),
				k.m.Close())
		}
		return errors.Join(errs...)
	}
}
