package authz_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/isthmus-mesh/isthmus/discovery/translate/authz"
	"github.com/isthmus-mesh/isthmus/discovery/translate/jwt"
	"github.com/isthmus-mesh/isthmus/internal/envoytest"
	"github.com/isthmus-mesh/isthmus/internal/porttest"
)

// pki is a root and what it issues.
type pki struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func (p *pki) issue(t *testing.T, template *x509.Certificate) (certPEM, keyPEM []byte, key *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template.NotBefore, template.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	template.SerialNumber = big.NewInt(time.Now().UnixNano())
	parent, signer := template, key
	if p != nil {
		parent, signer = p.cert, p.key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, signer)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}), key
}

func newRoot(t *testing.T) (*pki, []byte) {
	t.Helper()
	text, _, key := (*pki)(nil).issue(t, &x509.Certificate{Subject: pkix.Name{CommonName: "root"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign})
	block, _ := pem.Decode(text)
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return &pki{cert, key}, text
}

func (p *pki) workload(t *testing.T, id string) (cert, key []byte) {
	t.Helper()
	u, err := url.Parse(id)
	if err != nil {
		t.Fatal(err)
	}
	cert, key, _ = p.issue(t, &x509.Certificate{URIs: []*url.URL{u}, DNSNames: []string{"server"}, KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}})
	return cert, key
}

// issuer signs tokens.
type issuer struct{ key *rsa.PrivateKey }

func newIssuer(t *testing.T) *issuer {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	return &issuer{key}
}

func (i *issuer) jwk() string {
	b := base64.RawURLEncoding
	return fmt.Sprintf(`{"kty":"RSA","alg":"RS256","kid":"k","n":%q,"e":%q}`, b.EncodeToString(i.key.N.Bytes()), b.EncodeToString(big.NewInt(int64(i.key.E)).Bytes()))
}

func (i *issuer) token(t *testing.T, claims map[string]any) string {
	t.Helper()
	if claims["exp"] == nil {
		claims["exp"] = time.Now().Add(time.Hour).Unix()
	}
	body, err := json.Marshal(claims)
	if err != nil {
		t.Fatal(err)
	}
	b := base64.RawURLEncoding
	text := b.EncodeToString([]byte(`{"alg":"RS256","kid":"k"}`)) + "." + b.EncodeToString(body)
	sum := sha256.Sum256([]byte(text))
	sig, err := rsa.SignPKCS1v15(rand.Reader, i.key, crypto.SHA256, sum[:])
	if err != nil {
		t.Fatal(err)
	}
	return text + "." + b.EncodeToString(sig)
}

func freePort(t *testing.T) int { return porttest.Take(t) }

// rig is one Envoy with a listener for each set of policies.
type rig struct {
	t         *testing.T
	dir       string
	listeners []any
	clusters  []any
	ports     map[string]int
}

// guards are the filters that the objects put in front of the sidecar.
func (r *rig) guards(objects string) (authz.Filters, []any) {
	r.t.Helper()
	snap := snapshot(r.t, []byte(objects))
	f, problems := authz.For(snap, proxies["sidecar"])
	tokens, clusters, more := jwt.Filter(snap, proxies["sidecar"])
	if tokens != nil {
		f.HTTP = append(append(f.HTTP[:0:0], tokens), f.HTTP...)
	}
	for _, p := range append(problems, more...) {
		r.t.Log(p)
	}
	return f, toAny(r.t, clusters)
}

func (r *rig) http(name string, socket any, objects string) {
	f, clusters := r.guards(objects)
	r.ports[name] = freePort(r.t)
	l := httpListener(r.t, name, r.ports[name], f)
	if socket != nil {
		l["filter_chains"].([]any)[0].(map[string]any)["transport_socket"] = socket
	}
	r.listeners, r.clusters = append(r.listeners, l), append(r.clusters, clusters...)
}

func (r *rig) tcp(name string, socket any, objects string) {
	f, _ := r.guards(objects)
	r.ports[name] = freePort(r.t)
	l := tcpListener(r.t, name, r.ports[name], 0, f)
	if socket != nil {
		l["filter_chains"].([]any)[0].(map[string]any)["transport_socket"] = socket
	}
	r.listeners = append(r.listeners, l)
}

