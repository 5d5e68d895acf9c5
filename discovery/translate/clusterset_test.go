package translate

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// TestClusterSetNames: a host that clusters export is called by its other name, too, in HTTP and by gRPC clients.
func TestClusterSetNames(t *testing.T) {
	web := &mesh.Service{
		Host: "web.shop.global", Name: "web", Namespace: "shop", Global: true, VIPs: []netip.Addr{netip.MustParseAddr("240.0.0.1")}, Facts: &mesh.Facts{},
		Ports: []mesh.Port{{Name: "http", Number: 80, Protocol: mesh.HTTP}},
	}
	hand := &mesh.Service{Host: "hand.shop.global", Name: "entry", Namespace: "shop", Global: true, Ports: web.Ports}
	snap := &mesh.Snapshot{Local: &mesh.Cluster{ID: "amber", Network: "amber", TrustDomain: "amber.mesh"}, Services: []*mesh.Service{hand, web}}
	domains := func(kind mesh.ProxyType) (out []string) {
		p := &mesh.Proxy{ID: "p", Type: kind, Name: "client", Namespace: "shop", Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.1")}}
		r, _ := Translate(snap, p)
		for _, rc := range r.Routes {
			for _, h := range rc.VirtualHosts {
				out = append(out, h.Domains...)
			}
		}
		for _, l := range r.Listeners {
			out = append(out, l.Name)
		}
		return out
	}
	got := domains(mesh.Sidecar)
	for _, want := range []string{"web.shop.svc.clusterset.local", "web.shop.svc.clusterset.local:80", "web.shop.global", "240.0.0.1"} {
		if !slices.Contains(got, want) {
			t.Errorf("no domain %s in %v", want, got)
		}
	}
	if slices.Contains(got, "hand.shop.svc.clusterset.local") {
		t.Error("a host that nobody exports has a name of the cluster set")
	}
	if got := domains(mesh.Proxyless); !slices.Contains(got, "web.shop.svc.clusterset.local:80") {
		t.Errorf("listeners of a gRPC client: %v", got)
	}
}
