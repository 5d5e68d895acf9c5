//lint:file-ignore SA1019 users still write the fields that Istio has deprecated

package translate

import (
	"cmp"
	"slices"
	"strconv"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	networking "istio.io/api/networking/v1"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/translate/httprule"
	"github.com/isthmus-mesh/isthmus/discovery/translate/wire"
)

// httpRoutes translates the HTTP rules of vs for one site, in order, up to the first that takes everything.
func (v *view) httpRoutes(vs *mesh.VirtualService, at site) []*routev3.Route {
	var out []*routev3.Route
	for i, h := range vs.Spec.GetHttp() {
		object, field := vs.Rule(i)
		matches := h.GetMatch()
		if len(matches) == 0 {
			matches = []*networking.HTTPMatchRequest{nil}
		}
		for _, m := range matches {
			if !v.applies(at, vs, m) || at.gateway == meshGateway && httprule.HasClaims(m) {
				continue
			}
			r := v.httpRoute(object, h, m, at, field)
			if vs.GatewayAPI {
				httprule.Segments(r, h, m)
			}
			if err := httprule.CheckMatch(r.GetMatch()); err != nil {
				v.problems.add(object, field+".match", reasonInvalid, err.Error())
				continue
			}
			if err := httprule.CheckAction(r); err != nil {
				v.problems.add(object, field, reasonInvalid, err.Error())
				r = &routev3.Route{Name: r.GetName(), Match: r.GetMatch(), Action: unavailable(object)}
			}
			out = append(out, r)
			if httprule.CatchesAll(r) {
				return out
			}
		}
	}
	return out
}

func (v *view) httpRoute(object mesh.ObjectRef, h *networking.HTTPRoute, m *networking.HTTPMatchRequest, at site, field string) *routev3.Route {
	r := &routev3.Route{Name: cmp.Or(m.GetName(), h.GetName()), Match: httprule.Match(m), Metadata: origin(object), StatPrefix: m.GetStatPrefix()}
	r.TypedPerFilterConfig = httprule.PerRoute(h)
	requestHeaders(r, h.GetHeaders())
	switch {
	case h.GetRedirect() != nil:
		r.Action = &routev3.Route_Redirect{Redirect: httprule.Redirect(h.GetRedirect(), at.port)}
	case h.GetDirectResponse() != nil:
		r.Action = &routev3.Route_DirectResponse{DirectResponse: httprule.DirectResponse(h.GetDirectResponse())}
	case h.GetDelegate() != nil:
		r.Action = unavailable(object) // the store has said why
	default:
		if action := v.routeAction(object, h, m, at, field); action != nil {
			r.Action = &routev3.Route_Route{Route: action}
		} else {
			r.Action = unavailable(object)
		}
	}
	return r
}

// unavailable answers for a route whose destination does not exist: a request is never sent elsewhere in silence.
func unavailable(object mesh.ObjectRef) *routev3.Route_DirectResponse {
	return &routev3.Route_DirectResponse{DirectResponse: &routev3.DirectResponseAction{
		Status: 503, Body: httprule.InlineString("no such destination, see " + object.String() + "\n"),
	}}
}

