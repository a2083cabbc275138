package main

import (
	_ "embed"
	"net/http"
)

// Programs for language runtimes, each an HTTP server and its client.
var (
	//go:embed testdata/http.js
	nodeProgram string
	//go:embed testdata/Http.java
	javaProgram string
)

// commonVisit asks what the servers of all runtimes have.
func commonVisit(server string, parallel int) visit {
	return visit{URL: server, Parallel: parallel, Exchanges: []exchange{
		{Path: "/bytes?n=10", Times: 50, Show: "Content-Length"},
		{Path: "/bytes?n=3000000", Times: 2},
		{Path: "/chunks?n=1000000"},
		{Method: http.MethodPost, Path: "/digest", Body: 1, Times: 20},
		{Method: http.MethodPost, Path: "/digest", Body: 5 << 20},
		{Method: http.MethodPut, Path: "/digest", Body: 1 << 20, Unknown: true},
		{Path: "/headers?n=10000", Large: 10000, Show: "X-Large-Reply", Times: 5},
		{Path: "/nothing"},
	}}
}

// runtimeCase makes the cases of a runtime whose command runs the program in the file.
func runtimeCase(software, file, program string, packages []string, command ...string) []testCase {
	start := func(s *scene) (client, server *pod, path string, err error) {
		if client, server, err = s.twoPods(); err != nil {
			return nil, nil, "", err
		}
		if path, err = s.file(file, program); err != nil {
			return nil, nil, "", err
		}
		if _, err := server.start(command[0], append(command[1:len(command):len(command)], path, "server", "8080")...); err != nil {
			return nil, nil, "", err
		}
		return client, server, path, server.listens(8080)
	}
	run := func(client *pod, path string, args ...string) (string, error) {
		return client.run(command[0], append(append(command[1:len(command):len(command)], path), args...)...)
	}
	cases := []testCase{
		{software: software, name: "HTTP server and client", packages: packages, run: func(s *scene) (string, error) {
			client, server, path, err := start(s)
			if err != nil {
				return "", err
			}
			return run(client, path, "client", "http://"+server.at(8080))
		}},
		{software: software, name: "HTTP server, Go clients", packages: packages, run: func(s *scene) (string, error) {
			client, server, _, err := start(s)
			if err != nil {
				return "", err
			}
			one, err := client.visit(commonVisit("http://"+server.at(8080), 1))
			if err != nil {
				return "", err
			}
			many, err := client.visit(commonVisit("http://"+server.at(8080), 8))
			return one + many, err
		}},
	}
	if software == "Java" {
		cases = append(cases, testCase{software: software, name: "blocking sockets", packages: packages,
			blocking: "ServerSocket and Socket are blocking", run: func(s *scene) (string, error) {
				client, server, path, err := start(s)
				if err != nil {
					return "", err
				}
				if err := server.listens(8081); err != nil {
					return "", err
				}
				return run(client, path, "records", server.ip.String())
			}})
	}
	return cases
}

func runtimeCases() []testCase {
	return append(
		runtimeCase("Node.js", "http.js", nodeProgram, []string{"nodejs"}, "node", "--max-http-header-size=200000"),
		runtimeCase("Java", "Http.java", javaProgram, []string{"default-jdk-headless"}, "java", "-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")...)
}
