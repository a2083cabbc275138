package plugin

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/skipstack/skipstack/plugin/datapath"
)

// ErrConfig is wrapped by the errors of [ParseConfig] and [Validate]: a key of
// skipstack's own is unknown, given twice, or has a value it cannot have.
var ErrConfig = errors.New("invalid configuration")

// Defaults of the configuration. The directories are those of a stock node.
const (
	DefaultBPFFS          = "/sys/fs/bpf"
	DefaultRunDir         = "/run/skipstack"
	DefaultUnreadLimit    = 16 << 20
	DefaultMaxConnections = 262144
)

// Bounds of the two sizes, inclusive.
const (
	MinUnreadLimit    = 4 << 10
	MaxUnreadLimit    = 1 << 30
	MinMaxConnections = 1
	MaxMaxConnections = 4 << 20
)

// Mode says which pods are accelerated.
type Mode string

const (
	ModeAuto Mode = "auto" // as far as the kernel's verdict allows
	ModeOn   Mode = "on"   // every pod, whatever the risks
	ModeOff  Mode = "off"  // none
)

// OnError says what becomes of a pod that cannot be accelerated.
type OnError string

const (
	OnErrorPlain OnError = "plain" // it starts, on plain TCP
	OnErrorFail  OnError = "fail"  // its ADD fails
)

// SpliceGuard says whether splice(2) on accelerated connections is guarded.
type SpliceGuard string

const (
	SpliceGuardAuto SpliceGuard = "auto" // where the kernel lets a guard attach
	SpliceGuardOff  SpliceGuard = "off"  // never; leaves the risk "splice"
)

// Config is the part of the plugin's configuration that is skipstack's own.
type Config struct {
	Mode           Mode
	OnError        OnError
	AcceptRisks    datapath.Risk
	ExcludePorts   []datapath.PortRange // sorted, none overlaps another
	UnreadLimit    uint32               // bytes
	MaxConnections uint32
	SpliceGuard    SpliceGuard
	LogFile        string // empty: standard error
	LogLevel       string // debug, info, warn, error
	BPFFS          string
	RunDir         string
	CgroupRoot     string // empty: found by its file-system type
}

// DefaultConfig returns what holds where the configuration says nothing.
func DefaultConfig() Config {
	return Config{
		Mode:           ModeAuto,
		OnError:        OnErrorPlain,
		UnreadLimit:    DefaultUnreadLimit,
		MaxConnections: DefaultMaxConnections,
		SpliceGuard:    SpliceGuardAuto,
		LogLevel:       "info",
		BPFFS:          DefaultBPFFS,
		RunDir:         DefaultRunDir,
	}
}

// Validate reports own keys of a plugin's entry in a conflist, or of the
// configuration a runtime makes of it, that skipstack would not take: the first
// five, and how many more there are. The error
// wraps [ErrConfig] unless raw is not a JSON object. ADD itself is lenient where
// onError is "plain": who edits a configuration should hear of the mistake, and
// no pod should pay for it.
func Validate(raw []byte) error {
	_, err := ParseConfig(raw)
	return err
}

// ParseConfig reads one plugin's configuration strictly. Keys that belong to CNI,
// that a runtime or Multus injects, or that begin with an underscore pass.
//
// With an error that wraps [ErrConfig] the returned Config is still usable: it
// holds every key that was valid, and defaults for the rest.
func ParseConfig(raw []byte) (Config, error) {
	members, err := splitObject(raw)
	if err != nil {
		return DefaultConfig(), err
	}
	return parseMembers(members)
}

// member is one key of a JSON object with its value as it stands.
type member struct {
	key   string
	value json.RawMessage
}

// splitObject returns the members of the one JSON object in raw, in order and
// with duplicates, which encoding/json would drop silently.
func splitObject(raw []byte) ([]member, error) {
	// Unlike a Decoder, Unmarshal looks at all of raw.
	var whole json.RawMessage
	if err := json.Unmarshal(raw, &whole); err != nil {
		return nil, fmt.Errorf("decode JSON: %w", err)
	}
	dec := json.NewDecoder(bytes.NewReader(raw))
	tok, err := dec.Token()
	if err != nil {
		return nil, fmt.Errorf("decode JSON: %w", err)
	}
	if tok != json.Delim('{') {
		return nil, errors.New("decode JSON: not an object")
	}
	var members []member
	for dec.More() {
		tok, err := dec.Token()
		if err != nil {
			return nil, fmt.Errorf("decode JSON: %w", err)
		}
		m := member{key: tok.(string)} // a key, because More said so
		if err := dec.Decode(&m.value); err != nil {
			return nil, fmt.Errorf("decode JSON: %w", err)
		}
		members = append(members, m)
	}
	return members, nil
}

