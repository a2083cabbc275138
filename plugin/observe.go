package plugin

import (
	"cmp"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/skipstack/skipstack/plugin/attachment"
	"github.com/skipstack/skipstack/plugin/datapath"
)

// DefaultCNICacheDir is where libcni keeps what it needs for a DEL: containerd and
// CRI-O use it unless configured otherwise.
const DefaultCNICacheDir = "/var/lib/cni"

// NotAttached is the state of a pod that runs without an attachment; see
// [PodReport].
const NotAttached = "not attached"

// Why a pod has no record that holds.
const (
	reasonBefore = "started before install"
	reasonReboot = "its ADD was before the node was booted"
	reasonLost   = "no record of it: its ADD has failed, or the run directory was cleared"
)

// Report is what [Node.Status] knows of the node. As JSON it is what
// `skipstack status --json` prints.
type Report struct {
	Build string `json:"build"` // of this binary's programs
	// Loaded is nil where the datapath is not loaded, and NotLoaded says why.
	Loaded    *LoadedReport `json:"loaded"`
	NotLoaded string        `json:"notLoaded,omitempty"`
	Verdict   string        `json:"verdict"` // one line
	Probes    any           `json:"probes,omitempty"`
	// Due tells that a probe could not tell, and that it is time to try it again.
	Due    bool        `json:"due,omitempty"`
	Totals Totals      `json:"totals"`
	Pods   []PodReport `json:"pods"`
	// Elsewhere says which pods this process cannot tell about, and how to ask.
	Elsewhere []string `json:"elsewhere,omitempty"`
	// Problems are what could not be read.
	Problems []string `json:"problems,omitempty"`
}

// LoadedReport describes the loaded datapath.
type LoadedReport struct {
	Build          string                    `json:"build"`
	SameBuild      bool                      `json:"sameBuild"` // as this binary's
	MaxConnections uint32                    `json:"maxConnections"`
	Open           bool                      `json:"open"` // the verdict allows acceleration
	SwitchedOff    bool                      `json:"switchedOff"`
	Risks          []string                  `json:"risks"`
	Funnel         bool                      `json:"funnel"`
	Guard          datapath.Guard            `json:"guard"` // of splice(2), attached while pods are; "" for none
	Maps           map[string]datapath.Usage `json:"maps"`
}

// Totals are the node's, since the datapath was loaded.
type Totals struct {
	Pods        map[string]int `json:"pods"`        // by state
	Connections int            `json:"connections"` // live and accelerated
	datapath.Counters
	// bypassed is the share of bytes that skipped the stack, of those sent on
	// connections between attached pods of this node; 0 to 1.
	Bypassed float64 `json:"bypassed"`
}

// PodReport is what is known of a pod.
type PodReport struct {
	Namespace  string   `json:"namespace,omitempty"`
	Name       string   `json:"name,omitempty"`
	UID        string   `json:"uid,omitempty"`
	Containers []string `json:"containers"` // sandboxes, as CNI names them
	Networks   []string `json:"networks"`
	// State is "attached", "attaching", "skipped" or "not attached".
	State string `json:"state"`
	// Reason says why its connections are plain, "" where they are not.
	Reason      string `json:"reason,omitempty"`
	CgroupID    uint64 `json:"cgroupID,omitempty"`
	Connections uint64 `json:"connections"` // live and accelerated
	// What the pod has sent on connections to attached pods of this node.
	Redirected datapath.Count    `json:"redirected"`
	Passed     datapath.Count    `json:"passed"`
	PassedBy   map[string]uint64 `json:"passedBy"` // messages, by reason
	Bypassed   float64           `json:"bypassed"`
}

// Title is the pod's name for people.
func (p PodReport) Title() string {
	if p.Name == "" {
		return strings.Join(p.Containers, ",")
	}
	return p.Namespace + "/" + p.Name
}

// ConnectionReport is a live connection of two pods. As JSON it is an element of
// what `skipstack connections --json` prints.
type ConnectionReport struct {
	Client     *EndReport `json:"client"` // nil: closed already
	Server     *EndReport `json:"server"` // nil: closed already, or not recognised
	AgeSeconds float64    `json:"ageSeconds"`
	Mode       string     `json:"mode"` // "redirect" or "plain"
}

