package features

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/isthmus-mesh/isthmus/api/admin"
)

// handWritten is a service of c2 as users of Istio 1.1 wrote it into c1.
const handWritten = `apiVersion: networking.istio.io/v1alpha3
kind: ServiceEntry
metadata: {name: httpbin-bar, namespace: foo}
spec:
  hosts: [httpbin.bar.global]
  location: MESH_INTERNAL
  ports: [{name: http1, number: 8000, protocol: http}]
  resolution: %s
  addresses: [127.255.0.2]
  endpoints: [{address: 172.31.0.21, ports: {http1: 15443}}]
`

// globalRule came with Istio's values for several control planes.
const globalRule = `apiVersion: networking.istio.io/v1alpha3
kind: DestinationRule
metadata: {name: istio-multicluster, namespace: istio-system}
spec:
  host: "*.global"
  trafficPolicy: {tls: {mode: ISTIO_MUTUAL}}
`

const reviewsByHand = `apiVersion: networking.istio.io/v1alpha3
kind: ServiceEntry
metadata: {name: reviews-default, namespace: default}
spec:
  hosts: [reviews.default.global]
  location: MESH_INTERNAL
  ports: [{name: http1, number: 9080, protocol: http}]
  resolution: STATIC
  addresses: [127.255.0.3]
  endpoints: [{address: 172.31.0.21, labels: {cluster: cluster2}, ports: {http1: 15443}}]
---
apiVersion: networking.istio.io/v1alpha3
kind: DestinationRule
metadata: {name: reviews-global, namespace: default}
spec:
  host: reviews.default.global
  trafficPolicy: {tls: {mode: ISTIO_MUTUAL}}
  subsets:
  - {name: v2, labels: {cluster: cluster2}}
  - {name: v3, labels: {cluster: cluster2}}
  - {name: v9, labels: {cluster: cluster2}}
---
apiVersion: networking.istio.io/v1alpha3
kind: VirtualService
metadata: {name: reviews, namespace: default}
spec:
  hosts: [reviews.default.svc.cluster.local]
  http:
  - match: [{headers: {end-user: {exact: jason}}}]
    route:
    - {weight: 50, destination: {host: reviews.default.global, subset: v2, port: {number: 9080}}}
    - {weight: 50, destination: {host: reviews.default.global, subset: v3, port: {number: 9080}}}
  - match: [{headers: {end-user: {exact: nobody}}}]
    route: [{destination: {host: reviews.default.global, subset: v9, port: {number: 9080}}}]
  - route: [{destination: {host: reviews.default.svc.cluster.local, subset: v1}}]
`

const reviewsSubsets = `apiVersion: networking.istio.io/v1alpha3
kind: DestinationRule
metadata: {name: reviews, namespace: default}
spec:
  host: reviews.default.svc.cluster.local
  subsets:
  - {name: v1, labels: {version: v1}}
  - {name: v2, labels: {version: v2}}
  - {name: v3, labels: {version: v3}}
`

// hosts lists where a cluster of a node's Envoy leads.
func (w *world) hosts(ctx context.Context, node, cluster string) ([]string, error) {
	text, err := w.admin(ctx, node, "/clusters")
	var out []string
	for line := range strings.Lines(text) {
		if rest, ok := strings.CutPrefix(line, cluster+"::"); ok && strings.Contains(rest, "::cx_active::") {
			out = append(out, strings.SplitN(rest, "::", 2)[0])
		}
	}
	slices.Sort(out)
	return out, err
}

// address asks DNS in a pod and wants the one IPv4 address to satisfy check.
func (w *world) address(node, name string, check func(netip.Addr) bool) {
	w.t.Helper()
	w.eventually(func(ctx context.Context) error {
		addrs, err := w.Node(node).Resolver().LookupNetIP(ctx, "ip4", name+".")
		if err == nil && (len(addrs) != 1 || !check(addrs[0].Unmap())) {
			err = fmt.Errorf("%s is %v in %s", name, addrs, node)
		}
		return err
	})
}

