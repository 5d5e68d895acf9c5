package inject

import (
	"encoding/json"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
)

// Operation is one step of a JSON patch (RFC 6902).
type Operation struct {
	Op    string `json:"op"`
	Path  string `json:"path"`
	Value any    `json:"value,omitempty"`
}

// Patch returns the steps that turn one Pod into another. Fields of the original that this version of the API does not
// know stay as they are: unchanged containers are not written anew.
func Patch(from, to *corev1.Pod) ([]Operation, error) {
	a, err := generic(from)
	if err != nil {
		return nil, err
	}
	b, err := generic(to)
	if err != nil {
		return nil, err
	}
	return diff(nil, "", a, b), nil
}

func generic(pod *corev1.Pod) (any, error) {
	data, err := json.Marshal(pod)
	if err != nil {
		return nil, fmt.Errorf("write the pod: %w", err)
	}
	var v any
	if err := json.Unmarshal(data, &v); err != nil {
		return nil, fmt.Errorf("read the pod: %w", err)
	}
	return v, nil
}

var escape = strings.NewReplacer("~", "~0", "/", "~1")

func diff(ops []Operation, path string, a, b any) []Operation {
	switch x := a.(type) {
	case map[string]any:
		if y, ok := b.(map[string]any); ok {
			return diffMaps(ops, path, x, y)
		}
	case []any:
		if y, ok := b.([]any); ok {
			if steps, ok := diffNamed(path, x, y); ok {
				return append(ops, steps...)
			}
		}
	}
	if reflect.DeepEqual(a, b) {
		return ops
	}
	return append(ops, Operation{"replace", path, b})
}

func diffMaps(ops []Operation, path string, a, b map[string]any) []Operation {
	for _, k := range slices.Sorted(maps.Keys(a)) {
		if _, ok := b[k]; !ok {
			ops = append(ops, Operation{Op: "remove", Path: path + "/" + escape.Replace(k)})
		}
	}
	for _, k := range slices.Sorted(maps.Keys(b)) {
		at := path + "/" + escape.Replace(k)
		if old, ok := a[k]; ok {
			ops = diff(ops, at, old, b[k])
		} else {
			ops = append(ops, Operation{"add", at, b[k]})
		}
	}
	return ops
}

// diffNamed compares lists whose elements have names, when those of a that stay keep their order.
func diffNamed(path string, a, b []any) ([]Operation, bool) {
	from, ok1 := names(a)
	to, ok2 := names(b)
	if !ok1 || !ok2 {
		return nil, false
	}
	var ops []Operation
	for i := len(from) - 1; i >= 0; i-- {
		if !slices.Contains(to, from[i]) {
			ops = append(ops, Operation{Op: "remove", Path: fmt.Sprintf("%s/%d", path, i)})
			from, a = slices.Delete(slices.Clone(from), i, i+1), slices.Delete(slices.Clone(a), i, i+1)
		}
	}
	next := 0
	for i, name := range to {
		at := fmt.Sprintf("%s/%d", path, i)
		switch {
		case next < len(from) && from[next] == name:
			ops = diff(ops, at, a[next], b[i])
			next++
		case slices.Contains(from, name):
			return nil, false
		default:
			ops = append(ops, Operation{"add", at, b[i]})
		}
	}
	return ops, true
}

// names returns the names of the elements; false unless each has one of its own.
func names(list []any) ([]string, bool) {
	var out []string
	for _, x := range list {
		m, _ := x.(map[string]any)
		name, ok := m["name"].(string)
		if !ok || slices.Contains(out, name) {
			return nil, false
		}
		out = append(out, name)
	}
	return out, true
}