func (r *rig) start(ctx context.Context, web, echo string) {
	r.t.Helper()
	config := bootstrap(r.t, r.listeners)
	static := config["static_resources"].(map[string]any)
	endpoint := func(at string) any {
		host, port, _ := net.SplitHostPort(at)
		return map[string]any{"endpoint": map[string]any{"address": map[string]any{"socket_address": map[string]any{"address": host, "port_value": json.Number(port)}}}}
	}
	for i, at := range []string{web, echo} {
		c := static["clusters"].([]any)[i].(map[string]any)
		c["load_assignment"].(map[string]any)["endpoints"] = []any{map[string]any{"lb_endpoints": []any{endpoint(at)}}}
	}
	static["clusters"] = append(static["clusters"].([]any), r.clusters...)
	text, err := json.Marshal(config)
	if err != nil {
		r.t.Fatal(err)
	}
	path := filepath.Join(r.dir, "envoy.json")
	if err := os.WriteFile(path, text, 0o600); err != nil {
		r.t.Fatal(err)
	}
	output, err := os.Create(filepath.Join(r.dir, "envoy.log"))
	if err != nil {
		r.t.Fatal(err)
	}
	cmd := exec.CommandContext(ctx, envoytest.Path(r.t), "-c", path, "--concurrency", "1", "--use-dynamic-base-id", "--disable-hot-restart", "-l", "warning")
	cmd.Stdout, cmd.Stderr = output, output
	if err := cmd.Start(); err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if r.t.Failed() {
			out, _ := os.ReadFile(output.Name())
			r.t.Logf("envoy says:\n%s", out[:min(len(out), 4000)])
		}
	})
	for _, port := range r.ports {
		deadline := time.Now().Add(30 * time.Second)
		for {
			c, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port))
			if err == nil {
				c.Close()
				break
			}
			if time.Now().After(deadline) {
				r.t.Fatalf("envoy does not listen: %v", err)
			}
			time.Sleep(20 * time.Millisecond)
		}
	}
}

// trust makes what was taken from the system's roots until now be checked by those in the file.
func (r *rig) trust(roots string) {
	text, err := json.Marshal(r.clusters)
	if err != nil {
		r.t.Fatal(err)
	}
	text = bytes.ReplaceAll(text, []byte("/etc/ssl/certs/ca-certificates.crt"), []byte(roots))
	r.clusters = nil
	if err := json.Unmarshal(text, &r.clusters); err != nil {
		r.t.Fatal(err)
	}
}

// keysOverTLS serves the issuer's keys over HTTPS with a certificate for the names, and returns their URL at localhost.
func keysOverTLS(t *testing.T, root *pki, names []string, of *issuer) string {
	t.Helper()
	cert, key, _ := root.issue(t, &x509.Certificate{DNSNames: names, KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) { fmt.Fprintf(w, `{"keys":[%s]}`, of.jwk()) }))
	s.TLS, s.Config.ErrorLog = &tls.Config{Certificates: []tls.Certificate{pair}}, log.New(io.Discard, "", 0)
	s.StartTLS()
	t.Cleanup(s.Close)
	_, port, _ := net.SplitHostPort(s.Listener.Addr().String())
	return "https://localhost:" + port + "/keys"
}

// rpcAuthorizer answers Envoy's questions over gRPC: it lets requests pass that say so, and connections when told to.
type rpcAuthorizer struct {
	authv3.UnimplementedAuthorizationServer
	connections atomic.Bool
	at          net.Addr
	stop        func()
}

func startRPC(t *testing.T) *rpcAuthorizer {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	a := &rpcAuthorizer{at: l.Addr(), stop: s.Stop}
	authv3.RegisterAuthorizationServer(s, a)
	go s.Serve(l)
	t.Cleanup(s.Stop)
	return a
}

func (a *rpcAuthorizer) Check(_ context.Context, req *authv3.CheckRequest) (*authv3.CheckResponse, error) {
	request := req.GetAttributes().GetRequest().GetHttp()
	if request.GetHeaders()["x-allow"] == "yes" || request == nil && a.connections.Load() {
		return &authv3.CheckResponse{Status: &status.Status{Code: int32(codes.OK)}}, nil
	}
	return &authv3.CheckResponse{Status: &status.Status{Code: int32(codes.PermissionDenied)}}, nil
}

