package verdict

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/skipstack/skipstack/plugin/attachment"
	"github.com/skipstack/skipstack/plugin/datapath"
	"github.com/skipstack/skipstack/plugin/regular"
)

const (
	filePrefix = "verdict-"
	tmpPrefix  = ".verdict-"
	// format is raised when the meaning of the file changes.
	format = 2
	// maxFile is many times what a verdict takes.
	maxFile = 64 << 10
	// tmpAge is when a temporary file belongs to nobody who still writes it.
	tmpAge = time.Minute
)

// wire is the JSON form of a Verdict.
type wire struct {
	Format         int       `json:"format"`
	Verdict        Level     `json:"verdict"`
	Risks          []string  `json:"risks"`
	Probes         []Probe   `json:"probes"`
	Funnel         bool      `json:"funnel"`
	MPTCPListeners bool      `json:"mptcpListeners"`
	Guard          string    `json:"guard"` // a datapath.Guard
	RingUntried    bool      `json:"ringUntried,omitempty"`
	Kernel         string    `json:"kernel"`
	BootID         string    `json:"bootID"`
	Build          string    `json:"build"`
	ProbedAt       time.Time `json:"probedAt"`
}

// MarshalJSON implements [json.Marshaler].
func (v *Verdict) MarshalJSON() ([]byte, error) {
	return json.Marshal(wire{
		Format:         format,
		Verdict:        v.Level,
		Risks:          v.Risks.Names(),
		Probes:         v.Probes,
		Funnel:         v.Funnel,
		MPTCPListeners: v.MPTCPListeners,
		Guard:          string(v.Guard),
		RingUntried:    v.RingUntried,
		Kernel:         v.Kernel,
		BootID:         v.BootID,
		Build:          hex.EncodeToString(v.Build[:]),
		ProbedAt:       v.ProbedAt,
	})
}

// decode reads what Save wrote. Whatever could not have come about is refused:
// a wrong verdict is worse than none.
func decode(data []byte) (*Verdict, error) {
	var w wire
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	if err := d.Decode(&w); err != nil {
		return nil, err
	}
	if _, err := d.Token(); err != io.EOF {
		return nil, errors.New("more than one JSON value")
	}
	if w.Format != format {
		return nil, fmt.Errorf("format %d, not %d", w.Format, format)
	}
	if len(w.Probes) != len(kinds) {
		return nil, fmt.Errorf("%d probes, not %d", len(w.Probes), len(kinds))
	}
	for i, p := range w.Probes {
		if p.Name != kinds[i].name {
			return nil, fmt.Errorf("probe %q where %q is expected", p.Name, kinds[i].name)
		}
		if p.Result != OK && p.Result != NotOK && p.Result != CouldNotTell {
			return nil, fmt.Errorf("probe %s has result %q", p.Name, p.Result)
		}
	}
	guard := datapath.Guard(w.Guard)
	if guard != datapath.NoGuard && !slices.Contains(datapath.Guards(), guard) {
		return nil, fmt.Errorf("unknown guard %q", w.Guard)
	}
	v := &Verdict{Funnel: w.Funnel, Guard: guard, RingUntried: w.RingUntried, Probes: w.Probes, Kernel: w.Kernel, BootID: w.BootID, ProbedAt: w.ProbedAt}
	if n, err := hex.Decode(v.Build[:], []byte(w.Build)[:min(len(w.Build), 2*len(v.Build))]); err != nil || len(w.Build) != 2*n || n != len(v.Build) {
		return nil, fmt.Errorf("malformed build %q", w.Build)
	}
	v.conclude()
	var risks datapath.Risk
	for _, name := range w.Risks {
		r, ok := datapath.ParseRisk(name)
		if !ok {
			return nil, fmt.Errorf("unknown risk %q", name)
		}
		risks |= r
	}
	if v.Guard != datapath.NoGuard && v.Risks&datapath.RiskSplice != 0 {
		return nil, fmt.Errorf("guard %q does not follow from the probes", v.Guard)
	}
	if v.RingUntried && v.Risks&datapath.RiskSplice != 0 {
		return nil, errors.New("io_uring's splice alone was not tried, which does not follow from the probes")
	}
	if v.Level != w.Verdict || v.Risks != risks || v.MPTCPListeners != w.MPTCPListeners {
		return nil, fmt.Errorf("verdict %q and risks %q do not follow from the probes", w.Verdict, w.Risks)
	}
	return v, nil
}

