package status

import (
	"context"
	"encoding/json"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/status/reconcile"
)

// gatewayClassLabel is on what is made for Gateways.
const gatewayClassLabel = "gateway.networking.k8s.io/gateway-class-name"

// madeForGateways keeps the objects that run Gateways: of our class, by our hand. Those that are wanted no more go.
func madeForGateways() []choice {
	var out []choice
	for _, gvr := range []schema.GroupVersionResource{
		{Version: "v1", Resource: "serviceaccounts"}, {Group: "apps", Version: "v1", Resource: "deployments"}, {Version: "v1", Resource: "services"},
	} {
		r := resource{gvr.Group, gvr.Resource}
		narrow := func(o *metav1.ListOptions) {
			o.LabelSelector = labelManagedBy + "=" + managedBy + "," + gatewayClassLabel
		}
		objects := func(d *desired) map[types.NamespacedName]*mesh.WantedObject { return d.objects[r] }
		out = append(out, fixed(wantedOf(kind{gvr: gvr, narrow: narrow}, objects, syncMade)))
	}
	return out
}

// objectsOf sorts the wanted objects by resource.
func objectsOf(snap *mesh.Snapshot) map[resource]map[types.NamespacedName]*mesh.WantedObject {
	return byResource(snap, snap.Objects, func(o *mesh.WantedObject) (mesh.ObjectRef, resource, types.NamespacedName) {
		return o.For, resource{o.Group, o.Resource}, types.NamespacedName{Namespace: o.Namespace, Name: o.Name}
	})
}

func syncMade(ctx context.Context, k *keeper, key types.NamespacedName, have *unstructured.Unstructured, want *mesh.WantedObject) (bool, error) {
	if want == nil || !k.server.active(key.Namespace) {
		if have == nil || want != nil {
			return false, nil
		}
		return k.remove(ctx, key, have)
	}
	obj := &unstructured.Unstructured{}
	if err := json.Unmarshal(want.JSON, &obj.Object); err != nil {
		return false, err
	}
	if have != nil && reconcile.Has(have.Object, obj.Object) {
		return false, nil
	}
	if have == nil { // one without our label is not watched: it is somebody else's
		if old, err := k.namespaced(key).Get(ctx, key.Name, metav1.GetOptions{}); err == nil && old.GetLabels()[labelManagedBy] != managedBy {
			k.server.program.report(k.where()+"/"+key.String(), problem("Gateway", want.For.Name, "NotOurs",
				k.gvr.Resource+" "+key.String()+" was made by another hand; it is left as it is, and the Gateway is not run", "delete it, or name its Service in spec.addresses of the Gateway"))
			return false, nil
		}
	}
	k.server.program.forget(k.where() + "/" + key.String())
	_, err := k.namespaced(key).Apply(ctx, key.Name, obj, metav1.ApplyOptions{FieldManager: fieldManager, Force: true})
	return err == nil, err
}
