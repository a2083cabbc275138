package doctor

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/skipstack/skipstack/plugin"
	"github.com/skipstack/skipstack/plugin/datapath"
	"github.com/skipstack/skipstack/plugin/verdict"
)

// width of the human report, in columns.
const width = 100

// Print writes the report for people.
func (r *Report) Print(w io.Writer) error {
	p := &page{}
	p.head("Verdict: %s", r.headline())
	p.line("kernel %s%s", r.Verdict.Kernel, r.took())
	if r.Stored {
		p.line("stored%s", r.goesBy())
	} else if r.ProbeError == "" {
		p.line("not stored for ADD: %s", r.NotStored)
	}

	p.head("The kernel, as far as sockets in a sockhash go")
	if r.ProbeError != "" {
		p.row("all probes", string(verdict.CouldNotTell), "not tried")
	}
	for _, probe := range r.Verdict.Probes {
		if r.ProbeError != "" {
			break
		}
		p.probe(probe)
		if probe.Result == verdict.CouldNotTell {
			p.row("", "", "counts as not ok and concerns "+verdict.Concerns(probe.Name))
		}
	}
	p.head("The node")
	for _, check := range r.Node {
		p.probe(check)
	}
	p.head("Other software's BPF programs on TCP sockets")
	r.printOthers(p)
	p.head("Pods (%s: mode %s, onError %s, acceptRisks %s)", r.Conflist.name(), r.Config.Mode, r.Config.OnError, list(r.Config.AcceptRisks.Names()))
	p.outlook("without annotations", r.Pods)
	p.outlook(`skipstack/mode: "on"`, r.Asking)
	for _, note := range r.Notes {
		p.row("", "", note)
	}
	p.head("Kernel memory")
	if r.Memory != nil {
		m := r.Memory
		p.wide("maps and programs", "%s, whether or not there are connections", size(m.Maps+m.Programs))
		p.wide("each connection", "%s beyond what TCP takes, as measured with %d", size(m.Connection), m.Measured)
		p.wide(fmt.Sprintf("with %d", m.MaxConnections), "%s at most (maxConnections); unread bytes are charged to their receivers, what queued messages cost beyond them is bounded by tcp_mem", size(m.Maximum))
	} else {
		why := r.MemoryError
		if why == "" {
			why = "the kernel is not supported, or was not probed"
		}
		p.wide("not measured", "%s", why)
	}
	_, err := io.WriteString(w, p.String())
	return err
}

// goesBy says who goes by a verdict that is stored.
func (r *Report) goesBy() string {
	switch {
	case !r.Standing.Loaded || !r.Standing.Node.Open:
		return ": pods that start from now on go by it"
	case r.Update == plugin.UpToDate:
		return ": the loaded datapath goes by it"
	case r.Update == plugin.UpdateByADD:
		return ": from the next pod's ADD on, the loaded datapath goes by it"
	}
	return ", but the loaded datapath does not go by it: see Pods"
}

// headline is the verdict, and what keeps it from being one.
func (r *Report) headline() string {
	if r.Lacks != "" {
		return "unsupported: " + r.Lacks
	}
	if r.ProbeError != "" {
		return "could not tell: " + r.ProbeError
	}
	return r.Verdict.String()
}

func (r *Report) took() string {
	if r.ProbeError != "" {
		return ""
	}
	return fmt.Sprintf(", probed in %.1f s", r.Took.Seconds())
}

func list(names []string) string {
	if len(names) == 0 {
		return "none"
	}
	return strings.Join(names, ", ")
}

func (r *Report) printOthers(p *page) {
	for _, o := range r.Others {
		result := string(verdict.OK)
		conflict := "no conflict"
		if o.Conflict != "" {
			result, conflict = string(verdict.NotOK), o.Conflict
		}
		p.row(o.Type, result, r.about(o)+": "+conflict)
	}
	switch {
	case r.OthersError != "":
		p.row("", string(verdict.CouldNotTell), "there may be others: "+r.OthersError)
	case len(r.Others) == 0:
		p.row("none", string(verdict.OK), "no sock_ops program, and no program of a sockmap, but skipstack's own")
	}
}

// about names a program and where it is attached.
func (r *Report) about(o verdict.Other) string {
	what := fmt.Sprintf("%s (id %d", printable(o.Program), o.ProgramID)
	if o.Product != "" {
		what += ", " + o.Product
	}
	what += ")"
	switch {
	case o.Cgroup != "":
		what += fmt.Sprintf(" on cgroup %s (%s)", printable(o.Cgroup), o.Sharing)
	case o.Map != "":
		what += fmt.Sprintf(" on sockmap %s (id %d)", printable(o.Map), o.MapID)
	}
	if len(o.Processes) > 0 {
		what += " of " + printable(strings.Join(o.Processes, ", "))
	}
	return what
}

// size is a number of bytes.
func size(n uint64) string {
	for _, u := range []struct {
		bytes uint64
		name  string
	}{{1 << 30, "GiB"}, {1 << 20, "MiB"}, {1 << 10, "KiB"}} {
		if n >= u.bytes {
			return fmt.Sprintf("%.1f %s", float64(n)/float64(u.bytes), u.name)
		}
	}
	return fmt.Sprintf("%d bytes", n)
}

// page lays a report out.
type page struct{ strings.Builder }

func (p *page) head(format string, args ...any) {
	if p.Len() > 0 {
		p.WriteString("\n")
	}
	p.wrap("", "  ", fmt.Sprintf(format, args...))
}

