package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/skipstack/skipstack/plugin/datapath"
	"github.com/skipstack/skipstack/plugin/verdict"
	"github.com/skipstack/skipstack/test/node"
	"github.com/skipstack/skipstack/test/vm/job"
	"github.com/skipstack/skipstack/test/vm/machine"
)

// A plan is what to do on one kernel.
type plan struct {
	kernel string
	params string // further parameters of the kernel
	suites []suite
}

// A suite is a test binary, or without a package a program of test/vm/guest.
type suite struct {
	pkg     string
	only    string // tests to run, as -test.run has it; all if empty
	skip    string // tests not to run, as -test.skip has it
	scaled  string // why not all tests run
	args    []string
	timeout time.Duration
	// check judges what a program printed.
	check func(output string) error
	// skips are tests that may be skipped, and why.
	skips map[string]string
}

// programs are what tests run on a node: CNI plugins, and a program of another
// architecture than amd64.
var programs = []struct{ name, pkg, arch string }{
	{name: "skipstack", pkg: "./cmd/skipstack"},
	{name: "bridge", pkg: "github.com/containernetworking/plugins/plugins/main/bridge"},
	{name: "ptp", pkg: "github.com/containernetworking/plugins/plugins/main/ptp"},
	{name: "host-local", pkg: "github.com/containernetworking/plugins/plugins/ipam/host-local"},
	{name: "portmap", pkg: "github.com/containernetworking/plugins/plugins/meta/portmap"},
	{name: "compat", pkg: "./test/vm/compat", arch: "386"},
}

// programDir is where the virtual machine has them.
const programDir = "/programs"

// modules are what a node has loaded, as far as tests use it.
var modules = []string{
	"veth", "tun", "bridge", "br_netfilter", "overlay",
	"nf_tables", "nft_chain_nat", "nft_nat", "nft_masq", "nft_redir", "nft_ct", "nft_reject_inet", "nft_fib_inet", "nft_numgen",
	"tls", "aesni_intel",
}

const (
	none     = datapath.Risk(0)
	fionread = datapath.RiskFIONREAD
)

var plans = []plan{
	{kernel: "5.10", suites: []suite{refused, judged(verdict.Unsupported, 0)}},
	{kernel: "6.1", suites: on(verdict.Risky, fionread)},
	{kernel: "6.12", suites: on(verdict.Safe, none)},
	{kernel: "6.18", suites: on(verdict.Safe, none)},
	{kernel: "7", suites: on(verdict.Safe, none)},
	// A BPF LSM program attaches here, and the kernel never calls it.
	{kernel: "7", params: "lsm=yama", suites: []suite{guardedBy(datapath.GuardFmodRet)}},
}

// on is what to do on a supported kernel, of which that verdict is expected.
func on(level verdict.Level, risks datapath.Risk) []suite {
	return []suite{
		loads,
		judged(level, risks),
		{pkg: "plugin/datapath", timeout: 20 * time.Minute},
		{pkg: "plugin/verdict", timeout: 5 * time.Minute,
			skip: "^(TestJudge|TestHangingProbe|TestEveryProbeHangs)$", scaled: "imitated kernel faults: nothing of them depends on the kernel"},
		{pkg: "test/datapath", timeout: 25 * time.Minute},
		{pkg: "test/conformance", timeout: 20 * time.Minute,
			skip:   "^TestConformance$/^(Streams|Scale)$/^(4_GiB_and_more|10000_connections|connect_and_close,_2000_times)$",
			scaled: "so many bytes and connections take too long where every instruction is emulated"},
		{pkg: "test/cni", timeout: 10 * time.Minute,
			only: "^TestSpliceGuard$", scaled: "what needs a kernel that permits the guard"},
	}
}

// refused expects that the datapath does not load and one line says why.
var refused = suite{args: []string{"load"}, timeout: time.Minute, check: func(output string) error {
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
var loads = suite{args: []string{"load"}, timeout: time.Minute, check: func(output string) error {
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

// judged expects a verdict.
func judged(level verdict.Level, risks datapath.Risk) suite {
	return suite{args: []string{"verdict"}, timeout: 2 * time.Minute, check: func(output string) error {
		var v job.Verdict
		if err := json.Unmarshal([]byte(output), &v); err != nil {
			return fmt.Errorf("it printed %q: %w", output, err)
		}
		// Nothing can be told of the risks of a kernel that does not load the programs.
		if v.Level != string(level) || level != verdict.Unsupported && v.Risks != risks.String() {
			return fmt.Errorf("want %s [%s], got %+v", level, risks, v)
		}
		return nil
	}}
}

// guardedBy expects a safe verdict, by that form of the splice guard.
func guardedBy(guard datapath.Guard) suite {
	s := judged(verdict.Safe, none)
	safe := s.check
	s.check = func(output string) error {
		if err := safe(output); err != nil {
			return err
		}
		if want := fmt.Sprintf("(guard: %s)", guard); !strings.Contains(output, want) {
			return fmt.Errorf("want %q, got %s", want, output)
		}
		return nil
	}
	return s
}

func (s suite) name() string {
	if s.pkg != "" {
		return s.pkg
	}
	return strings.Join(s.args, " ")
}

// choose returns the plans for the kernels, and of those the suites whose name
// matches. If tests is not empty, they are the tests to run in each suite.
func choose(only string, match *regexp.Regexp, tests string) ([]plan, error) {
	var all []plan
	for _, p := range plans {
		some := plan{kernel: p.kernel, params: p.params}
		for _, s := range p.suites {
			if match.MatchString(s.name()) {
				if tests != "" {
					s.only, s.skip, s.scaled = tests, "", "only "+tests
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
	if err := add(filepath.Join(l.cache, "bin/guest"), "init"); err != nil {
		return err
	}
	var s job.Script
	if s.Modules, err = a.Modules(ctx, k, modules); err != nil {
		return err
	}
	for _, p := range programs {
		if err := add(filepath.Join(l.cache, "bin", p.name), filepath.Join(programDir, p.name)[1:]); err != nil {
			return err
		}
	}
	packed := map[string]bool{}
	for _, suite := range p.suites {
		r := job.Run{Name: suite.name(), Timeout: suite.timeout, Args: suite.args, Path: "/init", Dir: "/"}
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
				if err := add(filepath.Join(l.cache, "bin", binary(suite.pkg)), file); err != nil {
					return err
				}
				if err := addTree(a, filepath.Join(suite.pkg, "testdata"), dir+"/testdata"); err != nil {
					return err
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