func fileName(bootID string, build [16]byte) string {
	return filePrefix + bootID + "-" + hex.EncodeToString(build[:]) + ".json"
}

// Cached returns the verdict of this boot and this binary.
//
// Returns an error wrapping [ErrNoVerdict] where runDir holds none, and where
// what it holds is damaged, from another version, or inconclusive (see
// [Verdict.Inconclusive]) and more than a minute old. One that holds may be due
// for another look all the same, see [Verdict.Due].
func Cached(runDir string) (*Verdict, error) { return cachedBy(runDir, build()) }

// CachedBy is [Cached] for the verdict of another binary, as the plugin is where it was
// installed.
func CachedBy(program, runDir string) (*Verdict, error) { return cachedBy(runDir, buildOf(program)) }

func cachedBy(runDir string, build [16]byte) (*Verdict, error) {
	boot, err := attachment.BootID()
	if err != nil {
		return nil, err
	}
	return cached(runDir, boot, build, time.Now())
}

func cached(runDir, boot string, build [16]byte, now time.Time) (*Verdict, error) {
	path := filepath.Join(runDir, fileName(boot, build))
	data, err := regular.ReadNoFollow(path, maxFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: no %s", ErrNoVerdict, path)
	}
	if errors.Is(err, regular.ErrTooLarge) {
		return nil, fmt.Errorf("%w: %w", ErrNoVerdict, err)
	}
	if err != nil {
		return nil, fmt.Errorf("read the kernel's verdict: %w", err)
	}
	v, err := decode(data)
	if err != nil {
		return nil, fmt.Errorf("%w: %s: %w", ErrNoVerdict, path, err)
	}
	if v.BootID != boot || v.Build != build {
		return nil, fmt.Errorf("%w: %s is of another boot or build", ErrNoVerdict, path)
	}
	if v.Inconclusive() && v.Due(now) {
		return nil, fmt.Errorf("%w: a probe of %s could not tell, %v ago", ErrNoVerdict, path, now.Sub(v.ProbedAt).Round(time.Second))
	}
	return v, nil
}

// Save writes the verdict to runDir, which it makes where there is none, and
// removes the verdicts of other boots. Readers see the old file or the new one.
func (v *Verdict) Save(runDir string) error {
	data, err := json.MarshalIndent(v, "", "\t")
	if err != nil {
		return fmt.Errorf("encode the kernel's verdict: %w", err)
	}
	if err := os.MkdirAll(runDir, 0o700); err != nil {
		return fmt.Errorf("save the kernel's verdict: %w", err)
	}
	tmp, err := os.CreateTemp(runDir, tmpPrefix) // 0600
	if err != nil {
		return fmt.Errorf("save the kernel's verdict: %w", err)
	}
	_, err = tmp.Write(append(data, '\n'))
	if closeErr := tmp.Close(); err == nil {
		err = closeErr
	}
	if err == nil {
		err = os.Rename(tmp.Name(), filepath.Join(runDir, fileName(v.BootID, v.Build)))
	}
	if err != nil {
		return errors.Join(fmt.Errorf("save the kernel's verdict: %w", err), os.Remove(tmp.Name()))
	}
	return v.removeOthers(runDir)
}

// removeOthers removes verdicts of other boots, and what was left half written.
func (v *Verdict) removeOthers(runDir string) error {
	entries, err := os.ReadDir(runDir)
	if err != nil {
		return fmt.Errorf("remove old verdicts: %w", err)
	}
	var errs []error
	for _, e := range entries {
		name := e.Name()
		old := strings.HasPrefix(name, filePrefix) && strings.HasSuffix(name, ".json") &&
			!strings.HasPrefix(name, filePrefix+v.BootID+"-")
		if strings.HasPrefix(name, tmpPrefix) {
			info, err := e.Info()
			old = err == nil && time.Since(info.ModTime()) > tmpAge
		}
		if !old || !e.Type().IsRegular() {
			continue
		}
		if err := os.Remove(filepath.Join(runDir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, fmt.Errorf("remove an old verdict: %w", err))
		}
	}
	return errors.Join(errs...)
}