func (p *page) line(format string, args ...any) {
	p.wrap("  ", "  ", fmt.Sprintf(format, args...))
}

func (p *page) row(name, result, detail string) {
	p.wrap(fmt.Sprintf("  %-11s %-15s ", name, result), strings.Repeat(" ", 30), detail)
}

func (p *page) probe(v verdict.Probe) { p.row(v.Name, string(v.Result), v.Detail) }

func (p *page) wide(name, format string, args ...any) {
	p.wrap(fmt.Sprintf("  %-27s ", name), strings.Repeat(" ", 30), fmt.Sprintf(format, args...))
}

func (p *page) outlook(who string, o plugin.Outlook) {
	what := string(o.Outcome)
	if o.Outcome == plugin.Refused {
		what = "do not start"
	}
	if o.Why != "" {
		what += ": " + o.Why
	}
	p.wide(who, "%s", what)
}

// wrap breaks text at spaces; a word that is too long has a line of its own.
func (p *page) wrap(first, rest, text string) {
	line := first
	empty := true
	for _, word := range strings.Fields(text) {
		if !empty && len([]rune(line))+1+len([]rune(word)) > width {
			p.WriteString(strings.TrimRight(line, " ") + "\n")
			line, empty = rest, true
		}
		if !empty {
			line += " "
		}
		line += word
		empty = false
	}
	p.WriteString(strings.TrimRight(line, " ") + "\n")
}

// MarshalJSON implements [json.Marshaler].
func (r *Report) MarshalJSON() ([]byte, error) {
	type outlook struct {
		Path        string         `json:"path,omitempty"` // "": defaults
		Used        string         `json:"used,omitempty"` // by the container runtime
		Mode        plugin.Mode    `json:"mode"`
		OnError     plugin.OnError `json:"onError"`
		AcceptRisks []string       `json:"acceptRisks"`
		Pods        plugin.Outlook `json:"pods"`   // without annotations
		Asking      plugin.Outlook `json:"asking"` // with skipstack/mode: "on"
		Notes       []string       `json:"notes"`
	}
	type loaded struct {
		Loaded         bool           `json:"loaded"`
		SameBuild      bool           `json:"sameBuild"` // as this doctor's
		Open           bool           `json:"open"`
		SwitchedOff    bool           `json:"switchedOff"`
		Risks          []string       `json:"risks"`
		Guard          datapath.Guard `json:"guard"`
		Funnel         bool           `json:"funnel"`
		MPTCPListeners bool           `json:"mptcpListeners"`
		MaxConnections uint32         `json:"maxConnections"`
		// In what it does not go by the verdict, and what makes it, if that is stored.
		Differs []string      `json:"differs"`
		Update  plugin.Update `json:"update"`
	}
	probes := make([]verdict.Probe, len(r.Verdict.Probes))
	for i, probe := range r.Verdict.Probes {
		if probe.Result == verdict.CouldNotTell {
			probe.Detail += "; counts as not ok and concerns " + verdict.Concerns(probe.Name)
		}
		probes[i] = probe
	}
	others, notes, differs, node := r.Others, r.Notes, r.Differs, r.Standing.Node
	if differs == nil {
		differs = []string{}
	}
	if others == nil {
		others = []verdict.Other{}
	}
	if notes == nil {
		notes = []string{}
	}
	level, inconclusive := r.Verdict.Level, r.ProbeError != "" || r.Verdict.Inconclusive()
	if r.Lacks != "" {
		level, inconclusive = verdict.Unsupported, false
	}
	return json.Marshal(struct {
		Verdict      verdict.Level   `json:"verdict"`
		Risks        []string        `json:"risks"`
		Probes       []verdict.Probe `json:"probes"`
		Inconclusive bool            `json:"inconclusive"`    // the verdict counts what could not be told as not ok
		Lacks        string          `json:"lacks,omitempty"` // why the verdict is unsupported whatever the kernel does
		Error        string          `json:"error,omitempty"`
		Kernel       string          `json:"kernel"`
		Guard        datapath.Guard  `json:"guard"` // form of the splice guard that works
		Took         float64         `json:"tookSeconds"`
		ProbedAt     time.Time       `json:"probedAt"`
		Stored       bool            `json:"stored"`
		NotStored    string          `json:"notStored,omitempty"`
		Node         []verdict.Probe `json:"node"`
		Others       []verdict.Other `json:"others"`
		OthersError  string          `json:"othersError,omitempty"`
		Outlook      outlook         `json:"outlook"`
		Datapath     loaded          `json:"datapath"`
		Memory       *verdict.Memory `json:"memory"`
		MemoryError  string          `json:"memoryError,omitempty"`
	}{
		level, r.Verdict.Risks.Names(), probes, inconclusive, r.Lacks, r.ProbeError,
		r.Verdict.Kernel, r.Verdict.Guard, r.Took.Seconds(), r.Verdict.ProbedAt, r.Stored, r.NotStored,
		r.Node, others, r.OthersError,
		outlook{r.Conflist.Path, r.Conflist.Used, r.Config.Mode, r.Config.OnError, r.Config.AcceptRisks.Names(), r.Pods, r.Asking, notes},
		loaded{r.Standing.Loaded, r.Standing.SameBuild, node.Open, node.SwitchedOff, node.Risks.Names(), node.Guard,
			node.Funnel, node.MPTCPListeners, r.Standing.MaxConnections, differs, r.Update},
		r.Memory, r.MemoryError,
	})
}
