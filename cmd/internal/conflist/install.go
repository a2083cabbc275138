package conflist

import (
	"bytes"
	"cmp"
	"context"
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

	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/conf"
	"github.com/skipstack/skipstack/plugin"
)

// Options say what to install, and where.
type Options struct {
	Root     string // directory below which the node's are looked for; empty: /
	ConfDir  string // of network configurations; empty: found
	BinDir   string // of plugins; empty: found
	CacheDir string // of the runtime; empty: [plugin.DefaultCNICacheDir] below Root
	Conflist string // name of the file to edit; empty: the one the runtime uses
	Binary   string // file to install as the plugin; empty: this program
	Entry    []byte // JSON; empty: that of package conf
	Replace  bool   // an entry with other settings is replaced
	Force    bool   // install even where the primary plugin is known to undo it
	DryRun   bool   // change nothing
}

// Change is what became, or would become, of a file. A nil text means no file.
type Change struct {
	Path          string
	Before, After []byte
}

// Report says what was done, or with [Options.DryRun] what would be.
type Report struct {
	Site
	Conflist string   // path of the network configuration that has, or had, the entry
	Changes  []Change // of configurations, in order
	Binary   string   // path of the plugin's binary
	Placed   bool     // it was put there, or has replaced another
	Removed  bool     // it was removed
	Kept     string   // why it was not removed
}

func (o Options) entry() []byte {
	if len(o.Entry) > 0 {
		return o.Entry
	}
	return conf.Entry
}

// Install puts the binary and then the entry in place. It can be repeated and
// interrupted at any time, also by SIGKILL: at each moment the configuration is one
// that the runtime can load, with the entry or without.
//
// The error wraps [ErrRefused], [ErrNoNetwork] or [ErrBusy]; then no configuration
// was changed.
func (o Options) Install(ctx context.Context) (Report, error) {
	if err := checkEntry(o.entry()); err != nil {
		return Report{}, err
	}
	for deadline := time.Now().Add(settle); ; {
		r, err := o.install(ctx)
		// The primary plugin may be writing it at this moment.
		if !errors.Is(err, errNotLoadable) || o.DryRun || ctx.Err() != nil || time.Now().After(deadline) {
			return r, err
		}
		time.Sleep(4 * poll)
	}
}

func (o Options) install(ctx context.Context) (Report, error) {
	site, _, err := o.find()
	if err != nil {
		return Report{}, err
	}
	r := Report{Site: site, Binary: filepath.Join(site.BinDir, plugin.Type)}
	d, err := openDir(ctx, site.ConfDir, o.DryRun)
	if err != nil {
		return r, err
	}
	defer d.close()
	network, err := o.active(d) // what it is under the lock
	if err != nil {
		return r, err
	}
	r.Conflist = network.Path
	name := filepath.Base(network.Path)
	if err := o.editable(d, name); err != nil {
		return r, fmt.Errorf("%s: %w", r.Conflist, err)
	}
	edit := o.editList
	if filepath.Ext(name) != ".conflist" {
		edit = o.convert
	}
	// A configuration must never name a binary that is not there.
	planned, err := edit(ctx, d, name, true)
	if err != nil {
		return r, fmt.Errorf("%s: %w", r.Conflist, err)
	}
	binary, err := o.place(ctx, site.BinDir)
	if err != nil {
		return r, denied(err)
	}
	defer binary.close()
	r.Changes = planned
	if !o.DryRun {
		if r.Changes, err = edit(ctx, d, name, false); err != nil {
			err = fmt.Errorf("%s: %w", r.Conflist, err)
			if undoErr := binary.undo(); undoErr != nil {
				return r, errors.Join(err, undoErr)
			}
			return r, denied(err)
		}
	}
	r.Placed = binary.placed
	if len(r.Changes) > 0 {
		r.Conflist = r.Changes[0].Path
	}
	return r, nil
}

// denied makes a refusal of what the kernel does not permit, as the change of an
// immutable file. Nothing has been changed.
func denied(err error) error {
	if errors.Is(err, fs.ErrPermission) && !errors.Is(err, ErrRefused) {
		return refuse("%w", err)
	}
	return err
}

