package main

func goCases() []testCase {
	const software = "Go net/http"
	serve := func(url func(*pod) string, protocol string, parallel int) func(*scene) (string, error) {
		return func(s *scene) (string, error) {
			client, server, err := s.twoPods()
			if err != nil {
				return "", err
			}
			if _, err := server.startWorker(httpServerName); err != nil {
				return "", err
			}
			if err := server.listens(8443); err != nil {
				return "", err
			}
			v := standardVisit(url(server), protocol)
			v.Parallel = parallel
			return client.visit(v)
		}
	}
	clear := func(p *pod) string { return "http://" + p.at(8080) }
	secret := func(p *pod) string { return "https://" + p.at(8443) }
	return []testCase{
		{software: software, name: "HTTP/1", ci: true, run: serve(clear, "h1", 1)},
		{software: software, name: "HTTP/1, 8 at once", ci: true, run: serve(clear, "h1", 8)},
		{software: software, name: "HTTP/1 with TLS", ci: true, run: serve(secret, "h1", 1)},
		{software: software, name: "HTTP/2 without TLS", ci: true, run: serve(clear, "h2", 1)},
		{software: software, name: "HTTP/2, 8 at once", ci: true, run: serve(secret, "h2", 8)},
		{software: "gRPC for Go", name: "unary and streams", ci: true, run: grpcCase},
	}
}