// TestHandWritten: two clusters joined by token, where services of c2 are also written into c1 by hand.
func TestHandWritten(t *testing.T) {
	w := up(t, "multicluster", nil)
	w.isthmus("c2", "join", w.isthmus("c1", "token", "create", "--for", "c2"))
	const sleep, url, envoyCluster = "c1/foo.sleep", "http://httpbin.bar.global:8000/headers", "outbound|8000||httpbin.bar.global"
	vip := func(a netip.Addr) bool { return netip.MustParsePrefix("240.0.0.0/4").Contains(a) }
	byHand := func(a netip.Addr) bool { return a == netip.MustParseAddr("127.255.0.2") }
	automatic := func(ctx context.Context) error {
		hosts, err := w.hosts(ctx, sleep, envoyCluster)
		if err == nil && (len(hosts) != 1 || !strings.Contains(hosts[0], "envoy://eastwest|c2/httpbin.p8000.c2.httpbin.bar.global")) {
			err = fmt.Errorf("httpbin.bar.global leads to %v, want the pod through the gateways of c2", hosts)
		}
		return err
	}
	w.eventually(automatic)
	w.address(sleep, "httpbin.bar.global", vip)
	reached := func(a answer) {
		t.Helper()
		if a.Pod != "httpbin" || a.Caller != "spiffe://c1.mesh/ns/foo/sa/sleep" || !strings.Contains(a.XFCC, "By=spiffe://c2.mesh/ns/bar/sa/httpbin") {
			t.Errorf("%s was answered by %q, which saw %q (%s)", url, a.Pod, a.Caller, a.XFCC)
		}
	}
	reached(w.want(sleep, url, 200))

	const gateway, chain = "c2/eastwest-1", "cluster.outbound|8000||httpbin.bar.svc.cluster.local.upstream_cx_total"
	for _, resolution := range []string{"STATIC", "DNS"} {
		for name, rule := range map[string]string{"without a rule": "", "with the rule for *.global": "---\n" + globalRule} {
			t.Run(resolution+" "+name, func(t *testing.T) {
				w := &world{w.Lab, t}
				w.apply("c1", "httpbin-bar.yaml", fmt.Sprintf(handWritten, resolution)+rule)
				w.address(sleep, "httpbin.bar.global", byHand)
				w.eventually(func(ctx context.Context) error {
					hosts, err := w.hosts(ctx, sleep, envoyCluster)
					if err == nil && !slices.Equal(hosts, []string{"172.31.0.21:15443"}) {
						err = fmt.Errorf("httpbin.bar.global leads to %v, want the gateway alone", hosts)
					}
					return err
				})
				before := w.counter(gateway, chain)
				reached(w.want(sleep, url, 200))
				for range 20 { // none goes another way
					if a, err := w.get(t.Context(), sleep, url); err != nil || a.status != 200 {
						t.Fatal(a.status, err)
					}
				}
				if w.counter(gateway, chain) == before {
					t.Error("no connection came through the chain of the name that the rule writes")
				}
			})
		}
	}
	w.noProblems("c1")
	// The port is part of the name, and c2 exports 8000 alone.
	w.apply("c1", "httpbin-bar.yaml", strings.ReplaceAll(fmt.Sprintf(handWritten, "STATIC"), "8000", "8001"))
	w.want(sleep, "http://httpbin.bar.global:8001/", 503)
	w.noKey()
	w.remove("c1", "httpbin-bar.yaml")
	w.eventually(automatic)
	w.address(sleep, "httpbin.bar.global", vip)
	reached(w.want(sleep, url, 200))

	t.Run("opened by a Gateway", func(t *testing.T) { (&world{w.Lab, t}).openedByGateway() })
	t.Run("names of a pod and a cluster", func(t *testing.T) { (&world{w.Lab, t}).podNames() })
	t.Run("version routing", func(t *testing.T) { (&world{w.Lab, t}).versionRouting() })

	text, err := w.admin(t.Context(), gateway, "/certs")
	var certs struct{ Certificates []any }
	if err != nil || json.Unmarshal([]byte(text), &certs) != nil || len(certs.Certificates) > 0 {
		t.Errorf("the gateway between clusters holds %d certificates; %v", len(certs.Certificates), err)
	}
}

// hidden is a Service of c2 that is not exported, and what c1 calls it by.
const hidden = `apiVersion: v1
kind: Service
metadata: {name: hidden, namespace: bar}
spec:
  selector: {app: httpbin}
  ports: [{name: http, port: 8001, targetPort: 8000}]
`

