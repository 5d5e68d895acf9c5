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
func keepBroken(now, before mesh.Input, problems []mesh.Problem) (mesh.Input, []mesh.Problem) {
	if len(problems) == 0 {
		return now, nil
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
	now.Sidecars = keep(k, now.Sidecars, before.Sidecars, func(x *mesh.SidecarConfig) mesh.ObjectRef { return x.Object })
	now.Gateways = keep(k, now.Gateways, before.Gateways, func(x *mesh.Gateway) mesh.ObjectRef { return x.Object })
	now.PeerAuthentications = keep(k, now.PeerAuthentications, before.PeerAuthentications, func(x *mesh.PeerAuthentication) mesh.ObjectRef { return x.Object })
	now.AuthorizationPolicies = keepOpen(k, now.AuthorizationPolicies, before.AuthorizationPolicies, func(x *mesh.AuthorizationPolicy) (mesh.ObjectRef, bool) { return x.Object, x.Closed })
	now.RequestAuthentications = keepOpen(k, now.RequestAuthentications, before.RequestAuthentications, func(x *mesh.RequestAuthentication) (mesh.ObjectRef, bool) { return x.Object, x.Closed })
	now.EnvoyFilters = keep(k, now.EnvoyFilters, before.EnvoyFilters, func(x *mesh.EnvoyFilter) mesh.ObjectRef { return x.Object })
	now.ProxyConfigs = keep(k, now.ProxyConfigs, before.ProxyConfigs, func(x *mesh.ProxyConfig) mesh.ObjectRef { return x.Object })
	now.WorkloadGroups = keep(k, now.WorkloadGroups, before.WorkloadGroups, func(x *mesh.WorkloadGroup) mesh.ObjectRef { return x.Object })
	now.Credentials = keep(k, now.Credentials, before.Credentials, func(x *mesh.Credential) mesh.ObjectRef { return x.Object })
	now.KubeObjects = keep(k, now.KubeObjects, before.KubeObjects, func(x *mesh.KubeObject) mesh.ObjectRef { return x.Object })
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
	return now, slices.DeleteFunc(problems, func(p mesh.Problem) bool { return p.Reason == written.ReasonClosed && k.kept[identify(p.Object)] })
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

// keepOpen is keep for policies: one that was valid is better than one that is closed, and that than none.
func keepOpen[T any](k *keeper, now, before []T, say func(T) (mesh.ObjectRef, bool)) []T {
	ref := func(x T) mesh.ObjectRef { r, _ := say(x); return r }
	closed := func(x T) bool { _, is := say(x); return is }
	split := func(list []T) (open, shut []T) {
		for _, x := range list {
			if closed(x) {
				shut = append(shut, x)
			} else {
				open = append(open, x)
			}
		}
		return open, shut
	}
	nowOpen, nowShut := split(now)
	beforeOpen, beforeShut := split(before)
	out := keep(k, nowOpen, beforeOpen, ref)
	nowShut = slices.DeleteFunc(nowShut, func(x T) bool { return k.kept[identify(ref(x))] })
	return append(out, keep(k, nowShut, beforeShut, ref)...)
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
