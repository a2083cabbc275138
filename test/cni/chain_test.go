package cni_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"
	"golang.org/x/sys/unix"

	"github.com/skipstack/skipstack/test/datapath/traffic"
	"github.com/skipstack/skipstack/test/must"
	"github.com/skipstack/skipstack/test/node"
)

// The samples, word for word, at the paths that skipstack uses when nothing is
// configured, accelerate exactly what the kernel's verdict and the risks they
// accept imply.
func TestConflists(t *testing.T) {
	node.Need(t)
	v := theVerdict(t)
	for _, tc := range []struct {
		file                  string
		nonblocking, blocking bool
	}{
		{"10-bridge.conflist", v.accelerates(), false},
		{"10-bridge-accept-splice.conflist", v.accelerates("splice"), false},
		{"10-bridge-accept-splice-blocking.conflist", v.accelerates("splice"), v.accelerates("splice")},
		{"10-ptp.conflist", v.accelerates(), false},
		{"10-ptp-accept-splice.conflist", v.accelerates("splice"), false},
		{"10-ptp-accept-splice-blocking.conflist", v.accelerates("splice"), v.accelerates("splice")},
		{"reference.conflist", v.accelerates(), false},
		{"entry.json", v.accelerates(), false},
	} {
		t.Run(tc.file, func(t *testing.T) {
			s := newSite(t, options{Options: node.Options{DefaultPaths: true}})
			s.load()
			raw := must.Get(os.ReadFile(filepath.Join("../../conf", tc.file)))(t)
			if tc.file == "entry.json" { // appended to somebody's own network
				raw = fmt.Appendf(nil, `{"cniVersion":"1.1.0","name":"own","plugins":[
					{"type":"ptp","ipam":{"type":"host-local","ranges":[[{"subnet":"10.77.0.0/24"}]],"routes":[{"dst":"0.0.0.0/0"}]}},%s]}`, raw)
			}
			list := must.Get(s.Conflist(raw))(t)
			client, server := s.twoPods(list, node.PodOptions{})
			s.wantAcceleratedIf(tc.nonblocking, "non-blocking", direct(client, server))
			s.wantAcceleratedIf(tc.blocking, "blocking", direct(client, server).blocking())
			for _, p := range []*pod{client, server} {
				s.wantRecord(p.ID, "attached", "")
				must.Do(t, p.Check(t.Context(), list, node.IfName))
			}
			s.wantLinks(client.cgroupID(t), server.cgroupID(t))
			if says := strings.Contains(s.log.take(), "risks that are not accepted"); says == tc.nonblocking {
				t.Errorf("pods are accelerated: %v; the log says that they are not: %v", tc.nonblocking, says)
			}
		})
	}
}

// recorder runs plugins for libcni and keeps what they were given and printed.
type recorder struct {
	s *site
	version.PluginDecoder
	handicap string // skipstack's, see [handicap]
	calls    []recorded
}

type recorded struct {
	plugin        string
	stdin, stdout []byte
	stderr        string
}

func (r *recorder) FindInPath(plugin string, paths []string) (string, error) {
	return invoke.FindInPath(plugin, paths)
}

func (r *recorder) ExecPlugin(ctx context.Context, path string, stdin []byte, env []string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, path)
	cmd.Env = env
	if filepath.Base(path) == node.PluginType && r.handicap != "" {
		cmd = r.s.handicapped(ctx, r.handicap, env)
	}
	cmd.Stdin = bytes.NewReader(stdin)
	got := r.s.exec(cmd)
	must.Get(r.s.log.Write([]byte(got.stderr)))(r.s.t)
	r.calls = append(r.calls, recorded{filepath.Base(path), stdin, []byte(got.stdout), got.stderr})
	if got.code == 0 {
		return []byte(got.stdout), nil
	}
	var e types.Error
	if err := json.Unmarshal([]byte(got.stdout), &e); err != nil {
		return nil, errors.New(got.stdout + got.stderr)
	}
	return nil, &e
}

func (s *site) libcni() (*libcni.CNIConfig, *recorder) {
	r := &recorder{s: s}
	return libcni.NewCNIConfigWithCacheDir([]string{s.BinDir, node.ProgramDir()}, s.CacheDir, r), r
}

