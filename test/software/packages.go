package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/skipstack/skipstack/test/debian"
)

// unpack downloads the Debian packages and what they depend on and the machine lacks,
// and unpacks them below dir/root. The machine's own packages stay as they are, and no
// script of a package runs.
func unpack(ctx context.Context, dir string, packages []string, log io.Writer) error {
	done := filepath.Join(dir, "packages")
	had, err := os.ReadFile(done)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	have := strings.Fields(string(had))
	want := slices.Compact(slices.Sorted(slices.Values(slices.Concat(have, packages))))
	if len(want) == len(have) {
		return nil
	}
	if _, err := exec.LookPath("apt-get"); err != nil {
		return fmt.Errorf("this needs the Debian packages %s, and there is no apt-get here to get them; choose other cases with -run", strings.Join(want, " "))
	}
	if dir, err = filepath.Abs(dir); err != nil {
		return err
	}
	apt := &debian.APT{Dir: filepath.Join(dir, "apt"), OwnRelease: true, Logf: func(format string, args ...any) {
		fmt.Fprintf(log, "software: "+format+"\n", args...)
	}}
	all, err := apt.Missing(ctx, false, want...)
	if err != nil {
		return err
	}
	// The program loader and the C library belong together.
	all = slices.DeleteFunc(all, func(p string) bool { return strings.HasPrefix(p, "libc6=") })
	root := filepath.Join(dir, "root")
	if err := errors.Join(os.RemoveAll(done), apt.Unpack(ctx, root, all)); err != nil {
		return err
	}
	if err := relink(root); err != nil {
		return err
	}
	return os.WriteFile(done, []byte(strings.Join(want, "\n")+"\n"), 0o644)
}

// relink makes absolute links to what was unpacked relative: the tree is moved
// about.
func relink(root string) error {
	return filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.Type()&fs.ModeSymlink == 0 {
			return err
		}
		to, err := os.Readlink(path)
		if err != nil || !filepath.IsAbs(to) {
			return err
		}
		if _, err := os.Lstat(filepath.Join(root, to)); err != nil {
			return nil
		}
		if to, err = filepath.Rel(filepath.Dir(path), filepath.Join(root, to)); err != nil {
			return err
		}
		if err := os.Remove(path); err != nil {
			return err
		}
		return os.Symlink(to, path)
	})
}

// A software is what was unpacked, and the machine's own.
type software struct{ root string }

// program finds a program by its name or by a path's end such as bin/postgres.
func (s software) program(name string) (string, error) {
	var dirs []string
	for _, top := range []string{s.root, "/"} {
		for _, dir := range []string{"usr/sbin", "usr/bin", "sbin", "bin", "usr/lib/openssh", "usr/lib/postgresql/*/bin", "usr/lib/jvm/*/bin", "usr/local/bin"} {
			dirs = append(dirs, filepath.Join(top, dir))
		}
	}
	for _, dir := range dirs {
		found, err := filepath.Glob(filepath.Join(dir, name))
		if err != nil {
			return "", err
		}
		for _, path := range found {
			// Debian's alternatives do not exist where nothing was installed.
			if info, err := os.Stat(path); err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0 {
				return path, nil
			}
		}
	}
	return "", fmt.Errorf("%s was not found, neither below %s nor on the machine", name, s.root)
}

// environ is the environment of the unpacked programs.
func (s software) environ() ([]string, error) {
	var libs []string
	for _, pattern := range []string{"usr/lib/*-linux-gnu*", "lib/*-linux-gnu*"} {
		found, err := filepath.Glob(filepath.Join(s.root, pattern))
		if err != nil {
			return nil, err
		}
		libs = append(libs, found...)
	}
	return []string{
		"PATH=" + filepath.Join(s.root, "usr/bin") + ":" + filepath.Join(s.root, "usr/sbin") + ":/usr/sbin:/usr/bin:/sbin:/bin",
		"LD_LIBRARY_PATH=" + strings.Join(libs, ":"),
		"LC_ALL=C",
	}, nil
}
