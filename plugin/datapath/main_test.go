package datapath

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/test/must"
)

// scenarios run in a process of their own, which is born in a cgroup and a
// network namespace of its own.
var scenarios = map[string]func() error{}

const scenarioEnv = "SKIPSTACK_TEST_SCENARIO"

func TestMain(m *testing.M) {
	if name := os.Getenv(scenarioEnv); name != "" {
		if err := runScenario(name); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

func runScenario(name string) error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return err
	}
	f, ok := scenarios[name]
	if !ok {
		return fmt.Errorf("no scenario %q", name)
	}
	return f()
}

// cgroupRoot is where cgroup v2 is mounted.
func cgroupRoot(t *testing.T) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	for _, dir := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
		var st unix.Statfs_t
		if unix.Statfs(dir, &st) == nil && st.Type == unix.CGROUP2_SUPER_MAGIC {
			return dir
		}
	}
	t.Skip("needs cgroup2")
	return ""
}

// newCgroup makes a cgroup that is removed with the test.
func newCgroup(t *testing.T, name string) (*os.File, uint64) {
	t.Helper()
	path := filepath.Join(cgroupRoot(t), fmt.Sprintf("skipstack-test-%d-%s", os.Getpid(), name))
	if err := os.Mkdir(path, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		// The kernel may need a moment until it counts a reaped process as gone.
		must.Wait(t, time.Minute, time.Millisecond, func() error {
			err := os.Remove(path)
			if !errors.Is(err, unix.EBUSY) {
				must.Do(t, err)
			}
			return err
		})
	})
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	return f, st.Ino
}

// start runs a scenario in the cgroup.
func start(t *testing.T, scenario string, cgroup *os.File) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), scenarioEnv+"="+scenario)
	cmd.SysProcAttr = &syscall.SysProcAttr{
		UseCgroupFD: true,
		CgroupFD:    int(cgroup.Fd()),
		Cloneflags:  syscall.CLONE_NEWNET,
		Pdeathsig:   syscall.SIGKILL,
	}
	return cmd
}

func run(t *testing.T, scenario string, cgroup *os.File) {
	t.Helper()
	out, err := start(t, scenario, cgroup).CombinedOutput()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			t.Fatalf("%s: %s", scenario, strings.TrimSpace(string(out)))
		}
		t.Fatal(err)
	}
}

func programID(t *testing.T, p *ebpf.Program) ebpf.ProgramID {
	t.Helper()
	info, err := p.Info()
	if err != nil {
		t.Fatal(err)
	}
	id, _ := info.ID()
	return id
}

func linkedProgram(t *testing.T, path string) ebpf.ProgramID {
	t.Helper()
	l, err := link.LoadPinnedLink(path, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	info, err := l.Info()
	if err != nil {
		t.Fatal(err)
	}
	return info.Program
}
