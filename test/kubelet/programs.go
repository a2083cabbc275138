package main

import (
	"context"
	"os"
	"path/filepath"
	"strings"

	"github.com/skipstack/skipstack/test/vm/machine"
)

// kubernetes is the directory of the module that pins Kubernetes' version. It is
// apart from the project's own, which does without its modules.
const kubernetes = "test/kubelet/kubernetes"

// components are Kubernetes' programs. There is no scheduler: the only node is named
// in all pods, which saves a quarter of an hour of building and tests nothing less.
var components = []string{"kubelet", "kube-proxy", "kube-apiserver", "kube-controller-manager"}

// programs are the packages of the project's own programs and of the CNI plugins.
var programs = []string{
	"./test/vm/guest",
	"./test/runtimes/peer",
	"./cmd/skipstack",
	"github.com/containernetworking/plugins/plugins/main/bridge",
	"github.com/containernetworking/plugins/plugins/main/loopback",
	"github.com/containernetworking/plugins/plugins/ipam/host-local",
	"github.com/containernetworking/plugins/plugins/meta/portmap",
}

// inside is the package of the tests that run in the virtual machine.
const inside = "./test/kubelet/inside"

func (l *lab) bin(name string) string { return filepath.Join(l.cache, "bin", name) }

// build builds all programs, static.
func (l *lab) build(ctx context.Context) error {
	bin := l.bin("") + "/"
	if err := os.MkdirAll(bin, 0o755); err != nil {
		return err
	}
	if _, err := machine.Go(ctx, "", machine.AMD64, append([]string{"build", "-trimpath", "-o", bin}, programs...)...); err != nil {
		return err
	}
	if _, err := machine.Go(ctx, "", machine.AMD64, "test", "-c", "-o", bin, inside); err != nil {
		return err
	}
	return l.buildKubernetes(ctx)
}

// buildKubernetes builds Kubernetes' programs once for each version: that takes half
// an hour of two CPUs, and finding that nothing has changed a minute.
func (l *lab) buildKubernetes(ctx context.Context) error {
	list, err := machine.Go(ctx, kubernetes, machine.AMD64, "list", "-m", "-f", "{{.Version}}", "k8s.io/kubernetes")
	if err != nil {
		return err
	}
	version := strings.TrimSpace(list)
	l.kubernetes = filepath.Join(l.cache, "kubernetes-"+version)
	if err := os.MkdirAll(l.kubernetes, 0o755); err != nil {
		return err
	}
	for _, name := range components {
		path := filepath.Join(l.kubernetes, name)
		if _, err := os.Stat(path); err == nil {
			continue
		}
		logf("building %s %s", name, version)
		// The name comes last, so that a build that was cut short is begun again.
		part := path + ".part"
		_, err := machine.Go(ctx, kubernetes, machine.AMD64, "build", "-trimpath", "-ldflags=-s -w -X k8s.io/component-base/version.gitVersion="+version,
			"-o", part, "k8s.io/kubernetes/cmd/"+name)
		if err == nil {
			err = os.Rename(part, path)
		}
		if err != nil {
			return err
		}
	}
	return nil
}
