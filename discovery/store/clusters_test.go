package store

import (
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

func in(cluster mesh.ClusterID, input mesh.Input) mesh.Input {
	for _, s := range input.Services {
		s.Cluster = cluster
	}
	for _, w := range input.Workloads {
		w.Cluster = cluster
	}
	for _, s := range input.Slices {
		s.Cluster = cluster
	}
	return input
}

func http(number uint32) mesh.Port {
	return mesh.Port{Name: "http", Number: number, Protocol: mesh.HTTP}
}

func ips(list ...string) (out []netip.Addr) {
	for _, s := range list {
		out = append(out, netip.MustParseAddr(s))
	}
	return out
}

func reasons(snap *mesh.Snapshot) (out []string) {
	for _, p := range snap.Problems {
		out = append(out, p.Reason)
	}
	return out
}

// places lists the endpoints of a host as WORKLOAD@CLUSTER/NETWORK.
func endpointsOf(snap *mesh.Snapshot, host string) string {
	var out []string
	for _, e := range snap.Service(host).Endpoints {
		out = append(out, e.Workload+"@"+string(e.Cluster)+"/"+string(e.Network))
	}
	return strings.Join(out, " ")
}

const reviewsHost = "reviews.shop.svc.cluster.local"

// TestClustersOfOneControlPlane: Services of one name are one, each selector sees its own cluster's pods.
func TestClustersOfOneControlPlane(t *testing.T) {
	here, there := service("reviews", http(9080)), service("reviews", http(9080), mesh.Port{Name: "admin", Number: 9901, Protocol: mesh.TCP})
	here.Addresses, there.Addresses = ips("10.96.0.7"), ips("10.96.0.99")
	there.Selector = map[string]string{"app": "reviews", "track": "blue"}
	blue := pod("r", "reviews", "10.1.0.1")
	blue.Labels["track"] = "blue"
	a := mesh.Input{Services: []*mesh.ServiceDecl{here}, Workloads: []*mesh.Workload{pod("r", "reviews", "10.0.0.1"), pod("s", "reviews", "10.0.0.2")}}
	b := in("dune", mesh.Input{Services: []*mesh.ServiceDecl{there}, Workloads: []*mesh.Workload{blue, pod("green", "reviews", "10.1.0.2")}})
	snap := build(t, a, b)
	s := snap.Service(reviewsHost)
	if got, want := endpointsOf(snap, reviewsHost), "r@amber/amber s@amber/amber r@dune/"; got != want {
		t.Errorf("endpoints %s, want %s", got, want)
	}
	if len(s.Ports) != 2 || !slices.Equal(s.VIPs, ips("10.96.0.7")) || !slices.Equal(s.VIPsIn("dune"), ips("10.96.0.99")) || !slices.Equal(s.VIPsIn("amber"), s.VIPs) {
		t.Errorf("service %+v", s)
	}
	if c := snap.Cluster("dune"); c == nil || !c.Managed || c.TrustDomain != "amber.mesh" {
		t.Errorf("cluster dune is %+v", c)
	}
	if s.Endpoints[2].Identity != "spiffe://amber.mesh/ns/shop/sa/reviews" {
		t.Errorf("identity in dune: %s", s.Endpoints[2].Identity)
	}
	if len(snap.Problems) != 0 {
		t.Errorf("problems %v", snap.Problems)
	}
}

// TestServiceOfAnotherClusterAlone: its cluster address means nothing here, where it may be another service's.
func TestServiceOfAnotherClusterAlone(t *testing.T) {
	mine, theirs := service("mine", http(80)), service("theirs", http(80))
	mine.Addresses, theirs.Addresses = ips("10.96.0.7"), ips("10.96.0.7")
	theirs.Export = true
	snap := build(t, mesh.Input{Services: []*mesh.ServiceDecl{mine}}, in("dune", mesh.Input{Services: []*mesh.ServiceDecl{theirs}}))
	s := snap.Service("theirs.shop.svc.cluster.local")
	if slices.Equal(s.VIPs, ips("10.96.0.7")) || len(s.VIPs) == 0 || !slices.Equal(s.VIPsIn("dune"), ips("10.96.0.7")) {
		t.Errorf("addresses here %v, in dune %v", s.VIPs, s.VIPsIn("dune"))
	}
	if s.Exported {
		t.Error("an export label in another cluster counted")
	}
}

func TestClustersDisagree(t *testing.T) {
	here, there := service("reviews", http(9080)), service("reviews", mesh.Port{Name: "tcp", Number: 9080, Protocol: mesh.TCP})
	there.Headless = true
	snap := build(t, mesh.Input{Services: []*mesh.ServiceDecl{here}}, in("dune", mesh.Input{Services: []*mesh.ServiceDecl{there}}))
	if s := snap.Service(reviewsHost); s.Headless || s.Ports[0].Protocol != mesh.HTTP {
		t.Errorf("the local declaration does not count: %+v", s)
	}
	if got := reasons(snap); !slices.Equal(got, []string{"PortConflict", "ServiceDiffers"}) {
		t.Errorf("problems %v", snap.Problems)
	}
}

func TestNetworksAddUp(t *testing.T) {
	decl := service("reviews", http(9080))
	labelled := pod("labelled", "reviews", "10.1.0.3")
	labelled.Network = "n3"
	configured := mesh.ObjectRef{Kind: "ConfigMap", Namespace: "istio-system", Name: "istio"}
	networks := mesh.Input{Networks: []*mesh.Network{
		{ID: "n2", Object: configured, Registries: []mesh.ClusterID{"dune", "nowhere"}, Gateways: []mesh.NetworkGateway{
			{Object: configured, Address: "192.0.2.2", Port: 15443}, {Object: configured, Address: "192.0.2.1", Port: 443}, {Object: configured, Address: "0.0.0.0", Port: 443}, {Object: configured, Address: "no_name", Port: 443},
		}},
		{ID: "n1", Object: configured, Registries: []mesh.ClusterID{"Kubernetes"}},
		{ID: "n4", Object: configured, CIDRs: []netip.Prefix{netip.MustParsePrefix("10.1.0.4/32")}},
		{ID: "n2", Gateways: []mesh.NetworkGateway{{Address: "192.0.2.2", Port: 15443}, {Address: "gw.example.com", Port: 15443}}},
	}}
	here := mesh.Input{Services: []*mesh.ServiceDecl{decl}, Workloads: []*mesh.Workload{pod("a", "reviews", "10.0.0.1")}}
	there := in("dune", mesh.Input{Services: []*mesh.ServiceDecl{service("reviews", http(9080))}, Workloads: []*mesh.Workload{pod("b", "reviews", "10.1.0.1"), labelled, pod("cidr", "reviews", "10.1.0.4")}})
	snap := build(t, here, there, networks)
	if got, want := endpointsOf(snap, reviewsHost), "a@amber/n1 b@dune/n2 cidr@dune/n4 labelled@dune/n3"; got != want {
		t.Errorf("endpoints %s, want %s", got, want)
	}
	var gates []string
	for _, g := range snap.Network("n2").Gateways {
		gates = append(gates, g.Address)
	}
	if got := strings.Join(gates, " "); got != "192.0.2.1 192.0.2.2 gw.example.com" {
		t.Errorf("gateways of n2: %s", got)
	}
	got := reasons(snap)
	slices.Sort(got)
	if want := []string{"BadGateway", "BadGateway", "NoGateway", "NoGateway", "NoGateway", "UnknownRegistry"}; !slices.Equal(got, want) {
		t.Errorf("problems %v, want %v\n%v", got, want, snap.Problems)
	}
	// The order in which sources speak does not matter.
	inputs := []mesh.Input{here, there, networks}
	for seed := range uint64(6) {
		rand.New(rand.NewPCG(seed, 1)).Shuffle(len(inputs), func(i, j int) { inputs[i], inputs[j] = inputs[j], inputs[i] })
		if again := build(t, inputs...); !reflect.DeepEqual(again.Services, snap.Services) || !reflect.DeepEqual(again.Networks, snap.Networks) {
			t.Errorf("order %d gives another snapshot", seed)
		}
	}
}

// TestClusterIsForgotten: endpoints go at once with the cluster; its Service stays where the local one declares it.
func TestClusterIsForgotten(t *testing.T) {
	b := newBuilder(DefaultConfig(local()))
	here := mesh.Input{Services: []*mesh.ServiceDecl{service("reviews", http(9080)), service("other", http(80))}, Workloads: []*mesh.Workload{pod("a", "reviews", "10.0.0.1")}}
	there := in("dune", mesh.Input{Services: []*mesh.ServiceDecl{service("reviews", http(9080)), service("other", http(80))}, Workloads: []*mesh.Workload{pod("b", "reviews", "10.1.0.1")}})
	first := b.build([]mesh.Input{here, there}, nil)
	if len(first.Service(reviewsHost).Endpoints) != 2 {
		t.Fatalf("endpoints: %s", endpointsOf(first, reviewsHost))
	}
	// One pod more in dune changes one service.
	more := there
	more.Workloads = append(slices.Clone(there.Workloads), in("dune", mesh.Input{Workloads: []*mesh.Workload{pod("c", "reviews", "10.1.0.2")}}).Workloads...)
	second := b.build([]mesh.Input{here, more}, nil)
	if len(second.Service(reviewsHost).Endpoints) != 3 || second.Service("other.shop.svc.cluster.local") != first.Service("other.shop.svc.cluster.local") {
		t.Error("a pod changed more than its service")
	}
	third := b.build([]mesh.Input{here}, nil)
	if got := endpointsOf(third, reviewsHost); got != "a@amber/amber" || third.Cluster("dune") != nil || third.Service(reviewsHost).ClusterVIPs != nil {
		t.Errorf("after the cluster is gone: %s, %+v", got, third.Clusters)
	}
}

func TestOverlappingPodRanges(t *testing.T) {
	here := mesh.Input{Workloads: []*mesh.Workload{pod("a", "x", "10.0.0.1")}}
	there := in("dune", mesh.Input{Workloads: []*mesh.Workload{pod("b", "x", "10.0.0.1"), pod("c", "x", "10.0.0.9")}})
	for _, w := range there.Workloads {
		w.Network = "amber"
	}
	if got := reasons(build(t, here, there)); !slices.Equal(got, []string{"AddressClash"}) {
		t.Errorf("on one network: %v", got)
	}
	for _, w := range there.Workloads {
		w.Network = "other"
	}
	if got := reasons(build(t, here, there)); slices.Contains(got, "AddressClash") {
		t.Errorf("on two networks: %v", got)
	}
}

func TestClusterNameTaken(t *testing.T) {
	peer := mesh.Input{Clusters: []*mesh.Cluster{{ID: "dune", TrustDomain: "dune.mesh", Network: "dune"}}}
	managed := mesh.Input{Clusters: []*mesh.Cluster{{ID: "dune", TrustDomain: "amber.mesh", Managed: true}}}
	snap := build(t, managed, peer)
	if got := reasons(snap); !slices.Equal(got, []string{"ClusterNameTaken"}) || snap.Cluster("dune").Managed {
		t.Errorf("problems %v, cluster %+v", got, snap.Cluster("dune"))
	}
}

func TestRangeOverlap(t *testing.T) {
	prefix := func(s string) []netip.Prefix { return []netip.Prefix{netip.MustParsePrefix(s)} }
	own := mesh.Input{PodRanges: append(prefix("10.1.1.0/24"), prefix("10.1.0.0/24")...)}
	peer := func(network mesh.NetworkID, pods string) mesh.Input {
		return mesh.Input{Clusters: []*mesh.Cluster{{ID: "dune", TrustDomain: "dune.mesh", Network: network, PodRanges: prefix(pods)}}}
	}
	if got := build(t, own).Local.PodRanges; len(got) != 1 || got[0].String() != "10.1.0.0/23" {
		t.Errorf("ranges of the local cluster are %v", got)
	}
	if got := reasons(build(t, own, peer("elsewhere", "10.1.0.0/16"))); len(got) != 0 {
		t.Errorf("on two networks: %v", got)
	}
	if got := reasons(build(t, own, peer(local().Network, "10.2.0.0/16"))); len(got) != 0 {
		t.Errorf("apart: %v", got)
	}
	snap := build(t, own, peer(local().Network, "10.1.0.0/16"))
	if len(snap.Problems) != 1 || snap.Problems[0].Reason != "RangeOverlap" || snap.Problems[0].Object.Name != "dune" || snap.Problems[0].Remedy == "" ||
		!strings.HasPrefix(snap.Problems[0].Message, "pods of amber (10.1.0.0/23) and pods of dune (10.1.0.0/16) share addresses") {
		t.Errorf("%v", snap.Problems)
	}
}
