package kube

import (
	"fmt"
	"reflect"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/isthmus-mesh/isthmus/discovery/config"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/source/kube/reduce"
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
		out.kept, out.node = c.placeless(reduce.Pod(x)), x.Spec.NodeName
	case *corev1.Service:
		out.kept = reduce.Service(x)
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
		out.kept = &discoveryv1.EndpointSlice{ObjectMeta: reduce.Meta(x.ObjectMeta), AddressType: x.AddressType, Endpoints: x.Endpoints, Ports: x.Ports}
	case *unstructured.Unstructured:
		raw, err := reduce.Custom(x)
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

// placeless is a Pod as a workload, without what its node and its cluster say of it. It has no workload when the Pod
// has ended or is wrong.
type placeless struct {
	workload *mesh.Workload
	problems []mesh.Problem
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

func cutNode(n *corev1.Node) *config.Node {
	out := config.NodeOf(n)
	return &out
}
