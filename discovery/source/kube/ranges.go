package kube

import (
	"net/netip"
	"slices"

	"github.com/isthmus-mesh/isthmus/internal/cidr"
)

// ranges are the addresses of a cluster's pods: those of its nodes of which a pod was seen to have one, because some
// networks give pods other addresses than the nodes say.
type ranges struct {
	used map[netip.Prefix]bool
	list []netip.Prefix // sorted, without repeats
}

// podChanged looks at the addresses of a pod. The caller holds mu.
func (c *cluster) podChanged(after *cut) {
	if after == nil {
		return
	}
	p, ok := after.kept.(*placeless)
	if !ok || p.workload == nil {
		return
	}
	n := c.nodes[after.node]
	if n == nil {
		return
	}
	for _, s := range p.workload.Addresses {
		a, err := netip.ParseAddr(s)
		if err != nil {
			continue
		}
		for _, r := range n.PodRanges {
			if !c.ranges.used[r] && r.Contains(a) {
				if c.ranges.used == nil {
					c.ranges.used = map[netip.Prefix]bool{}
				}
				c.ranges.used[r] = true
				c.countRanges()
			}
		}
	}
}

// countRanges reports the ranges of the nodes that there are. The caller holds mu.
func (c *cluster) countRanges() {
	used := map[netip.Prefix]bool{}
	var all []netip.Prefix
	for _, n := range c.nodes {
		for _, r := range n.PodRanges {
			if c.ranges.used[r] {
				used[r], all = true, append(all, r)
			}
		}
	}
	c.ranges.used = used
	if all = cidr.Aggregate(all); !slices.Equal(all, c.ranges.list) {
		c.ranges.list = all
		c.introduce()
	}
}
