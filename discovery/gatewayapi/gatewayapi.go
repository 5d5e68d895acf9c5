// Package gatewayapi says what objects of the Kubernetes Gateway API, and Ingresses, come to in terms of Istio's Gateways
// and VirtualServices, and what their status should say. It is pure: it reads no cluster and no clock. How objects are
// read and how status is written is known elsewhere.
package gatewayapi

import (
	"cmp"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"
	corev1 "k8s.io/api/core/v1"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

const (
	// ControllerName is that of the GatewayClasses which are ours.
	ControllerName = "isthmus.io/gateway-controller"
	// ClassName is the GatewayClass that is ours even where no object declares it.
	ClassName = "isthmus"
	// GatewayNameLabel is on the pods of a Gateway (GEP-1762).
	GatewayNameLabel = "gateway.networking.k8s.io/gateway-name"

	group       = gatewayv1.GroupName
	kindGateway = "Gateway." + group
)

// Derive converts the KubeObjects of a Snapshot whose Services are complete. declared finds how a Service was declared by
// its host; nil when it was not. Values that equal those of before, which may be nil, are those.
func Derive(snap *mesh.Snapshot, declared func(host string) *mesh.ServiceDecl, before *mesh.Derived) *mesh.Derived {
	return Config{}.Derive(snap, declared, before)
}

// Config says what else follows from Gateways.
type Config struct {
	// Deploy wants pods for Gateways that name no Service.
	Deploy bool
}

// Derive is the function Derive under a Config.
func (cfg Config) Derive(snap *mesh.Snapshot, declared func(host string) *mesh.ServiceDecl, before *mesh.Derived) *mesh.Derived {
	c := &converter{
		cfg: cfg, snap: snap, declared: declared, out: &mesh.Derived{}, namespaces: map[string]map[string]string{}, classes: map[string]bool{ClassName: true}, others: map[string]bool{}, gateways: map[key]*gateway{}, users: map[string]map[*gateway]bool{},
	}
	if len(snap.KubeObjects) == 0 {
		return c.out
	}
	c.collect()
	for _, g := range c.ordered {
		c.resolveGateway(g)
	}
	for _, r := range c.routes {
		c.attach(r)
	}
	for _, g := range c.ordered {
		c.emit(g)
		c.gatewayStatus(g)
		c.deploy(g)
	}
	c.ingress()
	c.policies()
	c.share(before)
	return c.out
}

// key names an object in its kind.
type key struct{ namespace, name string }

// converter is one run of Derive.
type converter struct {
	cfg        Config
	snap       *mesh.Snapshot
	declared   func(host string) *mesh.ServiceDecl
	out        *mesh.Derived
	namespaces map[string]map[string]string // labels by name
	classes    map[string]bool              // ours
	others     map[string]bool              // classes of other controllers
	grants     []*gatewayv1.ReferenceGrant
	gateways   map[key]*gateway
	ordered    []*gateway // by namespace and name
	routes     []*route
	users      map[string]map[*gateway]bool // who leads to a host
}

// collect sorts the objects by what they are.
func (c *converter) collect() {
	for _, x := range c.snap.KubeObjects {
		switch v := x.Value.(type) {
		case *corev1.Namespace:
			c.namespaces[v.Name] = v.Labels
		case *gatewayv1.GatewayClass:
			c.class(x.Object, v)
		case *gatewayv1.ReferenceGrant:
			c.grants = append(c.grants, v)
		}
	}
	for _, x := range c.snap.KubeObjects {
		switch v := x.Value.(type) {
		case *gatewayv1.Gateway:
			switch name := string(v.Spec.GatewayClassName); {
			case !c.classes[name] && !c.others[name]:
				c.problem(x.Object, "spec.gatewayClassName", "UnknownClass", "there is no GatewayClass "+name+": nobody serves the Gateway", "write "+ClassName+", or make a GatewayClass with controllerName "+ControllerName)
			case c.classes[name]:
				g := &gateway{ref: x.Object, obj: v}
				c.gateways[key{x.Object.Namespace, x.Object.Name}] = g
				c.ordered = append(c.ordered, g)
			}
		case *gatewayv1.HTTPRoute:
			c.addRoute(x.Object, &v.ObjectMeta, "httproutes", v.Spec.CommonRouteSpec, v.Spec.Hostnames, func(r *route) { c.httpRules(r, v.Spec.Rules) })
		case *gatewayv1.GRPCRoute:
			c.addRoute(x.Object, &v.ObjectMeta, "grpcroutes", v.Spec.CommonRouteSpec, v.Spec.Hostnames, func(r *route) { c.httpRules(r, overHTTP(v.Spec.Rules)) })
		case *gatewayv1.TLSRoute:
			c.addRoute(x.Object, &v.ObjectMeta, "tlsroutes", v.Spec.CommonRouteSpec, v.Spec.Hostnames, func(r *route) {
				c.connections(r, len(v.Spec.Rules), func(i int) []gatewayv1.BackendRef { return v.Spec.Rules[i].BackendRefs })
			})
		case *gatewayv1.TCPRoute:
			c.addRoute(x.Object, &v.ObjectMeta, "tcproutes", v.Spec.CommonRouteSpec, nil, func(r *route) {
				c.connections(r, len(v.Spec.Rules), func(i int) []gatewayv1.BackendRef { return v.Spec.Rules[i].BackendRefs })
			})
		}
	}
}

// class takes note of a GatewayClass. One that is named as ours and belongs to somebody else is not ours.
func (c *converter) class(ref mesh.ObjectRef, v *gatewayv1.GatewayClass) {
	if v.Spec.ControllerName != ControllerName {
		delete(c.classes, ref.Name)
		c.others[ref.Name] = true
		return
	}
	c.classes[ref.Name] = true
	accepted := is("Accepted", true, "Accepted", "")
	if v.Spec.ParametersRef != nil {
		accepted = is("Accepted", false, "InvalidParameters", "parametersRef is not supported: the class has no parameters")
	}
	c.status(ref, "gatewayclasses", v.Generation, gatewayv1.GatewayClassStatus{Conditions: conditions(v.Generation, accepted), SupportedFeatures: supportedFeatures()})
}

// share keeps values that are the same as before, so that nobody takes them for changed.
func (c *converter) share(before *mesh.Derived) {
	byObject := func(a, b mesh.ObjectRef) int {
		return cmp.Or(strings.Compare(a.Namespace, b.Namespace), strings.Compare(a.Name, b.Name), strings.Compare(a.Kind, b.Kind))
	}
	out := c.out
	slices.SortFunc(out.Input.Gateways, func(a, b *mesh.Gateway) int { return byObject(a.Object, b.Object) })
	slices.SortFunc(out.Input.VirtualServices, func(a, b *mesh.VirtualService) int { return byObject(a.Object, b.Object) })
	slices.SortFunc(out.Statuses, func(a, b *mesh.ObjectStatus) int {
		return cmp.Or(strings.Compare(a.Resource, b.Resource), byObject(a.Object, b.Object))
	})
	if before == nil {
		return
	}
	reuse(out.Input.Gateways, before.Input.Gateways, func(x *mesh.Gateway) mesh.ObjectRef { return x.Object }, func(a, b *mesh.Gateway) bool {
		return a.Object == b.Object && a.Routers == b.Routers && slices.Equal(a.Secrets, b.Secrets) && proto.Equal(a.Spec, b.Spec)
	})
	reuse(out.Input.VirtualServices, before.Input.VirtualServices, func(x *mesh.VirtualService) mesh.ObjectRef { return x.Object }, func(a, b *mesh.VirtualService) bool {
		return a.Object == b.Object && a.GatewayAPI == b.GatewayAPI && slices.Equal(a.Origins, b.Origins) && proto.Equal(a.Spec, b.Spec)
	})
	for i, x := range out.Backends {
		if i < len(before.Backends) && sameBackend(x, before.Backends[i]) {
			out.Backends[i] = before.Backends[i]
		}
	}
}

// reuse puts equal values of old in the place of those in list.
func reuse[T any](list, old []*T, ref func(*T) mesh.ObjectRef, equal func(a, b *T) bool) {
	had := make(map[mesh.ObjectRef]*T, len(old))
	for _, x := range old {
		had[ref(x)] = x
	}
	for i, x := range list {
		if o := had[ref(x)]; o != nil && equal(o, x) {
			list[i] = o
		}
	}
}

// problem reports what is left out, for those who do not look at conditions.
func (c *converter) problem(o mesh.ObjectRef, field, reason, message, remedy string) {
	c.out.Input.Problems = append(c.out.Input.Problems, mesh.Problem{Object: o, Field: field, Reason: reason, Message: message, Remedy: remedy})
}

// granted reports whether an object of one namespace may refer to one of another: a ReferenceGrant there says so.
func (c *converter) granted(fromGroup, fromKind, fromNamespace, toGroup, toKind, toNamespace, toName string) bool {
	if fromNamespace == toNamespace {
		return true
	}
	for _, g := range c.grants {
		if g.Namespace != toNamespace {
			continue
		}
		from := slices.ContainsFunc(g.Spec.From, func(f gatewayv1.ReferenceGrantFrom) bool {
			return string(f.Group) == fromGroup && string(f.Kind) == fromKind && string(f.Namespace) == fromNamespace
		})
		if from && slices.ContainsFunc(g.Spec.To, func(t gatewayv1.ReferenceGrantTo) bool {
			return string(t.Group) == toGroup && string(t.Kind) == toKind && (t.Name == nil || *t.Name == "" || string(*t.Name) == toName)
		}) {
			return true
		}
	}
	return false
}

// or is what a pointer points to, or the default.
func or[T, D ~string](p *T, otherwise D) string {
	if p == nil || *p == "" {
		return string(otherwise)
	}
	return string(*p)
}
