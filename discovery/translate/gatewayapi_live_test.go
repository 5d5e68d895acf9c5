package translate_test

import (
	"bufio"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"

	"github.com/isthmus-mesh/isthmus/discovery/translate"
	"github.com/isthmus-mesh/isthmus/internal/envoytest"
)

// TestEnvoyGatewayAPI has one Envoy serve a Gateway with every kind of route, written as YAML.
func TestEnvoyGatewayAPI(t *testing.T) {
	envoytest.Path(t)
	ca := newAuthority(t)
	var mirrored, failed atomic.Int64
	serve := func(name string, tlsConfig *tls.Config) uint32 {
		l := listen(t)
		port := uint32(l.Addr().(*net.TCPAddr).Port)
		s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if name == "copy" {
				mirrored.Add(1)
			}
			if code := r.Header.Get("x-fail"); code != "" {
				failed.Add(1)
				n, _ := strconv.Atoi(code)
				w.WriteHeader(n)
				return
			}
			w.Header().Set("x-gone", "1")
			fmt.Fprintf(w, "%s %s %s %s", name, r.Host, r.URL.Path, r.Header.Get("x-added"))
		})}
		if tlsConfig != nil {
			go s.Serve(tls.NewListener(l, tlsConfig))
		} else {
			go s.Serve(l)
		}
		t.Cleanup(func() { s.Close() })
		return port
	}
	pair := func(name string, serial int64) (tls.Certificate, string) {
		cert, key := ca.named(t, name, serial)
		p, err := tls.X509KeyPair(cert, key)
		if err != nil {
			t.Fatal(err)
		}
		b64 := base64.StdEncoding.EncodeToString
		return p, fmt.Sprintf("apiVersion: v1\nkind: Secret\nmetadata: {name: %s, namespace: shop}\ntype: kubernetes.io/tls\ndata: {tls.crt: %s, tls.key: %s}\n---\n", strings.ReplaceAll(name, ".", "-"), b64(cert), b64(key))
	}
	own, _ := pair("own.example.com", 90)
	_, one := pair("one.example.com", 1)
	_, two := pair("two.example.com", 2)
	service := func(name string, number int, protocol string, port uint32) string {
		return fmt.Sprintf("apiVersion: v1\nkind: Service\nmetadata: {name: %[1]s, namespace: shop}\nspec: {clusterIP: 10.96.0.%[2]d, ports: [{name: %[3]s, port: 80}]}\n---\n"+
			"apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: %[1]s-x, namespace: shop, labels: {kubernetes.io/service-name: %[1]s}}\naddressType: IPv4\nports: [{name: %[3]s, port: %[4]d}]\nendpoints: [{addresses: [127.0.0.1]}]\n---\n",
			name, number, protocol, port)
	}
	secured := &tls.Config{Certificates: []tls.Certificate{own}, NextProtos: []string{"http/1.1"}}
	plain, secure, raw := freePort(t), freePort(t), freePort(t)
	yaml := one + two + service("a", 1, "http", serve("a", nil)) + service("b", 2, "http", serve("b", nil)) + service("copy", 3, "http", serve("copy", nil)) +
		service("own", 4, "tls", serve("own", secured)) + service("verified", 5, "http", serve("verified", secured)) + service("unverified", 6, "http", serve("unverified", secured)) +
		"apiVersion: v1\nkind: ConfigMap\nmetadata: {name: roots, namespace: shop}\ndata:\n  ca.crt: |\n    " + strings.ReplaceAll(strings.TrimSpace(string(ca.pem)), "\n", "\n    ") + "\n---\n" +
		fmt.Sprintf(gatewayAPILive, plain, secure, raw)
	snap, problems := fromYAML(t, yaml, nil)
	for _, p := range problems {
		if p.Reason != "BackendNotFound" { // asked for
			t.Errorf("problem: %s", p)
		}
	}
	proxy := proxyNamed(t, "router-shop-gw", "gateway.networking.k8s.io/gateway-name=web")
	r, _ := translate.Translate(snap, proxy)
	for _, l := range r.Listeners {
		l.Address.GetSocketAddress().Address = "127.0.0.1"
	}
	cp := &changing{}
	cp.put(t, r)
	l := listen(t)
	g := grpc.NewServer()
	discoveryv3.RegisterAggregatedDiscoveryServiceServer(g, cp)
	go g.Serve(l)
	t.Cleanup(g.Stop)
	startEnvoy(t, l.Addr().String())

	pool := x509.NewCertPool()
	pool.AddCert(ca.cert)
	do := func(port uint32, sni, method, path string, header http.Header) (*http.Response, string, error) {
		var c net.Conn
		var err error
		at := fmt.Sprintf("127.0.0.1:%d", port)
		if port == secure {
			c, err = tls.DialWithDialer(&net.Dialer{Timeout: 10 * time.Second}, "tcp", at, &tls.Config{ServerName: sni, RootCAs: pool, NextProtos: []string{"http/1.1"}})
		} else {
			c, err = net.DialTimeout("tcp", at, 10*time.Second)
		}
		if err != nil {
			return nil, "", err
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(20 * time.Second))
		req, err := http.NewRequest(method, "http://"+sni+path, nil)
		if err != nil {
			return nil, "", err
		}
		for k, v := range header {
			req.Header[k] = v
		}
		req.Close = true
		if err := req.Write(c); err != nil {
			return nil, "", err
		}
		resp, err := http.ReadResponse(bufio.NewReader(c), req)
		if err != nil {
			return nil, "", err
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		return resp, string(body), err
	}
	eventually(t, "first answer", func() error {
		resp, _, err := do(plain, "one.example.com", http.MethodGet, "/", nil)
		if err == nil && resp.StatusCode != 200 {
			err = fmt.Errorf("status %d", resp.StatusCode)
		}
		return err
	})
	for _, c := range []struct {
		name, sni, method, path string
		port                    uint32
		status                  int
		body                    string
	}{
		{"the rest", "one.example.com", "GET", "/x", plain, 200, "a one.example.com /x "},
		{"an exact path before a prefix", "one.example.com", "GET", "/p/exact", plain, 200, "b one.example.com /p/exact "},
		{"a longer prefix", "one.example.com", "GET", "/p/longer/x", plain, 200, "b one.example.com /p/longer/x "},
		{"a prefix ends at a slash", "one.example.com", "GET", "/p/longerx", plain, 200, "a one.example.com /p/longerx "},
		{"a method", "one.example.com", "PUT", "/x", plain, 200, "b one.example.com /x "},
		{"a prefix is replaced", "one.example.com", "GET", "/old/x", plain, 200, "a new.example.com /new/x added"},
		{"a prefix is replaced by nothing", "one.example.com", "GET", "/strip/x", plain, 200, "a one.example.com /x "},
		{"and what is left is a path", "one.example.com", "GET", "/strip", plain, 200, "a one.example.com / "},
		{"a redirect", "one.example.com", "GET", "/moved/x", plain, 301, ""},
		{"a destination that is not there", "one.example.com", "GET", "/none", plain, 500, ""},
		{"another host", "unknown.example.org", "GET", "/", plain, 404, ""},
		{"a certificate by server name", "one.example.com", "GET", "/x", secure, 200, "a one.example.com /x "},
		{"another one", "two.example.com", "GET", "/x", secure, 200, "b two.example.com /x "},
		{"TLS that is passed on", "own.example.com", "GET", "/x", secure, 200, "own own.example.com /x "},
		{"a connection that is passed on", "any", "GET", "/x", raw, 200, "b any /x "},
		{"a backend that is verified", "one.example.com", "GET", "/verified", plain, 200, "verified one.example.com /verified "},
		{"a backend that has another name", "one.example.com", "GET", "/unverified", plain, 503, ""},
	} {
		resp, body, err := do(c.port, c.sni, c.method, c.path, nil)
		if err != nil || resp.StatusCode != c.status || !strings.Contains(body, c.body) {
			t.Errorf("%s: %v %q %v, want %d %q", c.name, resp, body, err, c.status, c.body)
		}
		if c.status == 301 && resp != nil && resp.Header.Get("Location") != fmt.Sprintf("https://one.example.com:%d/here/x", 443) {
			t.Errorf("redirect to %s", resp.Header.Get("Location"))
		}
		if c.path == "/old/x" && resp != nil && (resp.Header.Get("X-Gone") != "" || resp.Header.Get("X-Came") != "1") {
			t.Errorf("headers of the answer: %v", resp.Header)
		}
	}
	count := map[string]int{}
	const n = 400
	for range n {
		resp, body, err := do(plain, "one.example.com", http.MethodGet, "/weights", nil)
		if err != nil {
			t.Fatal(err)
		}
		count[fmt.Sprintf("%d %s", resp.StatusCode, strings.SplitN(body, " ", 2)[0])]++
	}
	if a, b, bad := count["200 a"], count["200 b"], count["500 "]; a < n/2-60 || a > n/2+60 || b < n/4-60 || b > n/4+60 || a+b+bad != n {
		t.Errorf("of %d requests for 2:1:1 shares, the last of which leads nowhere: %v", n, count)
	}
	for code, want := range map[int]int64{500: 3, 503: 1} {
		failed.Store(0)
		resp, _, err := do(plain, "one.example.com", http.MethodGet, "/retry", http.Header{"X-Fail": {strconv.Itoa(code)}})
		if err != nil || resp.StatusCode != code || failed.Load() != want {
			t.Errorf("a rule that tries twice more on 500 alone: %v %v, %d attempts for %d, want %d", resp, err, failed.Load(), code, want)
		}
	}
	before := mirrored.Load()
	if resp, _, err := do(plain, "one.example.com", http.MethodGet, "/mirror", nil); err != nil || resp.StatusCode != 200 {
		t.Errorf("mirrored request: %v %v", resp, err)
	}
	eventually(t, "the copy", func() error {
		if mirrored.Load() == before {
			return fmt.Errorf("no copy came")
		}
		return nil
	})
	cp.mu.Lock()
	defer cp.mu.Unlock()
	if len(cp.nacks) > 0 {
		t.Errorf("envoy refused: %v", cp.nacks)
	}
}

