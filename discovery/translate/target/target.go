// Package target says which proxies a policy is for. It is pure, and knows nothing of what policies say.
package target

import (
	"cmp"

	typev1beta1 "istio.io/api/type/v1beta1"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// gatewayLabel is on the pods of a Gateway of the Gateway API (GEP-1762).
const gatewayLabel = "gateway.networking.k8s.io/gateway-name"

// Root returns the namespace whose objects apply to the whole mesh.
func Root(snap *mesh.Snapshot) string {
	if snap.MeshConfig == nil {
		return "istio-system"
	}
	return cmp.Or(snap.MeshConfig.Spec.GetRootNamespace(), "istio-system")
}

// Applies reports whether an object of the namespace is for p: of p's own namespace, or of the root namespace. refs,
// when there are any, name Gateways of the Gateway API in the object's namespace; else the labels must match.
func Applies(root string, p *mesh.Proxy, namespace string, labels map[string]string, refs []*typev1beta1.PolicyTargetReference) bool {
	if len(refs) > 0 {
		for _, r := range refs {
			if IsGateway(r) && p.Type == mesh.Router && p.Namespace == namespace && p.Labels[gatewayLabel] == r.GetName() {
				return true
			}
		}
		return false
	}
	if namespace != root && namespace != p.Namespace {
		return false
	}
	for k, want := range labels {
		if have, ok := p.Labels[k]; !ok || have != want {
			return false
		}
	}
	return true
}

// IsGateway reports whether the reference is to a Gateway of the Gateway API.
func IsGateway(r *typev1beta1.PolicyTargetReference) bool {
	return r.GetKind() == "Gateway" && r.GetGroup() == "gateway.networking.k8s.io"
}
