package status

import (
	"context"
	"maps"
	"slices"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// conditionAccepted is False on an Istio object that is left out or used in part, and True once what was wrong is
// corrected. An object that never had a Problem has no such condition.
const conditionAccepted = "isthmus.io/Accepted"

type resource struct{ group, resource string }

// istioKinds are Istio's kinds whose status has conditions.
var istioKinds = map[string]resource{
	"AuthorizationPolicy":   {"security.istio.io", "authorizationpolicies"},
	"DestinationRule":       {"networking.istio.io", "destinationrules"},
	"Gateway":               {"networking.istio.io", "gateways"},
	"PeerAuthentication":    {"security.istio.io", "peerauthentications"},
	"RequestAuthentication": {"security.istio.io", "requestauthentications"},
	"ServiceEntry":          {"networking.istio.io", "serviceentries"},
	"Sidecar":               {"networking.istio.io", "sidecars"},
	"VirtualService":        {"networking.istio.io", "virtualservices"},
	"WorkloadEntry":         {"networking.istio.io", "workloadentries"},
}

func istioConditions() []choice {
	var out []choice
	for _, name := range slices.Sorted(maps.Keys(istioKinds)) {
		r := istioKinds[name]
		out = append(out, choice{versions: []string{"v1", "v1beta1", "v1alpha3"}, kind: kind{
			gvr: schema.GroupVersionResource{Group: r.group, Resource: r.resource},
			cut: onlyStatus,
			all: func(_ *server, d *desired) []types.NamespacedName {
				return slices.SortedFunc(maps.Keys(d.problems[name]), compareKeys)
			},
			changed: func(old, now *desired) []types.NamespacedName {
				return differing(old.problems[name], now.problems[name])
			},
			sync: func(ctx context.Context, k *keeper, key types.NamespacedName, have *unstructured.Unstructured) (bool, error) {
				return syncAccepted(ctx, k, key, have, k.server.wanted.Load().problems[name][key])
			},
		}})
	}
	return out
}

// onlyStatus cuts away what conditions do not need.
func onlyStatus(obj any) (any, error) {
	if u, ok := obj.(*unstructured.Unstructured); ok {
		u.SetManagedFields(nil)
		u.SetAnnotations(nil)
		delete(u.Object, "spec")
	}
	return obj, nil
}

// accepted is the condition that Problems come to; nil for none.
func accepted(problems []mesh.Problem) *metav1.Condition {
	if len(problems) == 0 {
		return nil
	}
	const most = 5
	var lines []string
	for i, p := range problems {
		if i == most {
			lines = append(lines, "and more")
			break
		}
		lines = append(lines, p.Reason+": "+text(p))
	}
	c := condition(conditionAccepted, false, problems[0].Reason, strings.Join(lines, "\n"), 0)
	return &c
}

func syncAccepted(ctx context.Context, k *keeper, key types.NamespacedName, have *unstructured.Unstructured, problems []mesh.Problem) (bool, error) {
	if have == nil || have.GetDeletionTimestamp() != nil {
		return false, nil
	}
	raw, _, _ := unstructured.NestedSlice(have.Object, "status", "conditions")
	at, was := find(raw)
	want := accepted(problems)
	if want == nil {
		if at < 0 {
			return false, nil
		}
		healed := condition(conditionAccepted, true, "Accepted", "", 0)
		want = &healed
	}
	sum := digest(want)
	if k.done(key, have, sum) {
		return false, nil
	}
	if want.Status == metav1.ConditionTrue && was.Status == metav1.ConditionTrue {
		return false, nil // a generation more changes nothing in what is right
	}
	next, changed := settle([]metav1.Condition{was}, []metav1.Condition{*want}, have.GetGeneration(), metav1.NewTime(time.Now().UTC().Truncate(time.Second)))
	if !changed {
		return false, nil
	}
	item, err := runtime.DefaultUnstructuredConverter.ToUnstructured(&next[len(next)-1])
	if err != nil {
		return false, err
	}
	if at < 0 {
		raw = append(raw, item)
	} else {
		raw[at] = item
	}
	// The object here is without its spec: the status alone is sent, for exactly the version that was seen.
	patch := map[string]any{"metadata": map[string]any{"resourceVersion": have.GetResourceVersion()}, "status": map[string]any{"conditions": raw}}
	got, err := k.patchStatus(ctx, key, patch)
	if err == nil {
		k.settle(key, got, sum)
	}
	return err == nil, err
}

// find returns the place and the value of our condition; -1 when there is none.
func find(raw []any) (int, metav1.Condition) {
	for i, r := range raw {
		m, ok := r.(map[string]any)
		if !ok || m["type"] != conditionAccepted {
			continue
		}
		c := metav1.Condition{Type: conditionAccepted}
		status, _ := m["status"].(string)
		c.Status = metav1.ConditionStatus(status)
		c.Reason, _ = m["reason"].(string)
		c.Message, _ = m["message"].(string)
		c.ObservedGeneration, _ = m["observedGeneration"].(int64)
		if s, ok := m["lastTransitionTime"].(string); ok {
			if t, err := time.Parse(time.RFC3339, s); err == nil {
				c.LastTransitionTime = metav1.NewTime(t)
			}
		}
		return i, c
	}
	return -1, metav1.Condition{}
}
