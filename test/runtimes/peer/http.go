package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	bodySize    = 8192 // bytes
	workers     = 4
	pause       = 250 * time.Millisecond
	httpTimeout = time.Minute
	nameHeader  = "X-Served-By"
)

// body is what the server answers.
var body = bytes.Repeat([]byte("skipstack "), bodySize/10+1)[:bodySize]

// serveHTTP serves until SIGTERM, and answers the requests that have come till then.
func serveHTTP(port string) error {
	name, err := os.Hostname()
	if err != nil {
		return err
	}
	s := &http.Server{Addr: net.JoinHostPort("", port), Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set(nameHeader, name)
		w.Write(body)
	})}
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM)
	defer stop()
	ended := make(chan error, 1)
	go func() { ended <- s.ListenAndServe() }()
	select {
	case err := <-ended:
		return err
	case <-ctx.Done():
		ctx, cancel := context.WithTimeout(context.Background(), httpTimeout)
		defer cancel()
		return s.Shutdown(ctx)
	}
}

// Load is what load prints.
type Load struct {
	Requests    int            `json:"requests"`
	Bytes       int            `json:"bytes"`       // of the answers' bodies
	Connections int            `json:"connections"` // made
	Failures    []string       `json:"failures"`
	Servers     map[string]int `json:"servers"` // requests by the server's host name
}

// load asks url again and again, by some workers that keep their connection and
// some that make a new one each time, until the file stop exists.
func load(url, stop string) (*Load, error) {
	r := &Load{Servers: map[string]int{}}
	var mu sync.Mutex
	var wg sync.WaitGroup
	dial := func(ctx context.Context, network, addr string) (net.Conn, error) {
		mu.Lock()
		r.Connections++
		mu.Unlock()
		return (&net.Dialer{}).DialContext(ctx, network, addr)
	}
	for i := range workers {
		wg.Go(func() {
			client := &http.Client{Timeout: httpTimeout, Transport: &http.Transport{DialContext: dial, DisableKeepAlives: i%2 == 0}}
			for {
				if _, err := os.Stat(stop); err == nil {
					return
				}
				name, err := request(client, url)
				mu.Lock()
				r.Requests++
				if err != nil {
					r.Failures = append(r.Failures, time.Now().Format(time.RFC3339Nano)+" "+err.Error())
				} else {
					r.Servers[name]++
					r.Bytes += bodySize
				}
				mu.Unlock()
				time.Sleep(pause)
			}
		})
	}
	wg.Wait()
	return r, os.Remove(stop)
}

func request(client *http.Client, url string) (server string, err error) {
	r, err := client.Get(url)
	if err != nil {
		return "", err
	}
	defer r.Body.Close()
	got, err := io.ReadAll(r.Body)
	switch {
	case err != nil:
		return "", err
	case r.StatusCode != http.StatusOK:
		return "", errors.New(r.Status)
	case !bytes.Equal(got, body):
		return "", fmt.Errorf("the answer of %d bytes is not what was sent", len(got))
	}
	return r.Header.Get(nameHeader), nil
}
