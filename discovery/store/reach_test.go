package store

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// TestOwnAddresses: what the configuration does not say of the local cluster its own objects tell, and they may change.
func TestOwnAddresses(t *testing.T) {
	gateway := func(address string, port uint32, of mesh.ClusterID) mesh.NetworkGateway {
		return mesh.NetworkGateway{Object: mesh.ObjectRef{Kind: "Service", Namespace: "istio-system", Name: "istio-eastwestgateway"}, Address: address, Port: port, Cluster: of}
	}
	networks := func(gs ...mesh.NetworkGateway) mesh.Input {
		return mesh.Input{Networks: []*mesh.Network{{ID: "amber", Gateways: gs}, {ID: "other", Gateways: []mesh.NetworkGateway{gateway("192.0.2.77", 15443, "")}}}}
	}
	control := service("isthmusd", mesh.Port{Name: "tls-xds", Number: 15012, Protocol: mesh.TLS})
	control.Object.Namespace, control.Hosts = "istio-system", []string{"isthmusd.istio-system.svc.cluster.local"}
	control.Addresses = ips("10.96.0.12")
	objects := mesh.Input{Services: []*mesh.ServiceDecl{control}}
	cfg := DefaultConfig(&mesh.Cluster{ID: "amber", TrustDomain: "amber.mesh", Network: "amber"})
	cfg.ControlPlaneHost = "isthmusd.istio-system.svc.cluster.local"
	b := newBuilder(cfg)
	first := b.build([]mesh.Input{objects, networks(gateway("192.0.2.9", 15443, "amber"), gateway("192.0.2.1", 15443, ""), gateway("192.0.2.5", 15443, "birch"), gateway("gw.example.com", 15443, "amber"))}, nil)
	want := []netip.AddrPort{netip.MustParseAddrPort("192.0.2.1:15443"), netip.MustParseAddrPort("192.0.2.9:15443")}
	if !slices.Equal(first.Local.Gateways, want) || first.Cluster("amber") != first.Local {
		t.Errorf("gateways %v, want %v; among the clusters: %v", first.Local.Gateways, want, first.Cluster("amber"))
	}
	if got := first.Local.ControlPlane; !slices.Equal(got, []netip.AddrPort{netip.MustParseAddrPort("10.96.0.12:15012")}) {
		t.Errorf("control plane %v", got)
	}
	same := b.build([]mesh.Input{objects, networks(gateway("192.0.2.9", 15443, "amber"), gateway("192.0.2.1", 15443, "amber"))}, nil)
	if same.Local != first.Local {
		t.Error("equal addresses gave another local cluster")
	}
	moved := b.build([]mesh.Input{objects, networks(gateway("192.0.2.10", 443, "amber"))}, nil)
	if got := moved.Local.Gateways; !slices.Equal(got, []netip.AddrPort{netip.MustParseAddrPort("192.0.2.10:443")}) {
		t.Errorf("after the move: %v", got)
	}
	if gone := b.build(nil, nil); len(gone.Local.Gateways)+len(gone.Local.ControlPlane) != 0 || gone.Local != cfg.Local {
		t.Errorf("without objects: %+v", gone.Local)
	}

	cfg.Local = &mesh.Cluster{ID: "amber", TrustDomain: "amber.mesh", Network: "amber", Gateways: want[:1], ControlPlane: want[1:]}
	if told := newBuilder(cfg).build([]mesh.Input{objects, networks(gateway("192.0.2.10", 443, "amber"))}, nil); told.Local != cfg.Local {
		t.Errorf("what the configuration says does not count: %+v", told.Local)
	}
}
