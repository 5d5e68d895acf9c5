package translate_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/isthmus-mesh/isthmus/discovery/translate"
	"github.com/isthmus-mesh/isthmus/discovery/translate/patch"
	"github.com/isthmus-mesh/isthmus/internal/envoytest"
)

// startEcho answers with the version of HTTP and what it was sent, over HTTP/1.1, HTTP/2 in plain text, and WebSocket.
func startEcho(t *testing.T) *backend {
	t.Helper()
	b := &backend{name: "echo", calls: map[string]int{}}
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.EqualFold(r.Header.Get("Upgrade"), "websocket") {
			c, rw, err := w.(http.Hijacker).Hijack()
			if err != nil {
				return
			}
			defer c.Close()
			io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
			io.Copy(c, rw)
			return
		}
		w.Header().Set("X-Drop", "dropped")
		w.Header().Set("X-Set", "from the server")
		fmt.Fprintf(w, "HTTP/%d.%d %s%s", r.ProtoMajor, r.ProtoMinor, r.Host, r.URL.Path)
		for _, name := range []string{"X-Set", "X-Add", "X-Drop", "X-Own"} {
			fmt.Fprintf(w, " %s=%s", name, strings.Join(r.Header.Values(name), "+"))
		}
	}))
	s.Config.Protocols = new(http.Protocols)
	s.Config.Protocols.SetHTTP1(true)
	s.Config.Protocols.SetUnencryptedHTTP2(true)
	s.Start()
	t.Cleanup(s.Close)
	b.port = s.URL[strings.LastIndex(s.URL, ":")+1:]
	return b
}

// placed returns an entry whose backends stand in the localities.
func placed(name string, at map[string]*backend) string {
	var list []*backend
	for _, b := range at {
		list = append(list, b)
	}
	y := entry(name, list...)
	for where, b := range at {
		y = strings.Replace(y, "labels: {version: "+b.name+"}", "locality: "+where+", labels: {version: "+b.name+"}", 1)
	}
	return y
}

const featureRules = `apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: rpc, namespace: a}
spec:
  hosts: [rpc.example.com]
  http: [{fault: {abort: {grpcStatus: UNAVAILABLE, percentage: {value: 30}}}, route: [{destination: {host: rpc.example.com}}]}]
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: query, namespace: a}
spec: {host: query.example.com, trafficPolicy: {loadBalancer: {consistentHash: {httpQueryParameterName: user}}}}
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: less, namespace: a}
spec: {host: less.example.com, trafficPolicy: {loadBalancer: {consistentHash: {httpQueryParameterName: user}}}}
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: source, namespace: a}
spec: {host: source.example.com, trafficPolicy: {loadBalancer: {consistentHash: {useSourceIp: true}}}}
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: two, namespace: a}
spec: {host: two.example.com, trafficPolicy: {connectionPool: {http: {h2UpgradePolicy: UPGRADE}}}}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: echo, namespace: a}
spec:
  hosts: [echo.example.com]
  http:
  - match: [{uri: {prefix: /delegated}}]
    delegate: {name: part}
  - match: [{uri: {exact: /cors}}]
    corsPolicy: {allowOrigins: [{exact: "https://shop.example.com"}], allowMethods: [GET, PUT], allowHeaders: [x-own], maxAge: 2m, allowCredentials: true}
    route: [{destination: {host: echo.example.com}}]
  - headers: {request: {set: {x-set: new}, add: {x-add: more}, remove: [x-drop]}, response: {set: {x-set: new}, add: {x-add: more}, remove: [x-drop]}}
    route: [{destination: {host: echo.example.com}, headers: {request: {set: {x-own: "%REQ(:path)%"}}}}]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: part, namespace: a}
spec:
  http:
  - match: [{uri: {prefix: /delegated/far}}]
    rewrite: {uri: /near}
    route: [{destination: {host: echo.example.com}}]
  - directResponse: {status: 299, body: {string: "LONG"}}
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: spread, namespace: a}
spec: {host: spread.example.com, trafficPolicy: {loadBalancer: {localityLbSetting: {distribute: [{from: eu/*, to: {eu/*: 80, us/*: 20}}]}}}}
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: over, namespace: a}
spec:
  host: over.example.com
  trafficPolicy:
    loadBalancer: {localityLbSetting: {failover: [{from: eu, to: us}]}}
    outlierDetection: {consecutive5xxErrors: 1, interval: 200ms, baseEjectionTime: 3s, maxEjectionPercent: 100}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: over, namespace: a}
spec: {hosts: [over.example.com], http: [{retries: {attempts: 0}, route: [{destination: {host: over.example.com}}]}]}
---
apiVersion: networking.istio.io/v1alpha3
kind: EnvoyFilter
metadata: {name: lua, namespace: a}
spec:
  configPatches:
  - applyTo: EXTENSION_CONFIG
    patch:
      operation: ADD
      value:
        name: mark
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.http.lua.v3.Lua
          default_source_code: {inline_string: 'function envoy_on_response(h) h:headers():add("x-mark", "fetched") end'}
  - applyTo: HTTP_FILTER
    match: {context: SIDECAR_OUTBOUND, listener: {filterChain: {filter: {subFilter: {name: envoy.filters.http.router}}}}}
    patch:
      operation: INSERT_BEFORE
      value:
        name: mark
        config_discovery: {config_source: {ads: {}, resource_api_version: V3}, type_urls: [type.googleapis.com/envoy.extensions.filters.http.lua.v3.Lua]}
`

