package datapath

import (
	"fmt"
	"io"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// RunTime is how often a BPF program ran, and how long that took.
type RunTime struct {
	Runs uint64
	Time time.Duration
}

// MeasureRunTimes makes the kernel measure every run of every BPF program until the
// returned closer is closed or the process ends (BPF_ENABLE_STATS, Linux 5.8). It
// costs some tens of nanoseconds for each run and needs CAP_SYS_ADMIN.
func MeasureRunTimes() (io.Closer, error) {
	c, err := ebpf.EnableStats(unix.BPF_STATS_RUN_TIME)
	if err != nil {
		return nil, fmt.Errorf("measure the run times of BPF programs: %w", err)
	}
	return c, nil
}

// RunTimes returns what was measured since the programs were loaded, while anybody
// measured, by the names of the programs.
func (s *Set) RunTimes() (map[string]RunTime, error) {
	times := map[string]RunTime{}
	for name, p := range s.progs {
		stats, err := p.Stats()
		if err != nil {
			return nil, fmt.Errorf("read the run time of program %s: %w", name, err)
		}
		times[name] = RunTime{stats.RunCount, stats.Runtime}
	}
	return times, nil
}
