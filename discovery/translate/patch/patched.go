package patch

import (
	"fmt"
	"slices"

	"google.golang.org/protobuf/proto"
	envoyfilter "istio.io/api/networking/v1alpha3"
)

// resource is what a proxy is served by name.
type resource interface {
	proto.Message
	GetName() string
}

// patched applies a patch to resources as such, not to something in them, and notes which it touches. With an error list is
// returned as it was.
func patched[T resource](a *applier, kind Kind, e edit[T], list []T) ([]T, error) {
	p := a.patch.GetPatch()
	op := p.GetOperation()
	switch op {
	case envoyfilter.EnvoyFilter_Patch_ADD:
		if !a.inContext(false) && !a.inContext(true) {
			return list, nil
		}
	case envoyfilter.EnvoyFilter_Patch_MERGE, envoyfilter.EnvoyFilter_Patch_MERGE_AND_REPLACE_LIST, envoyfilter.EnvoyFilter_Patch_REMOVE:
	default:
		return list, fmt.Errorf("patch.operation %s is not honoured for %s", op, a.patch.GetApplyTo())
	}
	next, changed, err := e.apply(p, list)
	if err != nil || !changed {
		return list, err
	}
	if op == envoyfilter.EnvoyFilter_Patch_ADD {
		name := next[len(next)-1].GetName()
		if name == "" {
			return list, fmt.Errorf("the %s has no name", kind)
		}
		if slices.ContainsFunc(list, func(x T) bool { return x.GetName() == name }) {
			return list, fmt.Errorf("there is a %s %s already", kind, name)
		}
	}
	a.touchChanged(kind, names(list), names(next))
	return next, nil
}

// names returns a list's members by name.
func names[T resource](list []T) map[string]any {
	out := make(map[string]any, len(list))
	for _, x := range list {
		out[x.GetName()] = x
	}
	return out
}
