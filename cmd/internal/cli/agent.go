package cli

import (
	"context"
	"fmt"
	"log/slog"
	"net"

	"github.com/spf13/cobra"

	"github.com/skipstack/skipstack/cmd/internal/agent"
	"github.com/skipstack/skipstack/plugin"
	"github.com/skipstack/skipstack/plugin/podlog"
)

// defaultListen is where the agent serves metrics.
const defaultListen = ":9497"

func (c *cli) agent() *cobra.Command {
	var (
		where                       site
		mode, listen, level, format string
		risks                       []string
		noInstall, replace, force   bool
		mountOnly                   bool
		pods                        uint32
	)
	cmd := c.command("agent", "Keep skipstack in order on a node of a cluster",
		`For a DaemonSet; runs until it is told to end. It mounts the BPF file system where there is
none, loads the datapath or puts this build's in place of another's, has the kernel
probed, installs skipstack as install does and keeps the entry in the network
configuration while the primary plugin rewrites it, sweeps what dead pods have left,
and serves /metrics, /healthz and /readyz. It logs to standard error.

Pods need no agent: when it ends, is killed or upgraded, nothing changes for those
that run, and new ones are attached as before. It needs no access to the API server.

Exit codes: 0 told to end; 1 failed, as the port is taken; 2 wrong usage or
configuration.`, false,
		func(cmd *cobra.Command, conf plugin.Config, _ bool) error {
			log, err := c.agentLog(level, format)
			if err != nil {
				return err
			}
			if mountOnly {
				ctx, cancel := context.WithTimeout(cmd.Context(), lockTimeout)
				defer cancel()
				if err := c.deps.Datapath.EnsureBPFFS(ctx, conf.BPFFS); err != nil {
					return err
				}
				log.Info("a BPF file system is mounted", "bpffs", conf.BPFFS)
				return nil
			}
			if err := checkListen(listen); err != nil {
				return err
			}
			keep, err := where.options(cmd.Flags().Changed)
			if err != nil {
				return err
			}
			if keep.Entry, err = c.entry(cmd, conf, mode, risks); err != nil {
				return err
			}
			if conf, err = plugin.ParseConfig(keep.Entry); err != nil {
				return fmt.Errorf("%w; %w", err, errUsage)
			}
			keep.Replace, keep.Force = replace, force
			o := agent.Options{
				Node: plugin.NewNode(c.deps), Config: conf, CNICacheDir: where.cacheDir, Keep: &keep,
				Listen: listen, Pods: int(pods), Version: buildInfo().Version, Log: log,
			}
			if noInstall {
				o.Keep = nil
			}
			return agent.Run(cmd.Context(), o)
		})
	f := cmd.Flags()
	cniDirs(f, &where.confDir, &where.binDir)
	f.StringVar(&where.cacheDir, "cni-cache-dir", plugin.DefaultCNICacheDir, "`DIRECTORY` of the runtime's CNI cache, which tells of pods that are not attached")
	f.StringVar(&where.conflist, "conflist", "", "`NAME` of the file to keep the entry in (default: the one that the runtime uses)")
	f.StringVar(&mode, "mode", "", "the entry's mode: auto, on or off")
	f.StringSliceVar(&risks, "accept-risks", nil, "the entry's acceptRisks: splice, fionread, epoll, uncharged, blocking")
	f.BoolVar(&replace, "replace", false, "replace an entry that has other settings")
	f.BoolVar(&force, "force", false, "install although the primary plugin is known to undo it")
	f.BoolVar(&noInstall, "no-install", false, "leave the runtime's directories alone: somebody else installs skipstack")
	f.BoolVar(&mountOnly, "mount-only", false, "mount the BPF file system where there is none, and end: for a privileged init container")
	f.StringVar(&listen, "listen", defaultListen, "`ADDRESS` to serve HTTP at; empty: none")
	f.Uint32Var(&pods, "pod-metrics", 0, "export metrics of the `N` busiest pods, six series each")
	f.StringVar(&level, "log-level", "info", "debug, info, warn or error")
	f.StringVar(&format, "log-format", "json", "json or text")
	return cmd
}

// checkListen refuses what is no address, rather than what cannot be listened on now.
func checkListen(address string) error {
	if address == "" {
		return nil
	}
	_, port, err := net.SplitHostPort(address)
	if err == nil {
		_, err = net.LookupPort("tcp", port)
	}
	if err != nil {
		return fmt.Errorf("--listen %q: %w; %w", address, err, errUsage)
	}
	return nil
}

func (c *cli) agentLog(level, format string) (*slog.Logger, error) {
	least, err := podlog.ParseLevel(level)
	if err != nil {
		return nil, fmt.Errorf("--log-level: %w; %w", err, errUsage)
	}
	o := &slog.HandlerOptions{Level: least}
	switch format {
	case "json":
		return slog.New(slog.NewJSONHandler(c.streams.Err, o)), nil
	case "text":
		return slog.New(slog.NewTextHandler(c.streams.Err, o)), nil
	}
	return nil, fmt.Errorf("--log-format %q is neither json nor text; %w", format, errUsage)
}
