package relay

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/eastwest/gateway"
)

func TestTable(t *testing.T) {
	up := func() *upstream { return &upstream{} }
	clusters := map[string]*upstream{
		"pod|a.svc": up(), "pod|b.deep.svc": up(), "pod|exact.svc": up(), "pod|svc": up(), "pod|x.other": up(), "fixed": up(), "a.svc": up(),
	}
	wide := &chain{names: []string{"*.svc"}, prefix: "pod|", byName: true}
	deep := &chain{names: []string{"*.deep.svc"}, prefix: "pod|", byName: true}
	exact := &chain{names: []string{"exact.svc", "missing.svc"}, target: "fixed"}
	nowhere := &chain{names: []string{"nowhere"}, target: "absent"}
	got := newTable([]*chain{wide, deep, exact, nowhere}, clusters)
	want := table{
		"a.svc":       {wide, clusters["pod|a.svc"]},
		"b.deep.svc":  {deep, clusters["pod|b.deep.svc"]},
		"exact.svc":   {exact, clusters["fixed"]},
		"missing.svc": {exact, clusters["fixed"]},
		"nowhere":     {nowhere, nil},
	}
	if len(got) != len(want) {
		t.Errorf("got %d names, want %d", len(got), len(want))
	}
	for name, r := range want {
		if got[name] != r {
			t.Errorf("%s leads to %v, want %v", name, got[name], r)
		}
	}
}

func TestTurns(t *testing.T) {
	up := &upstream{instances: []instance{{weight: 1}, {weight: 3}, {weight: 2}}, total: 6}
	counts := make([]int, 3)
	for range 60 {
		counts[up.pick()]++
	}
	if !slices.Equal(counts, []int{10, 30, 20}) {
		t.Errorf("turns %v, want 10, 30, 20", counts)
	}
}

// TestParseListenerRefuses checks that what the relay would treat otherwise than Envoy is refused, with its place.
func TestParseListenerRefuses(t *testing.T) {
	res, _ := gateway.Translate(&mesh.Snapshot{Local: &mesh.Cluster{ID: "b", TrustDomain: "b.mesh"}, Services: []*mesh.Service{{
		Host: "web.shop.svc.cluster.local", Name: "web", Namespace: "shop", Exported: true, Ports: []mesh.Port{{Number: 80}},
	}}})
	good := res.Listeners[0]
	if _, err := parseListener(good); err != nil {
		t.Fatal(err)
	}
	at := slices.IndexFunc(good.FilterChains, func(c *listenerv3.FilterChain) bool { return c.Name == "shop/web:80" })
	for what, c := range map[string]struct {
		edit func(l *listenerv3.Listener, c *listenerv3.FilterChain)
		want string
	}{
		"default chain":      {func(l *listenerv3.Listener, c *listenerv3.FilterChain) { l.DefaultFilterChain = c }, "default chain"},
		"no name":            {func(_ *listenerv3.Listener, c *listenerv3.FilterChain) { c.FilterChainMatch.ServerNames = nil }, "chain shop/web:80: it has no server name"},
		"no match":           {func(_ *listenerv3.Listener, c *listenerv3.FilterChain) { c.FilterChainMatch = nil }, "it has no server name"},
		"other match":        {func(_ *listenerv3.Listener, c *listenerv3.FilterChain) { c.FilterChainMatch.TransportProtocol = "tls" }, "matches on more"},
		"same name":          {func(l *listenerv3.Listener, c *listenerv3.FilterChain) { l.FilterChains = append(l.FilterChains, c) }, "both have the server name"},
		"no filter":          {func(_ *listenerv3.Listener, c *listenerv3.FilterChain) { c.Filters = nil }, "no tcp_proxy"},
		"filter behind":      {func(_ *listenerv3.Listener, c *listenerv3.FilterChain) { c.Filters = append(c.Filters, c.Filters[0]) }, "follows tcp_proxy"},
		"wildcard, one host": {func(_ *listenerv3.Listener, c *listenerv3.FilterChain) { c.Filters = c.Filters[1:] }, "must lead to clusters by server name"},
		"star inside": {func(_ *listenerv3.Listener, c *listenerv3.FilterChain) {
			c.FilterChainMatch.ServerNames = []string{"a.*.b"}
		}, "no server name"},
		"TLS": {func(_ *listenerv3.Listener, c *listenerv3.FilterChain) { c.TransportSocket = &corev3.TransportSocket{} }, "transport socket"},
		"unknown filter": {func(_ *listenerv3.Listener, c *listenerv3.FilterChain) {
			c.Filters[0].GetTypedConfig().TypeUrl = "type.googleapis.com/x.Y"
		}, "filter envoy.filters.network.set_filter_state"},
		"other filter": {func(_ *listenerv3.Listener, c *listenerv3.FilterChain) {
			other, err := anypb.New(&tlsv3.UpstreamTlsContext{})
			if err != nil {
				t.Fatal(err)
			}
			c.Filters[0].ConfigType = &listenerv3.Filter_TypedConfig{TypedConfig: other}
		}, "is not supported"},
	} {
		l := proto.Clone(good).(*listenerv3.Listener)
		c.edit(l, l.FilterChains[at])
		if _, err := parseListener(l); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v, want %q", what, err, c.want)
		}
	}
}

func TestParseCluster(t *testing.T) {
	address := func(host string, port uint32) *corev3.Address {
		return &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
			Address: host, PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: port}}}}
	}
	build := func(es ...*endpointv3.LbEndpoint) *clusterv3.Cluster {
		return &clusterv3.Cluster{Name: "c", ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_STATIC},
			LoadAssignment: &endpointv3.ClusterLoadAssignment{Endpoints: []*endpointv3.LocalityLbEndpoints{{LbEndpoints: es}}}}
	}
	host := func(e *endpointv3.Endpoint) *endpointv3.LbEndpoint {
		return &endpointv3.LbEndpoint{HostIdentifier: &endpointv3.LbEndpoint_Endpoint{Endpoint: e}}
	}
	two := host(&endpointv3.Endpoint{Address: address("10.0.0.1", 80), AdditionalAddresses: []*endpointv3.Endpoint_AdditionalAddress{{Address: address("fd00::1", 80)}}})
	two.LoadBalancingWeight = wrapperspb.UInt32(5)
	gone := host(&endpointv3.Endpoint{Address: address("10.0.0.2", 80)})
	gone.HealthStatus = corev3.HealthStatus_UNHEALTHY
	got, err := parseCluster(build(two, gone))
	if err != nil || len(got.instances) != 1 || got.total != 5 ||
		!slices.Equal(got.instances[0].addrs, []netip.AddrPort{netip.MustParseAddrPort("10.0.0.1:80"), netip.MustParseAddrPort("[fd00::1]:80")}) {
		t.Errorf("got %+v, %v", got, err)
	}
	for _, bad := range []*clusterv3.Cluster{
		build(host(&endpointv3.Endpoint{Address: address("example.com", 80)})),
		build(host(&endpointv3.Endpoint{Address: address("10.0.0.1", 0)})),
		build(host(&endpointv3.Endpoint{Address: address("10.0.0.1", 70000)})),
		build(&endpointv3.LbEndpoint{}),
		{Name: "c", ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_EDS}},
	} {
		if _, err := parseCluster(bad); err == nil || !strings.Contains(err.Error(), "cluster c") {
			t.Errorf("%v: got %v, want an error that names the cluster", bad, err)
		}
	}
}