// EndReport is one end of a connection.
type EndReport struct {
	Pod        string         `json:"pod"`
	CgroupID   uint64         `json:"cgroupID"`
	Local      string         `json:"local"` // as this end sees it
	Remote     string         `json:"remote"`
	Redirected datapath.Count `json:"redirected"` // sent by this end
	Passed     datapath.Count `json:"passed"`
	// PassedBy has the reasons that occurred, in messages.
	PassedBy map[string]uint64 `json:"passedBy,omitempty"`
	Unread   uint64            `json:"unread"` // bytes that wait to be read by this end
	// Next is what would become of a message that this end sends now.
	Next string `json:"next"`

	ports [2]uint16
}

// bypassed is the share of bytes that were redirected, 0 where none were sent.
func bypassed(redirected, passed datapath.Count) float64 {
	all := redirected.Bytes + passed.Bytes
	if all == 0 {
		return 0
	}
	return float64(redirected.Bytes) / float64(all)
}

// Status looks at the node. It changes nothing, and needs neither the lock nor
// the datapath. cniCacheDir is where the runtime caches the results of CNI; pods
// that are there and have no attachment are listed too.
//
// What cannot be read is in the report's Problems.
func (n *Node) Status(conf Config, cniCacheDir string) Report {
	r := Report{Build: hexBuild(datapath.Build()), Pods: []PodReport{}, Totals: Totals{Pods: map[string]int{}}}
	problem := func(err error) {
		if err != nil {
			r.Problems = append(r.Problems, err.Error())
		}
	}
	switch v, err := n.Verdicts.Cached(conf.RunDir); {
	case err == nil:
		r.Verdict, r.Probes, r.Due = v.Summary, v.Document, v.Due
		if v.Due {
			r.Verdict += " (a probe could not tell; the next pod has it tried again)"
		}
	case errors.Is(err, ErrNoVerdict):
		r.Verdict = "unknown: " + ErrNoVerdict.Error() // the rest says it again
	default:
		r.Verdict = "unknown: " + err.Error()
	}
	seen, err := n.observe(conf)
	if err != nil {
		r.NotLoaded = err.Error()
	} else {
		r.Loaded = loadedReport(seen)
		r.Totals.Counters = seen.Counters
		r.Totals.Connections = accelerated(seen)
		r.Totals.Bypassed = bypassed(seen.Counters.Redirected(), seen.Counters.Passed())
	}
	records, err := attachment.NewStore(conf.RunDir).List()
	problem(err)
	r.Elsewhere = n.elsewhere(conf, records)
	r.Pods = podReports(conf, records, seen)
	running, err := cachedAttachments(cniCacheDir)
	problem(err)
	r.Pods = append(r.Pods, notAttached(running, records)...)
	slices.SortStableFunc(r.Pods, func(a, b PodReport) int { return cmp.Compare(a.Title(), b.Title()) })
	for _, p := range r.Pods {
		r.Totals.Pods[p.State]++
	}
	return r
}

// observe returns nil and an error where the datapath cannot be looked at.
func (n *Node) observe(conf Config) (*datapath.Observation, error) {
	set, err := n.Datapath.Open(conf.BPFFS)
	if err != nil {
		return nil, err
	}
	defer set.Close()
	o, err := set.Observe()
	if err != nil {
		return nil, err
	}
	return &o, nil
}

func hexBuild(b [16]byte) string { return hex.EncodeToString(b[:]) }

func accelerated(o *datapath.Observation) (n int) {
	for _, c := range o.Connections {
		if c.Accelerated() {
			n++
		}
	}
	return n
}

func loadedReport(o *datapath.Observation) *LoadedReport {
	return &LoadedReport{
		Build:          hexBuild(o.Build),
		SameBuild:      o.Build == datapath.Build(),
		MaxConnections: o.MaxConnections,
		Open:           o.Node.Open,
		SwitchedOff:    o.Node.SwitchedOff,
		Risks:          o.Node.Risks.Names(),
		Funnel:         o.Node.Funnel,
		Guard:          o.Node.Guard,
		Maps:           map[string]datapath.Usage{"socks": o.Sockets, "pods": o.Attached},
	}
}

