package authz

import (
	"net/netip"
	"regexp"
	"strconv"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	rbacv3 "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	uritemplatev3 "github.com/envoyproxy/go-control-plane/envoy/extensions/path/match/uri_template/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	security "istio.io/api/security/v1"
	typev1beta1 "istio.io/api/type/v1beta1"

	"github.com/isthmus-mesh/isthmus/discovery/translate/wire"
)

type targetRef = typev1beta1.PolicyTargetReference

// rule translates one rule. What a request says is not known of bytes that are passed on: an ALLOW rule that asks for it
// never matches there, the other rules do without it.
type rule struct {
	trust     trust
	namespace string // of the policy
	tcp       bool
	allow     bool
	never     bool
}

// translate returns nil for a rule that never matches.
func (g *rule) translate(r *security.Rule) *rbacv3.Policy {
	var whenTo []*rbacv3.Permission
	var whenFrom []*rbacv3.Principal
	for _, c := range r.GetWhen() {
		to, from := g.condition(c)
		whenTo, whenFrom = append(whenTo, to...), append(whenFrom, from...)
	}
	out := &rbacv3.Policy{}
	for _, t := range r.GetTo() {
		out.Permissions = append(out.Permissions, allOf(append(g.operation(t.GetOperation()), whenTo...)))
	}
	if len(r.GetTo()) == 0 {
		out.Permissions = append(out.Permissions, allOf(whenTo))
	}
	for _, f := range r.GetFrom() {
		out.Principals = append(out.Principals, allFrom(append(g.source(f.GetSource()), whenFrom...)))
	}
	if len(r.GetFrom()) == 0 {
		out.Principals = append(out.Principals, allFrom(whenFrom))
	}
	if g.never {
		return nil
	}
	return out
}

// known reports whether what HTTP says may be matched.
func (g *rule) known(values ...[]string) bool {
	for _, v := range values {
		if len(v) > 0 && g.tcp && g.allow {
			g.never = true
		}
	}
	return !g.tcp
}

func (g *rule) operation(o *security.Operation) (out []*rbacv3.Permission) {
	if g.known(o.GetHosts(), o.GetNotHosts(), o.GetMethods(), o.GetNotMethods(), o.GetPaths(), o.GetNotPaths()) {
		out = append(out, permissions(o.GetHosts(), o.GetNotHosts(), func(v string) *rbacv3.Permission { return header(":authority", v, true) })...)
		out = append(out, permissions(o.GetMethods(), o.GetNotMethods(), func(v string) *rbacv3.Permission { return header(":method", v, false) })...)
		out = append(out, permissions(o.GetPaths(), o.GetNotPaths(), path)...)
	}
	return append(out, permissions(o.GetPorts(), o.GetNotPorts(), port)...)
}

func (g *rule) source(s *security.Source) (out []*rbacv3.Principal) {
	add := func(values, not []string, match func(string) *rbacv3.Principal) {
		out = append(out, principals(values, not, match)...)
	}
	add(s.GetPrincipals(), s.GetNotPrincipals(), g.principal)
	add(s.GetNamespaces(), s.GetNotNamespaces(), namespace)
	add(s.GetServiceAccounts(), s.GetNotServiceAccounts(), g.account)
	add(s.GetTrustDomains(), s.GetNotTrustDomains(), g.domain)
	add(s.GetIpBlocks(), s.GetNotIpBlocks(), directIP)
	add(s.GetRemoteIpBlocks(), s.GetNotRemoteIpBlocks(), remoteIP)
	if g.known(s.GetRequestPrincipals(), s.GetNotRequestPrincipals()) {
		add(s.GetRequestPrincipals(), s.GetNotRequestPrincipals(), requestPrincipal)
	}
	return out
}

// condition translates one condition (Istio's reference of authorization conditions).
func (g *rule) condition(c *security.Condition) (to []*rbacv3.Permission, from []*rbacv3.Principal) {
	key, yes, no := c.GetKey(), c.GetValues(), c.GetNotValues()
	if strings.HasPrefix(key, "request.") && !g.known(yes, no) {
		return nil, nil
	}
	where := func(match func(string) *rbacv3.Permission) { to = permissions(yes, no, match) }
	who := func(match func(string) *rbacv3.Principal) { from = principals(yes, no, match) }
	switch key {
	case "source.ip":
		who(directIP)
	case "remote.ip":
		who(remoteIP)
	case "source.namespace":
		who(namespace)
	case "source.principal":
		who(g.principal)
	case "source.serviceAccount":
		who(g.account)
	case "source.trustDomain":
		who(g.domain)
	case "request.auth.principal":
		who(requestPrincipal)
	case "request.auth.audiences":
		who(claim("aud"))
	case "request.auth.presenter":
		who(claim("azp"))
	case "destination.ip":
		where(func(v string) *rbacv3.Permission {
			return &rbacv3.Permission{Rule: &rbacv3.Permission_DestinationIp{DestinationIp: block(v)}}
		})
	case "destination.port":
		where(port)
	case "connection.sni":
		where(func(v string) *rbacv3.Permission {
			return &rbacv3.Permission{Rule: &rbacv3.Permission_RequestedServerName{RequestedServerName: text(v, false)}}
		})
	default:
		name, path := brackets(key)
		switch {
		case name == "request.headers" && len(path) == 1:
			who(func(v string) *rbacv3.Principal {
				return &rbacv3.Principal{Identifier: &rbacv3.Principal_Header{Header: headerMatcher(path[0], v, false)}}
			})
		case name == "request.auth.claims" && len(path) > 0:
			who(claim(path...))
		case strings.HasPrefix(name, "experimental.envoy.filters.") && len(path) == 1:
			where(filterMetadata(strings.TrimPrefix(name, "experimental."), path[0]))
		default:
			g.never = true // refused where objects are read
		}
	}
	return to, from
}

