package conf_test

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"text/template"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"
)

func daemonSet(t *testing.T, raw []byte) appsv1.DaemonSet {
	t.Helper()
	var d appsv1.DaemonSet
	if err := yaml.UnmarshalStrict(raw, &d); err != nil {
		t.Fatalf("%v in\n%s", err, raw)
	}
	return d
}

func manifest(t *testing.T) appsv1.DaemonSet {
	t.Helper()
	raw, err := os.ReadFile("kubernetes/skipstack.yaml")
	if err != nil {
		t.Fatal(err)
	}
	return daemonSet(t, raw)
}

// The manifest asks for no more than documented, and what it mounts is there.
func TestDaemonSet(t *testing.T) {
	d := manifest(t)
	pod := d.Spec.Template
	if d.Kind != "DaemonSet" || d.APIVersion != "apps/v1" || !reflect.DeepEqual(d.Spec.Selector.MatchLabels, pod.Labels) {
		t.Errorf("%+v", d.TypeMeta)
	}
	if *pod.Spec.AutomountServiceAccountToken || pod.Spec.ServiceAccountName != "" || pod.Spec.HostNetwork || pod.Spec.HostPID || pod.Spec.HostIPC {
		t.Error("the agent has more of the node or the cluster than it needs")
	}
	if len(pod.Spec.Containers) != 1 || len(pod.Spec.InitContainers) != 1 {
		t.Fatal("containers")
	}
	agent, mount := pod.Spec.Containers[0], pod.Spec.InitContainers[0]
	if s := agent.SecurityContext; *s.Privileged || !*s.ReadOnlyRootFilesystem || !slices.Equal(s.Capabilities.Drop, []corev1.Capability{"ALL"}) {
		t.Error("the agent is privileged")
	}
	if !agent.Resources.Limits.Memory().IsZero() {
		t.Error("a memory limit would be one on the datapath's maps")
	}
	raw, err := os.ReadFile("../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	docs := string(raw)
	for _, c := range agent.SecurityContext.Capabilities.Add {
		if !strings.Contains(docs, "| `"+string(c)+"` |") {
			t.Errorf("docs/operations.md does not say why the agent needs %s", c)
		}
	}
	volumes := map[string]string{}
	for _, v := range pod.Spec.Volumes {
		volumes[v.Name] = v.HostPath.Path
		if !strings.Contains(docs, "| `"+v.HostPath.Path+"`") {
			t.Errorf("docs/operations.md does not say why the agent needs %s", v.HostPath.Path)
		}
	}
	for _, c := range []corev1.Container{agent, mount} {
		for _, m := range c.VolumeMounts {
			if volumes[m.Name] != m.MountPath {
				t.Errorf("%s: %s is at %s, on the node at %q", c.Name, m.Name, m.MountPath, volumes[m.Name])
			}
			bidirectional := m.MountPropagation != nil && *m.MountPropagation == corev1.MountPropagationBidirectional
			if privileged := c.SecurityContext.Privileged != nil && *c.SecurityContext.Privileged; bidirectional && !privileged {
				t.Errorf("%s: the API server refuses Bidirectional without privileged", c.Name)
			}
		}
	}
}

func TestKustomization(t *testing.T) {
	raw, err := os.ReadFile("kubernetes/kustomization.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var k struct {
		Kind      string
		Resources []string
	}
	if err := yaml.Unmarshal(raw, &k); err != nil || k.Kind != "Kustomization" {
		t.Errorf("%v: %+v", err, k)
	}
	for _, r := range k.Resources {
		if _, err := os.Stat(filepath.Join("kubernetes", r)); err != nil {
			t.Error(err)
		}
	}
}

// render does for this chart what Helm does: it knows the functions that the chart uses.
func render(t *testing.T, name string, change func(values map[string]any)) []byte {
	t.Helper()
	raw, err := os.ReadFile("helm/skipstack/values.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var values map[string]any
	if err := yaml.UnmarshalStrict(raw, &values); err != nil {
		t.Fatal(err)
	}
	change(values)
	tmpl, err := template.New(name).Option("missingkey=error").Funcs(template.FuncMap{
		"toJson": func(v any) (string, error) { raw, err := json.Marshal(v); return string(raw), err },
		"int":    func(v any) int { f, _ := v.(float64); return int(f) },
	}).ParseFiles("helm/skipstack/templates/" + name)
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := tmpl.Execute(&out, map[string]any{"Values": values, "Release": map[string]any{"Namespace": "kube-system"}}); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// The chart with its default values is the manifest.
func TestChart(t *testing.T) {
	got := daemonSet(t, render(t, "daemonset.yaml", func(map[string]any) {}))
	if want := manifest(t); !reflect.DeepEqual(got, want) {
		a, _ := json.MarshalIndent(got, "", " ")
		b, _ := json.MarshalIndent(want, "", " ")
		t.Errorf("the chart gives\n%s\nthe manifest is\n%s", a, b)
	}
	if out := bytes.TrimSpace(render(t, "podmonitor.yaml", func(map[string]any) {})); len(out) != 0 {
		t.Errorf("a PodMonitor that nobody asked for: %s", out)
	}
	changed := daemonSet(t, render(t, "daemonset.yaml", func(v map[string]any) {
		v["image"] = map[string]any{"repository": "registry.example/skipstack", "tag": "v2", "pullPolicy": "Always"}
		v["mode"], v["acceptRisks"], v["replace"] = "on", []any{"splice", "epoll"}, true
		v["cniConfDir"], v["extraArgs"] = "/var/lib/rancher/k3s/agent/etc/cni/net.d", []any{"--conflist=10: #x"}
		v["metrics"] = map[string]any{"port": 9000.0, "pods": 50.0, "podMonitor": true}
	}))
	agent := changed.Spec.Template.Spec.Containers[0]
	want := []string{"agent", "--cni-conf-dir=/var/lib/rancher/k3s/agent/etc/cni/net.d", "--cni-bin-dir=/opt/cni/bin", "--mode=on",
		"--accept-risks=splice", "--accept-risks=epoll", "--replace", "--listen=:9000", "--pod-metrics=50", "--conflist=10: #x"}
	if !slices.Equal(agent.Args, want) || agent.Image != "registry.example/skipstack:v2" || agent.ImagePullPolicy != "Always" {
		t.Errorf("%q, %s, %s; want %q", agent.Args, agent.Image, agent.ImagePullPolicy, want)
	}
	var monitor map[string]any
	out := render(t, "podmonitor.yaml", func(v map[string]any) { v["metrics"] = map[string]any{"podMonitor": true} })
	if err := yaml.UnmarshalStrict(out, &monitor); err != nil || monitor["kind"] != "PodMonitor" {
		t.Errorf("%v: %s", err, out)
	}
}

// Whatever arguments the manifests give the agent, it has.
func TestAgentFlagsExist(t *testing.T) {
	source, err := os.ReadFile("../cmd/internal/cli/agent.go")
	if err != nil {
		t.Fatal(err)
	}
	common, err := os.ReadFile("../cmd/internal/cli/cli.go")
	if err != nil {
		t.Fatal(err)
	}
	dirs, err := os.ReadFile("../cmd/internal/cli/install.go")
	if err != nil {
		t.Fatal(err)
	}
	known := string(source) + string(common) + string(dirs)
	for _, file := range []string{"kubernetes/skipstack.yaml", "helm/skipstack/templates/daemonset.yaml"} {
		raw, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range regexp.MustCompile(`[ ,]--([a-z-]+)`).FindAllSubmatch(raw, -1) {
			if !strings.Contains(known, `"`+string(m[1])+`"`) {
				t.Errorf("%s: the agent has no --%s", file, m[1])
			}
		}
	}
}
