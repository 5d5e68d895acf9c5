package traffic

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"

	networking "istio.io/api/networking/v1"

	"github.com/isthmus-mesh/isthmus/discovery/config/written"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// meshGateway stands for all sidecars in a list of gateways.
const meshGateway = "mesh"

// VirtualService decodes the object; nil when something is wrong with it.
func VirtualService(w *written.Object) *mesh.VirtualService {
	o := &object{w}
	spec := &networking.VirtualService{}
	if _, ok := o.Spec(spec); !ok {
		return nil
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
		spec.Hosts[i] = o.Host(h)
		o.CheckHost(at, spec.Hosts[i])
		if h == "*" && slices.Contains(spec.Gateways, meshGateway) {
			o.Invalid(at, `"*" is allowed at gateways only`, "name hosts, or gateways other than mesh")
		}
		if slices.Contains(spec.Hosts[:i], spec.Hosts[i]) {
			o.Reject(at, written.ReasonDuplicate, written.Show(h)+" is named twice", "remove one")
		}
	}
	spec.ExportTo = o.Visibility("spec.exportTo", spec.ExportTo)
	if len(spec.Http)+len(spec.Tls)+len(spec.Tcp) == 0 {
		o.Reject("spec", written.ReasonMissing, "the VirtualService has no route", "add http, tls or tcp routes")
	}
	spec.Http = keepIndexed(spec.Http, func(i int, r *networking.HTTPRoute) bool { return o.httpRoute(fmt.Sprintf("spec.http[%d]", i), r) })
	spec.Tls = keepIndexed(spec.Tls, func(i int, r *networking.TLSRoute) bool {
		return o.tlsRoute(fmt.Sprintf("spec.tls[%d]", i), r, spec.Hosts)
	})
	spec.Tcp = keepIndexed(spec.Tcp, func(i int, r *networking.TCPRoute) bool { return o.tcpRoute(fmt.Sprintf("spec.tcp[%d]", i), r) })
	if o.Failed {
		return nil
	}
	return &mesh.VirtualService{Object: o.Ref, Spec: spec}
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
			g = o.Ref.Namespace + "/" + name
		} else if !ok && g != meshGateway {
			g = o.Ref.Namespace + "/" + g
		}
		out = append(out, g)
	}
	return out
}

