// Package patch applies EnvoyFilters to what a proxy is served. It is pure: what Envoy has refused is told to it.
//
// Filters of the root namespace come first, then those of the proxy's own; in each by priority, age and name. A patch
// that cannot be applied is left out and becomes a Problem, all others are applied. Resources that no patch touches are
// returned as they are, those that one touches are copies.
package patch

import (
	"cmp"
	"fmt"
	"regexp"
	"slices"
	"strings"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	envoyfilter "istio.io/api/networking/v1alpha3"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/translate"
	"github.com/isthmus-mesh/isthmus/discovery/translate/target"
)

// Kind is the kind of resource that a patch touches.
type Kind string

// The kinds.
const (
	Cluster   Kind = "cluster"
	Listener  Kind = "listener"
	Route     Kind = "route"
	Extension Kind = "extension"
)

// Resource names one resource of a proxy.
type Resource struct {
	Kind Kind
	Name string
}

// Result is what a proxy is served with its EnvoyFilters applied.
type Result struct {
	translate.Resources
	Touched  map[Resource][]*mesh.EnvoyFilter // whose patches are in a resource, in the order of application
	Problems []mesh.Problem
}

// Apply returns the resources with the patches of every EnvoyFilter that is for p, but for those that skip says to leave
// out, which may be nil.
func Apply(snap *mesh.Snapshot, p *mesh.Proxy, r translate.Resources, skip func(*mesh.EnvoyFilter) bool) Result {
	a := &applier{proxy: p, out: Result{Resources: r}}
	for _, f := range For(snap, p) {
		if skip == nil || !skip(f) {
			a.filter(f)
		}
	}
	if len(a.out.Touched) > 0 {
		slices.SortStableFunc(a.out.Clusters, func(x, y *clusterv3.Cluster) int { return cmp.Compare(x.Name, y.Name) })
		slices.SortStableFunc(a.out.Listeners, func(x, y *listenerv3.Listener) int { return cmp.Compare(x.Name, y.Name) })
		slices.SortStableFunc(a.out.Routes, func(x, y *routev3.RouteConfiguration) int { return cmp.Compare(x.Name, y.Name) })
		slices.SortStableFunc(a.out.Extensions, func(x, y *corev3.TypedExtensionConfig) int { return cmp.Compare(x.Name, y.Name) })
	}
	return a.out
}

// For returns the EnvoyFilters that are for p, in the order in which they are applied.
func For(snap *mesh.Snapshot, p *mesh.Proxy) []*mesh.EnvoyFilter {
	root := target.Root(snap)
	var out []*mesh.EnvoyFilter
	for _, f := range snap.EnvoyFilters {
		if target.Applies(root, p, f.Object.Namespace, f.Spec.GetWorkloadSelector().GetLabels(), f.Spec.GetTargetRefs()) {
			out = append(out, f)
		}
	}
	slices.SortStableFunc(out, func(x, y *mesh.EnvoyFilter) int {
		level := func(f *mesh.EnvoyFilter) int {
			if f.Object.Namespace == root {
				return 0
			}
			return 1
		}
		return cmp.Or(cmp.Compare(level(x), level(y)), cmp.Compare(x.Spec.GetPriority(), y.Spec.GetPriority()), x.Created.Compare(y.Created),
			cmp.Compare(x.Object.Name, y.Object.Name))
	})
	return out
}

// Facts returns what of p beyond its labels and namespace decides which patches it gets: its version and the metadata
// that some EnvoyFilter asks for. Proxies that differ in nothing else and have equal Facts are served the same.
func Facts(snap *mesh.Snapshot, p *mesh.Proxy) string {
	var facts []string
	for _, f := range snap.EnvoyFilters {
		for _, c := range f.Spec.GetConfigPatches() {
			if c.GetMatch().GetProxy().GetProxyVersion() != "" {
				facts = append(facts, "version="+p.Version)
			}
			for k := range c.GetMatch().GetProxy().GetMetadata() {
				facts = append(facts, fmt.Sprintf("%q=%q", k, p.Metadata[k]))
			}
		}
	}
	slices.Sort(facts)
	return strings.Join(slices.Compact(facts), ",")
}

