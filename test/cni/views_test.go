package cni_test

import (
	"bytes"
	"os"
	"regexp"
	"testing"

	"github.com/skipstack/skipstack/test/must"
	"github.com/skipstack/skipstack/test/node"
)

// inBothViews are the tests in which the cgroup hierarchies matter: how the mount is
// found, how runtimes name a pod's cgroup, attaching, counting, deleting.
const inBothViews = "^(TestConflists|TestChainOfEveryVersion|TestRoutes|TestCRIO|TestPodUID|TestWithoutKubernetes|" +
	"TestTwoNetworks|TestCgroupGone|TestDelUnderTraffic|TestDoctor|TestStatusAndConnections)$"

// The tests of this package run with the cgroup hierarchies that the machine has. Where
// those are hybrid, some run once more in a machine that has cgroup v2 only.
func TestCgroupViews(t *testing.T) {
	s := newSite(t, options{})
	if s.CgroupRoot == "/sys/fs/cgroup/"+s.Name {
		t.Log("this machine has cgroup v2 only: the other tests have run so")
		return
	}
	var out bytes.Buffer
	exit, err := node.Isolate(t.Context(), node.Command{
		Args: []string{"-test.v", "-test.run", inBothViews, "-test.timeout", "0"}, Env: os.Environ(),
		Stdout: &out, Stderr: &out, UnifiedCgroups: true,
	})
	must.Do(t, err)
	results := regexp.MustCompile(`(?m)^--- (PASS|FAIL|SKIP): (\w+) `).FindAllStringSubmatch(out.String(), -1)
	failed := exit != 0 || len(results) < 11
	for _, r := range results {
		failed = failed || r[1] != "PASS"
	}
	if failed {
		t.Errorf("exit %d after %d tests with cgroup v2 only:\n%s", exit, len(results), out.String())
	}
}
