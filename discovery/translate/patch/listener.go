package patch

import (
	"fmt"
	"slices"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	"google.golang.org/protobuf/proto"
	envoyfilter "istio.io/api/networking/v1alpha3"

	"github.com/isthmus-mesh/isthmus/discovery/translate/wire"
)

const (
	connectionManager = "envoy.filters.network.http_connection_manager"
	virtualInbound    = "virtualInbound"
)

// oldNames are names that filters had before Envoy 1.16, which EnvoyFilters may still match by.
var oldNames = map[string]string{
	"envoy.http_connection_manager": connectionManager, "envoy.tcp_proxy": "envoy.filters.network.tcp_proxy",
	"envoy.router": "envoy.filters.http.router", "envoy.cors": "envoy.filters.http.cors", "envoy.fault": "envoy.filters.http.fault",
	"envoy.listener.tls_inspector": "envoy.filters.listener.tls_inspector", "envoy.listener.original_dst": "envoy.filters.listener.original_dst",
}

func sameName(want, have string) bool {
	if now, ok := oldNames[want]; ok {
		want = now
	}
	return want == have
}

// listeners applies a patch to the listeners or to something in them.
func (a *applier) listeners() error {
	if a.patch.GetApplyTo() == envoyfilter.EnvoyFilter_LISTENER {
		return a.wholeListeners()
	}
	out, changed := a.out.Listeners, false
	var touched []string
	for i, l := range a.out.Listeners {
		if !a.matchesListener(l) {
			continue
		}
		next := proto.Clone(l).(*listenerv3.Listener)
		did, err := a.inside(next)
		if err == nil && did {
			err = valid(next)
		}
		if err != nil {
			return fmt.Errorf("listener %s: %w", l.GetName(), err)
		}
		if !did {
			continue
		}
		if !changed {
			out, changed = slices.Clone(out), true
		}
		out[i], touched = next, append(touched, l.GetName())
	}
	a.out.Listeners = out
	for _, name := range touched {
		a.touch(Listener, name)
	}
	return nil
}

func (a *applier) wholeListeners() (err error) {
	e := edit[*listenerv3.Listener]{match: a.matchesListener, fresh: func() *listenerv3.Listener { return &listenerv3.Listener{} }}
	a.out.Listeners, err = patched(a, Listener, e, a.out.Listeners)
	return err
}

// inside applies the patch to something in a listener, which may be written to, and says whether it changed.
func (a *applier) inside(l *listenerv3.Listener) (changed bool, err error) {
	p := a.patch.GetPatch()
	m := a.patch.GetMatch().GetListener()
	switch a.patch.GetApplyTo() {
	case envoyfilter.EnvoyFilter_LISTENER_FILTER:
		e := edit[*listenerv3.ListenerFilter]{
			match: func(f *listenerv3.ListenerFilter) bool {
				return m.GetListenerFilter() == "" || sameName(m.GetListenerFilter(), f.GetName())
			},
			anchored: m.GetListenerFilter() != "", fresh: func() *listenerv3.ListenerFilter { return &listenerv3.ListenerFilter{} },
		}
		l.ListenerFilters, changed, err = e.apply(p, l.ListenerFilters)
		return changed, err
	case envoyfilter.EnvoyFilter_FILTER_CHAIN:
		return a.chains(l)
	}
	chains := l.FilterChains
	if l.DefaultFilterChain != nil {
		chains = append(chains[:len(chains):len(chains)], l.DefaultFilterChain)
	}
	for _, c := range chains {
		if !a.matchesChain(l, c) {
			continue
		}
		var did bool
		if a.patch.GetApplyTo() == envoyfilter.EnvoyFilter_NETWORK_FILTER {
			did, err = a.networkFilters(c)
		} else {
			did, err = a.httpFilters(c)
		}
		if err != nil {
			return false, err
		}
		changed = changed || did
	}
	return changed, nil
}

func (a *applier) chains(l *listenerv3.Listener) (changed bool, err error) {
	p := a.patch.GetPatch()
	switch p.GetOperation() {
	case envoyfilter.EnvoyFilter_Patch_ADD, envoyfilter.EnvoyFilter_Patch_REMOVE, envoyfilter.EnvoyFilter_Patch_MERGE, envoyfilter.EnvoyFilter_Patch_MERGE_AND_REPLACE_LIST:
	default:
		return false, fmt.Errorf("patch.operation %s is not honoured for FILTER_CHAIN", p.GetOperation())
	}
	e := edit[*listenerv3.FilterChain]{
		match: func(c *listenerv3.FilterChain) bool { return a.matchesChain(l, c) }, fresh: func() *listenerv3.FilterChain { return &listenerv3.FilterChain{} },
	}
	l.FilterChains, changed, err = e.apply(p, l.FilterChains)
	if err != nil || l.DefaultFilterChain == nil || p.GetOperation() == envoyfilter.EnvoyFilter_Patch_ADD {
		return changed, err
	}
	rest, did, err := e.apply(p, []*listenerv3.FilterChain{l.DefaultFilterChain})
	if err != nil || !did {
		return changed, err
	}
	l.DefaultFilterChain = nil
	if len(rest) > 0 {
		l.DefaultFilterChain = rest[0]
	}
	return true, nil
}

