package kube

import (
	"encoding/json"
	"fmt"
	"reflect"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/isthmus-mesh/isthmus/discovery/config"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// cut is an object reduced to what is kept of it.
type cut struct {
	key  string // NAMESPACE/NAME
	kept any    // what discovery/config decodes, or *config.Node, or *corev1.Secret
	node string // of a Pod
}

// equal reports whether two cuts of one object say the same.
func (c *cut) equal(d *cut) bool {
	return c.node == d.node && reflect.DeepEqual(c.kept, d.kept)
}

// cut reduces an object; one that is cut already is returned as it is.
func (c *cluster) cut(obj any) (*cut, error) {
	if done, ok := obj.(*cut); ok {
		return done, nil
	}
	o, ok := obj.(metav1.Object)
	if !ok {
		return nil, fmt.Errorf("a %T is not an API object", obj)
	}
	out := &cut{key: o.GetNamespace() + "/" + o.GetName()}
	switch x := obj.(type) {
	case *corev1.Pod:
		out.kept, out.node = c.placeless(cutPod(x)), x.Spec.NodeName
	case *corev1.Service:
		out.kept = cutService(x)
	case *corev1.Namespace:
		out.kept = &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: x.Name, Labels: x.Labels}}
	case *corev1.Node:
		out.kept = cutNode(x)
	case *corev1.Secret:
		if x.Labels[RemoteSecretLabel] != "true" {
			if s := config.CutSecret(x); s != nil {
				out.kept = &credential{s}
			}
			break
		}
		out.kept = &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: x.Name, Namespace: x.Namespace, CreationTimestamp: x.CreationTimestamp}, Data: x.Data}
	case *corev1.ConfigMap:
		cut := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: x.Name, Namespace: x.Namespace}, Data: x.Data}
		if x.Name != "istio" { // of others the authorities alone
			cut.Data = map[string]string{"ca.crt": x.Data["ca.crt"]}
		}
		out.kept = cut
	case *discoveryv1.EndpointSlice:
		out.kept = &discoveryv1.EndpointSlice{ObjectMeta: cutMeta(x.ObjectMeta), AddressType: x.AddressType, Endpoints: x.Endpoints, Ports: x.Ports}
	case *unstructured.Unstructured:
		raw, err := cutCustom(x)
		if err != nil {
			return nil, fmt.Errorf("%s %s: %w", x.GetKind(), out.key, err)
		}
		out.kept = raw
	default:
		return nil, fmt.Errorf("objects of type %T are not read", obj)
	}
	return out, nil
}

// credential is a Secret of a gateway, reduced to the certificate, the key and the authorities in it.
type credential struct{ *corev1.Secret }

// cutMeta keeps what the model or a Problem may need.
func cutMeta(m metav1.ObjectMeta) metav1.ObjectMeta {
	return metav1.ObjectMeta{Name: m.Name, Namespace: m.Namespace, Labels: m.Labels, Annotations: cutAnnotations(m.Annotations), CreationTimestamp: m.CreationTimestamp}
}

func cutAnnotations(in map[string]string) map[string]string {
	if _, ok := in[corev1.LastAppliedConfigAnnotation]; !ok {
		return in
	}
	delete(in, corev1.LastAppliedConfigAnnotation)
	return in
}

func cutService(s *corev1.Service) *corev1.Service {
	return &corev1.Service{ObjectMeta: cutMeta(s.ObjectMeta), Spec: s.Spec, Status: corev1.ServiceStatus{LoadBalancer: s.Status.LoadBalancer}}
}

// placeless is a Pod as a workload, without what its node and its cluster say of it. It has no workload when the Pod
// has ended or is wrong.
type placeless struct {
	workload *mesh.Workload
	problems []mesh.Problem
}

// cutPod keeps of a Pod what becomes part of a workload. Its containers are reduced to their ports.
func cutPod(p *corev1.Pod) *corev1.Pod {
	out := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: p.Name, Namespace: p.Namespace, Labels: p.Labels}}
	if p.DeletionTimestamp != nil {
		out.DeletionTimestamp = &metav1.Time{} // when does not matter, and would be a change
	}
	out.Spec = corev1.PodSpec{ServiceAccountName: p.Spec.ServiceAccountName, HostNetwork: p.Spec.HostNetwork, NodeName: p.Spec.NodeName}
	out.Spec.Containers = cutContainers(p.Spec.Containers)
	out.Spec.InitContainers = cutContainers(p.Spec.InitContainers)
	out.Status = corev1.PodStatus{Phase: p.Status.Phase, PodIP: p.Status.PodIP, PodIPs: p.Status.PodIPs}
	for _, c := range p.Status.Conditions {
		if c.Type == corev1.PodReady {
			out.Status.Conditions = []corev1.PodCondition{{Type: c.Type, Status: c.Status}}
		}
	}
	return out
}

// placeless decodes a Pod.
func (c *cluster) placeless(p *corev1.Pod) *placeless {
	in, problems := config.DecodeObject(c.said, p, config.Options{Local: c.id, Remote: c.remote, ByLabel: true})
	out := &placeless{problems: problems}
	if len(in.Workloads) == 1 {
		out.workload = in.Workloads[0]
	}
	return out
}

// cutContainers keeps the ports of containers that have some.
func cutContainers(in []corev1.Container) []corev1.Container {
	var out []corev1.Container
	for _, c := range in {
		if len(c.Ports) > 0 {
			out = append(out, corev1.Container{Name: c.Name, Ports: c.Ports, RestartPolicy: c.RestartPolicy})
		}
	}
	return out
}

func cutNode(n *corev1.Node) *config.Node {
	out := config.NodeOf(n)
	return &out
}

// cutCustom keeps the JSON of a custom resource without what changes by itself.
func cutCustom(u *unstructured.Unstructured) (json.RawMessage, error) {
	meta := map[string]any{"name": u.GetName(), "namespace": u.GetNamespace()}
	if l := u.GetLabels(); len(l) > 0 {
		meta["labels"] = l
	}
	if a := cutAnnotations(u.GetAnnotations()); len(a) > 0 {
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
	if status, ok := u.Object["status"]; ok && keepsStatus(u.GetKind()) {
		out["status"] = status
	}
	return json.Marshal(out)
}

// keepsStatus names the kinds whose status is input: health of machines, addresses of gateways.
func keepsStatus(kind string) bool { return kind == "WorkloadEntry" || kind == "Gateway" }
