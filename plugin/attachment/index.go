package attachment

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// entryName is the index entry of a record file.
func entryName(file, nonce string) string {
	return strings.TrimSuffix(file, recordSuffix) + "." + nonce
}

// recordOf is the reverse of entryName; it is false for foreign names.
func recordOf(entry string) (file string, ok bool) {
	hash, nonce, ok := strings.Cut(entry, ".")
	return hash + recordSuffix, ok && isHex(hash, hashLen) && isHex(nonce, nonceLen)
}

// linkEntry makes cgroups/<id>/<entry> a link to attachments/<file>.
func (t *tree) linkEntry(file string, id uint64, entry string) error {
	cgroups, err := openSub(t.run, cgroupsDir, true)
	if err != nil {
		return err
	}
	defer cgroups.Close()
	for range maxTries {
		d, err := openSub(cgroups, cgroupName(id), true)
		if err != nil {
			return err
		}
		t.s.did("index directory made")
		err = linkAt(t.att, file, d, entry)
		d.Close()
		if errors.Is(err, unix.ENOENT) {
			// Either the directory was empty and somebody removed it, or file
			// is gone.
			var st unix.Stat_t
			if statAt(t.att, file, &st) == nil {
				continue
			}
		}
		if err != nil {
			return errors.Join(err, removeEmpty(cgroups, cgroupName(id)))
		}
		t.s.did("index entry made")
		return nil
	}
	return fmt.Errorf("link %s: the directory is removed again and again",
		filepath.Join(cgroups.Name(), cgroupName(id), entry))
}

// unlinkEntry takes back linkEntry.
func (t *tree) unlinkEntry(id uint64, entry string) error {
	cgroups, d, err := t.openCgroup(id)
	if err != nil || d == nil {
		return err
	}
	defer cgroups.Close()
	defer d.Close()
	_, err = unlinkAt(d, entry)
	return errors.Join(err, removeEmpty(cgroups, cgroupName(id)))
}

// openCgroup opens cgroups/ and cgroups/<id>/; without an error, both are nil
// if there are no entries for id.
func (t *tree) openCgroup(id uint64) (cgroups, d *os.File, err error) {
	cgroups, err = openSub(t.run, cgroupsDir, false)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, nil
	}
	if err != nil {
		return nil, nil, err
	}
	d, err = openSub(cgroups, cgroupName(id), false)
	if err != nil {
		cgroups.Close()
		if errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
		return nil, nil, err
	}
	return cgroups, d, nil
}

// cgroupIDs returns the cgroups that have an index directory.
func (t *tree) cgroupIDs() ([]uint64, error) {
	cgroups, err := openSub(t.run, cgroupsDir, false)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer cgroups.Close()
	names, err := readNames(cgroups)
	if err != nil {
		return nil, err
	}
	var ids []uint64
	for _, name := range names {
		// What is not named as we name it is not ours.
		if id, err := strconv.ParseUint(name, 10, 64); err == nil && cgroupName(id) == name {
			ids = append(ids, id)
		}
	}
	return ids, nil
}

// sweepCgroup returns the records of cgroup id and removes its stale index
// entries; if only is not empty, those of that record file alone. readErr is
// about records that could not be read, sweepErr about stale entries that
// could not be removed.
func (t *tree) sweepCgroup(id uint64, only string) (records []Record, readErr, sweepErr error) {
	if id == 0 {
		return nil, nil, nil
	}
	cgroups, d, err := t.openCgroup(id)
	if err != nil || d == nil {
		return nil, err, err
	}
	defer cgroups.Close()
	defer d.Close()
	names, err := readNames(d)
	if err != nil {
		return nil, err, err
	}
	entries := map[string][]string{} // by record file
	for _, name := range names {
		if file, ok := recordOf(name); ok && (only == "" || only == file) {
			entries[file] = append(entries[file], name)
		}
	}
	var readErrs, sweepErrs []error
	removed := len(names) == 0
	for _, file := range slices.Sorted(maps.Keys(entries)) {
		r, _, err := t.read(file)
		if err == nil && r.CgroupID == id {
			records = append(records, r)
			if len(entries[file]) == 1 {
				continue
			}
		} else if err != nil && !errors.Is(err, ErrNotFound) {
			// It may belong to this cgroup or not: the entry stays.
			readErrs = append(readErrs, err)
			continue
		}
		for _, entry := range entries[file] {
			gone, err := t.dropStale(d, id, entry, file, entries[file])
			removed = removed || gone
			sweepErrs = append(sweepErrs, err)
		}
	}
	if removed {
		sweepErrs = append(sweepErrs, removeEmpty(cgroups, cgroupName(id)))
		t.s.did("index directory removed if empty")
	}
	return records, errors.Join(readErrs...), errors.Join(sweepErrs...)
}

// dropStale removes entry from d, the index directory of cgroup id, unless it
// stands for a record of that cgroup or for one that is being written.
// siblings are all entries of the same record file.
func (t *tree) dropStale(d *os.File, id uint64, entry, file string, siblings []string) (gone bool, err error) {
	f, err := openAt(d, entry, unix.O_RDONLY, 0)
	switch {
	case errors.Is(err, unix.ENOENT):
		return true, nil
	case errors.Is(err, unix.ELOOP), errors.Is(err, unix.ENXIO):
		// A link or socket, which linkEntry did not make.
		return t.removeEntry(d, entry)
	case err != nil:
		return false, err
	}
	defer f.Close()
	locked, err := tryFlock(f)
	if err != nil || !locked {
		// Its writer has not renamed the record yet.
		return false, err
	}
	// Only now is it certain that the entry's writer will not make it valid.
	r, record, err := t.read(file)
	switch {
	case errors.Is(err, ErrNotFound):
	case err != nil:
		return false, nil
	case r.CgroupID == id:
		superseded, err := hasOther(d, f, &record, entry, siblings)
		if err != nil || !superseded {
			return false, err
		}
	}
	return t.removeEntry(d, entry)
}

func (t *tree) removeEntry(d *os.File, entry string) (gone bool, err error) {
	if _, err := unlinkAt(d, entry); err != nil {
		return false, err
	}
	t.s.did("index entry removed")
	return true, nil
}

// hasOther says whether the record has an index entry other than entry, which
// is opened as f. That one cannot go before the record does.
func hasOther(d, f *os.File, record *unix.Stat_t, entry string, siblings []string) (bool, error) {
	var st unix.Stat_t
	if err := fstat(f, &st); err != nil {
		return false, &fs.PathError{Op: "stat", Path: f.Name(), Err: err}
	}
	if sameFile(&st, record) {
		return false, nil
	}
	for _, other := range siblings {
		if other != entry && statAt(d, other, &st) == nil && sameFile(&st, record) {
			return true, nil
		}
	}
	return false, nil
}

// ensureEntry makes an index entry for the record file where there is none.
func (t *tree) ensureEntry(id uint64, file string) error {
	if id == 0 {
		return nil
	}
	cgroups, d, err := t.openCgroup(id)
	if err != nil {
		return err
	}
	if d != nil {
		names, err := readNames(d)
		d.Close()
		cgroups.Close()
		if err != nil {
			return err
		}
		if slices.ContainsFunc(names, func(name string) bool {
			f, ok := recordOf(name)
			return ok && f == file
		}) {
			return nil
		}
	}
	err = t.linkEntry(file, id, entryName(file, newNonce()))
	if errors.Is(err, fs.ErrNotExist) {
		return nil // the record was removed since
	}
	return err
}
