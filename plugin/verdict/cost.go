package verdict

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/bpf"
)

// guardCost says what the guard that is attached costs. before is [readTime] before it
// was, and inUse tells that another was attached even then.
func guardCost(before time.Duration, inUse bool) (string, error) {
	const passes = "every read(2) and write(2) of the node passes the guard: of one byte, "
	if inUse {
		// Now there are two of them.
		return passes + fmt.Sprintf("%d ns with it (without is not measured while a datapath has it attached)", before.Nanoseconds()), nil
	}
	guarded, err := readTime()
	if err != nil {
		return "", err
	}
	return passes + fmt.Sprintf("%d ns with it, %d ns without", guarded.Nanoseconds(), before.Nanoseconds()), nil
}

// guardAttached tells if a splice guard is attached, of whatever datapath.
func guardAttached() (bool, error) {
	var it link.Iterator
	defer it.Close()
	for it.Next() {
		info, err := it.Link.Info()
		if err != nil || info.Type != link.TracingType { // that of BPF LSM programs, too
			continue
		}
		prog, err := ebpf.NewProgramFromID(info.Program)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return false, fmt.Errorf("open BPF program %d: %w", info.Program, err)
		}
		about, err := prog.Info()
		prog.Close()
		if err != nil {
			return false, fmt.Errorf("look at BPF program %d: %w", info.Program, err)
		}
		if about.Name == bpf.GuardProgGuardLsm || about.Name == bpf.GuardProgGuardFmodRet {
			return true, nil
		}
	}
	if err := it.Err(); err != nil {
		return false, fmt.Errorf("list BPF links: %w", err)
	}
	return false, nil
}

// readTime is how long a read(2) of one byte takes that costs the kernel next to
// nothing else: that of the fastest of some batches, which other load on the machine
// disturbs least.
func readTime() (time.Duration, error) {
	const batches, batch = 20, 200
	fd, err := unix.Open("/dev/zero", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("open /dev/zero: %w", err)
	}
	defer unix.Close(fd)
	best := time.Duration(math.MaxInt64)
	var p [1]byte
	for range batches {
		start := time.Now()
		for range batch {
			if _, err := unix.Read(fd, p[:]); err != nil && err != unix.EINTR {
				return 0, fmt.Errorf("read /dev/zero: %w", err)
			}
		}
		best = min(best, time.Since(start)/batch)
	}
	return best, nil
}
