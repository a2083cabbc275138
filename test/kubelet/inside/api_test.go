package inside_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/skipstack/skipstack/test/must"
)

const (
	clusterDir = "/run/kubernetes"
	apiServer  = "https://" + nodeIP + ":6443"
	authority  = clusterDir + "/apiserver/apiserver.crt" // it makes that itself
)

// credentials writes what the control plane's services and the kubelet need to trust
// each other, and returns the token that they share.
func credentials(t *testing.T) (token string) {
	t.Helper()
	must.Do(t, os.MkdirAll(clusterDir, 0o700))
	key := must.Get(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))(t)
	token = rand.Text()
	for name, text := range map[string]string{
		"sa.key": string(pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: must.Get(x509.MarshalECPrivateKey(key))(t)})),
		"tokens": token + `,node,node,"system:masters"` + "\n",
		"kubeconfig": fmt.Sprintf(`apiVersion: v1
kind: Config
current-context: test
contexts: [{name: test, context: {cluster: test, user: test}}]
clusters: [{name: test, cluster: {server: %q, certificate-authority: %q}}]
users: [{name: test, user: {token: %q}}]
`, apiServer, authority, token),
	} {
		must.Do(t, os.WriteFile(filepath.Join(clusterDir, name), []byte(text), 0o600))
	}
	return token
}

// An api is a client of the API server.
type api struct {
	http  *http.Client
	token string
}

func newAPI(t *testing.T, token string) *api {
	t.Helper()
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(must.Get(os.ReadFile(authority))(t)) {
		t.Fatalf("%s has no certificate", authority)
	}
	return &api{&http.Client{
		Timeout: 2 * time.Minute, Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}},
	}, token}
}

// do asks the server, and decodes its answer if result is not nil.
func (a *api) do(ctx context.Context, method, path, contentType string, body []byte, result any) error {
	req, err := http.NewRequestWithContext(ctx, method, apiServer+path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Authorization", "Bearer "+a.token)
	req.Header.Set("Content-Type", contentType)
	r, err := a.http.Do(req)
	if err != nil {
		return err
	}
	defer r.Body.Close()
	text, err := io.ReadAll(r.Body)
	if err == nil && r.StatusCode >= 300 {
		err = errors.New(string(text))
	}
	if err != nil {
		return fmt.Errorf("%s %s: %s: %w", method, path, r.Status, err)
	}
	if result == nil {
		return nil
	}
	return json.Unmarshal(text, result)
}

func (a *api) get(ctx context.Context, path string, result any) error {
	return a.do(ctx, http.MethodGet, path, "", nil, result)
}

const (
	pods        = "/api/v1/namespaces/default/pods"
	services    = "/api/v1/namespaces/default/services"
	deployments = "/apis/apps/v1/namespaces/default/deployments"
)

// create makes an object of a file, as soon as the server lets it.
func (a *api) create(t *testing.T, path, name string) {
	t.Helper()
	text := must.Get(testdata.ReadFile("testdata/" + name + ".yaml"))(t)
	wait(t, func() error {
		err := a.do(t.Context(), http.MethodPost, path, "application/yaml", text, nil)
		if err != nil && strings.Contains(err.Error(), `"reason":"AlreadyExists"`) {
			return nil // an answer that came too late
		}
		return err
	})
}

// patch merges a change into an object.
func (a *api) patch(t *testing.T, path string, change any) {
	t.Helper()
	text := must.Get(json.Marshal(change))(t)
	wait(t, func() error {
		return a.do(t.Context(), http.MethodPatch, path, "application/strategic-merge-patch+json", text, nil)
	})
}

func (a *api) delete(t *testing.T, path string) {
	t.Helper()
	must.Do(t, a.do(t.Context(), http.MethodDelete, path, "", nil, nil))
}

// A deployment is what the tests read of one.
type deployment struct {
	Metadata struct{ Generation int64 }
	Spec     struct{ Replicas int }
	Status   struct {
		ObservedGeneration                                          int64
		Replicas, UpdatedReplicas, ReadyReplicas, AvailableReplicas int
	}
}

// waitRolledOut waits until a deployment's pods are as it wants them, and no others
// are left. It returns their names.
func (a *api) waitRolledOut(t *testing.T, name string) (names []string) {
	t.Helper()
	wait(t, func() error {
		var d deployment
		if err := a.get(t.Context(), deployments+"/"+name, &d); err != nil {
			return err
		}
		s := d.Status
		if want := d.Spec.Replicas; s.ObservedGeneration < d.Metadata.Generation || s.UpdatedReplicas != want || s.Replicas != want ||
			s.ReadyReplicas != want || s.AvailableReplicas != want {
			return fmt.Errorf("deployment %s is not rolled out: %+v", name, d)
		}
		var list struct {
			Items []struct {
				Metadata struct{ Name string }
			}
		}
		if err := a.get(t.Context(), pods+"?labelSelector=app%3D"+name, &list); err != nil {
			return err
		}
		names = nil
		for _, item := range list.Items {
			names = append(names, item.Metadata.Name)
		}
		if len(names) != d.Spec.Replicas {
			return fmt.Errorf("deployment %s has the pods %s, want %d", name, names, d.Spec.Replicas)
		}
		return nil
	})
	return names
}

// ready says whether the server serves.
func (a *api) ready(ctx context.Context) error {
	return a.do(ctx, http.MethodGet, "/readyz", "", nil, nil)
}
