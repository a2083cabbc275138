package bench

import (
	"bufio"
	"cmp"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

func newReport(p Parameters, f Facts) *Report {
	return &Report{Header: Header{
		Kernel: kernelRelease(), CPU: cpuModel(), CPUs: runtime.NumCPU(), Congestion: cmp.Or(p.Congestion, congestionControl()),
		Versions: Versions{Skipstack: version(), Go: runtime.Version()},
		Started:  time.Now().UTC().Truncate(time.Second), Parameters: p, Facts: f,
	}}
}

// version is what the go command recorded: a tag, or the commit.
func version() string {
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "unknown"
}

func kernelRelease() string {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return "unknown"
	}
	return unix.ByteSliceToString(u.Release[:])
}

// congestionControl is the default of this network namespace, which new ones take over.
func congestionControl() string {
	name, err := os.ReadFile("/proc/sys/net/ipv4/tcp_congestion_control")
	if err != nil {
		return "unknown"
	}
	return strings.TrimSpace(string(name))
}

// checkCongestionControl finds out if the kernel has that congestion control.
func checkCongestionControl(name string) error {
	text, err := os.ReadFile("/proc/sys/net/ipv4/tcp_available_congestion_control")
	if err != nil {
		return fmt.Errorf("--congestion-control: %w", err)
	}
	if available := strings.Fields(string(text)); !slices.Contains(available, name) {
		return fmt.Errorf("--congestion-control %q: this kernel has %s", name, strings.Join(available, ", "))
	}
	return nil
}

// cpuModel is the name that /proc/cpuinfo gives; architectures differ in its key.
func cpuModel() string {
	f, err := os.Open("/proc/cpuinfo")
	if err != nil {
		return runtime.GOARCH
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		key, value, _ := strings.Cut(lines.Text(), ":")
		switch strings.TrimSpace(key) {
		case "model name", "Model", "cpu model":
			return strings.TrimSpace(value)
		}
	}
	return runtime.GOARCH
}
