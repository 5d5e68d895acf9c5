package httprule

import (
	"strings"

	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	networking "istio.io/api/networking/v1"
)

const (
	claimsPrefix = "@request.auth.claims"

	// Where the JWT filter leaves the claims of an accepted token.
	jwtMetadata = "envoy.filters.http.jwt_authn"
	jwtPayload  = "payload"
)

// Claim returns the path of the claim that the name of a header match stands for, "@request.auth.claims.NAME.NESTED" or
// "@request.auth.claims[NAME][NESTED]"; nil when it stands for none.
func Claim(header string) []string {
	rest, ok := strings.CutPrefix(header, claimsPrefix)
	if !ok || rest == "" {
		return nil
	}
	var path []string
	if inner, dotted := strings.CutPrefix(rest, "."); dotted {
		path = strings.Split(inner, ".")
	} else if rest[0] == '[' && strings.HasSuffix(rest, "]") {
		path = strings.Split(rest[1:len(rest)-1], "][")
	}
	for _, p := range path {
		if p == "" || strings.ContainsAny(p, "[]") {
			return nil
		}
	}
	return path
}

// HasClaims reports whether the match asks what a token says; only gateways know.
func HasClaims(m *networking.HTTPMatchRequest) bool {
	for _, list := range []map[string]*networking.StringMatch{m.GetHeaders(), m.GetWithoutHeaders()} {
		for name := range list {
			if strings.HasPrefix(name, "@") {
				return true
			}
		}
	}
	return false
}

// claimMatch matches a claim that is a text, or a list with such a text; without a condition, one that is there.
func claimMatch(path []string, m *networking.StringMatch, invert bool) *matcherv3.MetadataMatcher {
	out := &matcherv3.MetadataMatcher{Filter: jwtMetadata, Invert: invert}
	for _, key := range append([]string{jwtPayload}, path...) {
		out.Path = append(out.Path, &matcherv3.MetadataMatcher_PathSegment{Segment: &matcherv3.MetadataMatcher_PathSegment_Key{Key: key}})
	}
	sm := stringMatch(m)
	if sm == nil {
		out.Value = &matcherv3.ValueMatcher{MatchPattern: &matcherv3.ValueMatcher_PresentMatch{PresentMatch: true}}
		return out
	}
	text := &matcherv3.ValueMatcher{MatchPattern: &matcherv3.ValueMatcher_StringMatch{StringMatch: sm}}
	out.Value = &matcherv3.ValueMatcher{MatchPattern: &matcherv3.ValueMatcher_OrMatch{OrMatch: &matcherv3.OrMatcher{ValueMatchers: []*matcherv3.ValueMatcher{
		text, {MatchPattern: &matcherv3.ValueMatcher_ListMatch{ListMatch: &matcherv3.ListMatcher{MatchPattern: &matcherv3.ListMatcher_OneOf{OneOf: text}}}},
	}}}}
	return out
}

// claims adds the claims that a match asks for.
func claims(out *routev3.RouteMatch, name string, m *networking.StringMatch, invert bool) bool {
	path := Claim(name)
	if path != nil {
		out.DynamicMetadata = append(out.DynamicMetadata, claimMatch(path, m, invert))
	}
	return path != nil
}
