package httprule

import (
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	previoushostsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/retry/host/previous_hosts/v3"
	previousprioritiesv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/retry/priority/previous_priorities/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	networking "istio.io/api/networking/v1"

	"github.com/isthmus-mesh/isthmus/discovery/translate/wire"
)

// InlineString is a body given in place.
func InlineString(s string) *corev3.DataSource {
	return &corev3.DataSource{Specifier: &corev3.DataSource_InlineString{InlineString: s}}
}

// Rewrite changes the path, by the part that was matched, and the authority.
func Rewrite(a *routev3.RouteAction, w *networking.HTTPRewrite, m *networking.HTTPMatchRequest) {
	if w.GetAuthority() != "" {
		a.HostRewriteSpecifier = &routev3.RouteAction_HostRewriteLiteral{HostRewriteLiteral: w.GetAuthority()}
	}
	prefix := m.GetUri().GetPrefix()
	switch x := w.GetUriRegexRewrite(); {
	case x != nil:
		a.RegexRewrite = &matcherv3.RegexMatchAndSubstitute{Pattern: wire.Regex(x.GetMatch()), Substitution: x.GetRewrite()}
	case w.GetUri() == "/" && prefix != "" && !strings.HasSuffix(prefix, "/"):
		// "/api" to "/" shall turn /api/x into /x, not //x.
		a.RegexRewrite = &matcherv3.RegexMatchAndSubstitute{Pattern: wire.Regex("^" + regexp.QuoteMeta(prefix) + "(/?)(.*)"), Substitution: `/\2`}
	case w.GetUri() != "":
		a.PrefixRewrite = w.GetUri()
	}
}

// HostHeader returns what the operations set Host to, empty when they do not.
func HostHeader(ops *networking.Headers_HeaderOperations) string {
	for _, name := range slices.Sorted(maps.Keys(ops.GetSet())) {
		if isHost(name) {
			return ops.GetSet()[name]
		}
	}
	return ""
}

func isHost(name string) bool { return strings.EqualFold(name, "host") || name == ":authority" }

// HeaderOps translates header operations. Setting Host is left out: Envoy wants it as a rewrite.
func HeaderOps(ops *networking.Headers_HeaderOperations) (add []*corev3.HeaderValueOption, remove []string) {
	for _, kind := range []struct {
		headers map[string]string
		action  corev3.HeaderValueOption_HeaderAppendAction
	}{{ops.GetSet(), corev3.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD}, {ops.GetAdd(), corev3.HeaderValueOption_APPEND_IF_EXISTS_OR_ADD}} {
		for _, name := range slices.Sorted(maps.Keys(kind.headers)) {
			if isHost(name) {
				continue
			}
			add = append(add, &corev3.HeaderValueOption{
				Header: &corev3.HeaderValue{Key: name, Value: kind.headers[name]}, AppendAction: kind.action,
			})
		}
	}
	for _, name := range ops.GetRemove() {
		if !isHost(name) {
			remove = append(remove, name)
		}
	}
	return add, remove
}

// defaultRetryOn is what no server has worked on, and 503. reset-before-request is a connection that ended when nothing
// of the request was on it yet: that of a gateway that died. A request already sent is not sent again.
const defaultRetryOn = "connect-failure,refused-stream,reset-before-request,unavailable,cancelled,retriable-status-codes"

// Retry is by default two more attempts for requests that no server has taken, on hosts not tried before.
func Retry(h *networking.HTTPRetry) *routev3.RetryPolicy {
	p := &routev3.RetryPolicy{
		RetryOn: defaultRetryOn, NumRetries: wire.U32(2), RetriableStatusCodes: []uint32{503}, HostSelectionRetryMaxAttempts: 5,
		RetryHostPredicate: []*routev3.RetryPolicy_RetryHostPredicate{{
			Name:       "envoy.retry_host_predicates.previous_hosts",
			ConfigType: &routev3.RetryPolicy_RetryHostPredicate_TypedConfig{TypedConfig: wire.Pack(&previoushostsv3.PreviousHostsPredicate{})},
		}},
	}
	if h == nil {
		return p
	}
	if h.GetAttempts() <= 0 {
		return nil
	}
	p.NumRetries = wire.U32(uint32(h.GetAttempts()))
	p.PerTryTimeout = h.GetPerTryTimeout()
	if h.GetBackoff() != nil {
		p.RetryBackOff = &routev3.RetryPolicy_RetryBackOff{BaseInterval: h.GetBackoff()}
	}
	if h.GetRetryRemoteLocalities().GetValue() {
		p.RetryPriority = &routev3.RetryPolicy_RetryPriority{
			Name: "envoy.retry_priorities.previous_priorities",
			ConfigType: &routev3.RetryPolicy_RetryPriority_TypedConfig{
				TypedConfig: wire.Pack(&previousprioritiesv3.PreviousPrioritiesConfig{UpdateFrequency: 2}),
			},
		}
	}
	if b := h.GetRetryIgnorePreviousHosts(); b != nil && !b.GetValue() {
		p.RetryHostPredicate, p.HostSelectionRetryMaxAttempts = nil, 0
	}
	if h.GetRetryOn() != "" {
		var on []string
		p.RetriableStatusCodes = nil
		for item := range strings.SplitSeq(h.GetRetryOn(), ",") {
			item = strings.TrimSpace(item)
			if code, err := strconv.ParseUint(item, 10, 16); err == nil {
				p.RetriableStatusCodes = append(p.RetriableStatusCodes, uint32(code))
			} else if item != "" {
				on = append(on, item)
			}
		}
		if len(p.RetriableStatusCodes) > 0 && !slices.Contains(on, "retriable-status-codes") {
			on = append(on, "retriable-status-codes")
		}
		p.RetryOn = strings.Join(on, ",")
	}
	return p
}

