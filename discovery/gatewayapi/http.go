package gatewayapi

import (
	"cmp"
	"fmt"
	"regexp"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	networking "istio.io/api/networking/v1"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// entry is one match of one rule.
type entry struct {
	http    *networking.HTTPRoute // with that match alone
	origin  mesh.Origin
	match   int
	rank    rank
	created time.Time
}

// rank orders matches of several routes: the greater is tried first.
type rank struct {
	path, length, method, headers, query int
}

// Kinds of paths, by how narrow they are.
const (
	byPrefix = iota
	byRegex
	byExact
)

// compare orders entries as the Gateway API has it: by what they match, then the older route, then by its name, then as
// they stand in it.
func (e entry) compare(o entry) int {
	return cmp.Or(
		-cmp.Compare(e.rank.path, o.rank.path), -cmp.Compare(e.rank.length, o.rank.length), -cmp.Compare(e.rank.method, o.rank.method),
		-cmp.Compare(e.rank.headers, o.rank.headers), -cmp.Compare(e.rank.query, o.rank.query),
		e.created.Compare(o.created), strings.Compare(e.origin.Object.Namespace, o.origin.Object.Namespace), strings.Compare(e.origin.Object.Name, o.origin.Object.Name),
		strings.Compare(e.origin.Object.Kind, o.origin.Object.Kind), cmp.Compare(e.origin.Index, o.origin.Index), cmp.Compare(e.match, o.match),
	)
}

// forListener completes what depends on the listener: where a redirect leads that names no port.
func (e entry) forListener(l *listener) *networking.HTTPRoute {
	r := e.http.GetRedirect()
	if r == nil || r.GetRedirectPort() != nil {
		return e.http
	}
	port := uint32(l.spec.Port)
	usual := map[string]uint32{"http": 80, "https": 443}
	own := "http"
	if l.spec.Protocol == gatewayv1.HTTPSProtocolType {
		own = "https"
	}
	if s := r.GetScheme(); s != "" {
		if port == usual[own] {
			return e.http // the client's port is the usual one, and goes with the scheme
		}
		port = usual[s]
	} else if port == usual[own] {
		return e.http
	}
	h := proto.Clone(e.http).(*networking.HTTPRoute)
	h.Redirect.RedirectPort = &networking.HTTPRedirect_Port{Port: port}
	return h
}

// httpRules converts the rules of an HTTPRoute.
func (c *converter) httpRules(r *route, rules []gatewayv1.HTTPRouteRule) {
	bad := 0
	for i := range rules {
		rule := &rules[i]
		h := &networking.HTTPRoute{}
		if rule.Name != nil {
			h.Name = string(*rule.Name)
		}
		filters, failure := c.filters(r, i, rule.Filters)
		if failure == "" {
			failure = timing(h, rule)
		}
		if failure == "" {
			failure = c.destinations(r, i, rule, h, filters)
		}
		matches := rule.Matches
		if len(matches) == 0 {
			matches = []gatewayv1.HTTPRouteMatch{{}}
		}
		for j := range matches {
			m, k, err := httpMatch(&matches[j])
			if err != nil {
				failure = fmt.Sprintf("matches[%d]: %v", j, err)
			}
			if m != nil {
				x := proto.Clone(h).(*networking.HTTPRoute)
				filters.apply(x)
				x.Match = []*networking.HTTPMatchRequest{m}
				if failure != "" {
					x = &networking.HTTPRoute{Name: h.Name, Match: x.Match, DirectResponse: &networking.HTTPDirectResponse{Status: 500}}
				}
				r.entries = append(r.entries, entry{x, mesh.Origin{Object: r.ref, Index: i, Field: "spec.rules"}, j, k, r.meta.CreationTimestamp.Time})
			}
		}
		if failure != "" {
			r.unsupported(i, failure)
			bad++
		}
	}
	if bad > 0 && bad == len(rules) {
		r.invalid, r.partly = strings.TrimPrefix(r.partly, "Dropped Rule: "), ""
	}
}

// httpMatch converts a match and says how narrow it is. Without a match in the result it cannot be told what is meant.
func httpMatch(in *gatewayv1.HTTPRouteMatch) (*networking.HTTPMatchRequest, rank, error) {
	m, k := &networking.HTTPMatchRequest{}, rank{length: 1}
	var err error
	if p := in.Path; p != nil {
		value := "/"
		if p.Value != nil {
			value = *p.Value
		}
		k.length = len(value)
		switch t := or(p.Type, string(gatewayv1.PathMatchPathPrefix)); gatewayv1.PathMatchType(t) {
		case gatewayv1.PathMatchExact:
			m.Uri, k.path = exact(value), byExact
		case gatewayv1.PathMatchPathPrefix:
			m.Uri = &networking.StringMatch{MatchType: &networking.StringMatch_Prefix{Prefix: value}}
		case gatewayv1.PathMatchRegularExpression:
			if m.Uri, err = regex(value); err != nil {
				return nil, k, err
			}
			k.path = byRegex
		default:
			return nil, k, fmt.Errorf("path.type %s is not known", t)
		}
	}
	if in.Method != nil {
		m.Method, k.method = exact(string(*in.Method)), 1
	}
	for _, x := range in.Headers {
		if m.Headers == nil {
			m.Headers = map[string]*networking.StringMatch{}
		}
		if name := strings.ToLower(string(x.Name)); m.Headers[name] == nil {
			m.Headers[name], err = stringMatch(or(x.Type, "Exact"), x.Value, err)
		}
	}
	for _, x := range in.QueryParams {
		if m.QueryParams == nil {
			m.QueryParams = map[string]*networking.StringMatch{}
		}
		if name := string(x.Name); m.QueryParams[name] == nil {
			m.QueryParams[name], err = stringMatch(or(x.Type, "Exact"), x.Value, err)
		}
	}
	if err != nil {
		return nil, k, err
	}
	k.headers, k.query = len(m.Headers), len(m.QueryParams)
	return m, k, nil
}

func exact(s string) *networking.StringMatch {
	return &networking.StringMatch{MatchType: &networking.StringMatch_Exact{Exact: s}}
}

func regex(s string) (*networking.StringMatch, error) {
	if _, err := regexp.Compile(s); err != nil {
		return nil, fmt.Errorf("%q is not a regular expression: %w", s, err)
	}
	return &networking.StringMatch{MatchType: &networking.StringMatch_Regex{Regex: s}}, nil
}

// stringMatch keeps the error that was before.
func stringMatch(kind, value string, before error) (*networking.StringMatch, error) {
	if kind != "RegularExpression" {
		return exact(value), before
	}
	m, err := regex(value)
	return m, cmp.Or(before, err)
}

// timing converts timeouts and retries.
func timing(h *networking.HTTPRoute, rule *gatewayv1.HTTPRouteRule) (failure string) {
	if rule.SessionPersistence != nil {
		return "sessionPersistence is not supported; a DestinationRule with a consistent hash by cookie comes near"
	}
	if t := rule.Timeouts; t != nil {
		if t.Request != nil {
			d, err := time.ParseDuration(string(*t.Request))
			if err != nil {
				return "timeouts.request: " + err.Error()
			}
			h.Timeout = durationpb.New(d)
		}
		if t.BackendRequest != nil {
			d, err := time.ParseDuration(string(*t.BackendRequest))
			if err != nil {
				return "timeouts.backendRequest: " + err.Error()
			}
			if d > 0 {
				h.Retries = &networking.HTTPRetry{Attempts: defaultAttempts, PerTryTimeout: durationpb.New(d)}
			}
		}
	}
	if x := rule.Retry; x != nil {
		if h.Retries == nil {
			h.Retries = &networking.HTTPRetry{Attempts: defaultAttempts}
		}
		if x.Attempts != nil {
			h.Retries.Attempts = int32(*x.Attempts)
		}
		on := []string{"connect-failure", "refused-stream", "reset", "unavailable", "cancelled"}
		for _, code := range x.Codes {
			on = append(on, itoa(int(code)))
		}
		h.Retries.RetryOn = strings.Join(on, ",")
		if x.Backoff != nil {
			d, err := time.ParseDuration(string(*x.Backoff))
			if err != nil || d < time.Millisecond {
				return "retry.backoff: write a duration of 1ms or more"
			}
			h.Retries.Backoff = durationpb.New(d)
		}
	}
	return ""
}

// defaultAttempts are those of the mesh.
const defaultAttempts = 2

// destinations converts backendRefs. A share that leads nowhere has a destination without a host, and gets 500.
func (c *converter) destinations(r *route, i int, rule *gatewayv1.HTTPRouteRule, h *networking.HTTPRoute, f *filters) (failure string) {
	var found, total int
	for j := range rule.BackendRefs {
		b := &rule.BackendRefs[j]
		where := fmt.Sprintf("spec.rules[%d].backendRefs[%d]", i, j)
		to, bad := c.backend(r, b.BackendObjectReference)
		if to == nil {
			r.unresolved(where, bad)
			to = &networking.Destination{}
		}
		w := weight(b.Weight)
		if w <= 0 {
			continue
		}
		d := &networking.HTTPRouteDestination{Destination: to, Weight: w}
		own, failed := c.filters(r, i, b.Filters)
		if failed != "" {
			return fmt.Sprintf("backendRefs[%d].%s", j, failed)
		}
		if own.redirect != nil || own.rewrite != nil || len(own.mirrors) > 0 || own.cors != nil {
			return fmt.Sprintf("backendRefs[%d].filters: only header modifiers are supported here", j)
		}
		d.Headers = own.headers
		h.Route = append(h.Route, d)
		total++
		if to.GetHost() != "" {
			found++
		}
	}
	if f.redirect == nil && found == 0 {
		h.Route, h.DirectResponse = nil, &networking.HTTPDirectResponse{Status: 500}
	}
	if f.redirect != nil {
		h.Route = nil
	}
	return ""
}
