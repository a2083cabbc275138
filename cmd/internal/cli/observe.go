package cli

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/plugin"
	"github.com/skipstack/skipstack/plugin/datapath"
)

func (c *cli) status() *cobra.Command {
	var cacheDir string
	cmd := c.command("status", "Show what skipstack does on this node",
		`For each pod: whether it is attached, why its connections are plain if they are, how
many are accelerated now, and what it has sent: redirected, or passed to TCP. BYPASSED
is the share of bytes that skipped the stack, of those sent to attached pods of this
node; what goes to other nodes is not in it.

It reads, and changes nothing. Traffic is not slowed down. Where the datapath is not
loaded it says so, and exits with 0.`, true,
		func(cmd *cobra.Command, conf plugin.Config, asJSON bool) error {
			if cacheDir == "" {
				return emptyFlag("cni-cache-dir")
			}
			report := plugin.NewNode(c.deps).Status(conf, cacheDir)
			if asJSON {
				return c.printJSON(struct {
					Version string `json:"version"`
					plugin.Report
				}{buildInfo().Version, report})
			}
			return c.printf("%s", statusText(report))
		})
	cmd.Flags().StringVar(&cacheDir, "cni-cache-dir", plugin.DefaultCNICacheDir, "`DIRECTORY` of the runtime's CNI cache, which tells of pods that are not attached")
	return cmd
}

// statusText is the report for people.
func statusText(r plugin.Report) string {
	var b strings.Builder
	line := func(name, format string, args ...any) {
		fmt.Fprintf(&b, "%-11s %s\n", name+":", fmt.Sprintf(format, args...))
	}
	line("Version", "%s, build %.8s", buildInfo().Version, r.Build)
	line("Kernel", "%s", r.Verdict)
	if r.Loaded == nil {
		line("Datapath", "not to be seen: %s", r.NotLoaded)
	} else {
		is := "this build"
		if !r.Loaded.SameBuild {
			is = fmt.Sprintf("build %.8s, not this one's (`skipstack load` replaces it)", r.Loaded.Build)
		}
		line("Datapath", "%s, up to %s", is, plural(uint64(r.Loaded.MaxConnections), "connection"))
		line("Node", "%s", gate(r.Loaded))
		line("Maps", "%s", usages(r.Loaded.Maps))
		t := r.Totals
		redirected, passed := t.Redirected(), t.Passed()
		line("Traffic", "%s accelerated now; %s redirected in %s, %s passed in %s (%s bypassed)",
			plural(t.Connections, "connection"), size(redirected.Bytes), plural(redirected.Messages, "message"),
			size(passed.Bytes), plural(passed.Messages, "message"), percent(t.Bypassed))
		by := map[string]uint64{}
		for label, n := range t.Messages {
			if label != datapath.LabelRedirected {
				by[label] = n.Messages
			}
		}
		line("Passed", "%s", cmp.Or(reasons(by), "nothing"))
		line("Handshakes", "%s", cmp.Or(reasons(t.Counters.Connections), "none"))
		if refused := t.Events[datapath.EventSpliceRefused]; refused > 0 || r.Loaded.Guard != datapath.NoGuard {
			line("Splices", "%d refused", refused)
		}
		if refused := t.Events[datapath.EventULPRefused]; refused > 0 {
			line("kTLS", "%s refused", plural(refused, "attempt"))
		}
	}
	for _, s := range r.Elsewhere {
		line("Elsewhere", "%s", s)
	}
	for _, s := range r.Problems {
		line("Problem", "%s", s)
	}
	b.WriteString("\n")
	if len(r.Pods) == 0 {
		b.WriteString("No pods are known.\n")
		return b.String()
	}
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "POD\tSTATE\tCONNECTIONS\tREDIRECTED\tPASSED\tBYPASSED\tPLAIN BECAUSE")
	for _, p := range r.Pods {
		fmt.Fprintf(w, "%s\t%s\t%d\t%s\t%s\t%s\t%s\n", printable(p.Title()), p.State, p.Connections,
			size(p.Redirected.Bytes), size(p.Passed.Bytes), share(p), cmp.Or(printable(p.Reason), "-"))
	}
	w.Flush() // to memory
	return trimLines(b.String())
}

// printable keeps what others have named from moving the cursor or breaking lines.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r >= 0x7f && r < 0xa0 {
			return '?'
		}
		return r
	}, s)
}

// trimLines removes what tabwriter pads the last column with.
func trimLines(s string) string {
	lines := strings.Split(s, "\n")
	for i, l := range lines {
		lines[i] = strings.TrimRight(l, " ")
	}
	return strings.Join(lines, "\n")
}

func gate(l *plugin.LoadedReport) string {
	risks := ""
	if len(l.Risks) > 0 {
		risks = ", to pods that accept " + strings.Join(l.Risks, ", ")
	}
	switch {
	case !l.Open && !l.SameBuild:
		return "closed: the kernel has not been probed, or is not supported, or this build's programs could not replace the loaded ones"
	case !l.Open:
		return "closed: the kernel has not been probed, or is not supported"
	case l.SwitchedOff:
		return "switched off (`skipstack on` switches it on)"
	}
	if l.Guard != datapath.NoGuard {
		risks += ", splice(2) guarded by " + string(l.Guard)
	}
	return "open" + risks
}

func usages(m map[string]datapath.Usage) string {
	var parts []string
	for _, name := range slices.Sorted(maps.Keys(m)) {
		parts = append(parts, fmt.Sprintf("%s %d of %d", name, m[name].Entries, m[name].Max))
	}
	return strings.Join(parts, ", ")
}

