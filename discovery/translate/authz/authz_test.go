package authz_test

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/isthmus-mesh/isthmus/discovery/config"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/translate/authz"
	"github.com/isthmus-mesh/isthmus/internal/envoytest"
	"github.com/isthmus-mesh/isthmus/internal/golden"
)

// snapshot is the mesh of objects.yaml: the cluster amber, and birch as a peer. Services come as host names.
func snapshot(t *testing.T, objects []byte) *mesh.Snapshot {
	t.Helper()
	in, problems := config.Decode("objects.yaml", objects, config.Options{TrustDomain: "amber.mesh"})
	problems = slices.DeleteFunc(problems, func(p mesh.Problem) bool {
		return strings.HasPrefix(p.Field, "data.mesh.extensionProviders[") || p.Object.Name == "wrong" // cases of what is wrong say so
	})
	if len(problems) > 0 {
		t.Fatal(golden.Lines(problems))
	}
	snap := &mesh.Snapshot{
		Local:                 &mesh.Cluster{ID: "amber", TrustDomain: "amber.mesh"},
		AuthorizationPolicies: in.AuthorizationPolicies, RequestAuthentications: in.RequestAuthentications,
	}
	snap.Clusters = []*mesh.Cluster{snap.Local, {ID: "birch", TrustDomain: "birch.mesh"}}
	if len(in.MeshConfigs) > 0 {
		snap.MeshConfig = in.MeshConfigs[0]
	}
	for _, d := range in.Services {
		snap.Services = append(snap.Services, &mesh.Service{Host: d.Hosts[0], Ports: d.Ports})
	}
	slices.SortFunc(snap.AuthorizationPolicies, func(a, b *mesh.AuthorizationPolicy) int {
		return strings.Compare(a.Object.String(), b.Object.String())
	})
	slices.SortFunc(snap.Services, func(a, b *mesh.Service) int { return strings.Compare(a.Host, b.Host) })
	return snap
}

// proxies are those that cases may be for.
var proxies = map[string]*mesh.Proxy{
	"sidecar": {Type: mesh.Sidecar, Name: "reviews-1", Namespace: "shop", Labels: map[string]string{"app": "reviews"}},
	"gateway": {Type: mesh.Router, Name: "edge-1", Namespace: "edge", Labels: map[string]string{"gateway.networking.k8s.io/gateway-name": "edge"}},
}

// TestGolden: each case has objects, and for each proxy the filters that come of them.
func TestGolden(t *testing.T) {
	for _, c := range golden.Cases(t, "testdata/*.txtar") {
		t.Run(c.Name, func(t *testing.T) {
			for name, p := range proxies {
				if strings.Contains(c.Comment, "Not at the "+name) {
					continue
				}
				snap := snapshot(t, c.File("objects.yaml"))
				f, problems := authz.For(snap, p)
				c.Want(t, name+"/http.json", golden.ProtoJSON(t, f.HTTP))
				c.Want(t, name+"/tcp.json", golden.ProtoJSON(t, f.TCP))
				c.Want(t, name+"/problems.txt", golden.Lines(problems))
				if len(f.HTTP)+len(f.TCP) > 0 {
					validate(t, f)
				}
			}
		})
	}
}

// validate lets Envoy read the filters.
func validate(t *testing.T, f authz.Filters) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "envoy.json")
	text, err := json.Marshal(bootstrap(t, []any{httpListener(t, "http", 0, f), tcpListener(t, "tcp", 0, 1, f)}))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, text, 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(envoytest.Path(t), "--mode", "validate", "-c", path).CombinedOutput()
	if err != nil || strings.Contains(string(out), "eprecated") {
		t.Errorf("envoy refuses the filters, or warns: %v\n%s", err, out[:min(len(out), 3000)])
	}
}

func bootstrap(t *testing.T, listeners []any) map[string]any {
	t.Helper()
	var clusters []any
	for _, name := range []string{"outbound|8000||authz.shop.svc.cluster.local", "outbound|9000||authz.shop.svc.cluster.local"} {
		clusters = append(clusters, map[string]any{"name": name, "type": "STATIC", "load_assignment": map[string]any{"cluster_name": name}})
	}
	return map[string]any{
		"node":             map[string]any{"id": "test", "cluster": "test"},
		"static_resources": map[string]any{"listeners": listeners, "clusters": clusters},
	}
}

func toAny[T proto.Message](t *testing.T, list []T) (out []any) {
	t.Helper()
	for _, m := range list {
		text, err := protojson.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		var v any
		if err := json.Unmarshal(text, &v); err != nil {
			t.Fatal(err)
		}
		out = append(out, v)
	}
	return out
}

func address(port int) any {
	return map[string]any{"socket_address": map[string]any{"address": "127.0.0.1", "port_value": port}}
}

// httpListener answers 200 to what the filters let pass.
func httpListener(t *testing.T, name string, port int, f authz.Filters) map[string]any {
	filters := append(toAny(t, f.HTTP), map[string]any{"name": "envoy.filters.http.router", "typed_config": map[string]any{
		"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router",
	}})
	return map[string]any{"name": name, "address": address(port), "filter_chains": []any{map[string]any{"filters": []any{map[string]any{
		"name": "envoy.filters.network.http_connection_manager", "typed_config": map[string]any{
			"@type":       "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
			"stat_prefix": name, "normalize_path": true, "http_filters": filters,
			"route_config": map[string]any{"virtual_hosts": []any{map[string]any{
				"name": "all", "domains": []any{"*"}, "routes": []any{map[string]any{
					"match": map[string]any{"prefix": "/"}, "direct_response": map[string]any{"status": 200, "body": map[string]any{"inline_string": "ok"}},
				}},
				"response_headers_to_add": []any{map[string]any{"header": map[string]any{"key": "x-details", "value": "%RESPONSE_CODE_DETAILS%"}}},
			}}},
			"local_reply_config": map[string]any{"mappers": []any{map[string]any{
				"filter":         map[string]any{"status_code_filter": map[string]any{"comparison": map[string]any{"op": "GE", "value": map[string]any{"default_value": 400, "runtime_key": "x"}}}},
				"headers_to_add": []any{map[string]any{"header": map[string]any{"key": "x-details", "value": "%RESPONSE_CODE_DETAILS%"}}},
			}}},
		},
	}}}}}
}

// tcpListener passes bytes on to another port of the machine.
func tcpListener(t *testing.T, name string, port, to int, f authz.Filters) map[string]any {
	filters := append(toAny(t, f.TCP), map[string]any{"name": "envoy.filters.network.tcp_proxy", "typed_config": map[string]any{
		"@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy", "stat_prefix": name, "cluster": "outbound|9000||authz.shop.svc.cluster.local",
	}})
	return map[string]any{"name": name, "address": address(port), "filter_chains": []any{map[string]any{"filters": filters}}}
}
