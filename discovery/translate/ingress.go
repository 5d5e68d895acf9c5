package translate

import (
	"maps"
	"slices"
	"strconv"

	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/translate/ingress"
)

// ingress returns the listeners of the Gateways that select this proxy. A request that no VirtualService takes gets 404.
func (v *view) ingress() Resources {
	r := v.outboundClusters()
	g := v.guard()
	r.Clusters = append(r.Clusters, g.clusters...)
	listeners, tables := ingress.Build(v.snap, v.proxy, v.credentials, gatewayRoutes{v, g})
	for _, port := range slices.Sorted(maps.Keys(listeners)) {
		l := listeners[port]
		l.TrafficDirection = outboundDirection
		r.Listeners = append(r.Listeners, v.anyAddress(l, port))
	}
	r.Routes, r.Secrets = tables, v.secrets().Secrets
	return r
}

// gatewayRoutes makes what VirtualServices route at a gateway, behind its guard.
type gatewayRoutes struct {
	v *view
	guard
}

// Sees implements ingress.Routes.
func (g gatewayRoutes) Sees(vs *mesh.VirtualService) bool { return g.v.scope.SeesRoutes(vs) }

// HTTP implements ingress.Routes.
func (g gatewayRoutes) HTTP(vs *mesh.VirtualService, at ingress.Site) []*routev3.Route {
	return g.v.httpRoutes(vs, site{at.Gateway, at.Port})
}

// TCP implements ingress.Routes.
func (g gatewayRoutes) TCP(vs *mesh.VirtualService, at ingress.Site) (narrow []*listenerv3.FilterChain, all []*listenerv3.Filter) {
	narrow, rest := g.v.tcpRoutes(vs, site{at.Gateway, at.Port})
	for _, c := range narrow {
		c.Filters = g.before(c.Filters...)
	}
	if rest != nil {
		all = g.before(rest...)
	}
	return narrow, all
}

// TLS implements ingress.Routes.
func (g gatewayRoutes) TLS(vs *mesh.VirtualService, at ingress.Site) (out []ingress.TLSRoute) {
	for i, t := range vs.Spec.GetTls() {
		field := "spec.tls[" + strconv.Itoa(i) + "]"
		for _, m := range t.GetMatch() {
			if g.v.applies(site{at.Gateway, at.Port}, vs, m) {
				out = append(out, ingress.TLSRoute{Names: m.GetSniHosts(), Field: field, Filters: g.before(g.v.tcpRoute(vs, t.GetRoute(), site{at.Gateway, at.Port}, field)...)})
			}
		}
	}
	return out
}

// Manager implements ingress.Routes.
func (g gatewayRoutes) Manager(m *hcmv3.HttpConnectionManager) *listenerv3.Filter {
	return g.manager(m, g.v.resolvers()...)
}

// Report implements ingress.Routes.
func (g gatewayRoutes) Report(object mesh.ObjectRef, field, reason, message string) {
	g.v.problems.add(object, field, reason, message)
}
