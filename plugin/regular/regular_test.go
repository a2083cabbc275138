package regular

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

func TestRead(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	for _, err := range []error{
		os.WriteFile(at("file"), []byte("12345"), 0o600),
		os.WriteFile(at("empty"), nil, 0o600),
		os.Symlink("file", at("link")),
		os.Symlink("nothing", at("dangling")),
		unix.Mkfifo(at("fifo"), 0o600),
		os.Symlink("fifo", at("link to fifo")),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, tc := range []struct {
		path     string
		most     int64
		text     string
		err      error // of Read
		noFollow error // of ReadNoFollow
	}{
		{at("file"), 5, "12345", nil, nil},
		{at("file"), 4, "", ErrTooLarge, ErrTooLarge},
		{at("file"), 0, "", ErrTooLarge, ErrTooLarge},
		{at("empty"), 0, "", nil, nil},
		{at("link"), 5, "12345", nil, unix.ELOOP},
		{at("dangling"), 5, "", fs.ErrNotExist, unix.ELOOP},
		{at("none"), 5, "", fs.ErrNotExist, fs.ErrNotExist},
		{at("fifo"), 5, "", ErrNotRegular, ErrNotRegular},
		{at("link to fifo"), 5, "", ErrNotRegular, unix.ELOOP},
		{dir, 5, "", ErrNotRegular, ErrNotRegular},
		{"/dev/zero", 5, "", ErrNotRegular, ErrNotRegular},
	} {
		for _, way := range []struct {
			name string
			read func(string, int64) ([]byte, error)
			want error
		}{{"Read", Read, tc.err}, {"ReadNoFollow", ReadNoFollow, tc.noFollow}} {
			got, err := way.read(tc.path, tc.most)
			if !errors.Is(err, way.want) || (err == nil) != (way.want == nil) {
				t.Errorf("%s(%s, %d): %v, want %v", way.name, tc.path, tc.most, err, way.want)
			}
			want := tc.text
			if way.want != nil {
				want = ""
			}
			if string(got) != want {
				t.Errorf("%s(%s, %d): %q, want %q", way.name, tc.path, tc.most, got, want)
			}
		}
	}
}
