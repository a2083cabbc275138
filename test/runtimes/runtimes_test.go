package runtimes_test

import (
	"fmt"
	"net/netip"
	"path/filepath"
	"sync"
	"testing"

	"github.com/skipstack/skipstack/plugin/datapath"
	"github.com/skipstack/skipstack/test/must"
	"github.com/skipstack/skipstack/test/node"
	"github.com/skipstack/skipstack/test/runtimes/cri"
)

func at(ip string, port int) string {
	if addr := netip.MustParseAddr(ip); addr.Is6() {
		return fmt.Sprintf("[%s]:%d", ip, port)
	}
	return fmt.Sprintf("%s:%d", ip, port)
}

// Two pods talk past the stack by every way that leads from one to the other.
func TestWays(t *testing.T) {
	eachRuntime(t, func(s *site) {
		server := s.pod("server", cri.PodOptions{HostPorts: map[int32]int32{8080: 80}})
		client := s.pod("client", cri.PodOptions{})
		server.run("serve", 0, "serve", "80")
		c := client.run("talk", 0, "pause")
		s.waitOpen()
		s.attached(server, true)
		s.attached(client, true)

		s.accelerated(c, at(server.ip, 80), client, server)
		s.works("pod IP")
		s.accelerated(c, at(server.ip6, 80), client, server)
		s.works("pod IP, IPv6")
		for what, o := range map[string]node.ServiceOptions{
			"Service":       {IP: netip.MustParseAddr("10.96.0.1"), Port: 81, Backend: netip.MustParseAddr(server.ip), BackendPort: 80, Masquerade: true},
			"Service, IPv6": {IP: netip.MustParseAddr("fd00:96::1"), Port: 81, Backend: netip.MustParseAddr(server.ip6), BackendPort: 80, Masquerade: true},
		} {
			service := must.Get(s.AddService(o))(s.t)
			s.accelerated(c, at(o.IP.String(), 81), client, server)
			must.Do(s.t, service.Close())
			s.works(what)
		}
		// The bridge's address is the node's.
		s.accelerated(c, at("10.85.0.1", 8080), client, server)
		s.works("hostPort")
	})
}

// Containers of one pod share its network namespace, and its acceleration.
func TestContainersOfOnePod(t *testing.T) {
	eachRuntime(t, func(s *site) {
		p := s.pod("pair", cri.PodOptions{})
		server := p.run("serve", 0, "serve", "80")
		c := p.run("talk", 0, "pause")
		s.waitOpen()
		s.accelerated(c, at("127.0.0.1", 80), p)
		s.accelerated(c, at("::1", 80), p)
		s.works("two containers of one pod")

		// A container that is restarted is in the pod's cgroup again.
		must.Do(s.t, server.Remove(t.Context()))
		p.run("serve", 1, "serve", "80")
		s.accelerated(c, at("127.0.0.1", 80), p)
		s.works("restart of a container")
	})
}

// Annotations reach the plugin by the capability that the conflist declares.
func TestAnnotations(t *testing.T) {
	eachRuntime(t, func(s *site) {
		server := s.pod("server", cri.PodOptions{Annotations: map[string]string{"skipstack/exclude-ports": "81"}})
		out := s.pod("out", cri.PodOptions{Annotations: map[string]string{"skipstack/mode": "off"}})
		client := s.pod("client", cri.PodOptions{})
		server.run("a", 0, "serve", "80")
		server.run("b", 0, "serve", "81")
		s.waitOpen()
		c := client.run("talk", 0, "pause")
		s.accelerated(c, at(server.ip, 80), client, server)
		s.plain(c, at(server.ip, 81))
		s.works("excluded port, by annotation: plain")
		s.plain(out.run("talk", 0, "pause"), at(server.ip, 80))
		s.attached(out, false)
		s.works("opt-out, by annotation: plain")
	})
}

// Pods that are deleted leave nothing, and take nothing from others.
func TestRemoval(t *testing.T) {
	eachRuntime(t, func(s *site) {
		server := s.pod("server", cri.PodOptions{})
		server.run("serve", 0, "serve", "80")
		client := s.pod("client", cri.PodOptions{})
		s.waitOpen()
		for range 3 {
			gone := s.pod("gone", cri.PodOptions{})
			s.accelerated(gone.run("talk", 0, "pause"), at(server.ip, 80), gone, server)
			must.Do(t, gone.remove())
			s.attached(gone, false)
		}
		s.attached(server, true)
		s.accelerated(client.run("talk", 0, "pause"), at(server.ip, 80), client, server)
		if records := s.records(); len(records) != 2 {
			s.t.Errorf("attachments of %d pods are recorded, want 2", len(records))
		}
		s.works("deletion of a pod: nothing left")
	})
}

// A runtime that is restarted finds its pods, and goes on to delete them.
func TestRestartOfTheRuntime(t *testing.T) {
	eachRuntime(t, func(s *site) {
		server, client := s.pod("server", cri.PodOptions{}), s.pod("client", cri.PodOptions{})
		server.run("serve", 0, "serve", "80")
		c := client.run("talk", 0, "pause")
		s.waitOpen()
		s.accelerated(c, at(server.ip, 80), client, server)
		must.Do(s.t, s.daemon.Stop())
		s.start()
		wait(s.t, func() error { return s.client.NetworkReady(t.Context()) })
		s.accelerated(c, at(server.ip, 80), client, server)
		later := s.pod("later", cri.PodOptions{})
		s.accelerated(later.run("talk", 0, "pause"), at(server.ip, 80), later, server)
		s.works("restart of the runtime, pods running")
	})
}

// After a reboot there are no pins, but the runtime knows its pods and deletes them.
func TestReboot(t *testing.T) {
	eachRuntime(t, func(s *site) {
		old := s.pod("old", cri.PodOptions{})
		s.waitOpen()
		if _, err := datapath.Unload(t.Context(), s.BPFFS, true); err != nil {
			s.t.Fatal(err)
		}
		must.Do(s.t, old.remove())
		server, client := s.pod("server", cri.PodOptions{}), s.pod("client", cri.PodOptions{})
		server.run("serve", 0, "serve", "80")
		s.waitOpen()
		s.accelerated(client.run("talk", 0, "pause"), at(server.ip, 80), client, server)
		s.works("reboot: no pins, late DELs")
	})
}

// Fifty pods start at once, the first of this boot among them.
func TestManyPodsAtOnce(t *testing.T) {
	eachRuntime(t, func(s *site) {
		const count = 50
		pods, errs := make([]*pod, count), make([]error, count)
		var wg sync.WaitGroup
		for i := range count {
			wg.Go(func() { pods[i], errs[i] = s.newPod(fmt.Sprintf("pod%d", i), cri.PodOptions{}) })
		}
		wg.Wait()
		for _, err := range errs {
			must.Do(s.t, err)
		}
		s.waitOpen()
		// Those for which there was no time at first are attached later.
		for _, p := range pods {
			s.attached(p, true)
		}
		a, b := pods[0], pods[count-1]
		a.run("serve", 0, "serve", "80")
		s.accelerated(b.run("talk", 0, "pause"), at(a.ip, 80), a, b)
		s.works("50 pods at once")
	})
}

func (s *site) records() []string {
	s.t.Helper()
	return must.Get(filepath.Glob(filepath.Join(s.RunDir, "attachments", "[0-9a-f]*.json")))(s.t)
}
