package security

import (
	"encoding/json"

	"google.golang.org/protobuf/encoding/protojson"
	security "istio.io/api/security/v1"
	typev1beta1 "istio.io/api/type/v1beta1"

	"github.com/isthmus-mesh/isthmus/discovery/config/written"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// A policy with a mistake in it was meant to keep something out. Nobody can tell what, so it keeps all of it out: of what
// it says only whom it is for is read, each part by itself, and a part that cannot be read narrows nothing.

// wrong is what such an object says of whom it is for.
type wrong struct {
	Metadata struct {
		Annotations map[string]string `json:"annotations"`
	} `json:"metadata"`
	Spec map[string]json.RawMessage `json:"spec"`
}

// read returns what can be read of the object; ok is false when it is for nobody here.
func (o *object) read() (w wrong, selector *typev1beta1.WorkloadSelector, refs []*typev1beta1.PolicyTargetReference, ok bool) {
	var meta struct {
		Metadata json.RawMessage `json:"metadata"`
		Spec     json.RawMessage `json:"spec"`
	}
	if json.Unmarshal(o.Raw, &meta) == nil { // each by itself: annotations may be wrong where the spec is right
		_ = json.Unmarshal(meta.Metadata, &w.Metadata)
		_ = json.Unmarshal(meta.Spec, &w.Spec)
	}
	if raw := w.Spec["selector"]; raw != nil {
		selector = &typev1beta1.WorkloadSelector{}
		if protojson.Unmarshal(raw, selector) != nil {
			selector = nil
		}
	}
	var list []json.RawMessage
	for _, key := range []string{"targetRefs", "target_refs"} {
		_ = json.Unmarshal(w.Spec[key], &list)
	}
	for _, key := range []string{"targetRef", "target_ref"} {
		if raw := w.Spec[key]; raw != nil {
			list = append(list, raw)
		}
	}
	for _, raw := range list {
		r := &typev1beta1.PolicyTargetReference{}
		if (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(raw, r) != nil {
			return w, selector, nil, true
		}
		refs = append(refs, r)
	}
	if selector != nil || len(refs) == 0 {
		return w, selector, nil, true
	}
	for _, r := range refs {
		ok = ok || r.GetKind() == "Gateway"
	}
	return w, nil, refs, ok // of waypoints, which do not exist, nothing is kept out
}

// closedPolicy stands for an AuthorizationPolicy that is wrong: one that allows allows nothing, one that refuses, or asks
// somebody else, refuses everything. It is nil for one that would decide nothing if it were right.
func (o *object) closedPolicy() *mesh.AuthorizationPolicy {
	w, selector, refs, ok := o.read()
	action := security.AuthorizationPolicy_DENY
	switch said := string(w.Spec["action"]); {
	case !ok, said == `"AUDIT"`, w.Metadata.Annotations[dryRunAnnotation] == "true":
		return nil
	case said == "", said == "null", said == `"ALLOW"`, said == "0":
		action = security.AuthorizationPolicy_ALLOW
	}
	spec := &security.AuthorizationPolicy{Selector: selector, TargetRefs: refs, Action: action}
	if action == security.AuthorizationPolicy_DENY {
		spec.Rules = []*security.Rule{{}}
		o.closes("every request to its workloads is refused")
	} else {
		o.closes("it allows nothing: its workloads refuse what no other policy allows")
	}
	return &mesh.AuthorizationPolicy{Object: o.Ref, Closed: true, Spec: spec}
}

// closedRequests stands for a RequestAuthentication that is wrong: its workloads take no token by it.
func (o *object) closedRequests() *mesh.RequestAuthentication {
	_, selector, refs, ok := o.read()
	if !ok {
		return nil
	}
	o.closes("its workloads refuse requests with a token, unless another RequestAuthentication accepts it")
	return &mesh.RequestAuthentication{Object: o.Ref, Closed: true, Spec: &security.RequestAuthentication{Selector: selector, TargetRefs: refs}}
}

func (o *object) closes(effect string) {
	o.Note("spec", written.ReasonClosed, "until the mistake is corrected, "+effect, "correct the object, or delete it")
}
