package translate_test

import (
	"strings"
	"testing"

	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	meshconfig "istio.io/api/mesh/v1alpha1"
	security "istio.io/api/security/v1"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/translate"
)

// guarded is the bookstore with a policy for all, tokens, and the mesh's word on paths.
func guarded(paths meshconfig.MeshConfig_ProxyPathNormalization_NormalizationType) *mesh.Snapshot {
	snap := bookstore()
	snap.AuthorizationPolicies = []*mesh.AuthorizationPolicy{{
		Object: mesh.ObjectRef{Kind: "AuthorizationPolicy", Namespace: "istio-system", Name: "all"},
		Spec:   &security.AuthorizationPolicy{Rules: []*security.Rule{{From: []*security.Rule_From{{Source: &security.Source{Principals: []string{"*"}}}}}}},
	}}
	snap.RequestAuthentications = []*mesh.RequestAuthentication{{
		Object: mesh.ObjectRef{Kind: "RequestAuthentication", Namespace: "istio-system", Name: "all"},
		Spec:   &security.RequestAuthentication{JwtRules: []*security.JWTRule{{Issuer: "i", JwksUri: "http://keys.example.com/"}}},
	}}
	snap.MeshConfig = &mesh.MeshConfig{Spec: &meshconfig.MeshConfig{PathNormalization: &meshconfig.MeshConfig_ProxyPathNormalization{Normalization: paths}}}
	return snap
}

// TestGuards: nothing comes to a workload, or in at a gateway, past the policies; what goes out is not asked.
func TestGuards(t *testing.T) {
	for _, name := range []string{"sidecar", "ingress"} {
		r, problems := translate.Translate(guarded(0), proxies()[name])
		for _, p := range problems {
			if p.Object.Kind == "AuthorizationPolicy" || p.Object.Kind == "RequestAuthentication" {
				t.Error(p)
			}
		}
		asked := 0
		for _, l := range r.Listeners {
			comesIn := l.Name == "virtualInbound" || name == "ingress" && strings.HasPrefix(l.Name, "0.0.0.0_")
			for _, c := range l.FilterChains {
				text := c.String()
				guarded := strings.Contains(text, "envoy.filters.network.rbac") ||
					strings.Contains(text, "envoy.filters.http.rbac") && strings.Contains(text, "envoy.filters.http.jwt_authn")
				if c.Name == "loop" {
					continue
				}
				if guarded {
					asked++
				}
				if guarded != comesIn {
					t.Errorf("%s: %s of %s has a guard: %v", name, c.Name, l.Name, guarded)
				}
			}
		}
		if asked == 0 {
			t.Errorf("%s: nothing is asked", name)
		}
		found := false
		for _, c := range r.Clusters {
			found = found || c.Name == "keys|http|80|keys.example.com"
		}
		if !found {
			t.Errorf("%s: no cluster for the keys", name)
		}
		for _, c := range r.Clusters { // the rule names a file that is not here
			if strings.HasSuffix(c.Name, "|80||bank.example.com") {
				c.TransportSocket = nil
			}
		}
		if !testing.Short() {
			validate(t, r)
		}
	}
	// A workload's own part has the same guards as the whole.
	snap, p := guarded(0), proxies()["sidecar"]
	own := translate.Own(snap, p, nil)
	if text := own.Listeners[0].String(); !strings.Contains(text, "envoy.filters.network.rbac") {
		t.Error("the workload's own listener asks nobody")
	}
}

func TestPathNormalization(t *testing.T) {
	for kind, want := range map[meshconfig.MeshConfig_ProxyPathNormalization_NormalizationType][3]bool{ // normalized, slashes merged, escaped ones read
		meshconfig.MeshConfig_ProxyPathNormalization_DEFAULT: {true, false, false}, meshconfig.MeshConfig_ProxyPathNormalization_NONE: {false, false, false},
		meshconfig.MeshConfig_ProxyPathNormalization_BASE: {true, false, false}, meshconfig.MeshConfig_ProxyPathNormalization_MERGE_SLASHES: {true, true, false},
		meshconfig.MeshConfig_ProxyPathNormalization_DECODE_AND_MERGE_SLASHES: {true, true, true},
	} {
		r, _ := translate.Translate(guarded(kind), proxies()["ingress"])
		m := managerOf(t, r.Listeners[0])
		got := [3]bool{m.GetNormalizePath().GetValue(), m.GetMergeSlashes(), m.GetPathWithEscapedSlashesAction() == hcmv3.HttpConnectionManager_UNESCAPE_AND_FORWARD}
		if got != want {
			t.Errorf("%s: got %v, want %v", kind, got, want)
		}
	}
}

func managerOf(t *testing.T, l *listenerv3.Listener) *hcmv3.HttpConnectionManager {
	t.Helper()
	m := &hcmv3.HttpConnectionManager{}
	if err := l.FilterChains[0].Filters[0].GetTypedConfig().UnmarshalTo(m); err != nil {
		t.Fatal(err)
	}
	return m
}