// podReports makes one report of each pod's records.
func podReports(conf Config, records []attachment.Record, seen *datapath.Observation) []PodReport {
	type identity struct{ namespace, name, uid, container string }
	identify := func(r attachment.Record) identity {
		if r.PodName == "" {
			return identity{r.PodNamespace, "", r.PodUID, r.ContainerID}
		}
		return identity{r.PodNamespace, r.PodName, r.PodUID, ""}
	}
	ofThisBoot := map[identity]bool{}
	for _, r := range records {
		ofThisBoot[identify(r)] = ofThisBoot[identify(r)] || !r.Stale
	}
	byPod := map[identity]*PodReport{}
	var order []*PodReport
	for _, r := range records {
		id := identify(r)
		if r.Stale && ofThisBoot[id] {
			continue // its sandbox from then
		}
		p := byPod[id]
		if p == nil {
			p = &PodReport{Namespace: r.PodNamespace, Name: r.PodName, UID: r.PodUID, PassedBy: map[string]uint64{}}
			byPod[id] = p
			order = append(order, p)
		}
		p.add(conf, r, seen)
	}
	all := make([]PodReport, 0, len(order))
	for _, p := range order {
		slices.Sort(p.Networks)
		all = append(all, *p)
	}
	return all
}

// add adds an attachment. Those of one pod share its cgroup, and its connections.
func (p *PodReport) add(conf Config, r attachment.Record, seen *datapath.Observation) {
	if !slices.Contains(p.Containers, r.ContainerID) {
		p.Containers = append(p.Containers, r.ContainerID)
	}
	p.Networks = append(p.Networks, r.Network+"/"+r.IfName)
	if r.Stale {
		p.State, p.Reason = NotAttached, reasonReboot
		return
	}
	known := p.CgroupID
	if p.State == "" || p.State == string(attachment.Skipped) && wants(r) {
		p.State, p.Reason, p.CgroupID = string(r.Status), r.Reason, r.CgroupID
	}
	if !wants(r) || r.CgroupID == known || seen == nil || !here(conf, r) {
		return
	}
	counters, attached := seen.Pods[r.CgroupID]
	if !attached {
		p.Reason = "its link is gone"
		return
	}
	p.Connections += counters.Accelerated
	p.Redirected = p.Redirected.Plus(counters.Redirected)
	p.Passed = p.Passed.Plus(counters.Passed)
	for label, n := range counters.PassedBy {
		p.PassedBy[label] += n
	}
	p.Bypassed = bypassed(p.Redirected, p.Passed)
	settings, set := seen.Settings[r.CgroupID]
	switch {
	case !set:
		p.Reason = "it has no settings yet"
	case !seen.Node.Open:
		p.Reason = "the kernel has not been probed, or is not supported"
	default:
		p.Reason = whyPlain(seen.Node, settings)
	}
}

// here says whether the record's link is in the configured BPF file system, as
// far as its path tells.
func here(conf Config, r attachment.Record) bool {
	bpffs := wishOf(r).BPFFS
	return bpffs == "" || bpffs == conf.BPFFS
}

// elsewhere names the BPF file systems of attachments that are not the configured
// one as this process sees it.
func (n *Node) elsewhere(conf Config, records []attachment.Record) []string {
	dev, mountNS, err := n.Datapath.BPFFSIdentity(conf.BPFFS)
	type place struct {
		path         string
		dev, mountNS uint64
	}
	pods := map[place]int{}
	var places []place
	for _, r := range records {
		if !wants(r) {
			continue
		}
		at := place{path: cmp.Or(wishOf(r).BPFFS, conf.BPFFS)}
		if err == nil && r.BPFFSDev != 0 && r.BPFFSDev != dev && r.MountNS != mountNS {
			at.dev, at.mountNS = r.BPFFSDev, r.MountNS
		}
		if at.path == conf.BPFFS && at.dev == 0 {
			continue
		}
		if pods[at] == 0 {
			places = append(places, at)
		}
		pods[at]++
	}
	var out []string
	for _, at := range places {
		line := fmt.Sprintf("%d attachments are at the BPF file system %s", pods[at], at.path)
		if at.mountNS == 0 {
			out = append(out, line+": ask with --bpffs "+at.path)
			continue
		}
		line += fmt.Sprintf(" of another mount namespace (%d)", at.mountNS)
		if pid, ok := processIn(n.proc, at.mountNS); ok {
			line += fmt.Sprintf(": ask with nsenter -t %d -m skipstack status", pid)
		} else {
			line += ", which no process is in any more"
		}
		out = append(out, line)
	}
	return out
}

