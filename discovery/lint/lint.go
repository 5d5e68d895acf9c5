// Package lint finds what is allowed and surely not meant: rules that no request ever reaches. It is pure.
package lint

import (
	"fmt"
	"regexp"
	"slices"
	"strings"

	networking "istio.io/api/networking/v1"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// ReasonUnreachable is that of rules which an earlier rule hides.
const ReasonUnreachable = "UnreachableRoute"

const meshGateway = "mesh"

// Routes finds rules of VirtualServices that no request reaches, because an earlier rule of the same VirtualService takes
// all that they match. It says so only where it is sure: regular expressions hide what equals them, or an exact value
// that they match.
func Routes(services []*mesh.VirtualService) (out []mesh.Problem) {
	for _, vs := range services {
		if vs.GatewayAPI { // rules of several routes, in order: the first may well take all
			continue
		}
		gateways := vs.Spec.GetGateways()
		if len(gateways) == 0 {
			gateways = []string{meshGateway}
		}
		out = append(out, hidden(vs, "http", httpRules(vs.Spec.GetHttp(), gateways), coversHTTP)...)
		out = append(out, hidden(vs, "tls", tlsRules(vs.Spec.GetTls(), gateways), coversTLS)...)
		out = append(out, hidden(vs, "tcp", tcpRules(vs.Spec.GetTcp(), gateways), coversTCP)...)
	}
	return out
}

// rule is what a route matches: any of its matches. One without takes all.
type rule[M any] struct {
	matches []M
	hides   bool // false: it may let through what it matches
}

// hidden reports the rules, or those of their matches, that earlier matches cover.
func hidden[M any](vs *mesh.VirtualService, layer string, rules []rule[M], covers func(a, b M) bool) (out []mesh.Problem) {
	add := func(field string, by int) {
		out = append(out, mesh.Problem{
			Object: vs.Object, Field: field, Reason: ReasonUnreachable, Message: fmt.Sprintf("no request gets here: spec.%s[%d] takes all that it matches", layer, by),
			Remedy: "put it before that rule, or remove it",
		})
	}
	for j, r := range rules {
		by := make([]int, len(r.matches))
		found := 0
		for k, m := range r.matches {
			if by[k] = coveredBy(rules[:j], m, covers); by[k] >= 0 {
				found++
			}
		}
		switch {
		case found == len(r.matches):
			add(fmt.Sprintf("spec.%s[%d]", layer, j), by[0])
		case found > 0:
			for k := range r.matches {
				if by[k] >= 0 {
					add(fmt.Sprintf("spec.%s[%d].match[%d]", layer, j, k), by[k])
				}
			}
		}
	}
	return out
}

// coveredBy returns the first rule with a match that covers m; -1 when there is none.
func coveredBy[M any](rules []rule[M], m M, covers func(a, b M) bool) int {
	return slices.IndexFunc(rules, func(r rule[M]) bool {
		return r.hides && slices.ContainsFunc(r.matches, func(a M) bool { return covers(a, m) })
	})
}

// httpMatch is a match with the gateways at which it applies.
type httpMatch struct {
	*networking.HTTPMatchRequest
	at []string
}

func httpRules(routes []*networking.HTTPRoute, gateways []string) (out []rule[httpMatch]) {
	for _, r := range routes {
		x := rule[httpMatch]{hides: r.GetDelegate() == nil}
		for _, m := range r.GetMatch() {
			x.matches = append(x.matches, httpMatch{m, orElse(m.GetGateways(), gateways)})
		}
		if len(x.matches) == 0 {
			x.matches = []httpMatch{{&networking.HTTPMatchRequest{}, gateways}}
		}
		out = append(out, x)
	}
	return out
}

// coversHTTP reports whether a matches every request that b matches.
func coversHTTP(a, b httpMatch) bool {
	return within(b.at, a.at) && (a.GetPort() == 0 || a.GetPort() == b.GetPort()) &&
		(a.GetSourceNamespace() == "" || a.GetSourceNamespace() == b.GetSourceNamespace()) && subset(a.GetSourceLabels(), b.GetSourceLabels()) &&
		coversURI(a, b) && coversText(a.GetScheme(), b.GetScheme()) && coversText(a.GetMethod(), b.GetMethod()) && coversText(a.GetAuthority(), b.GetAuthority()) &&
		coversAll(a.GetHeaders(), b.GetHeaders()) && coversAll(a.GetQueryParams(), b.GetQueryParams()) && coversNone(a.GetWithoutHeaders(), b.GetWithoutHeaders())
}

func coversURI(a, b httpMatch) bool {
	u := a.GetUri()
	if u == nil || u.GetPrefix() == "/" {
		return true
	}
	v := b.GetUri()
	switch {
	case v == nil, b.GetIgnoreUriCase() && !a.GetIgnoreUriCase():
		return false
	case a.GetIgnoreUriCase():
		return u.GetRegex() == "" && coversText(lower(u), lower(v))
	}
	return coversText(u, v)
}

func lower(m *networking.StringMatch) *networking.StringMatch {
	switch t := m.GetMatchType().(type) {
	case *networking.StringMatch_Exact:
		return &networking.StringMatch{MatchType: &networking.StringMatch_Exact{Exact: strings.ToLower(t.Exact)}}
	case *networking.StringMatch_Prefix:
		return &networking.StringMatch{MatchType: &networking.StringMatch_Prefix{Prefix: strings.ToLower(t.Prefix)}}
	}
	return m
}

// coversText reports whether every text that b allows is one that a allows. No match allows all; one that says nothing
// allows all that is there.
func coversText(a, b *networking.StringMatch) bool {
	if a == nil {
		return true
	}
	if b == nil {
		return false
	}
	switch t := a.GetMatchType().(type) {
	case nil:
		return true
	case *networking.StringMatch_Exact:
		x, ok := b.GetMatchType().(*networking.StringMatch_Exact)
		return ok && x.Exact == t.Exact
	case *networking.StringMatch_Prefix:
		switch x := b.GetMatchType().(type) {
		case *networking.StringMatch_Exact:
			return strings.HasPrefix(x.Exact, t.Prefix)
		case *networking.StringMatch_Prefix:
			return strings.HasPrefix(x.Prefix, t.Prefix)
		}
	case *networking.StringMatch_Regex:
		if t.Regex == ".*" {
			return true
		}
		switch x := b.GetMatchType().(type) {
		case *networking.StringMatch_Regex:
			return x.Regex == t.Regex
		case *networking.StringMatch_Exact:
			re, err := regexp.Compile("^(?:" + t.Regex + ")$")
			return err == nil && re.MatchString(x.Exact)
		}
	}
	return false
}

// coversAll: b has each condition that a has, as narrow or narrower.
func coversAll(a, b map[string]*networking.StringMatch) bool {
	for k, x := range a {
		if y, ok := b[k]; !ok || !coversText(orPresent(x), orPresent(y)) {
			return false
		}
	}
	return true
}

// coversNone: b leaves out at least what a leaves out.
func coversNone(a, b map[string]*networking.StringMatch) bool {
	for k, x := range a {
		if y, ok := b[k]; !ok || !coversText(orPresent(y), orPresent(x)) {
			return false
		}
	}
	return true
}

// orPresent is the match of a header that must be there: nil says the same as one without a condition.
func orPresent(m *networking.StringMatch) *networking.StringMatch {
	if m == nil {
		return &networking.StringMatch{}
	}
	return m
}

// tlsMatch and tcpMatch are matches with the gateways at which they apply.
type (
	tlsMatch struct {
		*networking.TLSMatchAttributes
		at []string
	}
	tcpMatch struct {
		*networking.L4MatchAttributes
		at []string
	}
)

func tlsRules(routes []*networking.TLSRoute, gateways []string) (out []rule[tlsMatch]) {
	for _, r := range routes {
		x := rule[tlsMatch]{hides: true}
		for _, m := range r.GetMatch() {
			x.matches = append(x.matches, tlsMatch{m, orElse(m.GetGateways(), gateways)})
		}
		if len(x.matches) == 0 {
			continue // refused elsewhere: it needs server names
		}
		out = append(out, x)
	}
	return out
}

func coversTLS(a, b tlsMatch) bool {
	names := !slices.ContainsFunc(b.GetSniHosts(), func(h string) bool {
		return !slices.ContainsFunc(a.GetSniHosts(), func(p string) bool { return coversHost(p, h) })
	})
	return len(b.GetSniHosts()) > 0 && names && within(b.at, a.at) && (a.GetPort() == 0 || a.GetPort() == b.GetPort()) && coversSubnets(a.GetDestinationSubnets(), b.GetDestinationSubnets()) &&
		(a.GetSourceNamespace() == "" || a.GetSourceNamespace() == b.GetSourceNamespace()) && subset(a.GetSourceLabels(), b.GetSourceLabels())
}

func tcpRules(routes []*networking.TCPRoute, gateways []string) (out []rule[tcpMatch]) {
	for _, r := range routes {
		x := rule[tcpMatch]{hides: true}
		for _, m := range r.GetMatch() {
			x.matches = append(x.matches, tcpMatch{m, orElse(m.GetGateways(), gateways)})
		}
		if len(x.matches) == 0 {
			x.matches = []tcpMatch{{&networking.L4MatchAttributes{}, gateways}}
		}
		out = append(out, x)
	}
	return out
}

func coversTCP(a, b tcpMatch) bool {
	return within(b.at, a.at) && (a.GetPort() == 0 || a.GetPort() == b.GetPort()) && coversSubnets(a.GetDestinationSubnets(), b.GetDestinationSubnets()) &&
		(a.GetSourceNamespace() == "" || a.GetSourceNamespace() == b.GetSourceNamespace()) && subset(a.GetSourceLabels(), b.GetSourceLabels()) &&
		(a.GetSourceSubnet() == "" || a.GetSourceSubnet() == b.GetSourceSubnet())
}

func orElse(list, otherwise []string) []string {
	if len(list) > 0 {
		return list
	}
	return otherwise
}

// within reports whether all of a are in b.
func within(a, b []string) bool {
	return !slices.ContainsFunc(a, func(x string) bool { return !slices.Contains(b, x) })
}

// coversSubnets: none is all.
func coversSubnets(a, b []string) bool { return len(a) == 0 || len(b) > 0 && within(b, a) }

// subset reports whether b has all that a has.
func subset(a, b map[string]string) bool {
	for k, v := range a {
		if w, ok := b[k]; !ok || w != v {
			return false
		}
	}
	return true
}

// coversHost reports whether pattern, which may begin with a wildcard, takes all that host takes.
func coversHost(pattern, host string) bool {
	suffix, wild := strings.CutPrefix(pattern, "*")
	return pattern == host || wild && strings.HasSuffix(strings.TrimPrefix(host, "*"), suffix)
}
