package bench

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A cpuTime is what one side of a run used in its window, in nanoseconds.
type cpuTime struct {
	Thread     int64 `json:"thread_ns"`     // user and system, of the generator's thread
	Interrupts int64 `json:"interrupts_ns"` // of its CPU, if the order asks for it
}

// sampleCPU sends the CPU time that was used in a generator's window, or until it is
// done. It is another goroutine's work so that the generator pays nothing for it.
func sampleCPU(tid int, o order, base time.Time, opened <-chan window, done <-chan struct{}, result chan<- cpuTime) {
	var used cpuTime
	defer func() { result <- used }()
	var w window
	select {
	case w = <-opened:
	case <-done:
		return
	}
	for _, at := range []time.Duration{w.from, w.until} {
		select {
		case <-time.After(at - time.Since(base)):
		case <-done:
		}
		used.Thread = threadCPU(tid) - used.Thread
		if o.Interrupts {
			used.Interrupts = interruptTime(o.CPU) - used.Interrupts
		}
	}
}

// threadCPU returns the CPU time of a thread of this process in nanoseconds, by the
// clock that pthread_getcpuclockid(3) names; 0 if the thread is gone. It is what
// getrusage(2) says of a thread, in nanoseconds.
func threadCPU(tid int) int64 {
	const perThreadSched = 4 | 2
	var ts unix.Timespec
	if err := unix.ClockGettime(int32(^tid<<3|perThreadSched), &ts); err != nil {
		return 0
	}
	return ts.Nano()
}

// userHZ is the unit of /proc/stat, the same on all architectures that Go runs on.
const userHZ = 100

// interruptTime returns the time in nanoseconds that a CPU has spent on hard and soft
// interrupts, ksoftirqd included, by /proc/stat in steps of 10 ms.
func interruptTime(cpu int) int64 {
	stat, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0
	}
	name := fmt.Sprintf("cpu%d", cpu)
	for line := range bytes.Lines(stat) {
		// name, user, nice, system, idle, iowait, irq, softirq, ...
		f := strings.Fields(string(line))
		if len(f) < 8 || f[0] != name {
			continue
		}
		irq, _ := strconv.ParseInt(f[6], 10, 64)
		softirq, _ := strconv.ParseInt(f[7], 10, 64)
		return (irq + softirq) * int64(time.Second/userHZ)
	}
	return 0
}

// interruptsApart tells if the kernel keeps the time of interrupts apart from that of
// the thread they interrupt (CONFIG_IRQ_TIME_ACCOUNTING): then much of what TCP does
// is charged to no thread. It is tried: a thread that sends datagrams to itself spends
// a good part of its time in softirqs.
func interruptsApart() (bool, error) {
	conn, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		return false, fmt.Errorf("find out what CPU time covers: %w", err)
	}
	defer conn.Close()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	// The best of many short windows is one that nothing else had a part in.
	var best float64
	for range 50 {
		start, used := time.Now(), threadCPU(unix.Gettid())
		for time.Since(start) < time.Millisecond {
			if _, err := conn.WriteTo([]byte("x"), conn.LocalAddr()); err != nil {
				return false, fmt.Errorf("find out what CPU time covers: %w", err)
			}
		}
		used = threadCPU(unix.Gettid()) - used
		best = max(best, float64(used)/float64(time.Since(start)))
	}
	return best < 0.95, nil
}
