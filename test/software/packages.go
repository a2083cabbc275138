package main

import (
	"bytes"
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
)

// unpack downloads what the machine lacks of the Debian packages and of what they
// depend on, and unpacks it below dir/root. The machine's own packages stay as
// they are, and no script of a package runs.
func unpack(ctx context.Context, dir string, packages []string, log io.Writer) error {
	slices.Sort(packages)
	packages = slices.Compact(packages)
	done := filepath.Join(dir, "packages")
	had, err := os.ReadFile(done)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	have := strings.Fields(string(had))
	missing := slices.DeleteFunc(packages, func(p string) bool { return slices.Contains(have, p) })
	if len(missing) == 0 {
		return nil
	}
	if _, err := exec.LookPath("apt-get"); err != nil {
		return fmt.Errorf("this needs the Debian packages %s, and there is no apt-get here to get them; choose other cases with -run", strings.Join(missing, " "))
	}
	fmt.Fprintln(log, "software: getting", strings.Join(missing, " "))
	archives, root := filepath.Join(dir, "archives"), filepath.Join(dir, "root")
	for _, d := range []string{filepath.Join(archives, "partial"), root} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	archives, err = filepath.Abs(archives)
	if err != nil {
		return err
	}
	defer os.RemoveAll(archives)
	install := append([]string{"apt-get", "-qq", "install", "-y", "--download-only", "--no-install-recommends",
		// The directory is ours alone; no other apt need be waited for.
		"-o", "Debug::NoLocking=1",
		"-o", "Dir::Cache::archives=" + archives,
		"-o", "APT::Sandbox::User=root",
		"-o", "Acquire::Retries=3"}, missing...)
	if err := command(ctx, install...); err != nil {
		// The lists are missing or old.
		if err := command(ctx, "apt-get", "-qq", "update"); err != nil {
			return err
		}
		if err := command(ctx, install...); err != nil {
			return err
		}
	}
	debs, err := filepath.Glob(filepath.Join(archives, "*.deb"))
	if err != nil {
		return err
	}
	for _, deb := range debs {
		// The program loader and the C library belong together.
		if strings.HasPrefix(filepath.Base(deb), "libc6_") {
			continue
		}
		if err := command(ctx, "dpkg", "-x", deb, root); err != nil {
			return err
		}
	}
	if err := relink(root); err != nil {
		return err
	}
	return os.WriteFile(done, []byte(strings.Join(append(have, missing...), "\n")+"\n"), 0o644)
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

func command(ctx context.Context, args ...string) error {
	var out bytes.Buffer
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive")
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, bytes.TrimSpace(out.Bytes()))
	}
	return nil
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
