package patch_test

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	networking "istio.io/api/networking/v1"

	"github.com/isthmus-mesh/isthmus/discovery/config"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/translate"
	"github.com/isthmus-mesh/isthmus/discovery/translate/patch"
	"github.com/isthmus-mesh/isthmus/internal/envoytest"
	"github.com/isthmus-mesh/isthmus/internal/golden"
)

// world is a workload with an HTTP port, a service that it calls, and a gateway.
func world(t *testing.T, objects []byte) *mesh.Snapshot {
	t.Helper()
	in, problems := config.Decode("objects.yaml", objects, config.Options{})
	if len(problems) > 0 {
		t.Fatal(golden.Lines(problems))
	}
	local := &mesh.Cluster{ID: "amber", TrustDomain: "amber.mesh", Network: "amber"}
	service := func(name, workload, address string, vip string) *mesh.Service {
		return &mesh.Service{
			Host: mesh.LocalHost(name, "shop"), Name: name, Namespace: "shop", Object: mesh.ObjectRef{Kind: "Service", Namespace: "shop", Name: name},
			Ports: []mesh.Port{{Name: "http", Number: 80, Protocol: mesh.HTTP, Target: 8080}}, VIPs: []netip.Addr{netip.MustParseAddr(vip)},
			Endpoints: []*mesh.Endpoint{{Workload: workload, Namespace: "shop", Cluster: "amber", Network: "amber", Address: address, Ready: true}},
		}
	}
	return &mesh.Snapshot{
		Local: local, Clusters: []*mesh.Cluster{local}, Services: []*mesh.Service{service("pay", "pay-1", "10.0.0.2", "10.96.0.2"), service("web", "web-1", "10.0.0.1", "10.96.0.1")},
		EnvoyFilters: in.EnvoyFilters,
		Gateways: []*mesh.Gateway{{Object: mesh.ObjectRef{Kind: "Gateway", Namespace: "shop", Name: "edge"}, Spec: &networking.Gateway{
			Selector: map[string]string{"istio": "ingressgateway"}, Servers: []*networking.Server{{Port: &networking.Port{Number: 80, Protocol: "HTTP", Name: "http"}, Hosts: []string{"*"}}},
		}}},
	}
}

func proxies() map[string]*mesh.Proxy {
	return map[string]*mesh.Proxy{
		"sidecar": {
			Type: mesh.Sidecar, Name: "web-1", Namespace: "shop", Cluster: "amber", Domain: "shop.svc.cluster.local", Version: "1.31.0", Metadata: map[string]string{"TIER": "gold"},
			Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.1")}, Labels: map[string]string{"app": "web"},
		},
		"gateway": {
			Type: mesh.Router, Name: "edge-1", Namespace: "shop", Cluster: "amber", Domain: "shop.svc.cluster.local",
			Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.9")}, Labels: map[string]string{"istio": "ingressgateway"},
		},
	}
}

// TestGolden: each case has EnvoyFilters, and for each proxy how the resources that they touch differ.
func TestGolden(t *testing.T) {
	for _, c := range golden.Cases(t, "testdata/*.txtar") {
		t.Run(c.Name, func(t *testing.T) {
			snap := world(t, c.File("objects.yaml"))
			for name, p := range proxies() {
				before, _ := translate.Translate(snap, p)
				r := patch.Apply(snap, p, before, nil)
				c.Want(t, name+".diff", difference(t, before, r.Resources))
				c.Want(t, name+"/touched.txt", touched(r))
				c.Want(t, name+"/problems.txt", golden.Lines(r.Problems))
				again, _ := translate.Translate(snap, p)
				if !same(t, before, again) {
					t.Errorf("%s: resources were written to", name)
				}
				if len(r.Touched) > 0 {
					validate(t, r.Resources)
				}
			}
		})
	}
}

