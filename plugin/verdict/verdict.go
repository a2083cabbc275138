// Package verdict finds out how this kernel behaves towards sockets in a
// sockhash, by trying. Version numbers say little: what matters here was broken,
// mended and broken again in stable series.
//
// [Run] loads a datapath of its own, attaches it to a scratch cgroup and lets a
// worker process, born in that cgroup and in a network namespace of its own, talk
// to itself over loopback. No socket, program or setting of the node is touched.
// The verdict is kept for this boot and this binary ([Verdict.Save], [Cached]).
package verdict

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/skipstack/skipstack/plugin/datapath"
)

// Level sums a verdict up.
type Level string

const (
	// Safe: an application cannot tell the difference, but for what the
	// documentation lists.
	Safe Level = "safe"
	// Risky: correct, but for the named risks.
	Risky Level = "risky"
	// Unsupported: not correct, or it could not be shown to be.
	Unsupported Level = "unsupported"
)

// Result is the outcome of one probe.
type Result string

const (
	OK    Result = "ok"
	NotOK Result = "not ok"
	// CouldNotTell counts as [NotOK].
	CouldNotTell Result = "could not tell"
)

// Probe is one question to the kernel and its answer.
type Probe struct {
	Name   string `json:"name"` // one of the Probe constants
	Result Result `json:"result"`
	Detail string `json:"detail"` // one line: why, and what it means to users
}

// Names of the probes.
const (
	ProbeLoad     = "load"     // the programs load
	ProbeRedirect = "redirect" // redirected bytes arrive
	ProbeOrder    = "order"    // in order, when TCP and redirecting take turns
	ProbeCharged  = "charged"  // the receiver pays for unread redirected bytes
	ProbeFIONREAD = "fionread" // ioctl(FIONREAD) counts all waiting bytes
	ProbeEpoll    = "epoll"    // waiting bytes wake their reader
	ProbeSplice   = "splice"   // splice(2) from accelerated sockets loses nothing
	ProbeMPTCP    = "mptcp"    // accept(2) on MPTCP listeners does not crash
)

// kinds lists the probes in the order in which they are shown, and what follows
// from one that is not ok.
var kinds = []struct {
	name     string
	fatal    bool          // the kernel is unsupported
	risk     datapath.Risk // 0: costs nothing
	concerns string        // see Concerns
}{
	{name: ProbeLoad, fatal: true, concerns: "all software: without it every connection is plain"},
	{name: ProbeRedirect, fatal: true, concerns: "all software: without it every connection is plain"},
	{name: ProbeOrder, fatal: true, concerns: "all software: without it every connection is plain"},
	{name: ProbeCharged, risk: datapath.RiskUncharged, concerns: "the whole node: a pod that does not read could fill its memory"},
	{name: ProbeFIONREAD, risk: datapath.RiskFIONREAD, concerns: "what asks FIONREAD before it reads: nginx, Java, .NET"},
	{name: ProbeEpoll, risk: datapath.RiskEpoll, concerns: "event loops: nginx, Envoy, Go, Node.js, Netty, Redis"},
	{name: ProbeSplice, risk: datapath.RiskSplice, concerns: "proxies that splice: HAProxy, Go's io.Copy between TCP connections; and kTLS"},
	{name: ProbeMPTCP, concerns: "MPTCP listeners, such as Go's by default: else they are plain"},
}

// Concerns says in one line which software a probe is about, "" for an unknown one.
func Concerns(probe string) string {
	for _, k := range kinds {
		if k.name == probe {
			return k.concerns
		}
	}
	return ""
}

var (
	// ErrNoVerdict is returned by [Cached] where this boot and binary have no
	// verdict that still holds.
	ErrNoVerdict = errors.New("no verdict on this kernel is known")
	// ErrPrivilege is returned by [Run] where the caller may not do what probing
	// takes. It says nothing about the kernel.
	ErrPrivilege = errors.New("probing needs root with CAP_BPF, CAP_NET_ADMIN, CAP_PERFMON and CAP_SYS_ADMIN")
)

// Times for which a verdict holds in which a probe could not tell. That may have
// been a moment's overload, but a node where it always is so must not be probed
// by each ADD.
const (
	recheckAfter = 10 * time.Minute // it costs a risk at most
	// retryAfter is for an inconclusive verdict, which keeps all pods plain.
	retryAfter = time.Minute
)

// Verdict is what is known of this kernel. As JSON it is an object with verdict,
// risks (names) and probes, among others.
type Verdict struct {
	Level  Level
	Risks  datapath.Risk
	Funnel bool // FIONREAD needs the sk_skb verdict program
	// MPTCPListeners tells that accept(2) on an MPTCP listener is safe when the
	// accepted socket is in a sockhash.
	MPTCPListeners bool
	// Guard is the form of the splice guard that works. Where none does, or none is
	// needed, it is [datapath.NoGuard]; probe splice tells which.
	Guard datapath.Guard
	// RingUntried tells that probe splice is ok without io_uring's having been tried,
	// from which a seccomp filter may have kept the process, as in a container.
	RingUntried bool
	Probes      []Probe   // each once, in a fixed order
	Kernel      string    // uname -r
	BootID      string    // of the boot that was probed
	Build       [16]byte  // identifies the binary that probed
	ProbedAt    time.Time // wall clock
}

