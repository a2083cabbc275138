package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/big"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/skipstack/skipstack/test/datapath/traffic"
)

// Names of workers.
const (
	httpServerName = "http-server"
	httpClientName = "http-client"
)

// content is n bytes that depend on the seed.
func content(n int, seed uint64) []byte {
	p := make([]byte, n)
	traffic.NewStream(seed).Next(p)
	return p
}

func digest(p []byte) string { return fmt.Sprintf("%d bytes %x", len(p), sha256.Sum256(p)) }

// failed ends a worker.
func failed(err error) int {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// httpServer serves HTTP/1 and HTTP/2 on :8080, both with TLS on :8443.
//
//	/bytes?n=N&seed=S  N bytes
//	/chunks?n=N&seed=S the same, flushed every few thousand
//	/digest            the digest of the request's body
//	/headers?n=N       N bytes of headers back, and the digest of the request's
//	/echo              the request's body, while it is still being sent
func httpServer([]string) int {
	mux := http.NewServeMux()
	number := func(r *http.Request, name string) int {
		n, _ := strconv.Atoi(r.FormValue(name))
		return n
	}
	mux.HandleFunc("/bytes", func(w http.ResponseWriter, r *http.Request) {
		body := content(number(r, "n"), uint64(number(r, "seed")))
		http.ServeContent(w, r, "bytes.bin", time.Unix(1700000000, 0), bytes.NewReader(body))
	})
	mux.HandleFunc("/chunks", func(w http.ResponseWriter, r *http.Request) {
		for part := range slices.Chunk(content(number(r, "n"), uint64(number(r, "seed"))), 5000) {
			w.Write(part)
			w.(http.Flusher).Flush()
		}
	})
	mux.HandleFunc("/digest", func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		fmt.Fprintf(w, "%s, error %v\n", digest(body), err)
	})
	mux.HandleFunc("/headers", func(w http.ResponseWriter, r *http.Request) {
		var got []string
		for _, name := range slices.Sorted(maps.Keys(r.Header)) {
			if strings.HasPrefix(name, "X-Large") {
				got = append(got, name+r.Header.Get(name))
			}
		}
		w.Header().Set("X-Large-Reply", strings.Repeat("r", number(r, "n")))
		fmt.Fprintln(w, digest([]byte(strings.Join(got, "\n"))))
	})
	mux.HandleFunc("/echo", func(w http.ResponseWriter, r *http.Request) {
		http.NewResponseController(w).EnableFullDuplex()
		w.WriteHeader(http.StatusOK)
		w.(http.Flusher).Flush()
		io.Copy(flushing{w}, r.Body)
	})
	cert, err := certificate()
	if err != nil {
		return failed(err)
	}
	server := &http.Server{Handler: mux, MaxHeaderBytes: 1 << 20, Protocols: new(http.Protocols)}
	server.Protocols.SetHTTP1(true)
	server.Protocols.SetHTTP2(true)
	server.Protocols.SetUnencryptedHTTP2(true)
	server.TLSConfig = &tls.Config{Certificates: []tls.Certificate{cert}}
	clear, err := net.Listen("tcp", ":8080")
	if err != nil {
		return failed(err)
	}
	secret, err := net.Listen("tcp", ":8443")
	if err != nil {
		return failed(err)
	}
	errs := make(chan error, 2)
	go func() { errs <- server.Serve(clear) }()
	go func() { errs <- server.ServeTLS(secret, "", "") }()
	return failed(<-errs)
}

type flushing struct{ w http.ResponseWriter }

func (f flushing) Write(p []byte) (int, error) {
	n, err := f.w.Write(p)
	f.w.(http.Flusher).Flush()
	return n, err
}

