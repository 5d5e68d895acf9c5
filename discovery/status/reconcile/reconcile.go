// Package reconcile compares and joins what an API server has of an object with what it should have, as values decoded from
// JSON. It is pure.
package reconcile

import (
	"encoding/json"
	"maps"
	"reflect"
)

// owners are lists with an entry for each controller: those of others stay as they are.
var owners = map[string]string{"parents": "parentRef", "ancestors": "ancestorRef"}

// Status returns want with the times of conditions that have the same status in had, and with what other controllers
// say there. now is the time of others.
func Status(had, want map[string]any, now string) map[string]any {
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
		if entry, _ := x.(map[string]any); entry[controller] == Controller {
			ours = append(ours, x)
		} else {
			others = append(others, x)
		}
	}
	out := append([]any{}, others...)
	return append(out, mergeEach(ours, want, ref, now)...)
}

// Controller is the controllerName of our entries.
const Controller = "isthmus.io/gateway-controller"

// mergeEach merges each wanted entry with the one that has the same value in the field.
func mergeEach(had, want []any, field, now string) []any {
	out := make([]any, 0, len(want))
	for _, x := range want {
		entry, _ := x.(map[string]any)
		var before map[string]any
		for _, y := range had {
			if old, _ := y.(map[string]any); Equal(old[field], entry[field]) {
				before = old
				break
			}
		}
		out = append(out, Status(before, entry, now))
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

// WithNulls adds a null for each field of had that is not in next: a merge patch removes it.
func WithNulls(had, next map[string]any) map[string]any {
	out := maps.Clone(next)
	for k := range had {
		if _, stays := out[k]; !stays {
			out[k] = nil
		}
	}
	return out
}

// Equal compares values that are decoded from JSON by different decoders, whose numbers differ in type.
func Equal(a, b any) bool {
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

// Has reports whether all that want says is so in have. Lists are of the same length.
func Has(have, want any) bool {
	switch w := want.(type) {
	case map[string]any:
		h, ok := have.(map[string]any)
		if !ok {
			return len(w) == 0 && have == nil
		}
		for k, v := range w {
			if !Has(h[k], v) {
				return false
			}
		}
		return true
	case []any:
		h, ok := have.([]any)
		if !ok || len(h) != len(w) {
			return false
		}
		for i := range w {
			if !Has(h[i], w[i]) {
				return false
			}
		}
		return true
	}
	return Equal(have, want)
}
