// Package served puts together all that one proxy is served for a snapshot: what it translates to, and what a gateway
// passes on beside it. It is pure.
package served

import (
	"net/netip"
	"slices"
	"strconv"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/translate"
	"github.com/isthmus-mesh/isthmus/discovery/translate/memo"
	"github.com/isthmus-mesh/isthmus/discovery/translate/patch"
	"github.com/isthmus-mesh/isthmus/eastwest/gateway"
)

// To returns what p is served for snap, and what was left out and why. Names are unique within each type.
func To(snap *mesh.Snapshot, p *mesh.Proxy) (translate.Resources, []mesh.Problem) {
	r := Again(nil, snap, p, nil)
	return r.Resources, r.Problems
}

// Again is To with a memory of the time before, as translate.Again, and without the patches of those EnvoyFilters that skip
// leaves out.
func Again(m *memo.Memo, snap *mesh.Snapshot, p *mesh.Proxy, skip func(*mesh.EnvoyFilter) bool) patch.Result {
	plain, problems := unpatched(m, snap, p)
	r := patch.Apply(snap, p, plain, skip)
	r.Problems = append(problems, r.Problems...)
	return r
}

func unpatched(m *memo.Memo, snap *mesh.Snapshot, p *mesh.Proxy) (translate.Resources, []mesh.Problem) {
	r, problems := translate.Again(m, snap, p)
	if p.Type != mesh.Router {
		return r, problems
	}
	options := gateway.Options{IPv6: slices.ContainsFunc(p.Addresses, netip.Addr.Is6), Proxy: p}
	passing, more := options.Translate(snap)
	problems = append(problems, more...)
	return r, append(problems, join(&r, passing)...)
}

// join adds what a router passes on to what it terminates. Of two listeners at one port the terminating one counts.
func join(r *translate.Resources, passing gateway.Resources) (problems []mesh.Problem) {
	taken := map[uint32]bool{}
	for _, l := range r.Listeners {
		taken[l.GetAddress().GetSocketAddress().GetPortValue()] = true
	}
	for _, l := range passing.Listeners {
		if port := l.GetAddress().GetSocketAddress().GetPortValue(); taken[port] {
			problems = append(problems, mesh.Problem{Object: mesh.ObjectRef{Kind: "Port", Name: strconv.FormatUint(uint64(port), 10)}, Reason: "PortConflict",
				Message: "one Gateway has an HTTP server at this port and another passes TLS or TCP on; HTTP is served", Remedy: "give one of the two another port"})
			continue
		}
		r.Listeners = append(r.Listeners, l)
	}
	r.Clusters = append(r.Clusters, passing.Clusters...)
	return problems
}