// NodeSettings is the gate that the verdict asks for.
func (v *Verdict) NodeSettings() datapath.NodeSettings {
	return datapath.NodeSettings{
		Open:           v.Level != Unsupported,
		Risks:          v.Risks,
		Funnel:         v.Funnel,
		MPTCPListeners: v.MPTCPListeners,
		Guard:          v.Guard,
	}
}

// Inconclusive tells that the level is [Unsupported] only because a probe that
// decides on it could not tell, as happens on a busy machine. The kernel may well
// be supported, and probing again may show it. Such a verdict holds for a minute.
func (v *Verdict) Inconclusive() bool {
	inconclusive := false
	for _, p := range v.Probes {
		if !fatal(p.Name) {
			continue
		}
		switch p.Result {
		case NotOK:
			return false
		case CouldNotTell:
			inconclusive = true
		}
	}
	return inconclusive
}

// String is one line for people: the level, or that it is inconclusive, and why
// it is not [Safe].
func (v *Verdict) String() string {
	switch v.Level {
	case Risky:
		return fmt.Sprintf("%s: %s", v.Level, v.Risks)
	case Unsupported:
		level, decides := string(v.Level), NotOK
		if v.Inconclusive() {
			level, decides = "inconclusive", CouldNotTell
		}
		for i, k := range kinds {
			if k.fatal && v.Probes[i].Result == decides {
				return fmt.Sprintf("%s: %s: %s", level, k.name, v.Probes[i].Detail)
			}
		}
	}
	return string(v.Level)
}

// fatal tells if a kernel is unsupported where that probe is not ok.
func fatal(probe string) bool {
	for _, k := range kinds {
		if k.name == probe {
			return k.fatal
		}
	}
	return false
}

// conclude fills in what follows from the probes.
func (v *Verdict) conclude() {
	v.Level, v.Risks, v.MPTCPListeners = Safe, 0, false
	unsupported := false
	for i, k := range kinds {
		ok := v.Probes[i].Result == OK
		if k.name == ProbeMPTCP {
			v.MPTCPListeners = ok
		}
		if ok {
			continue
		}
		v.Risks |= k.risk
		unsupported = unsupported || k.fatal
	}
	if v.Risks != 0 {
		v.Level = Risky
	}
	if unsupported {
		v.Level = Unsupported
	}
}

// Due tells if it is time to probe again because a probe could not tell: after a
// minute if the verdict is inconclusive, else after ten. It never is where every
// probe could tell, or where one that is not ok decides alone. [Verdict.RingUntried]
// counts as what could not be told, unless a seccomp filter keeps this process from it, too.
func (v *Verdict) Due(now time.Time) bool {
	var after time.Duration
	couldNotTell := func(p Probe) bool { return p.Result == CouldNotTell }
	switch {
	case v.Inconclusive():
		after = retryAfter
	case v.Level != Unsupported && (slices.ContainsFunc(v.Probes, couldNotTell) || v.RingUntried && !filtered()):
		after = recheckAfter
	default:
		return false
	}
	age := now.Sub(v.ProbedAt)
	return age < 0 || age > after
}

// filtered tells if a seccomp filter is in force for this process: proc(5).
func filtered() bool {
	data, err := os.ReadFile("/proc/self/status")
	return err == nil && strings.Contains(string(data), "\nSeccomp:\t2\n")
}

// Recall puts what an earlier verdict of this boot and build could tell in the
// place of what v could not: the kernel has not changed, the machine was busy, or a
// seccomp filter in the way.
func (v *Verdict) Recall(earlier *Verdict) {
	for i, p := range v.Probes {
		if !v.tellsLessBy(i, earlier) {
			continue
		}
		v.Probes[i] = earlier.Probes[i]
		switch p.Name {
		case ProbeFIONREAD:
			v.Funnel = earlier.Funnel
		case ProbeSplice:
			v.Guard, v.RingUntried = earlier.Guard, earlier.RingUntried
		}
	}
	v.conclude()
}

// TellsLess says whether a probe of v could not tell, or not all, that one of an earlier
// verdict could.
func (v *Verdict) TellsLess(earlier *Verdict) bool {
	for i := range v.Probes {
		if v.tellsLessBy(i, earlier) {
			return true
		}
	}
	return false
}

func (v *Verdict) tellsLessBy(probe int, earlier *Verdict) bool {
	p, was := v.Probes[probe], earlier.Probes[probe]
	inPart := p.Name == ProbeSplice && v.RingUntried && !earlier.RingUntried
	return (p.Result == CouldNotTell || inPart) && was.Result != CouldNotTell
}

// GuardFailed records that the guard of the verdict could not be attached after
// all: what that came of, the next look tells.
func (v *Verdict) GuardFailed(err error, now time.Time) {
	v.Guard, v.RingUntried = datapath.NoGuard, false
	v.set(ProbeSplice, CouldNotTell, noGuard+" (no splice guard: "+guardTrouble(err)+")")
	v.ProbedAt = now.UTC().Truncate(time.Second)
	v.conclude()
}
