package cli

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/skipstack/skipstack/cmd/internal/conflist"
	"github.com/skipstack/skipstack/plugin"
	"github.com/skipstack/skipstack/plugin/datapath"
)

const bridge = `{
  "cniVersion": "1.0.0",
  "name": "n",
  "plugins": [
    {
      "type": "bridge"
    }
  ]
}
`

// newSite is a directory of configurations with one network, and one of plugins.
func newSite(t *testing.T) (flags []string, file, binary string) {
	t.Helper()
	dir := t.TempDir()
	confDir, binDir := filepath.Join(dir, "net.d"), filepath.Join(dir, "bin")
	file = filepath.Join(confDir, "10-n.conflist")
	for _, err := range []error{os.Mkdir(confDir, 0o755), os.Mkdir(binDir, 0o755), os.WriteFile(file, []byte(bridge), 0o644)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	return []string{"--cni-conf-dir", confDir, "--cni-bin-dir", binDir}, file, filepath.Join(binDir, "skipstack")
}

func content(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func TestInstall(t *testing.T) {
	f, _ := newFake(t)
	flags, file, binary := newSite(t)
	run := func(args ...string) (code int, out, errs string) { return exec(f, append(args, flags...)...) }
	code, dry, errs := run("install", "--dry-run")
	if code != 0 || errs != "" || content(t, file) != bridge {
		t.Errorf("dry run: code %d, %s%s", code, dry, errs)
	}
	if want := fmt.Sprintf(`--- %[1]s
+++ %[1]s
@@ -4,6 +4,15 @@
   "plugins": [
     {
       "type": "bridge"
+    },
+    {
+      "type": "skipstack",
+      "mode": "auto",
+      "capabilities": {
+        "cgroupPath": true,
+        "io.kubernetes.cri.pod-annotations": true,
+        "bandwidth": true
+      }
     }
   ]
 }
The binary would be put at %[2]s.
`, file, binary); dry != want {
		t.Errorf("dry run:\n%s\nwant\n%s", dry, want)
	}
	for _, want := range [][2]string{{"was put at", "has the entry now"}, {"is at", "has the entry already"}} {
		code, out, errs := run("install")
		if code != 0 || errs != "" || !strings.Contains(out, want[0]+" "+binary) || !strings.Contains(out, file+" "+want[1]) {
			t.Errorf("code %d, %s%s", code, out, errs)
		}
	}
	if got, err := plugin.ParseConflist([]byte(content(t, file))); err != nil || got.Mode != plugin.ModeAuto {
		t.Errorf("%+v, error %v", got, err)
	}
	if code, out, _ := run("install", "--dry-run"); code != 0 || out != "Nothing would change.\n" {
		t.Errorf("code %d, %s", code, out)
	}
	code, out, errs := run("uninstall", "--dry-run")
	if code != 0 || errs != "" || !strings.Contains(out, "-      \"type\": \"skipstack\",\n") || !strings.Contains(out, "would be removed") {
		t.Errorf("code %d, %s%s", code, out, errs)
	}
	code, out, errs = run("uninstall")
	if code != 0 || errs != "" || out != fmt.Sprintf("%s is as it was before install.\n%s was removed.\n", file, binary) || content(t, file) != bridge {
		t.Errorf("code %d, %s%s", code, out, errs)
	}
	if code, out, _ := run("uninstall"); code != 0 || out != "Nothing was installed.\n" {
		t.Errorf("code %d, %s", code, out)
	}
}

// load says which entry it does not go by.
func TestOtherEntry(t *testing.T) {
	flags, file, _ := newSite(t)
	o := conflist.Options{ConfDir: filepath.Dir(file)}
	if got := otherEntry(o); got != "" {
		t.Errorf("not installed: %q", got)
	}
	if code, _, errs := exec(&fake{}, append([]string{"install", "--accept-risks", "splice"}, flags...)...); code != 0 {
		t.Fatal(errs)
	}
	if got := otherEntry(o); !strings.Contains(got, "load --config "+file) {
		t.Errorf("installed: %q", got)
	}
	if got := otherEntry(conflist.Options{ConfDir: t.TempDir()}); got != "" {
		t.Errorf("no network: %q", got)
	}
}

func TestInstallJSON(t *testing.T) {
	f, _ := newFake(t)
	flags, file, binary := newSite(t)
	for _, tc := range []struct {
		args    string
		changed int
		diff    bool
		placed  bool
		removed bool
	}{
		{"install --dry-run", 1, true, true, false}, {"install", 1, false, true, false}, {"install", 0, false, false, false},
		{"uninstall", 1, false, false, true}, {"uninstall", 0, false, false, false},
	} {
		code, out, errs := exec(f, append(strings.Fields(tc.args+" --json"), flags...)...)
		var got installation
		if err := json.Unmarshal([]byte(out), &got); err != nil || code != 0 || errs != "" {
			t.Errorf("%s: code %d, error %v: %s%s", tc.args, code, err, out, errs)
		}
		if len(got.Changed) != tc.changed || tc.changed > 0 && got.Changed[0] != file || (got.Diff != "") != tc.diff || got.Placed != tc.placed || got.Removed != tc.removed ||
			tc.placed && got.Binary != binary {
			t.Errorf("%s: %s", tc.args, out)
		}
	}
}

// Flags and --config say what the entry has.
func TestInstallEntry(t *testing.T) {
	f, _ := newFake(t)
	other := filepath.Join(t.TempDir(), "other.conflist")
	if err := os.WriteFile(other, []byte(`{"name":"n","plugins":[{"type":"ptp"},{"type":"skipstack","_note":"kept","mode":"on","unreadLimit":65536}]}`), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		args  string
		check func(plugin.Config) bool
		has   string
	}{
		{"--mode on", func(c plugin.Config) bool { return c.Mode == plugin.ModeOn }, `"mode": "on"`},
		{"--accept-risks splice,blocking", func(c plugin.Config) bool { return c.AcceptRisks == datapath.RiskSplice|datapath.RiskBlocking }, "cgroupPath"},
		{"--bpffs /mnt/bpf --run-dir /run/other --cgroup-root /mnt/cgroup", func(c plugin.Config) bool {
			return c.BPFFS == "/mnt/bpf" && c.RunDir == "/run/other" && c.CgroupRoot == "/mnt/cgroup"
		}, "cgroupPath"},
		{"--config " + other, func(c plugin.Config) bool { return c.Mode == plugin.ModeOn && c.UnreadLimit == 65536 }, `"_note": "kept"`},
		{"--mode off --config " + other, func(c plugin.Config) bool { return c.Mode == plugin.ModeOff && c.UnreadLimit == 65536 }, `"_note": "kept"`},
	} {
		flags, file, _ := newSite(t)
		code, out, errs := exec(f, append(strings.Fields("install "+tc.args), flags...)...)
		if code != 0 || errs != "" {
			t.Errorf("%s: code %d, %s%s", tc.args, code, out, errs)
		}
		text := content(t, file)
		if conf, err := plugin.ParseConflist([]byte(text)); err != nil || !tc.check(conf) || !strings.Contains(text, tc.has) {
			t.Errorf("%s: error %v\n%s", tc.args, err, text)
		}
		// The default entry is another one now.
		if code, _, errs := exec(f, append([]string{"install"}, flags...)...); code != 3 || !strings.Contains(errs, "--replace") || content(t, file) != text {
			t.Errorf("%s: code %d, %s", tc.args, code, errs)
		}
		if code, _, errs := exec(f, append([]string{"install", "--replace"}, flags...)...); code != 0 || content(t, file) == text {
			t.Errorf("%s: code %d, %s", tc.args, code, errs)
		}
	}
}

func TestInstallExitCodes(t *testing.T) {
	for _, tc := range []struct {
		args string
		code int
		err  string
	}{
		{"install --mode fast", 2, `"fast" is not one of`},
		{"install --accept-risks all", 2, `"all" is not one of`},
		{"install --conflist 20.conflist", 1, "20.conflist"},
		{"install --conflist ../x", 2, "not the name"},
		{"install --conflist x.txt", 2, "not the name"},
		{"install --conflist=", 2, "--conflist has no value"},
		{"install --config=", 2, "--config has no value"},
		{"install --config /no/such", 2, "no such file"},
		{"install --bpffs=", 2, "--bpffs has no value"},
		{"install here", 2, "here"},
		{"uninstall --cni-cache-dir=", 2, "--cni-cache-dir has no value"},
		{"uninstall --timeout 1m", 2, "--timeout is of no use without --drain"},
		{"off --timeout 1m", 2, "--timeout is of no use without --wait"},
		{"off --wait --timeout -5s", 2, "--timeout -5s is negative"},
		{"uninstall --drain --timeout -5s", 2, "--timeout -5s is negative"},
		{"completion foo", 2, `unknown command "foo"`},
		{"agent --conflist ../x", 2, "not the name"},
		{"agent --listen 127.0.0.1:99999", 2, "--listen"},
		{"on --wait", 2, "unknown flag"},
		{"man", 2, "arg"},
		{"man /dev/null/x", 1, "man pages"},
	} {
		f, _ := newFake(t)
		f.loaded = true
		flags, file, _ := newSite(t)
		args := strings.Fields(tc.args)
		if strings.Contains(args[0], "install") {
			args = append(args, flags...)
		}
		code, out, errs := exec(f, args...)
		if code != tc.code || out != "" || !strings.Contains(errs, tc.err) || content(t, file) != bridge || f.node.SwitchedOff {
			t.Errorf("%s: code %d, %s%s", tc.args, code, out, errs)
		}
	}
	for _, flag := range []string{"--cni-conf-dir=", "--cni-bin-dir="} {
		if code, _, errs := exec(&fake{}, "install", flag); code != 2 || !strings.Contains(errs, "has no value") {
			t.Errorf("%s: code %d, %s", flag, code, errs)
		}
	}
}

// Colour is for terminals, and changes nothing else.
func TestColour(t *testing.T) {
	f, _ := newFake(t)
	flags, _, _ := newSite(t)
	_, plain, _ := exec(f, append([]string{"install", "--dry-run"}, flags...)...)
	var out, errs bytes.Buffer
	deps := plugin.Deps{Datapath: f}
	if code := Run(t.Context(), append([]string{"install", "--dry-run"}, flags...), Streams{Out: &out, Err: &errs, Colour: true}, deps); code != 0 {
		t.Errorf("code %d, %s", code, errs.String())
	}
	if coloured := out.String(); coloured == plain || regexp.MustCompile(`\x1b\[\d+m`).ReplaceAllString(coloured, "") != plain || strings.Contains(plain, "\x1b") {
		t.Errorf("%q\nis not\n%q", coloured, plain)
	}
}

func TestWait(t *testing.T) {
	for _, tc := range []struct {
		name, args string
		closing    int
		code       int
		out, err   string
	}{
		{"node", "off --wait", 4, 0, "No enrolled sockets are left.\n", "Enrolled sockets left: 4 (after 0s)\n"},
		{"at once", "off --wait", 1, 0, "No enrolled sockets are left.\n", ""},
		{"pod", "off --wait --pod ns/web --run-dir RUN", 3, 0, "No enrolled sockets are left.\n", "Enrolled sockets left: 1 (after 0s)\n"},
		{"JSON", "off --wait --json", 3, 0, `"sockets": 0`, "Enrolled sockets left: 4 (after 0s)\n"},
		{"deadline", "off --wait --timeout 1ms", 0, 1, "is switched off for this node.\n", "4 enrolled sockets still open after 1ms"},
		{"deadline, JSON", "off --wait --timeout 1ms --json", 0, 1, `"sockets": 4`, "still open after 1ms"},
		{"no limit", "off --wait --timeout 0", 3, 0, "No enrolled sockets are left.\n", "left: 4"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f, runDir := newFake(t)
			f.loaded, f.closing = true, tc.closing
			record(t, runDir)
			code, out, errs := exec(f, strings.Fields(strings.ReplaceAll(tc.args, "RUN", runDir))...)
			if code != tc.code || !strings.Contains(out, tc.out) || !strings.Contains(errs, tc.err) || tc.err == "" && errs != "" {
				t.Errorf("code %d, stdout %s, stderr %s", code, out, errs)
			}
		})
	}
}

func TestDrain(t *testing.T) {
	install := func(t *testing.T, f *fake) (flags []string, file string) {
		t.Helper()
		flags, file, _ = newSite(t)
		if code, _, errs := exec(f, append([]string{"install"}, flags...)...); code != 0 {
			t.Fatalf("code %d, %s", code, errs)
		}
		return flags, file
	}
	t.Run("done", func(t *testing.T) {
		f, runDir := newFake(t)
		f.loaded, f.closing = true, 3
		record(t, runDir)
		flags, file := install(t, f)
		code, out, errs := exec(f, append([]string{"uninstall", "--drain", "--run-dir", runDir}, flags...)...)
		if code != 0 || !strings.Contains(out, "The datapath is unloaded; 1 pod detached.") || !strings.Contains(errs, "Enrolled sockets left: 2") {
			t.Errorf("code %d, %s%s", code, out, errs)
		}
		// The node's switch would reach other nodes on this kernel.
		if f.loaded || !f.force || f.node.SwitchedOff || content(t, file) != bridge {
			t.Errorf("left is %+v", f)
		}
	})
	t.Run("deadline", func(t *testing.T) {
		f, runDir := newFake(t)
		f.loaded = true
		flags, file := install(t, f)
		code, out, errs := exec(f, append([]string{"uninstall", "--drain", "--timeout", "1ms", "--run-dir", runDir}, flags...)...)
		if code != 1 || !strings.Contains(errs, "2 enrolled sockets still open after 1ms") || strings.Contains(out, "unloaded") {
			t.Errorf("code %d, %s%s", code, out, errs)
		}
		if content(t, file) != bridge {
			t.Error("the entry is there")
		}
	})
	t.Run("nothing loaded", func(t *testing.T) {
		f, runDir := newFake(t)
		f.sockets = 0
		flags, file := install(t, f)
		if code, out, errs := exec(f, append([]string{"uninstall", "--drain", "--json", "--run-dir", runDir}, flags...)...); code != 0 || errs != "" || !strings.Contains(out, `"drained": true`) {
			t.Errorf("code %d, %s%s", code, out, errs)
		}
		if content(t, file) != bridge {
			t.Error("the entry is there")
		}
		f.noBPFFS = true
		if code, out, errs := exec(f, append([]string{"uninstall", "--drain", "--run-dir", runDir}, flags...)...); code != 0 || errs != "" || out != "Nothing was installed.\n" {
			t.Errorf("without a BPF file system: code %d, %s%s", code, out, errs)
		}
	})
	t.Run("unload fails", func(t *testing.T) {
		f, runDir := newFake(t)
		f.loaded = true
		flags, file := install(t, f)
		f.fail = errors.New("EIO")
		if code, _, errs := exec(f, append([]string{"uninstall", "--drain", "--run-dir", runDir}, flags...)...); code != 1 || !strings.Contains(errs, "EIO") {
			t.Errorf("code %d, %s", code, errs)
		}
		if content(t, file) != bridge {
			t.Error("the entry is there")
		}
	})
}

// tree returns the commands that users see.
func tree(t *testing.T) []*cobra.Command {
	t.Helper()
	var root *cobra.Command
	seen := &cobra.Command{Use: "seen", RunE: func(cmd *cobra.Command, _ []string) error { root = cmd.Root(); return nil }}
	if code := Run(t.Context(), []string{"seen"}, Streams{}, plugin.Deps{}, seen); code != 0 {
		t.Fatalf("code %d", code)
	}
	return slices.DeleteFunc(descendants(root), func(c *cobra.Command) bool { return c == seen })
}

// A flag of one name means the same everywhere, and each command says what it does.
func TestConsistent(t *testing.T) {
	flags := map[string]*pflag.Flag{}
	for _, cmd := range tree(t) {
		if cmd.Short == "" || strings.HasSuffix(cmd.Short, ".") {
			t.Errorf("%s: %q", cmd.CommandPath(), cmd.Short)
		}
		if !cmd.HasSubCommands() && cmd.Name() != "man" && cmd.Name() != "agent" && !strings.Contains(cmd.CommandPath(), "completion") && cmd.Flags().Lookup("json") == nil {
			t.Errorf("%s has no --json", cmd.CommandPath())
		}
		cmd.LocalFlags().VisitAll(func(f *pflag.Flag) {
			first, ok := flags[f.Name]
			if !ok {
				flags[f.Name] = f
			} else if first.Value.Type() != f.Value.Type() || first.DefValue != f.DefValue {
				t.Errorf("%s: --%s is %s (%s), elsewhere %s (%s)", cmd.CommandPath(), f.Name, f.Value.Type(), f.DefValue, first.Value.Type(), first.DefValue)
			}
			if f.Usage == "" || strings.HasSuffix(f.Usage, ".") {
				t.Errorf("%s --%s: %q", cmd.CommandPath(), f.Name, f.Usage)
			}
		})
	}
}

// Each command has a man page, made of its help.
func TestMan(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "man8")
	t.Setenv("SOURCE_DATE_EPOCH", "0")
	if code, out, errs := exec(&fake{}, "man", dir); code != 0 || out+errs != "" {
		t.Fatalf("code %d, %s%s", code, out, errs)
	}
	for _, cmd := range tree(t) {
		name := strings.ReplaceAll(cmd.CommandPath(), " ", "-")
		page := content(t, filepath.Join(dir, name+".8"))
		if !strings.Contains(page, fmt.Sprintf(".TH %q \"8\" \"Jan 1970\"", strings.ToUpper(name))) || !strings.Contains(page, ".SH OPTIONS") {
			t.Errorf("%s:\n%s", name, page)
		}
	}
	if page := content(t, filepath.Join(dir, "skipstack.8")); !strings.Contains(page, "Exit codes: 0 done") || !strings.Contains(page, "skipstack-install(8)") {
		t.Errorf("skipstack:\n%s", page)
	}
	if code, _, errs := exec(&fake{}, "man", ""); code != 2 || !strings.Contains(errs, "no directory") {
		t.Errorf("code %d, %s", code, errs)
	}
	t.Setenv("SOURCE_DATE_EPOCH", "x")
	if code, _, errs := exec(&fake{}, "man", dir); code != 1 || !strings.Contains(errs, "SOURCE_DATE_EPOCH") {
		t.Errorf("code %d, %s", code, errs)
	}
}

