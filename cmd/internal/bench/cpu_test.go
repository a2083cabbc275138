package bench

import (
	"bytes"
	"compress/gzip"
	"io"
	"os"
	"testing"
)

// TestInterruptsApart compares what was found out by trying with what the kernel was
// built with, where it says so.
func TestInterruptsApart(t *testing.T) {
	apart, err := interruptsApart()
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Open("/proc/config.gz")
	if err != nil {
		t.Skip("the kernel does not show its configuration (CONFIG_IKCONFIG_PROC)")
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	config, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	if want := bytes.Contains(config, []byte("\nCONFIG_IRQ_TIME_ACCOUNTING=y\n")); apart != want {
		t.Errorf("apart %v, though the kernel's configuration says %v", apart, want)
	}
}

func TestInterruptTime(t *testing.T) {
	cpus, err := allowedCPUs()
	if err != nil {
		t.Fatal(err)
	}
	if first := interruptTime(cpus[0]); first < 0 || interruptTime(cpus[0]) < first {
		t.Errorf("%d ns of interrupts, then less", first)
	}
	if got := interruptTime(1 << 20); got != 0 {
		t.Errorf("a CPU that does not exist had %d ns of interrupts", got)
	}
}

func TestCPUIsCountedOnce(t *testing.T) {
	m := measured{client: tally{CPU: cpuTime{10, 5}}, server: tally{CPU: cpuTime{20, 7}}}
	if got := m.cpu(SameCPU); got != 35 {
		t.Errorf("on one CPU %d, want 35: both see the same interrupts", got)
	}
	if got := m.cpu(CrossCPU); got != 42 {
		t.Errorf("on two CPUs %d, want 42", got)
	}
}
