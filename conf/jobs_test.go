package conf_test

import (
	"bytes"
	"maps"
	"os"
	"slices"
	"strconv"
	"testing"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"
)

// The Jobs are what the API server would take, without privileges, on one node, and
// their service, annotations and ports agree.
func TestBenchJobs(t *testing.T) {
	file, err := os.ReadFile("bench-jobs.yaml")
	if err != nil {
		t.Fatal(err)
	}
	documents := bytes.Split(file, []byte("\n---\n"))
	if len(documents) != 3 {
		t.Fatalf("%d documents, want a Service and two Jobs", len(documents))
	}
	var service corev1.Service
	var jobs [2]batchv1.Job
	for i, into := range []any{&service, &jobs[0], &jobs[1]} {
		if err := yaml.UnmarshalStrict(documents[i], into); err != nil {
			t.Fatalf("document %d: %v", i+1, err)
		}
	}
	server, client := jobs[0].Spec.Template, jobs[1].Spec.Template
	if service.Kind != "Service" || service.APIVersion != "v1" || !maps.Equal(service.Spec.Selector, map[string]string{"job-name": jobs[0].Name}) {
		t.Errorf("service %+v does not select the pod of %s", service.TypeMeta, jobs[0].Name)
	}
	for _, job := range jobs {
		pod := job.Spec.Template
		if job.Kind != "Job" || job.APIVersion != "batch/v1" || *job.Spec.BackoffLimit != 0 || job.Spec.ActiveDeadlineSeconds == nil || pod.Spec.RestartPolicy != corev1.RestartPolicyNever {
			t.Errorf("job %s %+v", job.Name, job.Spec)
		}
		if len(pod.Spec.Containers) != 1 || len(pod.Spec.InitContainers) != 0 {
			t.Fatalf("containers of %s", job.Name)
		}
		c := pod.Spec.Containers[0]
		s := c.SecurityContext
		if !*pod.Spec.SecurityContext.RunAsNonRoot || *pod.Spec.AutomountServiceAccountToken || pod.Spec.HostNetwork || pod.Spec.HostPID ||
			s.Privileged != nil || *s.AllowPrivilegeEscalation || !*s.ReadOnlyRootFilesystem ||
			!slices.Equal(s.Capabilities.Drop, []corev1.Capability{"ALL"}) || len(s.Capabilities.Add) > 0 {
			t.Errorf("%s has privileges", job.Name)
		}
		if c.Resources.Limits.Memory().IsZero() || c.Resources.Limits.Cpu().Value() < 2 {
			t.Errorf("limits of %s: %v", job.Name, c.Resources.Limits)
		}
		for _, mount := range c.VolumeMounts {
			if !mount.ReadOnly {
				t.Errorf("%s may write to %s", job.Name, mount.MountPath)
			}
		}
		if !maps.Equal(pod.Annotations, server.Annotations) {
			t.Errorf("annotations of %s: %v", job.Name, pod.Annotations)
		}
	}
	terms := client.Spec.Affinity.PodAffinity.RequiredDuringSchedulingIgnoredDuringExecution
	if len(terms) != 1 || terms[0].TopologyKey != corev1.LabelHostname || !maps.Equal(terms[0].LabelSelector.MatchLabels, service.Spec.Selector) {
		t.Errorf("affinity of the client: %+v", terms)
	}
	if !slices.Contains(client.Spec.Containers[0].Args, "--target="+service.Name) {
		t.Errorf("the client's arguments %v do not name %s", client.Spec.Containers[0].Args, service.Name)
	}
	var open []int32
	for _, p := range service.Spec.Ports {
		open = append(open, p.Port)
	}
	var served []int32
	for _, p := range server.Spec.Containers[0].Ports {
		served = append(served, p.ContainerPort)
	}
	excluded, err := strconv.Atoi(server.Annotations["skipstack/exclude-ports"])
	if err != nil || !slices.Equal(open, served) || len(open) != 2 || int(open[1]) != excluded || int(open[0]) == excluded {
		t.Errorf("ports of the service %v, of the server %v, excluded %d", open, served, excluded)
	}
}
