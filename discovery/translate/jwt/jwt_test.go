package jwt_test

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	security "istio.io/api/security/v1"

	"github.com/isthmus-mesh/isthmus/discovery/config"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/translate/jwt"
	"github.com/isthmus-mesh/isthmus/internal/envoytest"
	"github.com/isthmus-mesh/isthmus/internal/golden"
)

var reviews = &mesh.Proxy{Type: mesh.Sidecar, Name: "reviews-1", Namespace: "shop", Labels: map[string]string{"app": "reviews"}}

// TestGolden: each case has objects, and the filter and clusters that come of them.
func TestGolden(t *testing.T) {
	for _, c := range golden.Cases(t, "testdata/*.txtar") {
		t.Run(c.Name, func(t *testing.T) {
			in, problems := config.Decode("objects.yaml", c.File("objects.yaml"), config.Options{})
			if len(problems) > 0 {
				t.Fatal(golden.Lines(problems))
			}
			snap := &mesh.Snapshot{Local: &mesh.Cluster{ID: "amber"}, RequestAuthentications: in.RequestAuthentications}
			for _, d := range in.Services {
				snap.Services = append(snap.Services, &mesh.Service{Host: d.Hosts[0], Ports: d.Ports})
			}
			f, clusters, problems := jwt.Filter(snap, reviews)
			var filters []*hcmv3.HttpFilter
			if f != nil {
				filters = append(filters, f)
			}
			c.Want(t, "filter.json", golden.ProtoJSON(t, filters))
			c.Want(t, "clusters.json", golden.ProtoJSON(t, clusters))
			c.Want(t, "problems.txt", golden.Lines(problems))
			if f != nil {
				validate(t, f, clusters)
			}
		})
	}
}

func toMap(t *testing.T, m proto.Message) (v map[string]any) {
	t.Helper()
	text, err := protojson.Marshal(m)
	if err == nil {
		err = json.Unmarshal(text, &v)
	}
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func validate(t *testing.T, f *hcmv3.HttpFilter, clusters []*clusterv3.Cluster) {
	t.Helper()
	var all []any
	for _, c := range clusters {
		all = append(all, toMap(t, c))
	}
	config := map[string]any{"static_resources": map[string]any{"clusters": all, "listeners": []any{map[string]any{
		"name": "in", "address": map[string]any{"socket_address": map[string]any{"address": "127.0.0.1", "port_value": 0}},
		"filter_chains": []any{map[string]any{"filters": []any{map[string]any{"name": "hcm", "typed_config": map[string]any{
			"@type":       "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
			"stat_prefix": "in", "route_config": map[string]any{},
			"http_filters": []any{toMap(t, f), map[string]any{"name": "envoy.filters.http.router", "typed_config": map[string]any{"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}}},
		}}}}},
	}}}}
	text, err := json.Marshal(config)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "envoy.json")
	if err := os.WriteFile(path, text, 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(envoytest.Path(t), "--mode", "validate", "-c", path).CombinedOutput()
	if err != nil || strings.Contains(string(out), "eprecated") {
		t.Errorf("envoy refuses the filter, or warns: %v\n%s", err, out[:min(len(out), 3000)])
	}
}

// TestKeys: of keys in the object those are kept that Envoy takes, for it refuses a whole listener over the others.
func TestKeys(t *testing.T) {
	good := `{"kty":"EC","crv":"P-256","x":"f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU","y":"x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0"}`
	for _, c := range []struct {
		jwks string
		keys int
	}{
		{`{"keys":[` + good + `]}`, 1},
		{good, 1},
		{`{"keys":[]}`, 0},
		{`{"keys":[{"kty":"EC","crv":"P-256","x":"AQ","y":"AQ"},` + good + `]}`, 1},
		{`{"keys":[{"kty":"RSA","n":"AQAB","e":"AQAB"}]}`, 0},
		{`{"keys":[{"kty":"RSA","n":"*","e":"AQAB"}]}`, 0},
		{`{"keys":[{"kty":"RSA","alg":"ES256","n":"` + strings.Repeat("qqqr", 100) + `","e":"AQAB"}]}`, 0},
		{`{"keys":[{"kty":"RSA","alg":"RS256","n":"` + strings.Repeat("qqqr", 100) + `","e":"AQAB"}]}`, 1},
		{`{"keys":[{"kty":"OKP","crv":"Ed25519","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}]}`, 1},
		{`{"keys":[{"kty":"oct","k":"c2VjcmV0"}]}`, 1},
		{`{"keys":[{"kty":"new"},7]}`, 0},
	} {
		snap := &mesh.Snapshot{RequestAuthentications: []*mesh.RequestAuthentication{{
			Object: mesh.ObjectRef{Kind: "RequestAuthentication", Namespace: "shop", Name: "x"},
			Spec:   &security.RequestAuthentication{JwtRules: []*security.JWTRule{{Issuer: "i", Jwks: c.jwks}}},
		}}}
		f, _, problems := jwt.Filter(snap, reviews)
		if (len(problems) == 0) != (c.keys > 0) {
			t.Errorf("%s: problems %v", c.jwks, problems)
		}
		if n := strings.Count(f.String(), `kty`); n != max(c.keys, 1) {
			t.Errorf("%s: %d keys, want %d: %v", c.jwks, n, c.keys, f)
		}
		validate(t, f, nil)
	}
}
