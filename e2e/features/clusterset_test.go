package features

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"testing"
)

const (
	// clusterSetRule is a rule on the name of multi-cluster services.
	clusterSetRule = `apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: httpbin-set, namespace: foo}
spec:
  hosts: [httpbin.bar.svc.clusterset.local]
  http:
  - match: [{uri: {exact: /teapot}}]
    directResponse: {status: 418}
  - route: [{destination: {host: httpbin.bar.svc.clusterset.local}}]
`
	// pets is a headless service of the pod that httpbin has.
	pets = `apiVersion: v1
kind: Service
metadata: {name: pets, namespace: bar}
spec:
  clusterIP: None
  selector: {app: httpbin}
  ports: [{name: http, port: 8000}]
---
apiVersion: multicluster.x-k8s.io/v1beta1
kind: ServiceExport
metadata: {name: pets, namespace: bar}
`
)

// TestClusterSet calls exported services by the names of multi-cluster services, across two clusters that reach each
// other through gateways alone.
func TestClusterSet(t *testing.T) {
	w := up(t, "multicluster", nil)
	const sleep = "c1/foo.sleep"
	w.missing(sleep, "httpbin.bar.svc.clusterset.local") // not joined yet
	w.isthmus("c2", "join", w.isthmus("c1", "token", "create", "--for", "c2"))

	// One service, two names, the same addresses.
	var global netip.Addr
	w.address(sleep, "httpbin.bar.global", func(a netip.Addr) bool { global = a; return netip.MustParsePrefix("240.0.0.0/4").Contains(a) })
	w.address(sleep, "httpbin.bar.svc.clusterset.local", func(a netip.Addr) bool { return a == global })
	w.address("c2/bar.httpbin", "httpbin.bar.svc.clusterset.local", func(a netip.Addr) bool { return a == global })
	for _, url := range []string{"http://httpbin.bar.svc.clusterset.local:8000/headers", "http://httpbin.bar.global:8000/headers"} {
		if a := w.want(sleep, url, 200); a.Pod != "httpbin" || a.Caller != "spiffe://c1.mesh/ns/foo/sa/sleep" {
			t.Errorf("%s was answered by %q, which saw %q", url, a.Pod, a.Caller)
		}
	}
	w.missing(sleep, "c2.httpbin.bar.svc.clusterset.local") // the specification forbids it
	w.missing(sleep, "none.bar.svc.clusterset.local")

	// A rule on one name is one on the other.
	w.apply("c1", "httpbin-set.yaml", clusterSetRule)
	w.want(sleep, "http://httpbin.bar.svc.clusterset.local:8000/teapot", 418)
	w.want(sleep, "http://httpbin.bar.global:8000/teapot", 418)
	w.want(sleep, "http://httpbin.bar.svc.clusterset.local:8000/headers", 200)
	w.noProblems("c1")

	// A headless service has a name for each pod, and one that any of them answers.
	w.apply("c2", "pets.yaml", pets)
	pod := "httpbin.c2.pets.bar.svc.clusterset.local"
	w.address(sleep, pod, netip.Addr.IsValid)
	for _, host := range []string{pod, "pets.bar.svc.clusterset.local"} {
		if a := w.want(sleep, "http://"+host+":8000/headers", 200); a.Pod != "httpbin" {
			t.Errorf("%s was answered by %q", host, a.Pod)
		}
	}
	_, records, err := w.Node(sleep).Resolver().LookupSRV(t.Context(), "http", "tcp", "pets.bar.svc.clusterset.local.")
	if err != nil || len(records) != 1 || records[0].Target != pod+"." || records[0].Port != 8000 {
		t.Errorf("SRV records %+v, %v", records, err)
	}
	w.remove("c2", "pets.yaml")
	w.missing(sleep, "pets.bar.svc.clusterset.local")
}

// missing wants a name not to exist.
func (w *world) missing(node, name string) {
	w.t.Helper()
	w.eventually(func(ctx context.Context) error {
		addrs, err := w.Node(node).Resolver().LookupNetIP(ctx, "ip4", name+".")
		if err == nil {
			return fmt.Errorf("%s is %v in %s", name, addrs, node)
		}
		if !strings.Contains(err.Error(), "no such host") {
			return err
		}
		return nil
	})
}
