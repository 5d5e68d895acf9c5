package ingress

import (
	"cmp"
	"maps"
	"slices"
	"strings"

	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/translate/httprule"
	"github.com/isthmus-mesh/isthmus/discovery/translate/scope"
	"github.com/isthmus-mesh/isthmus/discovery/translate/wire"
)

// hosts merges the routes of all VirtualServices bound to the servers of one table, by host.
func (b *builder) hosts(servers []server) []*routev3.VirtualHost {
	routes, redirects := map[string][]*routev3.Route{}, map[string]bool{}
	done := map[string]bool{}
	for _, s := range servers {
		for _, pattern := range s.GetHosts() {
			_, host := splitHost(pattern)
			redirect := kindOf(s.Server) == plain && s.GetTls().GetHttpsRedirect()
			if redirect {
				redirects[host], routes[host] = true, append(routes[host], nil...)
			}
			for _, vs := range b.snap.VirtualServices {
				if !admits(pattern, s.gateway.Object.Namespace, vs) || !b.routes.Sees(vs) {
					continue
				}
				for _, h := range vs.Spec.GetHosts() {
					domain, ok := intersect(h, host)
					key := domain + "|" + vs.Object.String() + "|" + s.site().Gateway
					if !ok || done[key] {
						continue
					}
					done[key] = true
					if found := b.routes.HTTP(vs, s.site()); len(found) > 0 {
						routes[domain] = append(routes[domain], found...)
						redirects[domain] = redirects[domain] || redirect
					}
				}
			}
		}
	}
	var out []*routev3.VirtualHost
	have := map[string]bool{}
	for _, domain := range slices.Sorted(maps.Keys(routes)) {
		have[domain] = true
	}
	for _, domain := range slices.Sorted(maps.Keys(routes)) {
		port := servers[0].GetPort().GetNumber()
		h := &routev3.VirtualHost{
			Name: domain + ":" + wire.Itoa(port), Domains: withPort(domain, port, have), Routes: orderRoutes(routes[domain]), IncludeRequestAttemptCount: true,
		}
		if redirects[domain] {
			h.RequireTls = routev3.VirtualHost_ALL
		}
		out = append(out, h)
	}
	return out
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
