package status

import (
	"cmp"
	"fmt"
	"hash/fnv"
	"slices"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	mcsv1beta1 "sigs.k8s.io/mcs-api/pkg/apis/v1beta1"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// exportConditions are the conditions of one ServiceExport, without times. Generation 0 stands for the object's own. made
// is what came of the name; nil when nobody exports it.
func exportConditions(snap *mesh.Snapshot, x *mesh.Export, made *name) []metav1.Condition {
	name, namespace := x.Object.Name, x.Object.Namespace
	svc := snap.Service(mesh.LocalHost(name, namespace))
	switch {
	case svc == nil:
		return invalidExport(x.Generation, mcsv1beta1.ServiceExportReasonNoService, fmt.Sprintf("there is no Service %s/%s; create it, or remove the ServiceExport", namespace, name))
	case svc.External:
		return invalidExport(x.Generation, mcsv1beta1.ServiceExportReasonInvalidServiceType, fmt.Sprintf("Service %s/%s is an ExternalName; export a Service that has endpoints", namespace, name))
	}
	ready := condition(mcsv1beta1.ServiceExportConditionReady, true, string(mcsv1beta1.ServiceExportReasonExported), "told to every cluster of the mesh", x.Generation)
	if len(x.ExportTo) > 0 {
		var to []string
		for _, id := range svc.ExportTo {
			to = append(to, string(id))
		}
		ready.Message = "told to " + list(to)
	}
	if n, inMesh := backends(svc); n > 0 && inMesh == 0 {
		ready = condition(mcsv1beta1.ServiceExportConditionReady, false, string(mcsv1beta1.ServiceExportReasonPending),
			fmt.Sprintf("none of its %d endpoints has a proxy, so no other cluster can reach one; label the namespace istio-injection=enabled and restart its pods", n), x.Generation)
	}
	conflict, reason, message := false, string(mcsv1beta1.ServiceExportReasonNoConflicts), ""
	if made != nil {
		conflict, reason, message = made.merged.conflictCondition()
	}
	return []metav1.Condition{
		condition(mcsv1beta1.ServiceExportConditionConflict, conflict, reason, message, x.Generation),
		ready,
		condition(mcsv1beta1.ServiceExportConditionValid, true, string(mcsv1beta1.ServiceExportReasonValid), "", x.Generation),
	}
}

// backends counts the endpoints of a Service, and those that other clusters may be sent to.
func backends(svc *mesh.Service) (n, inMesh int) {
	for _, e := range svc.Endpoints {
		if n++; e.TLS {
			inMesh++
		}
	}
	return n, inMesh
}

func invalidExport(generation int64, reason mcsv1beta1.ServiceExportConditionReason, message string) []metav1.Condition {
	return []metav1.Condition{
		condition(mcsv1beta1.ServiceExportConditionConflict, false, string(mcsv1beta1.ServiceExportReasonNoConflicts), "", generation),
		condition(mcsv1beta1.ServiceExportConditionReady, false, string(mcsv1beta1.ServiceExportReasonFailed), "not exported: it is not valid", generation),
		condition(mcsv1beta1.ServiceExportConditionValid, false, string(reason), message, generation),
	}
}

func condition[T ~string](t T, status bool, reason, message string, generation int64) metav1.Condition {
	s := metav1.ConditionFalse
	if status {
		s = metav1.ConditionTrue
	}
	return metav1.Condition{Type: string(t), Status: s, Reason: reason, Message: message, ObservedGeneration: generation}
}

// importConditions are those of a ServiceImport.
func importConditions(kind mcsv1beta1.ServiceImportType, ips []string) []metav1.Condition {
	if kind == mcsv1beta1.ClusterSetIP && len(ips) == 0 {
		return []metav1.Condition{condition(mcsv1beta1.ServiceImportConditionReady, false, string(mcsv1beta1.ServiceImportReasonPending), "it has no address yet", 0)}
	}
	return []metav1.Condition{condition(mcsv1beta1.ServiceImportConditionReady, true, string(mcsv1beta1.ServiceImportReasonReady), "", 0)}
}

// settle returns have with the wanted conditions in it, and whether that is a change. A condition keeps its time
// while its status stays; conditions of types that are not wanted are somebody else's and stay. Generation 0 in want
// stands for generation.
func settle(have, want []metav1.Condition, generation int64, now metav1.Time) ([]metav1.Condition, bool) {
	out, changed := slices.Clone(have), false
	for _, w := range want {
		w.ObservedGeneration = cmp.Or(w.ObservedGeneration, generation)
		w.LastTransitionTime = now
		i := slices.IndexFunc(out, func(c metav1.Condition) bool { return c.Type == w.Type })
		if i < 0 {
			out, changed = append(out, w), true
			continue
		}
		h := out[i]
		if h.Status == w.Status && !h.LastTransitionTime.IsZero() {
			w.LastTransitionTime = h.LastTransitionTime
		}
		if h.Status != w.Status || h.Reason != w.Reason || h.Message != w.Message || h.ObservedGeneration != w.ObservedGeneration {
			out[i], changed = w, true
		}
	}
	return out, changed
}

// keyOf is the key of an object of the API.
func keyOf(o mesh.ObjectRef) types.NamespacedName {
	return types.NamespacedName{Namespace: o.Namespace, Name: o.Name}
}

// hash of the parts, the same in every process.
func hash(parts ...string) uint32 {
	h := fnv.New32a()
	for _, p := range parts {
		h.Write([]byte(p))
		h.Write([]byte{0})
	}
	return h.Sum32()
}