// routeAction returns nil when no destination exists. One of several that does not exist keeps its share, which gets 503.
func (v *view) routeAction(object mesh.ObjectRef, h *networking.HTTPRoute, m *networking.HTTPMatchRequest, at site, field string) *routev3.RouteAction {
	a := &routev3.RouteAction{Timeout: wire.Duration(0), RetryPolicy: httprule.Retry(v.retries(h.GetRetries()))}
	if t := h.GetTimeout(); t != nil {
		a.Timeout = t
	}
	destinations := slices.DeleteFunc(slices.Clone(h.GetRoute()), func(d *networking.HTTPRouteDestination) bool {
		return len(h.GetRoute()) > 1 && d.GetWeight() <= 0
	})
	weighted := &routev3.WeightedCluster{}
	found := false
	for i, d := range destinations {
		share := &routev3.WeightedCluster_ClusterWeight{Name: blackHoleCluster, Weight: wire.U32(uint32(max(d.GetWeight(), 1)))}
		if d.GetDestination().GetHost() == "" { // of the Gateway API, whose conditions say why
			share.Name, a.ClusterNotFoundResponseCode = unresolvedCluster, routev3.RouteAction_INTERNAL_SERVER_ERROR
			weighted.Clusters = append(weighted.Clusters, share)
			continue
		}
		t, ok := v.resolve(d.GetDestination(), at.port, object, field+".route["+strconv.Itoa(i)+"].destination")
		if ok {
			share.Name = t.cluster
			if !found {
				a.HashPolicy = httprule.Hash(t.policy)
			}
			found = true
		}
		ops := d.GetHeaders()
		share.RequestHeadersToAdd, share.RequestHeadersToRemove = httprule.HeaderOps(ops.GetRequest())
		share.ResponseHeadersToAdd, share.ResponseHeadersToRemove = httprule.HeaderOps(ops.GetResponse())
		if host := httprule.HostHeader(ops.GetRequest()); host != "" {
			share.HostRewriteSpecifier = &routev3.WeightedCluster_ClusterWeight_HostRewriteLiteral{HostRewriteLiteral: host}
		}
		weighted.Clusters = append(weighted.Clusters, share)
	}
	if !found {
		if len(destinations) == 0 {
			v.problems.add(object, field+".route", reasonInvalid, "no destination has a weight, such requests get 503")
		}
		return nil
	}
	a.ClusterSpecifier = &routev3.RouteAction_WeightedClusters{WeightedClusters: weighted}
	if only := weighted.Clusters[0]; len(weighted.Clusters) == 1 && destinations[0].GetHeaders() == nil {
		a.ClusterSpecifier = &routev3.RouteAction_Cluster{Cluster: only.GetName()}
	}
	if host := httprule.HostHeader(h.GetHeaders().GetRequest()); host != "" {
		a.HostRewriteSpecifier = &routev3.RouteAction_HostRewriteLiteral{HostRewriteLiteral: host}
	}
	httprule.Rewrite(a, h.GetRewrite(), m)
	v.mirror(a, object, h, at, field)
	return a
}

func (v *view) mirror(a *routev3.RouteAction, object mesh.ObjectRef, h *networking.HTTPRoute, at site, field string) {
	mirrors := h.GetMirrors()
	if h.GetMirror() != nil {
		share := h.GetMirrorPercentage()
		if share == nil && h.GetMirrorPercent() != nil {
			share = &networking.Percent{Value: float64(h.GetMirrorPercent().GetValue())}
		}
		mirrors = append([]*networking.HTTPMirrorPolicy{{Destination: h.GetMirror(), Percentage: share}}, mirrors...)
	}
	for _, m := range mirrors {
		t, ok := v.resolve(m.GetDestination(), at.port, object, field+".mirror")
		if !ok {
			continue
		}
		share := wire.Percent(100)
		if m.GetPercentage() != nil {
			share = wire.Percent(m.GetPercentage().GetValue())
		}
		a.RequestMirrorPolicies = append(a.RequestMirrorPolicies, &routev3.RouteAction_RequestMirrorPolicy{
			Cluster: t.cluster, RuntimeFraction: &corev3.RuntimeFractionalPercent{DefaultValue: share},
		})
	}
}

func requestHeaders(r *routev3.Route, h *networking.Headers) {
	r.RequestHeadersToAdd, r.RequestHeadersToRemove = httprule.HeaderOps(h.GetRequest())
	r.ResponseHeadersToAdd, r.ResponseHeadersToRemove = httprule.HeaderOps(h.GetResponse())
}

// retries are a rule's, else the mesh's.
func (v *view) retries(h *networking.HTTPRetry) *networking.HTTPRetry {
	if h == nil {
		h = v.meshConfig().GetDefaultHttpRetryPolicy()
	}
	return h
}

// directRoute sends everything to one cluster under the default rules.
func (v *view) directRoute(cluster string, policy *networking.TrafficPolicy) *routev3.Route {
	return &routev3.Route{Name: "default", Match: httprule.EveryPath(), Action: &routev3.Route_Route{Route: &routev3.RouteAction{
		ClusterSpecifier: &routev3.RouteAction_Cluster{Cluster: cluster}, Timeout: wire.Duration(0), RetryPolicy: httprule.Retry(v.retries(nil)), HashPolicy: httprule.Hash(policy),
	}}}
}

// virtualHost gathers the routes of one host; when its rules leave requests over they are answered 404.
func virtualHost(name string, domains []string, routes []*routev3.Route) *routev3.VirtualHost {
	return &routev3.VirtualHost{Name: name, Domains: domains, Routes: routes, IncludeRequestAttemptCount: true}
}
