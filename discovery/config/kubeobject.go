package config

import (
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// groupIngress is the API group of Ingress.
const groupIngress = "networking.k8s.io"

// kubeKinds are the kinds whose objects are carried as they are; what they mean is for package gatewayapi.
var kubeKinds = map[string]map[string]func() metav1.Object{
	groupGatewayAPI: {
		"Gateway":          func() metav1.Object { return &gatewayv1.Gateway{} },
		"GatewayClass":     func() metav1.Object { return &gatewayv1.GatewayClass{} },
		"HTTPRoute":        func() metav1.Object { return &gatewayv1.HTTPRoute{} },
		"GRPCRoute":        func() metav1.Object { return &gatewayv1.GRPCRoute{} },
		"TLSRoute":         func() metav1.Object { return &gatewayv1.TLSRoute{} },
		"TCPRoute":         func() metav1.Object { return &gatewayv1.TCPRoute{} },
		"ReferenceGrant":   func() metav1.Object { return &gatewayv1.ReferenceGrant{} },
		"BackendTLSPolicy": func() metav1.Object { return &gatewayv1.BackendTLSPolicy{} },
	},
	groupIngress: {
		"Ingress":      func() metav1.Object { return &networkingv1.Ingress{} },
		"IngressClass": func() metav1.Object { return &networkingv1.IngressClass{} },
	},
}

// clusterScoped kinds have no namespace.
var clusterScoped = []string{"Namespace", "GatewayClass", "IngressClass"}

// kubeObject carries an object of one of kubeKinds. An unknown field of an object that an API server has taken is one
// of a newer version: it is told, and the rest is used.
func (o *object) kubeObject() {
	v := kubeKinds[o.Group][o.Ref.Kind]()
	o.Lenient = o.d.exact
	if !o.Into(v) {
		return
	}
	v.SetNamespace(o.Ref.Namespace)
	ref := o.Ref
	if ref.Kind == "Gateway" {
		ref.Kind += "." + groupGatewayAPI
	}
	o.d.in.KubeObjects = append(o.d.in.KubeObjects, &mesh.KubeObject{Object: ref, Value: v})
}

// namespace carries the labels, by which routes are let in. A namespace may be declared in several files.
func (o *object) namespace() {
	var n corev1.Namespace
	if o.Into(&n) && !o.d.opts.Remote {
		o.d.in.KubeObjects = append(o.d.in.KubeObjects, &mesh.KubeObject{
			Object: mesh.ObjectRef{Kind: "Namespace", Name: o.Ref.Name},
			Value:  &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: o.Ref.Name, Labels: n.Labels}},
		})
	}
}

// keyRoots is where a ConfigMap has certificate authorities for BackendTLSPolicies.
const keyRoots = "ca.crt"

// authorities carries a ConfigMap that has some.
func (o *object) authorities() {
	var c corev1.ConfigMap
	if o.d.opts.Remote || !o.Into(&c) || c.Data[keyRoots] == "" || len(c.Data[keyRoots]) > maxCredential {
		return
	}
	o.d.in.KubeObjects = append(o.d.in.KubeObjects, &mesh.KubeObject{Object: o.Ref, Value: &corev1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{Name: o.Ref.Name, Namespace: o.Ref.Namespace}, Data: map[string]string{keyRoots: c.Data[keyRoots]},
	}})
}