// cluster is where Envoy finds it.
func (a *rpcAuthorizer) cluster() any {
	const name = "outbound|9001||authz.shop.svc.cluster.local"
	return map[string]any{
		"name": name, "type": "STATIC", "connect_timeout": "5s",
		"typed_extension_protocol_options": map[string]any{"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": map[string]any{
			"@type":                "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
			"explicit_http_config": map[string]any{"http2_protocol_options": map[string]any{}},
		}},
		"load_assignment": map[string]any{"cluster_name": name, "endpoints": []any{map[string]any{"lb_endpoints": []any{
			map[string]any{"endpoint": map[string]any{"address": address(a.at.(*net.TCPAddr).Port)}},
		}}}},
	}
}

const policyHead = "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n"

// TestLive asks a real Envoy.
func TestLive(t *testing.T) {
	if testing.Short() {
		t.Skip("starts Envoy")
	}
	r := &rig{t: t, dir: t.TempDir(), ports: map[string]int{}}
	root, rootPEM := newRoot(t)
	write := func(name string, data []byte) string {
		path := filepath.Join(r.dir, name)
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	serverCert, serverKey := root.workload(t, "spiffe://amber.mesh/ns/shop/sa/reviews")
	file := func(path string) any { return map[string]any{"filename": path} }
	mtls := map[string]any{"name": "envoy.transport_sockets.tls", "typed_config": map[string]any{
		"@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext", "require_client_certificate": true,
		"common_tls_context": map[string]any{
			"tls_certificates":   []any{map[string]any{"certificate_chain": file(write("cert.pem", serverCert)), "private_key": file(write("key.pem", serverKey))}},
			"validation_context": map[string]any{"trusted_ca": file(write("root.pem", rootPEM))},
		},
	}}
	iss, other := newIssuer(t), newIssuer(t)
	// What the authorizer is asked; it lets pass who says so.
	authorizer := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if req.Header.Get("x-allow") != "yes" {
			w.Header().Set("x-why", "said no")
			w.WriteHeader(http.StatusForbidden)
		}
	}))
	t.Cleanup(authorizer.Close)
	keys := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) { fmt.Fprintf(w, `{"keys":[%s]}`, other.jwk()) }))
	t.Cleanup(keys.Close)
	echo, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { echo.Close() })
	go func() {
		for {
			c, err := echo.Accept()
			if err != nil {
				return
			}
			go func() { io.Copy(c, c); c.Close() }()
		}
	}()

	r.http("paths", nil, policyHead+`
metadata: {name: allow, namespace: shop}
spec: {rules: [{to: [{operation: {methods: [GET], paths: ["/items/{*}", "/api/{**}/end", "/pre*", "*/suf", "/exact"]}}]}]}
`+policyHead+`
metadata: {name: deny, namespace: shop}
spec: {action: DENY, rules: [{to: [{operation: {paths: ["/prefix/secret"]}}]}, {to: [{operation: {hosts: ["Evil.example.com"]}}]}]}
`)
	r.http("nothing", nil, policyHead+"metadata: {name: nothing, namespace: istio-system}\nspec: {}\n")
	r.http("dry", nil, policyHead+"metadata: {name: dry, namespace: shop, annotations: {istio.io/dry-run: \"true\"}}\nspec: {}\n")
	r.http("peers", mtls, policyHead+`
metadata: {name: peers, namespace: shop}
spec:
  rules:
  - from: [{source: {principals: ["cluster.local/ns/shop/sa/page"]}}]
  - from: [{source: {principals: ["birch.mesh/ns/shop/sa/page"]}}]
    to: [{operation: {paths: ["/from-birch"]}}]
  - from: [{source: {namespaces: [tools]}}]
    to: [{operation: {paths: ["/tools"]}}]
  - from: [{source: {serviceAccounts: [bot]}}]
    when: [{key: "request.headers[x-user]", values: ["a*"]}]
`)
	r.http("tokens", nil, `
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata: {name: jwt, namespace: shop}
spec:
  selector: {matchLabels: {app: reviews}}
  jwtRules:
  - {issuer: "https://issuer.example.com", audiences: [shop], jwks: '`+iss.jwk()+`', outputClaimToHeaders: [{header: x-sub, claim: sub}]}
  - {issuer: other, jwksUri: "`+keys.URL+`", fromHeaders: [{name: x-token, prefix: "Tok "}], fromParams: [tok], fromCookies: [tok]}
  - {issuer: keyless, jwksUri: "", fromHeaders: [{name: x-keyless}]}
`+policyHead+`
metadata: {name: jwt, namespace: shop}
spec:
  rules:
  - to: [{operation: {paths: [/open]}}]
  - from: [{source: {requestPrincipals: ["https://issuer.example.com/*"]}}]
    to: [{operation: {paths: [/signed]}}]
  - from: [{source: {requestPrincipals: ["*/bob"]}}]
    to: [{operation: {paths: [/bob]}}]
  - when: [{key: "request.auth.claims[realm][roles]", values: [admin]}]
    to: [{operation: {paths: [/admin]}}]
  - when: [{key: "request.auth.claims[scope]", values: [write]}, {key: request.auth.audiences, values: [shop]}]
    to: [{operation: {paths: [/write]}}]
`)
	r.http("custom", nil, `
apiVersion: v1
kind: Service
metadata: {name: authz, namespace: shop}
spec: {clusterIP: 10.96.0.9, ports: [{name: http, port: 8000}, {name: grpc, port: 9000}]}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: istio, namespace: istio-system}
data:
  mesh: |
    extensionProviders:
    - {name: web, envoyExtAuthzHttp: {service: authz.shop.svc.cluster.local, port: 8000, includeRequestHeadersInCheck: [x-allow], headersToDownstreamOnDeny: [x-why]}}
`+policyHead+`
metadata: {name: ask, namespace: shop}
spec: {action: CUSTOM, provider: {name: web}, rules: [{to: [{operation: {paths: ["/ask*"]}}]}]}
`+policyHead+`
metadata: {name: lost, namespace: shop}
spec: {action: CUSTOM, provider: {name: nobody}, rules: [{to: [{operation: {paths: ["/lost"]}}]}]}
`)
	const wrong = "rules: [{form: []}]"
	r.http("wrong-allow", nil, policyHead+"metadata: {name: wrong, namespace: shop}\nspec: {"+wrong+"}\n"+policyHead+"metadata: {name: right, namespace: shop}\nspec: {rules: [{to: [{operation: {paths: [/open]}}]}]}\n")
	r.http("wrong-deny", nil, policyHead+"metadata: {name: wrong, namespace: shop}\nspec: {action: DENY, "+wrong+"}\n"+policyHead+"metadata: {name: right, namespace: shop}\nspec: {rules: [{}]}\n")
	r.http("wrong-root", nil, policyHead+"metadata: {name: wrong, namespace: istio-system}\nspec: {action: DENY, "+wrong+"}\n")
	r.http("wrong-elsewhere", nil, policyHead+"metadata: {name: wrong, namespace: shop}\nspec: {selector: {matchLabels: {app: other}}, action: DENY, "+wrong+"}\n")
	const requests = "---\napiVersion: security.istio.io/v1\nkind: RequestAuthentication\n"
	r.http("wrong-tokens", nil, requests+"metadata: {name: wrong, namespace: shop}\nspec: {jwtRules: [{issuer: other, jwks: rubbish}]}\n")
	r.http("wrong-beside", nil, requests+"metadata: {name: wrong, namespace: shop}\nspec: {jwtRules: [{issuer: other, jwks: rubbish}]}\n"+
		requests+"metadata: {name: right, namespace: shop}\nspec: {jwtRules: [{issuer: \"https://issuer.example.com\", jwks: '"+iss.jwk()+"'}]}\n")
	for _, https := range []string{"secure", "impostor"} {
		names := []string{"localhost"}
		if https == "impostor" { // a good certificate, but somebody else's
			names = []string{"elsewhere.example.com"}
		}
		r.http(https, nil, requests+"metadata: {name: jwt, namespace: shop}\nspec: {jwtRules: [{issuer: other, jwksUri: \""+keysOverTLS(t, root, names, other)+"\"}]}\n")
	}
	r.trust(write("root.pem", rootPEM))
	const askRPC = `
apiVersion: v1
kind: Service
metadata: {name: authz, namespace: shop}
spec: {clusterIP: 10.96.0.9, ports: [{name: grpc, port: 9001}]}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: istio, namespace: istio-system}
data:
  mesh: |
    extensionProviders:
    - {name: rpc, envoyExtAuthzGrpc: {service: authz.shop.svc.cluster.local, port: 9001, timeout: 5s}}
`
	r.http("rpc", nil, askRPC+policyHead+`
metadata: {name: ask, namespace: shop}
spec: {action: CUSTOM, provider: {name: rpc}, rules: [{to: [{operation: {paths: ["/ask*"]}}]}]}
`)
	r.tcp("tcp-rpc", nil, askRPC+policyHead+`
metadata: {name: ask, namespace: shop}
spec: {action: CUSTOM, provider: {name: rpc}, rules: [{}]}
`)
	rpc := startRPC(t)
	r.clusters = append(r.clusters, rpc.cluster())
	r.tcp("tcp-allow-http", nil, policyHead+"metadata: {name: a, namespace: shop}\nspec: {rules: [{to: [{operation: {methods: [GET]}}]}]}\n")
	r.tcp("tcp-deny-http", nil, policyHead+"metadata: {name: a, namespace: shop}\nspec: {action: DENY, rules: [{to: [{operation: {methods: [GET], ports: [\"9\"]}}]}]}\n")
	r.tcp("tcp-deny-all", nil, policyHead+"metadata: {name: a, namespace: shop}\nspec: {action: DENY, rules: [{to: [{operation: {methods: [GET]}}]}]}\n")
	r.tcp("tcp-peer", mtls, policyHead+"metadata: {name: a, namespace: shop}\nspec: {rules: [{from: [{source: {principals: [\"cluster.local/ns/shop/sa/page\"]}}]}]}\n")
	r.start(t.Context(), authorizer.Listener.Addr().String(), echo.Addr().String())

	client := func(id string) *http.Client {
		tr := &http.Transport{DisableKeepAlives: true}
		if id != "" {
			cert, key := root.workload(t, id)
			pair, err := tls.X509KeyPair(cert, key)
			if err != nil {
				t.Fatal(err)
			}
			tr.TLSClientConfig = &tls.Config{Certificates: []tls.Certificate{pair}, InsecureSkipVerify: true}
		}
		return &http.Client{Transport: tr, Timeout: 20 * time.Second}
	}
	ask := func(name, id, method, target string, headers ...string) (int, http.Header) {
		t.Helper()
		scheme := "http"
		if id != "" {
			scheme = "https"
		}
		req, err := http.NewRequest(method, fmt.Sprintf("%s://127.0.0.1:%d%s", scheme, r.ports[name], target), nil)
		if err != nil {
			t.Fatal(err)
		}
		for i := 0; i+1 < len(headers); i += 2 {
			if headers[i] == "host" {
				req.Host = headers[i+1]
			}
			req.Header.Set(headers[i], headers[i+1])
		}
		resp, err := client(id).Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		io.Copy(io.Discard, resp.Body)
		return resp.StatusCode, resp.Header
	}
	page, birch := "spiffe://amber.mesh/ns/shop/sa/page", "spiffe://birch.mesh/ns/shop/sa/page"
	good := iss.token(t, map[string]any{"iss": "https://issuer.example.com", "sub": "bob", "aud": []string{"shop", "x"}, "realm": map[string]any{"roles": []string{"admin"}}, "scope": "read write"})
	plain := iss.token(t, map[string]any{"iss": "https://issuer.example.com", "sub": "eve", "aud": "shop"})
	foreign := other.token(t, map[string]any{"iss": "other", "sub": "bob"})
	stale := iss.token(t, map[string]any{"iss": "https://issuer.example.com", "sub": "bob", "aud": "shop", "exp": time.Now().Add(-time.Hour).Unix()})
	wrongAudience := iss.token(t, map[string]any{"iss": "https://issuer.example.com", "sub": "bob", "aud": "bank"})
	forged := other.token(t, map[string]any{"iss": "https://issuer.example.com", "sub": "bob", "aud": "shop"})
	keyless := other.token(t, map[string]any{"iss": "keyless", "sub": "bob"})
	// Keys behind a URL come after the listener is there.
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		if code, _ := ask("tokens", "", "GET", "/bob", "x-token", "Tok "+foreign); code == 200 {
			break
		} else if time.Now().After(deadline) {
			t.Fatalf("keys behind a URL: %d", code)
		}
	}
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		if code, _ := ask("secure", "", "GET", "/", "authorization", "Bearer "+foreign); code == 200 {
			break
		} else if time.Now().After(deadline) {
			t.Fatalf("keys behind a URL over TLS: %d", code)
		}
	}
	for _, c := range []struct {
		name, id, method, target string
		headers                  []string
		want                     int
		details                  string
	}{
		{"paths", "", "GET", "/items/1", nil, 200, ""},
		{"paths", "", "GET", "/items/1?q=/x", nil, 200, ""},
		{"paths", "", "GET", "/items/1/2", nil, 403, "rbac_access_denied_matched_policy[none]"},
		{"paths", "", "GET", "/api/a/b/end", nil, 200, ""},
		{"paths", "", "GET", "/prefix/x", nil, 200, ""},
		{"paths", "", "GET", "/a/b/suf", nil, 200, ""},
		{"paths", "", "GET", "/exact", nil, 200, ""},
		{"paths", "", "GET", "/exact/", nil, 403, ""},
		{"paths", "", "POST", "/exact", nil, 403, ""},
		{"paths", "", "GET", "/prefix/secret", nil, 403, "rbac_access_denied_matched_policy[ns[shop]-policy[deny]-rule[0]]"},
		{"paths", "", "GET", "/prefix/x/../secret", nil, 403, ""},
		{"paths", "", "GET", "/exact", []string{"host", "evil.EXAMPLE.com"}, 403, "rbac_access_denied_matched_policy[ns[shop]-policy[deny]-rule[1]]"},
		{"nothing", "", "GET", "/", nil, 403, ""},
		{"dry", "", "GET", "/", nil, 200, ""},
		{"peers", page, "GET", "/", nil, 200, ""},
		{"peers", birch, "GET", "/", nil, 403, ""},
		{"peers", birch, "GET", "/from-birch", nil, 200, ""},
		{"peers", "spiffe://cedar.mesh/ns/shop/sa/page", "GET", "/from-birch", nil, 403, ""},
		{"peers", "spiffe://birch.mesh/ns/tools/sa/x", "GET", "/tools", nil, 200, ""},
		{"peers", "spiffe://amber.mesh/ns/toolsx/sa/x", "GET", "/tools", nil, 403, ""},
		{"peers", "spiffe://amber.mesh/ns/shop/sa/bot", "GET", "/", []string{"x-user", "alice"}, 200, ""},
		{"peers", "spiffe://amber.mesh/ns/shop/sa/bot", "GET", "/", []string{"x-user", "bob"}, 403, ""},
		{"peers", "spiffe://amber.mesh/ns/other/sa/bot", "GET", "/", []string{"x-user", "alice"}, 403, ""},
		{"tokens", "", "GET", "/open", nil, 200, ""},
		{"tokens", "", "GET", "/signed", nil, 403, ""},
		{"tokens", "", "GET", "/signed", []string{"authorization", "Bearer " + good}, 200, ""},
		{"tokens", "", "GET", "/signed", []string{"x-token", "Tok " + foreign}, 403, ""},
		{"tokens", "", "GET", "/bob?tok=" + foreign, nil, 200, ""},
		{"tokens", "", "GET", "/bob", []string{"cookie", "tok=" + foreign}, 200, ""},
		{"tokens", "", "GET", "/open", []string{"authorization", "Bearer " + stale}, 401, ""},
		{"tokens", "", "GET", "/open", []string{"authorization", "Bearer " + wrongAudience}, 403, ""},
		{"tokens", "", "GET", "/open", []string{"authorization", "Bearer " + forged}, 401, ""},
		{"tokens", "", "GET", "/open", []string{"authorization", "Bearer rubbish"}, 401, ""},
		{"tokens", "", "GET", "/open", []string{"x-keyless", keyless}, 401, ""},
		{"tokens", "", "GET", "/admin", []string{"authorization", "Bearer " + good}, 200, ""},
		{"tokens", "", "GET", "/admin", []string{"authorization", "Bearer " + plain}, 403, ""},
		{"tokens", "", "GET", "/write", []string{"authorization", "Bearer " + good}, 200, ""},
		{"tokens", "", "GET", "/write", []string{"authorization", "Bearer " + plain}, 403, ""},
		{"custom", "", "GET", "/free", nil, 200, ""},
		{"custom", "", "GET", "/ask", nil, 403, "ext_authz_denied"},
		{"custom", "", "GET", "/ask", []string{"x-allow", "yes"}, 200, ""},
		{"custom", "", "GET", "/lost", []string{"x-allow", "yes"}, 403, ""},
		{"rpc", "", "GET", "/free", nil, 200, ""},
		{"rpc", "", "GET", "/ask", nil, 403, "ext_authz_denied"},
		{"rpc", "", "GET", "/ask", []string{"x-allow", "yes"}, 200, ""},
		{"secure", "", "GET", "/", []string{"authorization", "Bearer " + keyless}, 401, ""},
		{"secure", "", "GET", "/", nil, 200, ""},
		{"impostor", "", "GET", "/", []string{"authorization", "Bearer " + foreign}, 401, ""},
		{"wrong-allow", "", "GET", "/", nil, 403, ""},
		{"wrong-allow", "", "GET", "/open", nil, 200, ""},
		{"wrong-deny", "", "GET", "/", nil, 403, ""},
		{"wrong-root", "", "GET", "/", nil, 403, ""},
		{"wrong-elsewhere", "", "GET", "/", nil, 200, ""},
		{"wrong-tokens", "", "GET", "/", nil, 200, ""},
		{"wrong-tokens", "", "GET", "/", []string{"authorization", "Bearer " + foreign}, 401, ""},
		{"wrong-beside", "", "GET", "/", []string{"authorization", "Bearer " + foreign}, 401, ""},
		{"wrong-beside", "", "GET", "/", []string{"authorization", "Bearer " + good}, 200, ""},
	} {
		code, h := ask(c.name, c.id, c.method, c.target, c.headers...)
		if code != c.want || c.details != "" && h.Get("x-details") != c.details {
			t.Errorf("%s %s %s %s %.40q: got %d %s, want %d %s", c.name, c.id, c.method, c.target, c.headers, code, h.Get("x-details"), c.want, c.details)
		}
	}

	// passes says whether bytes come back.
	passes := func(name, id string) bool {
		var c net.Conn
		var err error
		at := fmt.Sprintf("127.0.0.1:%d", r.ports[name])
		if id == "" {
			c, err = net.Dial("tcp", at)
		} else {
			cert, key := root.workload(t, id)
			pair, bad := tls.X509KeyPair(cert, key)
			if bad != nil {
				t.Fatal(bad)
			}
			c, err = tls.Dial("tcp", at, &tls.Config{Certificates: []tls.Certificate{pair}, InsecureSkipVerify: true})
		}
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(20 * time.Second))
		fmt.Fprintln(c, "hello")
		line, _ := bufio.NewReader(c).ReadString('\n')
		return strings.TrimSpace(line) == "hello"
	}
	for _, c := range []struct {
		name, id string
		want     bool
	}{
		{"tcp-rpc", "", false}, {"tcp-allow-http", "", false}, {"tcp-deny-http", "", true}, {"tcp-deny-all", "", false}, {"tcp-peer", page, true}, {"tcp-peer", birch, false},
	} {
		if got := passes(c.name, c.id); got != c.want {
			t.Errorf("%s %s: passes %v, want %v", c.name, c.id, got, c.want)
		}
	}
	rpc.connections.Store(true)
	if !passes("tcp-rpc", "") {
		t.Error("a connection that the authorizer allows is closed")
	}
	rpc.stop()
	if code, _ := ask("rpc", "", "GET", "/ask", "x-allow", "yes"); code != 403 {
		t.Errorf("with an authorizer that is away: %d, want 403", code)
	}
	if passes("tcp-rpc", "") {
		t.Error("with an authorizer that is away the connection passes")
	}
}
