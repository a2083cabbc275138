package main

import (
	"errors"
	"io"
	"net"
	"net/http"
	"sync"
)

// Names of workers.
const (
	l4ProxyName      = "l4-proxy"
	connectProxyName = "connect-proxy"
)

// onlyReader and onlyWriter hide the methods by which io.Copy finds splice(2).
type (
	onlyReader struct{ io.Reader }
	onlyWriter struct{ io.Writer }
)

// join copies both ways until both have ended, as TCP proxies do.
func join(a, b *net.TCPConn, splice bool) error {
	var wg sync.WaitGroup
	errs := make([]error, 2)
	for i, c := range [][2]*net.TCPConn{{a, b}, {b, a}} {
		wg.Go(func() {
			to, from := c[0], c[1]
			if splice {
				_, errs[i] = io.Copy(to, from)
			} else {
				_, errs[i] = io.Copy(onlyWriter{to}, onlyReader{from})
			}
			to.CloseWrite()
		})
	}
	wg.Wait()
	return errors.Join(errs[0], errs[1], a.Close(), b.Close())
}

// l4Proxy passes connections to :7000 on to args[0]; without splice(2) if args[1]
// says "copy".
func l4Proxy(args []string) int {
	l, err := net.Listen("tcp", ":7000")
	for err == nil {
		var client, server net.Conn
		if client, err = l.Accept(); err != nil {
			break
		}
		if server, err = net.Dial("tcp", args[0]); err != nil {
			break
		}
		go join(client.(*net.TCPConn), server.(*net.TCPConn), args[1] != "copy")
	}
	return failed(err)
}

// connectProxy is an HTTP proxy on :7000 that knows CONNECT alone.
func connectProxy([]string) int {
	return failed(http.ListenAndServe(":7000", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodConnect {
			http.Error(w, "CONNECT alone", http.StatusMethodNotAllowed)
			return
		}
		server, err := net.Dial("tcp", r.Host)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadGateway)
			return
		}
		client, _, err := w.(http.Hijacker).Hijack()
		if err != nil {
			server.Close()
			return
		}
		if _, err := io.WriteString(client, "HTTP/1.1 200 OK\r\n\r\n"); err != nil {
			client.Close()
			server.Close()
			return
		}
		join(client.(*net.TCPConn), server.(*net.TCPConn), true)
	})))
}

// threePods are a client, a proxy and a server that runs httpServer.
func (s *scene) threePods() (client, proxy, server *pod, err error) {
	if client, server, err = s.twoPods(); err != nil {
		return nil, nil, nil, err
	}
	if proxy, err = s.pod("proxy"); err != nil {
		return nil, nil, nil, err
	}
	if _, err := server.startWorker(httpServerName); err != nil {
		return nil, nil, nil, err
	}
	return client, proxy, server, server.listens(8443)
}

func l4ProxyCase(how string) func(*scene) (string, error) {
	return func(s *scene) (string, error) {
		client, proxy, server, err := s.threePods()
		if err != nil {
			return "", err
		}
		if _, err := proxy.startWorker(l4ProxyName, server.at(8080), how); err != nil {
			return "", err
		}
		if err := proxy.listens(7000); err != nil {
			return "", err
		}
		return client.visit(standardVisit("http://"+proxy.at(7000), "h1"))
	}
}

func connectProxyCase(s *scene) (string, error) {
	client, proxy, server, err := s.threePods()
	if err != nil {
		return "", err
	}
	if _, err := proxy.startWorker(connectProxyName); err != nil {
		return "", err
	}
	if err := proxy.listens(7000); err != nil {
		return "", err
	}
	v := standardVisit("https://"+server.at(8443), "h1")
	v.Proxy = "http://" + proxy.at(7000)
	return client.visit(v)
}

func proxyCases() []testCase {
	return []testCase{
		{software: "Go io.Copy proxy", name: "splice", ci: true, splices: true, run: l4ProxyCase("splice")},
		{software: "Go io.Copy proxy", name: "read and write", ci: true, run: l4ProxyCase("copy")},
		{software: "Go CONNECT proxy", name: "splice", ci: true, splices: true, run: connectProxyCase},
	}
}
