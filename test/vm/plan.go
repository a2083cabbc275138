package main

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"time"

	"github.com/skipstack/skipstack/plugin/datapath"
	"github.com/skipstack/skipstack/plugin/verdict"
	"github.com/skipstack/skipstack/test/node"
	"github.com/skipstack/skipstack/test/report"
	"github.com/skipstack/skipstack/test/vm/job"
	"github.com/skipstack/skipstack/test/vm/machine"
)

// A plan is what to do on one kernel.
type plan struct {
	kernel  string
	params  string // further parameters of the kernel
	modules []string
	suites  []suite
}

// A suite is a test binary, or without a package a program.
type suite struct {
	pkg     string
	only    string   // tests to run, as -test.run has it; all if empty
	skip    string   // tests not to run, as -test.skip has it
	scaled  []string // why not all tests run, or not as much of each
	files   []string // directories of the checkout that tests read, besides their own testdata
	program string
	args    []string
	timeout time.Duration
	exit    int // expected of a program
	// check judges what a program printed, and may note what it says of the kernel.
	check func(output string, r *report.Run) error
	// skips are tests that may be skipped, and why.
	skips map[string]string
}

// Sets of suites.
const (
	setFull = "full"
	setCI   = "ci"
)

// compat are the 32-bit architectures whose programs a kernel runs, too.
var compat = map[string]string{machine.AMD64: "386", machine.ARM64: "arm"}

// programs are what tests run on a node: CNI plugins, and a 32-bit program.
var programs = []struct {
	name, pkg string
	compat    bool
}{
	{name: "skipstack", pkg: "./cmd/skipstack"},
	{name: "bridge", pkg: "github.com/containernetworking/plugins/plugins/main/bridge"},
	{name: "ptp", pkg: "github.com/containernetworking/plugins/plugins/main/ptp"},
	{name: "host-local", pkg: "github.com/containernetworking/plugins/plugins/ipam/host-local"},
	{name: "portmap", pkg: "github.com/containernetworking/plugins/plugins/meta/portmap"},
	{name: "compat", pkg: "./test/vm/compat", compat: true},
}

// programDir is where the virtual machine has them.
const programDir = "/programs"

// network is what every node has loaded.
var network = []string{
	"veth", "tun", "bridge", "br_netfilter", "overlay",
	"nf_tables", "nft_chain_nat", "nft_nat", "nft_masq", "nft_redir", "nft_ct", "nft_reject_inet", "nft_fib_inet", "nft_numgen",
}

// modules are what tests use besides.
var modules = append([]string{"tls", "aesni_intel"}, network...)

const (
	none     = datapath.Risk(0)
	fionread = datapath.RiskFIONREAD
)

// Subtests of test/datapath: how bytes that come by TCP reach the reader.
const (
	queue  = "plain_receive_queue"
	funnel = "funnel"
)

// plans are what to do on all kernels. Linux 5.15 and 6.6 are not among them: no
// suite of Debian serves them. The slowest comes early, so that two runners end together.
func plans(set, arch string) []plan {
	if arch == machine.ARM64 {
		return []plan{{kernel: "6.12", modules: append([]string{"tls"}, network...), suites: on(set, verdict.Safe, none, queue)}}
	}
	return []plan{
		{kernel: "5.10", modules: network, suites: []suite{refused, judged(verdict.Unsupported, 0, datapath.NoGuard), {
			pkg: "test/cni", timeout: 5 * time.Minute, only: "^TestUnsupported$", scaled: []string{"only that the kernel is refused: the other tests need one that is not"},
		}}},
		{kernel: "6.18", modules: modules, suites: on(set, verdict.Safe, none, funnel)},
		{kernel: "6.1", modules: modules, suites: on(set, verdict.Risky, fionread, queue)},
		{kernel: "6.12", modules: modules, suites: on(set, verdict.Safe, none, queue)},
		{kernel: "7", modules: modules, suites: on(set, verdict.Safe, none, queue)},
		// A BPF LSM program attaches here, and the kernel never calls it.
		{kernel: "7", params: "lsm=yama", modules: network, suites: []suite{loads, judged(verdict.Safe, none, datapath.GuardFmodRet)}},
	}
}

