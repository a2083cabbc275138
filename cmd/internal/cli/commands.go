package cli

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/cmd/internal/conflist"
	"github.com/skipstack/skipstack/cmd/internal/doctor"
	"github.com/skipstack/skipstack/plugin"
	"github.com/skipstack/skipstack/plugin/datapath"
)

func (c *cli) load() *cobra.Command {
	return c.command("load", "Load the datapath, or replace another build's",
		`The first pod's ADD loads the datapath by itself; load does it beforehand, and
says what the kernel is fit for, and whether pods will be accelerated. After an
upgrade or downgrade of skipstack it puts this build's programs in place of the
loaded ones; connections that are accelerated go on with the programs they have.

It mounts a BPF file system where there is none.`, true,
		func(cmd *cobra.Command, conf plugin.Config, asJSON bool) error {
			got, err := plugin.NewNode(c.deps).Load(cmd.Context(), conf)
			if err != nil {
				return err
			}
			var unfit error
			if err := got.Verdict.Unfit(); err != nil {
				unfit = fmt.Errorf("pods stay plain: %w", err)
			}
			if asJSON {
				return errors.Join(c.printJSON(struct {
					Was            string `json:"was"`
					MaxConnections uint32 `json:"maxConnections"`
					Open           bool   `json:"open"`
					SwitchedOff    bool   `json:"switchedOff"`
					Accelerates    bool   `json:"accelerates"` // pods without annotations
					Plain          string `json:"plain,omitempty"`
					Verdict        any    `json:"verdict"`
				}{got.Was, got.MaxConnections, got.Node.Open, got.Node.SwitchedOff,
					got.Plain == "" && !got.Node.SwitchedOff, got.Plain, got.Verdict.Document}), unfit)
			}
			did := map[string]string{
				"nothing":       "is loaded",
				"this build":    "was loaded already",
				"another build": "replaced another build's",
			}[got.Was]
			if err := c.printf("The datapath %s (up to %s).\nKernel: %s.\n", did, plural(uint64(got.MaxConnections), "connection"), got.Verdict.Summary); err != nil {
				return err
			}
			if got.MaxConnections != conf.MaxConnections {
				err = c.printf("maxConnections %d takes effect when it is unloaded and loaded again.\n", conf.MaxConnections)
			}
			if err == nil && got.Node.SwitchedOff {
				err = c.printf("Acceleration is switched off on this node: `skipstack on` switches it on.\n")
			}
			if err == nil {
				err = c.printf("%s", outlook(got, conf.Mode, cmd.Flags().Changed("config")))
			}
			if err == nil && !cmd.Flags().Changed("config") {
				err = c.printf("%s", otherEntry(conflist.Options{}))
			}
			return errors.Join(err, unfit)
		})
}

// outlook is the line of load that says what the next pods get.
func outlook(got plugin.Loaded, mode plugin.Mode, configured bool) string {
	pods := "Pods of this configuration"
	if !configured {
		pods = "Pods of the default configuration (--config names another)"
	}
	switch {
	case got.Plain != "":
		return fmt.Sprintf("%s stay plain: %s.\n", pods, got.Plain)
	case got.Node.SwitchedOff:
		return "" // it has been said
	case mode == plugin.ModeAuto:
		return pods + " are accelerated unless they opt out or have a bandwidth limit.\n"
	default:
		return pods + " are accelerated unless they opt out.\n"
	}
}

// otherEntry is the line of load that names the entry which is installed, if there is
// one: load without --config does not go by it, as several may be.
func otherEntry(o conflist.Options) string {
	found, _ := o.Find() // without a network, there is none
	if found.ConfDir == "" {
		return ""
	}
	list, err := doctor.FindConflist(found.ConfDir)
	if err != nil || list.Path == "" {
		return ""
	}
	return fmt.Sprintf("Pods of %s may get something else: `skipstack load --config %s` says what.\n", list.Path, list.Path)
}

