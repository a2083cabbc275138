// Package debian fetches Debian packages for tests that need a program or kernel
// that the machine may lack, without touching what is installed: a private apt,
// with the machine's own mirrors as sources.
package debian

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// suites are looked through for packages that run on any of them, such as kernels
// and static programs; the others must be of the machine's own release.
var suites = []string{"bullseye", "bookworm", "trixie", "trixie-backports", "sid"}

// APT is a private apt: its sources, lists and downloads are below Dir, and the
// machine's own are not touched.
type APT struct {
	Dir  string                           // absolute
	Logf func(format string, args ...any) // progress; nil: none
	// OwnRelease keeps it to the machine's own release, whose lists are soon read.
	OwnRelease bool
	// Arch is the packages' architecture; default the machine's own. One of another
	// has a Dir of its own.
	Arch    string
	updated bool
}

// sources is the file of the sources that packages are taken from.
func (a *APT) sources() string {
	if a.OwnRelease {
		return "own.list"
	}
	return "all.list"
}

func (a *APT) logf(format string, args ...any) {
	if a.Logf != nil {
		a.Logf(format, args...)
	}
}

// source is where the machine itself gets packages from.
type source struct{ uri, signedBy string }

// machineSources finds the machine's mirrors of its release and of that
// release's security updates.
func machineSources() (codename string, main, security source, err error) {
	release, err := os.ReadFile("/etc/os-release")
	if err != nil {
		return "", main, security, fmt.Errorf("find the machine's release: %w", err)
	}
	m := regexp.MustCompile(`(?m)^VERSION_CODENAME="?(\w+)"?$`).FindSubmatch(release)
	if m == nil || !bytes.Contains(release, []byte("ID=debian")) {
		return "", main, security, errors.New("packages come through apt: this needs a Debian machine")
	}
	codename = string(m[1])
	files, err := filepath.Glob("/etc/apt/sources.list.d/*")
	if err != nil {
		return "", main, security, err
	}
	for _, path := range append(files, "/etc/apt/sources.list") {
		text, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		for _, s := range parseSources(path, string(text)) {
			switch {
			case slices.Contains(s.suites, codename) && main.uri == "":
				main = s.source
			case slices.Contains(s.suites, codename+"-security") && security.uri == "":
				security = s.source
			}
		}
	}
	if main.uri == "" {
		return "", main, security, fmt.Errorf("apt has no source of %s", codename)
	}
	return codename, main, security, nil
}

type sourceEntry struct {
	source
	suites []string
}

var oneLine = regexp.MustCompile(`(?m)^deb\s+(?:\[([^]]*)\]\s+)?(\S+)\s+(\S+)\s+.*\bmain\b`)

// parseSources reads both of apt's formats.
func parseSources(path, text string) (entries []sourceEntry) {
	if !strings.HasSuffix(path, ".sources") {
		for _, m := range oneLine.FindAllStringSubmatch(text, -1) {
			e := sourceEntry{source{uri: m[2]}, []string{m[3]}}
			for option := range strings.FieldsSeq(m[1]) {
				if key, ok := strings.CutPrefix(option, "signed-by="); ok {
					e.signedBy = key
				}
			}
			entries = append(entries, e)
		}
		return entries
	}
	for stanza := range strings.SplitSeq(text, "\n\n") {
		fields := map[string]string{}
		for line := range strings.Lines(stanza) {
			if name, value, ok := strings.Cut(line, ":"); ok && !strings.HasPrefix(line, "#") {
				fields[strings.ToLower(name)] = strings.TrimSpace(value)
			}
		}
		if uris := strings.Fields(fields["uris"]); len(uris) > 0 && slices.Contains(strings.Fields(fields["components"]), "main") {
			entries = append(entries, sourceEntry{source{uris[0], fields["signed-by"]}, strings.Fields(fields["suites"])})
		}
	}
	return entries
}

