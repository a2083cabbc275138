package main

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// redis starts a server in the pod.
func (p *pod) redis(args ...string) error {
	dir := filepath.Join(p.scene.dir, "redis-"+p.Name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	args = append([]string{"--port", "6379", "--bind", "0.0.0.0", "--protected-mode", "no", "--save", "", "--dir", dir,
		"--enable-debug-command", "yes", "--repl-diskless-sync-delay", "0"}, args...)
	if _, err := p.start("redis-server", args...); err != nil {
		return err
	}
	return p.listens(6379)
}

// redisCLI runs redis-cli in the pod against a server; input may be empty.
func (p *pod) redisCLI(server *pod, input string, args ...string) (string, error) {
	cmd, err := p.scene.cmd("redis-cli", append([]string{"-h", server.ip.String()}, args...)...)
	if err != nil {
		return "", err
	}
	cmd.Stdin = strings.NewReader(input)
	return p.output("redis-cli", cmd)
}

// redisState is what must be the same in two servers with the same data.
func (p *pod) redisState(server *pod) (string, error) {
	size, err := p.redisCLI(server, "", "DBSIZE")
	if err != nil {
		return "", err
	}
	digest, err := p.redisCLI(server, "", "DEBUG", "DIGEST")
	return size + digest, err
}

func redisCases() []testCase {
	c := func(name string, run func(s *scene, client, server *pod) (string, error)) testCase {
		return testCase{software: "redis", name: name, ci: true, packages: []string{"redis-server", "redis-tools"},
			run: func(s *scene) (string, error) {
				client, server, err := s.twoPods()
				if err != nil {
					return "", err
				}
				if err := server.redis(); err != nil {
					return "", err
				}
				return run(s, client, server)
			}}
	}
	return []testCase{
		c("commands", func(s *scene, client, server *pod) (string, error) {
			var script strings.Builder
			for i := range 300 {
				fmt.Fprintf(&script, "SET key:%d %s\nGET key:%d\nSTRLEN key:%d\nINCR n\nLPUSH list %d\nGET nothing\nLPUSH key:%d x\n",
					i, strings.Repeat(fmt.Sprint(i), i*20), i, i, i, i)
			}
			script.WriteString("LRANGE list 0 -1\n")
			replies, err := client.redisCLI(server, script.String())
			if err != nil {
				return "", err
			}
			state, err := client.redisState(server)
			return replies + state, err
		}),
		c("pipelined", func(s *scene, client, server *pod) (string, error) {
			for _, args := range [][]string{
				{"-t", "lpush", "-n", "20000", "-P", "32", "-c", "20", "-d", "200"},
				{"-t", "get,set", "-n", "2000", "-P", "8", "-c", "8", "-d", "20000"},
			} {
				if _, err := client.run("redis-benchmark", append([]string{"-q", "-h", server.ip.String()}, args...)...); err != nil {
					return "", err
				}
			}
			var mass strings.Builder
			for i := range 20000 {
				value := strings.Repeat(fmt.Sprint(i), i%50)
				fmt.Fprintf(&mass, "*3\r\n$3\r\nSET\r\n$%d\r\nmass:%d\r\n$%d\r\n%s\r\n", len(fmt.Sprint("mass:", i)), i, len(value), value)
			}
			replies, err := client.redisCLI(server, mass.String(), "--pipe")
			if err != nil {
				return "", err
			}
			state, err := client.redisState(server)
			return replies + state, err
		}),
		c("pub/sub", func(s *scene, client, server *pod) (string, error) {
			const messages = 200
			var subscribers []*process
			for range 3 {
				sub, err := client.start("redis-cli", "-h", server.ip.String(), "SUBSCRIBE", "news")
				if err != nil {
					return "", err
				}
				subscribers = append(subscribers, sub)
				if err := s.printed(sub, "subscribe", 1); err != nil {
					return "", err
				}
			}
			var script strings.Builder
			for i := range messages {
				fmt.Fprintf(&script, "PUBLISH news %s-%d\n", strings.Repeat("m", i*50), i)
			}
			replies, err := client.redisCLI(server, script.String())
			if err != nil {
				return "", err
			}
			var got string
			for _, sub := range subscribers {
				if err := s.printed(sub, fmt.Sprintf("-%d\n", messages-1), 1); err != nil {
					return "", err
				}
				log, err := os.ReadFile(sub.log)
				if err != nil {
					return "", err
				}
				got += string(log)
			}
			return replies + got, nil
		}),
		c("MONITOR", func(s *scene, client, server *pod) (string, error) {
			const last = "the-last-one"
			monitor, err := client.start("redis-cli", "-h", server.ip.String(), "MONITOR")
			if err != nil {
				return "", err
			}
			if err := s.printed(monitor, "OK", 1); err != nil {
				return "", err
			}
			if _, err := client.run("redis-benchmark", "-q", "-h", server.ip.String(), "-t", "set", "-n", "5000", "-P", "16", "-c", "4", "-d", "100"); err != nil {
				return "", err
			}
			if _, err := client.redisCLI(server, "", "ECHO", last); err != nil {
				return "", err
			}
			if err := s.printed(monitor, last, 1); err != nil {
				return "", err
			}
			log, err := os.ReadFile(monitor.log)
			if err != nil {
				return "", err
			}
			// Commands without time and client, in no order between clients.
			var commands []string
			for line := range strings.Lines(string(log)) {
				if _, command, ok := strings.Cut(line, "] "); ok && !strings.Contains(command, `"CONFIG"`) {
					commands = append(commands, command)
				}
			}
			slices.Sort(commands)
			return fmt.Sprintf("%d commands\n%s", len(commands), strings.Join(slices.Compact(commands), "")), nil
		}),
		c("replication", func(s *scene, client, server *pod) (string, error) {
			write := func(prefix string) error {
				var mass strings.Builder
				for i := range 3000 {
					fmt.Fprintf(&mass, "SET %s:%d %s\n", prefix, i, strings.Repeat(prefix, i%500))
				}
				_, err := client.redisCLI(server, mass.String())
				return err
			}
			if err := write("before"); err != nil {
				return "", err
			}
			replica, err := s.pod("replica")
			if err != nil {
				return "", err
			}
			if err := replica.redis("--replicaof", server.ip.String()+" 6379"); err != nil {
				return "", err
			}
			if err := write("while"); err != nil {
				return "", err
			}
			err = s.wait("the replica is connected", func() (bool, error) {
				role, err := client.redisCLI(replica, "", "ROLE")
				return strings.Contains(role, "\nconnected\n"), err
			})
			if err != nil {
				return "", err
			}
			if err := write("after"); err != nil {
				return "", err
			}
			// WAIT looks at what was written by its own connection.
			if acked, err := client.redisCLI(server, "SET last 1\nWAIT 1 20000\n"); err != nil || acked != "OK\n1\n" {
				return "", fmt.Errorf("the replica has not acknowledged: %q, %w", acked, err)
			}
			master, err := client.redisState(server)
			if err != nil {
				return "", err
			}
			copied, err := client.redisState(replica)
			if err == nil && copied != master {
				err = fmt.Errorf("the replica has %s, the master %s", copied, master)
			}
			return master, err
		}),
	}
}
