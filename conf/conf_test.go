// Package conf_test holds the samples to what they are said to be.
package conf_test

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/containernetworking/cni/libcni"

	"github.com/skipstack/skipstack/plugin"
	"github.com/skipstack/skipstack/plugin/datapath"
)

func glob(t *testing.T, pattern string, want int) []string {
	t.Helper()
	files, err := filepath.Glob(pattern)
	if err != nil || len(files) != want {
		t.Fatalf("%s: %v, error %v, want %d files", pattern, files, err, want)
	}
	return files
}

func capabilities() map[string]bool {
	return map[string]bool{"cgroupPath": true, "io.kubernetes.cri.pod-annotations": true, "bandwidth": true}
}

func TestConflists(t *testing.T) {
	accepted := map[string]datapath.Risk{
		"":                        0,
		"-accept-splice":          datapath.RiskSplice,
		"-accept-splice-blocking": datapath.RiskSplice | datapath.RiskBlocking,
	}
	for _, file := range glob(t, "*.conflist", 7) {
		t.Run(file, func(t *testing.T) {
			list, err := libcni.NetworkConfFromFile(file)
			if err != nil {
				t.Fatal(err)
			}
			last := list.Plugins[len(list.Plugins)-1]
			if len(list.Plugins) != 2 || last.Network.Type != plugin.Type {
				t.Fatalf("plugins %v", list.Plugins)
			}
			if !reflect.DeepEqual(last.Network.Capabilities, capabilities()) {
				t.Errorf("capabilities %v", last.Network.Capabilities)
			}
			if err := plugin.Validate(last.Bytes); err != nil {
				t.Error(err)
			}
			if !slices.Contains(plugin.SupportedVersions().SupportedVersions(), list.CNIVersion) {
				t.Errorf("cniVersion %s is not served", list.CNIVersion)
			}
			raw, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			got, err := plugin.ParseConflist(raw)
			if err != nil {
				t.Fatal(err)
			}
			want := plugin.DefaultConfig()
			if file != "reference.conflist" {
				kind, rest, _ := strings.Cut(strings.TrimSuffix(strings.TrimPrefix(file, "10-"), ".conflist"), "-")
				if rest != "" {
					rest = "-" + rest
				}
				risks, ok := accepted[rest]
				if !ok || list.Plugins[0].Network.Type != kind {
					t.Errorf("a %s network with %q", list.Plugins[0].Network.Type, rest)
				}
				want.AcceptRisks = risks
			}
			if !reflect.DeepEqual(got, want) {
				t.Errorf("got  %+v\nwant %+v", got, want)
			}
		})
	}
}

func TestEntry(t *testing.T) {
	raw, err := os.ReadFile("entry.json")
	if err != nil {
		t.Fatal(err)
	}
	if err := plugin.Validate(raw); err != nil {
		t.Error(err)
	}
	list, err := libcni.NetworkConfFromBytes(fmt.Appendf(nil, `{"cniVersion":"1.1.0","name":"n","plugins":[{"type":"ptp"},%s]}`, raw))
	if err != nil {
		t.Fatal(err)
	}
	if n := list.Plugins[1].Network; n.Type != plugin.Type || !reflect.DeepEqual(n.Capabilities, capabilities()) {
		t.Errorf("entry %+v", n)
	}
}

// The reference has every key that can be set, each with a comment, and no other.
func TestReferenceIsComplete(t *testing.T) {
	list, err := libcni.NetworkConfFromFile("reference.conflist")
	if err != nil {
		t.Fatal(err)
	}
	var entry map[string]any
	if err := json.Unmarshal(list.Plugins[1].Bytes, &entry); err != nil {
		t.Fatal(err)
	}
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	keys := plugin.Keys()
	for _, key := range keys {
		if _, ok := entry["_"+key].(string); !ok {
			t.Errorf("key %s has no comment", key)
		}
		_, set := entry[key]
		if noDefault := key == "logFile" || key == "cgroupRoot"; set == noDefault {
			t.Errorf("key %s is set: %v", key, set)
		}
		row := regexp.MustCompile("(?m)^\\| `" + key + "` \\|.*\\| (.*) \\|$").FindSubmatch(readme)
		if row == nil {
			t.Errorf("README.md has no row for key %s", key)
		} else if value, err := json.Marshal(entry[key]); err != nil || set && strings.Trim(string(value), `"`) != strings.Trim(string(row[1]), "`") &&
			fmt.Sprintf("%.0f", entry[key]) != strings.Trim(string(row[1]), "`") {
			t.Errorf("key %s is %s here and %s in README.md", key, value, row[1])
		}
	}
	for key := range entry {
		own := strings.TrimPrefix(key, "_")
		if own != "" && !slices.Contains(keys, own) && !slices.Contains([]string{"type", "capabilities"}, own) {
			t.Errorf("key %s is not skipstack's", key)
		}
	}
}

// Every file is named in the index, and the index names no other.
func TestIndex(t *testing.T) {
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	var named []string
	for _, m := range regexp.MustCompile("(?m)^\\| (`[^|]*`) \\| [^|]* \\|$").FindAllSubmatch(readme, -1) {
		for _, name := range regexp.MustCompile("`([^`]*\\.(?:conflist|json|yaml))`").FindAllSubmatch(m[1], -1) {
			files, err := filepath.Glob(string(name[1]))
			if err != nil || len(files) == 0 {
				t.Errorf("no file %s", name[1])
			}
			named = append(named, files...)
		}
	}
	for _, file := range slices.Concat(glob(t, "*.conflist", 7), glob(t, "*.json", 1), glob(t, "*.yaml", 1)) {
		if !slices.Contains(named, file) {
			t.Errorf("%s is not in README.md", file)
		}
	}
}