// TestEnvoyFeatures runs what is left of the traffic API on one real Envoy.
func TestEnvoyFeatures(t *testing.T) {
	envoytest.Path(t)
	v1, v2, v3, echo := startBackend(t, "v1", nil), startBackend(t, "v2", nil), startBackend(t, "v3", nil), startEcho(t)
	eu, us, eu2, us2 := startBackend(t, "eu", nil), startBackend(t, "us", nil), startBackend(t, "eu2", nil), startBackend(t, "us2", nil)
	yaml := entry("rpc", v1) + entry("query", v1, v2, v3) + entry("less", v1, v2) + entry("source", v1, v2, v3) + entry("two", echo) + entry("echo", echo) +
		placed("spread", map[string]*backend{"eu/b": eu, "us/a": us}) + placed("over", map[string]*backend{"eu/a": eu2, "us/a": us2}) +
		strings.Replace(featureRules, "LONG", strings.Repeat("long ", 2000), 1)
	snap, problems := fromYAML(t, yaml, nil)
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	proxy := proxyNamed(t, "sidecar-a-client", "")
	proxy.Locality, proxy.Metadata = "eu/a", map[string]string{"HTTP10": "1"}
	r, problems := translate.Translate(snap, proxy)
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	port := freePort(t)
	result := patch.Apply(snap, proxy, r, nil)
	if len(result.Problems) > 0 || len(result.Extensions) != 1 {
		t.Fatal(result.Problems, result.Extensions)
	}
	r = bindAt(result.Resources, map[string]uint32{"0.0.0.0_80": port})
	cp, addr := serve(t, r)
	startEnvoy(t, addr)
	url := fmt.Sprintf("http://127.0.0.1:%d", port)
	// do sends a request with headers "NAME: VALUE" from the address, if it is not empty.
	do := func(method, target, host, from string, headers ...string) (*http.Response, string) {
		t.Helper()
		req, err := http.NewRequest(method, url+target, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Host = host
		for _, h := range headers {
			name, value, _ := strings.Cut(h, ": ")
			req.Header.Add(name, value)
		}
		client := &http.Client{Timeout: 10 * time.Second}
		if from != "" {
			d := &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
			client.Transport = &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, network, at string) (net.Conn, error) {
				return d.DialContext(ctx, network, at)
			}}
		}
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp, string(body)
	}
	eventually(t, "first answer", func() error {
		status, body, err := get(port, "/", "echo.example.com", "")
		if err == nil && status != http.StatusOK {
			err = fmt.Errorf("status %d: %s", status, body)
		}
		return err
	})
	if n := cp.refused(); n != "" {
		t.Fatalf("envoy refused: %s", n)
	}

	t.Run("grpc abort", func(t *testing.T) {
		aborted := 0
		for range 1000 {
			resp, _ := do(http.MethodPost, "/pkg.Service/Call", "rpc.example.com", "", "content-type: application/grpc", "te: trailers")
			if resp.Header.Get("grpc-status") == "14" {
				aborted++
			}
		}
		if !near(aborted, 1000, 30, 6) || v1.asked("rpc.example.com/pkg.Service/Call") != 1000-aborted { // 6 points are four standard deviations
			t.Errorf("%d of 1000 were aborted, want 30 %%; the server saw %d", aborted, v1.asked("rpc.example.com/pkg.Service/Call"))
		}
	})
	t.Run("hash", func(t *testing.T) {
		reached, kept, stayed := map[string]bool{}, 0, 0
		for i := range 200 {
			target := fmt.Sprintf("/?user=u%d", i)
			_, first := do(http.MethodGet, target, "query.example.com", "")
			if _, again := do(http.MethodGet, target, "query.example.com", ""); again != first {
				t.Errorf("user %d went to %s and %s", i, first, again)
			}
			reached[first] = true
			if first != "v3" { // where v3 is not, its users alone should move; the ring has other points, so some others do
				kept++
				if _, less := do(http.MethodGet, target, "less.example.com", ""); less == first {
					stayed++
				}
			}
		}
		if len(reached) != 3 || stayed*100 < kept*70 {
			t.Errorf("reached %v; %d of %d users stayed where they were without one server", reached, stayed, kept)
		}
		reached = map[string]bool{}
		for i := range 30 {
			from := fmt.Sprintf("127.0.0.%d", i+2)
			_, first := do(http.MethodGet, "/", "source.example.com", from)
			if _, again := do(http.MethodGet, "/", "source.example.com", from); again != first {
				t.Errorf("%s went to %s and %s", from, first, again)
			}
			reached[first] = true
		}
		if len(reached) < 2 {
			t.Errorf("30 addresses reached %v", reached)
		}
	})
	t.Run("headers", func(t *testing.T) {
		resp, body := do(http.MethodGet, "/headers", "echo.example.com", "", "x-set: old", "x-add: one", "x-drop: gone")
		if want := "HTTP/1.1 echo.example.com/headers X-Set=new X-Add=one+more X-Drop= X-Own=/headers"; body != want {
			t.Errorf("the server saw %q, want %q", body, want)
		}
		if h := resp.Header; h.Get("x-set") != "new" || h.Get("x-add") != "more" || h.Get("x-drop") != "" {
			t.Errorf("the client saw %v", h)
		}
		if resp.Header.Get("x-mark") != "fetched" {
			t.Errorf("the filter that Envoy fetches by name did nothing: %v", resp.Header)
		}
	})
	t.Run("cors", func(t *testing.T) {
		ask := func(origin string) http.Header {
			resp, _ := do(http.MethodOptions, "/cors", "echo.example.com", "", "origin: "+origin, "access-control-request-method: PUT")
			return resp.Header
		}
		h := ask("https://shop.example.com")
		if h.Get("access-control-allow-origin") != "https://shop.example.com" || h.Get("access-control-allow-methods") != "GET,PUT" || h.Get("access-control-allow-headers") != "x-own" ||
			h.Get("access-control-max-age") != "120" || h.Get("access-control-allow-credentials") != "true" {
			t.Errorf("a good origin: %v", h)
		}
		if h := ask("https://evil.example.com"); h.Get("access-control-allow-origin") != "" {
			t.Errorf("a bad origin: %v", h)
		}
	})
	t.Run("delegate", func(t *testing.T) {
		if _, body := do(http.MethodGet, "/delegated/far/x", "echo.example.com", ""); !strings.HasPrefix(body, "HTTP/1.1 echo.example.com/near/x ") {
			t.Errorf("the server saw %q", body)
		}
		if resp, body := do(http.MethodGet, "/delegated/else", "echo.example.com", ""); resp.StatusCode != 299 || len(body) != 10000 {
			t.Errorf("%d with %d bytes, want 299 with 10000", resp.StatusCode, len(body))
		}
	})
	t.Run("upgrades", func(t *testing.T) {
		if _, body := do(http.MethodGet, "/", "two.example.com", ""); !strings.HasPrefix(body, "HTTP/2.0 ") {
			t.Errorf("the server was asked by %q, want HTTP/2", body)
		}
		c, err := net.DialTimeout("tcp", fmt.Sprintf("127.0.0.1:%d", port), 5*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(20 * time.Second))
		io.WriteString(c, "GET /ws HTTP/1.1\r\nHost: echo.example.com\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
		in := bufio.NewReader(c)
		resp, err := http.ReadResponse(in, nil)
		if err != nil || resp.StatusCode != http.StatusSwitchingProtocols {
			t.Fatalf("WebSocket: %v %v", resp, err)
		}
		io.WriteString(c, "frames\n")
		if line, err := in.ReadString('\n'); line != "frames\n" {
			t.Errorf("through the WebSocket came %q, %v", line, err)
		}
	})
	t.Run("http 1.0", func(t *testing.T) {
		c, err := net.DialTimeout("tcp", fmt.Sprintf("127.0.0.1:%d", port), 5*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(20 * time.Second))
		io.WriteString(c, "GET /old HTTP/1.0\r\nHost: echo.example.com\r\n\r\n")
		if answer, err := io.ReadAll(c); !strings.Contains(string(answer), " 200 OK") || !strings.Contains(string(answer), "echo.example.com/old") {
			t.Errorf("%q %v", answer, err)
		}
	})
	t.Run("locality", func(t *testing.T) {
		n := map[string]int{}
		for range 1000 {
			_, body := do(http.MethodGet, "/", "spread.example.com", "")
			n[body]++
		}
		if !near(n["eu"], 1000, 80, 5) || n["eu"]+n["us"] != 1000 { // four standard deviations
			t.Errorf("80 and 20 became %v of 1000", n)
		}
		for range 50 {
			if _, body := do(http.MethodGet, "/", "over.example.com", ""); body != "eu2" {
				t.Fatalf("%s answers while the near one is well", body)
			}
		}
		eu2.status.Store(503)
		eventually(t, "another region takes over", func() error {
			for range 20 {
				if _, body := do(http.MethodGet, "/", "over.example.com", ""); body != "us2" {
					return fmt.Errorf("%s answers", body)
				}
			}
			return nil
		})
		eu2.status.Store(0)
		eventually(t, "the near one is back", func() error {
			if _, body := do(http.MethodGet, "/", "over.example.com", ""); body != "eu2" {
				return fmt.Errorf("%s answers", body)
			}
			return nil
		})
	})
}
