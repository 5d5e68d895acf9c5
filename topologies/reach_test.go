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
	fern  = &mesh.Cluster{ID: "fern", TrustDomain: "amber.mesh", Network: "net-f", Managed: true}       // read by amber's control plane
	snap  = &mesh.Snapshot{Local: amber, Clusters: []*mesh.Cluster{amber, birch, cedar, delta, elder, fern}, Networks: []*mesh.Network{
		{ID: "net-f", Gateways: []mesh.NetworkGateway{{Address: "192.0.2.9", Port: 15443}, {Address: "gw.example.com", Port: 15443}}},
	}}
	other = mesh.ClusterID("unknown")
)

// TestReach tries each network a client may be on against each endpoint, with mesh TLS and without.
func TestReach(t *testing.T) {
	const direct, none, guess, named = "direct", "none", "direct, no gateway", "network net-f [192.0.2.9:15443]"
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
		{"fern", "net-f", []string{named, named, named, named, direct}},
		{"amber", "net-f", []string{named, named, named, named, direct}},              // a machine there
		{"fern", "net-b", []string{guess, direct, guess, guess, direct}},              // that birch is there does not help
		{"amber", mesh.ExternalNetwork, []string{guess, guess, guess, guess, direct}}, // for an egress gateway; never by amber's own gateway
		{other, "net-x", []string{guess, guess, guess, guess, direct}},
		{"birch", "net-vm", []string{via(twoGates), via(twoGates), via(twoGates), via(twoGates), direct}}, // a machine elsewhere
	} {
		for i, from := range froms {
			for _, tls := range []bool{true, false} {
				want := row.want[i]
				if !tls && want != direct && want != guess {
					want = none
				}
				p := topologies.Reach(snap, from, &mesh.Endpoint{Cluster: row.cluster, Network: row.network, TLS: tls})
				got := none
				switch {
				case p.Direct && len(p.Via) > 0:
					got = "both"
				case p.NoGateway:
					got = guess
				case p.Direct:
					got = direct
				case p.Network != nil:
					got = fmt.Sprintf("network %s %v", p.Network.ID, p.Via)
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

func TestPlace(t *testing.T) {
	world := *snap
	world.Networks = []*mesh.Network{
		{ID: "cidr", CIDRs: []netip.Prefix{netip.MustParsePrefix("10.9.0.0/16")}},
		{ID: "narrow", CIDRs: []netip.Prefix{netip.MustParsePrefix("10.9.9.0/24")}},
		{ID: "registry", Registries: []mesh.ClusterID{"grove"}},
	}
	grove := &mesh.Cluster{ID: "grove", Managed: true, Network: "its own"}
	world.Clusters = append(slices.Clone(snap.Clusters), grove)
	world.Workloads = []*mesh.Workload{
		{Namespace: "a", Name: "x", Network: "of the pod", Locality: "r/z"},
		{Namespace: "a", Name: "x", Cluster: "fern", Network: "of the pod in fern"},
		{Namespace: "b", Name: "x", Cluster: "fern"},
	}
	for _, c := range []struct {
		p       mesh.Proxy
		cluster mesh.ClusterID
		network mesh.NetworkID
		where   string
	}{
		{mesh.Proxy{Namespace: "a", Name: "x", Network: "cidr"}, "amber", "cidr", "r/z"},      // a network that is known
		{mesh.Proxy{Namespace: "a", Name: "x", Network: "own"}, "amber", "of the pod", "r/z"}, // one that nobody knows
		{mesh.Proxy{Namespace: "b", Name: "x", Network: "own"}, "amber", "own", ""},
		{mesh.Proxy{Cluster: "grove", Network: "grove"}, "grove", "registry", ""},
		{mesh.Proxy{Namespace: "a", Name: "x", Locality: "l"}, "amber", "of the pod", "l"},
		{mesh.Proxy{Namespace: "a", Name: "x", Cluster: "fern"}, "fern", "of the pod in fern", ""},
		{mesh.Proxy{Namespace: "b", Name: "x", Cluster: "fern"}, "fern", "net-f", ""},
		{mesh.Proxy{Namespace: "b", Name: "x"}, "amber", "net-a", ""},
		{mesh.Proxy{Cluster: "birch"}, "amber", "net-a", ""}, // a peer has its own control plane
		{mesh.Proxy{Cluster: "grove"}, "grove", "registry", ""},
		{mesh.Proxy{Cluster: "grove", Addresses: []netip.Addr{netip.MustParseAddr("10.9.1.1")}}, "grove", "cidr", ""},
		{mesh.Proxy{Addresses: []netip.Addr{netip.MustParseAddr("10.9.9.1")}}, "amber", "narrow", ""},
	} {
		got := topologies.Place(&world, &c.p)
		nameless := *got
		nameless.Name = ""
		if again := topologies.Place(&world, &nameless); again.Network != got.Network || again.Cluster != got.Cluster {
			t.Errorf("%+v moves when it is placed again", c.p)
		}
		if got.Cluster != c.cluster || got.Network != c.network || got.Locality != c.where {
			t.Errorf("%+v is placed in %s, on %s, at %q; want %s, %s, %q", c.p, got.Cluster, got.Network, got.Locality, c.cluster, c.network, c.where)
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