// editable says why the directory, or the file, is not to be edited.
func (o Options) editable(d *dir, name string) error {
	if err := d.writable(); err != nil {
		return refuse("%s cannot be written: %w", d.root.Name(), err)
	}
	// Cilium restores its own file at once, and renames all others, unless
	// cni.exclusive is off (daemon/cmd/cni/config.go).
	if strings.HasPrefix(name, "05-cilium.conf") && !o.Force {
		return refuse("it is Cilium's, which restores it at once unless its Helm value cni.exclusive is false; if it is, use --force")
	}
	return nil
}

// editList appends the entry to a conflist.
func (o Options) editList(ctx context.Context, d *dir, name string, plan bool) ([]Change, error) {
	add := func(text []byte) ([]byte, error) { return Add(text, o.entry(), o.Replace) }
	var before, after []byte
	var err error
	if plan {
		var f file
		if f, err = d.read(name); err == nil {
			before = f.text
			after, err = add(before)
		}
	} else {
		before, after, err = d.edit(ctx, name, add)
	}
	if err != nil || bytes.Equal(before, after) {
		return nil, err
	}
	return []Change{{d.path(name), before, after}}, nil
}

// convert makes NAME.conflist of NAME.conf or NAME.json, and then renames that, so
// that no runtime loads it. NAME.conf comes before NAME.conflist in their order, so
// until it is gone all is as it was; NAME.json comes after.
func (o Options) convert(_ context.Context, d *dir, name string, plan bool) ([]Change, error) {
	for range turns {
		f, err := d.read(name)
		if err != nil {
			return nil, err
		}
		if f.name != name {
			return nil, refuse("it is a symbolic link, and has to become a .conflist: make it one")
		}
		text, err := Convert(f.text, o.entry())
		if err != nil {
			return nil, err
		}
		target, saved := listName(name), name+savedSuffix
		var there []byte
		old, err := d.read(target)
		switch {
		case err == nil:
			there = old.text
			// Ours, if it has been made of this file or of the one before.
			if text, err = o.remake(d, f.text, old.text, saved); err != nil {
				return nil, fmt.Errorf("%s is in the way: %w", d.path(target), err)
			}
		case !errors.Is(err, fs.ErrNotExist):
			return nil, err
		}
		if !Has(there) { // else what is saved is ours, of the file before this one
			if err := d.free(saved, f.text); err != nil {
				return nil, err
			}
		}
		changes := []Change{{d.path(target), there, text}, {d.path(name), f.text, nil}, {d.path(saved), nil, f.text}}
		if plan {
			return changes, nil
		}
		if !bytes.Equal(there, text) {
			temp, err := d.temp(bytes.NewReader(text), 0, &f)
			if err != nil {
				return nil, err
			}
			if err := d.root.Rename(temp, target); err != nil {
				return nil, errors.Join(err, d.root.Remove(temp))
			}
		}
		if err := d.self.Sync(); err != nil {
			return nil, err
		}
		// The primary plugin may have written another one since. Then that one is
		// put back, and all begins again.
		if err := d.root.Rename(name, saved); errors.Is(err, fs.ErrNotExist) {
			continue
		} else if err != nil {
			if there == nil {
				err = errors.Join(err, d.root.Remove(target))
			}
			return nil, err
		}
		moved, err := d.read(saved)
		if err != nil {
			return nil, err
		}
		if moved.is(f.stat) && bytes.Equal(moved.text, f.text) {
			return changes, d.self.Sync()
		}
		fd := int(d.self.Fd())
		if err := unix.Renameat2(fd, saved, fd, name, unix.RENAME_NOREPLACE); err != nil && !errors.Is(err, unix.EEXIST) {
			return nil, err
		}
	}
	return nil, fmt.Errorf("%w: it is rewritten all the time", ErrBusy)
}