// brackets cuts name[a][b] into its parts.
func brackets(key string) (name string, path []string) {
	name, rest, _ := strings.Cut(key, "[")
	for rest != "" {
		part, more, ok := strings.Cut(rest, "]")
		if !ok {
			return name, nil
		}
		path, rest = append(path, part), strings.TrimPrefix(more, "[")
	}
	return name, path
}

func permissions(values, not []string, match func(string) *rbacv3.Permission) (out []*rbacv3.Permission) {
	any := func(list []string) *rbacv3.Permission {
		var rules []*rbacv3.Permission
		for _, v := range list {
			rules = append(rules, match(v))
		}
		if len(rules) == 1 {
			return rules[0]
		}
		return &rbacv3.Permission{Rule: &rbacv3.Permission_OrRules{OrRules: &rbacv3.Permission_Set{Rules: rules}}}
	}
	if len(values) > 0 {
		out = append(out, any(values))
	}
	if len(not) > 0 {
		out = append(out, &rbacv3.Permission{Rule: &rbacv3.Permission_NotRule{NotRule: any(not)}})
	}
	return out
}

func principals(values, not []string, match func(string) *rbacv3.Principal) (out []*rbacv3.Principal) {
	any := func(list []string) *rbacv3.Principal {
		var ids []*rbacv3.Principal
		for _, v := range list {
			ids = append(ids, match(v))
		}
		return oneOf(ids)
	}
	if len(values) > 0 {
		out = append(out, any(values))
	}
	if len(not) > 0 {
		out = append(out, &rbacv3.Principal{Identifier: &rbacv3.Principal_NotId{NotId: any(not)}})
	}
	return out
}

func allOf(list []*rbacv3.Permission) *rbacv3.Permission {
	switch len(list) {
	case 0:
		return &rbacv3.Permission{Rule: &rbacv3.Permission_Any{Any: true}}
	case 1:
		return list[0]
	}
	return &rbacv3.Permission{Rule: &rbacv3.Permission_AndRules{AndRules: &rbacv3.Permission_Set{Rules: list}}}
}

func allFrom(list []*rbacv3.Principal) *rbacv3.Principal {
	switch len(list) {
	case 0:
		return &rbacv3.Principal{Identifier: &rbacv3.Principal_Any{Any: true}}
	case 1:
		return list[0]
	}
	return &rbacv3.Principal{Identifier: &rbacv3.Principal_AndIds{AndIds: &rbacv3.Principal_Set{Ids: list}}}
}

func oneOf(ids []*rbacv3.Principal) *rbacv3.Principal {
	if len(ids) == 1 {
		return ids[0]
	}
	return &rbacv3.Principal{Identifier: &rbacv3.Principal_OrIds{OrIds: &rbacv3.Principal_Set{Ids: ids}}}
}

// text matches "*" (there is some), "prefix*", "*suffix" or the value itself.
func text(v string, ignoreCase bool) *matcherv3.StringMatcher {
	switch {
	case v == "*":
		return &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_SafeRegex{SafeRegex: wire.Regex(".+")}}
	case strings.HasPrefix(v, "*"):
		return &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Suffix{Suffix: v[1:]}, IgnoreCase: ignoreCase}
	case strings.HasSuffix(v, "*"):
		return &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Prefix{Prefix: v[:len(v)-1]}, IgnoreCase: ignoreCase}
	}
	return &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Exact{Exact: v}, IgnoreCase: ignoreCase}
}

// regex is text as an expression for a part between slashes.
func regex(v, anything string) string {
	switch {
	case v == "*":
		return strings.TrimSuffix(anything, "*") + "+"
	case strings.HasPrefix(v, "*"):
		return anything + regexp.QuoteMeta(v[1:])
	case strings.HasSuffix(v, "*"):
		return regexp.QuoteMeta(v[:len(v)-1]) + anything
	}
	return regexp.QuoteMeta(v)
}

