package main

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
)

var nginxPackages = []string{"nginx-light"}

// nginxConfig serves files below the scene's directory on port 80, and on
// port 81 passes all on to the server pod.
const nginxConfig = `
daemon off;
user root;
worker_processes 2;
pid %[1]s/nginx.pid;
error_log stderr;
events { worker_connections 256; }
http {
	access_log off;
	client_body_temp_path %[1]s/body;
	proxy_temp_path %[1]s/proxy;
	fastcgi_temp_path %[1]s/fastcgi;
	uwsgi_temp_path %[1]s/uwsgi;
	scgi_temp_path %[1]s/scgi;
	keepalive_requests 1000;
	large_client_header_buffers 16 64k;
	client_max_body_size 100m;
	server {
		listen 80 reuseport;
		root %[1]s/files;
		location /sendfile/ { alias %[1]s/files/; sendfile on; tcp_nopush on; }
	}
	upstream backend {
		server %[2]s;
		keepalive 8;
	}
	server {
		listen 81;
		location / {
			proxy_pass http://backend;
			proxy_http_version 1.1;
			proxy_set_header Connection "";
			proxy_buffer_size 64k;
			proxy_buffers 8 64k;
		}
		location /unbuffered/ {
			proxy_pass http://backend/;
			proxy_http_version 1.1;
			proxy_set_header Connection "";
			proxy_buffer_size 64k;
			proxy_buffers 8 64k;
			proxy_buffering off;
			proxy_request_buffering off;
		}
	}
}
`

// nginx starts it in the pod; backend is the address of its proxy's server.
func (p *pod) nginx(backend string) error {
	s := p.scene
	for name, size := range map[string]int{"empty": 0, "small": 100, "page.html": 20000, "large": 8 << 20} {
		if _, err := s.file(filepath.Join("files", name), string(content(size, uint64(size)))); err != nil {
			return err
		}
	}
	if err := os.MkdirAll(filepath.Join(s.dir, "body"), 0o777); err != nil {
		return err
	}
	config, err := s.file("nginx.conf", fmt.Sprintf(nginxConfig, s.dir, backend))
	if err != nil {
		return err
	}
	if _, err := p.start("nginx", "-p", s.dir, "-c", config, "-e", "stderr"); err != nil {
		return err
	}
	return p.listens(81)
}

// proxied runs httpServer behind nginx.
func proxied(s *scene) (client, nginx *pod, err error) {
	client, server, err := s.twoPods()
	if err != nil {
		return nil, nil, err
	}
	if nginx, err = s.pod("nginx"); err != nil {
		return nil, nil, err
	}
	if _, err := server.startWorker(httpServerName); err != nil {
		return nil, nil, err
	}
	if err := server.listens(8080); err != nil {
		return nil, nil, err
	}
	return client, nginx, nginx.nginx(server.at(8080))
}

func nginxCases() []testCase {
	c := func(name string, run func(*scene) (string, error)) testCase {
		return testCase{software: "nginx", name: name, ci: true, packages: nginxPackages, run: run}
	}
	static := func(exchanges ...exchange) func(*scene) (string, error) {
		return func(s *scene) (string, error) {
			client, server, err := s.twoPods()
			if err != nil {
				return "", err
			}
			if err := server.nginx("127.0.0.1:1"); err != nil {
				return "", err
			}
			one, err := client.visit(visit{URL: "http://" + server.at(80), Exchanges: exchanges})
			if err != nil {
				return "", err
			}
			many, err := client.visit(visit{URL: "http://" + server.at(80), Exchanges: exchanges, Parallel: 8})
			return one + many, err
		}
	}
	proxy := func(exchanges ...exchange) func(*scene) (string, error) {
		return func(s *scene) (string, error) {
			client, nginx, err := proxied(s)
			if err != nil {
				return "", err
			}
			return client.visit(visit{URL: "http://" + nginx.at(81), Exchanges: exchanges})
		}
	}
	both := func(e exchange) []exchange {
		unbuffered := e
		unbuffered.Path = "/unbuffered" + e.Path
		return []exchange{e, unbuffered}
	}
	return []testCase{
		c("static", static(
			exchange{Path: "/small", Times: 20, Show: "Content-Length"},
			exchange{Path: "/empty"},
			exchange{Path: "/large", Show: "Content-Length"},
			exchange{Path: "/large", Header: map[string]string{"Range": "bytes=5000000-"}, Show: "Content-Range"},
			exchange{Path: "/none"},
		)),
		c("static with sendfile", static(
			exchange{Path: "/sendfile/small", Times: 20},
			exchange{Path: "/sendfile/page.html", Times: 5},
			exchange{Path: "/sendfile/large"},
			exchange{Path: "/sendfile/large", Header: map[string]string{"Range": "bytes=77777-"}},
		)),
		c("keepalive", static(exchange{Path: "/small", Times: 500})),
		// Not /echo: nginx reads no reply while it sends the request.
		c("proxy", proxy(slices.DeleteFunc(standardVisit("", "").Exchanges, func(e exchange) bool { return e.Path == "/echo" })...)),
		c("large headers", proxy(both(exchange{Path: "/headers?n=50000", Large: 100000, Show: "X-Large-Reply", Times: 10})...)),
		c("large bodies", proxy(append(append(
			both(exchange{Method: http.MethodPost, Path: "/digest", Body: 20 << 20}),
			both(exchange{Method: http.MethodPut, Path: "/digest", Body: 5 << 20, Unknown: true})...),
			both(exchange{Path: "/bytes?n=20000000&seed=5"})...)...)),
	}
}
