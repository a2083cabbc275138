package verdict

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The test binary starts itself again in one of these parts.
const (
	fakeWorkerArg = "fake-worker" // a worker with other experiments, see fakes
	runArg        = "run"         // Run with the rest of the arguments as its worker's
	unfilteredArg = "unfiltered"  // as runArg, but prints the verdict
	filteredArg   = "filtered"    // the same where seccomp refuses io_uring
	buildArg      = "build"       // prints what identifies the binary
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch args := os.Args[2:]; os.Args[1] {
		case WorkerArg:
			os.Exit(Worker(args, os.Stdin, os.Stdout))
		case fakeWorkerArg:
			table := maps.Clone(experiments)
			fakes[args[0]](table)
			os.Exit(serve(os.Stdin, os.Stdout, table))
		case buildArg:
			fmt.Printf("%x", build())
			os.Exit(0)
		case filteredArg, unfilteredArg:
			if err := printVerdict(os.Args[1] == filteredArg, args); err != nil {
				fmt.Println(err)
				os.Exit(1)
			}
			os.Exit(0)
		case runArg:
			_, err := Run(context.Background(), Env{CgroupRoot: args[0], workerArgs: args[1:]})
			if errors.Is(err, ErrPrivilege) {
				fmt.Println("privilege")
			}
			fmt.Println(err)
			os.Exit(0)
		}
	}
	os.Exit(m.Run())
}

func printVerdict(filter bool, args []string) error {
	if filter {
		if err := filterRing(); err != nil {
			return err
		}
	}
	v, err := Run(context.Background(), Env{CgroupRoot: args[0], workerArgs: args[1:]})
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(v)
}

// filterRing has seccomp refuse io_uring to this process, as container runtimes do.
func filterRing() error {
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS}, // the number of the call
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.SYS_IO_URING_SETUP, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
	}
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	_, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&program)))
	runtime.KeepAlive(filter)
	if errno != 0 {
		return fmt.Errorf("seccomp: %w", errno)
	}
	return nil
}

// fakes are kernels and workers that behave in ways that this kernel does not.
var fakes = map[string]func(map[string]experiment){
	"hang": func(table map[string]experiment) {
		for name := range table {
			table[name] = hang
		}
	},
	"crash": func(table map[string]experiment) {
		table[expWake] = func(lab) (finding, error) {
			fmt.Fprintln(os.Stderr, "out of luck\nand more")
			os.Exit(3)
			return finding{}, nil
		}
	},
	"fails": func(table map[string]experiment) {
		table[expWake] = func(lab) (finding, error) { return finding{}, errors.New("no sockets left") }
	},
	"not enrolled": func(table map[string]experiment) {
		table[expExchange] = func(lab) (finding, error) { return finding{Connections: 1}, nil }
	},
	"not redirected": func(table map[string]experiment) {
		table[expExchange] = after(exchange, func(f *finding) { f.Sent++ })
	},
	"by TCP": func(table map[string]experiment) {
		table[expExchange] = after(exchange, func(f *finding) { f.ByTCP++ })
	},
	"loses": func(table map[string]experiment) {
		table[expExchange] = after(exchange, func(f *finding) { f.Fault = "bytes arrived wrong" })
	},
	"disorders": func(table map[string]experiment) {
		table[expShuffle] = after(shuffle, func(f *finding) { f.Fault = "bytes arrived wrong" })
	},
	"one mode": func(table map[string]experiment) {
		table[expShuffle] = oneMode
	},
	"one mode at first": func(table map[string]experiment) {
		rounds := 0
		table[expShuffle] = func(l lab) (finding, error) {
			if rounds++; rounds <= 5 {
				return oneMode(l)
			}
			return shuffle(l)
		}
	},
	"uncharged": func(table map[string]experiment) {
		table[expFlood] = after(flood, func(f *finding) { f.Charged = 0 })
	},
	"not stopped": func(table map[string]experiment) {
		table[expFlood] = after(flood, func(f *finding) { f.Stopped = false })
	},
	"not released": func(table map[string]experiment) {
		table[expFlood] = after(flood, func(f *finding) { f.Released = false })
	},
	"counts nothing": func(table map[string]experiment) {
		table[expWaiting] = after(countWaiting, func(f *finding) { f.Counted = 0 })
	},
	"counts redirected": func(table map[string]experiment) {
		table[expWaiting] = after(countWaiting, func(f *finding) { f.Counted = f.Waiting - int(f.ByTCP) })
	},
	"counts all": func(table map[string]experiment) {
		table[expWaiting] = after(countWaiting, func(f *finding) { f.Counted = f.Waiting })
	},
	"io_uring is missed": func(table map[string]experiment) {
		table[expSplice] = func(l lab) (finding, error) {
			ring := blind(splicer{"io_uring's splice", splicers[0].move})
			return l.spliceBy(append(slices.Clip(splicers), ring))
		}
	},
	"no io_uring": func(table map[string]experiment) {
		table[expSplice] = after(exchange, func(f *finding) { f.Spliced, f.NoRing = spliceWorks, "io_uring is refused" })
		table[expProxy] = exchange
	},
	"sleeps on": func(table map[string]experiment) {
		table[expWake] = after(wake, func(f *finding) { f.Fault = "edge-triggered epoll does not report the first bytes" })
	},
}

