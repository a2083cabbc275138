package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

var sshPackages = []string{"openssh-server", "openssh-client"}

// account makes the user that sshd insists on known in this mount namespace, and
// lets root in, with a key.
func account(dir string) (restore func() error, err error) {
	var mounted []string
	restore = func() error {
		var errs []error
		for _, path := range mounted {
			errs = append(errs, unix.Unmount(path, 0))
		}
		return errors.Join(errs...)
	}
	for path, edit := range map[string]func(string) string{
		"/etc/passwd": func(s string) string {
			return "sshd:x:65533:65534::/run/sshd:/usr/sbin/nologin\n" + s
		},
		"/etc/shadow": func(s string) string { return "root:*:19000:0:99999:7:::\n" + s },
	} {
		old, err := os.ReadFile(path)
		if err != nil {
			return nil, errors.Join(err, restore())
		}
		file := filepath.Join(dir, filepath.Base(path))
		if err := os.WriteFile(file, []byte(edit(string(old))), 0o644); err != nil {
			return nil, errors.Join(err, restore())
		}
		if err := unix.Mount(file, path, "", unix.MS_BIND, ""); err != nil {
			return nil, errors.Join(fmt.Errorf("mount over %s: %w", path, err), restore())
		}
		mounted = append(mounted, path)
	}
	return restore, nil
}

const sshdConfig = `
Port 22
HostKey %[1]s/hostkey
PidFile none
AuthorizedKeysFile %[1]s/key.pub
StrictModes no
UsePAM no
PermitRootLogin yes
PasswordAuthentication no
KbdInteractiveAuthentication no
UseDNS no
PrintMotd no
Subsystem sftp internal-sftp
`

const sshConfig = `
Host *
	User root
	IdentityFile %[1]s/key
	IdentitiesOnly yes
	UserKnownHostsFile /dev/null
	StrictHostKeyChecking no
	LogLevel ERROR
	BatchMode yes
	%[2]s
`

func sshCase(options string) func(*scene) (string, error) {
	return func(s *scene) (result string, err error) {
		client, server, err := s.twoPods()
		if err != nil {
			return "", err
		}
		restore, err := account(s.dir)
		if err != nil {
			return "", err
		}
		defer func() { err = errors.Join(err, s.stop(), restore()) }()
		if err := os.MkdirAll("/run/sshd", 0o755); err != nil {
			return "", err
		}
		defer os.Remove("/run/sshd")
		for _, key := range []string{"hostkey", "key"} {
			if _, err := server.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", filepath.Join(s.dir, key)); err != nil {
				return "", err
			}
		}
		sshd, err := s.file("sshd_config", fmt.Sprintf(sshdConfig, s.dir))
		if err != nil {
			return "", err
		}
		config, err := s.file("ssh_config", fmt.Sprintf(sshConfig, s.dir, options))
		if err != nil {
			return "", err
		}
		if _, err := server.start("sshd", "-D", "-e", "-f", sshd); err != nil {
			return "", err
		}
		if err := server.listens(22); err != nil {
			return "", err
		}
		large, err := s.file("large", string(content(10<<20, 22)))
		if err != nil {
			return "", err
		}
		var out strings.Builder
		host := server.ip.String()
		for _, remote := range []string{"echo hello; exit 3", "cat " + large + " | sha256sum", "cat " + large, "seq 100000"} {
			got, err := client.run("ssh", "-F", config, host, remote)
			fmt.Fprintf(&out, "%s, failed %v\n", digest([]byte(got)), err != nil)
		}
		cmd, err := s.cmd("ssh", "-F", config, host, "sha256sum")
		if err != nil {
			return "", err
		}
		file, err := os.Open(large)
		if err != nil {
			return "", err
		}
		defer file.Close()
		cmd.Stdin = file
		got, err := client.output("ssh", cmd)
		if err != nil {
			return "", err
		}
		out.WriteString(got)
		ssh, err := s.program("ssh")
		if err != nil {
			return "", err
		}
		for _, args := range [][]string{
			{host + ":" + large, filepath.Join(s.dir, "fetched")},
			{large, host + ":" + filepath.Join(s.dir, "sent")},
		} {
			if _, err := client.run("scp", append([]string{"-q", "-S", ssh, "-F", config}, args...)...); err != nil {
				return "", err
			}
		}
		for _, name := range []string{"fetched", "sent"} {
			data, err := os.ReadFile(filepath.Join(s.dir, name))
			if err != nil {
				return "", err
			}
			fmt.Fprintln(&out, name, digest(data))
		}
		return out.String(), nil
	}
}

func sshCases() []testCase {
	return []testCase{
		{software: "OpenSSH", name: "ssh and scp", packages: sshPackages, blocking: "ssh connects with blocking sockets", run: sshCase("")},
		{software: "OpenSSH", name: "ssh and scp, ConnectTimeout", packages: sshPackages, run: sshCase("ConnectTimeout 60")},
	}
}
