package verdict

import (
	"crypto/sha256"
	"debug/elf"
	"runtime/debug"

	"github.com/skipstack/skipstack/bpf"
)

// build identifies the running binary: the programs that it has embedded and the probes
// that judge by them. A copy of it in another place has the same.
func build() [16]byte {
	if id := goBuildID("/proc/self/exe"); id != nil {
		return hashed(id)
	}
	// Linked without an id (-ldflags=-buildid=).
	h := sha256.New()
	programs := bpf.Build()
	h.Write(programs[:])
	if info, ok := debug.ReadBuildInfo(); ok {
		h.Write([]byte(info.String()))
	}
	return [16]byte(h.Sum(nil))
}

// buildOf identifies another binary. One without an id is taken to be as this one.
func buildOf(program string) [16]byte {
	if id := goBuildID(program); id != nil {
		return hashed(id)
	}
	return build()
}

func hashed(id []byte) [16]byte {
	sum := sha256.Sum256(id)
	return [16]byte(sum[:])
}

// goBuildID is the id that the go command gives to a binary, which depends on all that
// it is made of: go/src/cmd/go/internal/work/buildid.go. It takes some small reads to
// find, however large the binary is. It is nil if there is none.
func goBuildID(path string) []byte {
	f, err := elf.Open(path)
	if err != nil {
		return nil
	}
	defer f.Close()
	s := f.Section(".note.go.buildid")
	if s == nil {
		return nil
	}
	note, err := s.Data()
	// Sizes of the name "Go\0\0" and of the id, the type, the name, the id.
	const header = 3*4 + 4
	if err != nil || len(note) < header {
		return nil
	}
	size := f.ByteOrder.Uint32(note[4:])
	if id := note[header:]; size > 0 && uint64(size) <= uint64(len(id)) {
		return id[:size]
	}
	return nil
}