func init() {
	for _, name := range []string{expExchange, expShuffle, expWaiting, expFlood, expWake, expSplice, expProxy} {
		fakes["hang "+name] = func(table map[string]experiment) { table[name] = hang }
	}
	for _, sizes := range bufferSizes {
		fakes["tcp_rmem "+sizes] = func(map[string]experiment) { tune(sizes) }
	}
}

// bufferSizes are what net.ipv4.tcp_rmem may be on a node: least, default and most.
var bufferSizes = []string{
	"4096 131072 6291456", // the kernel's default
	"4096 16384 65536",
	"4096 87380 174760",
	"4096 262144 6291456",
	"4096 1048576 33554432",
	"4096 6291456 6291456",
	"4096 16777216 16777216",
	"4096 67108864 134217728",
}

// tune does to the worker's network namespace what the kernel does when the node's is
// tuned (tcp_sk_init(), net/ipv4/tcp_ipv4.c): it hands both on to new namespaces.
func tune(sizes string) {
	for _, name := range []string{"tcp_rmem", "tcp_wmem"} {
		if err := os.WriteFile("/proc/sys/net/ipv4/"+name, []byte(sizes), 0); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(3)
		}
	}
}

// oneMode sends less than the limit, so nothing goes by TCP.
func oneMode(l lab) (finding, error) {
	var f finding
	client, server, err := l.connect(overIPv4())
	if err != nil {
		return f, err
	}
	defer client.close()
	defer server.close()
	f.Connections, f.Sent = 1, 1
	return f, l.send(client, []byte{1})
}

func hang(lab) (finding, error) {
	for {
		_ = unix.Pause()
	}
}

func after(e experiment, change func(*finding)) experiment {
	return func(l lab) (finding, error) {
		f, err := e(l)
		change(&f)
		return f, err
	}
}

// cgroupRoot makes a cgroup that stands for the cgroup2 mount; nothing may be
// left in it.
func cgroupRoot(t *testing.T) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: probing loads BPF programs and makes cgroups")
	}
	for _, mount := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
		var st unix.Statfs_t
		if unix.Statfs(mount, &st) != nil || int64(st.Type) != unix.CGROUP2_SUPER_MAGIC {
			continue
		}
		name := strings.NewReplacer("/", "-", " ", "-").Replace(t.Name())
		root := filepath.Join(mount, fmt.Sprintf("skipstack-verdict-test-%d-%s", os.Getpid(), name))
		if err := os.Mkdir(root, 0o755); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if left := children(t, root); len(left) > 0 {
				t.Errorf("left behind: %q", left)
				for _, dir := range left {
					_ = os.Remove(dir)
				}
			}
			if err := os.Remove(root); err != nil {
				t.Error(err)
			}
		})
		return root
	}
	t.Skip("needs a cgroup2 mount at /sys/fs/cgroup or /sys/fs/cgroup/unified")
	return ""
}

func children(t *testing.T, root string) []string {
	t.Helper()
	entries, err := os.ReadDir(root)
	if err != nil {
		t.Fatal(err)
	}
	var dirs []string
	for _, e := range entries {
		if e.IsDir() {
			dirs = append(dirs, filepath.Join(root, e.Name()))
		}
	}
	return dirs
}

// gone tells if the process has ended, whether or not its parent knows.
func gone(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	_, rest, _ := strings.Cut(string(stat), ") ")
	return err != nil || strings.HasPrefix(rest, "Z")
}