// httpRoute validates a rule and reports whether it is used.
func (o *object) httpRoute(at string, r *networking.HTTPRoute) bool {
	if r == nil {
		o.Invalid(at, "the rule is empty", "remove it")
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
		o.Reject(at+".delegate.name", written.ReasonMissing, "the delegate has no name", "name a VirtualService without hosts")
	}
	actions := 0
	for _, set := range []bool{len(r.Route) > 0, r.Redirect != nil, r.DirectResponse != nil, r.Delegate != nil} {
		if set {
			actions++
		}
	}
	switch {
	case actions == 0:
		o.Reject(at+".route", written.ReasonMissing, "the rule leads nowhere", "add a route, redirect or directResponse")
	case actions > 1:
		o.Reject(at, written.ReasonConflict, "the rule has more than one of route, redirect, directResponse and delegate", "keep one")
	}
	total := 0
	for i, d := range r.Route {
		to := fmt.Sprintf("%s.route[%d]", at, i)
		o.destination(to+".destination", d.GetDestination())
		total += o.weight(to+".weight", d.GetWeight())
		o.CheckHeaders(to+".headers", d.GetHeaders())
	}
	o.checkTotal(at+".route", len(r.Route), total)
	o.CheckHeaders(at+".headers", r.Headers)
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

// httpMatch validates a match and reports whether it is used.
func (o *object) httpMatch(at string, m *networking.HTTPMatchRequest) bool {
	if m == nil {
		o.Invalid(at, "the match is empty", "remove it")
		return false
	}
	o.CheckMatch(at+".uri", m.Uri, false)
	o.CheckMatch(at+".scheme", m.Scheme, false)
	o.CheckMatch(at+".method", m.Method, false)
	o.CheckMatch(at+".authority", m.Authority, false)
	o.headers(at+".headers", m.Headers)
	o.headers(at+".withoutHeaders", m.WithoutHeaders)
	o.CheckMatches(at+".queryParams", m.QueryParams, false)
	if m.Port != 0 {
		o.CheckPort(at+".port", int64(m.Port))
	}
	m.Gateways = o.gatewayNames(m.Gateways)
	return true
}

// headers checks matches of headers and, under names with "@", of what a token says.
func (o *object) headers(at string, ms map[string]*networking.StringMatch) {
	plain := maps.Clone(ms)
	for _, name := range slices.Sorted(maps.Keys(ms)) {
		if !strings.HasPrefix(name, "@") {
			continue
		}
		delete(plain, name)
		if field := at + "[" + name + "]"; !claim.MatchString(name) {
			o.Invalid(field, written.Show(name)+" is neither a header nor a claim", "write @request.auth.claims[NAME], for nested ones @request.auth.claims[NAME][NESTED]")
		} else {
			o.CheckMatch(field, ms[name], true)
		}
	}
	o.CheckMatches(at, plain, true)
}

// claim is the name under which a match asks what a token says.
var claim = regexp.MustCompile(`^@request\.auth\.claims((\.[^.\[\]]+)+|(\[[^\[\]]+\])+)$`)

// tcpRoute validates a rule and reports whether it is used.
func (o *object) tcpRoute(at string, r *networking.TCPRoute) bool {
	had := len(r.GetMatch())
	r.Match = keepIndexed(r.GetMatch(), func(i int, m *networking.L4MatchAttributes) bool {
		to := fmt.Sprintf("%s.match[%d]", at, i)
		if s := m.GetSourceSubnet(); s != "" {
			o.CheckBlock(to+".sourceSubnet", s)
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
		o.Reject(at+".match", written.ReasonMissing, "the rule has no match", "add one with sniHosts")
	}
	r.Match = keepIndexed(r.GetMatch(), func(i int, m *networking.TLSMatchAttributes) bool {
		to := fmt.Sprintf("%s.match[%d]", at, i)
		if len(m.GetSniHosts()) == 0 {
			o.Reject(to+".sniHosts", written.ReasonMissing, "the match has no SNI", "name hosts")
		}
		for j, h := range m.GetSniHosts() {
			h = strings.ToLower(h)
			m.SniHosts[j] = h
			o.CheckHost(fmt.Sprintf("%s.sniHosts[%d]", to, j), h)
			if !slices.ContainsFunc(hosts, func(p string) bool { return p == o.Host(h) || written.Covers(p, h) }) {
				o.Invalid(fmt.Sprintf("%s.sniHosts[%d]", to, j), written.Show(h)+" is not among the hosts of the VirtualService", "add it to spec.hosts")
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
		o.Reject("spec.gateways", written.ReasonConflict, "a VirtualService without hosts, for others to delegate to, has no gateways", "remove them, or name hosts")
	}
	if len(spec.Tls)+len(spec.Tcp) > 0 {
		o.Reject("spec.hosts", written.ReasonMissing, "only http routes can be delegated to", "name hosts, or write http routes")
	}
}

// layer4 validates what TCP and TLS matches share.
func (o *object) layer4(at string, port uint32, subnets []string) {
	if port != 0 {
		o.CheckPort(at+".port", int64(port))
	}
	for i, s := range subnets {
		o.CheckBlock(fmt.Sprintf("%s.destinationSubnets[%d]", at, i), s)
	}
}

func (o *object) routes(at string, routes []*networking.RouteDestination) {
	if len(routes) == 0 {
		o.Reject(at, written.ReasonMissing, "the rule leads nowhere", "add a destination")
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
		o.Reject(at, written.ReasonMissing, "the destination is missing", "name a host")
		return
	}
	d.Host = o.Host(d.Host)
	o.CheckHost(at+".host", d.Host)
	if d.Host == "*" {
		o.Invalid(at+".host", `"*" is not one host`, "name one host, or the wildcard host of a ServiceEntry")
	}
	if d.Subset != "" {
		o.checkSubset(at+".subset", d.Subset)
	}
	if d.Port != nil {
		o.CheckPort(at+".port.number", int64(d.Port.Number))
	}
}

func (o *object) weight(at string, w int32) int {
	if w < 0 {
		o.Invalid(at, fmt.Sprintf("%d is not a weight", w), "write 0 or more")
	}
	return int(w)
}

func (o *object) checkTotal(at string, n, total int) {
	if n > 1 && total <= 0 {
		o.Invalid(at, "the weights add up to nothing", "give at least one destination a weight above 0")
	}
	if total > 1<<32-1 {
		o.Invalid(at, "the weights add up to more than 4294967295", "write smaller weights")
	}
}