func (c *cli) unload() *cobra.Command {
	var force bool
	cmd := c.command("unload", "Take the datapath away",
		`Refuses while pods are attached, unless forced: then they are plain until they are
restarted. No connection loses a byte; those that are accelerated go on by TCP, and
keep programs loaded until they close. Run it again then to remove the rest.`, true,
		func(cmd *cobra.Command, conf plugin.Config, asJSON bool) error {
			got, err := plugin.NewNode(c.deps).Unload(cmd.Context(), conf, force)
			if err != nil {
				return err
			}
			if asJSON {
				return c.printJSON(struct {
					WasLoaded bool   `json:"wasLoaded"`
					Detached  int    `json:"detached"`
					Sockets   uint64 `json:"sockets"`
				}{got.Was, got.Detached, got.Sockets})
			}
			if got.Detached > 0 {
				if err := c.printf("%s detached.\n", plural(got.Detached, "pod")); err != nil {
					return err
				}
			}
			if got.Sockets > 0 {
				return c.printf("Enrolled sockets left: %d. They go on by TCP; unload again when they have closed.\n", got.Sockets)
			}
			if !got.Was {
				return c.printf("Nothing was loaded at %s.\n", conf.BPFFS)
			}
			return c.printf("The datapath is unloaded.\n")
		})
	cmd.Flags().BoolVar(&force, "force", false, "unload although pods are attached")
	return cmd
}

func (c *cli) on() *cobra.Command {
	return c.switchCommand("on", "Switch acceleration on, for the node or one pod", false,
		`Undoes off. It does not accelerate what the configuration, an annotation or the
kernel's verdict rules out.

For the node it reaches the sets of programs that are published below --bpffs, and no
others: off reaches more. Where off was run on a host of nested nodes, such as those of
kind, run on in each of them.`)
}

func (c *cli) off() *cobra.Command {
	return c.switchCommand("off", "Switch acceleration off, for the node or one pod", true,
		`Takes effect at once, for live connections too: they go on by TCP and lose nothing.
Their sockets cost a little until they close; off says how many there are.
--wait waits for that, and exits with 1 if some are left at the deadline.
It lasts until on, for a pod also until it is deleted, and until the datapath is
unloaded. To keep pods from being accelerated for good, set "mode" to "off" in the
conflist.

For the node it reaches every set of skipstack's programs in the kernel, whatever --bpffs
says: also those of other mount namespaces and of nested nodes, such as those of kind,
and those whose pins are gone. on reaches those published below --bpffs only.`)
}

func (c *cli) switchCommand(use, short string, off bool, long string) *cobra.Command {
	var (
		pod     string
		wait    bool
		timeout time.Duration
	)
	cmd := c.command(use, short, long, true,
		func(cmd *cobra.Command, conf plugin.Config, asJSON bool) error {
			if off {
				if err := errors.Join(needs(cmd, "timeout", "wait"), checkTimeout(timeout)); err != nil {
					return err
				}
			}
			node := plugin.NewNode(c.deps)
			var got plugin.Switched
			var err error
			what := "this node"
			if !cmd.Flags().Changed("pod") {
				got, err = node.Switch(conf, off)
			} else {
				var namespace, name string
				if namespace, name, err = parsePod(pod); err != nil {
					return err
				}
				what = "pod " + pod
				got, err = node.SwitchPod(cmd.Context(), conf, namespace, name, off)
			}
			if err != nil {
				return err
			}
			// What was done is said before the waiting begins, but JSON is one value.
			if !asJSON {
				if err := c.printf("Acceleration is switched %s for %s.\n", use, what); err != nil {
					return err
				}
			}
			var waitErr error
			if wait {
				if waitErr = c.wait(cmd.Context(), timeout, got.Left); waitErr == nil {
					got.Sockets = 0
				} else if sockets, err := got.Left(); err == nil {
					got.Sockets = sockets
				}
			}
			if asJSON {
				return errors.Join(c.printJSON(struct {
					SwitchedOff bool   `json:"switchedOff"`
					Sockets     uint64 `json:"sockets"`
				}{off, got.Sockets}), waitErr)
			}
			switch {
			case !off || waitErr != nil:
				return waitErr
			case wait:
				return c.printf("No enrolled sockets are left.\n")
			}
			return c.printf("Enrolled sockets left: %d. They go on by TCP until they close.\n", got.Sockets)
		})
	if off {
		cmd.Flags().BoolVar(&wait, "wait", false, "wait until the last accelerated connection has closed")
		cmd.Flags().DurationVar(&timeout, "timeout", 10*time.Minute, "with --wait, how long; 0 is no limit")
	}
	cmd.Flags().StringVar(&pod, "pod", "", "only this pod, `NAMESPACE/NAME`")
	return cmd
}

