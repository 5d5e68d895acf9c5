package scope_test

import (
	"fmt"
	"testing"

	networking "istio.io/api/networking/v1"
	typev1beta1 "istio.io/api/type/v1beta1"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/translate/scope"
)

func TestVisible(t *testing.T) {
	for _, c := range []struct {
		exportTo, fallback []string
		reader             string
		want               bool
	}{
		{nil, nil, "b", true}, {nil, []string{"."}, "b", false}, {nil, []string{"."}, "a", true}, {[]string{"*"}, []string{"."}, "b", true},
		{[]string{"."}, nil, "a", true}, {[]string{"."}, nil, "b", false}, {[]string{"b", "c"}, nil, "c", true}, {[]string{"b"}, nil, "a", false}, {[]string{"~"}, nil, "a", false},
	} {
		if got := scope.Visible(c.exportTo, c.fallback, "a", c.reader); got != c.want {
			t.Errorf("exportTo %v, default %v, of a, seen from %s: %v", c.exportTo, c.fallback, c.reader, got)
		}
	}
}

func object(kind, ns, name string) mesh.ObjectRef {
	return mesh.ObjectRef{Kind: kind, Namespace: ns, Name: name}
}

// TestKey: proxies with equal keys see the same, and a Sidecar or a rule that selects one of them tells them apart.
func TestKey(t *testing.T) {
	snap := &mesh.Snapshot{
		Sidecars: []*mesh.SidecarConfig{
			{Object: object("Sidecar", "a", "all"), Spec: &networking.Sidecar{}},
			{Object: object("Sidecar", "a", "page"), Spec: &networking.Sidecar{WorkloadSelector: &networking.WorkloadSelector{Labels: map[string]string{"app": "page"}}}},
			{Object: object("Sidecar", "istio-system", "root"), Spec: &networking.Sidecar{}},
		},
		DestinationRules: []*mesh.DestinationRule{{Object: object("DestinationRule", "a", "sel"), Spec: &networking.DestinationRule{
			Host: "x.a", WorkloadSelector: &typev1beta1.WorkloadSelector{MatchLabels: map[string]string{"app": "pay"}},
		}}},
	}
	proxy := func(ns, app string) *mesh.Proxy {
		return &mesh.Proxy{Type: mesh.Sidecar, Namespace: ns, Labels: map[string]string{"app": app}}
	}
	keys := map[string]string{}
	for _, p := range []struct{ ns, app, sidecar string }{
		{"a", "page", "Sidecar/a/page"}, {"a", "pay", "Sidecar/a/all"}, {"a", "x", "Sidecar/a/all"}, {"b", "page", "Sidecar/istio-system/root"}, {"b", "pay", "Sidecar/istio-system/root"},
	} {
		if got := scope.For(snap, proxy(p.ns, p.app), nil).Sidecar.Object.String(); got != p.sidecar {
			t.Errorf("%s of %s has %s, want %s", p.app, p.ns, got, p.sidecar)
		}
		keys[p.ns+" "+p.app] = scope.Key(snap, proxy(p.ns, p.app))
	}
	if keys["b page"] != keys["b pay"] {
		t.Errorf("proxies of b see the same and have keys %q and %q", keys["b page"], keys["b pay"])
	}
	if keys["a page"] == keys["a x"] || keys["a pay"] == keys["a x"] || keys["a x"] == keys["b page"] {
		t.Errorf("proxies that see different things share a key: %q", keys)
	}
	router := &mesh.Proxy{Type: mesh.Router, Namespace: "a", Labels: map[string]string{"app": "page"}}
	if scope.For(snap, router, nil).Sidecar != nil {
		t.Error("a gateway has a Sidecar")
	}
}

// TestPolicy: settings of a port replace those of the host and of the subset whole; what they cannot say is inherited.
func TestPolicy(t *testing.T) {
	simple := func(s networking.LoadBalancerSettings_SimpleLB) *networking.LoadBalancerSettings {
		return &networking.LoadBalancerSettings{LbPolicy: &networking.LoadBalancerSettings_Simple{Simple: s}}
	}
	sub := &networking.Subset{Name: "v1", TrafficPolicy: &networking.TrafficPolicy{
		LoadBalancer:      simple(networking.LoadBalancerSettings_RANDOM),
		PortLevelSettings: []*networking.TrafficPolicy_PortTrafficPolicy{{Port: &networking.PortSelector{Number: 81}, OutlierDetection: &networking.OutlierDetection{}}},
	}}
	r := scope.Rule{Subsets: []*networking.Subset{sub}, Policy: &networking.TrafficPolicy{
		LoadBalancer: simple(networking.LoadBalancerSettings_ROUND_ROBIN), ConnectionPool: &networking.ConnectionPoolSettings{}, ProxyProtocol: &networking.TrafficPolicy_ProxyProtocol{},
	}}
	for _, c := range []struct {
		port   uint32
		subset *networking.Subset
		want   string
	}{
		{80, nil, "ROUND_ROBIN pool=true outlier=false proxy=true"}, {80, sub, "RANDOM pool=true outlier=false proxy=true"}, {81, sub, "UNSPECIFIED pool=false outlier=true proxy=true"},
	} {
		p := r.PolicyFor(c.port, c.subset)
		if got := fmt.Sprintf("%s pool=%v outlier=%v proxy=%v", p.GetLoadBalancer().GetSimple(), p.ConnectionPool != nil, p.OutlierDetection != nil, p.ProxyProtocol != nil); got != c.want {
			t.Errorf("port %d, subset %v: %s, want %s", c.port, c.subset.GetName(), got, c.want)
		}
	}
}
