package views

import (
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"
	networking "istio.io/api/networking/v1"
	"pgregory.net/rapid"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/translate"
	"github.com/isthmus-mesh/isthmus/discovery/xds"
	"github.com/isthmus-mesh/isthmus/eastwest/gateway"
	"github.com/isthmus-mesh/isthmus/eastwest/sni"
	"github.com/isthmus-mesh/isthmus/topologies"
)

// networks is a world of two clusters under one control plane, each on a network of its own, and a rule with localities.
func networks() *mesh.Snapshot {
	snap := world(3, 3)
	dune := &mesh.Cluster{ID: "dune", TrustDomain: "amber.mesh", Network: "dune", Managed: true}
	snap.Clusters = append(snap.Clusters, dune)
	snap.Networks = []*mesh.Network{
		{ID: "amber", Gateways: []mesh.NetworkGateway{{Address: "192.0.2.1", Port: 15443}}},
		{ID: "dune", Gateways: []mesh.NetworkGateway{{Address: "192.0.2.2", Port: 15443}}},
	}
	for _, s := range snap.Services {
		s.VIPs = []netip.Addr{netip.MustParseAddr("10.96.0.1")}
		s.ClusterVIPs = map[mesh.ClusterID][]netip.Addr{"amber": s.VIPs, "dune": {netip.MustParseAddr("10.97.0.1")}}
		s.Endpoints[2].Cluster, s.Endpoints[2].Network = "dune", "dune"
	}
	snap.DestinationRules = []*mesh.DestinationRule{{Object: mesh.ObjectRef{Kind: "DestinationRule", Namespace: "shop", Name: "near"}, Spec: &networking.DestinationRule{
		Host: "svc-00001.shop.svc.cluster.local", TrafficPolicy: &networking.TrafficPolicy{OutlierDetection: &networking.OutlierDetection{Consecutive_5XxErrors: wrapperspb.UInt32(1)}},
	}}}
	return snap
}

func nodeIn(t testing.TB, cluster, name string) *corev3.Node {
	t.Helper()
	meta, err := structpb.NewStruct(map[string]any{"CLUSTER_ID": cluster})
	if err != nil {
		t.Fatal(err)
	}
	n := node(name)
	n.Metadata, n.Locality = meta, &corev3.Locality{Region: cluster}
	return n
}

// As TestHistoryDoesNotShow, with what changes between networks.
func TestHistoryDoesNotShowAcrossNetworks(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		snap := networks()
		vs, n := views(snap)
		feeds := map[[2]string]xds.Feed{}
		for range rapid.IntRange(1, 8).Draw(rt, "steps") {
			who := [2]string{rapid.SampledFrom([]string{"amber", "dune"}).Draw(rt, "in"), rapid.SampledFrom([]string{"svc-00000-0", "svc-00001-2", "client"}).Draw(rt, "opens")}
			if feeds[who] == nil {
				f, _, err := vs.Feed(nodeIn(t, who[0], who[1]), "")
				if err != nil {
					rt.Fatal(err)
				}
				feeds[who] = f
			}
			if kind := rapid.IntRange(0, 6).Draw(rt, "kind"); kind >= 5 {
				next := *snap
				next.Revision++
				next.Networks = slices.Clone(snap.Networks)
				g := *next.Networks[1]
				g.Gateways = []mesh.NetworkGateway{{Address: rapid.SampledFrom([]string{"192.0.2.2", "192.0.2.3", "gw.example.com"}).Draw(rt, "gateway"), Port: 15443}}
				next.Networks[1] = &g
				snap = &next
			} else {
				snap = flip(snap, rapid.IntRange(0, 2).Draw(rt, "service"), rapid.IntRange(0, 2).Draw(rt, "endpoint"), func(e *mesh.Endpoint) {
					switch kind {
					case 0:
						e.Ready = !e.Ready
					case 1:
						e.Locality = rapid.SampledFrom([]string{"", "amber", "dune", "dune/z"}).Draw(rt, "locality")
					case 2:
						e.TLS = !e.TLS
					case 3:
						e.Network = rapid.SampledFrom([]mesh.NetworkID{"amber", "dune", "unknown"}).Draw(rt, "network")
					case 4:
						e.Weight = 3
					}
				})
			}
			n.snap = snap
			vs.mu.Lock()
			vs.renew(snap)
			vs.mu.Unlock()
		}
		fresh, _ := views(snap)
		for who, f := range feeds {
			g, _, err := fresh.Feed(nodeIn(t, who[0], who[1]), "")
			if err != nil {
				rt.Fatal(err)
			}
			if got, want := versions(f), versions(g); !maps.Equal(got, want) {
				rt.Fatalf("%v is served %d resources, want %d, or others", who, len(got), len(want))
			}
		}
	})
}