// binary is what this binary knows of itself.
type binary struct {
	Version  string   `json:"version"`
	Revision string   `json:"revision,omitempty"`
	Time     string   `json:"time,omitempty"` // of the revision
	Modified bool     `json:"modified,omitempty"`
	Go       string   `json:"go"`
	Platform string   `json:"platform"`
	CNI      []string `json:"cniVersions"`
}

func buildInfo() binary {
	v := binary{
		Version: "unknown", Go: runtime.Version(), Platform: runtime.GOOS + "/" + runtime.GOARCH,
		CNI: plugin.SupportedVersions().SupportedVersions(),
	}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return v
	}
	v.Version = info.Main.Version
	for _, s := range info.Settings {
		switch s.Key {
		case "vcs.revision":
			v.Revision = s.Value
		case "vcs.time":
			v.Time = s.Value
		case "vcs.modified":
			v.Modified = s.Value == "true"
		}
	}
	return v
}

func (c *cli) version() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "version",
		Short: "Print the version of skipstack and of the CNI specification",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			v := buildInfo()
			if asJSON {
				return done(c.printJSON(v))
			}
			revision := ""
			if v.Revision != "" {
				revision = ", revision " + v.Revision
				if v.Modified {
					revision += " (modified)"
				}
				if v.Time != "" {
					revision += " of " + v.Time
				}
			}
			return done(c.printf("skipstack %s%s, %s %s\nCNI specification %s\n", v.Version, revision, v.Go, v.Platform, strings.Join(v.CNI, ", ")))
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

// probe is what an ADD runs detached; see plugin.Prober.
func (c *cli) probe() *cobra.Command {
	var (
		entry  string
		lockFD int
		load   bool
	)
	cmd := &cobra.Command{
		Use:    "probe",
		Short:  "Probe the kernel, cache the verdict and open the node's gate",
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var held *os.File
			if lockFD >= 0 {
				// Close-on-exec, or the workers of the probe would keep the lock.
				if _, err := unix.FcntlInt(uintptr(lockFD), unix.F_SETFD, unix.FD_CLOEXEC); err != nil {
					return fmt.Errorf("--lock-fd %d: %w", lockFD, err)
				}
				held = os.NewFile(uintptr(lockFD), "probe lock")
			}
			conf, err := plugin.ParseConfig([]byte(entry))
			if err != nil {
				return fmt.Errorf("--entry: %w", err)
			}
			log, closer := c.deps.Log(conf)
			defer closer.Close()
			v, err := plugin.NewNode(c.deps).Probe(cmd.Context(), conf, load, held)
			if errors.Is(err, datapath.ErrGuard) {
				log.Warn("splice(2) is not guarded", "error", err.Error())
				return &failed{err}
			}
			if err != nil {
				log.Warn("the kernel was not probed, so pods stay plain, or go by what was known before: `skipstack doctor` looks for the cause, `skipstack load` tries again", "error", err.Error())
				return &failed{err}
			}
			log.Info("the kernel was probed", "verdict", v.Summary)
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&entry, "entry", "{}", "configuration, as in a conflist")
	f.IntVar(&lockFD, "lock-fd", -1, "descriptor that holds the probe lock")
	f.BoolVar(&load, "load", false, "load the datapath if it is not loaded")
	return cmd
}
