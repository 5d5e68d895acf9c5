// Package dynamic leads requests and TLS connections for wildcard hosts to whatever the name they ask for resolves to
// (Envoy's dynamic forward proxy). Which names that may be is up to the route or filter chain that leads here.
package dynamic

import (
	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	clusterdfpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/clusters/dynamic_forward_proxy/v3"
	dnscachev3 "github.com/envoyproxy/go-control-plane/envoy/extensions/common/dynamic_forward_proxy/v3"
	httpdfpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/dynamic_forward_proxy/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	sniv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/sni_dynamic_forward_proxy/v3"
	upstreamv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/translate/wire"
)

// Filter is the name of the HTTP filter that resolves hosts. It acts on routes to clusters of this package only.
const Filter = "envoy.filters.http.dynamic_forward_proxy"

const httpOptionsKey = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"

// maxHosts bounds the names that a proxy remembers at a time; more are refused, as clients choose them.
const maxHosts = 1024

// cache is one for all clusters and filters of a proxy: Envoy wants those that share a name to be equal.
func cache() *dnscachev3.DnsCacheConfig {
	return &dnscachev3.DnsCacheConfig{Name: "wildcard-hosts", DnsLookupFamily: clusterv3.Cluster_V4_PREFERRED, MaxHosts: wire.U32(maxHosts)}
}

// Cluster makes c resolve the name that each request or connection asks for. Where c speaks TLS, the server's certificate
// must be for that name.
func Cluster(c *clusterv3.Cluster) {
	c.LbPolicy = clusterv3.Cluster_CLUSTER_PROVIDED
	c.ClusterDiscoveryType = &clusterv3.Cluster_ClusterType{ClusterType: &clusterv3.Cluster_CustomClusterType{
		Name:        "envoy.clusters.dynamic_forward_proxy",
		TypedConfig: wire.Pack(&clusterdfpv3.ClusterConfig{ClusterImplementationSpecifier: &clusterdfpv3.ClusterConfig_DnsCacheConfig{DnsCacheConfig: cache()}}),
	}}
	o := &upstreamv3.HttpProtocolOptions{}
	if a := c.GetTypedExtensionProtocolOptions()[httpOptionsKey]; a == nil || a.UnmarshalTo(o) != nil {
		o = &upstreamv3.HttpProtocolOptions{UpstreamProtocolOptions: &upstreamv3.HttpProtocolOptions_ExplicitHttpConfig_{
			ExplicitHttpConfig: &upstreamv3.HttpProtocolOptions_ExplicitHttpConfig{ProtocolConfig: &upstreamv3.HttpProtocolOptions_ExplicitHttpConfig_HttpProtocolOptions{}},
		}}
	}
	o.UpstreamHttpProtocolOptions = &corev3.UpstreamHttpProtocolOptions{AutoSni: true, AutoSanValidation: true}
	if c.TypedExtensionProtocolOptions == nil {
		c.TypedExtensionProtocolOptions = map[string]*anypb.Any{}
	}
	c.TypedExtensionProtocolOptions[httpOptionsKey] = wire.Pack(o)
}

// HTTP is the filter that resolves the hosts of requests.
func HTTP() *hcmv3.HttpFilter {
	return &hcmv3.HttpFilter{Name: Filter, ConfigType: &hcmv3.HttpFilter_TypedConfig{
		TypedConfig: wire.Pack(&httpdfpv3.FilterConfig{ImplementationSpecifier: &httpdfpv3.FilterConfig_DnsCacheConfig{DnsCacheConfig: cache()}}),
	}}
}

// TLS is the filter that resolves the server names of connections, which are then made to the port.
func TLS(port uint32) *listenerv3.Filter {
	return &listenerv3.Filter{Name: "envoy.filters.network.sni_dynamic_forward_proxy", ConfigType: &listenerv3.Filter_TypedConfig{
		TypedConfig: wire.Pack(&sniv3.FilterConfig{DnsCacheConfig: cache(), PortSpecifier: &sniv3.FilterConfig_PortValue{PortValue: port}}),
	}}
}

// Filters are those that connection managers need to lead to the services.
func Filters(services []*mesh.Service) []*hcmv3.HttpFilter {
	for _, s := range services {
		if s.Resolution == mesh.Dynamic {
			return []*hcmv3.HttpFilter{HTTP()}
		}
	}
	return nil
}

// Before puts in front of the filters of a chain what finds the server of a wildcard host, where it is found by name.
func Before(s *mesh.Service, p mesh.Port, filters ...*listenerv3.Filter) []*listenerv3.Filter {
	if s.Resolution != mesh.Dynamic {
		return filters
	}
	return append([]*listenerv3.Filter{TLS(p.Number)}, filters...)
}
