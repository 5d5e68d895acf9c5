package features

import (
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"slices"
	"strings"
	"testing"
)

// namespaces of the world; the last one is outside of the mesh.
var namespaces = []string{"foo", "bar", "legacy"}

func server(namespace string) string { return "amber/" + namespace + ".httpbin" }
func client(namespace string) string { return "amber/" + namespace + ".sleep" }

func host(namespace string) string { return "httpbin." + namespace + ".svc.cluster.local" }

// call sends one request from a namespace to another. A client outside of the mesh dials the pod: nothing here stands
// for the Service's address.
func (w *world) call(ctx context.Context, from, to string) (answer, error) {
	if from == "legacy" {
		return w.get(ctx, client(from), fmt.Sprintf("http://%s:8000/", w.Node(server(to)).IP()), "Host="+host(to)+":8000")
	}
	return w.get(ctx, client(from), "http://"+host(to)+":8000/")
}

// table wants every pair of namespaces to work, with mutual TLS where mtls says so, but for those that fail.
func (w *world) table(what string, mtls func(from, to string) bool, fail ...string) {
	w.t.Helper()
	w.eventually(func(ctx context.Context) error {
		var wrong []string
		for _, from := range namespaces {
			for _, to := range namespaces {
				a, err := w.call(ctx, from, to)
				ok, want := err == nil && a.status == 200, !slices.Contains(fail, from+"->"+to)
				switch caller := fmt.Sprintf("spiffe://amber.mesh/ns/%s/sa/sleep", from); {
				case ok != want:
					wrong = append(wrong, fmt.Sprintf("%s->%s: status %d, %v, want it to work: %v", from, to, a.status, err, want))
				case ok && mtls(from, to) != (a.Caller == caller):
					wrong = append(wrong, fmt.Sprintf("%s->%s: seen as %q, want mutual TLS: %v", from, to, a.Caller, mtls(from, to)))
				}
			}
		}
		if len(wrong) > 0 {
			return fmt.Errorf("%s: %s", what, strings.Join(wrong, "; "))
		}
		return nil
	})
}

func peerAuthentication(namespace, mode string) string {
	return fmt.Sprintf("apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: default, namespace: %s}\nspec: {mtls: {mode: %s}}\n", namespace, mode)
}

func destinationRule(namespace, mode string) string {
	return fmt.Sprintf("apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {name: httpbin, namespace: %s}\nspec: {host: %s, trafficPolicy: {tls: {mode: %s}}}\n", namespace, host(namespace), mode)
}

// TestMutualTLS is Istio's table of namespaces with and without sidecars under each policy.
func TestMutualTLS(t *testing.T) {
	w := up(t, "namespaces", nil)
	auto := func(from, to string) bool { return from != "legacy" && to != "legacy" }
	seen := listen(t, w.Node(server("foo")), 8000)
	address := func(n string) [4]byte { return w.Node(n).IP().As4() }

	w.table("permissive", auto)
	sent, got, hellos := seen.from(address(client("bar")))
	if len(hellos) == 0 || bytes.Contains(sent, []byte("GET /")) || bytes.Contains(got, []byte("httpbin")) {
		t.Errorf("bar -> foo on the wire: %d TLS hellos in %d and %d bytes", len(hellos), len(sent), len(got))
	}
	for _, h := range hellos {
		if h.chosen != tls.VersionTLS13 || !slices.Equal(h.versions, []uint16{tls.VersionTLS13}) || !slices.Contains(h.alpn, "istio") {
			t.Errorf("bar -> foo: versions %x, chosen %x, ALPN %v; want TLS 1.3 with istio", h.versions, h.chosen, h.alpn)
		}
		if h.name != "outbound_.8000_._."+host("foo") {
			t.Errorf("bar -> foo: server name %q", h.name)
		}
	}
	if sent, _, hellos := seen.from(address(client("legacy"))); len(hellos) != 0 || !bytes.Contains(sent, []byte("GET / HTTP/1.1")) {
		t.Errorf("legacy -> foo on the wire: %d TLS hellos, %.60q", len(hellos), sent)
	}

	w.apply("amber", "policy.yaml", peerAuthentication("foo", "STRICT"))
	w.table("strict in foo", auto, "legacy->foo")
	w.apply("amber", "rule.yaml", destinationRule("foo", "DISABLE"))
	w.table("strict in foo, clients told not to use TLS", auto, "legacy->foo", "foo->foo", "bar->foo")
	w.apply("amber", "rule.yaml", destinationRule("foo", "ISTIO_MUTUAL"))
	w.table("strict in foo, clients told to use mutual TLS", auto, "legacy->foo")
	w.remove("amber", "rule.yaml")

	// The server takes no TLS, and clients find that out without being told.
	w.apply("amber", "policy.yaml", peerAuthentication("foo", "DISABLE"))
	w.table("disabled in foo", func(from, to string) bool { return auto(from, to) && to != "foo" })
	w.apply("amber", "policy.yaml", peerAuthentication("istio-system", "STRICT"))
	w.table("strict everywhere", auto, "legacy->foo", "legacy->bar")
	w.apply("amber", "policy.yaml", peerAuthentication("istio-system", "STRICT")+"---\n"+peerAuthentication("bar", "PERMISSIVE"))
	w.table("strict everywhere but in bar", auto, "legacy->foo")
	w.remove("amber", "policy.yaml")
	w.table("permissive again", auto)
}
