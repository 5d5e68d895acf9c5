package store

import (
	"fmt"
	"reflect"
	"slices"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"pgregory.net/rapid"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/isthmus-mesh/isthmus/discovery/gatewayapi"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// gatewayObject draws a Gateway or an HTTPRoute that leads to one of few services.
func gatewayObject(t *rapid.T, from int) *mesh.KubeObject {
	name := rapid.SampledFrom([]string{"a", "b"}).Draw(t, "object") + fmt.Sprint(from)
	meta := metav1.ObjectMeta{Name: name, Namespace: "shop", Generation: rapid.Int64Range(1, 2).Draw(t, "generation")}
	if rapid.Bool().Draw(t, "gateway") {
		g := &gatewayv1.Gateway{ObjectMeta: meta, Spec: gatewayv1.GatewaySpec{GatewayClassName: "isthmus"}}
		for _, l := range []gatewayv1.SectionName{"x", "y"}[:rapid.IntRange(0, 2).Draw(t, "listeners")] {
			g.Spec.Listeners = append(g.Spec.Listeners, gatewayv1.Listener{Name: l, Port: 80 + int32(len(l)), Protocol: gatewayv1.HTTPProtocolType})
		}
		return &mesh.KubeObject{Object: mesh.ObjectRef{Kind: "Gateway.gateway.networking.k8s.io", Namespace: "shop", Name: name}, Value: g}
	}
	port := gatewayv1.PortNumber(80)
	r := &gatewayv1.HTTPRoute{ObjectMeta: meta}
	r.CreationTimestamp = metav1.NewTime(time.Unix(rapid.Int64Range(1, 3).Draw(t, "created"), 0))
	r.Spec.ParentRefs = []gatewayv1.ParentReference{{Name: gatewayv1.ObjectName(rapid.SampledFrom([]string{"a0", "b0", "a1", "b2"}).Draw(t, "parent"))}}
	r.Spec.Rules = []gatewayv1.HTTPRouteRule{{BackendRefs: []gatewayv1.HTTPBackendRef{{BackendRef: gatewayv1.BackendRef{BackendObjectReference: gatewayv1.BackendObjectReference{
		Name: gatewayv1.ObjectName(rapid.SampledFrom([]string{"a", "b", "c"}).Draw(t, "service")), Port: &port,
	}}}}}}
	return &mesh.KubeObject{Object: mesh.ObjectRef{Kind: "HTTPRoute", Namespace: "shop", Name: name}, Value: r}
}

// TestDerivedShortPath: what is derived is the same on the short path of a change as in a build from nothing.
func TestDerivedShortPath(t *testing.T) {
	short := 0
	rapid.Check(t, func(t *rapid.T) {
		cfg := DefaultConfig(local())
		cfg.Derive = gatewayapi.Derive
		b := newBuilder(cfg)
		inputs := make([]mesh.Input, 3)
		for i, n := range []string{"a", "b"} {
			inputs[i].Services = []*mesh.ServiceDecl{service(n, mesh.Port{Name: "http", Number: 80, Protocol: mesh.HTTP})}
		}
		b.build(inputs, nil)
		for range rapid.IntRange(1, 6).Draw(t, "steps") {
			i := rapid.IntRange(0, 2).Draw(t, "which")
			old := inputs[i]
			now := old
			if len(now.KubeObjects) > 0 && rapid.Bool().Draw(t, "gone") {
				now.KubeObjects = slices.Clone(now.KubeObjects[1:])
			} else {
				x := gatewayObject(t, i)
				now.KubeObjects = append(slices.DeleteFunc(slices.Clone(now.KubeObjects), func(y *mesh.KubeObject) bool { return y.Object == x.Object }), x)
			}
			inputs[i] = now
			got := b.next([]change{{old, now}}, func() []mesh.Input { return inputs }, nil)
			want := newBuilder(cfg).build(inputs, nil)
			for what, pair := range map[string][2]any{
				"gateways": {got.Gateways, want.Gateways}, "routes": {got.VirtualServices, want.VirtualServices}, "statuses": {got.Statuses, want.Statuses}, "problems": {got.Problems, want.Problems},
			} {
				if g, w := fmt.Sprintf("%+v", deref(pair[0])), fmt.Sprintf("%+v", deref(pair[1])); g != w {
					t.Fatalf("%s differ:\n%s\n%s", what, g, w)
				}
			}
		}
		short += b.short
	})
	if short == 0 {
		t.Error("no change took the short path")
	}
}

// deref lists what a list of pointers points to.
func deref(list any) (out []any) {
	v := reflect.ValueOf(list)
	for i := range v.Len() {
		x := v.Index(i)
		if x.Kind() == reflect.Pointer {
			x = x.Elem()
		}
		if f := x.FieldByName("Spec"); f.IsValid() {
			out = append(out, fmt.Sprint(x.FieldByName("Object").Interface(), f.Interface()))
			continue
		}
		out = append(out, x.Interface())
	}
	return out
}