// In a chain run by libcni, in every version of the specification, the previous
// plugin's result is the network's result.
func TestChainOfEveryVersion(t *testing.T) {
	s := newSite(t, options{})
	s.load()
	for _, v := range []string{"0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"} {
		t.Run(v, func(t *testing.T) {
			s := s.in(t)
			list := s.network(node.Network{Version: v})
			p := must.Get(s.NewPod("pod", node.PodOptions{}))(t)
			defer p.Close(t.Context())
			rt := p.RuntimeConf(node.IfName)
			cni, rec := s.libcni()
			var res types.Result
			add := func() (err error) {
				rec.calls = nil
				res, err = cni.AddNetworkList(t.Context(), list, rt)
				return err
			}
			s.onTime(p.ID, add, func() { must.Do(t, cni.DelNetworkList(t.Context(), list, rt)) })
			if res.Version() != v || len(rec.calls) != 2 || rec.calls[1].plugin != "skipstack" {
				t.Fatalf("result of version %s after %d calls", res.Version(), len(rec.calls))
			}
			var first, last any
			must.Do(t, json.Unmarshal(rec.calls[0].stdout, &first))
			must.Do(t, json.Unmarshal(rec.calls[1].stdout, &last))
			if !reflect.DeepEqual(first, last) {
				t.Errorf("the bridge's result\n%s\nbecame\n%s", rec.calls[0].stdout, rec.calls[1].stdout)
			}
			var given struct{ PrevResult json.RawMessage }
			must.Do(t, json.Unmarshal(rec.calls[1].stdin, &given))
			if !bytes.Equal(given.PrevResult, rec.calls[1].stdout) {
				t.Errorf("prevResult\n%s\nwas printed as\n%s", given.PrevResult, rec.calls[1].stdout)
			}
			s.wantRecord(p.ID, "attached", "")
			s.wantLinks(inode(t, p.Cgroup))

			err := cni.CheckNetworkList(t.Context(), list, rt)
			if hasCheck := slices.Contains([]string{"0.4.0", "1.0.0", "1.1.0"}, v); hasCheck != (err == nil) {
				t.Errorf("CHECK: %v", err)
			}
			if v == "1.1.0" {
				must.Do(t, cni.GetStatusNetworkList(t.Context(), list))
				valid := []types.GCAttachment{{ContainerID: p.ID, IfName: node.IfName}}
				must.Do(t, cni.GCNetworkList(t.Context(), list, &libcni.GCArgs{ValidAttachments: valid}))
				s.wantLinks(inode(t, p.Cgroup))
			}
			s.onTime(p.ID, func() error { return cni.DelNetworkList(t.Context(), list, rt) }, func() { must.Do(t, add()) })
			s.wantNothing()
			must.Do(t, cni.DelNetworkList(t.Context(), list, rt))
		})
	}
}

// Whatever way pods reach each other, they are accelerated.
func TestRoutes(t *testing.T) {
	s := newSite(t, options{})
	s.load()
	list := s.network(node.Network{})
	client, server := s.twoPods(list, node.PodOptions{})
	inPod := must.Get(os.MkdirTemp(server.Cgroup, "container-"))(t)
	container := must.Get(traffic.NewHost(server.Pod, node.StartOptions{Cgroup: inPod}))(t)
	defer container.Close()

	service := func(ip string, masquerade bool) func(*traffic.Listener) netip.AddrPort {
		addr := netip.MustParseAddr(ip)
		backend, _ := server.Addr(addr.Is6())
		svc := must.Get(s.AddService(node.ServiceOptions{IP: addr, Backend: backend, Masquerade: masquerade}))(t)
		t.Cleanup(func() { must.Do(t, svc.Close()) })
		return func(l *traffic.Listener) netip.AddrPort { return netip.AddrPortFrom(addr, l.Addr.Port()) }
	}
	any6 := netip.MustParseAddrPort("[::]:0")
	accelerated := accepted(t)
	for name, r := range map[string]route{
		"IPv4": direct(client, server),
		"IPv6": {client: client.host, server: server.host, listen: server.at(true, 0)},
		"IPv4 to a dual-stack listener": {client: client.host, server: server.host, listen: any6,
			by: func(l *traffic.Listener) netip.AddrPort { return server.at(false, l.Addr.Port()) }},
		"mapped IPv4": {client: client.host, server: server.host, listen: server.at(false, 0),
			socket: traffic.SocketOptions{Family: unix.AF_INET6}},
		"two containers of one pod":          {client: container, server: server.host, listen: netip.MustParseAddrPort("127.0.0.1:0")},
		"two containers of one pod, IPv6":    {client: server.host, server: container, listen: netip.MustParseAddrPort("[::1]:0")},
		"service":                            {client: client.host, server: server.host, listen: server.at(false, 0), by: service("10.96.0.1", false)},
		"service with masquerade":            {client: client.host, server: server.host, listen: server.at(false, 0), by: service("10.96.0.2", true)},
		"IPv6 service with masquerade":       {client: client.host, server: server.host, listen: server.at(true, 0), by: service("fd00:96::2", true)},
		"service, a pod reaches itself by":   {client: server.host, server: server.host, listen: server.at(false, 0), by: service("10.96.0.3", true)},
		"service, dual-stack listener":       {client: client.host, server: server.host, listen: any6, by: service("10.96.0.4", true)},
		"service, another container answers": {client: client.host, server: container, listen: server.at(false, 0), by: service("10.96.0.5", true)},
	} {
		t.Run(name, func(t *testing.T) {
			s := s.in(t)
			if strings.HasPrefix(name, "service") && !s.HasBridgeNetfilter() {
				t.Skip("needs bridge netfilter")
			}
			s.wantAcceleratedIf(accelerated, name, r)
		})
	}

	// A pod of the same bridge without skipstack is remote to the others.
	plain := s.pod("plain", must.Get(node.WithoutSkipstack(list))(t), node.PodOptions{})
	s.wantPlain("a plain server", direct(client, plain))
	s.wantPlain("a plain client", direct(plain, server))
}

