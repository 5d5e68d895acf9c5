package translate

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/translate/drain"
	"github.com/isthmus-mesh/isthmus/discovery/translate/locality"
	"github.com/isthmus-mesh/isthmus/discovery/translate/remote"
	"github.com/isthmus-mesh/isthmus/discovery/translate/wire"
	"github.com/isthmus-mesh/isthmus/topologies"
)

// crowd is the pods of one network that this proxy uses alike: the network's gateways stand for all of them.
type crowd struct {
	network *mesh.Network
	key     string
	first   *mesh.Endpoint
	weight  uint64
	weights map[string]uint64 // by locality
}

// locality is the one that most of the pods are in.
func (c *crowd) locality() string {
	best := ""
	for _, l := range slices.Sorted(maps.Keys(c.weights)) {
		if best == "" || c.weights[l] > c.weights[best] {
			best = l
		}
	}
	return best
}

// assigner builds one assignment.
type assigner struct {
	locality.Groups
	u     upstream
	scale uint64 // of every weight, so that what is divided among gateways stays whole
}

// assignment lists the endpoints of u that are ready and reachable, one group for each locality. Endpoints of a cluster
// that was not heard from stand back (degraded) while others are there; those of an expired one are left out then.
// plain is for clients that know neither gateways nor degraded endpoints.
func (v *view) assignment(u upstream, plain bool) *endpointv3.ClusterLoadAssignment {
	found, weigh := drain.Apply(v.locate(u, plain), func(l located) *mesh.Endpoint { return l.Endpoint })
	best := mesh.Expired
	for _, e := range found {
		best = min(best, e.Freshness)
	}
	worst := mesh.Late // the least fresh that is still used
	if plain || best == mesh.Expired {
		worst = best
	}
	crowds := v.crowds(u, found, weigh)
	a := &assigner{u: u, scale: scaleOf(u, crowds)}
	for _, e := range found {
		if e.Freshness > worst || e.behind != nil {
			continue
		}
		if e.Freshness != mesh.Fresh && !plain {
			e.lb.HealthStatus = corev3.HealthStatus_DEGRADED
		}
		a.Add(u.rank.Priority(e.Endpoint), e.Locality, e.lb, weigh(e.Endpoint)*a.scale)
	}
	for _, c := range crowds {
		v.addGateways(a, c)
	}
	out := &endpointv3.ClusterLoadAssignment{ClusterName: u.name(), Endpoints: a.Ordered(u.rank)}
	if best == mesh.Fresh && worst == mesh.Late && !plain {
		// One fresh endpoint suffices to leave the late ones alone; Envoy's own factor would share from 72 % downwards.
		out.Policy = &endpointv3.ClusterLoadAssignment_Policy{OverprovisioningFactor: wire.U32(max(140, 100*a.Total))}
	}
	return out
}

// crowds gathers what is behind the gateways of the control plane's own networks, in the order of network and use.
func (v *view) crowds(u upstream, found []located, weigh func(*mesh.Endpoint) uint64) []*crowd {
	type key struct {
		network mesh.NetworkID
		use     string
	}
	by := map[key]*crowd{}
	for _, e := range found {
		if e.behind == nil {
			continue
		}
		k := key{e.behind.ID, ""}
		if slices.Contains(u.inside, e.behind.ID) {
			k.use = u.rank.Key(e.Endpoint)
		}
		c := by[k]
		if c == nil {
			c = &crowd{network: e.behind, key: k.use, first: e.Endpoint, weights: map[string]uint64{}}
			by[k] = c
		} else if u.rank.Priority(e.Endpoint) < u.rank.Priority(c.first) {
			c.first = e.Endpoint
		}
		w := weigh(e.Endpoint)
		c.weight += w
		c.weights[e.Locality] += w
	}
	return slices.SortedFunc(maps.Values(by), func(a, b *crowd) int {
		return cmp.Or(cmp.Compare(a.network.ID, b.network.ID), cmp.Compare(a.key, b.key))
	})
}

// insideOf returns the networks that an internal listener stands for: Envoy takes no host names from EDS, and one
// address only once, so gateways with names, and gateways that stand for pods of several priorities or shares.
func (v *view) insideOf(u upstream) []mesh.NetworkID {
	keys := map[mesh.NetworkID]string{}
	var out []mesh.NetworkID
	for _, e := range u.service.Endpoints {
		path := topologies.Reach(v.snap, v.network, e)
		if path.Network == nil || slices.Contains(out, path.Network.ID) {
			continue
		}
		k := u.rank.Key(e)
		if was, again := keys[path.Network.ID]; remote.Named(path.Network) || again && was != k {
			out = append(out, path.Network.ID)
		}
		keys[path.Network.ID] = k
	}
	slices.Sort(out)
	return out
}

// scaleOf returns the least number by which weights divide evenly among the gateways of each network.
func scaleOf(u upstream, crowds []*crowd) uint64 {
	scale := uint64(1)
	for _, c := range crowds {
		if !slices.Contains(u.inside, c.network.ID) {
			n := uint64(len(c.network.Gateways))
			if next := scale / gcd(scale, n) * n; next <= 1<<16 {
				scale = next
			}
		}
	}
	return scale
}

func gcd(a, b uint64) uint64 {
	for b != 0 {
		a, b = b, a%b
	}
	return a
}

// addGateways adds the gateways of a network for the pods behind them.
func (v *view) addGateways(a *assigner, c *crowd) {
	priority, at := a.u.rank.Priority(c.first), c.locality()
	weight := c.weight * a.scale
	if slices.Contains(a.u.inside, c.network.ID) {
		name := remote.NetworkName(c.network.ID)
		lb := remote.Endpoint(wire.Internal(name, c.key))
		lb.GetEndpoint().Hostname = a.u.serverName()
		lb.Metadata = networkMetadata(c.network, "tlsMode", "istio", "via", "gateway")
		a.Add(priority, at, lb, weight)
		return
	}
	for _, g := range c.network.Gateways {
		if addr, err := netip.ParseAddr(g.Address); err == nil {
			g.Address = addr.Unmap().String()
		}
		lb := remote.Endpoint(wire.Socket(g.Address, g.Port))
		lb.Metadata = networkMetadata(c.network, "tlsMode", "istio")
		a.Add(priority, at, lb, (weight+uint64(len(c.network.Gateways))-1)/uint64(len(c.network.Gateways)))
	}
}

func networkMetadata(n *mesh.Network, match ...string) *corev3.Metadata {
	return metadata([]string{"network", string(n.ID)}, match)
}
