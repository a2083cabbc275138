package cli

import (
	"cmp"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/skipstack/skipstack/cmd/internal/conflist"
	"github.com/skipstack/skipstack/cmd/internal/doctor"
)

// Where the container runtime has its network configurations and plugins, if that
// could not be found by looking.
const (
	defaultConfDir = "/etc/cni/net.d"
	defaultBinDir  = "/opt/cni/bin"
)

// judged is an error that has been said: the exit code tells what the verdict is.
type judged int

func (judged) Error() string   { return "" }
func (j judged) ExitCode() int { return int(j) }

func (c *cli) doctor() *cobra.Command {
	var (
		flags           common
		confDir, binDir string
		noCache         bool
	)
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Examine the kernel and the node, and say what pods would get",
		Long: `Examine the kernel and the node, and say what pods would get.

It probes, in a scratch cgroup and network namespace that are gone when it ends,
what this kernel does with accelerated connections: safe, risky (with the names of
the risks, which the configuration may accept) or unsupported. It says what else on
the node has a say in it, what ADD would make of pods with the configuration that
the container runtime uses (or --config), and what acceleration takes in memory.

It changes nothing but the verdict that is kept for ADD: where skipstack is in use
(its run directory exists), the new one takes the old one's place, unless --no-cache
is given or the new one could tell less. It does not touch a datapath that is loaded,
and says whether that goes by the verdict: the next pod's ADD, or load, sees to it.

Exit codes, by verdict: 0 safe; 4 risky; 3 unsupported; 1 it could not be found out
(no root, or the machine is too busy); 2 wrong usage or configuration, such as a
cgroup root that is none.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			given := cmd.Flags().Changed
			for _, f := range []struct{ name, value string }{{"cni-conf-dir", confDir}, {"cni-bin-dir", binDir}} {
				if given(f.name) && f.value == "" {
					return &failed{emptyFlag(f.name)}
				}
			}
			// Without a network yet, there is nothing to be found.
			found, _ := conflist.Options{ConfDir: confDir, BinDir: binDir}.Find()
			confDir = cmp.Or(confDir, found.ConfDir, defaultConfDir)
			binDir = cmp.Or(binDir, found.BinDir, defaultBinDir)
			var list doctor.Conflist
			var err error
			switch {
			case !given("config"):
				if list, err = doctor.FindConflist(confDir); err != nil {
					return &failed{err}
				}
				flags.config = list.Path
			case flags.config != "":
				list = doctor.ReadConflist(flags.config)
			}
			conf, err := flags.resolve(func(flag string) bool {
				return given(flag) || flag == "config" && list.Path != ""
			})
			if err != nil {
				return &failed{err}
			}
			report, err := doctor.Examine(cmd.Context(), doctor.Options{
				ConfDir: confDir, BinDir: binDir, Config: conf, Conflist: list, NoCache: noCache, Deps: c.deps,
			})
			if err != nil {
				return &failed{fmt.Errorf("examine the node: %w", err)}
			}
			if flags.json {
				err = c.printJSON(report)
			} else if err = report.Print(c.streams.Out); err != nil {
				err = fmt.Errorf("print: %w", err)
			}
			if err != nil {
				return &failed{err}
			}
			if code := report.ExitCode(); code != doctor.ExitSafe {
				return judged(code)
			}
			return nil
		},
	}
	flags.register(cmd, true)
	f := cmd.Flags()
	cniDirs(f, &confDir, &binDir)
	f.BoolVar(&noCache, "no-cache", false, "do not keep the verdict for ADD")
	return cmd
}
