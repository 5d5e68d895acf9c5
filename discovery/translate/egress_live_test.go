package translate_test

import (
	"bufio"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/translate"
	"github.com/isthmus-mesh/isthmus/internal/envoytest"
)

// tap stands between two proxies: it passes connections on, and keeps the server name of each that is TLS.
type tap struct {
	net.Listener
	mu    sync.Mutex
	names []string // "" for what is not TLS
}

func startTap(t *testing.T, to uint32) *tap {
	t.Helper()
	p := &tap{Listener: listen(t)}
	go func() {
		for {
			c, err := p.Accept()
			if err != nil {
				return
			}
			go p.pass(c, to)
		}
	}()
	return p
}

func (p *tap) pass(c net.Conn, to uint32) {
	defer c.Close()
	up, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", to))
	if err != nil {
		return
	}
	defer up.Close()
	first := make([]byte, 16<<10)
	n, err := c.Read(first)
	if err != nil {
		return
	}
	p.mu.Lock()
	p.names = append(p.names, serverNameOf(first[:n]))
	p.mu.Unlock()
	if _, err := up.Write(first[:n]); err != nil {
		return
	}
	go func() { io.Copy(up, c); up.Close() }()
	io.Copy(c, up)
}

// seen returns how many connections asked for the name.
func (p *tap) seen(name string) (n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, x := range p.names {
		if x == name {
			n++
		}
	}
	return n
}

// serverNameOf reads the first bytes of a client as TLS does.
func serverNameOf(hello []byte) (name string) {
	a, b := net.Pipe()
	defer a.Close()
	go func() { a.Write(hello); io.Copy(io.Discard, a) }()
	stop := errors.New("read")
	tls.Server(b, &tls.Config{GetConfigForClient: func(h *tls.ClientHelloInfo) (*tls.Config, error) {
		name = h.ServerName
		return nil, stop
	}}).Handshake()
	b.Close()
	return name
}

// outside is a server outside of the mesh, over HTTP or HTTPS.
type outside struct {
	port  uint32
	mu    sync.Mutex
	calls []string // SNI, Host and path of each request
}

func startOutside(t *testing.T, ca *authority, names ...string) *outside {
	t.Helper()
	o := &outside{}
	l := listen(t)
	o.port = uint32(l.Addr().(*net.TCPAddr).Port)
	s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		sni := "plain"
		if r.TLS != nil {
			sni = r.TLS.ServerName
		}
		o.mu.Lock()
		o.calls = append(o.calls, sni+" "+r.Host+r.URL.Path+" "+strings.Join(r.Header.Values("x-hop"), ","))
		o.mu.Unlock()
		io.WriteString(w, "outside")
	})}
	if len(names) > 0 {
		var config tls.Config
		s.ErrorLog = log.New(io.Discard, "", 0)
		for i, n := range names {
			cert, key := ca.named(t, n, int64(100+i))
			pair, err := tls.X509KeyPair(cert, key)
			if err != nil {
				t.Fatal(err)
			}
			config.Certificates = append(config.Certificates, pair)
		}
		go s.Serve(tls.NewListener(l, &config))
	} else {
		go s.Serve(l)
	}
	t.Cleanup(func() { s.Close() })
	return o
}

func (o *outside) count(call string) (n int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, c := range o.calls {
		if c == call {
			n++
		}
	}
	return n
}