func touched(r patch.Result) string {
	var lines []string
	for x, filters := range r.Touched {
		line := string(x.Kind) + " " + x.Name + ":"
		for _, f := range filters {
			line += " " + f.Object.Namespace + "/" + f.Object.Name
		}
		lines = append(lines, line)
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

func same(t *testing.T, a, b translate.Resources) bool {
	return maps.Equal(texts(t, a), texts(t, b))
}

// texts are all resources by kind and name.
func texts(t *testing.T, r translate.Resources) map[string]string {
	out := map[string]string{}
	add := func(kind, name string, m proto.Message) { out[kind+" "+name] = golden.ProtoJSON(t, []proto.Message{m}) }
	for _, x := range r.Clusters {
		add("cluster", x.Name, x)
	}
	for _, x := range r.Listeners {
		add("listener", x.Name, x)
	}
	for _, x := range r.Routes {
		add("route", x.Name, x)
	}
	for _, x := range r.Extensions {
		add("extension", x.Name, x)
	}
	return out
}

// difference lists the lines that came and went, by resource.
func difference(t *testing.T, before, after translate.Resources) string {
	was, is := texts(t, before), texts(t, after)
	var out strings.Builder
	all := maps.Clone(was)
	maps.Copy(all, is)
	for _, name := range slices.Sorted(maps.Keys(all)) {
		if was[name] == is[name] {
			continue
		}
		fmt.Fprintf(&out, "%s\n", name)
		a, b := strings.Split(was[name], "\n"), strings.Split(is[name], "\n")
		// Longest common lines, for resources are small.
		n, m := len(a), len(b)
		best := make([][]int, n+1)
		for i := range best {
			best[i] = make([]int, m+1)
		}
		for i := n - 1; i >= 0; i-- {
			for j := m - 1; j >= 0; j-- {
				if a[i] == b[j] {
					best[i][j] = best[i+1][j+1] + 1
				} else {
					best[i][j] = max(best[i+1][j], best[i][j+1])
				}
			}
		}
		for i, j := 0, 0; i < n || j < m; {
			switch {
			case i < n && j < m && a[i] == b[j]:
				i, j = i+1, j+1
			case j < m && (i == n || best[i][j+1] >= best[i+1][j]):
				fmt.Fprintf(&out, "+ %s\n", b[j])
				j++
			default:
				fmt.Fprintf(&out, "- %s\n", a[i])
				i++
			}
		}
	}
	return out.String()
}

func toMaps[T proto.Message](t *testing.T, list []T) (out []any) {
	t.Helper()
	for _, m := range list {
		text, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(m)
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

// validate lets Envoy read the resources from one file: what would come over the stream stands in it.
func validate(t *testing.T, r translate.Resources) {
	t.Helper()
	routes := map[string]any{}
	for i, x := range toMaps(t, r.Routes) {
		routes[r.Routes[i].Name] = x
	}
	extensions := map[string]any{}
	for i, x := range toMaps(t, r.Extensions) {
		extensions[r.Extensions[i].Name] = x.(map[string]any)["typed_config"]
	}
	var inline func(x any) any
	inline = func(x any) any {
		switch x := x.(type) {
		case []any:
			for i := range x {
				x[i] = inline(x[i])
			}
		case map[string]any:
			if rds, ok := x["rds"].(map[string]any); ok {
				delete(x, "rds")
				x["route_config"] = routes[rds["route_config_name"].(string)]
			}
			if _, ok := x["config_discovery"]; ok {
				delete(x, "config_discovery")
				x["typed_config"] = extensions[x["name"].(string)]
			}
			if _, ok := x["eds_cluster_config"]; ok {
				delete(x, "eds_cluster_config")
				x["type"] = "STATIC"
			}
			if s, ok := x["transport_socket"].(map[string]any); ok && strings.HasSuffix(fmt.Sprint(s["name"]), ".tls") {
				delete(x, "transport_socket") // certificates come from an agent
			}
			for k := range maps.Clone(x) {
				x[k] = inline(x[k])
			}
		}
		return x
	}
	text, err := json.Marshal(map[string]any{
		"node": map[string]any{"id": "test", "cluster": "test"},
		"static_resources": map[string]any{
			"clusters": inline(toMaps(t, r.Clusters)), "listeners": inline(toMaps(t, r.Listeners)),
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "envoy.json")
	if err := os.WriteFile(path, text, 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(envoytest.Path(t), "--mode", "validate", "-c", path).CombinedOutput()
	if err != nil {
		t.Errorf("envoy refuses the resources: %v\n%s", err, out[max(0, len(out)-1500):])
	}
}

// TestSkip: what is to be left out leaves no trace, and the others stay.
func TestSkip(t *testing.T) {
	snap := world(t, []byte(`
apiVersion: networking.istio.io/v1alpha3
kind: EnvoyFilter
metadata: {name: a, namespace: shop}
spec: {configPatches: [{applyTo: CLUSTER, match: {cluster: {service: pay.shop.svc.cluster.local}}, patch: {operation: MERGE, value: {connect_timeout: 1s}}}]}
---
apiVersion: networking.istio.io/v1alpha3
kind: EnvoyFilter
metadata: {name: b, namespace: shop}
spec: {configPatches: [{applyTo: CLUSTER, match: {cluster: {service: pay.shop.svc.cluster.local}}, patch: {operation: MERGE, value: {per_connection_buffer_limit_bytes: 77}}}]}
`))
	p := proxies()["sidecar"]
	before, _ := translate.Translate(snap, p)
	r := patch.Apply(snap, p, before, func(f *mesh.EnvoyFilter) bool { return f.Object.Name == "a" })
	i := slices.IndexFunc(r.Clusters, func(c *clusterv3.Cluster) bool { return c.Name == "outbound|80||pay.shop.svc.cluster.local" })
	if c := r.Clusters[i]; c.GetPerConnectionBufferLimitBytes().GetValue() != 77 || c.GetConnectTimeout().GetSeconds() == 1 {
		t.Errorf("got %v", c)
	}
	if r := patch.Apply(snap, p, before, func(*mesh.EnvoyFilter) bool { return true }); len(r.Touched) > 0 || !same(t, before, r.Resources) {
		t.Errorf("everything is left out and %v was touched", r.Touched)
	}
}

// TestFacts: only what an EnvoyFilter asks for tells proxies apart.
func TestFacts(t *testing.T) {
	snap := world(t, []byte(`
apiVersion: networking.istio.io/v1alpha3
kind: EnvoyFilter
metadata: {name: a, namespace: shop}
spec: {configPatches: [{applyTo: CLUSTER, match: {proxy: {metadata: {TIER: gold}}}, patch: {operation: REMOVE}}]}
`))
	gold, silver := *proxies()["sidecar"], *proxies()["sidecar"]
	silver.Metadata = map[string]string{"TIER": "silver"}
	other := gold
	other.Version, other.Metadata = "2", map[string]string{"TIER": "gold", "X": "y"}
	if patch.Facts(snap, &gold) == patch.Facts(snap, &silver) || patch.Facts(snap, &gold) != patch.Facts(snap, &other) {
		t.Errorf("%s, %s, %s", patch.Facts(snap, &gold), patch.Facts(snap, &silver), patch.Facts(snap, &other))
	}
}