// free refuses where a file is in the way that has another text.
func (d *dir) free(name string, text []byte) error {
	f, err := d.read(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil && !bytes.Equal(f.text, text) {
		err = refuse("%s is in the way, which has another content: remove or rename it", d.path(name))
	}
	return err
}

// remake is what a list that was made of a .conf becomes now that the .conf is text.
func (o Options) remake(d *dir, text, list []byte, saved string) ([]byte, error) {
	made, err := Remove(list)
	if err != nil {
		return nil, err
	}
	entry := o.entry()
	if l, err := parseList(list); err == nil && !o.Replace && len(l.ours()) == 1 {
		entry = l.plugins[l.ours()[0]].of(list) // with the settings it has
	}
	of := [][]byte{text}
	if f, err := d.read(saved); err == nil {
		of = append(of, f.text)
	}
	for _, origin := range of {
		want, err := Convert(origin, o.entry())
		if err != nil {
			continue
		}
		if want, err = Remove(want); err == nil && bytes.Equal(made, want) {
			return Convert(text, entry)
		}
	}
	return nil, refuse("it has not been made of it, or was edited since: remove one of the two")
}

// listName is NAME.conflist for NAME.conf.
func listName(name string) string {
	return strings.TrimSuffix(name, filepath.Ext(name)) + ".conflist"
}

// placing is the binary in a directory of plugins, which stays locked until close.
type placing struct {
	dir    *dir
	placed bool   // it was put there: another one, or none, was
	old    string // temporary name of the one before, "" for none
	undone func() error
}

// undo takes the binary away again, or puts the one before in its place.
func (p *placing) undo() error {
	if p.undone == nil {
		return nil
	}
	if err := p.undone(); err != nil {
		return fmt.Errorf("put the binary back as it was: %w", err)
	}
	return p.dir.self.Sync()
}

func (p *placing) close() {
	if p.old != "" {
		_ = p.dir.root.Remove(p.old) // or it is swept
	}
	p.dir.close()
}

// place puts the binary into a directory of plugins.
func (o Options) place(ctx context.Context, path string) (_ *placing, err error) {
	source, err := os.Open(cmp.Or(o.Binary, "/proc/self/exe"))
	if err != nil {
		return nil, fmt.Errorf("read the binary: %w", err)
	}
	defer source.Close()
	d, err := openDir(ctx, path, o.DryRun)
	if err != nil {
		return nil, err
	}
	p := &placing{dir: d}
	defer func() {
		if err != nil {
			p.close()
		}
	}()
	if err := d.writable(); err != nil {
		return nil, refuse("%s cannot be written: %w; --cni-bin-dir names another directory of plugins", path, err)
	}
	name := plugin.Type
	info, err := os.Stat(d.path(name)) // where a link leads, too
	switch {
	case err == nil && !info.Mode().IsRegular():
		return nil, refuse("%s is not a regular file", d.path(name))
	case err == nil:
		same, err := sameContent(source, d.path(name))
		if err != nil {
			return nil, err
		}
		if same && info.Mode().Perm()&0o111 == 0o111 {
			return p, nil
		}
		if link, err := d.root.Lstat(name); err != nil || link.Mode()&fs.ModeSymlink != 0 {
			return nil, refuse("%s is a symbolic link to another version: replace what it names, or remove it", d.path(name))
		}
	case !errors.Is(err, fs.ErrNotExist):
		return nil, err
	}
	p.placed = true
	if o.DryRun {
		return p, nil
	}
	there := err == nil
	if _, err := source.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	temp, err := d.temp(source, 0o755, nil)
	if err != nil {
		return nil, err
	}
	p.undone = func() error { return d.root.Remove(name) }
	if there {
		p.undone = nil // where files cannot have two names, the new one stays
		if old := tempPrefix + "old" + tempSuffix; d.root.Link(name, old) == nil {
			p.old = old
			p.undone = func() error { return d.root.Rename(old, name) }
		}
	}
	if err := d.root.Rename(temp, name); err != nil {
		return nil, errors.Join(fmt.Errorf("install the binary: %w", err), d.root.Remove(temp))
	}
	return p, d.self.Sync()
}

func sameContent(a *os.File, path string) (bool, error) {
	b, err := os.Open(path)
	if err != nil {
		return false, err
	}
	defer b.Close()
	if _, err := a.Seek(0, io.SeekStart); err != nil {
		return false, err
	}
	x, y := make([]byte, 64<<10), make([]byte, 64<<10)
	for {
		n, errA := io.ReadFull(a, x)
		m, errB := io.ReadFull(b, y)
		if !bytes.Equal(x[:n], y[:m]) {
			return false, nil
		}
		if errA != nil || errB != nil {
			eof := func(err error) bool { return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) }
			if !eof(errA) {
				return false, errA
			}
			return eof(errB), nil
		}
	}
}

