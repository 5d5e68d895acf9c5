package gatewayapi

import (
	"regexp"

	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
)

// overHTTP writes the rules of a GRPCRoute as those of an HTTPRoute: a method is a path.
func overHTTP(rules []gatewayv1.GRPCRouteRule) []gatewayv1.HTTPRouteRule {
	out := make([]gatewayv1.HTTPRouteRule, 0, len(rules))
	for i := range rules {
		in := &rules[i]
		rule := gatewayv1.HTTPRouteRule{Name: in.Name, Filters: filtersOverHTTP(in.Filters), SessionPersistence: in.SessionPersistence}
		for j := range in.Matches {
			m := gatewayv1.HTTPRouteMatch{Path: path(in.Matches[j].Method)}
			for _, h := range in.Matches[j].Headers {
				t := gatewayv1.HeaderMatchType(or(h.Type, string(gatewayv1.HeaderMatchExact)))
				m.Headers = append(m.Headers, gatewayv1.HTTPHeaderMatch{Type: &t, Name: gatewayv1.HTTPHeaderName(h.Name), Value: h.Value})
			}
			rule.Matches = append(rule.Matches, m)
		}
		for j := range in.BackendRefs {
			rule.BackendRefs = append(rule.BackendRefs, gatewayv1.HTTPBackendRef{BackendRef: in.BackendRefs[j].BackendRef, Filters: filtersOverHTTP(in.BackendRefs[j].Filters)})
		}
		out = append(out, rule)
	}
	return out
}

// path is that of the requests of a method, which is written /SERVICE/METHOD.
func path(m *gatewayv1.GRPCMethodMatch) *gatewayv1.HTTPPathMatch {
	if m == nil {
		return nil
	}
	service, method := or(m.Service, ""), or(m.Method, "")
	kind, value := gatewayv1.PathMatchExact, "/"+service+"/"+method
	const any = "[^/]+"
	switch byRegex := or(m.Type, string(gatewayv1.GRPCMethodMatchExact)) == string(gatewayv1.GRPCMethodMatchRegularExpression); {
	case service == "" && method == "":
		return nil
	case !byRegex && method == "":
		kind, value = gatewayv1.PathMatchPathPrefix, "/"+service
	case !byRegex && service == "":
		kind, value = gatewayv1.PathMatchRegularExpression, "/"+any+"/"+regexp.QuoteMeta(method)
	case byRegex:
		kind, value = gatewayv1.PathMatchRegularExpression, "/"+alternatives(service, any)+"/"+alternatives(method, any)
	}
	return &gatewayv1.HTTPPathMatch{Type: &kind, Value: &value}
}

// alternatives keeps the alternatives of an expression together.
func alternatives(expression, otherwise string) string {
	if expression == "" {
		return otherwise
	}
	return "(?:" + expression + ")"
}

func filtersOverHTTP(in []gatewayv1.GRPCRouteFilter) []gatewayv1.HTTPRouteFilter {
	out := make([]gatewayv1.HTTPRouteFilter, 0, len(in))
	for _, f := range in {
		out = append(out, gatewayv1.HTTPRouteFilter{
			Type: gatewayv1.HTTPRouteFilterType(f.Type), RequestHeaderModifier: f.RequestHeaderModifier, ResponseHeaderModifier: f.ResponseHeaderModifier,
			RequestMirror: f.RequestMirror, ExtensionRef: f.ExtensionRef,
		})
	}
	return out
}
