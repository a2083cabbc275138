// Package probe tells tests what skipstack makes of the kernel that they run on.
package probe

import (
	"os"
	"slices"
	"testing"
	"time"

	"github.com/skipstack/skipstack/plugin/verdict"
)

// Main answers for the worker of [Kernel], which is the test program itself, and ends
// it. In any other process it returns at once. TestMain calls it first.
func Main() {
	if len(os.Args) > 1 && os.Args[1] == verdict.WorkerArg {
		os.Exit(verdict.Worker(os.Args[2:], os.Stdin, os.Stdout))
	}
}

// Kernel probes the kernel with a scratch cgroup below the given one: again where the
// machine was too busy, or short of memory for TCP because of somebody else. The test
// fails where there is no verdict, or the kernel is not supported.
func Kernel(t testing.TB, cgroupRoot string) *verdict.Verdict {
	t.Helper()
	for attempts := 10; ; attempts-- {
		v, err := verdict.Run(t.Context(), verdict.Env{CgroupRoot: cgroupRoot})
		told := err == nil && !slices.ContainsFunc(v.Probes, func(p verdict.Probe) bool { return p.Result == verdict.CouldNotTell })
		switch {
		case told || attempts == 1 && err == nil:
			for _, p := range v.Probes {
				t.Logf("%s: %s: %s", p.Name, p.Result, p.Detail)
			}
			if v.Level == verdict.Unsupported {
				t.Fatalf("the kernel is not supported: %s", v)
			}
			return v
		case attempts == 1:
			t.Fatal(err)
		}
		t.Logf("again: %v, %v", v, err)
		time.Sleep(3 * time.Second)
	}
}
