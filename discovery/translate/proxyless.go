package translate

import (
	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	routerv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/translate/httprule"
	"github.com/isthmus-mesh/isthmus/discovery/translate/wire"
)

// proxyless returns what a gRPC client needs that speaks xDS itself: a listener for each name it may dial
// (xds:///HOST:PORT), the routes, and clusters of endpoints that are reached directly. Such a client knows no gateways
// and, without certificate providers, no TLS.
func (v *view) proxyless() Resources {
	var r Resources
	for _, s := range v.scope.Services() {
		if s.Resolution != mesh.Static {
			continue
		}
		for _, u := range v.upstreams(s) {
			if !u.port.Protocol.IsHTTP() {
				continue
			}
			r.Clusters = append(r.Clusters, &clusterv3.Cluster{
				Name:                 u.name(),
				ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_EDS},
				EdsClusterConfig:     &clusterv3.Cluster_EdsClusterConfig{EdsConfig: wire.ADS(0)},
				LbPolicy:             clusterv3.Cluster_ROUND_ROBIN,
			})
			r.Endpoints = append(r.Endpoints, v.assignment(u, true))
			if u.subset != "" {
				continue
			}
			r.Routes = append(r.Routes, &routev3.RouteConfiguration{Name: u.name(), VirtualHosts: []*routev3.VirtualHost{{
				Name: s.Host, Domains: []string{"*"}, Routes: httprule.Plain(v.routesOf(s, u.port)),
			}}})
			for _, name := range v.dialNames(s, u.port.Number) {
				r.Listeners = append(r.Listeners, apiListener(name, u.name()))
			}
		}
	}
	return r
}

// dialNames are the names a client may put after xds:///, longest first.
func (v *view) dialNames(s *mesh.Service, port uint32) []string {
	names := []string{s.Host}
	if s.Host == mesh.LocalHost(s.Name, s.Namespace) {
		names = append(names, s.Name+"."+s.Namespace+".svc", s.Name+"."+s.Namespace)
		if s.Namespace == v.proxy.Namespace {
			names = append(names, s.Name)
		}
	}
	names = append(names, v.snap.Aliases(s)...)
	for i := range names {
		names[i] += ":" + wire.Itoa(port)
	}
	return names
}

func apiListener(name, route string) *listener {
	return &listener{Name: name, ApiListener: &listenerv3.ApiListener{ApiListener: wire.Pack(&hcmv3.HttpConnectionManager{
		StatPrefix:     name,
		RouteSpecifier: rds(route),
		HttpFilters:    []*hcmv3.HttpFilter{httpFilter(routerFilter, wire.Pack(&routerv3.Router{}))},
	})}}
}