// processIn finds the process with the lowest id in a mount namespace.
func processIn(proc string, mountNS uint64) (pid int, ok bool) {
	entries, err := os.ReadDir(proc)
	if err != nil {
		return 0, false
	}
	for _, e := range entries {
		id, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		info, err := os.Stat(filepath.Join(proc, e.Name(), "ns/mnt"))
		if err != nil {
			continue // it has ended, or is not ours to look at
		}
		if st, isStat := info.Sys().(*syscall.Stat_t); isStat && st.Ino == mountNS && (!ok || id < pid) {
			pid, ok = id, true
		}
	}
	return pid, ok
}

// notAttached reports pods that run but have no record.
func notAttached(running []cachedAttachment, records []attachment.Record) []PodReport {
	recorded := map[string]bool{}
	for _, r := range records {
		recorded[r.ContainerID] = true
	}
	byContainer := map[string]*PodReport{}
	var order []*PodReport
	for _, c := range running {
		if recorded[c.container] {
			continue
		}
		p := byContainer[c.container]
		if p == nil {
			p = &PodReport{Namespace: c.pod.namespace, Name: c.pod.name, UID: c.pod.uid, Containers: []string{c.container},
				State: NotAttached, Reason: reasonBefore, PassedBy: map[string]uint64{}}
			byContainer[c.container] = p
			order = append(order, p)
		}
		p.Networks = append(p.Networks, c.network+"/"+c.ifName)
		if c.chained {
			p.Reason = reasonLost
		}
	}
	all := make([]PodReport, 0, len(order))
	for _, p := range order {
		all = append(all, *p)
	}
	return all
}

// ConnectionFilter says which connections [Node.Connections] lists: those that
// meet every condition that is set.
type ConnectionFilter struct {
	Namespace, Pod string // of either end
	Port           uint16 // of either end, as either sees it
}

// Connections lists the live connections between attached pods of this node,
// oldest first. The error wraps [datapath.ErrNotLoaded] where the datapath is not
// loaded.
func (n *Node) Connections(ctx context.Context, conf Config, f ConnectionFilter) ([]ConnectionReport, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	seen, err := n.observe(conf)
	if err != nil {
		return nil, err
	}
	records, err := attachment.NewStore(conf.RunDir).List()
	if err != nil && !errors.Is(err, attachment.ErrCorrupt) {
		return nil, err // a damaged record costs no more than a pod's name
	}
	names := map[uint64]string{}
	for _, r := range records {
		if r.CgroupID != 0 && here(conf, r) {
			names[r.CgroupID] = podName(r)
		}
	}
	list := []ConnectionReport{}
	for _, c := range seen.Connections {
		report := ConnectionReport{
			Client:     endReport(c.Client, names),
			Server:     endReport(c.Server, names),
			AgeSeconds: c.Age().Seconds(),
			Mode:       string(datapath.ModePlain),
		}
		if c.Accelerated() {
			report.Mode = string(datapath.ModeRedirect)
		}
		if f.match(report) {
			list = append(list, report)
		}
	}
	return list, nil
}

func endReport(k *datapath.Socket, names map[uint64]string) *EndReport {
	if k == nil {
		return nil
	}
	by := map[string]uint64{}
	for label, n := range k.PassedBy {
		if n > 0 {
			by[label] = n
		}
	}
	return &EndReport{
		Pod:        cmp.Or(names[k.Pod], fmt.Sprintf("cgroup %d", k.Pod)),
		CgroupID:   k.Pod,
		Local:      k.Local.String(),
		Remote:     k.Remote.String(),
		Redirected: k.Redirected,
		Passed:     k.Passed,
		PassedBy:   by,
		Unread:     k.Unread,
		Next:       k.Next,
		ports:      [2]uint16{k.Local.Port(), k.Remote.Port()},
	}
}

func (f ConnectionFilter) match(c ConnectionReport) bool {
	either := func(cond func(*EndReport) bool) bool {
		return c.Client != nil && cond(c.Client) || c.Server != nil && cond(c.Server)
	}
	if f.Pod != "" && !either(func(e *EndReport) bool { return e.Pod == f.Namespace+"/"+f.Pod }) {
		return false
	}
	return f.Port == 0 || either(func(e *EndReport) bool { return slices.Contains(e.ports[:], f.Port) })
}
