package debian

import (
	"reflect"
	"testing"
)

func TestParseSources(t *testing.T) {
	for _, tc := range []struct {
		name, path, text string
		want             []sourceEntry
	}{
		{"one line", "sources.list", "# deb http://old.test/ a main\ndeb http://mirror.test/debian bookworm main contrib\n" +
			"deb-src http://mirror.test/debian bookworm main\ndeb [arch=amd64 signed-by=/key.gpg] http://m2.test/d sid non-free main\n" +
			"deb http://other.test/ stable other\n",
			[]sourceEntry{
				{source{"http://mirror.test/debian", ""}, []string{"bookworm"}},
				{source{"http://m2.test/d", "/key.gpg"}, []string{"sid"}},
			}},
		{"deb822", "debian.sources", "Types: deb\n# why\nURIs: http://mirror.test/debian\nSuites: bookworm bookworm-updates\nComponents: main\n" +
			"Signed-By: /key.gpg\n\nTypes: deb\nURIs: http://other.test/\nSuites: stable\nComponents: other\n",
			[]sourceEntry{{source{"http://mirror.test/debian", "/key.gpg"}, []string{"bookworm", "bookworm-updates"}}}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got := parseSources(tc.path, tc.text); !reflect.DeepEqual(got, tc.want) {
				t.Errorf("%+v, want %+v", got, tc.want)
			}
		})
	}
}
