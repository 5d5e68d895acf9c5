package config

import (
	"fmt"
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
	for i, p := range f.GetConfigPatches() {
		at := fmt.Sprintf("spec.configPatches[%d]", i)
		if p.GetApplyTo() == envoyfilter.EnvoyFilter_INVALID {
			o.reject(at+".applyTo", ReasonMissing, "does not say what it applies to", "write for example HTTP_FILTER")
		}
		op := p.GetPatch().GetOperation()
		if op == envoyfilter.EnvoyFilter_Patch_INVALID {
			o.reject(at+".patch.operation", ReasonMissing, "the operation is missing", "write for example MERGE or INSERT_BEFORE")
		} else if op != envoyfilter.EnvoyFilter_Patch_REMOVE && len(p.GetPatch().GetValue().GetFields()) == 0 {
			o.reject(at+".patch.value", ReasonMissing, fmt.Sprintf("operation %s needs a value", op), "write what is to be put there")
		}
		config := p.GetPatch().GetValue().GetFields()["typed_config"].GetStructValue().GetFields()
		if t := config["@type"].GetStringValue(); strings.Contains(t, "envoy.config.filter.") || strings.Contains(t, "envoy.api.v2") || strings.Contains(t, ".v2.") || strings.Contains(t, ".v2alpha.") {
			o.invalid(at+".patch.value.typed_config", show(t)+" is a type of Envoy's API version 2, which no Envoy reads any more", "write its v3 type: type.googleapis.com/envoy.extensions....v3....")
		}
	}
}