const gatewayAPILive = `
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: web, namespace: shop}
spec:
  gatewayClassName: isthmus
  listeners:
  - {name: http, port: %[1]d, protocol: HTTP}
  - {name: one, port: %[2]d, protocol: HTTPS, hostname: one.example.com, tls: {certificateRefs: [{name: one-example-com}]}}
  - {name: two, port: %[2]d, protocol: HTTPS, hostname: two.example.com, tls: {certificateRefs: [{name: two-example-com}]}}
  - {name: pass, port: %[2]d, protocol: TLS, hostname: own.example.com, tls: {mode: Passthrough}}
  - {name: tcp, port: %[3]d, protocol: TCP}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: one, namespace: shop}
spec:
  parentRefs: [{name: web, sectionName: http}, {name: web, sectionName: one}]
  hostnames: [one.example.com]
  rules:
  - {backendRefs: [{name: a, port: 80}]}
  - {matches: [{path: {value: /p}}], backendRefs: [{name: a, port: 80}]}
  - {matches: [{path: {value: /p/longer}}, {path: {type: Exact, value: /p/exact}}, {method: PUT}], backendRefs: [{name: b, port: 80}]}
  - matches: [{path: {value: /old}}]
    filters:
    - {type: URLRewrite, urlRewrite: {hostname: new.example.com, path: {type: ReplacePrefixMatch, replacePrefixMatch: /new}}}
    - {type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: x-added, value: added}]}}
    - {type: ResponseHeaderModifier, responseHeaderModifier: {set: [{name: x-came, value: "1"}], remove: [x-gone]}}
    backendRefs: [{name: a, port: 80}]
  - matches: [{path: {value: /strip}}]
    filters: [{type: URLRewrite, urlRewrite: {path: {type: ReplacePrefixMatch, replacePrefixMatch: /}}}]
    backendRefs: [{name: a, port: 80}]
  - matches: [{path: {value: /moved}}]
    filters: [{type: RequestRedirect, requestRedirect: {scheme: https, statusCode: 301, path: {type: ReplacePrefixMatch, replacePrefixMatch: /here}}}]
  - {matches: [{path: {value: /retry}}], retry: {attempts: 2, codes: [500]}, backendRefs: [{name: a, port: 80}]}
  - {matches: [{path: {value: /none}}], backendRefs: [{name: none, port: 80}]}
  - {matches: [{path: {value: /weights}}], backendRefs: [{name: a, port: 80, weight: 2}, {name: b, port: 80, weight: 1}, {name: none, port: 80, weight: 1}]}
  - matches: [{path: {value: /mirror}}]
    filters: [{type: RequestMirror, requestMirror: {backendRef: {name: copy, port: 80}}}]
    backendRefs: [{name: a, port: 80}]
  - {matches: [{path: {value: /verified}}], backendRefs: [{name: verified, port: 80}]}
  - {matches: [{path: {value: /unverified}}], backendRefs: [{name: unverified, port: 80}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: two, namespace: shop}
spec:
  parentRefs: [{name: web, sectionName: two}]
  rules: [{backendRefs: [{name: b, port: 80}]}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: TLSRoute
metadata: {name: own, namespace: shop}
spec:
  parentRefs: [{name: web, sectionName: pass}]
  hostnames: [own.example.com]
  rules: [{backendRefs: [{name: own, port: 80}]}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: TCPRoute
metadata: {name: raw, namespace: shop}
spec:
  parentRefs: [{name: web, sectionName: tcp}]
  rules: [{backendRefs: [{name: b, port: 80}]}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: BackendTLSPolicy
metadata: {name: verified, namespace: shop}
spec:
  targetRefs: [{group: "", kind: Service, name: verified}]
  validation: {hostname: own.example.com, caCertificateRefs: [{group: "", kind: ConfigMap, name: roots}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: BackendTLSPolicy
metadata: {name: unverified, namespace: shop}
spec:
  targetRefs: [{group: "", kind: Service, name: unverified}]
  validation: {hostname: other.example.com, caCertificateRefs: [{group: "", kind: ConfigMap, name: roots}]}
`