// line writes an entry of a sources.list.
func line(out *strings.Builder, s source, suite string) {
	options := ""
	if s.signedBy != "" {
		options = "[signed-by=" + s.signedBy + "] "
	}
	fmt.Fprintf(out, "deb %s%s %s main\n", options, s.uri, suite)
}

// Update fetches package lists, once.
func (a *APT) Update(ctx context.Context) error {
	if a.updated {
		return nil
	}
	codename, mirror, security, err := machineSources()
	if err != nil {
		return err
	}
	for _, d := range []string{"lists/partial", "archives/partial"} {
		if err := os.MkdirAll(filepath.Join(a.Dir, d), 0o755); err != nil {
			return err
		}
	}
	var all, own strings.Builder
	for _, suite := range suites {
		line(&all, mirror, suite)
		if security.uri != "" && suite != "sid" && !strings.Contains(suite, "-") {
			line(&all, security, suite+"-security")
		}
	}
	line(&own, mirror, codename)
	line(&own, mirror, codename+"-backports")
	if security.uri != "" {
		line(&own, security, codename+"-security")
	}
	if !strings.Contains(all.String(), " "+codename+"-backports ") {
		line(&all, mirror, codename+"-backports")
	}
	for name, text := range map[string]string{"all.list": all.String(), "own.list": own.String()} {
		if err := os.WriteFile(filepath.Join(a.Dir, name), []byte(text), 0o644); err != nil {
			return err
		}
	}
	a.logf("reading package lists")
	// A suite that is not served any more matters only if a package is missed.
	if _, err := a.run(ctx, "", a.sources(), "apt-get", "update"); err != nil {
		a.logf("%v", err)
	}
	a.updated = true
	return nil
}

func (a *APT) run(ctx context.Context, cwd, list, program string, args ...string) ([]byte, error) {
	options := []string{
		"-q",
		"-o", "Dir::Etc::sourcelist=" + filepath.Join(a.Dir, list),
		"-o", "Dir::Etc::sourceparts=/dev/null",
		"-o", "Dir::Etc::preferencesparts=/dev/null",
		"-o", "Dir::State::lists=" + filepath.Join(a.Dir, "lists"),
		"-o", "Dir::Cache=" + a.Dir,
		"-o", "Acquire::Languages=none",
		"-o", "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false",
		"-o", "Acquire::Retries=3",
		"-o", "APT::Sandbox::User=root", // the caller's directory may be closed to others
	}
	if a.Arch != "" {
		options = append(options, "-o", "APT::Architecture="+a.Arch, "-o", "APT::Architectures="+a.Arch)
	}
	cmd := exec.CommandContext(ctx, program, append(options, args...)...)
	cmd.Dir = cwd
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("%s %s: %w: %s", program, strings.Join(args, " "), err, bytes.TrimSpace(errs.Bytes()))
	}
	return out.Bytes(), nil
}