// on is what to do on a supported kernel, of which that verdict is expected, and where
// skipstack lets bytes of TCP reach the reader in that way.
func on(set string, level verdict.Level, risks datapath.Risk, way string) []suite {
	suites := []suite{
		loads,
		judged(level, risks, datapath.GuardLSM),
		{pkg: "plugin/datapath", timeout: 20 * time.Minute},
		{pkg: "plugin/verdict", timeout: 10 * time.Minute,
			skip: "^(TestJudge|TestHangingProbe|TestEveryProbeHangs)$", scaled: []string{"without imitated faults of the kernel, which do not depend on it"}},
		{pkg: "test/datapath", timeout: 40 * time.Minute},
		{pkg: "test/conformance", timeout: 30 * time.Minute,
			skip:   "^TestConformance$/^(Streams|Scale)$/^(4_GiB_and_more|10000_connections|connect_and_close,_2000_times)$",
			scaled: []string{"without a stream of 4 GiB, 10,000 connections, and 2,000 that come and go: they take too long where every instruction is emulated"}},
		{pkg: "test/cni", timeout: 20 * time.Minute, files: []string{"conf"}, only: alternatives(
			"TestSpliceGuard",
			"TestConflists", "TestChainOfEveryVersion", "TestRoutes", "TestTwoNetworks", // through libcni, with veth and a bridge
			"TestCRIO", "TestPodUID", // cgroups as systemd and kubelets call them
			"TestFirstPods", "TestDoctor", "TestReboot", "TestLateDel", "TestCgroupGone", "TestDelUnderTraffic", "TestUnreadLimit",
		), scaled: []string{"only what depends on the kernel: the rest is about files, processes and time limits"}},
	}
	if set != setCI {
		return suites
	}
	const slow = ": CPUs are emulated and slow, and `-set full` has the rest"
	for i := range suites {
		s := &suites[i]
		switch s.pkg {
		case "plugin/datapath":
			s.only = alternatives("TestEchoIsRedirected", "TestGuardComesAndGoes", "TestGuardIsRepaired", "TestGuardOutlivesItsSet",
				"TestConcurrentLoadsPublishOne", "TestAttachIsIdempotentAndSweptWithItsCgroup", "TestUpgradeReplacesProgramsOfAnotherBuild", "TestSwitchNodeReachesSetsWithoutPins")
			s.scaled = []string{"only loading, attaching, upgrading and the guard" + slow}
		case "plugin/verdict":
			s.only, s.skip = alternatives("TestRun", "TestGuard", "TestMeasureMemory", "TestSweep"), ""
			s.scaled = []string{"only the probes as they are" + slow}
		case "test/datapath":
			s.only = alternatives("TestGoProxies", "TestSpliceIsRefused", "TestFIONREAD", "TestReset", "TestCloseDelivers", "TestMPTCP",
				"TestLostSegmentIsNotOvertaken", "TestPartlyOldSegment", "TestSameTupleInTwoPods", "TestClientSendsFirst", "TestSYNCookies") +
				"|^TestMemoryLimit$/^" + way + "$|^TestRandomWrites$/^" + way + "$/^(IPv4|loss)$"
			s.scaled = []string{"random writes only from pod to pod, with and without loss, and memory limits, the way this kernel has them read; of the rest what kernels do differently" + slow}
		case "test/conformance":
			s.only = "^TestConformance$/^(Streams|Ends_of_connections|Readiness|Flags_of_recv_and_send|Counts_and_state|Zero-copy)$"
			s.scaled = append(s.scaled, "only 6 of 14 groups of behaviours"+slow)
		case "test/cni":
			s.only = alternatives("TestSpliceGuard", "TestRoutes", "TestCRIO", "TestPodUID", "TestReboot") +
				"|^TestChainOfEveryVersion$/^1.1.0$|^TestConflists$/^10-(bridge|ptp)[.]conflist$"
			s.scaled = []string{"only the plugin through libcni with a bridge, a veth pair and a Service; cgroups as systemd and kubelets call them; the guard" + slow}
		}
	}
	return suites
}

