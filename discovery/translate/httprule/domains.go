package httprule

import (
	"strings"

	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"

	"github.com/isthmus-mesh/isthmus/discovery/translate/wire"
)

// WithPort returns each name, alone and with the port.
func WithPort(names []string, port uint32) []string {
	var out []string
	for _, n := range names {
		out = append(out, n)
		if n != "*" {
			out = append(out, n+":"+wire.Itoa(port))
		}
	}
	return out
}

// UniqueDomains drops domains that an earlier virtual host has, and virtual hosts that are left without any: Envoy
// refuses a whole route table for one domain that occurs twice. The hosts are not changed.
func UniqueDomains(hosts []*routev3.VirtualHost) []*routev3.VirtualHost {
	taken := map[string]bool{}
	var out []*routev3.VirtualHost
	for _, h := range hosts {
		domains := make([]string, 0, len(h.Domains))
		for _, d := range h.Domains {
			if lower := strings.ToLower(d); !taken[lower] {
				taken[lower] = true
				domains = append(domains, d)
			}
		}
		if len(domains) < len(h.Domains) {
			h = &routev3.VirtualHost{Name: h.Name, Domains: domains, Routes: h.Routes, IncludeRequestAttemptCount: h.IncludeRequestAttemptCount}
		}
		if len(h.Domains) > 0 {
			out = append(out, h)
		}
	}
	return out
}

// Plain drops, in place, what gRPC refuses or does not know: settings of HTTP filters it does not have, and retries on
// conditions of Envoy's own.
func Plain(routes []*routev3.Route) []*routev3.Route {
	for _, r := range routes {
		r.TypedPerFilterConfig = nil
		a := r.GetRoute()
		if a == nil {
			continue
		}
		a.RequestMirrorPolicies, a.HashPolicy = nil, nil
		if p := a.GetRetryPolicy(); p != nil {
			a.RetryPolicy = &routev3.RetryPolicy{RetryOn: "unavailable,cancelled", NumRetries: p.GetNumRetries()}
		}
	}
	return routes
}
