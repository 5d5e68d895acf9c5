package kube_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"github.com/isthmus-mesh/isthmus/discovery/identity"
)

// reader makes a service account that may read what a remote cluster is read for, and returns its client configuration.
func (c *cluster) reader(name string) *rest.Config {
	c.t.Helper()
	if _, err := c.Client().CoreV1().ServiceAccounts("istio-system").Create(context.Background(), &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{}); err != nil {
		c.t.Fatal(err)
	}
	c.allow("system:serviceaccount:istio-system:"+name, name, "/namespaces", "/nodes", "/pods", "/services", "discovery.k8s.io/endpointslices", "authentication.k8s.io/tokenreviews")
	return c.ServiceAccount("istio-system", name)
}

// TestRemote adds, rotates, loses and deletes a remote cluster.
func TestRemote(t *testing.T) {
	local, far := newCluster(t), newCluster(t)
	far.apply("apiVersion: v1\nkind: Namespace\nmetadata: {name: istio-system, labels: {topology.istio.io/network: far-net}}\n")
	far.apply(namespaceShop + "---\n" + byhand + "---\n" + podYAML("one", "10.2.0.1"))
	sink := newRecorder()
	s, _ := run(t, "amber", local.REST(), sink)
	sink.wait(t, 30*second, sink.isSynced)

	first := far.reader("first")
	way, first := through(t, first)
	local.apply(remoteSecret("istio-remote-secret-birch", "birch", kubeconfig(t, first)))
	t.Logf("added after %s", sink.wait(t, 10*second, sink.has("birch/pods/shop/one")))
	sink.wait(t, 10*second, sink.has("birch/cluster"))
	sink.wait(t, 10*second, sink.has("birch/endpointslices.discovery.k8s.io/shop/byhand-1"))
	in, _ := sink.get("birch/pods/shop/one")
	if w := in.Workloads[0]; w.Cluster != "birch" || w.Network != "far-net" || !w.TLS || !w.Ready || w.Object.Source != "cluster birch" {
		t.Errorf("the far Pod is %+v", w)
	}
	if in, _ := sink.get("birch/cluster"); len(in.Clusters) != 1 || !in.Clusters[0].Managed || in.Clusters[0].Network != "far-net" || in.Clusters[0].TrustDomain != "amber.mesh" {
		t.Errorf("the far cluster is %+v", in.Clusters)
	}
	for _, k := range sink.keys("birch/") {
		if strings.HasPrefix(k, "birch/secrets") || strings.HasPrefix(k, "birch/configmaps") {
			t.Errorf("%s is read in a remote cluster", k)
		}
	}

	// Tokens of the far cluster's accounts are reviewed there.
	if _, err := far.Client().CoreV1().ServiceAccounts("shop").Create(context.Background(), &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "caller"}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	token := far.Token("shop", "caller", "istio-ca")
	who, err := s.Review(t.Context(), "birch", token, "istio-ca")
	if err != nil || who.Username != "system:serviceaccount:shop:caller" {
		t.Errorf("review in birch: %+v, %v", who, err)
	}
	for _, id := range []string{"", "amber", "cedar"} {
		if _, err := s.Review(t.Context(), "", token, "istio-ca"); !errors.Is(err, identity.ErrToken) {
			t.Errorf("review in %q of a token of birch: %v", id, err)
		}
	}

	// Lost: kept and said.
	way.set(true)
	sink.wait(t, 15*second, sink.complains("Cluster/birch", "SourceLost", "stays in use"))
	if err := sink.has("birch/pods/shop/one")(); err != nil {
		t.Error(err)
	}
	far.apply(podYAML("two", "10.2.0.2"))

	// Rotated, by another address: reconnects, forgets nothing.
	local.apply(remoteSecret("istio-remote-secret-birch", "birch", kubeconfig(t, far.reader("second"))))
	sink.wait(t, 10*second, sink.has("birch/pods/shop/two"))
	sink.wait(t, 10*second, sink.content("SourceLost"))
	if reports, forgot := sink.counts(); forgot["birch/pods/shop/one"] > 0 || reports["birch/pods/shop/one"] != 1 {
		t.Errorf("rotation reported a Pod %d times and forgot it %d times", reports["birch/pods/shop/one"], forgot["birch/pods/shop/one"])
	}

	// A bad edit: said, and the connection made before goes on.
	local.apply(remoteSecret("istio-remote-secret-birch", "birch", "nonsense: ["))
	sink.wait(t, 10*second, sink.complains("Secret/istio-system/istio-remote-secret-birch", "BadRemoteSecret", "does not parse", "stays in use"))
	far.apply(podYAML("three", "10.2.0.3"))
	sink.wait(t, 10*second, sink.has("birch/pods/shop/three"))

	local.remove(remoteSecret("istio-remote-secret-birch", "birch", ""))
	took := sink.wait(t, 10*second, func() error {
		if left := sink.keys("birch/"); len(left) > 0 {
			return fmt.Errorf("still %v", left)
		}
		return nil
	})
	t.Logf("forgotten after %s", took)
	sink.wait(t, 10*second, sink.content("BadRemoteSecret"))
	if st := s.Status(); len(st) != 1 {
		t.Errorf("status still has %+v", st)
	}
}

