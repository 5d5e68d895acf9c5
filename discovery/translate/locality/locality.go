// Package locality says in which order, and in which shares, a client uses the endpoints of different places, as
// Istio's localityLbSetting has it. It is pure.
package locality

import (
	"math"
	"slices"
	"strings"

	networking "istio.io/api/networking/v1"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/topologies"
)

// Ranking is what applies to one client and one host. Nil: endpoints of all places are used alike.
type Ranking struct {
	proxy    *mesh.Proxy
	shares   []share // of a distribution; nothing else counts then
	labels   []label // of failoverPriority
	regional bool    // failover by region, zone, subzone
	to       string  // the region that stands in for the client's; empty: any
}

// share is what one pattern of localities gets.
type share struct {
	pattern string
	percent uint32
}

type label struct{ key, want string }

// For makes the ranking. everywhere is the setting of the whole mesh, rule that of the DestinationRule, which replaces it.
// detects says that outlier detection is on: without it nobody knows when to fail over. The proxy is a placed one.
func For(everywhere, rule *networking.LocalityLoadBalancerSetting, detects bool, p *mesh.Proxy) *Ranking {
	s := rule
	if s == nil {
		s = everywhere
	}
	if e := s.GetEnabled(); e != nil && !e.GetValue() {
		return nil
	}
	if len(s.GetDistribute()) > 0 {
		for _, d := range s.GetDistribute() {
			if !covers(d.GetFrom(), p.Locality) {
				continue
			}
			r := &Ranking{proxy: p}
			for pattern, percent := range d.GetTo() {
				r.shares = append(r.shares, share{pattern, percent})
			}
			slices.SortFunc(r.shares, func(a, b share) int { return strings.Compare(a.pattern, b.pattern) })
			return r
		}
		return nil
	}
	if !detects {
		return nil
	}
	r := &Ranking{proxy: p}
	for _, l := range s.GetFailoverPriority() {
		key, want, fixed := strings.Cut(l, "=")
		if !fixed {
			want = topologies.ProxyLabel(p, key)
		}
		r.labels = append(r.labels, label{key, want})
	}
	r.regional = len(r.labels) == 0
	region, _, _ := topologies.SplitLocality(p.Locality)
	for _, f := range s.GetFailover() {
		if f.GetFrom() == region {
			r.to = f.GetTo()
			break
		}
	}
	return r
}

// ByLabel reports whether some setting ranks endpoints by labels, so that the client's labels matter.
func ByLabel(everywhere *networking.LocalityLoadBalancerSetting, rules []*mesh.DestinationRule) bool {
	by := func(lb *networking.LoadBalancerSettings) bool {
		return len(lb.GetLocalityLbSetting().GetFailoverPriority()) > 0
	}
	prefers := func(p *networking.TrafficPolicy) bool {
		return by(p.GetLoadBalancer()) || slices.ContainsFunc(p.GetPortLevelSettings(), func(x *networking.TrafficPolicy_PortTrafficPolicy) bool { return by(x.GetLoadBalancer()) })
	}
	return len(everywhere.GetFailoverPriority()) > 0 || slices.ContainsFunc(rules, func(d *mesh.DestinationRule) bool {
		return prefers(d.Spec.GetTrafficPolicy()) || slices.ContainsFunc(d.Spec.GetSubsets(), func(x *networking.Subset) bool { return prefers(x.GetTrafficPolicy()) })
	})
}

// Distributes reports whether the shares of localities are fixed.
func (r *Ranking) Distributes() bool { return r != nil && r.shares != nil }

// Key tells endpoints apart that are not used alike: equal keys, equal priority and one share.
func (r *Ranking) Key(e *mesh.Endpoint) string {
	if r.Distributes() {
		return e.Locality
	}
	return string(rune('0' + r.Priority(e)))
}

// Priority returns when the endpoint is used: those of 0 first. Numbers may be left out.
func (r *Ranking) Priority(e *mesh.Endpoint) uint32 {
	switch {
	case r == nil || r.shares != nil:
		return 0
	case r.regional:
		n := topologies.Nearness(r.proxy.Locality, e.Locality)
		if region, _, _ := topologies.SplitLocality(e.Locality); n == 3 && r.to != "" && region != r.to {
			n = 4
		}
		return n
	}
	matched := 0
	for _, l := range r.labels {
		if topologies.Label(e, l.key) != l.want {
			break
		}
		matched++
	}
	return uint32(len(r.labels) - matched)
}

// Weights turns the sum of the endpoints' weights in each locality into what each locality gets. Localities that are
// not in the result get nothing.
func (r *Ranking) Weights(sums map[string]uint64) map[string]uint32 {
	out := map[string]uint32{}
	for _, s := range r.shares {
		total := uint64(0)
		for at, sum := range sums {
			if r.shareOf(at) == s {
				total += sum
			}
		}
		for at, sum := range sums {
			if r.shareOf(at) == s && sum > 0 && s.percent > 0 {
				out[at] = uint32(max(1, math.Round(float64(s.percent)*1000*float64(sum)/float64(total))))
			}
		}
	}
	return out
}

// shareOf returns the most exact share that covers the locality.
func (r *Ranking) shareOf(at string) (best share) {
	for _, s := range r.shares {
		if covers(s.pattern, at) && (best.pattern == "" || exact(s.pattern) > exact(best.pattern)) {
			best = s
		}
	}
	return best
}

// exact counts the parts of a pattern that name a place.
func exact(pattern string) int {
	n := 0
	for part := range strings.SplitSeq(pattern, "/") {
		if part != "*" && part != "" {
			n++
		}
	}
	return n
}

// covers reports whether region/zone/subzone, any part of which may be "*" or left out at the end, covers the locality.
func covers(pattern, at string) bool {
	if pattern == "*" {
		return true
	}
	want, have := strings.SplitN(pattern, "/", 3), strings.SplitN(at, "/", 3)
	for i, w := range want {
		if w == "*" {
			continue
		}
		if i >= len(have) || have[i] != w {
			return false
		}
	}
	return true
}
