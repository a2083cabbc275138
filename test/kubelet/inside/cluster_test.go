package inside_test

import (
	"fmt"
	"os"
	"strings"
	"testing"
)

// TestCluster is a cluster of one node: Services by kube-proxy.
func TestCluster(t *testing.T) {
	n := newNode(t)
	token := credentials(t)
	for _, service := range []string{"etcd", "kube-apiserver", "kube-controller-manager"} {
		n.service(service)
	}
	a := newAPI(t, token)
	wait(t, func() error { return a.ready(t.Context()) })
	const env = "/run/kubelet.env"
	check(t, os.WriteFile(env, []byte("KUBELET_ARGS=--kubeconfig="+clusterDir+"/kubeconfig\n"), 0o600))
	t.Cleanup(func() { check(t, os.Remove(env)) })
	n.service("kubelet")
	a.create(t, pods, "client")
	a.create(t, deployments, "echo")
	a.create(t, services, "echo-service")
	client := n.pod("client")
	n.waitOpen()
	var echo []*pod
	for _, name := range a.waitRolledOut(t, "echo") {
		echo = append(echo, n.pod(name))
	}
	t.Run("pod", func(t *testing.T) { client.attached(t, "burstable") })
	for _, mode := range []string{"iptables", "nftables"} {
		t.Run("Service/"+mode, func(t *testing.T) {
			n := &node{t: t, client: n.client}
			n.service("kube-proxy@" + mode)
			wait(t, func() error { return proxied(mode, "10.96.0.80") })
			accelerated(t, client, "10.96.0.80:81", echo...)
		})
		n.works("Service of kube-proxy, " + mode)
	}
	a.patch(t, deployments+"/echo", scale(0))
	a.delete(t, pods+"/client")
	a.waitRolledOut(t, "echo")
	n.nothingLeft()
}

func scale(replicas int) any { return map[string]any{"spec": map[string]any{"replicas": replicas}} }

// proxied wants the Service to be in the rules that this mode of kube-proxy makes, and
// in none of the other's.
func proxied(mode, ip string) error {
	tables, err := command("nft", "list", "ruleset")
	if err != nil {
		return err
	}
	for _, rules := range []struct{ mode, mark string }{{"iptables", "KUBE-SERVICES"}, {"nftables", "table ip kube-proxy"}} {
		if has := strings.Contains(tables, rules.mark); has != (rules.mode == mode) {
			return fmt.Errorf("%s is there: %v, with kube-proxy in mode %s", rules.mark, has, mode)
		}
	}
	if !strings.Contains(tables, ip) {
		return fmt.Errorf("no rule names %s", ip)
	}
	return nil
}
