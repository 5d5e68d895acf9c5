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
		out = append(out, choice{versions: versions, kind: kind{
			gvr: schema.GroupVersionResource{Group: r.group, Resource: r.resource},
			cut: onlyStatus,
			all: func(_ *server, d *desired) []types.NamespacedName {
				return slices.SortedFunc(maps.Keys(d.statuses[r]), compareKeys)
			},
			changed: func(old, now *desired) []types.NamespacedName { return differing(old.statuses[r], now.statuses[r]) },
			sync: func(ctx context.Context, k *keeper, key types.NamespacedName, have *unstructured.Unstructured) (bool, error) {
				return syncDerived(ctx, k, key, have, k.server.wanted.Load().statuses[r][key])
			},
		}})
	}
	return out
}

// statusesOf sorts the wanted statuses by resource.
func statusesOf(snap *mesh.Snapshot) map[resource]map[types.NamespacedName]*mesh.ObjectStatus {
	out := map[resource]map[types.NamespacedName]*mesh.ObjectStatus{}
	for _, s := range snap.Statuses {
		if s.Object.Source != "" && s.Object.Source != "cluster "+string(snap.Local.ID) {
			continue // of a file
		}
		r := resource{s.Group, s.Resource}
		if out[r] == nil {
			out[r] = map[types.NamespacedName]*mesh.ObjectStatus{}
		}
		out[r][keyOf(s.Object)] = s
	}
	return out
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
