package inside_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/skipstack/skipstack/test/must"
)

// TestCluster is a cluster of one node: Services by kube-proxy, and a rolling update.
func TestCluster(t *testing.T) {
	n := newNode(t)
	token := credentials(t)
	for _, service := range []string{"etcd", "kube-apiserver", "kube-controller-manager"} {
		n.service(service)
	}
	a := newAPI(t, token)
	wait(t, func() error { return a.ready(t.Context()) })
	const env = "/run/kubelet.env"
	must.Do(t, os.WriteFile(env, []byte("KUBELET_ARGS=--kubeconfig="+clusterDir+"/kubeconfig\n"), 0o600))
	t.Cleanup(func() { must.Do(t, os.Remove(env)) })
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

	n.service("kube-proxy@nftables")
	a.create(t, deployments, "web")
	a.create(t, services, "web-service")
	a.create(t, pods, "load")
	client = n.pod("load")
	t.Run("rolling update", func(t *testing.T) { rollingUpdate(t, n, a, client) })
	n.works("rolling update under load: no failed request")
	a.patch(t, deployments+"/web", scale(0))
	a.delete(t, pods+"/load")
	a.waitRolledOut(t, "web")
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

// load is what peer's load prints.
type load struct {
	Requests, Bytes, Connections int
	Failures                     []string
	Servers                      map[string]int
}

// rollingUpdate replaces all pods of a Service while a client asks it all the time.
func rollingUpdate(t *testing.T, n *node, a *api, client *pod) {
	const (
		url  = "http://10.96.0.90:81/"
		stop = "/stop"
	)
	old := a.waitRolledOut(t, "web")
	wait(t, func() error { return proxied("nftables", "10.96.0.90") })
	before := redirected(t, client)
	var servers uint64 // bytes that they had redirected
	for _, name := range old {
		servers += redirected(t, n.pod(name))
	}
	var result load
	ended := make(chan error, 1)
	ctx, cancel := context.WithTimeout(t.Context(), 3*patience)
	defer cancel()
	go func() { ended <- client.container.Run(ctx, &result, "/peer", "load", url, stop) }()
	wait(t, func() error { // for the first answers
		var now uint64
		for _, name := range old {
			p := n.pod(name)
			now += redirected(t, p)
		}
		if now < servers+64<<10 {
			return fmt.Errorf("the servers have redirected %d bytes", now-servers)
		}
		return nil
	})
	begin := time.Now()
	a.patch(t, deployments+"/web", map[string]any{"spec": map[string]any{"template": map[string]any{
		"metadata": map[string]any{"labels": map[string]any{"version": "2"}},
	}}})
	renewed := a.waitRolledOut(t, "web")
	took := time.Since(begin)
	for _, name := range renewed {
		for _, o := range old {
			if name == o {
				t.Fatalf("pod %s was not replaced", name)
			}
		}
	}
	// The new ones serve, past the stack.
	wait(t, func() error {
		for _, name := range renewed {
			if redirected(t, n.pod(name)) < 64<<10 {
				return errors.New("no answers of " + name)
			}
		}
		return nil
	})
	must.Do(t, client.run(nil, "touch", stop))
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	t.Logf("rolled out in %s: %d requests by %d connections, %d bytes of answers, by server %v; the client redirected %d bytes; failed: %d",
		took.Round(time.Second), result.Requests, result.Connections, result.Bytes, result.Servers, redirected(t, client)-before, len(result.Failures))
	for _, f := range result.Failures {
		t.Error(f)
	}
	for _, name := range append(old, renewed...) {
		if result.Servers[name] == 0 {
			t.Errorf("%s has served no request", name)
		}
	}
}
