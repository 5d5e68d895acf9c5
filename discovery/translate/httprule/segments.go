package httprule

import (
	"cmp"
	"regexp"
	"strings"

	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	networking "istio.io/api/networking/v1"

	"github.com/isthmus-mesh/isthmus/discovery/translate/wire"
)

// Segments changes a route, made of h and its match m, to what the Gateway API means by prefixes: "/a" matches "/a" and
// "/a/b", not "/ab", and what is replaced of a path are whole elements of it.
func Segments(r *routev3.Route, h *networking.HTTPRoute, m *networking.HTTPMatchRequest) {
	prefix := strings.TrimRight(m.GetUri().GetPrefix(), "/")
	if prefix != "" {
		r.Match.PathSpecifier = &routev3.RouteMatch_PathSeparatedPrefix{PathSeparatedPrefix: prefix}
	}
	if a := r.GetRoute(); a.GetPrefixRewrite() != "" || a != nil && h.GetRewrite().GetUri() != "" {
		a.PrefixRewrite, a.RegexRewrite = "", replaced(prefix, h.GetRewrite().GetUri())
	}
	if to := r.GetRedirect().GetPrefixRewrite(); to != "" {
		r.GetRedirect().PathRewriteSpecifier = &routev3.RedirectAction_RegexRewrite{RegexRewrite: replaced(prefix, to)}
	}
}

// replaced replaces the prefix, which ends in no slash, in a path that it matches. What is left begins with a slash.
func replaced(prefix, with string) *matcherv3.RegexMatchAndSubstitute {
	with = strings.ReplaceAll(strings.TrimRight(with, "/"), `\`, `\\`)
	switch {
	case with == "":
		return &matcherv3.RegexMatchAndSubstitute{Pattern: wire.Regex("^" + regexp.QuoteMeta(prefix) + "/*(.*)$"), Substitution: `/\1`}
	case prefix == "":
		return &matcherv3.RegexMatchAndSubstitute{Pattern: wire.Regex("^/(.*)$"), Substitution: with + `/\1`}
	}
	return &matcherv3.RegexMatchAndSubstitute{Pattern: wire.Regex("^" + regexp.QuoteMeta(prefix) + "(/.*)?$"), Substitution: cmp.Or(with, "/") + `\1`}
}
