package config

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"

	envoyfilter "istio.io/api/networking/v1alpha3"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

func (o *object) envoyFilter() {
	if o.rewritesGlobal() {
		o.note("kind", ReasonSatisfied, "what the filter asks for is done without it: gateways know services by their .global names, too", "remove it when no Istio reads it any more")
		return
	}
	spec := &envoyfilter.EnvoyFilter{}
	if _, ok := o.spec(spec); !ok {
		return
	}
	o.checkFilter(spec)
	if !o.failed {
		o.d.in.EnvoyFilters = append(o.d.in.EnvoyFilters, &mesh.EnvoyFilter{Object: o.ref, Created: o.meta.CreationTimestamp.Time, Spec: spec})
	}
}

func (o *object) checkFilter(f *envoyfilter.EnvoyFilter) {
	if f.GetWorkloadSelector() != nil && len(f.GetTargetRefs()) > 0 {
		o.reject("spec.targetRefs", ReasonConflict, "stands beside a workloadSelector", "keep one of the two")
	}
	o.checkTargets(nil, f.GetTargetRefs())
	for i, p := range f.GetConfigPatches() {
		at := fmt.Sprintf("spec.configPatches[%d]", i)
		if p.GetApplyTo() == envoyfilter.EnvoyFilter_INVALID {
			o.reject(at+".applyTo", ReasonMissing, "does not say what it applies to", "write for example HTTP_FILTER")
		}
		if p.GetApplyTo() == envoyfilter.EnvoyFilter_BOOTSTRAP {
			o.reject(at+".applyTo", ReasonUnsupported, "BOOTSTRAP is not honoured: what Envoy starts with is made by its agent", "write what is to be changed as a LISTENER, CLUSTER or EXTENSION_CONFIG, or set it in the proxy's own configuration")
		}
		if p.GetMatch().GetContext() == envoyfilter.EnvoyFilter_WAYPOINT || p.GetMatch().GetWaypoint() != nil {
			o.reject(at+".match", ReasonUnsupported, "there are no waypoints", "write context: SIDECAR_INBOUND, SIDECAR_OUTBOUND or GATEWAY")
		}
		if v := p.GetMatch().GetProxy().GetProxyVersion(); v != "" {
			if _, err := regexp.Compile(v); err != nil {
				o.invalid(at+".match.proxy.proxyVersion", show(v)+" is not a regular expression", `write for example "^1\\.31.*"`)
			}
		}
		op := p.GetPatch().GetOperation()
		if op == envoyfilter.EnvoyFilter_Patch_INVALID {
			o.reject(at+".patch.operation", ReasonMissing, "the operation is missing", "write for example MERGE or INSERT_BEFORE")
		} else if op != envoyfilter.EnvoyFilter_Patch_REMOVE && len(p.GetPatch().GetValue().GetFields()) == 0 {
			o.reject(at+".patch.value", ReasonMissing, fmt.Sprintf("operation %s needs a value", op), "write what is to be put there")
		}
		o.checkTypes(at+".patch.value", p.GetPatch().GetValue().AsMap(), 0)
	}
}

// maxValueDepth bounds how deep the values of a patch may stand in each other.
const maxValueDepth = 100

// checkTypes refuses types of Envoy's second API version, wherever they stand in a value.
func (o *object) checkTypes(at string, v any, depth int) {
	if depth > maxValueDepth {
		o.invalid(at, "values stand too deep in values", "shorten the patch")
		return
	}
	switch x := v.(type) {
	case []any:
		for i := range x {
			o.checkTypes(fmt.Sprintf("%s[%d]", at, i), x[i], depth+1)
		}
	case map[string]any:
		t, _ := x["@type"].(string)
		if strings.Contains(t, "envoy.config.filter.") || strings.Contains(t, "envoy.api.v2") || strings.Contains(t, ".v2.") || strings.Contains(t, ".v2alpha.") {
			o.invalid(at, show(t)+" is a type of Envoy's API version 2, which no Envoy reads any more", "write its v3 type: type.googleapis.com/envoy.extensions....v3....")
			return
		}
		for _, k := range slices.Sorted(maps.Keys(x)) {
			o.checkTypes(at+"."+k, x[k], depth+1)
		}
	}
}
