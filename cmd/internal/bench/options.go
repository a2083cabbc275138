package bench

import (
	"errors"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/skipstack/skipstack/plugin/datapath"
	"github.com/skipstack/skipstack/test/node"
)

// flags are the command line as it was written.
type flags struct {
	quick, full                     bool
	tests, paths, placements, sizes string
	repeats, maxPairs               int
	length                          time.Duration
	sockets, reference, congestion  string
	cniPath, conflist               string
	files
	check      bool
	minSpeedup float64
}

const (
	// defaultCNIPath is where distributions and kubeadm put CNI plugins.
	defaultCNIPath = "/opt/cni/bin"

	blockingSockets    = "blocking"
	nonBlockingSockets = "nonblocking"
	unixReference      = "unix"
)

func (f *flags) add(cmd *cobra.Command) {
	set := cmd.Flags()
	set.BoolVar(&f.quick, "quick", false, "measure a small set in under 20 seconds")
	set.BoolVar(&f.full, "full", false, "measure everything")
	set.StringVar(&f.tests, "tests", "", "only these, a `LIST` of "+joined(allTests))
	set.StringVar(&f.paths, "paths", "", "only these, a `LIST` of "+joined(allPaths))
	set.StringVar(&f.placements, "placements", "", "only these, a `LIST` of "+joined(allPlacements))
	set.StringVar(&f.sizes, "sizes", "", "message sizes of stream, and response sizes of rr, in place of the set's: a `LIST` such as 64,4KiB,1MiB")
	set.IntVar(&f.repeats, "repeats", minRepeats, "the least `PAIRS` of runs of each point")
	set.IntVar(&f.maxPairs, "max-pairs", defaultMaxPairs, "the most `PAIRS` of a point whose ratio is uncertain, in the set's time")
	set.DurationVar(&f.length, "length", minLength, "`DURATION` of one run")
	set.StringVar(&f.sockets, "sockets", blockingSockets, "what the generators use: blocking, or nonblocking with poll(2)")
	set.StringVar(&f.congestion, "congestion-control", "", "TCP's congestion control of both kinds of run, such as cubic; the node's own if empty: a `NAME`")
	set.StringVar(&f.reference, "reference", "", "unix: measure over an AF_UNIX stream too, which has no network at all: with --full a run for each of the least pairs of each point, else where and as often as the set's time allows")
	set.StringVar(&f.cniPath, "cni-path", defaultCNIPath, "`DIRECTORY` of the CNI plugins")
	set.StringVar(&f.conflist, "conflist", "", "make the two pods on this node, by the chain of this `FILE`")
	f.files.add(set)
	set.BoolVar(&f.check, "check", false, "fail if a point is slower than --min-speedup, too")
	set.Float64Var(&f.minSpeedup, "min-speedup", 1, "with --check, the least `RATIO` of accelerated to plain")
}

// options are what the command line asks for.
type options struct {
	flags
	selection  selection
	cniPathSet bool
}

// options checks what can be checked without looking at the machine.
func (f *flags) options(c Config, cmd *cobra.Command) (options, error) {
	if err := f.settle(c, f.conflist); err != nil {
		return options{}, err
	}
	o := options{flags: *f, cniPathSet: cmd.Flags().Changed("cni-path")}
	if !cmd.Flags().Changed("max-pairs") {
		o.maxPairs = max(o.maxPairs, o.repeats)
	}
	err := noneEmpty(cmd.Flags())
	switch {
	case err != nil:
		return o, err
	case f.quick && f.full:
		return o, errors.New("--quick and --full exclude each other")
	case f.quick:
		o.selection.set = quickSet
	case f.full:
		o.selection.set = fullSet
	default:
		o.selection.set = defaultSet
	}
	if o.selection.tests, err = parseChoice("tests", f.tests, allTests); err != nil {
		return o, err
	}
	if o.selection.paths, err = parseChoice("paths", f.paths, allPaths); err != nil {
		return o, err
	}
	if o.selection.placements, err = parseChoice("placements", f.placements, allPlacements); err != nil {
		return o, err
	}
	if cmd.Flags().Changed("sizes") {
		if o.selection.sizes, err = parseSizes(f.sizes); err != nil {
			return o, err
		}
	}
	if f.sockets != blockingSockets && f.sockets != nonBlockingSockets {
		return o, fmt.Errorf("--sockets %q: it is %s or %s", f.sockets, blockingSockets, nonBlockingSockets)
	}
	if f.congestion != "" {
		if err := checkCongestionControl(f.congestion); err != nil {
			return o, err
		}
	}
	if f.reference != "" && f.reference != unixReference {
		return o, fmt.Errorf("--reference %q: it is %s", f.reference, unixReference)
	}
	if cmd.Flags().Changed("min-speedup") && !f.check {
		return o, errors.New("--min-speedup is for --check")
	}
	if f.minSpeedup < 0 || math.IsNaN(f.minSpeedup) || math.IsInf(f.minSpeedup, 0) {
		return o, fmt.Errorf("--min-speedup %v: it is a ratio from 0 on", f.minSpeedup)
	}
	return o, parameters(o).validate()
}

// points lists what is measured on this machine.
func (o options) points() ([]Point, error) {
	cpus, err := allowedCPUs()
	if err != nil {
		return nil, err
	}
	return o.selection.points(len(cpus))
}

// checkMachine finds out whether the bench can be run here as asked. With --conflist
// it returns how.
func (o options) checkMachine() (chain hereOptions, err error) {
	if _, err := o.points(); err != nil {
		return chain, err
	}
	if err := o.checkWritable(); err != nil {
		return chain, err
	}
	if os.Geteuid() != 0 {
		return chain, node.ErrPrivilege
	}
	if err := datapath.CheckKernel(); err != nil {
		return chain, err
	}
	cniPath, err := filepath.Abs(o.cniPath)
	if err != nil {
		return chain, fmt.Errorf("--cni-path: %w", err)
	}
	if info, err := os.Stat(cniPath); o.cniPathSet && (err != nil || !info.IsDir()) {
		return chain, fmt.Errorf("--cni-path %s: no such directory", o.cniPath)
	}
	if o.conflist != "" {
		// Who names a path wants it measured; the set's own paths are left out where
		// there are none.
		if slices.Contains(o.selection.paths, ServiceIP) {
			return chain, fmt.Errorf("--paths %s cannot be measured with --conflist: no NAT rules are added to a node in use; leave it out of --paths", ServiceIP)
		}
		return readChain(o.conflist, cniPath)
	}
	program, err := os.Executable()
	if err != nil {
		return chain, fmt.Errorf("find this program: %w", err)
	}
	for _, path := range []string{program, cniPath} {
		if strings.HasPrefix(path, "/run/") {
			return chain, fmt.Errorf("%s cannot be used: the private node has a /run of its own", path)
		}
	}
	return chain, nil
}

// missingPlugin returns the first of these plugins that is not in a directory; ""
// if all are.
func missingPlugin(dir string, plugins []string) string {
	for _, plugin := range plugins {
		path, err := filepath.Abs(filepath.Join(dir, plugin))
		if err == nil {
			_, err = exec.LookPath(path)
		}
		if err != nil {
			return plugin
		}
	}
	return ""
}
