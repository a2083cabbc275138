package plugin

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/skipstack/skipstack/plugin/regular"
)

// cachedAttachment is what libcni remembers of an attachment until its DEL.
type cachedAttachment struct {
	container, network, ifName string
	pod                        podArgs
	chained                    bool // skipstack was in the configuration
}

const (
	cacheKind = "cniCacheV1" // libcni.CNICacheV1
	// maxCached is many times what an entry of the cache takes.
	maxCached = 4 << 20
)

// cachedAttachments reads libcni's cache: one file for each attachment that no DEL
// has ended. Those whose network namespace is gone are left over from a crash, and
// are not returned. No cache is no error.
func cachedAttachments(dir string) ([]cachedAttachment, error) {
	results := filepath.Join(dir, "results")
	entries, err := os.ReadDir(results)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the runtime's CNI cache: %w", err)
	}
	var all []cachedAttachment
	for _, e := range entries {
		raw, err := regular.ReadNoFollow(filepath.Join(results, e.Name()), maxCached)
		if err != nil {
			continue // removed meanwhile, or not libcni's
		}
		if c, netns, ok := decodeCached(raw); ok && (netns == "" || exists(netns)) {
			all = append(all, c)
		}
	}
	return all, nil
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// decodeCached reads one entry; ok is false for what libcni did not write, and for
// attachments that are no pod's.
func decodeCached(raw []byte) (c cachedAttachment, netns string, ok bool) {
	var entry struct {
		Kind        string      `json:"kind"`
		ContainerID string      `json:"containerId"`
		Config      []byte      `json:"config"`
		IfName      string      `json:"ifName"`
		NetworkName string      `json:"networkName"`
		NetNS       string      `json:"netns"`
		CniArgs     [][2]string `json:"cniArgs"`
	}
	if json.Unmarshal(raw, &entry) != nil || entry.Kind != cacheKind || entry.ContainerID == "" {
		return c, "", false
	}
	c = cachedAttachment{container: entry.ContainerID, network: entry.NetworkName, ifName: entry.IfName}
	for _, pair := range entry.CniArgs {
		switch pair[0] {
		case "K8S_POD_NAMESPACE":
			c.pod.namespace = pair[1]
		case "K8S_POD_NAME":
			c.pod.name = pair[1]
		case "K8S_POD_UID":
			c.pod.uid = pair[1]
		}
	}
	_, err := FindEntry(entry.Config)
	c.chained = err == nil || errors.Is(err, ErrConfig)
	// containerd attaches a loopback network of its own to each pod.
	return c, entry.NetNS, entry.IfName != "lo"
}
