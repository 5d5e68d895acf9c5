package locality

import (
	"cmp"
	"maps"
	"math"
	"slices"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"

	"github.com/isthmus-mesh/isthmus/discovery/translate/wire"
	"github.com/isthmus-mesh/isthmus/topologies"
)

// Groups gathers the endpoints of one assignment by priority and locality.
type Groups struct {
	Total  uint32 // endpoints
	groups map[place]*endpointv3.LocalityLbEndpoints
	sums   map[string]uint64 // weights by locality
}

type place struct {
	priority uint32
	locality string
}

// Add puts an endpoint in the group of its priority and locality (region/zone/subzone).
func (g *Groups) Add(priority uint32, at string, lb *endpointv3.LbEndpoint, weight uint64) {
	if g.groups == nil {
		g.groups, g.sums = map[place]*endpointv3.LocalityLbEndpoints{}, map[string]uint64{}
	}
	key := place{priority, at}
	of := g.groups[key]
	if of == nil {
		region, zone, subzone := topologies.SplitLocality(at)
		of = &endpointv3.LocalityLbEndpoints{Locality: &corev3.Locality{Region: region, Zone: zone, SubZone: subzone}}
		g.groups[key] = of
	}
	g.Total++
	g.sums[at] += weight
	lb.LoadBalancingWeight = wire.U32(uint32(min(max(weight, 1), math.MaxUint32)))
	of.LbEndpoints = append(of.LbEndpoints, lb)
}

// Ordered returns the groups in order, without gaps between priorities, which Envoy does not allow. Of a distribution each
// has its share, otherwise the sum of its endpoints' weights.
func (g *Groups) Ordered(r *Ranking) (out []*endpointv3.LocalityLbEndpoints) {
	keys := slices.SortedFunc(maps.Keys(g.groups), func(x, y place) int {
		return cmp.Or(cmp.Compare(x.priority, y.priority), cmp.Compare(x.locality, y.locality))
	})
	shares := map[string]uint32{}
	if r.Distributes() {
		shares = r.Weights(g.sums)
	}
	next, last := uint32(0), uint32(0)
	for i, k := range keys {
		of := g.groups[k]
		if r.Distributes() {
			if shares[k.locality] == 0 {
				continue
			}
			of.LoadBalancingWeight = wire.U32(shares[k.locality])
		} else {
			sum := uint64(0)
			for _, e := range of.LbEndpoints {
				sum += uint64(e.GetLoadBalancingWeight().GetValue())
			}
			of.LoadBalancingWeight = wire.U32(uint32(min(sum, math.MaxUint32)))
		}
		if i > 0 && k.priority != last {
			next++
		}
		last, of.Priority = k.priority, next
		out = append(out, of)
	}
	return out
}
