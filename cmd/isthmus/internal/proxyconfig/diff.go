package proxyconfig

import (
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strconv"
	"strings"
)

// Difference is one resource that an Envoy and the control plane do not have alike.
type Difference struct {
	Kind string `json:"kind"`
	Name string `json:"name"`
	// Envoy and Held say who has it.
	Envoy bool `json:"envoy"`
	Held  bool `json:"held"`
	// Fields differ, where both have it: at most 20.
	Fields []Field `json:"fields,omitempty"`
}

// Field is a place where two resources differ.
type Field struct {
	Path  string `json:"path"`
	Envoy string `json:"envoy"`
	Held  string `json:"held"`
}

const maxFields = 20

// Diff compares what an Envoy has with what the control plane holds for it. What is static in the Envoy, and secrets that
// its agent gives, are its own; of routes and endpoints the Envoy asks for those only that its listeners and clusters name.
func Diff(envoy, held *Dump, kinds []string, f Filter) []Difference {
	out := []Difference{}
	for _, kind := range kinds {
		have, want := current(envoy, kind), current(held, kind)
		for _, name := range slices.Sorted(maps.Keys(union(have, want))) {
			h, inEnvoy := have[name]
			w, isHeld := want[name]
			own := !isHeld && kind == "secrets" || kind == "endpoints" && !asked(envoy, kind, name) // Envoy dumps endpoints of other clusters, too
			if !f.Lets(kind, cmpResource(inEnvoy, h, w)) || own || !inEnvoy && !asked(envoy, kind, name) {
				continue
			}
			d := Difference{Kind: kind, Name: name, Envoy: inEnvoy, Held: isHeld}
			if inEnvoy && isHeld {
				a, b := untyped(h.Body), untyped(w.Body)
				if kind == "endpoints" {
					a, b = flat(h), flat(w)
				}
				if compare("", a, b, &d.Fields); len(d.Fields) == 0 {
					continue
				}
			}
			out = append(out, d)
		}
	}
	return out
}

// untyped is a body without the type that its dump may name.
func untyped(body map[string]any) any {
	out := maps.Clone(body)
	delete(out, "@type")
	return out
}

func cmpResource(first bool, a, b Resource) Resource {
	if first {
		return a
	}
	return b
}

// current is what a dump has from a control plane: the newest of each name.
func current(d *Dump, kind string) map[string]Resource {
	out := map[string]Resource{}
	for _, r := range d.Of(kind) {
		if r.State == "active" || r.State == "warming" {
			out[r.Name] = r
		}
	}
	return out
}

func union(a, b map[string]Resource) map[string]bool {
	out := map[string]bool{}
	for k := range a {
		out[k] = true
	}
	for k := range b {
		out[k] = true
	}
	return out
}

// asked reports whether the Envoy has something that names the resource.
func asked(envoy *Dump, kind, name string) bool {
	switch kind {
	case "routes":
		return slices.ContainsFunc(envoy.Listeners, func(r Resource) bool { return names(r.Body, "route_config_name", name) })
	case "secrets":
		return slices.ContainsFunc(slices.Concat(envoy.Listeners, envoy.Clusters), func(r Resource) bool { return names(r.Body, "name", name) })
	case "endpoints":
		return slices.ContainsFunc(envoy.Clusters, func(r Resource) bool {
			return r.Body["eds_cluster_config"] != nil && cmp.Or(text(r.Body, "eds_cluster_config", "service_name"), r.Name) == name
		})
	}
	return true
}

// names reports whether a field somewhere has the value.
func names(v any, field, value string) bool {
	switch v := v.(type) {
	case []any:
		return slices.ContainsFunc(v, func(x any) bool { return names(x, field, value) })
	case map[string]any:
		for k, x := range v {
			if k == field && x == value || names(x, field, value) {
				return true
			}
		}
	}
	return false
}

// flat is where an assignment leads: Envoy adds to what it was sent, and dumps that.
func flat(r Resource) any {
	out := map[string]any{}
	for _, l := range items(r.Body["endpoints"]) {
		for _, e := range items(l["lb_endpoints"]) {
			host, port := address(at(e, "endpoint", "address"))
			where := fmt.Sprintf("weight %s, priority %s", cmp.Or(text(e, "load_balancing_weight"), "1"), cmp.Or(text(l, "priority"), "0"))
			for _, p := range []string{"region", "zone", "sub_zone"} {
				if v := text(l, "locality", p); v != "" {
					where += ", " + p + " " + v
				}
			}
			out[strings.TrimSuffix(host+":"+port, ":")] = where
		}
	}
	return out
}

// compare finds the places where two JSON values differ. What is missing equals what protobuf holds for it: an empty
// object, list or string, zero and false.
func compare(path string, a, b any, out *[]Field) {
	if len(*out) >= maxFields || reflect.DeepEqual(a, b) || empty(a) && empty(b) {
		return
	}
	if x, y, both := pair[map[string]any](a, b); both {
		keys := map[string]bool{}
		for k := range x {
			keys[k] = true
		}
		for k := range y {
			keys[k] = true
		}
		for _, k := range slices.Sorted(maps.Keys(keys)) {
			compare(strings.TrimPrefix(path+"."+k, "."), x[k], y[k], out)
		}
		return
	}
	if x, y, both := pair[[]any](a, b); both && len(x) == len(y) {
		for i := range x {
			compare(fmt.Sprintf("%s[%d]", path, i), x[i], y[i], out)
		}
		return
	}
	if number(a) != "" && number(a) == number(b) {
		return
	}
	*out = append(*out, Field{Path: path, Envoy: brief(a), Held: brief(b)})
}

// pair is two values of one kind, of which one may be missing.
func pair[T any](a, b any) (x, y T, ok bool) {
	x, first := a.(T)
	y, second := b.(T)
	return x, y, first && second || first && b == nil || second && a == nil
}

func empty(v any) bool {
	switch v := v.(type) {
	case nil:
		return true
	case bool:
		return !v
	case map[string]any:
		return len(v) == 0
	case []any:
		return len(v) == 0
	case string:
		return v == "" || v == "0s"
	}
	return number(v) == "0"
}

// number writes numbers in one way, also 64-bit ones, which JSON of protobuf has as text.
func number(v any) string {
	s := ""
	switch v := v.(type) {
	case json.Number:
		s = v.String()
	case float64:
		return strconv.FormatFloat(v, 'g', -1, 64)
	case string:
		s = v
	}
	if f, err := strconv.ParseFloat(s, 64); err == nil {
		return strconv.FormatFloat(f, 'g', -1, 64)
	}
	return ""
}

// brief is a value in one line.
func brief(v any) string {
	if v == nil {
		return "(not there)"
	}
	data, err := json.Marshal(v)
	if err != nil {
		return "(not shown)"
	}
	if len(data) > 160 {
		return strings.ToValidUTF8(string(data[:160]), "") + "..."
	}
	return string(data)
}
