package main

import "fmt"

// haproxyConfig passes port 7000 on as HTTP, port 7001 as TCP.
const haproxyConfig = `
global
	maxconn 200
	tune.bufsize 131072
	tune.maxrewrite 16384
	%[2]s
defaults
	timeout connect 20s
	timeout client 60s
	timeout server 60s
	%[3]s
listen http
	mode http
	bind :7000
	server s1 %[1]s
listen tcp
	mode tcp
	bind :7001
	server s1 %[1]s
`

func haproxyCase(splice bool) func(*scene) (string, error) {
	return func(s *scene) (string, error) {
		client, proxy, server, err := s.threePods()
		if err != nil {
			return "", err
		}
		global, defaults := "nosplice", ""
		if splice {
			global, defaults = "", "option splice-auto"
		}
		config, err := s.file("haproxy.cfg", fmt.Sprintf(haproxyConfig, server.at(8080), global, defaults))
		if err != nil {
			return "", err
		}
		if _, err := proxy.start("haproxy", "-db", "-f", config); err != nil {
			return "", err
		}
		var results string
		for _, port := range []int{7000, 7001} {
			if err := proxy.listens(port); err != nil {
				return "", err
			}
			for _, parallel := range []int{1, 4} {
				v := standardVisit("http://"+proxy.at(port), "h1")
				v.Parallel = parallel
				result, err := client.visit(v)
				if err != nil {
					return "", err
				}
				results += result
			}
		}
		return results, nil
	}
}

func haproxyCases() []testCase {
	packages := []string{"haproxy"}
	return []testCase{
		{software: "HAProxy", name: "read and write", packages: packages, run: haproxyCase(false)},
		{software: "HAProxy", name: "splice-auto", packages: packages, splices: true, run: haproxyCase(true)},
	}
}
