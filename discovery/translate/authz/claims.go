package authz

import (
	"strings"

	rbacv3 "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"

	"github.com/isthmus-mesh/isthmus/discovery/translate/jwt"
)

// claim matches a claim of the request's token that is a text, or a list that has the text.
func claim(path ...string) func(string) *rbacv3.Principal {
	return func(v string) *rbacv3.Principal {
		s := textValue(text(v, false))
		return oneOf([]*rbacv3.Principal{claimIs(s, path...), claimIs(hasValue(s), path...)})
	}
}

func textValue(m *matcherv3.StringMatcher) *matcherv3.ValueMatcher {
	return &matcherv3.ValueMatcher{MatchPattern: &matcherv3.ValueMatcher_StringMatch{StringMatch: m}}
}

func hasValue(m *matcherv3.ValueMatcher) *matcherv3.ValueMatcher {
	return &matcherv3.ValueMatcher{MatchPattern: &matcherv3.ValueMatcher_ListMatch{ListMatch: &matcherv3.ListMatcher{
		MatchPattern: &matcherv3.ListMatcher_OneOf{OneOf: m},
	}}}
}

func claimIs(m *matcherv3.ValueMatcher, path ...string) *rbacv3.Principal {
	return &rbacv3.Principal{Identifier: &rbacv3.Principal_SourcedMetadata{SourcedMetadata: sourced(metadata(jwt.MetadataNamespace, m, append([]string{jwt.PayloadKey}, path...)...))}}
}

func metadata(namespace string, m *matcherv3.ValueMatcher, path ...string) *matcherv3.MetadataMatcher {
	out := &matcherv3.MetadataMatcher{Filter: namespace, Value: m}
	for _, key := range path {
		out.Path = append(out.Path, &matcherv3.MetadataMatcher_PathSegment{Segment: &matcherv3.MetadataMatcher_PathSegment_Key{Key: key}})
	}
	return out
}

// requestPrincipal matches ISSUER/SUBJECT. Envoy has the two apart, and either may contain slashes: each is tried.
func requestPrincipal(v string) *rbacv3.Principal {
	both := func(issuer, subject *matcherv3.StringMatcher) *rbacv3.Principal {
		return allFrom([]*rbacv3.Principal{claimIs(textValue(issuer), "iss"), claimIs(textValue(subject), "sub")})
	}
	some := text("*", false)
	var ids []*rbacv3.Principal
	switch {
	case v == "*":
		return both(some, some)
	case strings.HasPrefix(v, "*"):
		ids = append(ids, both(some, text(v, false)))
	case strings.HasSuffix(v, "*"):
		ids = append(ids, both(text(v, false), some))
	}
	for i := range len(v) {
		if v[i] == '/' {
			ids = append(ids, both(text(v[:i], false), text(v[i+1:], false)))
		}
	}
	if len(ids) == 0 { // without a slash it is no principal
		return &rbacv3.Principal{Identifier: &rbacv3.Principal_NotId{NotId: allFrom(nil)}}
	}
	return oneOf(ids)
}

// filterMetadata matches what some filter noted about the connection or the request; [value] asks for a list that has it.
func filterMetadata(namespace, key string) func(string) *rbacv3.Permission {
	return func(v string) *rbacv3.Permission {
		m := textValue(text(v, false))
		if inner, ok := strings.CutPrefix(v, "["); ok && strings.HasSuffix(inner, "]") {
			m = hasValue(textValue(text(inner[:len(inner)-1], false)))
		}
		return &rbacv3.Permission{Rule: &rbacv3.Permission_SourcedMetadata{SourcedMetadata: sourced(metadata(namespace, m, key))}}
	}
}

// sourced matches what filters noted, not what the route says.
func sourced(m *matcherv3.MetadataMatcher) *rbacv3.SourcedMetadata {
	return &rbacv3.SourcedMetadata{MetadataMatcher: m, MetadataSource: rbacv3.MetadataSource_DYNAMIC}
}
