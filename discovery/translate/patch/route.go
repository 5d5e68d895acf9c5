package patch

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	"google.golang.org/protobuf/proto"
	envoyfilter "istio.io/api/networking/v1alpha3"

	"github.com/isthmus-mesh/isthmus/discovery/translate/wire"
)

// routes applies a patch to the route tables that are served by themselves, and to those that stand in listeners.
func (a *applier) routes() error {
	if m := a.patch.GetMatch(); m.GetCluster() != nil || m.GetListener() != nil {
		return fmt.Errorf("match: %s is matched by routeConfiguration", a.patch.GetApplyTo())
	}
	tables, changed := a.out.Routes, false
	for i, t := range a.out.Routes {
		next, did, err := a.table(t, false)
		if err != nil {
			return err
		}
		if did {
			if !changed {
				tables, changed = slices.Clone(tables), true
			}
			tables[i] = next
		}
	}
	listeners, err := a.inlineTables()
	if err != nil {
		return err
	}
	a.touchChanged(Route, names(a.out.Routes), names(tables))
	a.touchChanged(Listener, names(a.out.Listeners), names(listeners))
	a.out.Routes, a.out.Listeners = tables, listeners
	return nil
}

// inlineTables returns the listeners with the patch applied to the route tables in them.
func (a *applier) inlineTables() ([]*listenerv3.Listener, error) {
	out, cloned := a.out.Listeners, false
	for i, l := range a.out.Listeners {
		inbound := l.GetTrafficDirection() == corev3.TrafficDirection_INBOUND
		next := proto.Clone(l).(*listenerv3.Listener)
		changed := false
		chains := next.FilterChains
		if next.DefaultFilterChain != nil {
			chains = append(chains[:len(chains):len(chains)], next.DefaultFilterChain)
		}
		for _, c := range chains {
			for _, f := range c.Filters {
				if f.GetName() != connectionManager {
					continue
				}
				manager := &hcmv3.HttpConnectionManager{}
				if err := f.GetTypedConfig().UnmarshalTo(manager); err != nil {
					return nil, err
				}
				if manager.GetRouteConfig() == nil {
					continue
				}
				table, did, err := a.table(manager.GetRouteConfig(), inbound)
				if err != nil {
					return nil, err
				}
				if did {
					changed = true
					manager.RouteSpecifier = &hcmv3.HttpConnectionManager_RouteConfig{RouteConfig: table}
					f.ConfigType = &listenerv3.Filter_TypedConfig{TypedConfig: wire.Pack(manager)}
				}
			}
		}
		if changed {
			if !cloned {
				out, cloned = slices.Clone(out), true
			}
			out[i] = next
		}
	}
	return out, nil
}

// table returns a route table with the patch applied, and whether it changed.
func (a *applier) table(t *routev3.RouteConfiguration, inbound bool) (*routev3.RouteConfiguration, bool, error) {
	if !a.inContext(inbound) || !a.matchesTable(t) {
		return t, false, nil
	}
	p, m := a.patch.GetPatch(), a.patch.GetMatch().GetRouteConfiguration().GetVhost()
	if a.patch.GetApplyTo() == envoyfilter.EnvoyFilter_ROUTE_CONFIGURATION {
		if op := p.GetOperation(); op != envoyfilter.EnvoyFilter_Patch_MERGE && op != envoyfilter.EnvoyFilter_Patch_MERGE_AND_REPLACE_LIST {
			return nil, false, fmt.Errorf("patch.operation %s is not honoured for ROUTE_CONFIGURATION, only MERGE is", op)
		}
		out, err := merged(p, t, &routev3.RouteConfiguration{})
		return out, err == nil, err
	}
	out := proto.Clone(t).(*routev3.RouteConfiguration)
	changed, err := false, error(nil)
	if a.patch.GetApplyTo() == envoyfilter.EnvoyFilter_VIRTUAL_HOST {
		e := edit[*routev3.VirtualHost]{match: a.matchesHost, anchored: m.GetName() != "", fresh: func() *routev3.VirtualHost { return &routev3.VirtualHost{} }}
		out.VirtualHosts, changed, err = e.apply(p, out.VirtualHosts)
	} else {
		for _, h := range out.VirtualHosts {
			if !a.matchesHost(h) {
				continue
			}
			var did bool
			e := edit[*routev3.Route]{match: a.matchesRoute, anchored: m.GetRoute() != nil, fresh: func() *routev3.Route { return &routev3.Route{} }}
			if h.Routes, did, err = e.apply(p, h.Routes); err != nil {
				break
			}
			changed = changed || did
		}
	}
	if err == nil && changed {
		err = valid(out)
	}
	if err != nil {
		return nil, false, err
	}
	return out, changed, nil
}

// matchesTable knows the port of a table by its name: PORT at sidecars, http.PORT and https.PORT... at gateways,
// inbound|PORT|| in the listener of a workload's own ports.
func (a *applier) matchesTable(t *routev3.RouteConfiguration) bool {
	m := a.patch.GetMatch().GetRouteConfiguration()
	if m == nil {
		return true
	}
	if m.GetName() != "" && m.GetName() != t.GetName() {
		return false
	}
	parts := strings.FieldsFunc(t.GetName(), func(r rune) bool { return r == '.' || r == '|' })
	if m.GetPortNumber() != 0 && !slices.Contains(parts, strconv.FormatUint(uint64(m.GetPortNumber()), 10)) {
		return false
	}
	// At gateways: https.PORT.NAME.GATEWAY.NAMESPACE.
	if m.GetPortName() != "" && !slices.Contains(parts, m.GetPortName()) {
		return false
	}
	if m.GetGateway() != "" {
		ns, name, ok := strings.Cut(m.GetGateway(), "/")
		if !ok {
			ns, name = a.now.Object.Namespace, m.GetGateway()
		}
		if strings.HasPrefix(t.GetName(), "https.") && !strings.HasSuffix(t.GetName(), "."+name+"."+ns) {
			return false
		}
	}
	return true
}

func (a *applier) matchesHost(h *routev3.VirtualHost) bool {
	m := a.patch.GetMatch().GetRouteConfiguration().GetVhost()
	return (m.GetName() == "" || m.GetName() == h.GetName()) && (m.GetDomainName() == "" || slices.Contains(h.GetDomains(), m.GetDomainName()))
}

func (a *applier) matchesRoute(r *routev3.Route) bool {
	m := a.patch.GetMatch().GetRouteConfiguration().GetVhost().GetRoute()
	if m.GetName() != "" && m.GetName() != r.GetName() {
		return false
	}
	switch m.GetAction() {
	case envoyfilter.EnvoyFilter_RouteConfigurationMatch_RouteMatch_ROUTE:
		return r.GetRoute() != nil
	case envoyfilter.EnvoyFilter_RouteConfigurationMatch_RouteMatch_REDIRECT:
		return r.GetRedirect() != nil
	case envoyfilter.EnvoyFilter_RouteConfigurationMatch_RouteMatch_DIRECT_RESPONSE:
		return r.GetDirectResponse() != nil
	}
	return true
}
