package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// marker makes this test binary be skipstack: skel reads the process's own
// environment and streams, so plugin mode needs a process.
const marker = "SKIPSTACK_TEST_IS_SKIPSTACK"

func TestMain(m *testing.M) {
	if os.Getenv(marker) != "" {
		main()
	}
	os.Exit(m.Run())
}

type result struct {
	code           int
	stdout, stderr string
}

// skipstack runs the program. Of the environment it has only what is given.
func skipstack(t *testing.T, stdin string, env []string, args ...string) result {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	var out, errs bytes.Buffer
	cmd := exec.CommandContext(t.Context(), exe, args...)
	cmd.Env = append([]string{marker + "=1"}, env...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &out, &errs
	err = cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return result{cmd.ProcessState.ExitCode(), out.String(), errs.String()}
}

const prev = `{"cniVersion":"1.1.0","ips":[{"address":"10.0.0.5/24"}],"unknown":[1.0]}`

// conf is a configuration that touches nothing of the machine: its cgroup root
// is no cgroup file system, so the pod is plain before any BPF is loaded.
func conf(t *testing.T, members string) string {
	t.Helper()
	dir := t.TempDir()
	if members != "" {
		members = "," + members
	}
	return fmt.Sprintf(`{"cniVersion":"1.1.0","name":"n","type":"skipstack","cgroupRoot":%q,"bpffs":%q,"runDir":%q,"runtimeConfig":{"cgroupPath":"/x"}%s}`,
		dir, dir, filepath.Join(dir, "run"), members)
}

func cni(command string) []string {
	// The netns of the plugin itself, which skel would refuse; see plugin.Main.
	return []string{"CNI_COMMAND=" + command, "CNI_CONTAINERID=c1", "CNI_IFNAME=eth0", "CNI_NETNS=/proc/self/ns/net",
		"CNI_PATH=/opt/cni/bin", "CNI_ARGS=K8S_POD_NAMESPACE=ns;K8S_POD_NAME=web"}
}

func TestVerbs(t *testing.T) {
	for _, tc := range []struct {
		command, members string
		stdout           string
		lines            int // on stderr
	}{
		{"ADD", `"prevResult":` + prev, prev, 1},
		{"ADD", `"mode":"off","prevResult":` + prev, prev, 1},
		{"ADD", `"nonsense":1,"prevResult":` + prev, prev, 1},
		{"ADD", `"logFile":"/no/such/dir/log","prevResult":` + prev, prev, 2}, // the second complains of the file
		{"ADD", `"logLevel":"error","prevResult":` + prev, prev, 0},
		{"DEL", `"prevResult":` + prev, "", 0},
		{"DEL", ``, "", 0},
		{"CHECK", `"prevResult":` + prev, "", 1},
		{"GC", `"cni.dev/valid-attachments":null`, "", 0},
		{"STATUS", ``, "", 0},
	} {
		t.Run(tc.command+" "+tc.members, func(t *testing.T) {
			got := skipstack(t, conf(t, tc.members), cni(tc.command))
			if got.code != 0 || got.stdout != tc.stdout || strings.Count(got.stderr, "\n") != tc.lines {
				t.Errorf("got %+v", got)
			}
		})
	}
}

func TestVersion(t *testing.T) {
	got := skipstack(t, `{"cniVersion":"1.0.0"}`, []string{"CNI_COMMAND=VERSION"})
	want := `{"cniVersion":"1.1.0","supportedVersions":["0.3.0","0.3.1","0.4.0","1.0.0","1.1.0"]}` + "\n"
	if got != (result{0, want, ""}) {
		t.Errorf("got %+v", got)
	}
}

// On failure there is one error object on stdout, and nothing else.
func TestErrors(t *testing.T) {
	good := conf(t, `"prevResult":`+prev)
	for _, tc := range []struct {
		name  string
		stdin string
		env   []string
		code  uint
	}{
		{"no prevResult", conf(t, ``), cni("ADD"), 7},
		{"not JSON", `{`, cni("ADD"), 6},
		{"not JSON at DEL", `[]`, cni("DEL"), 6},
		{"no name", `{"cniVersion":"1.1.0"}`, cni("DEL"), 7},
		{"no container id", good, []string{"CNI_COMMAND=ADD", "CNI_IFNAME=eth0", "CNI_NETNS=/x", "CNI_PATH=/x"}, 4},
		{"container id with a slash", good, append(cni("ADD"), "CNI_CONTAINERID=../x"), 4},
		{"unknown command", good, cni("add"), 4},
		{"old version", strings.Replace(good, `"1.1.0","name"`, `"0.2.0","name"`, 1), cni("ADD"), 1},
		{"no version", strings.Replace(good, `"cniVersion":"1.1.0","name"`, `"name"`, 1), cni("ADD"), 1},
		{"future version", strings.Replace(good, `"1.1.0","name"`, `"2.0.0","name"`, 1), cni("ADD"), 1},
		{"CHECK too early", strings.Replace(good, `"1.1.0","name"`, `"0.3.1","name"`, 1), cni("CHECK"), 1},
		{"STATUS too early", strings.Replace(good, `"1.1.0","name"`, `"1.0.0","name"`, 1), cni("STATUS"), 1},
		{"GC without a list", good, cni("GC"), 7},
		{"fails as asked", conf(t, `"onError":"fail","prevResult":`+prev), cni("ADD"), 11},
		{"bad key, fails as asked", conf(t, `"onError":"fail","x":1,"prevResult":`+prev), cni("ADD"), 7},
		{"STATUS fails as asked", conf(t, `"onError":"fail","x":1`), cni("STATUS"), 50},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got := skipstack(t, tc.stdin, tc.env)
			var e struct {
				Code *uint   `json:"code"`
				Msg  *string `json:"msg"`
			}
			if err := json.Unmarshal([]byte(got.stdout), &e); err != nil {
				t.Fatalf("stdout %q: %v", got.stdout, err)
			}
			if got.code != 1 || e.Code == nil || *e.Code != tc.code || e.Msg == nil || *e.Msg == "" {
				t.Errorf("got %+v, want code %d", got, tc.code)
			}
		})
	}
}

// A result that nobody reads is no success.
func TestBrokenStdout(t *testing.T) {
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer full.Close()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), exe)
	cmd.Env = append(cni("ADD"), marker+"=1")
	cmd.Stdin = strings.NewReader(conf(t, `"mode":"off","prevResult":`+prev))
	cmd.Stdout = full
	var exit *exec.ExitError
	if err := cmd.Run(); !errors.As(err, &exit) || exit.ExitCode() != 1 {
		t.Errorf("error %v", err)
	}
}

func TestDispatch(t *testing.T) {
	for _, tc := range []struct {
		name string
		env  []string
		args []string
		code int
		out  string
	}{
		{"arguments win over CNI_COMMAND", cni("ADD"), []string{"version"}, 0, "CNI specification"},
		{"empty CNI_COMMAND", []string{"CNI_COMMAND="}, nil, 0, "Usage:"},
		{"nothing", nil, nil, 0, "Usage:"},
		{"wrong argument", cni("ADD"), []string{"nonsense"}, 2, ""},
		{"the worker of probes", nil, []string{"probe-worker", "x"}, 2, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got := skipstack(t, "", tc.env, tc.args...)
			if got.code != tc.code || !strings.Contains(got.stdout, tc.out) || tc.out == "" && got.stdout != "" {
				t.Errorf("got %+v", got)
			}
		})
	}
}