func headerMatcher(name, v string, ignoreCase bool) *routev3.HeaderMatcher {
	m := &routev3.HeaderMatcher{Name: name}
	if v == "*" {
		m.HeaderMatchSpecifier = &routev3.HeaderMatcher_PresentMatch{PresentMatch: true}
	} else {
		m.HeaderMatchSpecifier = &routev3.HeaderMatcher_StringMatch{StringMatch: text(v, ignoreCase)}
	}
	return m
}

func header(name, v string, ignoreCase bool) *rbacv3.Permission {
	return &rbacv3.Permission{Rule: &rbacv3.Permission_Header{Header: headerMatcher(name, v, ignoreCase)}}
}

// path matches what stands before the query. Braces make it a template.
func path(v string) *rbacv3.Permission {
	if strings.ContainsAny(v, "{}") {
		template := strings.NewReplacer("{**}", "**", "{*}", "*").Replace(v)
		return &rbacv3.Permission{Rule: &rbacv3.Permission_UriTemplate{UriTemplate: &corev3.TypedExtensionConfig{
			Name: "uri-template", TypedConfig: wire.Pack(&uritemplatev3.UriTemplateMatchConfig{PathTemplate: template}),
		}}}
	}
	return &rbacv3.Permission{Rule: &rbacv3.Permission_UrlPath{UrlPath: &matcherv3.PathMatcher{Rule: &matcherv3.PathMatcher_Path{Path: text(v, false)}}}}
}

func port(v string) *rbacv3.Permission {
	n, _ := strconv.ParseUint(v, 10, 16) // checked where objects are read; port 0 matches nothing
	return &rbacv3.Permission{Rule: &rbacv3.Permission_DestinationPort{DestinationPort: uint32(n)}}
}

func (g *rule) principal(v string) *rbacv3.Principal {
	var ids []*rbacv3.Principal
	for _, p := range g.trust.principals(v) {
		m := &matcherv3.StringMatcher{}
		switch {
		case p == "*":
			m = text("*", false)
		case strings.HasPrefix(p, "*"):
			m.MatchPattern = &matcherv3.StringMatcher_SafeRegex{SafeRegex: wire.Regex("spiffe://" + regex(p, ".*"))}
		default:
			m = text("spiffe://"+p, false)
		}
		ids = append(ids, identity(m))
	}
	return oneOf(ids)
}

func identity(m *matcherv3.StringMatcher) *rbacv3.Principal {
	return &rbacv3.Principal{Identifier: &rbacv3.Principal_Authenticated_{Authenticated: &rbacv3.Principal_Authenticated{PrincipalName: m}}}
}

func spiffe(expr string) *rbacv3.Principal {
	return identity(&matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_SafeRegex{SafeRegex: wire.Regex("spiffe://" + expr)}})
}

// namespace matches in every trust domain: a namespace is the same in all clusters of the mesh.
func namespace(v string) *rbacv3.Principal { return spiffe("[^/]+/ns/" + regex(v, "[^/]*") + "/sa/.+") }

// account matches NAMESPACE/NAME, or NAME in the policy's own namespace, in every trust domain.
func (g *rule) account(v string) *rbacv3.Principal {
	ns, name, ok := strings.Cut(v, "/")
	if !ok {
		ns, name = g.namespace, v
	}
	return spiffe("[^/]+/ns/" + regexp.QuoteMeta(ns) + "/sa/" + regexp.QuoteMeta(name))
}

func (g *rule) domain(v string) *rbacv3.Principal {
	var ids []*rbacv3.Principal
	for _, d := range g.trust.domains(v) {
		ids = append(ids, spiffe(regex(d, "[^/]*")+"/.*"))
	}
	return oneOf(ids)
}

// block is an address or a range, checked where objects are read; a wrong one matches nothing that exists.
func block(v string) *corev3.CidrRange {
	p, err := netip.ParsePrefix(v)
	if a, alone := netip.ParseAddr(v); alone == nil {
		p, err = netip.PrefixFrom(a, a.BitLen()), nil
	}
	if err != nil {
		p = netip.PrefixFrom(netip.IPv4Unspecified(), 32)
	}
	p = p.Masked()
	return &corev3.CidrRange{AddressPrefix: p.Addr().String(), PrefixLen: wire.U32(uint32(p.Bits()))}
}

func directIP(v string) *rbacv3.Principal {
	return &rbacv3.Principal{Identifier: &rbacv3.Principal_DirectRemoteIp{DirectRemoteIp: block(v)}}
}

func remoteIP(v string) *rbacv3.Principal {
	return &rbacv3.Principal{Identifier: &rbacv3.Principal_RemoteIp{RemoteIp: block(v)}}
}
