package machine

import (
	"bytes"
	"cmp"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/skipstack/skipstack/test/debian"
)

// A Kernel is an unpacked Debian cloud kernel.
type Kernel struct {
	Release string // as uname -r says
	image   string
	modules map[string]string // file by module name
	builtin map[string]bool
}

// FetchKernel returns the newest Debian cloud kernel of a series such as 6.1, or
// of a major version, for the architecture of apt's packages. One that was fetched
// before is used as it is.
func FetchKernel(ctx context.Context, cache string, a *debian.APT, series string) (*Kernel, error) {
	arch := cmp.Or(a.Arch, AMD64)
	dir := filepath.Join(cache, "kernel-"+series)
	if arch != AMD64 {
		dir += "-" + arch
	}
	if k, err := openKernel(dir); err == nil {
		return k, nil
	} else if !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	if err := a.Update(ctx); err != nil {
		return nil, err
	}
	// The first has the image up to 6.18, the others since.
	suffix := `[.].*-cloud-` + arch + `$`
	best, err := a.Newest(ctx, "^linux-(image|binary)-"+regexp.QuoteMeta(series)+suffix)
	if err != nil {
		return nil, err
	}
	release := strings.TrimPrefix(strings.TrimPrefix(best.Package, "linux-image-"), "linux-binary-")
	found, err := a.Search(ctx, "^linux-(image|binary|modules)-"+regexp.QuoteMeta(release)+"$")
	if err != nil {
		return nil, err
	}
	if err := a.Unpack(ctx, dir, found); err != nil {
		return nil, err
	}
	return openKernel(dir)
}

var moduleFile = regexp.MustCompile(`^(.+)\.ko(\.xz|\.zst|\.gz)?$`)

func openKernel(dir string) (*Kernel, error) {
	if _, err := os.Stat(dir); err != nil {
		return nil, err
	}
	k := &Kernel{modules: map[string]string{}, builtin: map[string]bool{}}
	if images, _ := filepath.Glob(filepath.Join(dir, "boot/vmlinuz-*")); len(images) == 1 {
		k.image = images[0]
		k.Release = strings.TrimPrefix(filepath.Base(k.image), "vmlinuz-")
	} else if images, _ := filepath.Glob(filepath.Join(dir, "usr/lib/modules/*/vmlinuz")); len(images) == 1 { // since 7.x
		k.image = images[0]
		k.Release = filepath.Base(filepath.Dir(k.image))
	} else {
		return nil, fmt.Errorf("%s has no kernel image; remove it and try again", dir)
	}
	for _, lib := range []string{"lib/modules", "usr/lib/modules"} {
		root := filepath.Join(dir, lib, k.Release)
		err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			if m := moduleFile.FindStringSubmatch(d.Name()); m != nil {
				k.modules[moduleName(m[1])] = path
			}
			return nil
		})
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("list modules: %w", err)
		}
		builtin, err := os.ReadFile(filepath.Join(root, "modules.builtin"))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		for line := range strings.FieldsSeq(string(builtin)) {
			k.builtin[moduleName(strings.TrimSuffix(filepath.Base(line), ".ko"))] = true
		}
	}
	if len(k.modules) == 0 {
		return nil, fmt.Errorf("%s has no modules; remove it and try again", dir)
	}
	return k, nil
}

// moduleName spells a module as the kernel does.
func moduleName(file string) string { return strings.ReplaceAll(file, "-", "_") }

// A module is one to load.
type module struct {
	name string
	data []byte
}

// load returns the named modules and what they depend on, dependencies first.
func (k *Kernel) load(ctx context.Context, names []string) ([]module, error) {
	var order []module
	seen := map[string]bool{}
	var visit func(string) error
	visit = func(name string) error {
		name = moduleName(name)
		if seen[name] || k.builtin[name] {
			return nil
		}
		seen[name] = true
		path, ok := k.modules[name]
		if !ok {
			return fmt.Errorf("%s has no module %s", k.Release, name)
		}
		data, err := readModule(ctx, path)
		if err != nil {
			return err
		}
		depends, err := dependencies(data)
		if err != nil {
			return fmt.Errorf("module %s: %w", name, err)
		}
		for _, d := range depends {
			if err := visit(d); err != nil {
				return fmt.Errorf("%s needs: %w", name, err)
			}
		}
		order = append(order, module{name, data})
		return nil
	}
	for _, name := range names {
		if err := visit(name); err != nil {
			return nil, err
		}
	}
	return order, nil
}

func readModule(ctx context.Context, path string) ([]byte, error) {
	var program string
	switch filepath.Ext(path) {
	case ".xz":
		program = "xz"
	case ".zst":
		program = "zstd"
	case ".gz":
		program = "gzip"
	default:
		return os.ReadFile(path)
	}
	data, err := exec.CommandContext(ctx, program, "-dc", path).Output()
	if err != nil {
		return nil, fmt.Errorf("%s -dc %s: %w", program, path, err)
	}
	return data, nil
}

// dependencies reads the field that modinfo(8) shows as "depends".
func dependencies(data []byte) ([]string, error) {
	f, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return nil, err
	}
	section := f.Section(".modinfo")
	if section == nil {
		return nil, errors.New("no .modinfo section")
	}
	info, err := section.Data()
	if err != nil {
		return nil, err
	}
	for field := range bytes.SplitSeq(info, []byte{0}) {
		if list, ok := bytes.CutPrefix(field, []byte("depends=")); ok {
			return slices.DeleteFunc(strings.Split(string(list), ","), func(s string) bool { return s == "" }), nil
		}
	}
	return nil, nil
}

// Modules adds the named modules and what they depend on, and returns the files, in
// the order to load them.
func (a *Archive) Modules(ctx context.Context, k *Kernel, names []string) (files []string, err error) {
	order, err := k.load(ctx, names)
	if err != nil {
		return nil, err
	}
	for _, m := range order {
		name := "modules/" + m.name + ".ko"
		if err := a.File(name, 0o644, m.data); err != nil {
			return nil, err
		}
		files = append(files, "/"+name)
	}
	return files, nil
}
