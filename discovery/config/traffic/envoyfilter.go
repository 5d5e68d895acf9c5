package traffic

import (
	"encoding/json"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"

	envoyfilter "istio.io/api/networking/v1alpha3"

	"github.com/isthmus-mesh/isthmus/discovery/config/written"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// EnvoyFilter decodes the object; nil when something is wrong with it.
func EnvoyFilter(w *written.Object) *mesh.EnvoyFilter {
	o := &object{w}
	if o.rewritesGlobal() {
		o.Note("kind", written.ReasonSatisfied, "what the filter asks for is done without it: gateways know services by their .global names, too", "remove it when no Istio reads it any more")
		return nil
	}
	spec := &envoyfilter.EnvoyFilter{}
	if _, ok := o.Spec(spec); !ok {
		return nil
	}
	o.checkFilter(spec)
	if o.Failed {
		return nil
	}
	return &mesh.EnvoyFilter{Object: o.Ref, Created: o.Meta.CreationTimestamp.Time, Spec: spec}
}

func (o *object) checkFilter(f *envoyfilter.EnvoyFilter) {
	if f.GetWorkloadSelector() != nil && len(f.GetTargetRefs()) > 0 {
		o.Reject("spec.targetRefs", written.ReasonConflict, "stands beside a workloadSelector", "keep one of the two")
	}
	o.CheckTargets(nil, f.GetTargetRefs())
	for i, p := range f.GetConfigPatches() {
		at := fmt.Sprintf("spec.configPatches[%d]", i)
		if p.GetApplyTo() == envoyfilter.EnvoyFilter_INVALID {
			o.Reject(at+".applyTo", written.ReasonMissing, "does not say what it applies to", "write for example HTTP_FILTER")
		}
		if p.GetApplyTo() == envoyfilter.EnvoyFilter_BOOTSTRAP {
			o.Reject(at+".applyTo", written.ReasonUnsupported, "BOOTSTRAP is not honoured: what Envoy starts with is made by its agent", "write what is to be changed as a LISTENER, CLUSTER or EXTENSION_CONFIG, or set it in the proxy's own configuration")
		}
		if p.GetMatch().GetContext() == envoyfilter.EnvoyFilter_WAYPOINT || p.GetMatch().GetWaypoint() != nil {
			o.Reject(at+".match", written.ReasonUnsupported, "there are no waypoints", "write context: SIDECAR_INBOUND, SIDECAR_OUTBOUND or GATEWAY")
		}
		if v := p.GetMatch().GetProxy().GetProxyVersion(); v != "" {
			if _, err := regexp.Compile(v); err != nil {
				o.Invalid(at+".match.proxy.proxyVersion", written.Show(v)+" is not a regular expression", `write for example "^1\\.31.*"`)
			}
		}
		op := p.GetPatch().GetOperation()
		if op == envoyfilter.EnvoyFilter_Patch_INVALID {
			o.Reject(at+".patch.operation", written.ReasonMissing, "the operation is missing", "write for example MERGE or INSERT_BEFORE")
		} else if op != envoyfilter.EnvoyFilter_Patch_REMOVE && len(p.GetPatch().GetValue().GetFields()) == 0 {
			o.Reject(at+".patch.value", written.ReasonMissing, fmt.Sprintf("operation %s needs a value", op), "write what is to be put there")
		}
		o.checkTypes(at+".patch.value", p.GetPatch().GetValue().AsMap(), 0)
	}
}

// maxValueDepth bounds how deep the values of a patch may stand in each other.
const maxValueDepth = 100

// checkTypes refuses types of Envoy's second API version, wherever they stand in a value.
func (o *object) checkTypes(at string, v any, depth int) {
	if depth > maxValueDepth {
		o.Invalid(at, "values stand too deep in values", "shorten the patch")
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
			o.Invalid(at, written.Show(t)+" is a type of Envoy's API version 2, which no Envoy reads any more", "write its v3 type: type.googleapis.com/envoy.extensions....v3....")
			return
		}
		for _, k := range slices.Sorted(maps.Keys(x)) {
			o.checkTypes(at+"."+k, x[k], depth+1)
		}
	}
}

// rewritesGlobal reports whether an EnvoyFilter is Istio's for gateways of several control planes, which turns names
// below .global into local ones by a filter that Envoy no longer has, and does nothing else.
func (o *object) rewritesGlobal() bool {
	var f struct {
		Spec struct {
			Filters []struct {
				Name string `json:"filterName"`
			} `json:"filters"`
			Patches []struct {
				Patch struct {
					Value struct {
						Name string `json:"name"`
					} `json:"value"`
				} `json:"patch"`
			} `json:"configPatches"`
		} `json:"spec"`
	}
	if json.Unmarshal(o.Raw, &f) != nil {
		return false
	}
	var names []string
	for _, x := range f.Spec.Filters {
		names = append(names, x.Name)
	}
	for _, x := range f.Spec.Patches {
		names = append(names, x.Patch.Value.Name)
	}
	if len(names) == 0 { // an API server with Istio's definition of the kind keeps nothing of the old fields
		return o.Ref.Name == "istio-multicluster-ingressgateway"
	}
	return !slices.ContainsFunc(names, func(n string) bool { return !strings.HasSuffix(n, "network.tcp_cluster_rewrite") })
}
