package translate

import (
	"cmp"
	"maps"
	"slices"
	"strconv"
	"strings"

	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	networking "istio.io/api/networking/v1"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/translate/httprule"
	"github.com/isthmus-mesh/isthmus/discovery/translate/scope"
	"github.com/isthmus-mesh/isthmus/discovery/translate/wire"
)

// server is one HTTP server of an Istio Gateway that selects this proxy.
type server struct {
	*networking.Server
	gateway *mesh.Gateway
}

func (s server) site() site {
	return site{s.gateway.Object.Namespace + "/" + s.gateway.Object.Name, s.GetPort().GetNumber()}
}

// ingress returns the listeners of the Gateways that select this proxy. A request that no VirtualService takes gets 404.
func (v *view) ingress() Resources {
	r := v.outboundClusters()
	if s := TrustBundle(v.snap); s != nil {
		r.Secrets = append(r.Secrets, s)
	}
	g, servers := v.guard(), v.servers()
	r.Clusters = append(r.Clusters, g.clusters...)
	for _, port := range slices.Sorted(maps.Keys(servers)) {
		name := "http." + wire.Itoa(port)
		bind := v.snap.BindPort(v.proxy, port)
		r.Routes = append(r.Routes, &routev3.RouteConfiguration{Name: name, ValidateClusters: wire.No(), VirtualHosts: v.gatewayHosts(servers[port])})
		r.Listeners = append(r.Listeners, v.anyAddress(&listener{
			Name: "0.0.0.0_" + wire.Itoa(bind), TrafficDirection: outboundDirection,
			FilterChains: []*listenerv3.FilterChain{{Filters: []*listenerv3.Filter{g.manager(&hcmv3.HttpConnectionManager{
				StatPrefix: "outbound_0.0.0.0_" + wire.Itoa(bind), RouteSpecifier: rds(name), UseRemoteAddress: wire.Yes(),
				ForwardClientCertDetails: hcmv3.HttpConnectionManager_SANITIZE,
			})}}},
		}, bind))
	}
	return r
}

// servers returns the HTTP servers for this proxy by port, in the order of their Gateways.
func (v *view) servers() map[uint32][]server {
	out := map[uint32][]server{}
	for _, g := range v.snap.Gateways {
		if !scope.Selects(g.Spec.GetSelector(), v.proxy.Labels) {
			continue
		}
		for i, s := range g.Spec.GetServers() {
			field, port := "spec.servers["+strconv.Itoa(i)+"]", s.GetPort().GetNumber()
			switch strings.ToUpper(s.GetPort().GetProtocol()) {
			case "HTTP", "HTTP2", "GRPC", "GRPC-WEB":
				if port == 0 || port > 65535 {
					v.problems.add(g.Object, field+".port.number", reasonInvalid, "port "+wire.Itoa(port))
					continue
				}
				out[port] = append(out[port], server{s, g})
			case "TLS", "HTTPS", "TCP":
				if passesOn(s) {
					continue // by package gateway
				}
				fallthrough
			default:
				v.problems.add(g.Object, field+".port.protocol", reasonUnsupported, "protocol "+s.GetPort().GetProtocol()+": only HTTP servers are served by ingress gateways")
			}
		}
	}
	return out
}

// passesOn reports whether a server passes connections on as they are.
func passesOn(s *networking.Server) bool {
	mode := s.GetTls().GetMode()
	return strings.EqualFold(s.GetPort().GetProtocol(), "TCP") == (s.GetTls() == nil) &&
		(mode == networking.ServerTLSSettings_AUTO_PASSTHROUGH || mode == networking.ServerTLSSettings_PASSTHROUGH)
}

// gatewayHosts merges the routes of all VirtualServices bound to the servers of one port, by host.
func (v *view) gatewayHosts(servers []server) []*routev3.VirtualHost {
	routes, redirects := map[string][]*routev3.Route{}, map[string]bool{}
	done := map[string]bool{}
	for _, s := range servers {
		for _, pattern := range s.GetHosts() {
			_, host := splitHost(pattern)
			if s.GetTls().GetHttpsRedirect() {
				redirects[host], routes[host] = true, append(routes[host], nil...)
			}
			for _, vs := range v.snap.VirtualServices {
				if !admits(pattern, s.gateway.Object.Namespace, vs) || !v.scope.SeesRoutes(vs) {
					continue
				}
				for _, h := range vs.Spec.GetHosts() {
					domain, ok := intersect(h, host)
					key := domain + "|" + vs.Object.String() + "|" + s.site().gateway
					if !ok || done[key] {
						continue
					}
					done[key] = true
					if found := v.httpRoutes(vs, s.site()); len(found) > 0 {
						routes[domain] = append(routes[domain], found...)
						redirects[domain] = redirects[domain] || s.GetTls().GetHttpsRedirect()
					}
				}
			}
		}
	}
	var out []*routev3.VirtualHost
	for _, domain := range slices.Sorted(maps.Keys(routes)) {
		port := servers[0].GetPort().GetNumber()
		h := virtualHost(domain+":"+wire.Itoa(port), withPort([]string{domain}, port), orderRoutes(routes[domain]))
		if redirects[domain] {
			h.RequireTls = routev3.VirtualHost_ALL
		}
		out = append(out, h)
	}
	return uniqueDomains(out)
}

// splitHost reads NAMESPACE/HOST of a Gateway server.
func splitHost(pattern string) (namespace, host string) {
	if ns, h, ok := strings.Cut(pattern, "/"); ok {
		return ns, h
	}
	return "*", pattern
}

// admits reports whether the server's host pattern takes VirtualServices of vs's namespace.
func admits(pattern, owner string, vs *mesh.VirtualService) bool {
	ns, _ := splitHost(pattern)
	return ns == "*" || ns == vs.Object.Namespace || ns == "." && vs.Object.Namespace == owner
}

// intersect returns the narrower of two hosts when one covers the other.
func intersect(a, b string) (string, bool) {
	switch {
	case scope.Covers(b, a):
		return a, true
	case scope.Covers(a, b):
		return b, true
	}
	return "", false
}

// orderRoutes moves routes that take everything behind the others; only the first of them counts.
func orderRoutes(routes []*routev3.Route) []*routev3.Route {
	slices.SortStableFunc(routes, func(a, b *routev3.Route) int { return cmp.Compare(last(a), last(b)) })
	if i := slices.IndexFunc(routes, httprule.CatchesAll); i >= 0 {
		routes = routes[:i+1]
	}
	return routes
}

func last(r *routev3.Route) int {
	if httprule.CatchesAll(r) {
		return 1
	}
	return 0
}