// What mode, annotations and bandwidth limits make of a pod.
func TestPolicy(t *testing.T) {
	node.Need(t)
	v := theVerdict(t)
	all := []string{"splice", "fionread", "epoll", "uncharged", "blocking"}
	// A pod cannot accept what the whole node pays for.
	tenants := slices.DeleteFunc(slices.Clone(all), func(s string) bool { return s == "uncharged" })
	on, off := map[string]string{"skipstack/mode": "on"}, map[string]string{"skipstack/mode": "off"}
	limited := map[string]string{"kubernetes.io/egress-bandwidth": "1M"}
	type skipstack = map[string]any
	for _, tc := range []struct {
		name                  string
		conf                  skipstack
		client, server        map[string]string // annotations
		capabilities          map[string]any    // of both
		nonblocking, blocking bool
		reason                string // of the server's record
	}{
		{name: "auto", conf: skipstack{}, nonblocking: v.accelerates()},
		{name: "auto, both on", conf: skipstack{}, client: on, server: on, nonblocking: v.accelerates(tenants...), blocking: v.accelerates(tenants...)},
		{name: "auto, one on", conf: skipstack{}, client: on, nonblocking: v.accelerates()},
		{name: "accepted, one off", conf: accepting, client: off},
		{name: "accepted, both off", conf: accepting, client: off, server: off, reason: "annotation"},
		{name: "on", conf: skipstack{"mode": "on"}, nonblocking: v.accelerates(all...), blocking: v.accelerates(all...)},
		{name: "on, annotation auto", conf: skipstack{"mode": "on"}, client: map[string]string{"skipstack/mode": "auto"}, nonblocking: v.accelerates()},
		{name: "off, both on", conf: skipstack{"mode": "off"}, client: on, server: on, reason: "mode off"},
		{name: "malformed annotation", conf: skipstack{"mode": "on", "onError": "fail"},
			server: map[string]string{"skipstack/mode": "yes"}, reason: `annotation skipstack/mode: "yes" is not one of`},
		{name: "unknown annotation", conf: skipstack{"mode": "on", "onError": "fail"},
			server: map[string]string{"skipstack/exclude-port": "80"}, reason: `unknown annotation "skipstack/exclude-port"`},
		{name: "limited", conf: accepting, server: limited, reason: "bandwidth"},
		{name: "limited, on", conf: skipstack{"mode": "on"}, client: limited, server: limited, nonblocking: v.accelerates(all...), blocking: v.accelerates(all...)},
		{name: "limited by the runtime", conf: skipstack{"acceptRisks": all, "capabilities": skipstack{"bandwidth": true, "cgroupPath": true}},
			capabilities: map[string]any{"bandwidth": map[string]any{"ingressRate": 8000000, "ingressBurst": 8000000}}, reason: "bandwidth"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := newSite(t, options{})
			list := s.network(node.Network{Skipstack: tc.conf})
			client := s.pod("client", list, node.PodOptions{Annotations: tc.client, Capabilities: tc.capabilities})
			server := s.pod("server", list, node.PodOptions{Annotations: tc.server, Capabilities: tc.capabilities})
			s.wantAcceleratedIf(tc.nonblocking, "non-blocking", direct(client, server))
			s.wantAcceleratedIf(tc.blocking, "blocking", direct(client, server).blocking())
			if tc.reason == "" {
				s.wantRecord(server.ID, "attached", "")
			} else {
				s.wantRecord(server.ID, "skipped", tc.reason)
				if log := s.log.take(); !strings.Contains(log, tc.reason[:8]) {
					t.Errorf("the log does not say why: %q", log)
				}
			}
		})
	}
}

// Ports that the configuration, the server or the client excludes are plain, and
// the port beside them is not.
func TestExcludedPorts(t *testing.T) {
	s := newSite(t, options{})
	list := s.network(node.Network{Skipstack: withAccepting("excludePorts", []any{7001, "7100-7110"})})
	exclude := func(ports string) node.PodOptions {
		return node.PodOptions{Annotations: map[string]string{"skipstack/exclude-ports": ports}}
	}
	client := s.pod("client", list, exclude("7003"))
	server := s.pod("server", list, exclude("7002, 7200-7201"))
	for _, port := range []uint16{7001, 7105, 7110, 7002, 7200, 7003} {
		s.wantPlain("an excluded port", direct(client, server).port(port))
	}
	accelerated := accepted(t)
	for _, port := range []uint16{7000, 7111, 7202} {
		s.wantAcceleratedIf(accelerated, "a port that is not excluded", direct(client, server).port(port))
	}
	other := s.pod("other", list, node.PodOptions{})
	s.wantAcceleratedIf(accelerated, "a port that another client excludes", direct(other, server).port(7003))
}
