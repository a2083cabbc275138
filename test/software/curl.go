package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

func curlCases() []testCase {
	return []testCase{
		{software: "curl", name: "nginx and Go servers", packages: append([]string{"curl"}, nginxPackages...), run: func(s *scene) (string, error) {
			client, nginx, err := proxied(s)
			if err != nil {
				return "", err
			}
			server := s.pods["server"]
			upload, err := s.file("upload", string(content(6<<20, 3)))
			if err != nil {
				return "", err
			}
			part, err := s.file("part", string(content(8<<20, 8<<20)[:1<<20]))
			if err != nil {
				return "", err
			}
			web, golang, secret := "http://"+nginx.at(80), "http://"+server.at(8080), "https://"+server.at(8443)
			var out strings.Builder
			for i, args := range [][]string{
				{web + "/large"},
				{web + "/small", web + "/page.html", web + "/empty", web + "/small"}, // one connection
				{"-w", "", "-Z", "-o", "z1", web + "/large", "-o", "z2", web + "/large", "-o", "z3", web + "/page.html"},
				{"-C", "-", "-o", part, web + "/large"},
				{"-T", upload, golang + "/digest"},
				{"--data-binary", "@" + upload, golang + "/digest"},
				{"-o", "/dev/null", "-F", "file=@" + upload, "-F", "name=value", golang + "/echo"}, // with a random boundary
				{"--http2-prior-knowledge", golang + "/bytes?n=5000000", golang + "/chunks?n=1000000"},
				{"-k", secret + "/bytes?n=5000000", secret + "/echo", "--data-binary", "@" + upload},
				{"--limit-rate", "4M", golang + "/bytes?n=3000000"},
				{"-I", "-o", "/dev/null", web + "/large"},
				{"http://" + server.at(1)},
			} {
				args = append([]string{"-sS", "-w", `\n%{http_code} %{size_download} %{size_upload} %{num_connects}\n`}, args...)
				got, err := client.run("curl", args...)
				fmt.Fprintf(&out, "%d: %s, error %v\n", i, digest([]byte(got)), err != nil)
			}
			for _, name := range []string{"part", "z1", "z2", "z3"} {
				data, err := os.ReadFile(filepath.Join(s.dir, name))
				if err != nil {
					return "", err
				}
				fmt.Fprintln(&out, name, digest(data))
			}
			return out.String(), nil
		}},
	}
}
