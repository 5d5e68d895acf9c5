package gatewayapi

import (
	"encoding/json"
	"slices"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// condition is one without generation and time.
type condition struct {
	kind, reason, message string
	status                bool
}

func is(kind string, status bool, reason, message string) condition {
	return condition{kind, reason, message, status}
}

// conditions writes them for a generation. Their order is that of the arguments.
func conditions(generation int64, list ...condition) []metav1.Condition {
	out := make([]metav1.Condition, 0, len(list))
	for _, c := range list {
		s := metav1.ConditionFalse
		if c.status {
			s = metav1.ConditionTrue
		}
		out = append(out, metav1.Condition{Type: c.kind, Status: s, Reason: c.reason, Message: c.message, ObservedGeneration: generation})
	}
	return out
}

// status has a status of the Gateway API written.
func (c *converter) status(ref mesh.ObjectRef, resource string, generation int64, v any) {
	c.statusOf(group, ref, resource, generation, v)
}

func (c *converter) statusOf(group string, ref mesh.ObjectRef, resource string, generation int64, v any) {
	raw, err := json.Marshal(v)
	if err != nil { // the API's own types
		c.problem(ref, "status", "Invalid", err.Error(), "")
		return
	}
	c.out.Statuses = append(c.out.Statuses, &mesh.ObjectStatus{Object: ref, Group: group, Resource: resource, Generation: generation, JSON: raw})
}

// routeStatus says of a route what each of its parents that is ours makes of it.
func (c *converter) routeStatus(r *route) {
	out := gatewayv1.RouteStatus{Parents: []gatewayv1.RouteParentStatus{}}
	for _, p := range r.results {
		list := []condition{p.accepted, r.resolved}
		if r.partly != "" && p.accepted.status {
			list = append(list, is("PartiallyInvalid", true, "UnsupportedValue", r.partly))
		}
		out.Parents = append(out.Parents, gatewayv1.RouteParentStatus{ParentRef: p.ref, ControllerName: ControllerName, Conditions: conditions(r.meta.Generation, list...)})
		if !p.accepted.status {
			c.problem(r.ref, "spec.parentRefs["+itoa(p.index)+"]", p.accepted.reason, p.accepted.message, "")
		}
	}
	if len(r.results) > 0 && !r.resolved.status {
		c.problem(r.ref, r.where, r.resolved.reason, r.resolved.message, "until then such requests get 500")
	}
	if len(r.results) > 0 && r.partly != "" {
		c.problem(r.ref, "spec.rules", "UnsupportedValue", r.partly, "")
	}
	c.status(r.ref, r.resource, r.meta.Generation, out)
}

// gatewayStatus says how a Gateway and its listeners fare.
func (c *converter) gatewayStatus(g *gateway) {
	generation := g.obj.Generation
	out := gatewayv1.GatewayStatus{Addresses: g.addresses, Listeners: []gatewayv1.ListenerStatus{}}
	good, bad := 0, 0
	for _, l := range g.listeners {
		if l.programmed() {
			good++
		} else {
			bad++
		}
		programmed := is("Programmed", true, "Programmed", "")
		if !l.programmed() {
			programmed = is("Programmed", false, "Invalid", "see the other conditions")
		}
		list := []condition{l.accepted, l.conflicted, l.resolved, programmed}
		out.Listeners = append(out.Listeners, gatewayv1.ListenerStatus{
			Name: l.spec.Name, SupportedKinds: l.kinds, AttachedRoutes: l.attached, Conditions: conditions(generation, list...),
		})
		for _, x := range list[:3] {
			if x.status == (x.kind == "Conflicted") {
				c.problem(g.ref, l.field(), x.reason, x.message, "")
			}
		}
	}
	accepted, programmed := is("Accepted", true, "Accepted", ""), is("Programmed", true, "Programmed", "")
	switch {
	case !g.invalid.status && g.invalid.kind != "":
		accepted = g.invalid
	case bad > 0:
		accepted = is("Accepted", good > 0, "ListenersNotValid", "some listeners are not valid, see their conditions")
	}
	switch {
	case good == 0 || !accepted.status:
		programmed = is("Programmed", false, "Invalid", "no listener is served")
	case len(g.addresses) == 0:
		programmed = is("Programmed", false, "AddressNotAssigned", g.addressless)
	}
	// Files seldom hold what runs a gateway.
	if live := strings.HasPrefix(g.ref.Source, "cluster "); !programmed.status && (live || g.named || len(g.addresses) > 0 || good == 0) {
		c.problem(g.ref, "status.addresses", programmed.reason, programmed.message, "")
	}
	list := []condition{accepted, programmed}
	if g.resolved.kind != "" {
		list = append(list, g.resolved)
	}
	out.Conditions = conditions(generation, list...)
	c.status(g.ref, "gateways", generation, out)
}

// supportedFeatures are those of the API's conformance suite that hold here, sorted.
func supportedFeatures() []gatewayv1.SupportedFeature {
	out := make([]gatewayv1.SupportedFeature, 0, len(features))
	for _, f := range slices.Sorted(slices.Values(features)) {
		out = append(out, gatewayv1.SupportedFeature{Name: gatewayv1.FeatureName(f)})
	}
	return out
}

// features are the names of the conformance suite for what is supported.
var features = []string{
	"BackendTLSPolicy", "BackendTLSPolicySANValidation", "GRPCRoute", "GRPCRouteNamedRouteRule", "Gateway", "GatewayAddressEmpty", "GatewayHTTPListenerIsolation", "GatewayHTTPSListenerDetectMisdirectedRequests", "GatewayInfrastructurePropagation", "GatewayPort8080",
	"HTTPRoute", "HTTPRoute303RedirectStatusCode", "HTTPRoute307RedirectStatusCode", "HTTPRoute308RedirectStatusCode", "HTTPRouteBackendProtocolH2C", "HTTPRouteBackendProtocolWebSocket", "HTTPRouteBackendRequestHeaderModification",
	"HTTPRouteBackendTimeout", "HTTPRouteCORS", "HTTPRouteDestinationPortMatching", "HTTPRouteHostRewrite", "HTTPRouteMethodMatching", "HTTPRouteNamedRouteRule", "HTTPRouteParentRefPort", "HTTPRoutePathRedirect",
	"HTTPRoutePathRewrite", "HTTPRoutePortRedirect", "HTTPRouteQueryParamMatching", "HTTPRouteRequestMirror", "HTTPRouteRequestMultipleMirrors", "HTTPRouteRequestPercentageMirror",
	"HTTPRouteRequestTimeout", "HTTPRouteResponseHeaderModification", "HTTPRouteRetry", "HTTPRouteRetryBackendTimeout", "HTTPRouteRetryConnectionError", "HTTPRouteSchemeRedirect", "ReferenceGrant", "TCPRoute", "TLSRoute", "TLSRouteModeMixed", "TLSRouteModeTerminate",
}
