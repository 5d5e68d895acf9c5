package gatewayapi

import (
	"fmt"
	"regexp"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"
	networking "istio.io/api/networking/v1"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
)

// filters are those of a rule or of a destination, the first of each type.
type filters struct {
	headers  *networking.Headers
	redirect *gatewayv1.HTTPRequestRedirectFilter
	rewrite  *gatewayv1.HTTPURLRewriteFilter
	mirrors  []*networking.HTTPMirrorPolicy
	cors     *networking.CorsPolicy
}

// filters converts a list of filters. A failure says what of it cannot be honoured; a rule with such a filter must not be
// used without it.
func (c *converter) filters(r *route, rule int, list []gatewayv1.HTTPRouteFilter) (f *filters, failure string) {
	f = &filters{}
	for i := range list {
		x := &list[i]
		missing := func() (*filters, string) {
			return f, fmt.Sprintf("filters[%d]: the settings of type %s are missing", i, x.Type)
		}
		switch x.Type {
		case gatewayv1.HTTPRouteFilterRequestHeaderModifier:
			if x.RequestHeaderModifier == nil {
				return missing()
			}
			f.modify().Request = headerOps(x.RequestHeaderModifier)
		case gatewayv1.HTTPRouteFilterResponseHeaderModifier:
			if x.ResponseHeaderModifier == nil {
				return missing()
			}
			f.modify().Response = headerOps(x.ResponseHeaderModifier)
		case gatewayv1.HTTPRouteFilterRequestRedirect:
			if f.redirect = x.RequestRedirect; f.redirect == nil {
				return missing()
			}
		case gatewayv1.HTTPRouteFilterURLRewrite:
			if f.rewrite = x.URLRewrite; f.rewrite == nil {
				return missing()
			}
		case gatewayv1.HTTPRouteFilterRequestMirror:
			if x.RequestMirror == nil {
				return missing()
			}
			c.mirror(r, f, fmt.Sprintf("spec.rules[%d].filters[%d]", rule, i), x.RequestMirror)
		case gatewayv1.HTTPRouteFilterCORS:
			if x.CORS == nil {
				return missing()
			}
			f.cors = cors(x.CORS)
		case gatewayv1.HTTPRouteFilterExtensionRef:
			return f, fmt.Sprintf("filters[%d]: extensionRef: there are no extensions", i)
		default:
			return f, fmt.Sprintf("filters[%d]: type %s is not supported", i, x.Type)
		}
	}
	if f.redirect != nil && f.rewrite != nil {
		return f, "filters: RequestRedirect and URLRewrite exclude each other"
	}
	return f, ""
}

func (f *filters) modify() *networking.Headers {
	if f.headers == nil {
		f.headers = &networking.Headers{}
	}
	return f.headers
}

func headerOps(in *gatewayv1.HTTPHeaderFilter) *networking.Headers_HeaderOperations {
	out := &networking.Headers_HeaderOperations{Remove: in.Remove}
	put := func(m *map[string]string, list []gatewayv1.HTTPHeader) {
		for _, h := range list {
			if *m == nil {
				*m = map[string]string{}
			}
			if _, twice := (*m)[string(h.Name)]; !twice {
				(*m)[string(h.Name)] = h.Value
			}
		}
	}
	put(&out.Set, in.Set)
	put(&out.Add, in.Add)
	return out
}

// mirror adds a copy of requests. One that leads nowhere is told, and the requests themselves are served.
func (c *converter) mirror(r *route, f *filters, where string, m *gatewayv1.HTTPRequestMirrorFilter) {
	to, bad := c.backend(r, m.BackendRef)
	if to == nil {
		r.unresolved(where+".requestMirror.backendRef", bad)
		return
	}
	p := &networking.HTTPMirrorPolicy{Destination: to}
	switch {
	case m.Percent != nil:
		p.Percentage = &networking.Percent{Value: float64(*m.Percent)}
	case m.Fraction != nil:
		of := int32(100)
		if d := m.Fraction.Denominator; d != nil && *d > 0 {
			of = *d
		}
		p.Percentage = &networking.Percent{Value: 100 * float64(m.Fraction.Numerator) / float64(of)}
	}
	f.mirrors = append(f.mirrors, p)
}