func alternatives(names ...string) string { return "^(" + strings.Join(names, "|") + ")$" }

// refused expects that the datapath does not load and one line says why.
var refused = suite{args: []string{"load"}, timeout: time.Minute, check: func(output string, _ *report.Run) error {
	a, err := loaded(output)
	if err != nil {
		return err
	}
	if !a.Unsupported || !strings.Contains(a.Error, "compare-and-swap") || strings.Contains(a.Error, "\n") {
		return fmt.Errorf("want one clear line that the kernel is not supported, got %+v", a)
	}
	return nil
}}

// loads expects that the datapath loads.
var loads = suite{args: []string{"load"}, timeout: time.Minute, check: func(output string, _ *report.Run) error {
	a, err := loaded(output)
	if err == nil && a.Error != "" {
		err = fmt.Errorf("the datapath does not load: %s", a.Error)
	}
	return err
}}

func loaded(output string) (a job.Loaded, err error) {
	if err := json.Unmarshal([]byte(output), &a); err != nil {
		return a, fmt.Errorf("it printed %q: %w", output, err)
	}
	return a, nil
}

// judged expects a verdict of `skipstack doctor`, with the exit code that goes with
// it, by that form of the splice guard.
func judged(level verdict.Level, risks datapath.Risk, guard datapath.Guard) suite {
	exit := map[verdict.Level]int{verdict.Safe: 0, verdict.Unsupported: 3, verdict.Risky: 4}
	return suite{program: "skipstack", args: []string{"doctor", "--json"}, timeout: 3 * time.Minute, exit: exit[level],
		check: func(output string, r *report.Run) error {
			var v struct {
				Verdict      verdict.Level
				Risks        []string
				Guard        datapath.Guard
				Inconclusive bool
				Probes       []verdict.Probe
			}
			if err := json.Unmarshal([]byte(output), &v); err != nil {
				return fmt.Errorf("it printed %q: %w", output, err)
			}
			r.Verdict, r.Risks, r.Guard = string(v.Verdict), v.Risks, cmp.Or(string(v.Guard), "none")
			var faults []string
			for _, p := range v.Probes {
				if p.Result != verdict.OK {
					faults = append(faults, fmt.Sprintf("%s: %s: %s", p.Name, p.Result, p.Detail))
				}
			}
			want := v
			want.Verdict, want.Risks, want.Guard, want.Inconclusive = level, risks.Names(), guard, false
			if level == verdict.Unsupported {
				// Nothing can be told of the risks of a kernel that does not load the programs.
				want.Risks, want.Inconclusive = v.Risks, v.Inconclusive
				if len(faults) == 0 || !strings.Contains(faults[0], "compare-and-swap") {
					return fmt.Errorf("the first fault should say what the kernel lacks: %q", faults)
				}
			}
			if !reflect.DeepEqual(v, want) {
				return fmt.Errorf("want %s %v and guard %q, got %s %v and guard %q, inconclusive %v; %s", want.Verdict, want.Risks, guard,
					v.Verdict, v.Risks, v.Guard, v.Inconclusive, strings.Join(faults, "; "))
			}
			return nil
		}}
}

func (s suite) name() string {
	if s.pkg != "" {
		return s.pkg
	}
	return strings.TrimSpace(s.program + " " + strings.Join(s.args, " "))
}