func (a *applier) networkFilters(c *listenerv3.FilterChain) (changed bool, err error) {
	name := a.patch.GetMatch().GetListener().GetFilterChain().GetFilter().GetName()
	e := edit[*listenerv3.Filter]{
		match:    func(f *listenerv3.Filter) bool { return name == "" || sameName(name, f.GetName()) },
		anchored: name != "", fresh: func() *listenerv3.Filter { return &listenerv3.Filter{} },
		end: func(list []*listenerv3.Filter) int { return max(len(list)-1, 0) }, // the last one ends the chain
	}
	c.Filters, changed, err = e.apply(a.patch.GetPatch(), c.Filters)
	return changed, err
}

func (a *applier) httpFilters(c *listenerv3.FilterChain) (changed bool, err error) {
	m := a.patch.GetMatch().GetListener().GetFilterChain().GetFilter()
	if n := m.GetName(); n != "" && !sameName(n, connectionManager) {
		return false, fmt.Errorf("match.listener.filterChain.filter.name %q has no HTTP filters, only %s has", n, connectionManager)
	}
	for _, f := range c.Filters {
		if f.GetName() != connectionManager {
			continue
		}
		manager := &hcmv3.HttpConnectionManager{}
		if err := f.GetTypedConfig().UnmarshalTo(manager); err != nil {
			return false, err
		}
		sub := m.GetSubFilter().GetName()
		e := edit[*hcmv3.HttpFilter]{
			match:    func(f *hcmv3.HttpFilter) bool { return sub == "" || sameName(sub, f.GetName()) },
			anchored: sub != "", fresh: func() *hcmv3.HttpFilter { return &hcmv3.HttpFilter{} }, end: a.endOf,
		}
		list, did, err := e.apply(a.patch.GetPatch(), manager.HttpFilters)
		if err != nil {
			return false, err
		}
		if did {
			manager.HttpFilters, changed = list, true
			f.ConfigType = &listenerv3.Filter_TypedConfig{TypedConfig: wire.Pack(manager)}
		}
	}
	return changed, nil
}

// endOf returns where a filter is added: before the router, which ends the list, or behind those of its class.
func (a *applier) endOf(list []*hcmv3.HttpFilter) int {
	end := max(len(list)-1, 0)
	after := func(names ...string) int {
		at := 0
		for i, f := range list {
			if slices.Contains(names, f.GetName()) {
				at = i + 1
			}
		}
		return min(at, end)
	}
	const cors, tokens = "envoy.filters.http.cors", "envoy.filters.http.jwt_authn"
	switch a.patch.GetPatch().GetFilterClass() {
	case envoyfilter.EnvoyFilter_Patch_AUTHN:
		return after(cors, tokens)
	case envoyfilter.EnvoyFilter_Patch_AUTHZ:
		return after(cors, tokens, "envoy.filters.http.rbac", "envoy.filters.http.ext_authz")
	}
	return end
}

func (a *applier) matchesListener(l *listenerv3.Listener) bool {
	if !a.inContext(l.GetTrafficDirection() == corev3.TrafficDirection_INBOUND) {
		return false
	}
	m := a.patch.GetMatch().GetListener()
	if m.GetName() != "" && m.GetName() != l.GetName() {
		return false
	}
	// All of a workload's ports are chains of one listener.
	if n := m.GetPortNumber(); n != 0 && l.GetName() != virtualInbound && l.GetAddress().GetSocketAddress().GetPortValue() != n {
		return false
	}
	if a.patch.GetApplyTo() == envoyfilter.EnvoyFilter_LISTENER && m.GetFilterChain() != nil {
		return slices.ContainsFunc(l.GetFilterChains(), func(c *listenerv3.FilterChain) bool { return a.matchesChain(l, c) })
	}
	return true
}

func (a *applier) matchesChain(l *listenerv3.Listener, c *listenerv3.FilterChain) bool {
	lm := a.patch.GetMatch().GetListener()
	m, have := lm.GetFilterChain(), c.GetFilterChainMatch()
	if n := lm.GetPortNumber(); n != 0 && l.GetName() == virtualInbound && have.GetDestinationPort().GetValue() != n {
		return false
	}
	if m == nil {
		return true
	}
	if m.GetName() != "" && m.GetName() != c.GetName() || m.GetSni() != "" && !slices.Contains(have.GetServerNames(), m.GetSni()) ||
		m.GetTransportProtocol() != "" && m.GetTransportProtocol() != have.GetTransportProtocol() ||
		m.GetDestinationPort() != 0 && m.GetDestinationPort() != have.GetDestinationPort().GetValue() {
		return false
	}
	if m.GetApplicationProtocols() != "" {
		for _, p := range strings.Split(m.GetApplicationProtocols(), ",") {
			if !slices.Contains(have.GetApplicationProtocols(), strings.TrimSpace(p)) {
				return false
			}
		}
	}
	if n := m.GetFilter().GetName(); n != "" {
		return slices.ContainsFunc(c.GetFilters(), func(f *listenerv3.Filter) bool { return sameName(n, f.GetName()) })
	}
	return true
}
