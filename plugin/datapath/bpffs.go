package datapath

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"
)

// lockPoll is how often a waiting process tries the lock again: flock(2) has no
// time limit of its own.
const lockPoll = 5 * time.Millisecond

// flock opens a directory and takes its exclusive lock, which closing releases.
func flock(ctx context.Context, dir string) (*os.File, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("lock: %w", err)
	}
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return f, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", dir, err)
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("lock %s: %w: %w", dir, ErrBusy, ctx.Err())
		case <-time.After(lockPoll):
		}
	}
}

func isBPFFS(path string) (bool, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return false, fmt.Errorf("statfs %s: %w", path, err)
	}
	return uint32(st.Type) == unix.BPF_FS_MAGIC, nil
}

func checkBPFFS(path string) error {
	is, err := isBPFFS(path)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrNoBPFFS, err)
	}
	if !is {
		return fmt.Errorf("%s: %w (mount -t bpf bpf %s)", path, ErrNoBPFFS, path)
	}
	return nil
}

// EnsureBPFFS mounts a BPF file system on path where statfs(2) says that there
// is none. The directory must exist and be empty, so that the mount hides
// nothing. Returns an error wrapping [ErrNoBPFFS] where that is not possible,
// [ErrBusy] when ctx is done before.
func EnsureBPFFS(ctx context.Context, path string) error {
	if is, err := isBPFFS(path); err != nil {
		return fmt.Errorf("%w: %w", ErrNoBPFFS, err)
	} else if is {
		return nil
	}
	// Two processes that both saw none must not mount one over the other: the
	// lock is that of the directory below the mount.
	f, err := flock(ctx, path)
	if err != nil {
		return err
	}
	defer f.Close()
	if is, err := isBPFFS(path); err != nil || is {
		return err
	}
	switch names, err := f.Readdirnames(1); {
	case len(names) > 0:
		return fmt.Errorf("%w: %s is not empty, and a mount would hide what is in it: "+
			"set bpffs to a BPF file system or to an empty directory", ErrNoBPFFS, path)
	case err != io.EOF:
		return fmt.Errorf("%w: read %s: %w", ErrNoBPFFS, path, err)
	}
	err = unix.Mount("bpf", path, "bpf", 0, "mode=0700")
	if errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("%s: %w, and this kernel has none to mount (CONFIG_BPF_SYSCALL): %w", path, ErrNoBPFFS, err)
	}
	if err != nil {
		return fmt.Errorf("mount a BPF file system on %s: %w: %w", path, ErrNoBPFFS, err)
	}
	return nil
}

// LacksBPFFS tells that the kernel certainly has no BPF file system, by proc(5)'s
// filesystems.
func LacksBPFFS(proc string) bool {
	types, err := os.ReadFile(filepath.Join(proc, "filesystems"))
	return err == nil && !slices.Contains(strings.Fields(string(types)), "bpf")
}

// BPFFSIdentity tells which BPF file system path is: its st_dev, and the inode
// of the mount namespace it is seen from.
func BPFFSIdentity(path string) (dev, mountNS uint64, err error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return 0, 0, fmt.Errorf("stat %s: %w", path, err)
	}
	dev = uint64(st.Dev)
	if err := unix.Stat("/proc/thread-self/ns/mnt", &st); err != nil {
		return 0, 0, fmt.Errorf("stat the mount namespace: %w", err)
	}
	return dev, st.Ino, nil
}

// haveCompareAndSwap returns nil, [ebpf.ErrNotSupported], or what kept it from
// finding out. Linux 5.12, commit 5ffa25502b5a.
func haveCompareAndSwap() error {
	swap := asm.CmpXchg.Mem(asm.RFP, asm.R1, asm.DWord, -8)
	// BPF_CMPXCHG, include/uapi/linux/bpf.h. cilium/ebpf 0.22 encodes 0, a plain
	// addition that every kernel knows.
	swap.Constant = 0xf1
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type:    ebpf.SocketFilter,
		License: "GPL",
		Instructions: asm.Instructions{
			asm.Mov.Imm(asm.R0, 0),
			asm.Mov.Imm(asm.R1, 1),
			asm.StoreMem(asm.RFP, -8, asm.R0, asm.DWord),
			swap,
			asm.Mov.Imm(asm.R0, 0),
			asm.Return(),
		},
	})
	if err == nil {
		return p.Close()
	}
	if errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("compare-and-swap: %w", ebpf.ErrNotSupported)
	}
	return err
}