// Unpack downloads packages (NAME or NAME=VERSION) and unpacks them into dir, which
// then holds all of them or does not exist.
func (a *APT) Unpack(ctx context.Context, dir string, packages []string) error {
	tmp, err := os.MkdirTemp(filepath.Dir(dir), filepath.Base(dir)+".tmp-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	debs, root := filepath.Join(tmp, "debs"), filepath.Join(tmp, "root")
	for _, d := range []string{debs, root} {
		if err := os.Mkdir(d, 0o755); err != nil {
			return err
		}
	}
	a.logf("downloading %s", strings.Join(packages, " "))
	if _, err := a.run(ctx, debs, a.sources(), "apt-get", append([]string{"download"}, packages...)...); err != nil {
		return err
	}
	files, err := filepath.Glob(filepath.Join(debs, "*.deb"))
	if err != nil {
		return err
	}
	for _, f := range files {
		if out, err := exec.CommandContext(ctx, "dpkg", "-x", f, root).CombinedOutput(); err != nil {
			return fmt.Errorf("unpack %s: %w: %s", filepath.Base(f), err, bytes.TrimSpace(out))
		}
	}
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	return os.Rename(root, dir)
}

// Search lists the packages whose name matches.
func (a *APT) Search(ctx context.Context, pattern string) ([]string, error) {
	out, err := a.run(ctx, "", a.sources(), "apt-cache", "search", "--names-only", pattern)
	if err != nil {
		return nil, err
	}
	var names []string
	for line := range strings.Lines(string(out)) {
		names = append(names, strings.Fields(line)[0])
	}
	if len(names) == 0 {
		return nil, fmt.Errorf("no package is called %s", pattern)
	}
	return names, nil
}

// Candidate is a package that can be had.
type Candidate struct{ Package, Version string }

// Newest returns the newest of the packages whose name matches.
func (a *APT) Newest(ctx context.Context, pattern string) (Candidate, error) {
	names, err := a.Search(ctx, pattern)
	if err != nil {
		return Candidate{}, err
	}
	out, err := a.run(ctx, "", a.sources(), "apt-cache", append([]string{"madison"}, names...)...)
	if err != nil {
		return Candidate{}, err
	}
	var best Candidate
	for line := range strings.Lines(string(out)) {
		f := strings.Split(line, "|")
		if len(f) < 3 {
			continue
		}
		c := Candidate{strings.TrimSpace(f[0]), strings.TrimSpace(f[1])}
		if best.Package == "" || exec.CommandContext(ctx, "dpkg", "--compare-versions", c.Version, "gt", best.Version).Run() == nil {
			best = c
		}
	}
	return best, nil
}

// Versions lists the versions of a package that can be had, newest first.
func (a *APT) Versions(ctx context.Context, name string) ([]string, error) {
	if err := a.Update(ctx); err != nil {
		return nil, err
	}
	out, err := a.run(ctx, "", a.sources(), "apt-cache", "madison", name)
	if err != nil {
		return nil, err
	}
	var versions []string
	for line := range strings.Lines(string(out)) {
		if f := strings.Split(line, "|"); len(f) > 2 {
			versions = append(versions, strings.TrimSpace(f[1]))
		}
	}
	return slices.Compact(versions), nil
}

// Missing lists the given packages, and what they depend on and the machine lacks,
// as NAME=VERSION. They are of the machine's own release, or its backports if asked.
func (a *APT) Missing(ctx context.Context, backports bool, packages ...string) ([]string, error) {
	if err := a.Update(ctx); err != nil {
		return nil, err
	}
	target, _, _, err := machineSources()
	if err != nil {
		return nil, err
	}
	if backports {
		target += "-backports"
	}
	out, err := a.run(ctx, "", "own.list", "apt-get", append([]string{"install", "--simulate", "--reinstall", "--no-install-recommends",
		"--target-release", target}, packages...)...)
	if err != nil {
		return nil, err
	}
	return toInstall(out), nil
}

// Closure lists the given packages of a release, and what they depend on where
// nothing is installed, as NAME=VERSION.
func (a *APT) Closure(ctx context.Context, release string, packages ...string) ([]string, error) {
	if err := a.Update(ctx); err != nil {
		return nil, err
	}
	_, mirror, security, err := machineSources()
	if err != nil {
		return nil, err
	}
	var list strings.Builder
	line(&list, mirror, release)
	if security.uri != "" {
		line(&list, security, release+"-security")
	}
	status := filepath.Join(a.Dir, "no-status")
	for path, text := range map[string]string{filepath.Join(a.Dir, "release.list"): list.String(), status: ""} {
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			return nil, err
		}
	}
	out, err := a.run(ctx, "", "release.list", "apt-get", append([]string{"install", "--simulate", "--no-install-recommends",
		"-o", "Dir::State::status=" + status}, packages...)...)
	if err != nil {
		return nil, err
	}
	return toInstall(out), nil
}

// toInstall reads what apt-get install --simulate would install.
func toInstall(out []byte) (packages []string) {
	for _, m := range installed.FindAllStringSubmatch(string(out), -1) {
		packages = append(packages, m[1]+"="+m[2])
	}
	return packages
}

var installed = regexp.MustCompile(`(?m)^Inst (\S+) (?:\[\S+\] )?\((\S+) `)
