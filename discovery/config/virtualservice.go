package config

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	networking "istio.io/api/networking/v1"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// meshGateway stands for all sidecars in a list of gateways.
const meshGateway = "mesh"

func (o *object) virtualService() {
	spec := &networking.VirtualService{}
	if _, ok := o.spec(spec); !ok {
		return
	}
	spec.Gateways = o.gatewayNames(spec.Gateways)
	if len(spec.Gateways) == 0 && len(spec.Hosts) > 0 {
		spec.Gateways = []string{meshGateway}
	}
	if len(spec.Hosts) == 0 {
		o.checkDelegate(spec)
	}
	for i, h := range spec.Hosts {
		at := fmt.Sprintf("spec.hosts[%d]", i)
		spec.Hosts[i] = o.host(h)
		o.checkHost(at, spec.Hosts[i])
		if h == "*" && slices.Contains(spec.Gateways, meshGateway) {
			o.invalid(at, `"*" is allowed at gateways only`, "name hosts, or gateways other than mesh")
		}
		if slices.Contains(spec.Hosts[:i], spec.Hosts[i]) {
			o.reject(at, ReasonDuplicate, show(h)+" is named twice", "remove one")
		}
	}
	spec.ExportTo = o.visibility("spec.exportTo", spec.ExportTo)
	if len(spec.Http)+len(spec.Tls)+len(spec.Tcp) == 0 {
		o.reject("spec", ReasonMissing, "the VirtualService has no route", "add http, tls or tcp routes")
	}
	spec.Http = keepIndexed(spec.Http, func(i int, r *networking.HTTPRoute) bool { return o.httpRoute(fmt.Sprintf("spec.http[%d]", i), r) })
	spec.Tls = keepIndexed(spec.Tls, func(i int, r *networking.TLSRoute) bool {
		return o.tlsRoute(fmt.Sprintf("spec.tls[%d]", i), r, spec.Hosts)
	})
	spec.Tcp = keepIndexed(spec.Tcp, func(i int, r *networking.TCPRoute) bool { return o.tcpRoute(fmt.Sprintf("spec.tcp[%d]", i), r) })
	if !o.failed {
		o.d.in.VirtualServices = append(o.d.in.VirtualServices, &mesh.VirtualService{Object: o.ref, Spec: spec})
	}
}

// keepIndexed returns the elements for which ok holds, and calls it for each.
func keepIndexed[T any](xs []T, ok func(int, T) bool) []T {
	var out []T
	for i, x := range xs {
		if ok(i, x) {
			out = append(out, x)
		}
	}
	return out
}

// gatewayNames writes references out as NAMESPACE/NAME.
func (o *object) gatewayNames(in []string) []string {
	var out []string
	for _, g := range in {
		if ns, name, ok := strings.Cut(g, "/"); ok && ns == "." {
			g = o.ref.Namespace + "/" + name
		} else if !ok && g != meshGateway {
			g = o.ref.Namespace + "/" + g
		}
		out = append(out, g)
	}
	return out
}

// httpRoute validates a rule and reports whether it is used.
func (o *object) httpRoute(at string, r *networking.HTTPRoute) bool {
	if r == nil {
		o.invalid(at, "the rule is empty", "remove it")
		return false
	}
	use := true
	if n := len(r.Match); n > 0 {
		r.Match = keepIndexed(r.Match, func(i int, m *networking.HTTPMatchRequest) bool {
			return o.httpMatch(fmt.Sprintf("%s.match[%d]", at, i), m)
		})
		use = len(r.Match) > 0
	}
	if r.Delegate != nil && r.Delegate.Name == "" {
		o.reject(at+".delegate.name", ReasonMissing, "the delegate has no name", "name a VirtualService without hosts")
	}
	actions := 0
	for _, set := range []bool{len(r.Route) > 0, r.Redirect != nil, r.DirectResponse != nil, r.Delegate != nil} {
		if set {
			actions++
		}
	}
	switch {
	case actions == 0:
		o.reject(at+".route", ReasonMissing, "the rule leads nowhere", "add a route, redirect or directResponse")
	case actions > 1:
		o.reject(at, ReasonConflict, "the rule has more than one of route, redirect, directResponse and delegate", "keep one")
	}
	total := 0
	for i, d := range r.Route {
		to := fmt.Sprintf("%s.route[%d]", at, i)
		o.destination(to+".destination", d.GetDestination())
		total += o.weight(to+".weight", d.GetWeight())
		o.checkHeaders(to+".headers", d.GetHeaders())
	}
	o.checkTotal(at+".route", len(r.Route), total)
	o.checkHeaders(at+".headers", r.Headers)
	o.checkDuration(at+".timeout", r.Timeout, 0)
	o.redirect(at+".redirect", r.Redirect)
	o.directResponse(at+".directResponse", r.DirectResponse)
	o.rewrite(at+".rewrite", r)
	o.retries(at+".retries", r.Retries)
	o.fault(at+".fault", r.Fault)
	o.mirror(at, r)
	o.cors(at+".corsPolicy", r.CorsPolicy)
	return use
}

