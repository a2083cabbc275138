package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// nobody is who runs what refuses to run as root.
const nobody = "65534"

// unprivileged makes a command of the software that runs as nobody.
func (s *scene) unprivileged(name string, args ...string) ([]string, error) {
	path, err := s.program(name)
	return append([]string{"--reuid=" + nobody, "--regid=" + nobody, "--clear-groups", path}, args...), err
}

// database makes an empty database cluster, once, which every run copies.
func (p *pod) database() (template string, err error) {
	template = filepath.Join(dir, "postgres")
	if _, err := os.Stat(template); err == nil {
		return template, nil
	}
	data := filepath.Join(p.scene.dir, "template")
	initdb, err := p.scene.unprivileged("initdb", "-D", data, "-U", "postgres", "-A", "trust", "-N", "-E", "UTF8", "--no-locale")
	if err != nil {
		return "", err
	}
	if _, err := p.run("setpriv", initdb...); err != nil {
		return "", err
	}
	hba, err := os.OpenFile(filepath.Join(data, "pg_hba.conf"), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		return "", err
	}
	_, err = hba.WriteString("host all all 0.0.0.0/0 trust\n")
	if err := errors.Join(err, hba.Close()); err != nil {
		return "", err
	}
	return template, os.Rename(data, template)
}

func (p *pod) postgres() error {
	s := p.scene
	template, err := p.database()
	if err != nil {
		return err
	}
	data := filepath.Join(s.dir, "data")
	if _, err := p.run("cp", "-a", template, data); err != nil {
		return err
	}
	server, err := s.unprivileged("postgres", "-D", data, "-c", "listen_addresses="+p.ip.String(), "-c", "unix_socket_directories=",
		"-c", "fsync=off", "-c", "shared_buffers=32MB", "-c", "dynamic_shared_memory_type=mmap", "-c", "shared_memory_type=mmap")
	if err != nil {
		return err
	}
	if _, err := p.start("setpriv", server...); err != nil {
		return err
	}
	// It listens before it has started up, and refuses connections meanwhile.
	return s.wait("PostgreSQL takes connections", func() (bool, error) {
		state, err := os.ReadFile(filepath.Join(data, "postmaster.pid"))
		if errors.Is(err, os.ErrNotExist) {
			err = nil
		}
		return strings.Contains(string(state), "\nready"), err
	})
}

func (p *pod) psql(server *pod, args ...string) (string, error) {
	return p.run("psql", append([]string{"-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-h", server.ip.String(), "-U", "postgres"}, args...)...)
}

func postgresCases() []testCase {
	c := func(name string, run func(s *scene, client, server *pod) (string, error)) testCase {
		return testCase{software: "PostgreSQL", name: name, ci: true, packages: []string{"postgresql"},
			blocking: "postgres listens with blocking sockets",
			run: func(s *scene) (string, error) {
				client, server, err := s.twoPods()
				if err != nil {
					return "", err
				}
				if err := server.postgres(); err != nil {
					return "", err
				}
				return run(s, client, server)
			}}
	}
	return []testCase{
		c("pgbench", func(s *scene, client, server *pod) (string, error) {
			for _, args := range [][]string{
				{"-i", "-q", "-s", "1"},
				{"-n", "-c", "4", "-j", "2", "-t", "100", "--random-seed=7"},
				{"-n", "-c", "4", "-j", "2", "-t", "200", "--random-seed=7", "-S", "-M", "prepared"},
			} {
				if _, err := client.run("pgbench", append(args, "-h", server.ip.String(), "-U", "postgres", "postgres")...); err != nil {
					return "", err
				}
			}
			return client.psql(server, "-c", "select count(*), sum(abalance), (select sum(tbalance) from pgbench_tellers), (select count(*) from pgbench_history) from pgbench_accounts")
		}),
		c("COPY", func(s *scene, client, server *pod) (string, error) {
			var rows strings.Builder
			for i := range 50000 {
				fmt.Fprintf(&rows, "%d\t%s\n", i, strings.Repeat(fmt.Sprint(i), i%30))
			}
			file, err := s.file("rows", rows.String())
			if err != nil {
				return "", err
			}
			out := filepath.Join(s.dir, "back")
			got, err := client.psql(server,
				"-c", "create table t (n int, s text)",
				"-c", `\copy t from '`+file+`'`,
				"-c", "select count(*), sum(n), md5(string_agg(s, ',' order by n)) from t",
				"-c", `\copy (select * from t order by n) to '`+out+`'`,
				"-c", "select n, s from t where n % 100 = 0 order by n",
			)
			if err != nil {
				return "", err
			}
			back, err := os.ReadFile(out)
			if err == nil && string(back) != rows.String() {
				err = fmt.Errorf("COPY gave back %s, want %s", digest(back), digest([]byte(rows.String())))
			}
			return got, err
		}),
		c("cancel", func(s *scene, client, server *pod) (string, error) {
			var got strings.Builder
			for i := range 5 {
				cmd, err := s.cmd("psql", "-X", "-h", server.ip.String(), "-U", "postgres",
					"-c", "select repeat('x', 100000)", "-c", fmt.Sprintf("select pg_sleep(600), %d", i))
				if err != nil {
					return "", err
				}
				proc, err := client.spawn("psql", cmd)
				if err != nil {
					return "", err
				}
				proc.stopped = true // it ends with an error
				err = s.wait("the statement runs", func() (bool, error) {
					n, err := client.psql(server, "-c", fmt.Sprintf("select count(*) from pg_stat_activity where query like '%%sleep(600), %d' and state = 'active' and pid <> pg_backend_pid()", i))
					return strings.TrimSpace(n) == "1", err
				})
				if err != nil {
					return "", err
				}
				if err := proc.Signal(syscall.SIGINT); err != nil {
					return "", err
				}
				if err := s.finish(proc); err == nil {
					return "", fmt.Errorf("the statement was not cancelled")
				}
				log, err := os.ReadFile(proc.log)
				if err != nil {
					return "", err
				}
				got.Write(log)
			}
			return got.String(), nil
		}),
	}
}