// reasons lists what occurred, the most frequent first.
func reasons(by map[string]uint64) string {
	labels := slices.DeleteFunc(slices.Sorted(maps.Keys(by)), func(l string) bool { return by[l] == 0 })
	slices.SortStableFunc(labels, func(a, b string) int { return cmp.Compare(by[b], by[a]) })
	var parts []string
	for _, l := range labels {
		parts = append(parts, fmt.Sprintf("%s %d", l, by[l]))
	}
	return strings.Join(parts, ", ")
}

// size is a number of bytes for people, in decimal units.
func size(n uint64) string {
	if n < 1000 {
		return fmt.Sprintf("%d B", n)
	}
	f, unit := float64(n), -1
	for f >= 999.5 && unit < len(units)-1 {
		f /= 1000
		unit++
	}
	return fmt.Sprintf("%.3g %cB", f, units[unit])
}

const units = "kMGTPE"

// share is what the pod bypassed, if it has sent anything.
func share(p plugin.PodReport) string {
	if p.Redirected.Bytes+p.Passed.Bytes == 0 {
		return "-"
	}
	return percent(p.Bypassed)
}

func percent(share float64) string { return fmt.Sprintf("%.1f %%", 100*share) }

// shortest is the shortest interval of --watch: looking takes some 0.1 s.
const shortest = 200 * time.Millisecond

func (c *cli) connections() *cobra.Command {
	var (
		pod      string
		port     uint16
		watch    bool
		interval time.Duration
	)
	cmd := c.command("connections", "List the live connections between attached pods",
		`Two lines for each connection: the client's end, then the server's. Addresses are as that
end sees them, so that NAT shows. REDIRECTED and PASSED are bytes that the end has sent, UNREAD
those that it has not read yet. NEXT is what would become of a message sent now: redirected, or the
reason why TCP would carry it.

Only connections that the handshake has shown to be between two attached pods are
listed, and none where the datapath is not loaded, which is no error, as for status.
Listing them costs the traffic nothing. With --watch and --json, each look is one line.`, true,
		func(cmd *cobra.Command, conf plugin.Config, asJSON bool) error {
			filter := plugin.ConnectionFilter{Port: port}
			var err error
			if cmd.Flags().Changed("pod") {
				if filter.Namespace, filter.Pod, err = parsePod(pod); err != nil {
					return err
				}
			}
			if cmd.Flags().Changed("port") && port == 0 {
				return fmt.Errorf("--port 0 is no port; %w", errUsage)
			}
			if interval < shortest {
				return fmt.Errorf("--interval %v is shorter than %v; %w", interval, shortest, errUsage)
			}
			node := plugin.NewNode(c.deps)
			look := func(ctx context.Context) error {
				list, err := node.Connections(ctx, conf, filter)
				none := errors.Is(err, datapath.ErrNotLoaded)
				if none {
					list = []plugin.ConnectionReport{}
				}
				switch {
				case err != nil && !none:
					return err
				case none && !asJSON:
					return c.printf("No connections: %v.\n", datapath.ErrNotLoaded)
				case asJSON && watch:
					return json.NewEncoder(c.streams.Out).Encode(list)
				case asJSON:
					return c.printJSON(list)
				case watch && isTerminal(c.streams.Out):
					return c.printf("\x1b[H\x1b[2J%s", connectionsText(list))
				}
				return c.printf("%s", connectionsText(list))
			}
			if !watch {
				return look(cmd.Context())
			}
			return repeat(cmd.Context(), interval, look)
		})
	f := cmd.Flags()
	f.StringVar(&pod, "pod", "", "only connections of this pod, `NAMESPACE/NAME`")
	f.Uint16Var(&port, "port", 0, "only connections with this port at either end")
	f.BoolVar(&watch, "watch", false, "list again and again until interrupted")
	f.DurationVar(&interval, "interval", 2*time.Second, "time between two looks of --watch")
	return cmd
}

// parsePod reads NAMESPACE/NAME.
func parsePod(pod string) (namespace, name string, err error) {
	namespace, name, ok := strings.Cut(pod, "/")
	if !ok || namespace == "" || name == "" || strings.Contains(name, "/") {
		return "", "", fmt.Errorf("--pod %q is not NAMESPACE/NAME; %w", pod, errUsage)
	}
	return namespace, name, nil
}

// repeat runs f until ctx is done, which is no error.
func repeat(ctx context.Context, interval time.Duration, f func(context.Context) error) error {
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		if err := f(ctx); err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

func connectionsText(list []plugin.ConnectionReport) string {
	if len(list) == 0 {
		return "No connections.\n"
	}
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "AGE\tEND\tPOD\tLOCAL\tREMOTE\tREDIRECTED\tPASSED\tUNREAD\tNEXT")
	for _, c := range list {
		age := time.Duration(c.AgeSeconds * float64(time.Second)).Round(100 * time.Millisecond).String()
		for _, end := range []struct {
			name string
			*plugin.EndReport
		}{{"client", c.Client}, {"server", c.Server}} {
			if end.EndReport == nil {
				fmt.Fprintf(w, "%s\t%s\tclosed, or not recognised\n", age, end.name)
			} else {
				fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", age, end.name, printable(end.Pod), end.Local, end.Remote,
					size(end.Redirected.Bytes), size(end.Passed.Bytes), size(end.Unread), end.Next)
			}
			age = ""
		}
	}
	w.Flush() // to memory
	return trimLines(b.String())
}
