package written

import (
	"fmt"

	typev1beta1 "istio.io/api/type/v1beta1"
)

// CheckTargets refuses what a policy cannot be attached to here: waypoints do not exist.
func (o *Object) CheckTargets(single *typev1beta1.PolicyTargetReference, list []*typev1beta1.PolicyTargetReference) {
	at := func(i int) string { return fmt.Sprintf("spec.targetRefs[%d]", i) }
	if single != nil {
		list, at = append([]*typev1beta1.PolicyTargetReference{single}, list...), func(int) string { return "spec.targetRef" }
	}
	for i, r := range list {
		switch {
		case r.GetName() == "":
			o.Reject(at(i)+".name", ReasonMissing, "the name is missing", "name a Gateway")
		case r.GetKind() != "Gateway" || r.GetGroup() != "gateway.networking.k8s.io":
			o.Reject(at(i)+".kind", ReasonUnsupported, Show(r.GetKind())+" of group "+Show(r.GetGroup())+" is not a target: there are no waypoints", "name a Gateway of gateway.networking.k8s.io, or select workloads by label")
		case r.GetNamespace() != "" && r.GetNamespace() != o.Ref.Namespace:
			o.Reject(at(i)+".namespace", ReasonUnsupported, "a policy has effect in its own namespace only", "write the policy in namespace "+Show(r.GetNamespace()))
		}
	}
}

// EmptySpec reports whether an object says nothing where that means something: a policy without a spec denies all.
func (o *Object) EmptySpec() bool {
	var e Envelope
	return (o.Ref.Kind == "AuthorizationPolicy" || o.Ref.Kind == "Telemetry") && o.Into(&e) && (len(e.Spec) == 0 || string(e.Spec) == "null")
}
