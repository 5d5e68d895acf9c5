package topologies_test

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/topologies"
)

var (
	oneGate  = []netip.AddrPort{netip.MustParseAddrPort("192.0.2.1:15443")}
	twoGates = []netip.AddrPort{netip.MustParseAddrPort("192.0.2.2:15443"), netip.MustParseAddrPort("192.0.2.3:15443")}

	amber = &mesh.Cluster{ID: "amber", TrustDomain: "amber.mesh", Network: "net-a", Gateways: oneGate}
	birch = &mesh.Cluster{ID: "birch", TrustDomain: "birch.mesh", Network: "net-b", Gateways: twoGates}
	cedar = &mesh.Cluster{ID: "cedar", TrustDomain: "cedar.mesh", Network: "net-c"}                     // no gateway
	delta = &mesh.Cluster{ID: "delta", TrustDomain: "amber.mesh", Network: "net-a", Gateways: twoGates} // flat with amber, its own gateways
	elder = &mesh.Cluster{ID: "elder", TrustDomain: "amber.mesh", Network: "net-e", Gateways: oneGate}  // one root with amber
	snap  = &mesh.Snapshot{Local: amber, Clusters: []*mesh.Cluster{amber, birch, cedar, delta, elder}}
	other = mesh.ClusterID("unknown")
)

// TestReach tries each network a client may be on against each endpoint, with mesh TLS and without.
func TestReach(t *testing.T) {
	const direct, none = "direct", "none"
	via := func(gates []netip.AddrPort) string { return fmt.Sprint(gates) }
	froms := []mesh.NetworkID{"net-a", "net-b", "net-c", "net-e", ""}
	for _, row := range []struct {
		cluster mesh.ClusterID
		network mesh.NetworkID
		want    []string // by network of the client, with mesh TLS
	}{
		{"amber", "net-a", []string{direct, via(oneGate), via(oneGate), via(oneGate), direct}},
		{"birch", "net-b", []string{via(twoGates), direct, via(twoGates), via(twoGates), direct}},
		{"cedar", "net-c", []string{none, none, direct, none, direct}},
		{"delta", "net-a", []string{direct, via(twoGates), via(twoGates), via(twoGates), direct}},
		{"elder", "net-e", []string{via(oneGate), via(oneGate), via(oneGate), direct, direct}},
		{"amber", "", []string{direct, direct, direct, direct, direct}},
		{other, "net-x", []string{none, none, none, none, direct}},
		{"birch", "net-vm", []string{via(twoGates), via(twoGates), via(twoGates), via(twoGates), direct}}, // a machine elsewhere
	} {
		for i, from := range froms {
			for _, tls := range []bool{true, false} {
				want := row.want[i]
				if !tls && want != direct {
					want = none
				}
				p := topologies.Reach(snap, from, &mesh.Endpoint{Cluster: row.cluster, Network: row.network, TLS: tls})
				got := none
				switch {
				case p.Direct && len(p.Via) > 0:
					got = "both"
				case p.Direct:
					got = direct
				case len(p.Via) > 0:
					got = via(p.Via)
				}
				if got != want || p.Reachable() != (want != none) {
					t.Errorf("from %q to %s on %q, TLS %v: %s, reachable %v; want %s", from, row.cluster, row.network, tls, got, p.Reachable(), want)
				}
			}
		}
	}
}

// TestBetween names every pair of clusters, in both directions.
func TestBetween(t *testing.T) {
	clusters := []*mesh.Cluster{amber, birch, cedar, delta, elder}
	const (
		flat  = topologies.SingleVPN
		gates = topologies.Gateways
		multi = topologies.MultiControlPlane
	)
	want := [][]topologies.Name{
		{flat, multi, multi, flat, gates},
		{multi, flat, multi, multi, multi},
		{multi, multi, flat, multi, multi},
		{flat, multi, multi, flat, gates},
		{gates, multi, multi, gates, flat},
	}
	for i, a := range clusters {
		var got []topologies.Name
		for _, b := range clusters {
			got = append(got, topologies.Between(a, b))
		}
		if !slices.Equal(got, want[i]) {
			t.Errorf("from %s: %v, want %v", a.ID, got, want[i])
		}
	}
}