func cors(in *gatewayv1.HTTPCORSFilter) *networking.CorsPolicy {
	// A preflight from an origin that is not allowed is answered here: the backend might allow it.
	out := &networking.CorsPolicy{MaxAge: durationpb.New(5 * time.Second), UnmatchedPreflights: networking.CorsPolicy_IGNORE}
	for _, o := range in.AllowOrigins {
		m := exact(string(o))
		if strings.Contains(string(o), "*") {
			m = &networking.StringMatch{MatchType: &networking.StringMatch_Regex{Regex: strings.ReplaceAll(regexp.QuoteMeta(string(o)), `\*`, ".*")}}
		}
		out.AllowOrigins = append(out.AllowOrigins, m)
	}
	for _, m := range in.AllowMethods {
		out.AllowMethods = append(out.AllowMethods, string(m))
	}
	for _, h := range in.AllowHeaders {
		out.AllowHeaders = append(out.AllowHeaders, string(h))
	}
	for _, h := range in.ExposeHeaders {
		out.ExposeHeaders = append(out.ExposeHeaders, string(h))
	}
	if in.AllowCredentials != nil {
		out.AllowCredentials = wrapperspb.Bool(*in.AllowCredentials)
	}
	if in.MaxAge > 0 {
		out.MaxAge = durationpb.New(time.Duration(in.MaxAge) * time.Second)
	}
	return out
}

// apply writes the filters into a route.
func (f *filters) apply(h *networking.HTTPRoute) {
	h.Headers, h.Mirrors, h.CorsPolicy = f.headers, f.mirrors, f.cors
	if h.DirectResponse != nil {
		h.Mirrors = nil
	}
	if w := f.rewrite; w != nil && h.DirectResponse == nil {
		h.Rewrite = &networking.HTTPRewrite{}
		if w.Hostname != nil {
			h.Rewrite.Authority = string(*w.Hostname)
		}
		if w.Path != nil {
			replacePath(h.Rewrite, w.Path)
		}
	}
	if r := f.redirect; r != nil {
		out := &networking.HTTPRedirect{RedirectCode: 302}
		if r.Scheme != nil {
			out.Scheme = *r.Scheme
		}
		if r.Hostname != nil {
			out.Authority = string(*r.Hostname)
		}
		if r.Port != nil {
			out.RedirectPort = &networking.HTTPRedirect_Port{Port: uint32(*r.Port)}
		}
		if r.StatusCode != nil {
			out.RedirectCode = uint32(*r.StatusCode)
		}
		if r.Path != nil && r.Path.ReplaceFullPath != nil {
			out.Uri = *r.Path.ReplaceFullPath
		} else if r.Path != nil && r.Path.ReplacePrefixMatch != nil {
			out.PrefixRewrite = *r.Path.ReplacePrefixMatch
			if out.PrefixRewrite == "" {
				out.PrefixRewrite = "/"
			}
		}
		h.Redirect, h.DirectResponse = out, nil
	}
}

// replacePath says what becomes of a path. That of a prefix whole elements are replaced is what Uri means in a
// VirtualService of the Gateway API.
func replacePath(w *networking.HTTPRewrite, p *gatewayv1.HTTPPathModifier) {
	if p.ReplaceFullPath != nil {
		w.UriRegexRewrite = &networking.RegexRewrite{Match: "^.*$", Rewrite: strings.ReplaceAll(*p.ReplaceFullPath, `\`, `\\`)}
		return
	}
	if w.Uri = "/"; p.ReplacePrefixMatch != nil && *p.ReplacePrefixMatch != "" {
		w.Uri = *p.ReplacePrefixMatch
	}
}