// Uninstall takes the entry out of every network configuration that has it, which
// gives back the bytes that were there before Install, and then removes the binary,
// unless the runtime may still call it for a pod: DEL is called with the
// configuration that the pod was made with. With purge it is removed all the same.
//
// The error wraps [ErrRefused] or [ErrBusy]. What could be done was done.
func (o Options) Uninstall(ctx context.Context, purge bool) (Report, error) {
	places := o.places()
	var r Report
	var errs []error
	left := ""
	for _, path := range o.confDirs(places) {
		changes, mention, err := o.clear(ctx, path)
		if len(changes) > 0 {
			r.ConfDir, r.Conflist = path, changes[0].Path
		}
		r.Changes = append(r.Changes, changes...)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if mention != "" {
			left = mention + " names it"
		}
		errs = append(errs, err)
	}
	for _, path := range o.binDirs(places, "") {
		name := filepath.Join(path, plugin.Type)
		if _, err := os.Lstat(name); errors.Is(err, fs.ErrNotExist) {
			continue
		}
		r.BinDir, r.Binary = path, name
		if left == "" && !purge {
			users, err := o.users()
			switch {
			case err != nil:
				left = fmt.Sprintf("it is not known which pods were made with it: %v", err)
			case len(users) > 0:
				left = fmt.Sprintf("%d pods were made with it, and their deletion may call it (%s, ...)", len(users), users[0])
				if len(users) == 1 {
					left = fmt.Sprintf("1 pod was made with it, and its deletion may call it (%s)", users[0])
				}
			}
		}
		if left != "" {
			r.Kept = left
			continue
		}
		if !o.DryRun {
			if err := o.removeBinary(ctx, path); err != nil {
				errs = append(errs, err)
				continue
			}
		}
		r.Removed = true
	}
	return r, errors.Join(errs...)
}

func (o Options) removeBinary(ctx context.Context, path string) error {
	d, err := openDir(ctx, path, false)
	if err != nil {
		return err
	}
	defer d.close()
	if err := d.root.Remove(plugin.Type); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove the binary: %w", err)
	}
	return d.self.Sync()
}

// clear takes the entry out of the configurations in a directory. mention is the
// path of one that has skipstack in it all the same, if there is one.
func (o Options) clear(ctx context.Context, path string) (changes []Change, mention string, err error) {
	d, err := openDir(ctx, path, o.DryRun)
	if err != nil {
		return nil, "", err
	}
	defer d.close()
	names, err := d.names()
	if err != nil {
		return nil, "", err
	}
	var errs []error
	for _, name := range names {
		origin, isSaved := strings.CutSuffix(name, savedSuffix)
		var made []Change
		var err error
		switch {
		case isSaved:
			made, err = o.restore(ctx, d, origin)
		case filepath.Ext(name) == ".conflist":
			if _, statErr := d.root.Lstat(strings.TrimSuffix(name, "list") + savedSuffix); statErr == nil {
				continue // it goes by the saved file
			}
			if _, statErr := d.root.Lstat(strings.TrimSuffix(name, ".conflist") + ".json" + savedSuffix); statErr == nil {
				continue
			}
			made, err = o.takeOut(ctx, d, name)
		}
		changes = append(changes, made...)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", d.path(name), err))
		}
	}
	if names, err = d.networks(); err != nil {
		errs = append(errs, err)
	}
	for _, name := range names {
		// As it would be, for a dry run.
		text, known := []byte(nil), false
		for _, c := range changes {
			if c.Path == d.path(name) {
				text, known = c.After, true
			}
		}
		if !known {
			f, err := d.read(name)
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				errs = append(errs, err)
			}
			text = f.text
		}
		if nested(text) { // also below the delegates of Multus
			mention = d.path(name)
		}
	}
	return changes, mention, errors.Join(errs...)
}