const egressRules = `apiVersion: v1
kind: Service
metadata: {name: istio-egressgateway, namespace: istio-system}
spec: {clusterIP: 10.96.0.30, ports: [{name: https, port: 80, targetPort: 8080}, {name: tls, port: 443, targetPort: 8443}]}
---
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {name: egress, namespace: a}
spec:
  selector: {istio: egressgateway}
  servers:
  - {port: {number: 80, name: https-web, protocol: HTTPS}, hosts: [web.example.com], tls: {mode: ISTIO_MUTUAL}}
  - {port: {number: 80, name: https-orig, protocol: HTTPS}, hosts: [orig.example.com], tls: {mode: ISTIO_MUTUAL}}
  - {port: {number: 443, name: tls-pass, protocol: TLS}, hosts: [pass.example.com], tls: {mode: PASSTHROUGH}}
  - {port: {number: 443, name: tls-wild, protocol: TLS}, hosts: ["*.out.localhost"], tls: {mode: PASSTHROUGH}}
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: egress, namespace: a}
spec:
  host: istio-egressgateway.istio-system.svc.cluster.local
  subsets:
  - {name: web, trafficPolicy: {portLevelSettings: [{port: {number: 80}, tls: {mode: ISTIO_MUTUAL, sni: web.example.com}}]}}
  - {name: orig, trafficPolicy: {portLevelSettings: [{port: {number: 80}, tls: {mode: ISTIO_MUTUAL, sni: orig.example.com}}]}}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: web, namespace: a}
spec:
  hosts: [web.example.com]
  location: MESH_EXTERNAL
  resolution: STATIC
  ports: [{name: http, number: 80, protocol: HTTP}]
  endpoints: [{address: 127.0.0.1, ports: {http: PLAIN}}]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: web, namespace: a}
spec:
  hosts: [web.example.com]
  gateways: [mesh, egress]
  http:
  - match: [{gateways: [mesh], port: 80}]
    headers: {request: {add: {x-hop: sidecar}}}
    route: [{destination: {host: istio-egressgateway.istio-system.svc.cluster.local, subset: web, port: {number: 80}}}]
  - match: [{gateways: [egress], port: 80}]
    headers: {request: {add: {x-hop: gateway}}}
    route: [{destination: {host: web.example.com, port: {number: 80}}}]
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: orig, namespace: a}
spec:
  hosts: [orig.example.com]
  location: MESH_EXTERNAL
  resolution: STATIC
  ports: [{name: http, number: 80, protocol: HTTP}, {name: https, number: 443, protocol: HTTPS}]
  endpoints: [{address: 127.0.0.1, ports: {http: PLAIN, https: SECURE}}]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: orig, namespace: a}
spec:
  hosts: [orig.example.com]
  gateways: [mesh, egress]
  http:
  - match: [{gateways: [mesh], port: 80}]
    route: [{destination: {host: istio-egressgateway.istio-system.svc.cluster.local, subset: orig, port: {number: 80}}}]
  - match: [{gateways: [egress], port: 80}]
    route: [{destination: {host: orig.example.com, port: {number: 443}}}]
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: orig, namespace: a}
spec: {host: orig.example.com, trafficPolicy: {portLevelSettings: [{port: {number: 443}, tls: {mode: SIMPLE, caCertificates: CAFILE}}]}}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: pass, namespace: a}
spec:
  hosts: [pass.example.com]
  location: MESH_EXTERNAL
  resolution: STATIC
  ports: [{name: tls, number: 443, protocol: TLS}]
  endpoints: [{address: 127.0.0.1, ports: {tls: SECURE}}]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: pass, namespace: a}
spec:
  hosts: [pass.example.com]
  gateways: [mesh, egress]
  tls:
  - match: [{gateways: [mesh], port: 443, sniHosts: [pass.example.com]}]
    route: [{destination: {host: istio-egressgateway.istio-system.svc.cluster.local, port: {number: 443}}}]
  - match: [{gateways: [egress], port: 443, sniHosts: [pass.example.com]}]
    route: [{destination: {host: pass.example.com, port: {number: 443}}}]
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: direct, namespace: a}
spec:
  hosts: ["*.direct.localhost"]
  location: MESH_EXTERNAL
  resolution: DYNAMIC_DNS
  ports: [{name: http, number: PLAIN, protocol: HTTP}, {name: tls, number: SECURE, protocol: TLS}]
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: checked, namespace: a}
spec:
  hosts: ["*.checked.localhost"]
  location: MESH_EXTERNAL
  resolution: DYNAMIC_DNS
  ports: [{name: http, number: CHECKED, protocol: HTTP}]
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: checked, namespace: a}
spec: {host: "*.checked.localhost", trafficPolicy: {tls: {mode: SIMPLE, caCertificates: CAFILE}}}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: out, namespace: a}
spec:
  hosts: ["*.out.localhost"]
  location: MESH_EXTERNAL
  resolution: DYNAMIC_DNS
  ports: [{name: tls, number: SECURE, protocol: TLS}]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: out, namespace: a}
spec:
  hosts: ["*.out.localhost"]
  gateways: [mesh, egress]
  tls:
  - match: [{gateways: [mesh], port: SECURE, sniHosts: ["*.out.localhost"]}]
    route: [{destination: {host: istio-egressgateway.istio-system.svc.cluster.local, port: {number: 443}}}]
  - match: [{gateways: [egress], port: 443, sniHosts: ["*.out.localhost"]}]
    route: [{destination: {host: "*.out.localhost", port: {number: SECURE}}}]
`

