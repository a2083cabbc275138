package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/skipstack/skipstack/cmd/internal/conflist"
	"github.com/skipstack/skipstack/conf"
	"github.com/skipstack/skipstack/plugin"
	"github.com/skipstack/skipstack/plugin/datapath"
	"github.com/skipstack/skipstack/plugin/regular"
)

// lockTimeout is how long install and uninstall wait for another one.
const lockTimeout = 30 * time.Second

// site are the flags that say where the runtime's configuration and plugins are.
type site struct {
	confDir, binDir, cacheDir, conflist string
	dryRun                              bool
}

func (s *site) register(cmd *cobra.Command) {
	f := cmd.Flags()
	cniDirs(f, &s.confDir, &s.binDir)
	f.BoolVar(&s.dryRun, "dry-run", false, "change nothing; print what would change as a diff")
}

// cniDirs are the flags for the runtime's directories.
func cniDirs(f *pflag.FlagSet, confDir, binDir *string) {
	f.StringVar(confDir, "cni-conf-dir", "", "`DIRECTORY` of the container runtime's network configurations (default: found)")
	f.StringVar(binDir, "cni-bin-dir", "", "`DIRECTORY` of its CNI plugins (default: found)")
}

// options are those of package conflist.
func (s *site) options(given func(flag string) bool) (conflist.Options, error) {
	for _, f := range []struct{ name, value string }{
		{"cni-conf-dir", s.confDir}, {"cni-bin-dir", s.binDir}, {"cni-cache-dir", s.cacheDir}, {"conflist", s.conflist},
	} {
		if given(f.name) && f.value == "" {
			return conflist.Options{}, emptyFlag(f.name)
		}
	}
	if given("conflist") && !conflist.IsNetwork(s.conflist) {
		return conflist.Options{}, fmt.Errorf("--conflist %s is not the name of a network configuration; %w", s.conflist, errUsage)
	}
	return conflist.Options{ConfDir: s.confDir, BinDir: s.binDir, CacheDir: s.cacheDir, Conflist: s.conflist, DryRun: s.dryRun}, nil
}

func (c *cli) install() *cobra.Command {
	var (
		where          site
		mode           string
		risks          []string
		replace, force bool
	)
	cmd := c.command("install", "Install skipstack on this node",
		`Puts this program into the container runtime's directory of plugins, and appends
skipstack's entry to the network configuration that the runtime uses: the first by
name in its directory. Pods that start from then on are attached. Every other byte of
the file stays as it is. A single plugin's configuration (.conf) becomes a list of
the same name, and is kept beside it.

It can be repeated, interrupted and run by several at once; a new version of this
program replaces the installed one. uninstall gives back what was there before.

The directories are found by looking: at the configuration of containerd and CRI-O,
and at those of known distributions (k3s, microk8s, GKE, OpenShift, minikube).

With --config the entry is the one of that conflist, or that file. --mode,
--accept-risks, --bpffs, --run-dir and --cgroup-root are written into the entry.

Exit codes: 0 installed, or was already; 1 failed; 2 wrong usage or configuration;
3 refused, with the reason: nothing was changed.`, true,
		func(cmd *cobra.Command, conf plugin.Config, asJSON bool) error {
			given := cmd.Flags().Changed
			o, err := where.options(given)
			if err != nil {
				return err
			}
			o.Replace, o.Force = replace, force
			if o.Entry, err = c.entry(cmd, conf, mode, risks); err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), lockTimeout)
			defer cancel()
			r, err := o.Install(ctx)
			if err != nil {
				return fmt.Errorf("install: %w", err)
			}
			if asJSON {
				return c.printJSON(newInstallation(r, where.dryRun))
			}
			return c.installed(r, where.dryRun)
		})
	where.register(cmd)
	f := cmd.Flags()
	f.StringVar(&where.conflist, "conflist", "", "`NAME` of the file to edit in that directory (default: the one that the runtime uses)")
	f.StringVar(&mode, "mode", "", "the entry's mode: auto, on or off")
	f.StringSliceVar(&risks, "accept-risks", nil, "the entry's acceptRisks: splice, fionread, epoll, uncharged, blocking")
	f.BoolVar(&replace, "replace", false, "replace an entry that has other settings")
	f.BoolVar(&force, "force", false, "install although the primary plugin is known to undo it (Cilium, if its cni.exclusive is on)")
	return cmd
}

