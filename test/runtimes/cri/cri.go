// Package cri is a small kubelet's side of the container runtime interface.
package cri

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// A Client talks to a runtime. Close it after use.
type Client struct {
	conn *grpc.ClientConn
	api  runtime.RuntimeServiceClient
	logs string
}

// callLimit is how long a call may take whose context has no deadline.
const callLimit = 5 * time.Minute

// Dial returns a client for the runtime that serves socket. Logs of containers are
// kept below logs.
func Dial(socket, logs string) (*Client, error) {
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithUnaryInterceptor(limit))
	if err != nil {
		return nil, fmt.Errorf("talk to %s: %w", socket, err)
	}
	return &Client{conn: conn, api: runtime.NewRuntimeServiceClient(conn), logs: logs}, nil
}

// limit lets a call to a runtime that hangs fail.
func limit(ctx context.Context, method string, req, reply any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker, options ...grpc.CallOption) error {
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, callLimit)
		defer cancel()
	}
	return invoke(ctx, method, req, reply, conn, options...)
}

// Close ends the connection.
func (c *Client) Close() error { return c.conn.Close() }

// NetworkReady says whether the runtime can make pods, and why not.
func (c *Client) NetworkReady(ctx context.Context) error {
	s, err := c.api.Status(ctx, &runtime.StatusRequest{})
	if err != nil {
		return err
	}
	var errs []error
	for _, condition := range s.Status.Conditions {
		// Other conditions are the runtime's own, such as one that it warns of deprecation.
		if !condition.Status && (condition.Type == runtime.RuntimeReady || condition.Type == runtime.NetworkReady) {
			errs = append(errs, fmt.Errorf("%s: %s", condition.Type, condition.Message))
		}
	}
	return errors.Join(errs...)
}

// PodOptions describe a pod.
type PodOptions struct {
	Name, UID    string
	CgroupParent string // as a kubelet with the cgroupfs driver makes it
	Annotations  map[string]string
	HostPorts    map[int32]int32 // port of the node -> port of the pod
}

// A Pod is a sandbox.
type Pod struct {
	ID     string
	client *Client
	config *runtime.PodSandboxConfig
}

// RunPod makes a sandbox, and its network.
func (c *Client) RunPod(ctx context.Context, o PodOptions) (*Pod, error) {
	config := &runtime.PodSandboxConfig{
		Metadata:     &runtime.PodSandboxMetadata{Name: o.Name, Namespace: "default", Uid: o.UID},
		Hostname:     o.Name,
		LogDirectory: filepath.Join(c.logs, o.UID),
		Annotations:  o.Annotations,
		Linux:        &runtime.LinuxPodSandboxConfig{CgroupParent: o.CgroupParent},
	}
	for from, to := range o.HostPorts {
		config.PortMappings = append(config.PortMappings, &runtime.PortMapping{HostPort: from, ContainerPort: to})
	}
	r, err := c.api.RunPodSandbox(ctx, &runtime.RunPodSandboxRequest{Config: config})
	if err != nil {
		return nil, fmt.Errorf("run pod %s: %w", o.Name, err)
	}
	return &Pod{ID: r.PodSandboxId, client: c, config: config}, nil
}

// Addresses are the pod's, IPv4 or the network's first before the others.
func (p *Pod) Addresses(ctx context.Context) ([]string, error) {
	r, err := p.client.api.PodSandboxStatus(ctx, &runtime.PodSandboxStatusRequest{PodSandboxId: p.ID})
	if err != nil {
		return nil, err
	}
	all := []string{r.Status.Network.GetIp()}
	for _, ip := range r.Status.Network.GetAdditionalIps() {
		all = append(all, ip.Ip)
	}
	return all, nil
}