// lookup returns the last value of key, which is the one encoding/json takes,
// or nil where the key is absent or null.
func lookup(members []member, key string) json.RawMessage {
	for _, m := range slices.Backward(members) {
		if m.key == key {
			if string(m.value) == "null" {
				return nil
			}
			return m.value
		}
	}
	return nil
}

// foreign says whether a key is somebody else's to define.
//
// CNI specification 1.1: cniVersion, name, type, prevResult, capabilities,
// runtimeConfig, args, ipam, dns, and everything below cni.dev/. Multus adds
// deviceID and pciBusID to every plugin of a delegate that has a device, and its
// cni-args to args (pkg/types/conf.go, addDeviceIDInConfList, injectCNIArgs).
func foreign(key string) bool {
	switch key {
	case "cniVersion", "name", "type", "prevResult", "capabilities", "runtimeConfig",
		"args", "ipam", "dns", "deviceID", "pciBusID":
		return true
	}
	return strings.HasPrefix(key, "_") || strings.HasPrefix(key, "cni.dev/")
}

// Keys returns the names of skipstack's own keys, in the order of the reference in
// conf/.
func Keys() []string {
	return []string{
		"mode", "onError", "acceptRisks", "excludePorts", "unreadLimit", "maxConnections",
		"spliceGuard", "logFile", "logLevel", "bpffs", "runDir", "cgroupRoot",
	}
}

func parseMembers(members []member) (Config, error) {
	conf := DefaultConfig()
	var problems []string
	seen := map[string]bool{}
	for _, m := range members {
		if foreign(m.key) {
			continue
		}
		if seen[m.key] {
			problems = append(problems, fmt.Sprintf("key %s is given twice", quote(m.key)))
			continue
		}
		seen[m.key] = true
		if err := conf.set(m.key, m.value); err != nil {
			problems = append(problems, err.Error())
		}
	}
	if len(problems) > 0 {
		return conf, fmt.Errorf("%w: %s", ErrConfig, summarize(problems))
	}
	return conf, nil
}

// summarize makes one line of the first problems.
func summarize(problems []string) string {
	const most = 5
	if len(problems) <= most {
		return strings.Join(problems, "; ")
	}
	return fmt.Sprintf("%s; and %d more", strings.Join(problems[:most], "; "), len(problems)-most)
}

// set takes one own key; on error the field keeps its default.
func (c *Config) set(key string, value json.RawMessage) error {
	var err error
	switch key {
	case "mode":
		err = setOneOf(&c.Mode, value, ModeAuto, ModeOn, ModeOff)
	case "onError":
		err = setOneOf(&c.OnError, value, OnErrorPlain, OnErrorFail)
	case "acceptRisks":
		err = c.setAcceptRisks(value)
	case "excludePorts":
		err = c.setExcludePorts(value)
	case "unreadLimit":
		err = setNumber(&c.UnreadLimit, value, MinUnreadLimit, MaxUnreadLimit)
	case "maxConnections":
		err = setNumber(&c.MaxConnections, value, MinMaxConnections, MaxMaxConnections)
	case "spliceGuard":
		err = setOneOf(&c.SpliceGuard, value, SpliceGuardAuto, SpliceGuardOff)
	case "logFile":
		err = setPath(&c.LogFile, value)
	case "logLevel":
		err = setOneOf(&c.LogLevel, value, "debug", "info", "warn", "error")
	case "bpffs":
		err = setPath(&c.BPFFS, value)
	case "runDir":
		err = setPath(&c.RunDir, value)
	case "cgroupRoot":
		err = setPath(&c.CgroupRoot, value)
	default:
		for _, known := range Keys() {
			if strings.EqualFold(known, key) {
				return fmt.Errorf("unknown key %s: write %q", quote(key), known)
			}
		}
		return fmt.Errorf("unknown key %s", quote(key))
	}
	if err != nil {
		return fmt.Errorf("key %q: %w", key, err)
	}
	return nil
}

func setOneOf[T ~string](dst *T, value json.RawMessage, allowed ...T) error {
	s, err := decodeString(value)
	if err != nil {
		return err
	}
	if !slices.Contains(allowed, T(s)) {
		return fmt.Errorf("%s is not one of %s", quote(s), join(allowed))
	}
	*dst = T(s)
	return nil
}

// setNumber takes whole numbers only: "3", 3.0 and 1e6 are refused, so that what
// is written is what holds.
func setNumber(dst *uint32, value json.RawMessage, low, high uint32) error {
	n, err := strconv.ParseUint(string(value), 10, 32)
	if err != nil || n < uint64(low) || n > uint64(high) {
		return fmt.Errorf("%s is not a whole number from %d to %d", shorten(string(value)), low, high)
	}
	*dst = uint32(n)
	return nil
}

