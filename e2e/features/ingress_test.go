package features

import (
	"strings"
	"testing"
)

// bookinfoGateway is Istio's sample, with a second host to see whom the application sees.
const bookinfoGateway = `apiVersion: networking.istio.io/v1
kind: Gateway
metadata: {name: bookinfo-gateway, namespace: default}
spec:
  selector: {istio: ingressgateway}
  servers:
  - port: {number: 80, name: http, protocol: HTTP}
    hosts: ["*"]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: bookinfo, namespace: default}
spec:
  hosts: ["*"]
  gateways: [bookinfo-gateway]
  http:
  - match:
    - uri: {exact: /productpage}
    - uri: {prefix: /static}
    - uri: {exact: /login}
    - uri: {exact: /logout}
    - uri: {prefix: /api/v1/products}
    route:
    - destination: {host: productpage, port: {number: 9080}}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: who, namespace: default}
spec:
  hosts: [who.example.com]
  gateways: [bookinfo-gateway]
  http:
  - route:
    - destination: {host: productpage, port: {number: 9080}}
`

// TestIngress is the first application: the bookstore behind an ingress gateway.
func TestIngress(t *testing.T) {
	w := up(t, "bookinfo", nil)
	// A client without a sidecar dials the gateway itself: nothing here stands for the Service's address.
	const client, gateway = "amber/outside.client", "http://10.10.0.30:8080"
	w.apply("amber", "bookinfo-gateway.yaml", bookinfoGateway)

	page := w.want(client, gateway+"/productpage", 200)
	if !strings.Contains(page.body, "<title>Simple Bookstore App</title>") || page.server != "envoy" {
		t.Errorf("the page is %.200q, server %q", page.body, page.server)
	}
	if strings.Contains(page.body, "Sorry") {
		t.Errorf("the page lacks a part: %s", page.body)
	}
	for path, app := range map[string]bool{
		"/nope": false, "/": false, "/productpagex": false, "/productpage/": false, "/loginx": false,
		"/login": true, "/logout": true, "/static/x.css": true, "/api/v1/products/0": true,
	} {
		a, err := w.get(t.Context(), client, gateway+path)
		reached := strings.Contains(a.body, "404 page not found") // the application has none of these pages itself
		if err != nil || a.status != 404 || reached != app {
			t.Errorf("%s: status %d, reached the application: %v, want %v; %v", path, a.status, reached, app, err)
		}
	}
	who := w.want(client, gateway+"/", 200, "Host=who.example.com", "X-Forwarded-Client-Cert=URI=spiffe://forged/ns/x/sa/y")
	if who.Caller != "spiffe://amber.mesh/ns/istio-system/sa/istio-ingressgateway-service-account" || strings.Contains(who.XFCC, "forged") {
		t.Errorf("productpage saw %q (%s)", who.Caller, who.XFCC)
	}
	// One with a sidecar dials the Service, in clear as any client of a gateway.
	w.want("amber/details-v1", "http://istio-ingressgateway.istio-system.svc.cluster.local/productpage", 200)
	if n := w.counter("amber/productpage-v1", "0.0.0.0_15006.ssl.versions.TLSv1.3"); n == 0 {
		t.Error("no TLS 1.3 connection came in at productpage")
	}

	s, err := w.load(t.Context(), "amber/productpage-v1", "http://reviews:9080/", "--n", "600", "--concurrency", "4")
	if err != nil || s.Failed > 0 {
		t.Fatal(err, s)
	}
	for _, v := range []string{"v1", "v2", "v3"} {
		if n := s.Version[v]; n < 194 || n > 206 {
			t.Errorf("%s got %d of 600 requests, want a third to 1 %%", v, n)
		}
	}
}
