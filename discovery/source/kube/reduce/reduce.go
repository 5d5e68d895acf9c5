// Package reduce takes from objects of the Kubernetes API what the mesh does not look at: most of what changes by itself,
// and most of their size. It is pure.
package reduce

import (
	"encoding/json"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

const (
	groupGatewayAPI = "gateway.networking.k8s.io"
	groupIngress    = "networking.k8s.io"
)

// Meta keeps what the model or a Problem may need.
func Meta(m metav1.ObjectMeta) metav1.ObjectMeta {
	return metav1.ObjectMeta{Name: m.Name, Namespace: m.Namespace, Labels: m.Labels, Annotations: annotations(m.Annotations), CreationTimestamp: m.CreationTimestamp}
}

func annotations(in map[string]string) map[string]string {
	if _, ok := in[corev1.LastAppliedConfigAnnotation]; !ok {
		return in
	}
	delete(in, corev1.LastAppliedConfigAnnotation)
	return in
}

// Service keeps of a Service what is declared, and its addresses outside.
func Service(s *corev1.Service) *corev1.Service {
	return &corev1.Service{ObjectMeta: Meta(s.ObjectMeta), Spec: s.Spec, Status: corev1.ServiceStatus{LoadBalancer: s.Status.LoadBalancer}}
}

// Pod keeps of a Pod what becomes part of a workload. Its containers are reduced to their ports.
func Pod(p *corev1.Pod) *corev1.Pod {
	out := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: p.Name, Namespace: p.Namespace, Labels: p.Labels}}
	if p.DeletionTimestamp != nil {
		out.DeletionTimestamp = &metav1.Time{} // when does not matter, and would be a change
	}
	out.Spec = corev1.PodSpec{ServiceAccountName: p.Spec.ServiceAccountName, HostNetwork: p.Spec.HostNetwork, NodeName: p.Spec.NodeName}
	out.Spec.Containers = containers(p.Spec.Containers)
	out.Spec.InitContainers = containers(p.Spec.InitContainers)
	out.Status = corev1.PodStatus{Phase: p.Status.Phase, PodIP: p.Status.PodIP, PodIPs: p.Status.PodIPs}
	for _, c := range p.Status.Conditions {
		if c.Type == corev1.PodReady {
			out.Status.Conditions = []corev1.PodCondition{{Type: c.Type, Status: c.Status}}
		}
	}
	return out
}

// containers keeps the ports of containers that have some.
func containers(in []corev1.Container) []corev1.Container {
	var out []corev1.Container
	for _, c := range in {
		if len(c.Ports) > 0 {
			out = append(out, corev1.Container{Name: c.Name, Ports: c.Ports, RestartPolicy: c.RestartPolicy})
		}
	}
	return out
}

// Custom keeps the JSON of a custom resource without what changes by itself.
func Custom(u *unstructured.Unstructured) (json.RawMessage, error) {
	meta := map[string]any{"name": u.GetName(), "namespace": u.GetNamespace()}
	if l := u.GetLabels(); len(l) > 0 {
		meta["labels"] = l
	}
	if a := annotations(u.GetAnnotations()); len(a) > 0 {
		meta["annotations"] = a
	}
	if t := u.GetCreationTimestamp(); !t.IsZero() {
		meta["creationTimestamp"] = t
	}
	if u.GetKind() == "Gateway" && u.GroupVersionKind().Group == groupGatewayAPI {
		meta["uid"] = u.GetUID() // what is made for it belongs to it
	}
	if group := u.GroupVersionKind().Group; u.GetKind() == "ServiceExport" || group == groupGatewayAPI || group == groupIngress {
		meta["generation"] = u.GetGeneration() // conditions say which one they are about
	}
	out := map[string]any{"apiVersion": u.GetAPIVersion(), "kind": u.GetKind(), "metadata": meta}
	if spec, ok := u.Object["spec"]; ok {
		out["spec"] = spec
	}
	if status, ok := u.Object["status"]; ok && keepsStatus(u) {
		out["status"] = status
	}
	return json.Marshal(out)
}

// keepsStatus reports whether the status is input: health of machines, addresses of gateways between networks.
func keepsStatus(u *unstructured.Unstructured) bool {
	class, _, _ := unstructured.NestedString(u.Object, "spec", "gatewayClassName")
	return u.GetKind() == "WorkloadEntry" || u.GetKind() == "Gateway" && (class == "istio-east-west" || class == "istio-remote")
}
