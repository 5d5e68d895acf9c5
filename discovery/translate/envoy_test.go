package translate_test

import (
	"encoding/json"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/isthmus-mesh/isthmus/discovery/translate"
	"github.com/isthmus-mesh/isthmus/internal/envoytest"
)

// staticBootstrap turns resources into one file that Envoy can check without a control plane: what would come over the
// stream stands in the file. Nothing else is changed.
func staticBootstrap(t *testing.T, r translate.Resources) map[string]any {
	t.Helper()
	routes, assignments := map[string]*routev3.RouteConfiguration{}, map[string]*endpointv3.ClusterLoadAssignment{}
	for _, x := range r.Routes {
		routes[x.Name] = x
	}
	for _, x := range r.Endpoints {
		assignments[x.ClusterName] = x
	}
	var inline func(x any) any
	inline = func(x any) any {
		switch x := x.(type) {
		case []any:
			for i := range x {
				x[i] = inline(x[i])
			}
		case map[string]any:
			delete(x, "sds_config") // the secret of that name stands in the file
			if rds, ok := x["rds"].(map[string]any); ok {
				delete(x, "rds")
				x["route_config"] = toMap(t, routes[rds["route_config_name"].(string)])
			}
			if _, ok := x["eds_cluster_config"]; ok {
				delete(x, "eds_cluster_config")
				x["type"], x["load_assignment"] = "STATIC", toMap(t, assignments[x["name"].(string)])
			}
			for k := range maps.Clone(x) {
				x[k] = inline(x[k])
			}
		}
		return x
	}
	cert, key := newAuthority(t).issue(t, "spiffe://amber.mesh/ns/default/sa/bookstore")
	static := map[string]any{
		"secrets":   append(toMaps(t, r.Secrets), toMap(t, certificateSecret(cert, key))),
		"clusters":  inline(toMaps(t, r.Clusters)),
		"listeners": inline(toMaps(t, r.Listeners)),
	}
	return map[string]any{
		"node":                 map[string]any{"id": "test", "cluster": "test"},
		"bootstrap_extensions": []any{internalListenerExtension()},
		"static_resources":     static,
	}
}

func internalListenerExtension() any {
	return map[string]any{"name": "envoy.bootstrap.internal_listener", "typed_config": map[string]any{
		"@type": "type.googleapis.com/envoy.extensions.bootstrap.internal_listener.v3.InternalListener",
	}}
}

func certificateSecret(cert, key []byte) *tlsv3.Secret {
	return &tlsv3.Secret{Name: "default", Type: &tlsv3.Secret_TlsCertificate{TlsCertificate: &tlsv3.TlsCertificate{
		CertificateChain: &corev3.DataSource{Specifier: &corev3.DataSource_InlineBytes{InlineBytes: cert}},
		PrivateKey:       &corev3.DataSource{Specifier: &corev3.DataSource_InlineBytes{InlineBytes: key}},
	}}}
}

func toMap(t *testing.T, m proto.Message) map[string]any {
	t.Helper()
	text, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	var out map[string]any
	if err := json.Unmarshal(text, &out); err != nil {
		t.Fatal(err)
	}
	return out
}

func toMaps[T proto.Message](t *testing.T, list []T) []any {
	t.Helper()
	var out []any
	for _, m := range list {
		out = append(out, toMap(t, m))
	}
	return out
}

func writeJSON(t *testing.T, name string, content any) string {
	t.Helper()
	text, err := json.MarshalIndent(content, "", " ")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, text, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestEnvoyAccepts(t *testing.T) {
	envoy := envoytest.Path(t)
	for _, name := range []string{"sidecar", "ingress"} {
		t.Run(name, func(t *testing.T) {
			r, _ := translate.Translate(bookstore(), proxies()[name])
			for _, c := range r.Clusters { // the rule names a file that is not here
				if strings.HasSuffix(c.Name, "|80||bank.example.com") {
					c.TransportSocket = nil
				}
			}
			path := writeJSON(t, "envoy.json", staticBootstrap(t, r))
			out, err := exec.Command(envoy, "--mode", "validate", "-c", path).CombinedOutput()
			if err != nil {
				t.Fatalf("envoy refuses the resources: %v\n%s", err, tail(out))
			}
		})
	}
}

func tail(out []byte) string {
	lines := strings.Split(string(out), "\n")
	return strings.Join(lines[max(0, len(lines)-12):], "\n")
}

// TestNamesResolve checks that everything a resource refers to is served with it.
func TestNamesResolve(t *testing.T) {
	for name, p := range proxies() {
		r, _ := translate.Translate(bookstore(), p)
		known := map[string]bool{}
		for _, c := range r.Clusters {
			known[c.Name] = true
		}
		served := map[string]bool{}
		for _, e := range r.Endpoints {
			served[e.ClusterName] = true
		}
		for _, c := range r.Clusters {
			if (c.GetType() == clusterv3.Cluster_EDS) != served[c.Name] {
				t.Errorf("%s: cluster %s and its endpoints do not go together", name, c.Name)
			}
		}
		listeners := map[string]bool{}
		for _, l := range r.Listeners {
			listeners[l.Name] = true
		}
		for _, e := range r.Endpoints {
			for _, g := range e.Endpoints {
				for _, lb := range g.LbEndpoints {
					if a := lb.GetEndpoint().GetAddress().GetEnvoyInternalAddress().GetServerListenerName(); a != "" && !(listeners[a] && known[a]) {
						t.Errorf("%s: endpoint of %s leads to %s, which is not served", name, e.ClusterName, a)
					}
				}
			}
		}
		for _, rc := range r.Routes {
			for _, c := range routeClusters(rc) {
				if !known[c] {
					t.Errorf("%s: route table %s leads to cluster %s, which is not served", name, rc.Name, c)
				}
			}
		}
	}
}

func routeClusters(rc *routev3.RouteConfiguration) (out []string) {
	for _, h := range rc.VirtualHosts {
		for _, r := range h.Routes {
			if c := r.GetRoute().GetCluster(); c != "" {
				out = append(out, c)
			}
			for _, w := range r.GetRoute().GetWeightedClusters().GetClusters() {
				out = append(out, w.Name)
			}
			for _, m := range r.GetRoute().GetRequestMirrorPolicies() {
				out = append(out, m.Cluster)
			}
		}
	}
	return out
}
