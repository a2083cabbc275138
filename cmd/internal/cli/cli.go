// Package cli is the command line of skipstack: it parses arguments, calls package
// plugin, prints what came of it, and turns errors into exit codes.
package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/skipstack/skipstack/cmd/internal/conflist"
	"github.com/skipstack/skipstack/plugin"
	"github.com/skipstack/skipstack/plugin/attachment"
	"github.com/skipstack/skipstack/plugin/datapath"
	"github.com/skipstack/skipstack/plugin/regular"
)

// Exit codes. A command of another package chooses its own by returning an error
// that has a method ExitCode() int.
const (
	exitOK      = 0
	exitFailed  = 1
	exitUsage   = 2
	exitRefused = 3
)

const about = `skipstack lets TCP between pods of one node skip the TCP/IP stack.

It is a CNI chained plugin: put it after the plugin that makes the interface.
Container runtimes run it with CNI_COMMAND set and no arguments; with
arguments it is the command line that you are reading about.

Exit codes: 0 done; 1 failed; 2 wrong usage or configuration, nothing was
changed; 3 refused, as pods are attached, the kernel is not supported, or a network
configuration has to be left alone. doctor and bench have more: see their help.

Colour is used on a terminal only, and not if NO_COLOR is set.`

// Streams are the standard streams of a command.
type Streams struct {
	In       io.Reader
	Out, Err io.Writer
	Colour   bool // Out may be coloured
}

