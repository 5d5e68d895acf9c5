package status

import (
	"context"
	"encoding/json"
	"maps"
	"reflect"
	"slices"
	"time"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
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
	next := mergeStatus(had, wanted, time.Now().UTC().Truncate(time.Second).Format(time.RFC3339))
	if equalJSON(had, next) {
		return false, nil
	}
	patch := map[string]any{"metadata": map[string]any{"resourceVersion": have.GetResourceVersion()}, "status": withNulls(had, next)}
	got, err := k.patchStatus(ctx, key, patch)
	if err == nil {
		k.settle(key, got, sum)
	}
	return err == nil, err
}

// owners are lists with an entry for each controller: those of others stay as they are.
var owners = map[string]string{"parents": "parentRef", "ancestors": "ancestorRef"}

// mergeStatus returns want with the times of conditions that have the same status in had, and with what other controllers
// say there. now is the time of others.
func mergeStatus(had, want map[string]any, now string) map[string]any {
	out := maps.Clone(want)
	for field, v := range want {
		list, isList := v.([]any)
		before, _ := had[field].([]any)
		ref, shared := owners[field]
		switch {
		case field == "conditions" && isList:
			out[field] = mergeConditions(before, list, now)
		case shared:
			out[field] = mergeOwned(before, list, ref, now)
		case field == "listeners" && isList:
			out[field] = mergeEach(before, list, "name", now)
		}
	}
	return out
}

// mergeOwned keeps the entries of other controllers, in their places, before ours.
func mergeOwned(had, want []any, ref, now string) []any {
	const controller = "controllerName"
	var others, ours []any
	for _, x := range had {
		if entry, _ := x.(map[string]any); entry[controller] == gatewayController {
			ours = append(ours, x)
		} else {
			others = append(others, x)
		}
	}
	out := append([]any{}, others...)
	return append(out, mergeEach(ours, want, ref, now)...)
}

// gatewayController is the controllerName of our entries.
const gatewayController = "isthmus.io/gateway-controller"

// mergeEach merges each wanted entry with the one that has the same value in the field.
func mergeEach(had, want []any, field, now string) []any {
	out := make([]any, 0, len(want))
	for _, x := range want {
		entry, _ := x.(map[string]any)
		var before map[string]any
		for _, y := range had {
			if old, _ := y.(map[string]any); equalJSON(old[field], entry[field]) {
				before = old
				break
			}
		}
		out = append(out, mergeStatus(before, entry, now))
	}
	return out
}

func mergeConditions(had, want []any, now string) []any {
	out := make([]any, 0, len(want))
	for _, x := range want {
		c := maps.Clone(x.(map[string]any))
		c["lastTransitionTime"] = now
		for _, y := range had {
			if old, _ := y.(map[string]any); old["type"] == c["type"] && old["status"] == c["status"] && old["lastTransitionTime"] != nil && old["lastTransitionTime"] != "1970-01-01T00:00:00Z" {
				c["lastTransitionTime"] = old["lastTransitionTime"]
			}
		}
		out = append(out, c)
	}
	return out
}

// withNulls adds a null for each field of had that is not in next: a merge patch removes it.
func withNulls(had, next map[string]any) map[string]any {
	out := maps.Clone(next)
	for k := range had {
		if _, stays := out[k]; !stays {
			out[k] = nil
		}
	}
	return out
}

// equalJSON compares values that are decoded from JSON by different decoders, whose numbers differ in type.
func equalJSON(a, b any) bool {
	plain := func(v any) (out any) {
		raw, err := json.Marshal(v)
		if err == nil {
			err = json.Unmarshal(raw, &out)
		}
		if m, ok := out.(map[string]any); ok && err == nil { // nothing said, or an empty list
			for k, x := range m {
				if list, ok := x.([]any); ok && len(list) == 0 {
					delete(m, k)
				}
			}
			if len(m) == 0 {
				return nil
			}
		}
		return out
	}
	return reflect.DeepEqual(plain(a), plain(b))
}