// httpMatch validates a match and reports whether it is used: one with a condition that is not honoured would match
// too much without it.
func (o *object) httpMatch(at string, m *networking.HTTPMatchRequest) bool {
	if m == nil {
		o.invalid(at, "the match is empty", "remove it")
		return false
	}
	o.checkMatch(at+".uri", m.Uri, false)
	o.checkMatch(at+".scheme", m.Scheme, false)
	o.checkMatch(at+".method", m.Method, false)
	o.checkMatch(at+".authority", m.Authority, false)
	use := true
	for _, name := range slices.Sorted(maps.Keys(m.Headers)) {
		if strings.HasPrefix(name, "@") {
			o.unsupported(at+".headers["+name+"]", "the match is left out")
			delete(m.Headers, name)
			use = false
		}
	}
	o.checkMatches(at+".headers", m.Headers, true)
	o.checkMatches(at+".withoutHeaders", m.WithoutHeaders, true)
	o.checkMatches(at+".queryParams", m.QueryParams, false)
	if m.Port != 0 {
		o.checkPort(at+".port", int64(m.Port))
	}
	m.Gateways = o.gatewayNames(m.Gateways)
	return use
}

// tcpRoute validates a rule and reports whether it is used.
func (o *object) tcpRoute(at string, r *networking.TCPRoute) bool {
	had := len(r.GetMatch())
	r.Match = keepIndexed(r.GetMatch(), func(i int, m *networking.L4MatchAttributes) bool {
		to := fmt.Sprintf("%s.match[%d]", at, i)
		if s := m.GetSourceSubnet(); s != "" {
			o.checkBlock(to+".sourceSubnet", s)
		}
		m.Gateways = o.gatewayNames(m.Gateways)
		o.layer4(to, m.GetPort(), m.GetDestinationSubnets())
		return true
	})
	o.routes(at+".route", r.Route)
	return had == 0 || len(r.Match) > 0
}

// tlsRoute validates a rule and reports whether it is used.
func (o *object) tlsRoute(at string, r *networking.TLSRoute, hosts []string) bool {
	if len(r.GetMatch()) == 0 {
		o.reject(at+".match", ReasonMissing, "the rule has no match", "add one with sniHosts")
	}
	r.Match = keepIndexed(r.GetMatch(), func(i int, m *networking.TLSMatchAttributes) bool {
		to := fmt.Sprintf("%s.match[%d]", at, i)
		if len(m.GetSniHosts()) == 0 {
			o.reject(to+".sniHosts", ReasonMissing, "the match has no SNI", "name hosts")
		}
		for j, h := range m.GetSniHosts() {
			h = strings.ToLower(h)
			m.SniHosts[j] = h
			o.checkHost(fmt.Sprintf("%s.sniHosts[%d]", to, j), h)
			if !slices.ContainsFunc(hosts, func(p string) bool { return p == o.host(h) || covers(p, h) }) {
				o.invalid(fmt.Sprintf("%s.sniHosts[%d]", to, j), show(h)+" is not among the hosts of the VirtualService", "add it to spec.hosts")
			}
		}
		m.Gateways = o.gatewayNames(m.Gateways)
		o.layer4(to, m.GetPort(), m.GetDestinationSubnets())
		return true
	})
	o.routes(at+".route", r.Route)
	return len(r.Match) > 0
}

// checkDelegate wants of an object without hosts what others can delegate to.
func (o *object) checkDelegate(spec *networking.VirtualService) {
	if len(spec.Gateways) > 0 {
		o.reject("spec.gateways", ReasonConflict, "a VirtualService without hosts, for others to delegate to, has no gateways", "remove them, or name hosts")
	}
	if len(spec.Tls)+len(spec.Tcp) > 0 {
		o.reject("spec.hosts", ReasonMissing, "only http routes can be delegated to", "name hosts, or write http routes")
	}
}

// layer4 validates what TCP and TLS matches share.
func (o *object) layer4(at string, port uint32, subnets []string) {
	if port != 0 {
		o.checkPort(at+".port", int64(port))
	}
	for i, s := range subnets {
		o.checkBlock(fmt.Sprintf("%s.destinationSubnets[%d]", at, i), s)
	}
}

func (o *object) routes(at string, routes []*networking.RouteDestination) {
	if len(routes) == 0 {
		o.reject(at, ReasonMissing, "the rule leads nowhere", "add a destination")
	}
	total := 0
	for i, d := range routes {
		to := fmt.Sprintf("%s[%d]", at, i)
		o.destination(to+".destination", d.GetDestination())
		total += o.weight(to+".weight", d.GetWeight())
	}
	o.checkTotal(at, len(routes), total)
}

// destination writes the host out in full and validates the rest.
func (o *object) destination(at string, d *networking.Destination) {
	if d == nil {
		o.reject(at, ReasonMissing, "the destination is missing", "name a host")
		return
	}
	d.Host = o.host(d.Host)
	o.checkHost(at+".host", d.Host)
	if strings.HasPrefix(d.Host, "*") {
		o.invalid(at+".host", show(d.Host)+" is not one host", "name one host")
	}
	if d.Subset != "" {
		o.checkSubset(at+".subset", d.Subset)
	}
	if d.Port != nil {
		o.checkPort(at+".port.number", int64(d.Port.Number))
	}
}

func (o *object) weight(at string, w int32) int {
	if w < 0 {
		o.invalid(at, fmt.Sprintf("%d is not a weight", w), "write 0 or more")
	}
	return int(w)
}

func (o *object) checkTotal(at string, n, total int) {
	if n > 1 && total <= 0 {
		o.invalid(at, "the weights add up to nothing", "give at least one destination a weight above 0")
	}
	if total > 1<<32-1 {
		o.invalid(at, "the weights add up to more than 4294967295", "write smaller weights")
	}
}
