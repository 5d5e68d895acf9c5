package patch

import (
	"fmt"
	"slices"

	"google.golang.org/protobuf/proto"
	envoyfilter "istio.io/api/networking/v1alpha3"
)

// edit says how one patch changes a list of named things.
type edit[T proto.Message] struct {
	match    func(T) bool
	anchored bool          // the patch names one of the list to stand beside
	fresh    func() T      // an empty one
	end      func([]T) int // where the last may stand; nil: at the end
}

// apply returns the list as the patch leaves it, and whether it changed. list is not written to.
func (e edit[T]) apply(p *envoyfilter.EnvoyFilter_Patch, list []T) ([]T, bool, error) {
	at := slices.IndexFunc(list, e.match)
	end := len(list)
	if e.end != nil {
		end = e.end(list)
	}
	switch op := p.GetOperation(); op {
	case envoyfilter.EnvoyFilter_Patch_REMOVE:
		if at < 0 {
			return list, false, nil
		}
		return slices.DeleteFunc(slices.Clone(list), e.match), true, nil
	case envoyfilter.EnvoyFilter_Patch_MERGE, envoyfilter.EnvoyFilter_Patch_MERGE_AND_REPLACE_LIST:
		return e.merge(p, list)
	case envoyfilter.EnvoyFilter_Patch_REPLACE:
		if at < 0 {
			return list, false, nil
		}
		return e.place(p, slices.Delete(slices.Clone(list), at, at+1), at)
	case envoyfilter.EnvoyFilter_Patch_ADD:
		return e.place(p, list, end)
	case envoyfilter.EnvoyFilter_Patch_INSERT_FIRST:
		return e.place(p, list, 0)
	case envoyfilter.EnvoyFilter_Patch_INSERT_BEFORE:
		if !e.anchored {
			return e.place(p, list, 0)
		}
		if at < 0 {
			return list, false, nil
		}
		return e.place(p, list, at)
	case envoyfilter.EnvoyFilter_Patch_INSERT_AFTER:
		if !e.anchored {
			return e.place(p, list, end)
		}
		if at < 0 {
			return list, false, nil
		}
		return e.place(p, list, at+1)
	default:
		return nil, false, fmt.Errorf("patch.operation %s is not honoured", op)
	}
}

func (e edit[T]) place(p *envoyfilter.EnvoyFilter_Patch, list []T, at int) ([]T, bool, error) {
	x := e.fresh()
	if err := decode(p.GetValue(), x); err != nil {
		return nil, false, err
	}
	if err := valid(x); err != nil {
		return nil, false, err
	}
	return slices.Insert(slices.Clone(list), at, x), true, nil
}

func (e edit[T]) merge(p *envoyfilter.EnvoyFilter_Patch, list []T) ([]T, bool, error) {
	out, changed := list, false
	for i, x := range list {
		if !e.match(x) {
			continue
		}
		merged, err := merged(p, x, e.fresh())
		if err != nil {
			return nil, false, err
		}
		if !changed {
			out, changed = slices.Clone(list), true
		}
		out[i] = merged
	}
	return out, changed, nil
}

// merged returns a copy of x with what the patch says; over is an empty message of the type.
func merged[T proto.Message](p *envoyfilter.EnvoyFilter_Patch, x, over T) (T, error) {
	if err := decode(p.GetValue(), over); err != nil {
		return x, err
	}
	out := proto.Clone(x).(T)
	if err := merge(out.ProtoReflect(), over.ProtoReflect(), p.GetOperation() == envoyfilter.EnvoyFilter_Patch_MERGE_AND_REPLACE_LIST); err != nil {
		return x, err
	}
	return out, valid(out)
}
