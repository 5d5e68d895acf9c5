package config

import (
	"encoding/json"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/isthmus-mesh/isthmus/discovery/config/written"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// DecodeObject turns one object of an API server into what a source reports, by the same rules as Decode. source is the
// Source of ObjectRefs, for example "cluster amber". The object is a pointer to a Service, Pod, Namespace or ConfigMap
// of core/v1 or an EndpointSlice of discovery/v1, which is not written to but becomes part of the Input; or a
// json.RawMessage of any kind.
func DecodeObject(source string, v any, o Options) (mesh.Input, []mesh.Problem) {
	if o.Domain == "" {
		o.Domain = "cluster.local"
	}
	d := &decoder{source: source, opts: o, seen: map[string]string{}, exact: true}
	switch x := v.(type) {
	case json.RawMessage:
		d.add(&written.Document{Text: x}, x, "", "", 0)
	case *corev1.Service:
		d.addTyped("", "Service", x.ObjectMeta, x)
	case *corev1.Pod:
		d.addTyped("", "Pod", x.ObjectMeta, x)
	case *corev1.Namespace:
		d.addTyped("", "Namespace", x.ObjectMeta, x)
	case *corev1.ConfigMap:
		d.addTyped("", "ConfigMap", x.ObjectMeta, x)
	case *corev1.Secret:
		d.addTyped("", "Secret", x.ObjectMeta, x)
	case *discoveryv1.EndpointSlice:
		d.addTyped("discovery.k8s.io", "EndpointSlice", x.ObjectMeta, x)
	default:
		d.problems = append(d.problems, mesh.Problem{Object: d.document(0), Reason: written.ReasonUnknownKind, Message: fmt.Sprintf("values of type %T are not decoded", v)})
	}
	for _, obj := range d.objects {
		obj.Doc = nil // lines of an object that nobody wrote as text say nothing
		obj.decode()
	}
	return d.in, d.problems
}

// addTyped registers an object that is decoded already.
func (d *decoder) addTyped(group, kind string, meta metav1.ObjectMeta, v any) {
	ref := mesh.ObjectRef{Kind: kind, Namespace: meta.Namespace, Name: meta.Name, Source: d.source}
	d.objects = append(d.objects, d.object(written.Object{Typed: v, Group: group, Ref: ref, Labels: meta.Labels}))
}