// TestEnvoyEgress leads requests from one real Envoy through another to servers outside, counted at each hop: HTTP and
// TLS that the gateway originates under mutual TLS of the mesh, TLS that is passed on, and wildcard hosts by their names.
func TestEnvoyEgress(t *testing.T) {
	envoytest.Path(t)
	amber, ca := newAuthority(t), newAuthority(t)
	caFile := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(caFile, ca.pem, 0o600); err != nil {
		t.Fatal(err)
	}
	plain := startOutside(t, nil)
	secure := startOutside(t, ca, "orig.example.com", "pass.example.com", "a.out.localhost", "a.direct.localhost")
	checked := startOutside(t, ca, "a.checked.localhost")
	yaml := strings.NewReplacer("PLAIN", fmt.Sprint(plain.port), "SECURE", fmt.Sprint(secure.port), "CAFILE", caFile, "CHECKED", fmt.Sprint(checked.port)).Replace(egressRules)
	snap, problems := fromYAML(t, yaml, nil)
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	snap.Local.Roots = amber.pem

	// The gateway, and what stands before its two ports.
	gwMutual, gwPass := freePort(t), freePort(t)
	mutual, pass := startTap(t, gwMutual), startTap(t, gwPass)
	gateway := snap.Service("istio-egressgateway.istio-system.svc.cluster.local")
	const gatewayID, clientID = "spiffe://amber.mesh/ns/istio-system/sa/egress", "spiffe://amber.mesh/ns/a/sa/client"
	gateway.Endpoints = []*mesh.Endpoint{{
		Workload: "egress", Namespace: "istio-system", Cluster: "amber", Network: "net-a", Address: "127.0.0.1", Ready: true, Identity: gatewayID, // as pods of gateways are: they serve mesh TLS only where a Gateway says so
		Ports: map[uint32]uint32{80: uint32(mutual.Addr().(*net.TCPAddr).Port), 443: uint32(pass.Addr().(*net.TCPAddr).Port)},
	}}
	router := proxyNamed(t, "router-istio-system-egress", "istio=egressgateway")
	start := func(p *mesh.Proxy, id string, ports map[string]uint32) *controlPlane {
		r, problems := translate.Translate(snap, p)
		if len(problems) > 0 {
			t.Fatal(problems)
		}
		cert, key := amber.issue(t, id)
		r = bindAt(r, ports)
		if len(r.Listeners) < len(ports) {
			t.Fatalf("%d listeners, want %v", len(r.Listeners), ports)
		}
		cp, addr := serve(t, r, certificateSecret(cert, key))
		startEnvoy(t, addr)
		return cp
	}
	gw := start(router, gatewayID, map[string]uint32{"0.0.0.0_80": gwMutual, "0.0.0.0_443": gwPass})
	web, tls443, wildHTTP, wildTLS, wildChecked := freePort(t), freePort(t), freePort(t), freePort(t), freePort(t)
	sidecar := start(proxyNamed(t, "sidecar-a-client", ""), clientID, map[string]uint32{
		"0.0.0.0_80": web, "0.0.0.0_443": tls443, fmt.Sprintf("0.0.0.0_%d", plain.port): wildHTTP, fmt.Sprintf("0.0.0.0_%d", secure.port): wildTLS, fmt.Sprintf("0.0.0.0_%d", checked.port): wildChecked,
	})
	answered := func(port uint32, host string) {
		t.Helper()
		eventually(t, host, func() error {
			status, body, err := get(port, "/first", host, "")
			if err == nil && (status != http.StatusOK || body != "outside") {
				err = fmt.Errorf("status %d: %s", status, body)
			}
			return err
		})
	}
	answered(web, "web.example.com")
	for what, cp := range map[string]*controlPlane{"gateway": gw, "sidecar": sidecar} {
		if n := cp.refused(); n != "" {
			t.Fatalf("%s: envoy refused: %s", what, n)
		}
	}

	t.Run("http", func(t *testing.T) {
		for range 20 {
			if status, _, err := get(web, "/web", "web.example.com", ""); err != nil || status != http.StatusOK {
				t.Fatalf("%d %v", status, err)
			}
		}
		if n := plain.count("plain web.example.com/web sidecar,gateway"); n != 20 {
			t.Errorf("the server saw %d of 20 requests by way of both proxies: %v", n, plain.calls)
		}
		if n := mutual.seen("web.example.com"); n == 0 || n != len(mutual.names) {
			t.Errorf("between the proxies: %q", mutual.names)
		}
		if status, _, err := get(gwMutual, "/", "web.example.com", ""); err == nil {
			t.Errorf("the gateway answered %d to plain text", status)
		}
	})
	t.Run("origination", func(t *testing.T) {
		answered(web, "orig.example.com")
		for range 20 {
			if status, _, err := get(web, "/orig", "orig.example.com", ""); err != nil || status != http.StatusOK {
				t.Fatalf("%d %v", status, err)
			}
		}
		if n := secure.count("orig.example.com orig.example.com/orig "); n != 20 {
			t.Errorf("the server saw %d of 20 requests over TLS: %v", n, secure.calls)
		}
		if mutual.seen("orig.example.com") == 0 {
			t.Errorf("between the proxies: %q", mutual.names)
		}
	})
	pool := x509.NewCertPool()
	pool.AddCert(ca.cert)
	// fetch speaks TLS from the application on.
	fetch := func(port uint32, name string) error {
		c, err := tls.DialWithDialer(&net.Dialer{Timeout: 5 * time.Second}, "tcp", fmt.Sprintf("127.0.0.1:%d", port), &tls.Config{ServerName: name, RootCAs: pool})
		if err != nil {
			return err
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(10 * time.Second))
		req := mustRequest(t, "http://"+name+"/tls", name)
		if err := req.Write(c); err != nil {
			return err
		}
		resp, err := http.ReadResponse(bufio.NewReader(c), req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if body, err := io.ReadAll(resp.Body); err != nil || string(body) != "outside" {
			return fmt.Errorf("%q %w", body, err)
		}
		return nil
	}
	for name, port := range map[string]uint32{"pass.example.com": tls443, "a.out.localhost": wildTLS} {
		t.Run("passthrough "+name, func(t *testing.T) {
			eventually(t, "first answer", func() error { return fetch(port, name) })
			at, hop := secure.count(name+" "+name+"/tls "), pass.seen(name)
			for range 10 {
				if err := fetch(port, name); err != nil {
					t.Fatal(err)
				}
			}
			if n := secure.count(name+" "+name+"/tls ") - at; n != 10 {
				t.Errorf("the server saw %d of 10 requests", n)
			}
			if n := pass.seen(name) - hop; n != 10 {
				t.Errorf("%d of 10 connections came by the gateway: %q", n, pass.names)
			}
		})
	}
	t.Run("wildcard", func(t *testing.T) {
		eventually(t, "TLS", func() error { return fetch(wildTLS, "a.direct.localhost") })
		if n := pass.seen("a.direct.localhost"); n != 0 {
			t.Errorf("%d connections came by the gateway", n)
		}
		host := fmt.Sprintf("b.direct.localhost:%d", plain.port)
		answered(wildHTTP, host)
		if plain.count("plain "+host+"/first ") == 0 {
			t.Errorf("the server saw %v", plain.calls)
		}
		answered(wildChecked, fmt.Sprintf("a.checked.localhost:%d", checked.port))
		if !slices.ContainsFunc(checked.calls, func(c string) bool { return strings.HasPrefix(c, "a.checked.localhost a.checked.localhost") }) {
			t.Errorf("the server saw %v", checked.calls)
		}
		// Nobody has a certificate for this name.
		if status, _, err := get(wildChecked, "/", fmt.Sprintf("z.checked.localhost:%d", checked.port), ""); err != nil || status != http.StatusServiceUnavailable {
			t.Errorf("a server with another's certificate: %d %v", status, err)
		}
		// What the gateway is not for it does not resolve.
		if err := fetch(gwPass, "a.direct.localhost"); err == nil {
			t.Error("the gateway led a name on that it is not for")
		}
	})
}
