package datapath

import (
	"errors"
	"math"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// BenchmarkGuard measures system calls without a splice guard and with each form of
// it: the guard runs for each read(2), write(2) and setsockopt(2) of the node. The metric ns/call
// is the fastest of many batches, which other load on the machine disturbs least.
func BenchmarkGuard(b *testing.B) {
	for _, form := range append([]Guard{NoGuard}, Guards()...) {
		name := string(form)
		if form == NoGuard {
			name = "no guard"
		}
		b.Run(name, func(b *testing.B) {
			if form != NoGuard {
				s, err := LoadPrivate(LoadOptions{MaxConnections: 500})
				if err != nil {
					b.Skip(err)
				}
				defer s.Close()
				err = s.SetNode(NodeSettings{Guard: form})
				if errors.Is(err, ErrGuard) {
					b.Skip(err)
				}
				if err != nil {
					b.Fatal(err)
				}
			}
			for _, c := range []struct {
				name string
				open func() (fds []int, err error) // the first is used
				call func(fd int, p []byte) (int, error)
			}{
				{"write null", openFile("/dev/null"), unix.Write},
				{"read zero", openFile("/dev/zero"), unix.Read},
				{"read socket", openSocket, unix.Read}, // empty: EAGAIN
				{"setsockopt", openSocket, func(fd int, _ []byte) (int, error) {
					return 0, unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
				}},
			} {
				b.Run(c.name, func(b *testing.B) {
					fds, err := c.open()
					if err != nil {
						b.Fatal(err)
					}
					for _, fd := range fds {
						defer unix.Close(fd)
					}
					one := make([]byte, 1)
					b.ReportMetric(fastest(b.N, func() { _, _ = c.call(fds[0], one) }), "ns/call")
				})
			}
		})
	}
}

// fastest calls f n times and returns the time of a call, in ns, in the fastest
// batch.
func fastest(n int, f func()) float64 {
	const batch = 500
	best := math.MaxFloat64
	for range max(1, n/batch) {
		start := time.Now()
		for range batch {
			f()
		}
		best = min(best, float64(time.Since(start).Nanoseconds())/batch)
	}
	return best
}

func openFile(path string) func() ([]int, error) {
	return func() ([]int, error) {
		fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
		return []int{fd}, err
	}
}

func openSocket() ([]int, error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	return pair[:], err
}
