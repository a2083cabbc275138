package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/bpf"
	"github.com/skipstack/skipstack/plugin/datapath"
)

// lastCPU is the last one that this process may use; the first ones serve most
// interrupts.
func lastCPU() (int, error) {
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &set); err != nil {
		return 0, fmt.Errorf("find the CPUs: %w", err)
	}
	last := 0
	for cpu, left := 0, set.Count(); left > 0; cpu++ {
		if set.IsSet(cpu) {
			last, left = cpu, left-1
		}
	}
	return last, nil
}

// waitForGate waits until the kernel's verdict is in and connections are accelerated.
func (p *pair) waitForGate(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	for {
		set, err := datapath.Open(p.node.BPFFS)
		var settings datapath.NodeSettings
		if err == nil {
			settings, err = set.Node()
			set.Close()
		}
		if err == nil && settings.Open {
			return nil
		}
		select {
		case <-ctx.Done():
			return errors.Join(errors.New("pods are not accelerated"), err)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// redirected is how many bytes the datapath has redirected.
func (p *pair) redirected() (uint64, error) {
	set, err := datapath.Open(p.node.BPFFS)
	if err != nil {
		return 0, err
	}
	defer set.Close()
	c, err := set.Counters()
	return c.Messages[bpf.MessageLabels[bpf.DatapathMessageOutcomeMESSAGE_REDIRECTED]].Bytes, err
}