func setPath(dst *string, value json.RawMessage) error {
	s, err := decodeString(value)
	if err != nil {
		return err
	}
	if filepath.IsAbs(s) && filepath.Clean(s) == "/" {
		return fmt.Errorf("%s: the root directory cannot be used", quote(s))
	}
	if !filepath.IsAbs(s) || filepath.Clean(s) != strings.TrimRight(s, "/") || strings.ContainsRune(s, 0) {
		return fmt.Errorf("%s is not an absolute path without \"..\"", quote(s))
	}
	*dst = filepath.Clean(s)
	return nil
}

func (c *Config) setAcceptRisks(value json.RawMessage) error {
	elems, err := decodeArray(value)
	if err != nil {
		return err
	}
	var risks datapath.Risk
	for _, e := range elems {
		s, err := decodeString(e)
		if err != nil {
			return err
		}
		r, ok := datapath.ParseRisk(s)
		if !ok {
			return fmt.Errorf("%s is not one of %v", quote(s), allRisks)
		}
		risks |= r
	}
	c.AcceptRisks = risks
	return nil
}

func (c *Config) setExcludePorts(value json.RawMessage) error {
	elems, err := decodeArray(value)
	if err != nil {
		return err
	}
	var ranges []datapath.PortRange
	for _, e := range elems {
		// A number is a port, a string a port or a range.
		s := string(e)
		if len(e) > 0 && e[0] == '"' {
			if s, err = decodeString(e); err != nil {
				return err
			}
		}
		r, err := parsePorts(s)
		if err != nil {
			return err
		}
		ranges = append(ranges, r)
	}
	ranges = mergePorts(ranges)
	if len(ranges) > datapath.MaxExcludePorts {
		return fmt.Errorf("%d separate ranges, at most %d are possible", len(ranges), datapath.MaxExcludePorts)
	}
	c.ExcludePorts = ranges
	return nil
}

// parsePorts reads "80" or "8000-8100".
func parsePorts(s string) (datapath.PortRange, error) {
	first, last, isRange := strings.Cut(s, "-")
	if !isRange {
		last = first
	}
	a, errA := strconv.ParseUint(first, 10, 16)
	b, errB := strconv.ParseUint(last, 10, 16)
	if errA != nil || errB != nil || a == 0 || b < a {
		return datapath.PortRange{}, fmt.Errorf("%s is neither a port from 1 to 65535 nor a range \"first-last\"", quote(s))
	}
	return datapath.PortRange{First: uint16(a), Last: uint16(b)}, nil
}

// mergePorts returns the same ports as few ranges, sorted.
func mergePorts(ranges []datapath.PortRange) []datapath.PortRange {
	sorted := slices.SortedFunc(slices.Values(ranges), func(a, b datapath.PortRange) int {
		return cmp.Compare(a.First, b.First)
	})
	var out []datapath.PortRange
	for _, r := range sorted {
		if n := len(out); n > 0 && uint32(r.First) <= uint32(out[n-1].Last)+1 {
			out[n-1].Last = max(out[n-1].Last, r.Last)
			continue
		}
		out = append(out, r)
	}
	return out
}

func formatPorts(r datapath.PortRange) string {
	if r.First == r.Last {
		return strconv.Itoa(int(r.First))
	}
	return fmt.Sprintf("%d-%d", r.First, r.Last)
}

// decodeString and decodeArray insist on the type: encoding/json would take null
// for both and leave the default standing, which looks like acceptance.
func decodeString(value json.RawMessage) (string, error) {
	if len(value) == 0 || value[0] != '"' {
		return "", fmt.Errorf("%s is not a string", shorten(string(value)))
	}
	var s string
	if err := json.Unmarshal(value, &s); err != nil {
		return "", fmt.Errorf("decode %s: %w", shorten(string(value)), err)
	}
	return s, nil
}

func decodeArray(value json.RawMessage) ([]json.RawMessage, error) {
	if len(value) == 0 || value[0] != '[' {
		return nil, fmt.Errorf("%s is not an array", shorten(string(value)))
	}
	var elems []json.RawMessage
	if err := json.Unmarshal(value, &elems); err != nil {
		return nil, fmt.Errorf("decode %s: %w", shorten(string(value)), err)
	}
	return elems, nil
}

const allRisks = datapath.RiskSplice | datapath.RiskFIONREAD | datapath.RiskEpoll |
	datapath.RiskUncharged | datapath.RiskBlocking

func join[T ~string](values []T) string {
	s := make([]string, len(values))
	for i, v := range values {
		s[i] = string(v)
	}
	return strings.Join(s, ", ")
}

// quote and shorten make input fit for one log line, whoever wrote it.
func quote(s string) string { return strconv.Quote(clip(s)) }

func shorten(s string) string {
	return strings.Map(func(r rune) rune {
		if !strconv.IsPrint(r) {
			return ' '
		}
		return r
	}, clip(s))
}

func clip(s string) string {
	const limit = 80 // bytes
	if len(s) <= limit {
		return s
	}
	return s[:limit] + "..."
}