// What cannot be written is a failure, not wrong usage.
func TestCannotPrint(t *testing.T) {
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer full.Close()
	for _, args := range []string{"version", "version --json", "completion bash", "completion zsh", "completion fish", "completion powershell"} {
		var errs strings.Builder
		f := &fake{}
		if code := Run(t.Context(), strings.Fields(args), Streams{Out: full, Err: &errs}, plugin.Deps{Datapath: f, Cgroups: cgroups{}, Verdicts: verdicts{f}}); code != 1 || !strings.Contains(errs.String(), "no space left") {
			t.Errorf("%s: code %d, %s", args, code, errs.String())
		}
	}
}

func TestCompletion(t *testing.T) {
	for _, shell := range []string{"bash", "zsh", "fish", "powershell"} {
		if code, out, errs := exec(&fake{}, "completion", shell); code != 0 || errs != "" || !strings.Contains(out, "skipstack") {
			t.Errorf("%s: code %d, %s", shell, code, errs)
		}
	}
	runDir := filepath.Join(t.TempDir(), "run")
	record(t, runDir)
	for args, want := range map[string]string{
		"inst":                                  "install\t",
		"install --mode ":                       "auto\non\noff\n:4\n",
		"install --accept-risks ":               "splice\n",
		"off --run-dir " + runDir + " --pod ":   "ns/web\n:4\n",
		"load --config ":                        "conflist\njson\nconf\n:8\n",
		"install --cni-conf-dir ":               ":16\n",
		"off --pod x --run-dir /no/such --pod ": ":4\n",
	} {
		_, out, _ := exec(&fake{}, append([]string{"__complete"}, strings.Split(args, " ")...)...)
		if !strings.Contains(out, want) {
			t.Errorf("%s: %q, want %q", args, out, want)
		}
	}
}
