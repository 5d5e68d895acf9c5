package status

import (
	"context"
	"encoding/json"
	"maps"
	"slices"
	"time"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/status/reconcile"
)

const groupGatewayAPI = "gateway.networking.k8s.io"

// derivedKinds are those whose whole status follows from a Snapshot, as Problems name them.
var derivedKinds = map[string]resource{
	"Gateway." + groupGatewayAPI: {groupGatewayAPI, "gateways"},
	"GatewayClass":               {groupGatewayAPI, "gatewayclasses"},
	"HTTPRoute":                  {groupGatewayAPI, "httproutes"},
	"GRPCRoute":                  {groupGatewayAPI, "grpcroutes"},
	"TLSRoute":                   {groupGatewayAPI, "tlsroutes"},
	"TCPRoute":                   {groupGatewayAPI, "tcproutes"},
	"BackendTLSPolicy":           {groupGatewayAPI, "backendtlspolicies"},
	"Ingress":                    {"networking.k8s.io", "ingresses"},
}

// derivedStatuses keep the status of objects of the Gateway API, and of Ingresses.
func derivedStatuses() []choice {
	var out []choice
	for _, name := range slices.Sorted(maps.Keys(derivedKinds)) {
		r := derivedKinds[name]
		versions := []string{"v1", "v1beta1", "v1alpha3", "v1alpha2"}
		if r.group != groupGatewayAPI {
			versions = versions[:1]
		}
		gvr := schema.GroupVersionResource{Group: r.group, Resource: r.resource}
		statuses := func(d *desired) map[types.NamespacedName]*mesh.ObjectStatus { return d.statuses[r] }
		out = append(out, choice{versions: versions, kind: wantedOf(kind{gvr: gvr, cut: onlyStatus}, statuses, syncDerived)})
	}
	return out
}

// wantedOf completes a kind of which all that is wanted follows from the Snapshot.
func wantedOf[T any](k kind, of func(*desired) map[types.NamespacedName]*T,
	sync func(ctx context.Context, k *keeper, key types.NamespacedName, have *unstructured.Unstructured, want *T) (bool, error)) kind {
	k.all = func(_ *server, d *desired) []types.NamespacedName {
		return slices.SortedFunc(maps.Keys(of(d)), compareKeys)
	}
	k.changed = func(old, now *desired) []types.NamespacedName { return differing(of(old), of(now)) }
	k.sync = func(ctx context.Context, k *keeper, key types.NamespacedName, have *unstructured.Unstructured) (bool, error) {
		return sync(ctx, k, key, have, of(k.server.wanted.Load())[key])
	}
	return k
}

// byResource sorts what is wanted by resource, but for what files ask for. of says who asks for it, and where it belongs.
func byResource[T any](snap *mesh.Snapshot, wanted []*T, of func(*T) (mesh.ObjectRef, resource, types.NamespacedName)) map[resource]map[types.NamespacedName]*T {
	out := map[resource]map[types.NamespacedName]*T{}
	for _, w := range wanted {
		ref, r, key := of(w)
		if ref.Source != "" && ref.Source != "cluster "+string(snap.Local.ID) {
			continue
		}
		if out[r] == nil {
			out[r] = map[types.NamespacedName]*T{}
		}
		out[r][key] = w
	}
	return out
}

// statusesOf sorts the wanted statuses by resource.
func statusesOf(snap *mesh.Snapshot) map[resource]map[types.NamespacedName]*mesh.ObjectStatus {
	return byResource(snap, snap.Statuses, func(s *mesh.ObjectStatus) (mesh.ObjectRef, resource, types.NamespacedName) {
		return s.Object, resource{s.Group, s.Resource}, keyOf(s.Object)
	})
}

func syncDerived(ctx context.Context, k *keeper, key types.NamespacedName, have *unstructured.Unstructured, want *mesh.ObjectStatus) (bool, error) {
	if have == nil || want == nil || have.GetDeletionTimestamp() != nil || want.Generation != 0 && want.Generation != have.GetGeneration() {
		return false, nil // of another generation: the Snapshot that has this one comes
	}
	sum := digest(want)
	if k.done(key, have, sum) {
		return false, nil
	}
	var wanted map[string]any
	if err := json.Unmarshal(want.JSON, &wanted); err != nil {
		return false, err
	}
	had, _, _ := unstructured.NestedMap(have.Object, "status")
	next := reconcile.Status(had, wanted, time.Now().UTC().Truncate(time.Second).Format(time.RFC3339))
	if reconcile.Equal(had, next) {
		return false, nil
	}
	patch := map[string]any{"metadata": map[string]any{"resourceVersion": have.GetResourceVersion()}, "status": reconcile.WithNulls(had, next)}
	got, err := k.patchStatus(ctx, key, patch)
	if err == nil {
		k.settle(key, got, sum)
	}
	return err == nil, err
}