// choose returns the plans for the kernels, and of those the suites whose name
// matches. If tests is not empty, they are the tests to run in each suite.
func choose(set, arch, only string, match *regexp.Regexp, tests string) ([]plan, error) {
	if set != setFull && set != setCI {
		return nil, fmt.Errorf("no set %q", set)
	}
	if compat[arch] == "" {
		return nil, fmt.Errorf("no plan for architecture %q", arch)
	}
	var all []plan
	for _, p := range plans(set, arch) {
		some := p
		some.suites = nil
		for _, s := range p.suites {
			if match.MatchString(s.name()) {
				if tests != "" {
					s.only, s.skip, s.scaled = tests, "", []string{"only " + tests}
				}
				some.suites = append(some.suites, s)
			}
		}
		// The plain plan of a kernel stays, so that asking for nothing is noticed.
		if len(some.suites) > 0 || p.params == "" {
			all = append(all, some)
		}
	}
	if only == "" {
		return all, nil
	}
	var chosen []plan
	for want := range strings.SplitSeq(only, ",") {
		n := len(chosen)
		for _, p := range all {
			if p.kernel == want {
				chosen = append(chosen, p)
			}
		}
		if len(chosen) == n {
			return nil, fmt.Errorf("no plan for kernel %q", want)
		}
	}
	return chosen, nil
}

// pack makes the initramfs.
func (l *lab) pack(ctx context.Context, k *machine.Kernel, p plan, path string) (err error) {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer func() {
		if closeErr := f.Close(); err == nil {
			err = closeErr
		}
	}()
	a := machine.NewArchive(f)
	add := func(from, to string) error {
		data, err := os.ReadFile(from)
		if err != nil {
			return err
		}
		return a.File(to, 0o755, data)
	}
	if err := add(filepath.Join(l.bin, "guest"), "init"); err != nil {
		return err
	}
	var s job.Script
	if s.Modules, err = a.Modules(ctx, k, p.modules); err != nil {
		return err
	}
	for _, p := range programs {
		if err := add(filepath.Join(l.bin, p.name), filepath.Join(programDir, p.name)[1:]); err != nil {
			return err
		}
	}
	packed := map[string]bool{}
	for _, suite := range p.suites {
		r := job.Run{Name: suite.name(), Timeout: suite.timeout, Args: suite.args, Path: "/init", Dir: "/"}
		if suite.program != "" {
			r.Path = filepath.Join(programDir, suite.program)
		}
		if suite.pkg != "" {
			dir := "src/" + suite.pkg
			file := dir + "/" + binary(suite.pkg)
			r.Dir, r.Path = "/"+dir, "/"+file
			r.Args = append([]string{"-test.v=test2json", "-test.timeout=" + suite.timeout.String()}, suite.args...)
			if suite.only != "" {
				r.Args = append(r.Args, "-test.run", suite.only)
			}
			if suite.skip != "" {
				r.Args = append(r.Args, "-test.skip", suite.skip)
			}
			r.Env = []string{node.ProgramsEnv + "=" + programDir}
			r.Timeout += 30 * time.Second // it says itself where it hangs
			if !packed[suite.pkg] {
				packed[suite.pkg] = true
				if err := add(filepath.Join(l.bin, binary(suite.pkg)), file); err != nil {
					return err
				}
				for _, files := range append([]string{filepath.Join(suite.pkg, "testdata")}, suite.files...) {
					if err := addTree(a, files, filepath.Join("src", files)); err != nil {
						return err
					}
				}
			}
		}
		s.Runs = append(s.Runs, r)
	}
	text, err := json.Marshal(s)
	if err != nil {
		return err
	}
	if err := a.File(strings.TrimPrefix(job.ScriptPath, "/"), 0o644, text); err != nil {
		return err
	}
	return a.Close()
}

func addTree(a *machine.Archive, from, to string) error {
	err := filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		return a.File(filepath.Join(to, rel), 0o644, data)
	})
	if os.IsNotExist(err) {
		return nil
	}
	return err
}