// TestRemoteGateway reads the Gateways of a remote cluster that say where its network's gateway is, and no others.
func TestRemoteGateway(t *testing.T) {
	local, far := newCluster(t), newCluster(t)
	crds, err := os.ReadFile("../../../deploy/helm/isthmus/files/crds/gateway-api.yaml")
	if err != nil {
		t.Fatal(err)
	}
	far.apply(crd(t, string(crds), "gateways.gateway.networking.k8s.io"))
	gateway := func(name, class string) string {
		return "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {name: " + name + ", namespace: istio-system, labels: {topology.istio.io/network: far-net}}\n" +
			"spec: {gatewayClassName: " + class + ", addresses: [{type: IPAddress, value: 192.0.2.7}], listeners: [{name: cross, port: 15443, protocol: TLS, tls: {mode: Passthrough}}]}\n"
	}
	sink := newRecorder()
	run(t, "amber", local.REST(), sink)
	sink.wait(t, 30*second, sink.isSynced)
	who := far.reader("first")
	far.allow("system:serviceaccount:istio-system:first", "gateways", "gateway.networking.k8s.io/gateways")
	local.apply(remoteSecret("istio-remote-secret-birch", "birch", kubeconfig(t, who)))

	far.apply(gateway("eastwest", "istio-east-west") + "---\n" + gateway("ingress", "istio"))
	key := "birch/gateways.gateway.networking.k8s.io/istio-system/"
	sink.wait(t, 20*second, sink.has(key+"eastwest"))
	in, _ := sink.get(key + "eastwest")
	if len(in.Networks) != 1 || len(in.Gateways) != 0 {
		t.Fatalf("it says %+v", in)
	}
	if n := in.Networks[0]; n.ID != "far-net" || len(n.Gateways) != 1 || n.Gateways[0].Address != "192.0.2.7" || n.Gateways[0].Cluster != "birch" {
		t.Errorf("the network is %+v", n)
	}
	if in, _ := sink.get(key + "ingress"); len(in.Networks)+len(in.Problems) > 0 {
		t.Errorf("another gateway says %+v", in)
	}
	far.remove(gateway("eastwest", "istio-east-west"))
	sink.wait(t, 10*second, func() error {
		if in, ok := sink.get(key + "eastwest"); ok {
			return fmt.Errorf("still %+v", in)
		}
		return nil
	})
}

