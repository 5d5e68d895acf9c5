package translate

import (
	"slices"
	"strings"

	networking "istio.io/api/networking/v1"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/translate/wire"
)

// routing finds the rules that steer this proxy's traffic to a host.
type routing struct {
	snap     *mesh.Snapshot
	proxy    *mesh.Proxy
	rules    map[string][]*mesh.DestinationRule // by host, visible to the proxy
	wild     []string                           // hosts in rules that begin with "*", longest first
	byHost   map[string]*mesh.VirtualService    // bound to the mesh gateway, first by namespace and name
	wildHost []string
}

func newRouting(snap *mesh.Snapshot, p *mesh.Proxy, ps *problems) *routing {
	r := &routing{snap: snap, proxy: p, rules: map[string][]*mesh.DestinationRule{}, byHost: map[string]*mesh.VirtualService{}}
	for _, d := range snap.DestinationRules {
		sel := d.Spec.GetWorkloadSelector().GetMatchLabels()
		if !visible(d.Spec.GetExportTo(), d.Object.Namespace, p.Namespace) ||
			len(sel) > 0 && (d.Object.Namespace != p.Namespace || !selects(sel, p.Labels)) {
			continue
		}
		r.rules[d.Spec.GetHost()] = append(r.rules[d.Spec.GetHost()], d)
	}
	for _, vs := range snap.VirtualServices {
		if !visible(vs.Spec.GetExportTo(), vs.Object.Namespace, p.Namespace) || !boundToMesh(vs.Spec) {
			continue
		}
		for _, h := range vs.Spec.GetHosts() {
			if first, taken := r.byHost[h]; taken {
				ps.add(vs.Object, "spec.hosts", reasonHostConflict, "host "+h+" is routed by "+first.Object.String())
				continue
			}
			r.byHost[h] = vs
		}
	}
	r.wild, r.wildHost = wildcards(r.rules), wildcards(r.byHost)
	return r
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

// covers reports whether host is pattern, or is below the wildcard pattern.
func covers(pattern, host string) bool {
	if pattern == host || pattern == "*" {
		return true
	}
	suffix, ok := strings.CutPrefix(pattern, "*")
	return ok && strings.HasSuffix(strings.TrimPrefix(host, "*"), suffix)
}

func visible(exportTo []string, owner, reader string) bool {
	for _, e := range exportTo {
		if e == "*" || e == reader || e == "." && owner == reader {
			return true
		}
	}
	return len(exportTo) == 0
}

func selects(selector, labels map[string]string) bool {
	for k, want := range selector {
		if labels[k] != want {
			return false
		}
	}
	return true
}

func boundToMesh(vs *networking.VirtualService) bool {
	return len(vs.GetGateways()) == 0 || slices.Contains(vs.GetGateways(), meshGateway)
}

// virtualService returns the one that routes host for sidecars, or nil.
func (r *routing) virtualService(host string) *mesh.VirtualService {
	if vs := r.byHost[host]; vs != nil {
		return vs
	}
	for _, w := range r.wildHost {
		if covers(w, host) {
			return r.byHost[w]
		}
	}
	return nil
}

// rule is what the DestinationRules of one host say together.
type rule struct {
	object  mesh.ObjectRef
	policy  *networking.TrafficPolicy
	subsets []*networking.Subset // sorted by name
}

// ruleFor merges the DestinationRules of the service: those of the proxy's own namespace, else of the service's, else
// of the root namespace; of the exact host, else of the longest wildcard.
func (r *routing) ruleFor(s *mesh.Service) rule {
	hosts := []string{s.Host}
	for _, w := range r.wild {
		if w != s.Host && covers(w, s.Host) {
			hosts = append(hosts, w)
		}
	}
	for _, ns := range []string{r.proxy.Namespace, s.Namespace, rootNamespace} {
		for _, h := range hosts {
			if out, ok := mergeRules(r.rules[h], ns); ok {
				return out
			}
		}
	}
	return rule{}
}

func mergeRules(rules []*mesh.DestinationRule, namespace string) (out rule, ok bool) {
	for _, d := range rules {
		if d.Object.Namespace != namespace {
			continue
		}
		if !ok {
			out.object, ok = d.Object, true
		}
		if out.policy == nil {
			out.policy = d.Spec.GetTrafficPolicy()
		}
		for _, s := range d.Spec.GetSubsets() {
			if !slices.ContainsFunc(out.subsets, func(o *networking.Subset) bool { return o.GetName() == s.GetName() }) {
				out.subsets = append(out.subsets, s)
			}
		}
	}
	slices.SortFunc(out.subsets, func(a, b *networking.Subset) int { return strings.Compare(a.GetName(), b.GetName()) })
	return out, ok
}

func (r rule) subset(name string) *networking.Subset {
	for _, s := range r.subsets {
		if s.GetName() == name {
			return s
		}
	}
	return nil
}

// policyFor is the policy of one port and subset: a subset's settings replace those of the host, and settings of a
// port replace both, without inheriting what they leave out.
func (r rule) policyFor(port uint32, subset *networking.Subset) *networking.TrafficPolicy {
	return overlay(overlay(&networking.TrafficPolicy{}, r.policy, port), subset.GetTrafficPolicy(), port)
}

func overlay(base, over *networking.TrafficPolicy, port uint32) *networking.TrafficPolicy {
	if over == nil {
		return base
	}
	for _, p := range over.GetPortLevelSettings() {
		if p.GetPort().GetNumber() == port {
			return &networking.TrafficPolicy{
				LoadBalancer: p.GetLoadBalancer(), ConnectionPool: p.GetConnectionPool(), OutlierDetection: p.GetOutlierDetection(), Tls: p.GetTls(),
			}
		}
	}
	out := &networking.TrafficPolicy{
		LoadBalancer: base.GetLoadBalancer(), ConnectionPool: base.GetConnectionPool(), OutlierDetection: base.GetOutlierDetection(), Tls: base.GetTls(),
	}
	if over.GetLoadBalancer() != nil {
		out.LoadBalancer = over.GetLoadBalancer()
	}
	if over.GetConnectionPool() != nil {
		out.ConnectionPool = over.GetConnectionPool()
	}
	if over.GetOutlierDetection() != nil {
		out.OutlierDetection = over.GetOutlierDetection()
	}
	if over.GetTls() != nil {
		out.Tls = over.GetTls()
	}
	return out
}

// target is a destination that exists.
type target struct {
	service *mesh.Service
	port    mesh.Port
	cluster string
	policy  *networking.TrafficPolicy
}

// resolve finds the cluster of a destination; port is the one the client asked for, used when the destination names none.
func (v *view) resolve(d *networking.Destination, port uint32, object mesh.ObjectRef, field string) (target, bool) {
	s := v.snap.Service(d.GetHost())
	if s == nil {
		v.problems.add(object, field+".host", reasonUnknownHost, "no service has the host "+d.GetHost())
		return target{}, false
	}
	number := d.GetPort().GetNumber()
	if number == 0 && len(s.Ports) == 1 {
		number = s.Ports[0].Number
	} else if number == 0 {
		number = port
	}
	p, ok := s.Port(number)
	if !ok || p.Protocol == mesh.UDP {
		v.problems.add(object, field+".port", reasonUnknownPort, d.GetHost()+" has no port "+wire.Itoa(number))
		return target{}, false
	}
	r := v.routing.ruleFor(s)
	sub := r.subset(d.GetSubset())
	if d.GetSubset() != "" && sub == nil {
		v.problems.add(object, field+".subset", reasonUnknownSubset, d.GetHost()+" has no subset "+d.GetSubset())
		return target{}, false
	}
	return target{s, p, clusterName("outbound", number, d.GetSubset(), s.Host), r.policyFor(number, sub)}, true
}