// takeOut takes the entry out of one conflist. One that no runtime can load has none,
// as far as anybody knows.
func (o Options) takeOut(ctx context.Context, d *dir, name string) ([]Change, error) {
	if o.interrupted(d, name) {
		return o.unlink(d, name)
	}
	var before, after []byte
	f, err := d.read(name)
	if err == nil {
		before = f.text
		after, err = Remove(before)
	}
	if errors.Is(err, errNotLoadable) && !bytes.Contains(before, []byte(plugin.Type)) {
		return nil, nil
	}
	if err != nil || bytes.Equal(before, after) {
		return nil, err
	}
	if !o.DryRun {
		if before, after, err = d.edit(ctx, name, Remove); err != nil {
			return nil, err
		}
	}
	return []Change{{d.path(name), before, after}}, nil
}

// interrupted says whether a list was made of a .conf that is still there.
func (o Options) interrupted(d *dir, name string) bool {
	list, err := d.read(name)
	if err != nil || !Has(list.text) {
		return false
	}
	base := strings.TrimSuffix(name, ".conflist")
	for _, ext := range []string{".conf", ".json"} {
		if f, err := d.read(base + ext); err == nil {
			if _, err := o.remake(d, f.text, list.text, base+ext+savedSuffix); err == nil {
				return true
			}
		}
	}
	return false
}

func (o Options) unlink(d *dir, name string) ([]Change, error) {
	f, err := d.read(name)
	if err != nil {
		return nil, err
	}
	if !o.DryRun {
		if err := d.root.Remove(name); err != nil {
			return nil, err
		}
	}
	return []Change{{d.path(name), f.text, nil}}, nil
}

// restore undoes convert: the saved file gets its name back, and then the list made
// of it goes. A list that was changed otherwise since stays, without the entry.
func (o Options) restore(ctx context.Context, d *dir, origin string) ([]Change, error) {
	saved, target := origin+savedSuffix, listName(origin)
	f, err := d.read(saved)
	if err != nil {
		return nil, err
	}
	list, err := d.read(target)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	listThere := err == nil
	var changes []Change
	if listThere {
		if _, err := o.remake(d, f.text, list.text, saved); err != nil {
			changes, err := o.takeOut(ctx, d, target)
			if err == nil {
				err = refuse("%s was changed since it was made of it: remove one of the two", d.path(target))
			}
			return changes, err
		}
	}
	_, err = d.root.Lstat(origin)
	switch {
	case err == nil && !listThere && d.free(origin, f.text) != nil:
		return nil, nil // nothing says that it is ours
	case errors.Is(err, fs.ErrNotExist):
		changes = append(changes, Change{d.path(saved), f.text, nil}, Change{d.path(origin), nil, f.text})
		if !o.DryRun {
			fd := int(d.self.Fd())
			if err := unix.Renameat2(fd, saved, fd, origin, unix.RENAME_NOREPLACE); err != nil {
				return nil, fmt.Errorf("restore %s: %w", d.path(origin), err)
			}
		}
	default: // the primary plugin has written it anew
		changes = append(changes, Change{d.path(saved), f.text, nil})
		if !o.DryRun {
			if err := d.root.Remove(saved); err != nil {
				return nil, err
			}
		}
	}
	if !o.DryRun {
		if err := d.self.Sync(); err != nil {
			return changes, err
		}
	}
	if listThere {
		gone, err := o.unlink(d, target)
		return append(changes, gone...), err
	}
	return changes, nil
}

// users are the pods that the runtime remembers to have made with skipstack.
func (o Options) users() ([]string, error) {
	dir := filepath.Join(cmp.Or(o.CacheDir, filepath.Join("/", o.Root, plugin.DefaultCNICacheDir)), "results")
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var users []string
	for _, e := range entries {
		if !e.Type().IsRegular() {
			continue
		}
		text, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		// libcni/api.go, cachedInfo
		var cached struct {
			ContainerID string `json:"containerId"`
			Config      []byte `json:"config"`
		}
		if json.Unmarshal(text, &cached) != nil {
			continue // of an older libcni, which has no configuration in it
		}
		if nested(cached.Config) {
			users = append(users, cmp.Or(cached.ContainerID, e.Name()))
		}
	}
	slices.Sort(users)
	return slices.Compact(users), nil
}
