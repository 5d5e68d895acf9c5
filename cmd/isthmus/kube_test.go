package main

import (
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/isthmus-mesh/isthmus/api/admin"
)

// fakeAPI is an API server that gives tokens and proxies to a Service: as much as the tool sees of one.
func fakeAPI(t *testing.T, proxy http.HandlerFunc) (kubeconfig string) {
	t.Helper()
	mux := http.NewServeMux()
	mux.HandleFunc("POST /api/v1/namespaces/istio-system/serviceaccounts/{account}/token", func(w http.ResponseWriter, r *http.Request) {
		account := r.PathValue("account")
		switch {
		case r.Header.Get("Authorization") != "Bearer user-secret":
			status(w, 401, "Unauthorized", "Unauthorized")
		case account == "nobody":
			status(w, 404, "NotFound", `serviceaccounts "nobody" not found`)
		case account == "forbidden":
			status(w, 403, "Forbidden", `serviceaccounts "forbidden" is forbidden`)
		default:
			w.Header().Set("content-type", "application/json")
			fmt.Fprintf(w, `{"kind":"TokenRequest","apiVersion":"authentication.k8s.io/v1","status":{"token":"token-of-%s"}}`, account)
		}
	})
	mux.HandleFunc("/api/v1/namespaces/istio-system/services/https:isthmusd:15015/proxy/", func(w http.ResponseWriter, r *http.Request) {
		r.URL.Path = r.URL.Path[strings.Index(r.URL.Path, "/proxy/")+len("/proxy"):]
		proxy(w, r)
	})
	s := httptest.NewTLSServer(mux)
	t.Cleanup(s.Close)
	path := filepath.Join(t.TempDir(), "config")
	text := fmt.Sprintf(`apiVersion: v1
kind: Config
clusters: [{name: amber, cluster: {server: %q, certificate-authority-data: %s}}]
users: [{name: amber, user: {token: user-secret}}]
contexts: [{name: amber, context: {cluster: amber, user: amber}}]
`, s.URL, base64.StdEncoding.EncodeToString(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})))
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func status(w http.ResponseWriter, code int, reason, message string) {
	w.Header().Set("content-type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(map[string]any{"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "message": message, "code": code})
}

func TestContext(t *testing.T) {
	var away atomic.Int32
	kubeconfig := fakeAPI(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get(admin.TokenHeader) == "" {
			t.Error("no token of its own")
		}
		switch {
		case away.Load() > 0:
			away.Add(-1)
			status(w, 503, "ServiceUnavailable", "error trying to reach service: dial tcp 10.1.0.7:15015: connect: connection refused")
		case r.Header.Get(admin.TokenHeader) == "token-of-isthmus-viewer" && r.Method != http.MethodGet:
			w.WriteHeader(403)
			_ = json.NewEncoder(w).Encode(admin.Error{Reason: "Forbidden", Message: "isthmus-viewer may not", Hint: "bind a Role"})
		case r.URL.Path == "/v1/peers":
			_ = json.NewEncoder(w).Encode([]admin.Peer{{Name: "birch", State: "approved"}})
		case r.URL.Path == "/v1/tokens" && r.Method == http.MethodPost:
			_ = json.NewEncoder(w).Encode(admin.TokenReply{Token: "isth1_x", ID: "x"})
		default:
			w.WriteHeader(404)
		}
	})
	at := func(args ...string) []string {
		return append([]string{"--kubeconfig", kubeconfig, "--context", "amber"}, args...)
	}
	for name, c := range map[string]struct {
		args      []string
		away      int32
		out, fail string
	}{
		"looks":               {at("peers"), 0, "birch", ""},
		"the flag behind":     {[]string{"peers", "--context", "amber", "--kubeconfig", kubeconfig}, 0, "birch", ""},
		"a replica is gone":   {at("peers"), 2, "birch", ""},
		"all replicas are":    {at("peers"), 9, "", "does not get through to isthmusd"},
		"makes a token":       {at("token", "create", "--for", "birch"), 0, "isth1_x", ""},
		"is not asked twice":  {at("token", "create", "--for", "birch"), 1, "", "does not get through to isthmusd"},
		"viewer":              {at("--as-account", "isthmus-viewer", "token", "create", "--for", "birch"), 0, "", "isthmus-viewer may not"},
		"no such account":     {at("--as-account", "nobody", "peers"), 0, "", "there is no service account istio-system/nobody"},
		"account not allowed": {at("--as-account", "forbidden", "peers"), 0, "", "is forbidden"},
		"no such context":     {[]string{"--kubeconfig", kubeconfig, "--context", "cedar", "peers"}, 0, "", "cedar"},
		"another namespace":   {at("-i", "mesh", "peers"), 0, "", "there is no service account mesh/"},
	} {
		t.Run(name, func(t *testing.T) {
			away.Store(c.away)
			defer away.Store(0)
			out, _, err := isthmus(c.args...)
			if c.fail == "" && (err != nil || !strings.Contains(out, c.out)) {
				t.Errorf("got %q, %v", out, err)
			}
			if c.fail != "" && (err == nil || !strings.Contains(err.Error(), c.fail)) {
				t.Errorf("got %v, want %q", err, c.fail)
			}
			if err != nil && (strings.Contains(err.Error(), "user-secret") || strings.Contains(err.Error(), "token-of")) {
				t.Error("the error holds a credential")
			}
		})
	}
}
