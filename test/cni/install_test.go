package cni_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/containernetworking/cni/libcni"

	"github.com/skipstack/skipstack/plugin/datapath"
	"github.com/skipstack/skipstack/test/must"
	"github.com/skipstack/skipstack/test/node"
)

// Installed by the command, pods are attached; drained, nothing is left of it, and no
// connection has broken.
func TestInstallAndDrain(t *testing.T) {
	node.Need(t)
	restore := node.OtherSwitches(0) // `off` reaches those too
	t.Cleanup(func() { must.Do(t, restore()) })
	s := newSite(t, options{})
	confDir, binDir := filepath.Join(s.Dir, "installed", "net.d"), filepath.Join(s.Dir, "installed", "bin")
	must.Do(t, errors.Join(os.MkdirAll(confDir, 0o755), os.MkdirAll(binDir, 0o755)))
	sample, file := filepath.Join(s.Dir, "sample.conflist"), filepath.Join(confDir, "10-n.conflist")
	list := s.network(node.Network{}).Bytes
	must.Do(t, errors.Join(os.WriteFile(sample, list, 0o644), os.WriteFile(file, list, 0o644)))
	run := func(args ...string) outcome {
		return s.cli(append(args, "--cni-conf-dir", confDir, "--cni-bin-dir", binDir)...)
	}
	uninstall := []string{"uninstall", "--cni-cache-dir", filepath.Join(s.Dir, "none")}
	s.wantCLI(0, "as it was before install", "", run(uninstall...))
	plain := must.Get(os.ReadFile(file))(t)

	s.wantCLI(0, "has the entry now", "", run("install", "--config", sample))
	if got, want := must.Get(os.ReadFile(filepath.Join(binDir, "skipstack")))(t), must.Get(os.ReadFile(program()))(t); !bytes.Equal(got, want) {
		t.Errorf("the plugin has %d bytes, this program %d", len(got), len(want))
	}
	client, server := s.twoPods(must.Get(libcni.NetworkConfFromFile(file))(t), node.PodOptions{})
	a, b := s.connect(direct(client, server))
	s.wantRedirected(a, b)

	s.wantCLI(1, "switched off", "2 enrolled sockets still open after 100ms", s.cli("off", "--wait", "--timeout", "100ms"))
	s.wantSwitchedOff(a, b)
	s.wantCLI(0, "switched on", "", s.cli("on"))
	s.wantRedirected(a, b)

	done := make(chan outcome, 1)
	go func() { done <- run(append(uninstall, "--drain", "--timeout", "4m")...) }()
	wait(t, "messages go by TCP", func() (string, bool) {
		d := s.say(a, b)
		return "", d.Messages["redirected"].Messages == 0 && d.Messages["switched_off"].Messages == 1
	})
	if got := must.Get(os.ReadFile(file))(t); !bytes.Equal(got, plain) {
		t.Errorf("while it drains, the list is\n%s\nwant\n%s", got, plain)
	}
	s.wantSwitchedOff(b, a)
	select {
	case got := <-done:
		t.Errorf("it did not wait: %+v", got)
	default:
	}
	must.Do(t, errors.Join(a.Close(), b.Close()))
	drained, says := <-done, "Enrolled sockets left: 2"
	if drained.stderr == "" {
		says = "" // on a busy machine they were closed before it first counted them
	}
	s.wantCLI(0, "The datapath is unloaded; 2 pods detached.", says, drained)
	for _, path := range []string{filepath.Join(s.BPFFS, "skipstack"), filepath.Join(binDir, "skipstack")} {
		if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is there: %v", path, err)
		}
	}
	s.wantPlain("drained", direct(client, server))
	s.wantCLI(0, "Nothing was installed", "", run(append(uninstall, "--drain")...))
}

// With the BPF file system unmounted under traffic, off reaches the sockets all the
// same, and counts them.
func TestOffWithoutPins(t *testing.T) {
	node.Need(t)
	restore := node.OtherSwitches(0)
	t.Cleanup(func() { must.Do(t, restore()) })
	s := newSite(t, options{})
	client, server := s.twoPods(s.network(node.Network{}), node.PodOptions{})
	a, b := s.connect(direct(client, server))
	s.wantRedirected(a, b)
	maps := mapsOf(t, s.linkPin(client.cgroupID(t)))
	s.waitProber() // it might load another set after the reboot
	s.reboot(true)
	wait(t, "what only the sock_ops program had is gone", func() (string, bool) {
		for _, id := range maps {
			m, err := ebpf.NewMapFromID(id)
			if errors.Is(err, fs.ErrNotExist) {
				return "", true
			}
			must.Do(t, errors.Join(err, m.Close()))
		}
		return fmt.Sprintf("maps %v are there", maps), false
	})
	var got struct {
		SwitchedOff bool   `json:"switchedOff"`
		Sockets     uint64 `json:"sockets"`
	}
	out := s.cli("off", "--json")
	// Others on this machine may have some, too.
	if err := json.Unmarshal([]byte(out.stdout), &got); err != nil || out.code != 0 || !got.SwitchedOff || got.Sockets < 2 {
		t.Errorf("error %v, %+v", err, out)
	}
	s.say(a, b)
	s.say(b, a)
	must.Do(t, errors.Join(a.Close(), b.Close()))
	wait(t, "they are closed", func() (string, bool) {
		left := must.Get(datapath.LiveInKernel())(t)
		return fmt.Sprintf("%d enrolled sockets left of %d", left, got.Sockets), left+2 <= got.Sockets
	})
}

// mapsOf are the maps of a pinned link's program.
func mapsOf(t *testing.T, pin string) []ebpf.MapID {
	t.Helper()
	l := must.Get(link.LoadPinnedLink(pin, nil))(t)
	defer l.Close()
	p := must.Get(ebpf.NewProgramFromID(must.Get(l.Info())(t).Program))(t)
	defer p.Close()
	ids, _ := must.Get(p.Info())(t).MapIDs()
	return ids
}
