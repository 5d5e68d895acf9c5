// Package authz turns the AuthorizationPolicies of one workload into Envoy filters. It is pure. It knows what a peer's
// certificate and a request say; it does not know which listeners there are.
//
// The order is CUSTOM, AUDIT, DENY, ALLOW. A workload with an ALLOW policy takes nothing but what one of them allows.
package authz

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	rbacv3 "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	httprbacv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/rbac/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	tcprbacv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/rbac/v3"
	security "istio.io/api/security/v1"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/translate/target"
	"github.com/isthmus-mesh/isthmus/discovery/translate/wire"
)

// Names of the filters.
const (
	httpFilterName = "envoy.filters.http.rbac"
	tcpFilterName  = "envoy.filters.network.rbac"
)

// Filters stand in front of those that a listener has anyway.
type Filters struct {
	HTTP []*hcmv3.HttpFilter  // of a connection manager, in this order
	TCP  []*listenerv3.Filter // of a chain that passes bytes on, in this order
}

// For returns the filters of p's workload, which are the same at each of its ports, and what could not be honoured. Where
// that leaves in doubt whether something is allowed, it is not.
func For(snap *mesh.Snapshot, p *mesh.Proxy) (Filters, []mesh.Problem) {
	b := &builder{snap: snap, trust: trustOf(snap)}
	root := target.Root(snap)
	for _, ap := range snap.AuthorizationPolicies {
		if target.Applies(root, p, ap.Object.Namespace, ap.Spec.GetSelector().GetMatchLabels(), refs(ap.Spec)) {
			b.policies = append(b.policies, ap)
		}
	}
	if len(b.policies) == 0 {
		return Filters{}, nil
	}
	b.custom()
	b.plain(security.AuthorizationPolicy_AUDIT, rbacv3.RBAC_LOG, "")
	b.plain(security.AuthorizationPolicy_DENY, rbacv3.RBAC_DENY, "istio_dry_run_deny_")
	b.plain(security.AuthorizationPolicy_ALLOW, rbacv3.RBAC_ALLOW, "istio_dry_run_allow_")
	return b.out, b.problems
}

func refs(s *security.AuthorizationPolicy) []*targetRef {
	if r := s.GetTargetRef(); r != nil && len(s.GetTargetRefs()) == 0 {
		return []*targetRef{r}
	}
	return s.GetTargetRefs()
}

type builder struct {
	snap     *mesh.Snapshot
	trust    trust
	policies []*mesh.AuthorizationPolicy
	out      Filters
	problems []mesh.Problem
}

func (b *builder) problem(object mesh.ObjectRef, field, reason, message, remedy string) {
	b.problems = append(b.problems, mesh.Problem{Object: object, Field: field, Reason: reason, Message: message, Remedy: remedy})
}

// of returns the policies with one action, enforced or dry.
func (b *builder) of(action security.AuthorizationPolicy_Action, dry bool) (out []*mesh.AuthorizationPolicy) {
	for _, p := range b.policies {
		if p.Spec.GetAction() == action && p.DryRun == dry {
			out = append(out, p)
		}
	}
	return out
}

// plain adds the filters of one action that Envoy decides by itself.
func (b *builder) plain(action security.AuthorizationPolicy_Action, as rbacv3.RBAC_Action, shadowPrefix string) {
	enforced, dry := b.of(action, false), b.of(action, true)
	if len(enforced)+len(dry) == 0 {
		return
	}
	for _, tcp := range []bool{false, true} {
		b.add(tcp, b.rules(enforced, as, tcp, ""), b.rules(dry, as, tcp, ""), shadowPrefix)
	}
}

// add appends one RBAC filter. Rules that are nil decide nothing.
func (b *builder) add(tcp bool, rules, shadow *rbacv3.RBAC, shadowPrefix string) {
	if rules == nil && shadow == nil {
		return
	}
	if shadow == nil {
		shadowPrefix = ""
	}
	if tcp {
		b.out.TCP = append(b.out.TCP, &listenerv3.Filter{Name: tcpFilterName, ConfigType: &listenerv3.Filter_TypedConfig{TypedConfig: wire.Pack(&tcprbacv3.RBAC{
			Rules: rules, ShadowRules: shadow, ShadowRulesStatPrefix: shadowPrefix, StatPrefix: "tcp.",
		})}})
		return
	}
	b.out.HTTP = append(b.out.HTTP, httpFilter(httpFilterName, &httprbacv3.RBAC{Rules: rules, ShadowRules: shadow, ShadowRulesStatPrefix: shadowPrefix}))
}

// rules translates policies of one action; without any it is nil. Each rule is a policy of Envoy's, named after its object.
func (b *builder) rules(policies []*mesh.AuthorizationPolicy, as rbacv3.RBAC_Action, tcp bool, prefix string) *rbacv3.RBAC {
	if len(policies) == 0 {
		return nil
	}
	out := &rbacv3.RBAC{Action: as, Policies: map[string]*rbacv3.Policy{}}
	for _, p := range policies {
		for i, r := range p.Spec.GetRules() {
			g := &rule{trust: b.trust, namespace: p.Object.Namespace, tcp: tcp, allow: as == rbacv3.RBAC_ALLOW}
			if policy := g.translate(r); policy != nil {
				out.Policies[fmt.Sprintf("%sns[%s]-policy[%s]-rule[%d]", prefix, p.Object.Namespace, p.Object.Name, i)] = policy
			}
		}
	}
	return out
}

// trust are the names of the local trust domain.
type trust struct {
	local   []string // the trust domain and its aliases; the first is its own name
	literal bool     // "cluster.local" is the trust domain of some cluster, too
}

const clusterLocal = "cluster.local"

func trustOf(snap *mesh.Snapshot) trust {
	var t trust
	own := clusterLocal
	if snap.Local != nil {
		own = cmp.Or(string(snap.Local.TrustDomain), own)
	}
	t.local = []string{own}
	if snap.MeshConfig != nil {
		for _, alias := range snap.MeshConfig.Spec.GetTrustDomainAliases() {
			if !slices.Contains(t.local, alias) && alias != "" {
				t.local = append(t.local, alias)
			}
		}
	}
	t.literal = slices.ContainsFunc(snap.Clusters, func(c *mesh.Cluster) bool { return c.TrustDomain == clusterLocal })
	return t
}

// domains returns the trust domains that one name in a policy stands for.
func (t trust) domains(name string) []string {
	if name != clusterLocal && !slices.Contains(t.local, name) {
		return []string{name}
	}
	if name == clusterLocal && t.literal && !slices.Contains(t.local, name) {
		return append(slices.Clone(t.local), name)
	}
	return t.local
}

// principals writes out TRUST-DOMAIN/ns/NAMESPACE/sa/ACCOUNT for every name of the local trust domain.
func (t trust) principals(value string) (out []string) {
	value = strings.TrimPrefix(value, "spiffe://")
	domain, rest, ok := strings.Cut(value, "/")
	if !ok || strings.Contains(domain, "*") {
		return []string{value}
	}
	for _, d := range t.domains(domain) {
		out = append(out, d+"/"+rest)
	}
	return out
}