// entry makes the entry of the flags.
func (c *cli) entry(cmd *cobra.Command, parsed plugin.Config, mode string, risks []string) ([]byte, error) {
	given := cmd.Flags().Changed
	entry := bytes.Clone(conf.Entry)
	if given("config") {
		raw, err := regular.Read(cmd.Flag("config").Value.String(), plugin.MaxConflist)
		if err == nil {
			entry, err = plugin.FindEntry(raw)
		}
		if err != nil {
			return nil, fmt.Errorf("read the entry: %w; %w", err, errUsage)
		}
	}
	for _, set := range []struct {
		flag, key string
		value     any
	}{
		{"mode", "mode", mode}, {"accept-risks", "acceptRisks", risks},
		{"bpffs", "bpffs", parsed.BPFFS}, {"run-dir", "runDir", parsed.RunDir}, {"cgroup-root", "cgroupRoot", parsed.CgroupRoot},
	} {
		if !given(set.flag) {
			continue
		}
		var err error
		if entry, err = conflist.Set(entry, set.key, set.value); err != nil {
			return nil, err
		}
	}
	if err := plugin.Validate(entry); err != nil {
		return nil, fmt.Errorf("%w; %w", err, errUsage)
	}
	return entry, nil
}

// installation is what install and uninstall print as JSON.
type installation struct {
	DryRun   bool     `json:"dryRun,omitempty"`
	ConfDir  string   `json:"confDir,omitempty"`
	BinDir   string   `json:"binDir,omitempty"`
	Conflist string   `json:"conflist,omitempty"`
	Changed  []string `json:"changed"` // paths, in order
	Diff     string   `json:"diff,omitempty"`
	Binary   string   `json:"binary,omitempty"`
	Placed   bool     `json:"placed"`
	Removed  bool     `json:"removed"`
	Kept     string   `json:"kept,omitempty"`
}

func newInstallation(r conflist.Report, dryRun bool) installation {
	out := installation{
		DryRun: dryRun, ConfDir: r.ConfDir, BinDir: r.BinDir, Conflist: r.Conflist, Changed: []string{},
		Binary: r.Binary, Placed: r.Placed, Removed: r.Removed, Kept: r.Kept,
	}
	for _, change := range r.Changes {
		out.Changed = append(out.Changed, change.Path)
		if dryRun {
			out.Diff += change.Diff()
		}
	}
	return out
}

func (c *cli) installed(r conflist.Report, dryRun bool) error {
	if dryRun {
		return c.diff(r, r.Placed, "would be put at "+r.Binary)
	}
	placed, edited := "is at", "has the entry already"
	if r.Placed {
		placed = "was put at"
	}
	if len(r.Changes) > 0 {
		edited = "has the entry now"
	}
	return c.printf("The binary %s %s.\n%s %s.\nPods that start from now on are attached; `skipstack doctor` says what they get.\n", placed, r.Binary, r.Conflist, edited)
}

// diff prints what a dry run has found.
func (c *cli) diff(r conflist.Report, binary bool, what string) error {
	for _, change := range r.Changes {
		if err := c.printf("%s", c.colour(change.Diff())); err != nil {
			return err
		}
	}
	switch {
	case binary:
		return c.printf("The binary %s.\n", what)
	case len(r.Changes) == 0:
		return c.printf("Nothing would change.\n")
	}
	return nil
}

// colour colours a diff, if that is wanted.
func (c *cli) colour(diff string) string {
	if !c.streams.Colour {
		return diff
	}
	var out strings.Builder
	for line := range strings.Lines(diff) {
		text := strings.TrimSuffix(line, "\n")
		switch {
		case strings.HasPrefix(line, "---"), strings.HasPrefix(line, "+++"):
			fmt.Fprintf(&out, "\x1b[1m%s\x1b[0m\n", text)
		case strings.HasPrefix(line, "@"):
			fmt.Fprintf(&out, "\x1b[36m%s\x1b[0m\n", text)
		case strings.HasPrefix(line, "-"):
			fmt.Fprintf(&out, "\x1b[31m%s\x1b[0m\n", text)
		case strings.HasPrefix(line, "+"):
			fmt.Fprintf(&out, "\x1b[32m%s\x1b[0m\n", text)
		default:
			out.WriteString(line)
		}
	}
	return out.String()
}

