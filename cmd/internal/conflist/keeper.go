package conflist

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/fsnotify/fsnotify"
	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/plugin"
)

// KeeperState is what a [Keeper] knows.
type KeeperState struct {
	Site
	Conflist string `json:"conflist,omitempty"` // path of the network configuration
	Present  bool   `json:"present"`            // the entry is in it, and the binary in place
	Reason   string `json:"reason,omitempty"`   // why not, or what is odd
	Repairs  uint64 `json:"repairs"`            // how often the two were put in place
}

// Keeper installs skipstack and keeps it installed while the primary plugin rewrites
// its file, removes it, or comes late. It only ever does what
// [Options.Install] does. When it ends, it leaves everything as it is.
type Keeper struct {
	Options
	Log *slog.Logger // nil: none
	// Notify, if set, is called from Run whenever the state has changed.
	Notify func(KeeperState)
	// Interval is how often it looks even if nothing seems to have happened; 0 means
	// 30 s. Without a network configuration it looks each second.
	Interval time.Duration
}

const (
	// debounce is how long a keeper lets changes settle.
	debounce = 10 * time.Millisecond
	// burst is how many repairs in a row are made at once; beyond it there is one
	// each second, lest it fights with another program for the CPU.
	burst = 10
	// retry is how soon it tries again what failed, or looks for a network.
	retry = time.Second
	// lockWait is how long it waits for another skipstack.
	lockWait = 10 * time.Second
)

// Run keeps skipstack installed until ctx ends, and then returns nil. The error is
// one of the watch (inotify's limits); configurations that cannot be edited are the
// state's reason instead.
func (k *Keeper) Run(ctx context.Context) error {
	if err := checkEntry(k.entry()); err != nil {
		return err
	}
	w, err := fsnotify.NewWatcher()
	if err != nil {
		return err
	}
	defer w.Close()
	r := &keeping{Keeper: k, watcher: w, tokens: burst, refilled: time.Now(), watched: map[string]bool{}}
	if r.Log == nil {
		r.Log = slog.New(slog.DiscardHandler)
	}
	for ctx.Err() == nil {
		r.watch()
		wait := r.turn(ctx)
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
		case <-timer.C:
		case _, ok := <-w.Events:
			if !ok {
				return errors.New("the watch of the configuration has ended")
			}
			r.drain(ctx)
		case err := <-w.Errors:
			// Events may have been lost: look.
			r.Log.Warn("watch the network configuration", "error", err)
		}
		timer.Stop()
	}
	return nil
}

// keeping is a keeper that runs.
type keeping struct {
	*Keeper
	watcher  *fsnotify.Watcher
	watched  map[string]bool
	state    KeeperState
	told     bool
	tokens   float64
	refilled time.Time
	binary   os.FileInfo // as it was when it was last in order
}

// watch watches the directories that there are. A watch ends with its directory.
func (r *keeping) watch() {
	dirs := r.confDirs(r.places())
	for path := range r.watched {
		if _, err := os.Stat(path); err != nil {
			delete(r.watched, path)
		}
	}
	alive := map[string]bool{}
	for _, path := range r.watcher.WatchList() {
		alive[path] = true
	}
	for _, path := range dirs {
		if !r.watched[path] || !alive[path] {
			if err := r.watcher.Add(path); err == nil {
				r.watched[path] = true
			} else if !errors.Is(err, fs.ErrNotExist) {
				r.Log.Warn("watch the network configuration", "directory", path, "error", err)
			}
		}
	}
}

// drain takes events until there are none for a moment, or too many.
func (r *keeping) drain(ctx context.Context) {
	for end := time.Now().Add(10 * debounce); time.Now().Before(end); {
		select {
		case <-ctx.Done():
			return
		case <-time.After(debounce):
			return
		case <-r.watcher.Events:
		}
	}
}

// turn looks, and repairs what is not in order. It returns when to look again if
// nothing happens.
func (r *keeping) turn(ctx context.Context) time.Duration {
	next := r.state
	next.Reason = ""
	interval := cmp.Or(r.Interval, 30*time.Second)
	switch err := r.look(&next); {
	case err == nil:
		next.Present = true
		r.tell(next)
		return interval
	case errors.Is(err, ErrEdited):
		next.Present, next.Reason = true, err.Error()
		r.tell(next)
		return interval
	case errors.Is(err, ErrNoNetwork):
		next.Present, next.Reason = false, err.Error()
		r.tell(next)
		return retry
	}
	now := time.Now()
	r.tokens = min(burst, r.tokens+now.Sub(r.refilled).Seconds())
	r.refilled = now
	if r.tokens < 1 {
		next.Present, next.Reason = false, "another program takes it out again and again"
		r.tell(next)
		return time.Duration((1 - r.tokens) * float64(time.Second))
	}
	r.tokens--
	waiting, cancel := context.WithTimeout(ctx, lockWait)
	defer cancel()
	report, err := r.Install(waiting)
	if err != nil {
		next.Present, next.Reason = false, err.Error()
		r.tell(next)
		if errors.Is(err, ErrRefused) && !errors.Is(err, errNotLoadable) {
			return interval // until the file changes
		}
		return retry
	}
	r.binary = nil
	next.Site, next.Conflist, next.Present = report.Site, report.Conflist, true
	next.Repairs++
	r.Log.Info("installed", "conflist", report.Conflist, "binary", report.Binary)
	r.tell(next)
	// Another program may have changed it meanwhile, unseen.
	return debounce
}

// errAbsent is what look finds if there is something to do.
var errAbsent = errors.New("not installed")

// look says whether the entry and the binary are in place.
func (r *keeping) look(next *KeeperState) error {
	site, name, err := r.find()
	if err != nil {
		if errors.Is(err, ErrNoNetwork) {
			return err
		}
		return errAbsent // Install says what is wrong
	}
	next.Site, next.Conflist = site, filepath.Join(site.ConfDir, name)
	root, err := os.OpenRoot(site.ConfDir)
	if err != nil {
		return errAbsent
	}
	defer root.Close()
	f, err := (&dir{root: root}).read(name)
	if err != nil || filepath.Ext(name) != ".conflist" {
		return errAbsent
	}
	after, err := Add(f.text, r.entry(), r.Replace)
	if err != nil && !errors.Is(err, ErrEdited) {
		return errAbsent
	}
	if err == nil && !bytes.Equal(after, f.text) {
		return errAbsent
	}
	info, statErr := os.Stat(filepath.Join(site.BinDir, plugin.Type))
	if statErr != nil {
		return errAbsent
	}
	if r.binary == nil || !os.SameFile(r.binary, info) || r.binary.Size() != info.Size() || !r.binary.ModTime().Equal(info.ModTime()) {
		source, err := os.Open(cmp.Or(r.Binary, "/proc/self/exe"))
		if err != nil {
			return err
		}
		defer source.Close()
		same, sameErr := sameContent(source, filepath.Join(site.BinDir, plugin.Type))
		if sameErr != nil || !same || info.Mode().Perm()&0o111 != 0o111 || unix.Access(filepath.Join(site.BinDir, plugin.Type), unix.X_OK) != nil {
			return errAbsent
		}
		r.binary = info
	}
	return err
}

// tell logs and passes on what is new.
func (r *keeping) tell(next KeeperState) {
	if r.told && next == r.state {
		return
	}
	if next.Reason != "" && next.Reason != r.state.Reason {
		r.Log.Warn("the network configuration", "conflist", next.Conflist, "present", next.Present, "reason", next.Reason)
	}
	r.state, r.told = next, true
	if r.Notify != nil {
		r.Notify(next)
	}
}