// TestGatewayAddressChange: the new address of a gateway reaches clients as endpoints alone.
func TestGatewayAddressChange(t *testing.T) {
	vs, n := views(networks())
	f, _, err := vs.Feed(nodeIn(t, "amber", "client"), "")
	if err != nil {
		t.Fatal(err)
	}
	before := versions(f)
	next := *n.snap
	next.Revision++
	next.Networks = []*mesh.Network{n.snap.Networks[0], {ID: "dune", Gateways: []mesh.NetworkGateway{{Address: "192.0.2.9", Port: 15443}}}}
	n.snap = &next
	vs.mu.Lock()
	vs.renew(&next)
	vs.mu.Unlock()
	changed := 0
	for name, v := range versions(f) {
		if before[name] != v {
			changed++
			if !strings.HasPrefix(name, xds.EndpointType) {
				t.Errorf("%s changed", name)
			}
		}
	}
	if changed != 3 {
		t.Errorf("%d resources changed, want the assignments of three services", changed)
	}
}

// TestClustersHaveTheirAddresses: the same name has the address of the client's own cluster.
func TestClustersHaveTheirAddresses(t *testing.T) {
	vs, _ := views(networks())
	seen := map[string]string{}
	for _, cluster := range []string{"amber", "dune"} {
		f, _, err := vs.Feed(nodeIn(t, cluster, "client"), "")
		if err != nil {
			t.Fatal(err)
		}
		for name, v := range versions(f) {
			if strings.HasSuffix(name, " svc-00000.shop.svc.cluster.local") && strings.Contains(name, "Host") {
				seen[cluster] = v
			}
		}
	}
	if len(seen) != 2 || seen["amber"] == seen["dune"] {
		t.Errorf("DNS hosts by cluster: %v", seen)
	}
}

// TestGatewaysKnowWhatClientsAsk: for every host that a client sends to a network's gateways, the gateway there has a
// chain with the server name, and the chain leads to the pods that the client counted.
func TestGatewaysKnowWhatClientsAsk(t *testing.T) {
	snap := networks()
	snap.Gateways = []*mesh.Gateway{{Object: mesh.ObjectRef{Kind: "Gateway", Namespace: "istio-system", Name: "cross-network-gateway"}, Spec: &networking.Gateway{
		Selector: map[string]string{"istio": "eastwestgateway"}, Servers: []*networking.Server{{
			Port: &networking.Port{Number: 15443, Protocol: "TLS"}, Hosts: []string{"*.local"}, Tls: &networking.ServerTLSSettings{Mode: networking.ServerTLSSettings_AUTO_PASSTHROUGH},
		}},
	}}}
	pods := map[mesh.ClusterID]map[string]int{}
	for _, id := range []mesh.ClusterID{"amber", "dune"} {
		p := topologies.Place(snap, &mesh.Proxy{Type: mesh.Router, Name: "gw", Namespace: "istio-system", Cluster: id, EastWest: true, Labels: map[string]string{"istio": "eastwestgateway"}})
		r, problems := gateway.Options{Proxy: p}.Translate(snap)
		for _, x := range problems {
			if x.Reason != "NoControlPlane" {
				t.Error(x)
			}
		}
		hosts := map[string]int{}
		for _, c := range r.Clusters {
			for _, l := range c.GetLoadAssignment().GetEndpoints() {
				hosts[c.Name] += len(l.GetLbEndpoints())
			}
		}
		pods[id] = map[string]int{}
		for _, c := range r.Listeners[0].FilterChains {
			for _, name := range c.GetFilterChainMatch().GetServerNames() {
				pods[id][name] = hosts[name]
			}
		}
	}
	for id, other := range map[mesh.ClusterID]mesh.ClusterID{"amber": "dune", "dune": "amber"} {
		r, _ := translate.Translate(snap, &mesh.Proxy{Type: mesh.Sidecar, Name: "client", Namespace: "shop", Cluster: id})
		asked := 0
		for _, a := range r.Endpoints {
			for _, g := range a.Endpoints {
				for _, e := range g.LbEndpoints {
					if !strings.HasPrefix(e.GetEndpoint().GetAddress().GetSocketAddress().GetAddress(), "192.0.2.") {
						continue
					}
					asked++
					parts := strings.Split(a.ClusterName, "|")
					name := sni.Istio(80, parts[2], parts[3])
					if got, want := pods[other][name], int(e.GetLoadBalancingWeight().GetValue()); got != want || want == 0 {
						t.Errorf("client in %s counts %d pods of %s behind %s, the gateway there has %d", id, want, name, other, got)
					}
				}
			}
		}
		if asked != 3 {
			t.Errorf("client in %s sends %d services to gateways, want 3", id, asked)
		}
	}
}
