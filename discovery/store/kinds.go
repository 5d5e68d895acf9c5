package store

import (
	"strings"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/store/lists"
)

// carried are the kinds of objects that pass from the inputs to the Snapshot as they are, sorted by namespace and name.
// To add one: a field in mesh.Input, one of the same name in mesh.Snapshot, and a line here. Duplicates are refused, and
// the short path of a change (patch.go) works for it without another word.
var carried = []carrier{
	kind[mesh.VirtualService]{"VirtualServices",
		func(in *mesh.Input) *[]*mesh.VirtualService { return &in.VirtualServices }, func(s *mesh.Snapshot) *[]*mesh.VirtualService { return &s.VirtualServices },
		func(x *mesh.VirtualService) *mesh.ObjectRef { return &x.Object }},
	kind[mesh.DestinationRule]{"DestinationRules",
		func(in *mesh.Input) *[]*mesh.DestinationRule { return &in.DestinationRules }, func(s *mesh.Snapshot) *[]*mesh.DestinationRule { return &s.DestinationRules },
		func(x *mesh.DestinationRule) *mesh.ObjectRef { return &x.Object }},
	kind[mesh.SidecarConfig]{"Sidecars",
		func(in *mesh.Input) *[]*mesh.SidecarConfig { return &in.Sidecars }, func(s *mesh.Snapshot) *[]*mesh.SidecarConfig { return &s.Sidecars },
		func(x *mesh.SidecarConfig) *mesh.ObjectRef { return &x.Object }},
	kind[mesh.Gateway]{"Gateways",
		func(in *mesh.Input) *[]*mesh.Gateway { return &in.Gateways }, func(s *mesh.Snapshot) *[]*mesh.Gateway { return &s.Gateways },
		func(x *mesh.Gateway) *mesh.ObjectRef { return &x.Object }},
	kind[mesh.PeerAuthentication]{"PeerAuthentications",
		func(in *mesh.Input) *[]*mesh.PeerAuthentication { return &in.PeerAuthentications }, func(s *mesh.Snapshot) *[]*mesh.PeerAuthentication { return &s.PeerAuthentications },
		func(x *mesh.PeerAuthentication) *mesh.ObjectRef { return &x.Object }},
	kind[mesh.AuthorizationPolicy]{"AuthorizationPolicies",
		func(in *mesh.Input) *[]*mesh.AuthorizationPolicy { return &in.AuthorizationPolicies }, func(s *mesh.Snapshot) *[]*mesh.AuthorizationPolicy { return &s.AuthorizationPolicies },
		func(x *mesh.AuthorizationPolicy) *mesh.ObjectRef { return &x.Object }},
	kind[mesh.RequestAuthentication]{"RequestAuthentications",
		func(in *mesh.Input) *[]*mesh.RequestAuthentication { return &in.RequestAuthentications }, func(s *mesh.Snapshot) *[]*mesh.RequestAuthentication { return &s.RequestAuthentications },
		func(x *mesh.RequestAuthentication) *mesh.ObjectRef { return &x.Object }},
	kind[mesh.EnvoyFilter]{"EnvoyFilters",
		func(in *mesh.Input) *[]*mesh.EnvoyFilter { return &in.EnvoyFilters }, func(s *mesh.Snapshot) *[]*mesh.EnvoyFilter { return &s.EnvoyFilters },
		func(x *mesh.EnvoyFilter) *mesh.ObjectRef { return &x.Object }},
	kind[mesh.ProxyConfig]{"ProxyConfigs",
		func(in *mesh.Input) *[]*mesh.ProxyConfig { return &in.ProxyConfigs }, func(s *mesh.Snapshot) *[]*mesh.ProxyConfig { return &s.ProxyConfigs },
		func(x *mesh.ProxyConfig) *mesh.ObjectRef { return &x.Object }},
	kind[mesh.WorkloadGroup]{"WorkloadGroups",
		func(in *mesh.Input) *[]*mesh.WorkloadGroup { return &in.WorkloadGroups }, func(s *mesh.Snapshot) *[]*mesh.WorkloadGroup { return &s.WorkloadGroups },
		func(x *mesh.WorkloadGroup) *mesh.ObjectRef { return &x.Object }},
	kind[mesh.Credential]{"Credentials",
		func(in *mesh.Input) *[]*mesh.Credential { return &in.Credentials }, func(s *mesh.Snapshot) *[]*mesh.Credential { return &s.Credentials },
		func(x *mesh.Credential) *mesh.ObjectRef { return &x.Object }},
	kind[mesh.KubeObject]{"KubeObjects",
		func(in *mesh.Input) *[]*mesh.KubeObject { return &in.KubeObjects }, func(s *mesh.Snapshot) *[]*mesh.KubeObject { return &s.KubeObjects },
		func(x *mesh.KubeObject) *mesh.ObjectRef { return &x.Object }},
}

// carrier is a kind whose type is hidden.
type carrier interface {
	// field is the name of the field in mesh.Input.
	field() string
	// refs lists the objects of an input.
	refs(in *mesh.Input) []mesh.ObjectRef
	// collect adds those objects of an input that are the first of their name.
	collect(s *mesh.Snapshot, in *mesh.Input, first func(mesh.ObjectRef) bool)
	sort(s *mesh.Snapshot)
	// patch makes the list of s as if the inputs had always been these. The names of what differs are unique.
	patch(s *mesh.Snapshot, changes []change) (changed bool)
}

// kind says where objects of one type are kept.
type kind[T any] struct {
	name string
	in   func(*mesh.Input) *[]*T
	out  func(*mesh.Snapshot) *[]*T
	ref  func(*T) *mesh.ObjectRef
}

func (k kind[T]) field() string { return k.name }

func (k kind[T]) refs(in *mesh.Input) []mesh.ObjectRef {
	var out []mesh.ObjectRef
	for _, x := range *k.in(in) {
		out = append(out, *k.ref(x))
	}
	return out
}

func (k kind[T]) collect(s *mesh.Snapshot, in *mesh.Input, first func(mesh.ObjectRef) bool) {
	for _, x := range *k.in(in) {
		if first(*k.ref(x)) {
			*k.out(s) = append(*k.out(s), x)
		}
	}
}

func (k kind[T]) sort(s *mesh.Snapshot) { byObject(*k.out(s), k.ref) }

func (k kind[T]) patch(s *mesh.Snapshot, changes []change) bool {
	var gone, come []*T
	for i := range changes {
		out, in := lists.Differences(*k.in(&changes[i].old), *k.in(&changes[i].now))
		gone, come = append(gone, out...), append(come, in...)
	}
	if len(gone)+len(come) == 0 {
		return false
	}
	compare := func(a, b *T) int { return compareObjects(k.ref(a), k.ref(b)) }
	*k.out(s) = lists.Patched(*k.out(s), gone, come, compare)
	return true
}

func compareObjects(x, y *mesh.ObjectRef) int {
	if c := strings.Compare(x.Namespace, y.Namespace); c != 0 {
		return c
	}
	if c := strings.Compare(x.Name, y.Name); c != 0 {
		return c
	}
	return strings.Compare(x.Kind, y.Kind)
}
