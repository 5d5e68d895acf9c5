// Package httprule says what the HTTP fields of an Istio VirtualService are in Envoy: matches, header operations, rewrites,
// redirects, retries, faults. It knows no hosts: which cluster a destination is, is decided elsewhere.
package httprule

import (
	"maps"
	"regexp"
	"slices"

	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	networking "istio.io/api/networking/v1"

	"github.com/isthmus-mesh/isthmus/discovery/translate/wire"
)

// EveryPath matches every request.
func EveryPath() *routev3.RouteMatch {
	return &routev3.RouteMatch{PathSpecifier: &routev3.RouteMatch_Prefix{Prefix: "/"}}
}

// Match translates one match block; nil stands for "everything".
func Match(m *networking.HTTPMatchRequest) *routev3.RouteMatch {
	out := EveryPath()
	if m == nil {
		return out
	}
	switch u := m.GetUri().GetMatchType().(type) {
	case *networking.StringMatch_Exact:
		out.PathSpecifier = &routev3.RouteMatch_Path{Path: u.Exact}
	case *networking.StringMatch_Prefix:
		out.PathSpecifier = &routev3.RouteMatch_Prefix{Prefix: u.Prefix}
	case *networking.StringMatch_Regex:
		out.PathSpecifier = &routev3.RouteMatch_SafeRegex{SafeRegex: wire.Regex(u.Regex)}
	}
	if _, isRegex := out.PathSpecifier.(*routev3.RouteMatch_SafeRegex); m.GetIgnoreUriCase() && !isRegex {
		out.CaseSensitive = wire.No()
	}
	for _, name := range slices.Sorted(maps.Keys(m.GetHeaders())) {
		if !claims(out, name, m.GetHeaders()[name], false) {
			out.Headers = append(out.Headers, headerMatch(name, m.GetHeaders()[name]))
		}
	}
	for _, name := range slices.Sorted(maps.Keys(m.GetWithoutHeaders())) {
		if claims(out, name, m.GetWithoutHeaders()[name], true) {
			continue
		}
		h := headerMatch(name, m.GetWithoutHeaders()[name])
		h.InvertMatch = true
		if _, present := h.HeaderMatchSpecifier.(*routev3.HeaderMatcher_PresentMatch); !present {
			h.TreatMissingHeaderAsEmpty = true
		}
		out.Headers = append(out.Headers, h)
	}
	for _, pseudo := range []struct {
		name  string
		match *networking.StringMatch
	}{{":method", m.GetMethod()}, {":authority", m.GetAuthority()}, {":scheme", m.GetScheme()}} {
		if pseudo.match.GetMatchType() != nil {
			out.Headers = append(out.Headers, headerMatch(pseudo.name, pseudo.match))
		}
	}
	for _, name := range slices.Sorted(maps.Keys(m.GetQueryParams())) {
		q := &routev3.QueryParameterMatcher{Name: name}
		if sm := stringMatch(m.GetQueryParams()[name]); sm != nil {
			q.QueryParameterMatchSpecifier = &routev3.QueryParameterMatcher_StringMatch{StringMatch: sm}
		} else {
			q.QueryParameterMatchSpecifier = &routev3.QueryParameterMatcher_PresentMatch{PresentMatch: true}
		}
		out.QueryParameters = append(out.QueryParameters, q)
	}
	return out
}

func headerMatch(name string, m *networking.StringMatch) *routev3.HeaderMatcher {
	h := &routev3.HeaderMatcher{Name: name, HeaderMatchSpecifier: &routev3.HeaderMatcher_PresentMatch{PresentMatch: true}}
	if sm := stringMatch(m); sm != nil {
		h.HeaderMatchSpecifier = &routev3.HeaderMatcher_StringMatch{StringMatch: sm}
	}
	return h
}

// stringMatch returns nil for an empty match, which asks for presence only.
func stringMatch(m *networking.StringMatch) *matcherv3.StringMatcher {
	switch s := m.GetMatchType().(type) {
	case *networking.StringMatch_Exact:
		return wire.Exact(s.Exact)
	case *networking.StringMatch_Prefix:
		if s.Prefix == "" {
			return nil
		}
		return &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Prefix{Prefix: s.Prefix}}
	case *networking.StringMatch_Regex:
		if s.Regex == "" || s.Regex == "*" {
			return nil
		}
		return &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_SafeRegex{SafeRegex: wire.Regex(s.Regex)}}
	}
	return nil
}

// CheckMatch finds what Envoy would refuse, and with it the routes of all hosts on the port.
func CheckMatch(m *routev3.RouteMatch) error {
	exprs := []string{m.GetSafeRegex().GetRegex()}
	for _, h := range m.GetHeaders() {
		exprs = append(exprs, h.GetStringMatch().GetSafeRegex().GetRegex())
	}
	for _, q := range m.GetQueryParameters() {
		exprs = append(exprs, q.GetStringMatch().GetSafeRegex().GetRegex())
	}
	for _, d := range m.GetDynamicMetadata() {
		for _, v := range d.GetValue().GetOrMatch().GetValueMatchers() {
			exprs = append(exprs, v.GetStringMatch().GetSafeRegex().GetRegex())
		}
	}
	for _, e := range exprs {
		if _, err := regexp.Compile(e); err != nil {
			return err
		}
	}
	return m.Validate()
}

// CheckAction finds what Envoy would refuse in the rest of a route whose match is good.
func CheckAction(r *routev3.Route) error {
	if _, err := regexp.Compile(r.GetRoute().GetRegexRewrite().GetPattern().GetRegex()); err != nil {
		return err
	}
	return r.Validate()
}

// CatchesAll reports whether no route after r can match.
func CatchesAll(r *routev3.Route) bool {
	m := r.GetMatch()
	return m.GetPrefix() == "/" && len(m.GetHeaders())+len(m.GetQueryParameters())+len(m.GetDynamicMetadata()) == 0
}
