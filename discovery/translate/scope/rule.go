package scope

import (
	"slices"
	"strings"

	networking "istio.io/api/networking/v1"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// Rule is what the DestinationRules of one host say together.
type Rule struct {
	Object  mesh.ObjectRef
	Policy  *networking.TrafficPolicy
	Subsets []*networking.Subset // sorted by name
}

// RuleFor merges the DestinationRules of the service.
func (s *Scope) RuleFor(svc *mesh.Service) Rule { return mergeRules(s.RulesFor(svc)) }

// RulesFor returns the DestinationRules that are for the service: those of the proxy's own namespace, else of the
// service's, else of the root namespace; of the exact host, else of the longest wildcard.
func (s *Scope) RulesFor(svc *mesh.Service) []*mesh.DestinationRule {
	if len(s.rules) == 0 {
		return nil
	}
	hosts := []string{svc.Host}
	for _, w := range s.wild {
		if w != svc.Host && Covers(w, svc.Host) {
			hosts = append(hosts, w)
		}
	}
	for _, ns := range []string{s.proxy.Namespace, svc.Namespace, rootNamespace} {
		for _, h := range hosts {
			var out []*mesh.DestinationRule
			for _, d := range s.rules[h] {
				if d.Object.Namespace == ns {
					out = append(out, d)
				}
			}
			if len(out) > 0 {
				return out
			}
		}
	}
	return nil
}

// mergeRules joins rules. Those with a workload selector are only here when they select the proxy, and count before those
// without.
func mergeRules(rules []*mesh.DestinationRule) (out Rule) {
	for _, selected := range []bool{true, false} {
		for _, d := range rules {
			if selected != (len(d.Spec.GetWorkloadSelector().GetMatchLabels()) > 0) {
				continue
			}
			if out.Object == (mesh.ObjectRef{}) {
				out.Object = d.Object
			}
			if out.Policy == nil {
				out.Policy = d.Spec.GetTrafficPolicy()
			}
			for _, s := range d.Spec.GetSubsets() {
				if out.Subset(s.GetName()) == nil {
					out.Subsets = append(out.Subsets, s)
				}
			}
		}
	}
	slices.SortFunc(out.Subsets, func(a, b *networking.Subset) int { return strings.Compare(a.GetName(), b.GetName()) })
	return out
}

// Subset returns the subset of that name, or nil.
func (r Rule) Subset(name string) *networking.Subset {
	for _, s := range r.Subsets {
		if s.GetName() == name {
			return s
		}
	}
	return nil
}

// PolicyFor is the policy of one port and subset: a subset's settings replace those of the host, and settings of a
// port replace both, without inheriting what they leave out. What settings of a port cannot say is inherited.
func (r Rule) PolicyFor(port uint32, subset *networking.Subset) *networking.TrafficPolicy {
	return overlay(overlay(&networking.TrafficPolicy{}, r.Policy, port), subset.GetTrafficPolicy(), port)
}

func overlay(base, over *networking.TrafficPolicy, port uint32) *networking.TrafficPolicy {
	if over == nil {
		return base
	}
	out := &networking.TrafficPolicy{
		LoadBalancer: base.GetLoadBalancer(), ConnectionPool: base.GetConnectionPool(), OutlierDetection: base.GetOutlierDetection(), Tls: base.GetTls(),
		Tunnel: base.GetTunnel(), ProxyProtocol: base.GetProxyProtocol(), RetryBudget: base.GetRetryBudget(),
	}
	replace(&out.Tunnel, over.GetTunnel())
	replace(&out.ProxyProtocol, over.GetProxyProtocol())
	replace(&out.RetryBudget, over.GetRetryBudget())
	for _, p := range over.GetPortLevelSettings() {
		if p.GetPort().GetNumber() == port {
			out.LoadBalancer, out.ConnectionPool, out.OutlierDetection, out.Tls = p.GetLoadBalancer(), p.GetConnectionPool(), p.GetOutlierDetection(), p.GetTls()
			return out
		}
	}
	replace(&out.LoadBalancer, over.GetLoadBalancer())
	replace(&out.ConnectionPool, over.GetConnectionPool())
	replace(&out.OutlierDetection, over.GetOutlierDetection())
	replace(&out.Tls, over.GetTls())
	return out
}

// replace sets what is said anew.
func replace[T any](old **T, said *T) {
	if said != nil {
		*old = said
	}
}
