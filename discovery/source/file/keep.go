package file

import (
	"maps"
	"slices"

	"github.com/isthmus-mesh/isthmus/discovery/config"
	"github.com/isthmus-mesh/isthmus/discovery/config/written"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// identity is what makes two objects the same one.
type identity struct{ kind, namespace, name string }

func identify(o mesh.ObjectRef) identity { return identity{o.Kind, o.Namespace, o.Name} }

// keepBroken adds to what a file says now what it said before of objects that are still there but broken, as an API
// server would refuse the edit: those that a Problem names and, if a document no longer parses, all that are missing.
// It marks the Problems.
func keepBroken(now, before mesh.Input, problems []mesh.Problem) mesh.Input {
	if len(problems) == 0 {
		return now
	}
	k := &keeper{broken: map[identity]bool{}, have: map[identity]bool{}, kept: map[identity]bool{}}
	for _, p := range problems {
		k.broken[identify(p.Object)] = true
		k.any = k.any || anyone(p)
	}
	now.Services = keep(k, now.Services, before.Services, func(x *mesh.ServiceDecl) mesh.ObjectRef { return x.Object })
	now.Workloads = keep(k, now.Workloads, before.Workloads, func(x *mesh.Workload) mesh.ObjectRef { return x.Object })
	now.Slices = keep(k, now.Slices, before.Slices, func(x *mesh.EndpointSlice) mesh.ObjectRef { return x.Object })
	now.Exports = keep(k, now.Exports, before.Exports, func(x *mesh.Export) mesh.ObjectRef { return x.Object })
	now.VirtualServices = keep(k, now.VirtualServices, before.VirtualServices, func(x *mesh.VirtualService) mesh.ObjectRef { return x.Object })
	now.DestinationRules = keep(k, now.DestinationRules, before.DestinationRules, func(x *mesh.DestinationRule) mesh.ObjectRef { return x.Object })
	now.Gateways = keep(k, now.Gateways, before.Gateways, func(x *mesh.Gateway) mesh.ObjectRef { return x.Object })
	now.PeerAuthentications = keep(k, now.PeerAuthentications, before.PeerAuthentications, func(x *mesh.PeerAuthentication) mesh.ObjectRef { return x.Object })
	now.AuthorizationPolicies = keep(k, now.AuthorizationPolicies, before.AuthorizationPolicies, func(x *mesh.AuthorizationPolicy) mesh.ObjectRef { return x.Object })
	now.RequestAuthentications = keep(k, now.RequestAuthentications, before.RequestAuthentications, func(x *mesh.RequestAuthentication) mesh.ObjectRef { return x.Object })
	now.EnvoyFilters = keep(k, now.EnvoyFilters, before.EnvoyFilters, func(x *mesh.EnvoyFilter) mesh.ObjectRef { return x.Object })
	now.Credentials = keep(k, now.Credentials, before.Credentials, func(x *mesh.Credential) mesh.ObjectRef { return x.Object })
	// Of one ConfigMap the two keys stand for themselves.
	k.have = map[identity]bool{}
	now.MeshConfigs = keep(k, now.MeshConfigs, before.MeshConfigs, func(x *mesh.MeshConfig) mesh.ObjectRef { return x.Object })
	k.have = map[identity]bool{}
	declared := slices.DeleteFunc(slices.Clone(before.Networks), func(x *mesh.Network) bool { return x.Object.Kind != "ConfigMap" })
	now.Networks = keep(k, now.Networks, declared, func(x *mesh.Network) mesh.ObjectRef { return x.Object })
	for i, p := range problems {
		if k.kept[identify(p.Object)] || anyone(p) && len(k.kept) > 0 {
			problems[i].Message += "; what was valid before stays in use until a restart"
		}
	}
	return now
}

// anyone reports whether the Problem is about something that may have been any object.
func anyone(p mesh.Problem) bool {
	return p.Object.Kind == written.KindFile || p.Object.Name == "" || p.Reason == written.ReasonUnknownKind
}

// keeper is one run of keepBroken.
type keeper struct {
	broken map[identity]bool // named by a Problem
	any    bool              // a document does not parse: it may hold any of the missing
	have   map[identity]bool
	kept   map[identity]bool
}

func keep[T any](k *keeper, now, before []T, ref func(T) mesh.ObjectRef) []T {
	for _, x := range now {
		k.have[identify(ref(x))] = true
	}
	for _, x := range before {
		if id := identify(ref(x)); !k.have[id] && (k.any || k.broken[id]) {
			k.kept[id] = true
			now = append(now, x)
		}
	}
	return now
}

// clone copies the lists, for the sink owns those it is given; what they point to is never written.
func clone(in mesh.Input) mesh.Input {
	in.Services = slices.Clone(in.Services)
	in.Workloads = slices.Clone(in.Workloads)
	in.Slices = slices.Clone(in.Slices)
	in.Exports = slices.Clone(in.Exports)
	in.VirtualServices = slices.Clone(in.VirtualServices)
	in.DestinationRules = slices.Clone(in.DestinationRules)
	in.Gateways = slices.Clone(in.Gateways)
	in.PeerAuthentications = slices.Clone(in.PeerAuthentications)
	in.AuthorizationPolicies = slices.Clone(in.AuthorizationPolicies)
	in.RequestAuthentications = slices.Clone(in.RequestAuthentications)
	in.EnvoyFilters = slices.Clone(in.EnvoyFilters)
	in.Credentials = slices.Clone(in.Credentials)
	in.MeshConfigs = slices.Clone(in.MeshConfigs)
	in.Networks = slices.Clone(in.Networks)
	return in
}

// keepNamed returns what data declares by name, and as it was what is missing because a document is broken.
func keepNamed[V any](key string, data []byte, now, before map[string]V) map[string]V {
	for name := range before {
		if _, have := now[name]; have {
			continue
		}
		if _, problems := config.Decode(key, data, config.Options{}); !slices.ContainsFunc(problems, anyone) {
			return now
		}
		out := maps.Clone(before)
		maps.Copy(out, now)
		return out
	}
	return now
}