const hiddenByHand = `apiVersion: networking.istio.io/v1alpha3
kind: ServiceEntry
metadata: {name: hidden-bar, namespace: foo}
spec:
  hosts: [hidden.bar.global]
  location: MESH_INTERNAL
  ports: [{name: http1, number: 8001, protocol: http}]
  resolution: STATIC
  addresses: [127.255.0.4]
  endpoints: [{address: 172.31.0.21, ports: {http1: 15443}}]
`

// globalGateway and globalFilter came with Istio's values for several control planes.
const globalGateway = `apiVersion: networking.istio.io/v1alpha3
kind: Gateway
metadata: {name: istio-multicluster-ingressgateway, namespace: istio-system}
spec:
  selector: {istio: eastwestgateway}
  servers:
  - {port: {number: 15443, name: tls, protocol: TLS}, tls: {mode: AUTO_PASSTHROUGH}, hosts: ["*.global"]}
`

const globalFilter = `apiVersion: networking.istio.io/v1alpha3
kind: EnvoyFilter
metadata: {name: istio-multicluster-ingressgateway, namespace: istio-system}
spec:
  workloadLabels: {istio: ingressgateway}
  filters:
  - listenerMatch: {portNumber: 15443, listenerType: GATEWAY}
    insertPosition: {index: AFTER, relativeTo: envoy.filters.network.sni_cluster}
    filterName: envoy.filters.network.tcp_cluster_rewrite
    filterType: NETWORK
    filterConfig: {cluster_pattern: "\\.global$", cluster_replacement: ".svc.cluster.local"}
`

// openedByGateway: what is not exported is closed until a Gateway object opens it, and closed again without it.
func (w *world) openedByGateway() {
	const sleep, url = "c1/foo.sleep", "http://hidden.bar.global:8001/"
	w.apply("c2", "hidden.yaml", hidden)
	w.apply("c1", "hidden-bar.yaml", hiddenByHand)
	w.want(sleep, url, 503)
	w.apply("c2", "gateway.yaml", globalGateway+"---\n"+globalFilter)
	if a := w.want(sleep, url, 200); a.Pod != "httpbin" || a.Caller != "spiffe://c1.mesh/ns/foo/sa/sleep" {
		w.t.Errorf("answered by %q, which saw %q", a.Pod, a.Caller)
	}
	if w.counter("c2/eastwest-1", "cluster.outbound_.8001_._.hidden.bar.svc.cluster.local.upstream_cx_total") == 0 {
		w.t.Error("no connection came through the cluster that the Gateway opened")
	}
	var s admin.Status
	if err := json.Unmarshal([]byte(w.isthmus("c2", "status", "-o", "json")), &s); err != nil {
		w.t.Fatal(err)
	}
	if len(s.Problems) != 1 || s.Problems[0].Reason != "Satisfied" {
		w.t.Errorf("c2 says %v of the Gateway and the filter", s.Problems)
	}
	w.remove("c2", "gateway.yaml")
	w.eventually(func(ctx context.Context) error { // open connections drain, new ones are closed
		raw, err := w.Node("c1/isthmusd").Dial(ctx, "tcp", "172.31.0.21:15443")
		if err != nil {
			return err
		}
		defer raw.Close()
		conn := tls.Client(raw, &tls.Config{InsecureSkipVerify: true, ServerName: "outbound_.8001_._.hidden.bar.global", NextProtos: []string{"istio"}})
		if conn.HandshakeContext(ctx) == nil {
			return errors.New("the gateway still leads to the service that nothing opens")
		}
		return nil
	})
	w.remove("c1", "hidden-bar.yaml")
}

// podNames: an export that asks for it has a name for its cluster and for each pod.
func (w *world) podNames() {
	w.apply("c2", "hidden.yaml", hidden+"---\n"+`apiVersion: multicluster.x-k8s.io/v1beta1
kind: ServiceExport
metadata: {name: hidden, namespace: bar}
spec: {exportedAnnotations: {isthmus.io/names: pod}}
`)
	for _, host := range []string{"hidden.bar.global", "c2.hidden.bar.global", "httpbin.c2.hidden.bar.global"} {
		w.address("c1/foo.sleep", host, func(a netip.Addr) bool { return netip.MustParsePrefix("240.0.0.0/4").Contains(a) })
		if a := w.want("c1/foo.sleep", "http://"+host+":8001/", 200); a.Pod != "httpbin" || !strings.Contains(a.XFCC, "By=spiffe://c2.mesh/ns/bar/sa/httpbin") {
			w.t.Errorf("%s was answered by %q (%s)", host, a.Pod, a.XFCC)
		}
	}
	w.remove("c2", "hidden.yaml")
}