func (c *cli) uninstall() *cobra.Command {
	var (
		where        site
		purge, drain bool
		timeout      time.Duration
	)
	cmd := c.command("uninstall", "Remove skipstack from this node",
		`Takes skipstack's entry out of the network configurations, which are then what they
were before install, byte for byte. Pods that start from then on are plain. It removes
the binary too, unless the container runtime remembers pods that were made with it:
their deletion may call it. Run it again when they are gone.

Pods that are attached stay so, and accelerated, until they are deleted. With --drain
acceleration is switched off, uninstall waits until the last accelerated connection has
closed, and then unloads the datapath: nothing of skipstack is left in the kernel.
Other nodes on the same kernel, such as those of kind, are left alone.

Where an agent keeps the entry, remove that first.

Exit codes: 0 done; 1 failed, or connections were left at the deadline: run it again;
2 wrong usage or configuration; 3 refused, with the reason.`, true,
		func(cmd *cobra.Command, conf plugin.Config, asJSON bool) error {
			if err := errors.Join(needs(cmd, "timeout", "drain"), checkTimeout(timeout)); err != nil {
				return err
			}
			o, err := where.options(cmd.Flags().Changed)
			if err != nil {
				return err
			}
			node := plugin.NewNode(c.deps)
			ctx, cancel := context.WithTimeout(cmd.Context(), lockTimeout)
			defer cancel()
			// The entry first: no pod is attached any more. The binary last.
			r, err := o.Uninstall(ctx, purge)
			var drained *plugin.Unloaded
			if drain && !where.dryRun && !errors.Is(err, conflist.ErrBusy) {
				var got plugin.Unloaded
				var drainErr error
				if got, drainErr = c.drain(cmd.Context(), node, conf, timeout); drainErr != nil {
					err = errors.Join(err, fmt.Errorf("drain: %w", drainErr))
				}
				drained = &got
			}
			if err != nil {
				err = fmt.Errorf("uninstall: %w", err)
			}
			if asJSON {
				out := struct {
					installation
					Drained  *bool `json:"drained,omitempty"`
					Detached int   `json:"detached,omitempty"`
				}{installation: newInstallation(r, where.dryRun)}
				if drained != nil {
					ok := err == nil
					out.Drained, out.Detached = &ok, drained.Detached
				}
				return errors.Join(c.printJSON(out), err)
			}
			return errors.Join(c.uninstalled(r, where.dryRun, drained), err)
		})
	where.register(cmd)
	f := cmd.Flags()
	f.StringVar(&where.cacheDir, "cni-cache-dir", plugin.DefaultCNICacheDir, "`DIRECTORY` of the runtime's CNI cache, which tells of pods whose deletion may call the binary")
	f.BoolVar(&purge, "purge", false, "remove the binary although the runtime may still call it")
	f.BoolVar(&drain, "drain", false, "switch acceleration off, wait for connections to close, and unload the datapath")
	f.DurationVar(&timeout, "timeout", 10*time.Minute, "with --drain, how long to wait; 0 is no limit")
	return cmd
}

func (c *cli) uninstalled(r conflist.Report, dryRun bool, drained *plugin.Unloaded) error {
	if dryRun {
		if r.Kept != "" {
			defer c.printf("%s would be kept: %s.\n", r.Binary, r.Kept)
		}
		return c.diff(r, r.Removed, "at "+r.Binary+" would be removed")
	}
	var text []string
	changed := []string{}
	for _, change := range r.Changes {
		changed = append(changed, change.Path)
	}
	slices.Sort(changed)
	for _, path := range slices.Compact(changed) {
		if _, err := os.Lstat(path); err == nil {
			text = append(text, path+" is as it was before install.")
		}
	}
	switch {
	case r.Removed:
		text = append(text, r.Binary+" was removed.")
	case r.Kept != "":
		text = append(text, r.Binary+" stays: "+r.Kept+". Run uninstall again later, or with --purge.")
	}
	if len(text) == 0 && (drained == nil || !drained.Was) {
		text = append(text, "Nothing was installed.")
	}
	if drained != nil && drained.Sockets == 0 && drained.Was {
		text = append(text, fmt.Sprintf("The datapath is unloaded; %s detached.", plural(drained.Detached, "pod")))
	}
	for _, line := range text {
		if err := c.printf("%s\n", line); err != nil {
			return err
		}
	}
	return nil
}

// drain makes all connections of this node's pods plain, waits until the last enrolled
// socket has closed, and unloads the datapath. Unlike off it reaches no nested node.
func (c *cli) drain(ctx context.Context, node *plugin.Node, conf plugin.Config, timeout time.Duration) (plugin.Unloaded, error) {
	out, err := node.Unload(ctx, conf, true)
	if errors.Is(err, datapath.ErrNoBPFFS) {
		return out, nil // so it was never loaded, or its pins are gone
	}
	if err != nil || out.Sockets == 0 {
		return out, err
	}
	err = c.wait(ctx, timeout, func() (uint64, error) {
		again, err := node.Unload(ctx, conf, true) // counts, and takes what is left
		return again.Sockets, err
	})
	if err == nil {
		out.Sockets = 0
	}
	return out, err
}
