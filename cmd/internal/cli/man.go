package cli

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"

	"github.com/skipstack/skipstack/plugin"
	"github.com/skipstack/skipstack/plugin/attachment"
)

func (c *cli) man() *cobra.Command {
	return &cobra.Command{
		Use:   "man DIRECTORY",
		Short: "Write the man pages of all commands",
		Long: `Write the man pages of all commands.

They are skipstack.8 and one for each command, made of what --help prints. The
directory is made if need be; for the pages to be found it is the man8 of one of
manpath(1)'s, as /usr/local/share/man/man8. If SOURCE_DATE_EPOCH is set, the pages
carry that date.`,
		Args: cobra.ExactArgs(1),
		ValidArgsFunction: func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
			return nil, cobra.ShellCompDirectiveFilterDirs
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if args[0] == "" {
				return fmt.Errorf("no directory is given; %w", errUsage)
			}
			if err := writeMan(cmd.Root(), args[0]); err != nil {
				return &failed{fmt.Errorf("write the man pages: %w", err)}
			}
			return nil
		},
	}
}

func writeMan(root *cobra.Command, dir string) error {
	header := &doc.GenManHeader{Section: "8", Source: "skipstack " + buildInfo().Version, Manual: "skipstack"}
	if s, ok := os.LookupEnv("SOURCE_DATE_EPOCH"); ok { // reproducible-builds.org
		seconds, err := strconv.ParseInt(s, 10, 64)
		if err != nil {
			return fmt.Errorf("SOURCE_DATE_EPOCH: %w", err)
		}
		date := time.Unix(seconds, 0).UTC()
		header.Date = &date
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	root.DisableAutoGenTag = true
	root.InitDefaultHelpCmd()
	root.InitDefaultCompletionCmd()
	for _, cmd := range append([]*cobra.Command{root}, descendants(root)...) {
		cmd.DisableAutoGenTag = true
		h := *header
		h.Title = strings.ToUpper(strings.ReplaceAll(cmd.CommandPath(), " ", "-"))
		f, err := os.Create(filepath.Join(dir, strings.ReplaceAll(cmd.CommandPath(), " ", "-")+".8"))
		if err != nil {
			return err
		}
		err = doc.GenMan(cmd, &h, f)
		if closeErr := f.Close(); err == nil {
			err = closeErr
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// descendants are the commands below one that users see.
func descendants(cmd *cobra.Command) []*cobra.Command {
	var all []*cobra.Command
	for _, c := range cmd.Commands() {
		if c.IsAvailableCommand() {
			all = append(all, c)
			all = append(all, descendants(c)...)
		}
	}
	return all
}

// complete tells shells what values flags may have.
func (c *cli) complete(cmd *cobra.Command) {
	if cmd.RunE == nil && cmd.Run == nil {
		return
	}
	values := func(all ...string) cobra.CompletionFunc {
		return cobra.FixedCompletions(all, cobra.ShellCompDirectiveNoFileComp)
	}
	for flag, f := range map[string]cobra.CompletionFunc{
		"mode":         values("auto", "on", "off"),
		"accept-risks": values("splice", "fionread", "epoll", "uncharged", "blocking"),
		"timeout":      values("1m", "10m", "1h", "0"),
		"log-level":    values("debug", "info", "warn", "error"),
		"log-format":   values("json", "text"),
		"pod":          c.completePods,
		"config": func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
			return []string{"conflist", "json", "conf"}, cobra.ShellCompDirectiveFilterFileExt
		},
	} {
		if cmd.Flags().Lookup(flag) != nil {
			_ = cmd.RegisterFlagCompletionFunc(flag, f) // fails only for flags that are not there
		}
	}
	for _, flag := range []string{"bpffs", "run-dir", "cgroup-root", "cni-conf-dir", "cni-bin-dir", "cni-cache-dir", "cni-path"} {
		if cmd.Flags().Lookup(flag) != nil {
			_ = cmd.MarkFlagDirname(flag)
		}
	}
}

// strictCompletion makes cobra's command for completion scripts use the exit codes of
// the others: it would take an unknown shell for a request for help, and a failed write
// for wrong usage.
func strictCompletion(root *cobra.Command) {
	root.InitDefaultCompletionCmd()
	for _, cmd := range root.Commands() {
		if cmd.Name() != "completion" {
			continue
		}
		cmd.Args = cobra.NoArgs
		cmd.RunE = func(cmd *cobra.Command, _ []string) error { return cmd.Help() }
		for _, shell := range cmd.Commands() {
			write := shell.RunE
			if write == nil {
				run := shell.Run
				write = func(cmd *cobra.Command, args []string) error { run(cmd, args); return nil }
			}
			shell.RunE = func(cmd *cobra.Command, args []string) error {
				if err := write(cmd, args); err != nil {
					return &failed{fmt.Errorf("print: %w", err)}
				}
				return nil
			}
		}
	}
}

// completePods are the pods that are attached.
func (c *cli) completePods(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
	dir := plugin.DefaultRunDir
	if f := cmd.Flag("run-dir"); f != nil && f.Value.String() != "" {
		dir = f.Value.String()
	}
	records, _ := attachment.NewStore(dir).List() // what can be read
	var pods []string
	for _, r := range records {
		if r.PodName != "" && r.Status == attachment.Attached {
			pods = append(pods, r.PodNamespace+"/"+r.PodName)
		}
	}
	slices.Sort(pods)
	return slices.Compact(pods), cobra.ShellCompDirectiveNoFileComp
}
