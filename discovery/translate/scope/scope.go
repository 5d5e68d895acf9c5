// Package scope says what one proxy may see: the services it may call, the rules that steer its calls, and how its
// outbound listeners share them out, by exportTo, the Sidecar that selects it and the defaults of the mesh. It is pure:
// equal snapshots and equal Keys give equal scopes.
package scope

import (
	"maps"
	"slices"
	"strings"

	meshconfig "istio.io/api/mesh/v1alpha1"
	networking "istio.io/api/networking/v1"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

const (
	// meshGateway is the gateway name that stands for all sidecars in a VirtualService.
	meshGateway = "mesh"
	// rootNamespace holds the objects that apply to the whole mesh.
	rootNamespace = "istio-system"
)

// Report takes what is wrong with an object that the scope leaves out.
type Report func(object mesh.ObjectRef, field, message string)

// Scope is what one proxy sees of one Snapshot. It is not safe for concurrent use.
type Scope struct {
	// Sidecar selects the proxy; nil: none does, or it is a gateway.
	Sidecar *mesh.SidecarConfig

	snap     *mesh.Snapshot
	proxy    *mesh.Proxy
	egress   []egress                           // of the Sidecar; nil: everything that is exported
	routed   map[string]bool                    // hosts that VirtualServices in an egress-limited scope lead to
	rules    map[string][]*mesh.DestinationRule // by host, visible to the proxy
	wild     []string                           // hosts in rules that begin with "*", longest first
	byHost   map[string]*mesh.VirtualService    // bound to the mesh gateway, first by namespace and name
	wildHost []string
	services []*mesh.Service // once asked for
}

// egress is one egress listener of the Sidecar.
type egress struct {
	spec  *networking.IstioEgressListener
	hosts []pattern
}

// pattern is NAMESPACE/HOST.
type pattern struct{ namespace, host string }

// For makes the scope of p, which is placed. report may be nil.
func For(snap *mesh.Snapshot, p *mesh.Proxy, report Report) *Scope {
	s := &Scope{snap: snap, proxy: p, rules: map[string][]*mesh.DestinationRule{}, byHost: map[string]*mesh.VirtualService{}}
	if p.Type != mesh.Router {
		s.Sidecar = sidecarFor(snap, p)
	}
	for _, e := range s.Sidecar.GetSpec().GetEgress() {
		s.egress = append(s.egress, egress{e, patterns(e.GetHosts(), p.Namespace)})
	}
	config := snap.MeshConfig.GetSpec()
	for _, d := range snap.DestinationRules {
		if Visible(d.Spec.GetExportTo(), config.GetDefaultDestinationRuleExportTo(), d.Object.Namespace, p.Namespace) && ruleSelects(d, p) {
			s.rules[d.Spec.GetHost()] = append(s.rules[d.Spec.GetHost()], d)
		}
	}
	for _, vs := range snap.VirtualServices {
		if !boundToMesh(vs.Spec) || !s.SeesRoutes(vs) {
			continue
		}
		for _, h := range vs.Spec.GetHosts() {
			if first, taken := s.byHost[h]; !taken {
				s.byHost[h] = vs
			} else if report != nil {
				report(vs.Object, "spec.hosts", "host "+h+" is routed by "+first.Object.String())
			}
		}
	}
	s.wild, s.wildHost = wildcards(s.rules), wildcards(s.byHost)
	if s.egress != nil {
		s.routed = destinations(s.byHost)
	}
	return s
}

// Key tells proxies of one Snapshot apart that may see different things: proxies of one type with equal keys have equal
// scopes.
func Key(snap *mesh.Snapshot, p *mesh.Proxy) string {
	key := p.Namespace
	if p.Type != mesh.Router {
		if x := sidecarFor(snap, p); x != nil {
			key += "|" + x.Object.String()
		}
	}
	for _, d := range snap.DestinationRules {
		if len(d.Spec.GetWorkloadSelector().GetMatchLabels()) > 0 && ruleSelects(d, p) {
			key += "|" + d.Object.String()
		}
	}
	return key
}

// sidecarFor returns the Sidecar that applies: one of the namespace that selects the proxy by label, else the one of
// the namespace without selector, else that of the root namespace. Of several the first by name counts.
func sidecarFor(snap *mesh.Snapshot, p *mesh.Proxy) *mesh.SidecarConfig {
	var own, root *mesh.SidecarConfig
	for _, x := range snap.Sidecars {
		labels := x.GetSpec().GetWorkloadSelector().GetLabels()
		switch {
		case x.Object.Namespace == p.Namespace && len(labels) > 0:
			if Selects(labels, p.Labels) {
				return x
			}
		case len(labels) > 0:
		case x.Object.Namespace == p.Namespace && own == nil:
			own = x
		case x.Object.Namespace == rootNamespace && root == nil:
			root = x
		}
	}
	if own != nil {
		return own
	}
	return root
}

func ruleSelects(d *mesh.DestinationRule, p *mesh.Proxy) bool {
	sel := d.Spec.GetWorkloadSelector().GetMatchLabels()
	return len(sel) == 0 || d.Object.Namespace == p.Namespace && Selects(sel, p.Labels)
}

// Visible reports whether an object of the namespace owner with that exportTo is seen from the namespace reader; without
// exportTo the mesh's default counts, without a default everyone sees it.
func Visible(exportTo, fallback []string, owner, reader string) bool {
	if len(exportTo) == 0 {
		exportTo = fallback
	}
	for _, e := range exportTo {
		if e == "*" || e == reader || e == "." && owner == reader {
			return true
		}
	}
	return len(exportTo) == 0
}

// Selects reports whether labels hold all that the selector asks for.
func Selects(selector, labels map[string]string) bool {
	for k, want := range selector {
		if labels[k] != want {
			return false
		}
	}
	return true
}

// Covers reports whether host is pattern, or is below the wildcard pattern.
func Covers(pattern, host string) bool {
	if pattern == host || pattern == "*" {
		return true
	}
	suffix, ok := strings.CutPrefix(pattern, "*")
	return ok && strings.HasSuffix(strings.TrimPrefix(host, "*"), suffix)
}

func patterns(hosts []string, own string) []pattern {
	out := []pattern{} // not nil: a listener without hosts has nothing
	for _, h := range hosts {
		ns, host, _ := strings.Cut(h, "/")
		switch ns {
		case "~":
			continue
		case ".":
			ns = own
		}
		out = append(out, pattern{ns, strings.ToLower(host)})
	}
	return out
}

func (e egress) has(namespace, host string) bool {
	return slices.ContainsFunc(e.hosts, func(p pattern) bool {
		return (p.namespace == "*" || p.namespace == namespace) && Covers(p.host, mesh.FromClusterSet(host))
	})
}

// Exports reports whether the service is exported to the proxy's namespace, whatever the Sidecar says.
func (s *Scope) Exports(svc *mesh.Service) bool {
	if svc.Global && len(svc.VisibleTo) == 0 {
		return true // what clusters export, they export to all namespaces
	}
	return Visible(svc.VisibleTo, s.snap.MeshConfig.GetSpec().GetDefaultServiceExportTo(), svc.Namespace, s.proxy.Namespace)
}

// Sees reports whether the proxy has clusters of the service: it is exported to it, and its Sidecar names it, or a
// VirtualService that it names leads to it.
func (s *Scope) Sees(svc *mesh.Service) bool {
	if !s.Exports(svc) {
		return false
	}
	return s.egress == nil || s.routed[svc.Host] || slices.ContainsFunc(s.egress, func(e egress) bool { return e.has(svc.Namespace, svc.Host) })
}

// Services returns the services that the proxy sees, sorted by host.
func (s *Scope) Services() []*mesh.Service {
	if s.services == nil {
		s.services = make([]*mesh.Service, 0, len(s.snap.Services))
		for _, svc := range s.snap.Services {
			if s.Sees(svc) {
				s.services = append(s.services, svc)
			}
		}
	}
	return s.services
}

// Service returns the service with exactly that host if the proxy sees it, else nil.
func (s *Scope) Service(host string) *mesh.Service {
	if svc := s.snap.Service(host); svc != nil && s.Sees(svc) {
		return svc
	}
	return nil
}

// Covering returns the service with that host, or else that of the narrowest wildcard host above it, if the proxy sees
// it, else nil.
func (s *Scope) Covering(host string) *mesh.Service {
	if s.snap.Service(host) != nil {
		return s.Service(host)
	}
	for rest := host; ; {
		_, parent, ok := strings.Cut(strings.TrimPrefix(rest, "*."), ".")
		if !ok {
			return nil
		}
		if svc := s.Service("*." + parent); svc != nil {
			return svc
		}
		rest = parent
	}
}

// SeesRoutes reports whether the VirtualService is exported to the proxy's namespace and its Sidecar names one of its hosts.
func (s *Scope) SeesRoutes(vs *mesh.VirtualService) bool {
	if !Visible(vs.Spec.GetExportTo(), s.snap.MeshConfig.GetSpec().GetDefaultVirtualServiceExportTo(), vs.Object.Namespace, s.proxy.Namespace) {
		return false
	}
	return s.egress == nil || slices.ContainsFunc(s.egress, func(e egress) bool {
		return slices.ContainsFunc(vs.Spec.GetHosts(), func(h string) bool { return e.has(vs.Object.Namespace, h) })
	})
}

// RoutedHosts returns the hosts that VirtualServices route for sidecars, sorted.
func (s *Scope) RoutedHosts() []string { return slices.Sorted(maps.Keys(s.byHost)) }

// Routes returns the VirtualService that names exactly that host, or nil.
func (s *Scope) Routes(host string) *mesh.VirtualService { return s.byHost[host] }

// VirtualService returns the one that routes host for sidecars, or nil.
func (s *Scope) VirtualService(host string) *mesh.VirtualService {
	if vs := s.byHost[host]; vs != nil {
		return vs
	}
	for _, w := range s.wildHost {
		if Covers(w, host) {
			return s.byHost[w]
		}
	}
	return nil
}

// RegistryOnly reports whether connections to hosts that are not known are refused. What the Sidecar says of it counts
// before what the mesh says.
func (s *Scope) RegistryOnly() bool {
	if p := s.Sidecar.GetSpec().GetOutboundTrafficPolicy(); p != nil {
		return p.GetMode() == networking.OutboundTrafficPolicy_REGISTRY_ONLY
	}
	p := s.snap.MeshConfig.GetSpec().GetOutboundTrafficPolicy()
	return p != nil && p.GetMode() == meshconfig.MeshConfig_OutboundTrafficPolicy_REGISTRY_ONLY
}

func boundToMesh(vs *networking.VirtualService) bool {
	return len(vs.GetGateways()) == 0 || slices.Contains(vs.GetGateways(), meshGateway)
}

// destinations are the hosts that the rules lead to.
func destinations(byHost map[string]*mesh.VirtualService) map[string]bool {
	out := map[string]bool{}
	for _, vs := range byHost {
		for _, h := range Destinations(vs) {
			out[h] = true
		}
	}
	return out
}

// Destinations returns the hosts that a VirtualService leads to, in no order; one may be there several times, or be empty.
func Destinations(vs *mesh.VirtualService) (out []string) {
	for _, h := range vs.Spec.GetHttp() {
		for _, d := range h.GetRoute() {
			out = append(out, d.GetDestination().GetHost())
		}
		out = append(out, h.GetMirror().GetHost())
		for _, m := range h.GetMirrors() {
			out = append(out, m.GetDestination().GetHost())
		}
	}
	for _, t := range vs.Spec.GetTls() {
		for _, d := range t.GetRoute() {
			out = append(out, d.GetDestination().GetHost())
		}
	}
	for _, t := range vs.Spec.GetTcp() {
		for _, d := range t.GetRoute() {
			out = append(out, d.GetDestination().GetHost())
		}
	}
	return out
}

// wildcards returns the keys that begin with "*", longest first.
func wildcards[T any](m map[string]T) []string {
	var out []string
	for k := range m {
		if strings.HasPrefix(k, "*") {
			out = append(out, k)
		}
	}
	slices.SortFunc(out, func(a, b string) int {
		if len(a) != len(b) {
			return len(b) - len(a)
		}
		return strings.Compare(a, b)
	})
	return out
}