// applier applies patches one by one.
type applier struct {
	proxy *mesh.Proxy
	out   Result
	// Of the patch at hand.
	now   *mesh.EnvoyFilter
	patch *envoyfilter.EnvoyFilter_EnvoyConfigObjectPatch
}

func (a *applier) filter(f *mesh.EnvoyFilter) {
	a.now = f
	for i, p := range f.Spec.GetConfigPatches() {
		a.patch = p
		ok, err := a.selects(p.GetMatch().GetProxy())
		if err == nil && ok {
			err = a.apply()
		}
		if err != nil {
			a.out.Problems = append(a.out.Problems, mesh.Problem{
				Object: f.Object, Field: fmt.Sprintf("spec.configPatches[%d]", i), Reason: "InvalidPatch",
				Message: oneLine(err.Error()) + "; the patch is left out", Remedy: "correct the patch",
			})
		}
	}
}

// selects reports whether the proxy is one that the patch is for.
func (a *applier) selects(m *envoyfilter.EnvoyFilter_ProxyMatch) (bool, error) {
	if v := m.GetProxyVersion(); v != "" {
		re, err := regexp.Compile(v)
		if err != nil {
			return false, fmt.Errorf("match.proxy.proxyVersion: %w", err)
		}
		if !re.MatchString(a.proxy.Version) {
			return false, nil
		}
	}
	for k, want := range m.GetMetadata() {
		if have, ok := a.proxy.Metadata[k]; !ok || have != want {
			return false, nil
		}
	}
	return true, nil
}

func (a *applier) apply() error {
	switch a.patch.GetApplyTo() {
	case envoyfilter.EnvoyFilter_CLUSTER:
		return a.clusters()
	case envoyfilter.EnvoyFilter_LISTENER, envoyfilter.EnvoyFilter_FILTER_CHAIN, envoyfilter.EnvoyFilter_NETWORK_FILTER,
		envoyfilter.EnvoyFilter_HTTP_FILTER, envoyfilter.EnvoyFilter_LISTENER_FILTER:
		return a.listeners()
	case envoyfilter.EnvoyFilter_ROUTE_CONFIGURATION, envoyfilter.EnvoyFilter_VIRTUAL_HOST, envoyfilter.EnvoyFilter_HTTP_ROUTE:
		return a.routes()
	case envoyfilter.EnvoyFilter_EXTENSION_CONFIG:
		return a.extensions()
	}
	return fmt.Errorf("applyTo %s is not honoured", a.patch.GetApplyTo())
}

// inContext reports whether the patch is for resources of that kind of proxy and direction.
func (a *applier) inContext(inbound bool) bool {
	router := a.proxy.Type == mesh.Router
	switch a.patch.GetMatch().GetContext() {
	case envoyfilter.EnvoyFilter_ANY:
		return true
	case envoyfilter.EnvoyFilter_SIDECAR_INBOUND:
		return !router && inbound
	case envoyfilter.EnvoyFilter_SIDECAR_OUTBOUND:
		return !router && !inbound
	case envoyfilter.EnvoyFilter_GATEWAY:
		return router
	}
	return false
}

func (a *applier) touch(kind Kind, name string) {
	r := Resource{kind, name}
	if a.out.Touched == nil {
		a.out.Touched = map[Resource][]*mesh.EnvoyFilter{}
	}
	if !slices.Contains(a.out.Touched[r], a.now) {
		a.out.Touched[r] = append(a.out.Touched[r], a.now)
	}
}

func oneLine(s string) string {
	s = strings.Join(strings.Fields(strings.ReplaceAll(s, "\u00a0", " ")), " ")
	if len(s) > 300 {
		s = strings.ToValidUTF8(s[:300], "") + "..."
	}
	return s
}