// Run runs the command line args, without the program's name, and returns the
// exit code. extra are further commands.
func Run(ctx context.Context, args []string, s Streams, deps plugin.Deps, extra ...*cobra.Command) int {
	c := &cli{streams: s, deps: deps}
	root := &cobra.Command{
		Use:           "skipstack",
		Short:         "TCP between pods of one node skips the TCP/IP stack",
		Long:          about,
		Version:       buildInfo().Version,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          cobra.NoArgs,
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.SetArgs(args)
	root.SetIn(s.In)
	root.SetOut(s.Out)
	root.SetErr(s.Err)
	root.AddCommand(c.load(), c.unload(), c.on(), c.off(), c.status(), c.connections(), c.install(), c.uninstall(), c.agent(), c.doctor(), c.version(), c.man(), c.probe())
	root.AddCommand(extra...)
	strictCompletion(root)
	for _, cmd := range root.Commands() {
		c.complete(cmd)
	}

	cmd, err := root.ExecuteContextC(ctx)
	if err == nil {
		return exitOK
	}
	code := exitCode(err)
	text := explain(err).Error()
	if text == "" { // the command has said it
		return code
	}
	fmt.Fprintf(s.Err, "skipstack: %s\n", text)
	if code == exitUsage {
		fmt.Fprintf(s.Err, "Run '%s --help' for usage.\n", cmd.CommandPath())
	}
	return code
}

// failed is an error of a command that was understood. What cobra itself returns
// is an error of usage.
type failed struct{ err error }

func (e *failed) Error() string { return e.err.Error() }
func (e *failed) Unwrap() error { return e.err }

// done is what a command's error becomes once its arguments were understood.
func done(err error) error {
	if err == nil {
		return nil
	}
	return &failed{err}
}

func exitCode(err error) int {
	var own interface{ ExitCode() int }
	var f *failed
	switch {
	case errors.As(err, &own):
		return own.ExitCode()
	case errors.Is(err, errUsage), !errors.As(err, &f):
		return exitUsage
	case errors.Is(err, datapath.ErrInUse), errors.Is(err, datapath.ErrUnsupported), errors.Is(err, conflist.ErrRefused):
		return exitRefused
	default:
		return exitFailed
	}
}

// errUsage is wrapped by errors of what the user has written.
var errUsage = errors.New("nothing was changed")

// explain adds what to do.
func explain(err error) error {
	switch {
	case errors.Is(err, fs.ErrPermission) && os.Geteuid() != 0:
		return fmt.Errorf("%w: run skipstack as root", err)
	case errors.Is(err, attachment.ErrBusy), errors.Is(err, datapath.ErrBusy), errors.Is(err, conflist.ErrBusy):
		return fmt.Errorf("%w: try again; if that process is stuck, end it", err)
	case errors.Is(err, conflist.ErrEdited):
		return fmt.Errorf("%w: edit it there, or use --replace", err)
	case errors.Is(err, datapath.ErrInUse):
		return fmt.Errorf("%w: delete them, or unload with --force, which makes them plain until they are restarted", err)
	case errors.Is(err, datapath.ErrUnsupported):
		return fmt.Errorf("%w; pods stay plain (`skipstack doctor` says more)", err)
	case errors.Is(err, datapath.ErrNotLoaded):
		return fmt.Errorf("%w (the first pod loads it, or `skipstack load`; --bpffs says where)", err)
	}
	return err
}

type cli struct {
	streams Streams
	deps    plugin.Deps
}

// common are the flags that say which skipstack on the node is meant.
type common struct {
	config, bpffs, runDir, cgroupRoot string
	json                              bool
}

func (c *common) register(cmd *cobra.Command, withJSON bool) {
	f := cmd.Flags()
	f.StringVar(&c.config, "config", "", "take the settings from skipstack's entry in this `CONFLIST`")
	f.StringVar(&c.bpffs, "bpffs", "", "BPF file system that holds the programs (default "+plugin.DefaultBPFFS+")")
	f.StringVar(&c.runDir, "run-dir", "", "directory of skipstack's state (default "+plugin.DefaultRunDir+")")
	f.StringVar(&c.cgroupRoot, "cgroup-root", "", "cgroup v2 mount point (default: found)")
	if withJSON {
		f.BoolVar(&c.json, "json", false, "print JSON")
	}
}

// resolve makes a configuration of the flags, which win over the conflist. A flag
// that is given with no value, as by a script whose variable is not set, is an
// error: the default may be another installation's.
func (c *common) resolve(given func(flag string) bool) (plugin.Config, error) {
	conf := plugin.DefaultConfig()
	if given("config") {
		if c.config == "" {
			return conf, emptyFlag("config")
		}
		raw, err := regular.Read(c.config, plugin.MaxConflist)
		if err != nil {
			return conf, fmt.Errorf("read the configuration: %w; %w", err, errUsage)
		}
		if conf, err = plugin.ParseConflist(raw); err != nil {
			return conf, fmt.Errorf("%s: %w; %w", c.config, err, errUsage)
		}
	}
	for _, p := range []struct {
		flag, value string
		dst         *string
	}{
		{"bpffs", c.bpffs, &conf.BPFFS}, {"run-dir", c.runDir, &conf.RunDir}, {"cgroup-root", c.cgroupRoot, &conf.CgroupRoot},
	} {
		if !given(p.flag) {
			continue
		}
		if p.value == "" {
			return conf, emptyFlag(p.flag)
		}
		path, err := filepath.Abs(p.value)
		if err != nil {
			return conf, fmt.Errorf("--%s: %w; %w", p.flag, err, errUsage)
		}
		if path == "/" {
			return conf, fmt.Errorf("--%s: the root directory cannot be used; %w", p.flag, errUsage)
		}
		*p.dst = path
	}
	return conf, nil
}

func emptyFlag(name string) error {
	return fmt.Errorf("--%s has no value; %w", name, errUsage)
}

// command makes a command that takes no arguments and the common flags.
func (c *cli) command(use, short, long string, withJSON bool, run func(cmd *cobra.Command, conf plugin.Config, asJSON bool) error) *cobra.Command {
	var flags common
	cmd := &cobra.Command{
		Use:   use,
		Short: short,
		Long:  strings.TrimSpace(short + ".\n\n" + long),
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			conf, err := flags.resolve(cmd.Flags().Changed)
			if err == nil {
				err = run(cmd, conf, flags.json)
			}
			return done(err)
		},
	}
	flags.register(cmd, withJSON)
	return cmd
}

func (c *cli) printJSON(v any) error {
	enc := json.NewEncoder(c.streams.Out)
	enc.SetIndent("", "  ")
	if err := enc.Encode(v); err != nil {
		return fmt.Errorf("print: %w", err)
	}
	return nil
}

func (c *cli) printf(format string, args ...any) error {
	if _, err := fmt.Fprintf(c.streams.Out, format, args...); err != nil {
		return fmt.Errorf("print: %w", err)
	}
	return nil
}

// plural is "1 pod", "2 pods".
func plural[N int | uint64](n N, one string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %ss", n, one)
}