// Hash says which part of a request chooses the endpoint, as the destination's rule has it.
func Hash(p *networking.TrafficPolicy) []*routev3.RouteAction_HashPolicy {
	h := &routev3.RouteAction_HashPolicy{}
	switch k := p.GetLoadBalancer().GetConsistentHash().GetHashKey().(type) {
	case *networking.LoadBalancerSettings_ConsistentHashLB_HttpHeaderName:
		h.PolicySpecifier = &routev3.RouteAction_HashPolicy_Header_{Header: &routev3.RouteAction_HashPolicy_Header{HeaderName: k.HttpHeaderName}}
	case *networking.LoadBalancerSettings_ConsistentHashLB_HttpCookie:
		c := &routev3.RouteAction_HashPolicy_Cookie{Name: k.HttpCookie.GetName(), Path: k.HttpCookie.GetPath(), Ttl: k.HttpCookie.GetTtl()}
		for _, a := range k.HttpCookie.GetAttributes() {
			c.Attributes = append(c.Attributes, &routev3.RouteAction_HashPolicy_CookieAttribute{Name: a.GetName(), Value: a.GetValue()})
		}
		h.PolicySpecifier = &routev3.RouteAction_HashPolicy_Cookie_{Cookie: c}
	case *networking.LoadBalancerSettings_ConsistentHashLB_UseSourceIp:
		h.PolicySpecifier = &routev3.RouteAction_HashPolicy_ConnectionProperties_{
			ConnectionProperties: &routev3.RouteAction_HashPolicy_ConnectionProperties{SourceIp: k.UseSourceIp},
		}
	case *networking.LoadBalancerSettings_ConsistentHashLB_HttpQueryParameterName:
		h.PolicySpecifier = &routev3.RouteAction_HashPolicy_QueryParameter_{
			QueryParameter: &routev3.RouteAction_HashPolicy_QueryParameter{Name: k.HttpQueryParameterName},
		}
	default:
		return nil
	}
	return []*routev3.RouteAction_HashPolicy{h}
}

// Redirect translates a redirect; port is the one the client used.
func Redirect(h *networking.HTTPRedirect, port uint32) *routev3.RedirectAction {
	r := &routev3.RedirectAction{HostRedirect: h.GetAuthority()}
	if h.GetScheme() != "" {
		r.SchemeRewriteSpecifier = &routev3.RedirectAction_SchemeRedirect{SchemeRedirect: h.GetScheme()}
	}
	if h.GetUri() != "" {
		r.PathRewriteSpecifier = &routev3.RedirectAction_PathRedirect{PathRedirect: h.GetUri()}
	} else if h.GetPrefixRewrite() != "" {
		r.PathRewriteSpecifier = &routev3.RedirectAction_PrefixRewrite{PrefixRewrite: h.GetPrefixRewrite()}
	}
	switch p := h.GetRedirectPort().(type) {
	case *networking.HTTPRedirect_Port:
		r.PortRedirect = p.Port
	case *networking.HTTPRedirect_DerivePort:
		if p.DerivePort == networking.HTTPRedirect_FROM_REQUEST_PORT {
			r.PortRedirect = port
		}
	}
	r.ResponseCode = map[uint32]routev3.RedirectAction_RedirectResponseCode{
		302: routev3.RedirectAction_FOUND, 303: routev3.RedirectAction_SEE_OTHER,
		307: routev3.RedirectAction_TEMPORARY_REDIRECT, 308: routev3.RedirectAction_PERMANENT_REDIRECT,
	}[h.GetRedirectCode()] // else 301
	return r
}

// DirectResponse translates an answer that no server gives.
func DirectResponse(h *networking.HTTPDirectResponse) *routev3.DirectResponseAction {
	r := &routev3.DirectResponseAction{Status: h.GetStatus()}
	switch b := h.GetBody().GetSpecifier().(type) {
	case *networking.HTTPBody_String_:
		r.Body = InlineString(b.String_)
	case *networking.HTTPBody_Bytes:
		r.Body = &corev3.DataSource{Specifier: &corev3.DataSource_InlineBytes{InlineBytes: b.Bytes}}
	}
	return r
}

// maxAge writes a duration as whole seconds.
func maxAge(d time.Duration) string { return strconv.FormatInt(int64(d/time.Second), 10) }