// certificate makes one that nobody vouches for.
func certificate() (tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(24 * time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, err
}

// An exchange is a request that httpClient makes, Times times.
type exchange struct {
	Method  string // default GET
	Path    string
	Header  map[string]string
	Large   int    // so many bytes of further headers
	Body    int    // bytes
	Unknown bool   // the body is sent in chunks, its length not told
	Show    string // names of headers of the reply to print, comma-separated
	Times   int    // default 1
}

// A visit is what httpClient does.
type visit struct {
	URL       string // of the server
	Protocol  string // h1 (default), h2: without TLS unless URL says https
	Proxy     string // URL of a proxy
	Parallel  int    // do all of it so many times at once
	Exchanges []exchange
}

func (p *pod) visit(v visit) (string, error) {
	arg, err := json.Marshal(v)
	if err != nil {
		return "", err
	}
	return p.work(httpClientName, string(arg))
}

// httpClient makes the requests of a visit, each after the other over one
// connection if the server lets it, and prints what must be the same each time.
func httpClient(args []string) int {
	var v visit
	if err := json.Unmarshal([]byte(args[0]), &v); err != nil {
		return failed(err)
	}
	transport := &http.Transport{
		TLSClientConfig:        &tls.Config{InsecureSkipVerify: true},
		Protocols:              new(http.Protocols),
		DisableCompression:     true,
		MaxResponseHeaderBytes: 1 << 20,
		MaxIdleConnsPerHost:    max(v.Parallel, 1),
	}
	transport.Protocols.SetHTTP1(v.Protocol != "h2")
	transport.Protocols.SetHTTP2(v.Protocol == "h2")
	transport.Protocols.SetUnencryptedHTTP2(v.Protocol == "h2")
	if v.Proxy != "" {
		proxy, err := url.Parse(v.Proxy)
		if err != nil {
			return failed(err)
		}
		transport.Proxy = http.ProxyURL(proxy)
	}
	client := &http.Client{Transport: transport}
	results := make([]string, max(v.Parallel, 1))
	errs := make([]error, len(results))
	var wg sync.WaitGroup
	for i := range results {
		wg.Go(func() { results[i], errs[i] = exchanges(client, v, len(results) == 1) })
	}
	wg.Wait()
	for i, r := range results {
		fmt.Printf("client %d\n%s", i, r)
	}
	return failed(errors.Join(errs...))
}

func exchanges(client *http.Client, v visit, alone bool) (string, error) {
	var out strings.Builder
	for i, e := range v.Exchanges {
		for n := range max(e.Times, 1) {
			line, reused, err := exchangeOnce(client, v.URL, e, uint64(i))
			if err != nil {
				return out.String(), fmt.Errorf("request %d.%d, %s: %w", i, n, e.Path, err)
			}
			fmt.Fprintf(&out, "%d.%d %s", i, n, line)
			if alone {
				fmt.Fprintf(&out, ", connection reused %v", reused)
			}
			out.WriteByte('\n')
		}
	}
	return out.String(), nil
}

func exchangeOnce(client *http.Client, base string, e exchange, seed uint64) (line string, reused bool, err error) {
	var body io.Reader
	if e.Body > 0 {
		body = bytes.NewReader(content(e.Body, seed))
		if e.Unknown {
			body = io.MultiReader(body)
		}
	}
	req, err := http.NewRequest(cmp.Or(e.Method, http.MethodGet), base+e.Path, body)
	if err != nil {
		return "", false, err
	}
	for name, value := range e.Header {
		req.Header.Set(name, value)
	}
	const each = 2000
	for i := range e.Large / each {
		req.Header.Set(fmt.Sprintf("X-Large-%02d", i), strings.Repeat(string(rune('a'+i%26)), each))
	}
	req = req.WithContext(httptrace.WithClientTrace(context.Background(), &httptrace.ClientTrace{
		GotConn: func(info httptrace.GotConnInfo) { reused = info.Reused },
	}))
	reply, err := client.Do(req)
	if err != nil {
		return "", reused, err
	}
	defer reply.Body.Close()
	got, err := io.ReadAll(reply.Body)
	if err != nil {
		return "", reused, err
	}
	line = fmt.Sprintf("%s %s: %s %s", req.Method, e.Path, reply.Status, digest(got))
	if len(got) < 200 && !bytes.ContainsFunc(got, func(r rune) bool { return r > 126 }) {
		line += " " + strconv.Quote(string(got))
	}
	for name := range strings.SplitSeq(e.Show, ",") {
		if name != "" {
			line += fmt.Sprintf(", %s: %s", name, digest([]byte(reply.Header.Get(name))))
		}
	}
	return line, reused, nil
}

// standardVisit asks everything that httpServer has.
func standardVisit(server, protocol string) visit {
	return visit{URL: server, Protocol: protocol, Exchanges: []exchange{
		{Path: "/bytes?n=10&seed=1", Times: 50, Show: "Content-Length"},
		{Path: "/bytes?n=3000000&seed=2", Show: "Content-Length,Last-Modified"},
		{Path: "/bytes?n=3000000&seed=2", Header: map[string]string{"Range": "bytes=1000000-1999999"}, Show: "Content-Range"},
		{Method: http.MethodHead, Path: "/bytes?n=1000&seed=3", Show: "Content-Length"},
		{Path: "/chunks?n=1000000&seed=4"},
		{Method: http.MethodPost, Path: "/digest", Body: 1, Times: 20},
		{Method: http.MethodPost, Path: "/digest", Body: 5 << 20},
		{Method: http.MethodPut, Path: "/digest", Body: 1 << 20, Unknown: true},
		{Path: "/headers?n=30000", Large: 60000, Show: "X-Large-Reply", Times: 5},
		{Method: http.MethodPost, Path: "/echo", Body: 3 << 20, Unknown: true, Times: 2},
		{Path: "/nothing"},
	}}
}