// Remove stops the pod with its containers, and removes it. It may be called again.
func (p *Pod) Remove(ctx context.Context) error {
	_, err := p.client.api.StopPodSandbox(ctx, &runtime.StopPodSandboxRequest{PodSandboxId: p.ID})
	if err != nil && status.Code(err) != codes.NotFound { // containerd 1.6 knows no pod that is gone
		return fmt.Errorf("stop pod: %w", err)
	}
	if _, err := p.client.api.RemovePodSandbox(ctx, &runtime.RemovePodSandboxRequest{PodSandboxId: p.ID}); err != nil {
		return fmt.Errorf("remove pod: %w", err)
	}
	return nil
}

// Find returns the running container of that name in a pod that a kubelet has made,
// and the pod. What it does not find may come yet.
func (c *Client) Find(ctx context.Context, namespace, pod, container string) (*Container, error) {
	r, err := c.api.ListContainers(ctx, &runtime.ListContainersRequest{Filter: &runtime.ContainerFilter{
		State: &runtime.ContainerStateValue{State: runtime.ContainerState_CONTAINER_RUNNING},
		LabelSelector: map[string]string{
			"io.kubernetes.pod.namespace": namespace, "io.kubernetes.pod.name": pod, "io.kubernetes.container.name": container,
		},
	}})
	if err != nil {
		return nil, fmt.Errorf("list containers: %w", err)
	}
	if len(r.Containers) != 1 {
		return nil, fmt.Errorf("pod %s/%s has %d running containers %s, want one", namespace, pod, len(r.Containers), container)
	}
	found := r.Containers[0]
	return &Container{ID: found.Id, Pod: &Pod{ID: found.PodSandboxId, client: c}}, nil
}

// A Container is one of a pod's.
type Container struct {
	ID  string
	Pod *Pod
}

// Start starts a container of the image that runs args.
func (p *Pod) Start(ctx context.Context, name string, attempt uint32, image string, args ...string) (*Container, error) {
	api := p.client.api
	r, err := api.CreateContainer(ctx, &runtime.CreateContainerRequest{
		PodSandboxId:  p.ID,
		SandboxConfig: p.config,
		Config: &runtime.ContainerConfig{
			Metadata: &runtime.ContainerMetadata{Name: name, Attempt: attempt},
			Image:    &runtime.ImageSpec{Image: image},
			Args:     args,
			LogPath:  fmt.Sprintf("%s-%d.log", name, attempt),
			Linux:    &runtime.LinuxContainerConfig{},
		},
	})
	if err != nil {
		return nil, fmt.Errorf("create container %s: %w", name, err)
	}
	if _, err := api.StartContainer(ctx, &runtime.StartContainerRequest{ContainerId: r.ContainerId}); err != nil {
		return nil, fmt.Errorf("start container %s: %w", name, err)
	}
	return &Container{ID: r.ContainerId, Pod: p}, nil
}

// Run runs a program in the container to its end and decodes what it printed, if
// result is not nil. The runtime ends the program at ctx's deadline, or after 90 s if
// there is none.
func (c *Container) Run(ctx context.Context, result any, args ...string) error {
	timeout := 90 * time.Second
	if deadline, ok := ctx.Deadline(); ok {
		timeout = time.Until(deadline)
	}
	r, err := c.Pod.client.api.ExecSync(ctx, &runtime.ExecSyncRequest{ContainerId: c.ID, Cmd: args, Timeout: int64(timeout.Seconds()) + 1})
	if err != nil {
		return fmt.Errorf("%s: %w", strings.Join(args, " "), err)
	}
	if r.ExitCode != 0 {
		return fmt.Errorf("%s: exit code %d: %s", strings.Join(args, " "), r.ExitCode, r.Stderr)
	}
	if result == nil {
		return nil
	}
	return json.Unmarshal(r.Stdout, result)
}

// Remove stops the container and removes it.
func (c *Container) Remove(ctx context.Context) error {
	api := c.Pod.client.api
	if _, err := api.StopContainer(ctx, &runtime.StopContainerRequest{ContainerId: c.ID}); err != nil {
		return err
	}
	_, err := api.RemoveContainer(ctx, &runtime.RemoveContainerRequest{ContainerId: c.ID})
	return err
}