// noProblems wants a cluster to have nothing to say against its configuration.
func (w *world) noProblems(cluster string) {
	w.t.Helper()
	var s admin.Status
	if err := json.Unmarshal([]byte(w.isthmus(cluster, "status", "-o", "json")), &s); err != nil {
		w.t.Fatal(err)
	}
	for _, p := range s.Problems {
		w.t.Errorf("%s: %v", cluster, p)
	}
}

// noKey: who has no certificate of the mesh gets through the gateway and no further.
func (w *world) noKey() {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), 5*time.Second)
	defer cancel()
	raw, err := w.Node("c1/isthmusd").Dial(ctx, "tcp", "172.31.0.21:15443")
	if err != nil {
		w.t.Fatal(err)
	}
	defer raw.Close()
	_ = raw.SetDeadline(time.Now().Add(5 * time.Second))
	conn := tls.Client(raw, &tls.Config{InsecureSkipVerify: true, ServerName: "outbound_.8000_._.httpbin.bar.global", NextProtos: []string{"istio", "http/1.1"}})
	if err := conn.Handshake(); err != nil {
		w.t.Errorf("the pod behind the gateway was not reached: %v", err)
	}
	if id := conn.ConnectionState().PeerCertificates[0].URIs[0].String(); id != "spiffe://c2.mesh/ns/bar/sa/httpbin" {
		w.t.Errorf("the pod behind the gateway is %s", id)
	}
	_, _ = fmt.Fprint(conn, "GET / HTTP/1.1\r\nHost: httpbin.bar.global\r\n\r\n")
	if got, err := io.ReadAll(conn); len(got) > 0 || errors.Is(err, os.ErrDeadlineExceeded) {
		w.t.Errorf("without a certificate: %q, %v", got, err)
	}
}

// versionRouting is the old way across clusters: the subset travels in the server name, and the other cluster's own
// rule says which pods it means.
func (w *world) versionRouting() {
	const page, url = "c1/productpage", "http://reviews.default.svc.cluster.local:9080/"
	w.apply("c2", "subsets.yaml", reviewsSubsets)
	w.apply("c1", "reviews-global.yaml", reviewsByHand+"---\n"+reviewsSubsets)
	w.eventually(func(ctx context.Context) error {
		a, err := w.get(ctx, page, url, "end-user=jason")
		if err == nil && (a.Version != "v2" && a.Version != "v3" || a.Caller != "spiffe://c1.mesh/ns/default/sa/productpage") {
			err = fmt.Errorf("jason gets status %d, version %q, seen as %q", a.status, a.Version, a.Caller)
		}
		return err
	})
	jason, err := w.load(w.t.Context(), page, url, "--n", "1000", "--concurrency", "4", "--header", "end-user=jason")
	if err != nil || jason.Failed > 0 || jason.Version["v2"] < 450 || jason.Version["v2"] > 550 || jason.Version["v2"]+jason.Version["v3"] != 1000 {
		w.t.Errorf("jason: %+v, %v", jason, err)
	}
	rest, err := w.load(w.t.Context(), page, url, "--n", "200")
	if err != nil || rest.Version["v1"] != 200 {
		w.t.Errorf("the rest: %+v, %v", rest, err)
	}
	for _, v := range []string{"v2", "v3"} {
		if w.counter("c2/eastwest-1", "cluster.outbound|9080|"+v+"|reviews.default.svc.cluster.local.upstream_cx_total") == 0 {
			w.t.Errorf("no connection came with subset %s in its server name", v)
		}
	}
	if a, err := w.get(w.t.Context(), page, url, "end-user=nobody"); err != nil || a.status != 503 {
		w.t.Errorf("a subset that c2 does not have: status %d, %v; want 503", a.status, err)
	}
}