// TestBadRemoteSecrets has one of each kind beside a good one, which works.
func TestBadRemoteSecrets(t *testing.T) {
	local, far := newCluster(t), newCluster(t)
	far.apply(namespaceShop + "---\n" + podYAML("one", "10.2.0.1"))
	good := kubeconfig(t, far.reader("first"))
	wrong := far.ServiceAccount("istio-system", "first")
	wrong.BearerToken = "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJ4In0.c2VjcmV0c2VjcmV0"
	away := rest.CopyConfig(far.ServiceAccount("istio-system", "first"))
	away.Host = "https://127.0.0.1:1"
	sink := newRecorder()
	s, _ := run(t, "amber", local.REST(), sink)
	sink.wait(t, 30*second, sink.isSynced)
	local.apply(remoteSecret("b-good", "birch", good))
	sink.wait(t, 10*second, sink.has("birch/pods/shop/one"))
	for name, x := range map[string]struct{ key, kubeconfig string }{
		"c-own":     {"amber", good},
		"d-again":   {"birch", good},
		"e-broken":  {"cedar", "apiVersion: v1\nkind: Config\ncurrent-context: none\n"},
		"f-exec":    {"dune", strings.Replace(good, "    token:", "    exec: {apiVersion: client.authentication.k8s.io/v1, command: touch, interactiveMode: Never}\n    token:", 1)},
		"g-file":    {"elm", strings.Replace(good, "    token:", "    tokenFile: /etc/passwd\n    token:", 1)},
		"h-open":    {"fir", strings.Replace(good, "    server:", "    insecure-skip-tls-verify: true\n    server:", 1)},
		"i-name":    {"Not_A_Name", good},
		"j-token":   {"hazel", kubeconfig(t, wrong)},
		"k-away":    {"ivy", kubeconfig(t, away)},
		"l-plain":   {"juniper", strings.Replace(good, "https://", "http://", 1)},
		"m-nobody":  {"kauri", strings.Replace(good, "    token:", "    as: someone\n    x-token:", 1)},
		"n-authpro": {"larch", strings.Replace(good, "    token:", "    auth-provider: {name: gcp}\n    token:", 1)},
	} {
		local.apply(remoteSecret(name, x.key, x.kubeconfig))
	}
	for _, words := range [][]string{
		{"Secret/istio-system/c-own", "DuplicateCluster", "local cluster"},
		{"Secret/istio-system/d-again", "DuplicateCluster", "b-good"},
		{"Secret/istio-system/e-broken", "BadRemoteSecret", "no context"},
		{"Secret/istio-system/f-exec", "BadRemoteSecret", "exec", "run a program"},
		{"Secret/istio-system/g-file", "BadRemoteSecret", "tokenFile"},
		{"Secret/istio-system/h-open", "BadRemoteSecret", "insecure-skip-tls-verify"},
		{"Secret/istio-system/i-name", "BadRemoteSecret", "not the name of a cluster"},
		{"Cluster/hazel", "Unauthorized", "make the remote secret anew"},
		{"Cluster/ivy", "SourceLost", "127.0.0.1:1"},
		{"Secret/istio-system/l-plain", "BadRemoteSecret", "https://"},
		{"Secret/istio-system/m-nobody", "BadRemoteSecret", "no credentials"},
		{"Secret/istio-system/n-authpro", "BadRemoteSecret", "auth-provider"},
	} {
		sink.wait(t, 15*second, sink.complains(words...))
	}
	for _, p := range sink.problems() {
		if strings.Contains(p, "c2VjcmV0c2VjcmV0") || strings.Contains(p, wrong.BearerToken) {
			t.Errorf("a problem shows a credential: %s", p)
		}
	}
	var names []string
	for _, st := range s.Status() {
		names = append(names, string(st.Cluster))
	}
	if !slices.Equal(names, []string{"amber", "birch", "hazel", "ivy"}) {
		t.Errorf("clusters that are read: %v", names)
	}
	// The older secret goes: the other one takes over without a gap.
	local.remove(remoteSecret("b-good", "birch", ""))
	sink.wait(t, 10*second, sink.content("Secret/istio-system/d-again"))
	if _, forgot := sink.counts(); forgot["birch/pods/shop/one"] > 0 {
		t.Error("the Pod was forgotten while another secret stood for the cluster")
	}
	// Good credentials heal without a restart.
	local.apply(remoteSecret("j-token", "hazel", good))
	sink.wait(t, 10*second, sink.has("hazel/pods/shop/one"))
	sink.wait(t, 10*second, sink.content("Cluster/hazel"))
}
