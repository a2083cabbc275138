package inside_test

import (
	"embed"
	"net"
	"os"
	"path/filepath"
	"testing"

	"github.com/skipstack/skipstack/test/must"
)

//go:embed testdata
var testdata embed.FS

// TestStandalone is a kubelet without an API server: static pods.
func TestStandalone(t *testing.T) {
	n := newNode(t)
	n.service("kubelet")
	names := []string{"server", "client", "idle", "out"}
	for _, name := range names {
		text := must.Get(testdata.ReadFile("testdata/" + name + ".yaml"))(t)
		must.Do(t, os.WriteFile(filepath.Join(manifests, name+".yaml"), text, 0o644))
	}
	// A static pod's name has the node's.
	server, client, idle, out := n.pod("server-node"), n.pod("client-node"), n.pod("idle-node"), n.pod("out-node")
	n.waitOpen()

	t.Run("guaranteed", func(t *testing.T) { server.attached(t, "") })
	t.Run("burstable", func(t *testing.T) { client.attached(t, "burstable") })
	t.Run("best effort", func(t *testing.T) { idle.attached(t, "besteffort") })
	n.works("cgroupPath of a kubelet: static pods of each class")
	addr := net.JoinHostPort(server.ip, "80")
	t.Run("pod IP", func(t *testing.T) { accelerated(t, client, addr, server) })
	n.works("pod IP")
	t.Run("hostPort", func(t *testing.T) { accelerated(t, client, net.JoinHostPort(nodeIP, "8080"), server) })
	n.works("hostPort")
	t.Run("opt-out", func(t *testing.T) {
		out.skipped(t, "annotation")
		plain(t, out, addr, server)
	})
	n.works("opt-out, by annotation: plain")

	for _, name := range names {
		must.Do(t, os.Remove(filepath.Join(manifests, name+".yaml")))
	}
	n.nothingLeft()
	n.works("deletion of a pod: nothing left")
}
