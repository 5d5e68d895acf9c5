package views

import (
	"cmp"
	"slices"
	"time"

	networking "istio.io/api/networking/v1"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	sees "github.com/isthmus-mesh/isthmus/discovery/translate/scope"
)

// patience is how long rules are held back that would answer requests by 503, because they lead to a subset or a host that is
// not there, or no longer: whoever changes several objects changes one after the other. It counts from the last change of any
// rule, but never lasts longer than patienceTimes as long. After it the mistake takes effect.
const (
	patience      = 5 * time.Second
	patienceTimes = 6
)

// holder keeps rules that fit together while others come and go one by one.
type holder struct {
	patience time.Duration
	routes   []*mesh.VirtualService  // in effect
	rules    []*mesh.DestinationRule // in effect
	since    map[mesh.ObjectRef]time.Time

	saidRoutes []*mesh.VirtualService // the last time, in effect or not
	saidRules  []*mesh.DestinationRule
	changed    time.Time // when they last were others
}

// subset is one of a host; without a name the host itself.
type subset struct{ host, name string }

// apply returns the snapshot with the rules that are in effect now, and until when some are held back, which is zero for none.
// The first snapshot is taken as it is.
func (h *holder) apply(snap *mesh.Snapshot, now time.Time) (*mesh.Snapshot, time.Time) {
	if !slices.Equal(h.saidRoutes, snap.VirtualServices) || !slices.Equal(h.saidRules, snap.DestinationRules) {
		h.saidRoutes, h.saidRules, h.changed = snap.VirtualServices, snap.DestinationRules, now
	}
	if h.since == nil || slices.Equal(h.routes, snap.VirtualServices) && slices.Equal(h.rules, snap.DestinationRules) {
		h.routes, h.rules, h.since = snap.VirtualServices, snap.DestinationRules, map[mesh.ObjectRef]time.Time{}
		return snap, time.Time{}
	}
	p := &pending{holder: h, now: now, since: map[mesh.ObjectRef]time.Time{}}
	routes := p.keepRoutes(snap)
	rules := p.keepRules(snap, routes)
	same := slices.Equal(h.routes, routes) && slices.Equal(h.rules, rules)
	h.routes, h.rules, h.since = routes, rules, p.since
	out := *snap
	out.VirtualServices, out.DestinationRules = routes, rules
	if snap.Delta != nil {
		delta := *snap.Delta
		delta.Config = delta.Config || !same // what was held back may have its turn with a change of endpoints
		out.Delta = &delta
	}
	return &out, p.until
}

// pending is one decision on what is in effect.
type pending struct {
	*holder
	now, until time.Time
	since      map[mesh.ObjectRef]time.Time
}

// hold reports whether a change of the object is still to wait.
func (p *pending) hold(o mesh.ObjectRef) bool {
	o.Source = ""
	at, known := p.holder.since[o]
	if !known {
		at = p.now
	}
	p.since[o] = at
	end := p.changed.Add(p.patience)
	if most := at.Add(patienceTimes * p.patience); most.Before(end) {
		end = most
	}
	if !p.now.Before(end) {
		return false
	}
	if p.until.IsZero() || end.Before(p.until) {
		p.until = end
	}
	return true
}

// keepRoutes returns the VirtualServices that are in effect: instead of one that leads nowhere the one before, if any.
func (p *pending) keepRoutes(snap *mesh.Snapshot) []*mesh.VirtualService {
	defined := subsetsIn(snap.DestinationRules, p.rules)
	was := map[mesh.ObjectRef]*mesh.VirtualService{}
	for _, vs := range p.routes {
		was[named(vs.Object)] = vs
	}
	out := make([]*mesh.VirtualService, 0, len(snap.VirtualServices))
	for _, vs := range snap.VirtualServices {
		old := was[named(vs.Object)]
		if old == vs || vs.GatewayAPI || !leadsNowhere(snap, vs, defined) || !p.hold(vs.Object) {
			out = append(out, vs)
		} else if old != nil {
			out = append(out, old)
		}
	}
	if slices.Equal(out, snap.VirtualServices) {
		return snap.VirtualServices
	}
	return out
}

// keepRules returns the DestinationRules that are in effect: one that is gone, or lost a subset, stays as it was while a
// VirtualService leads to what no other defines.
func (p *pending) keepRules(snap *mesh.Snapshot, routes []*mesh.VirtualService) []*mesh.DestinationRule {
	rules, defined := snap.DestinationRules, subsetsIn(snap.DestinationRules)
	missing := map[subset]bool{}
	for _, vs := range routes {
		for x := range subsetsOf(vs) {
			if x.name != "" && !defines(defined, x) {
				missing[x] = true
			}
		}
	}
	if len(missing) == 0 {
		return rules
	}
	for _, old := range p.rules {
		needed := false
		for x := range missing {
			needed = needed || defines(subsetsIn([]*mesh.DestinationRule{old}), x)
		}
		if !needed || slices.Contains(rules, old) || !p.hold(old.Object) {
			continue
		}
		at, there := slices.BinarySearchFunc(rules, old, func(a, b *mesh.DestinationRule) int {
			return cmp.Or(cmp.Compare(a.Object.Namespace, b.Object.Namespace), cmp.Compare(a.Object.Name, b.Object.Name))
		})
		if there { // as it is now it comes first: of the old one only the subsets count that it does not have
			at++
		}
		rules = slices.Insert(slices.Clone(rules), at, old)
	}
	return rules
}

func named(o mesh.ObjectRef) mesh.ObjectRef {
	o.Source = ""
	return o
}

func leadsNowhere(snap *mesh.Snapshot, vs *mesh.VirtualService, defined map[subset]bool) bool {
	for x := range subsetsOf(vs) {
		if x.name != "" && !defines(defined, x) || snap.Service(x.host) == nil {
			return true
		}
	}
	return false
}

// defines reports whether some rule for the host, or for a wildcard over it, defines the subset.
func defines(defined map[subset]bool, x subset) bool {
	if defined[x] {
		return true
	}
	for d := range defined {
		if d.name == x.name && d.host[0] == '*' && sees.Covers(d.host, x.host) {
			return true
		}
	}
	return false
}

func subsetsIn(lists ...[]*mesh.DestinationRule) map[subset]bool {
	out := map[subset]bool{}
	for _, list := range lists {
		for _, d := range list {
			for _, s := range d.Spec.GetSubsets() {
				if d.Spec.GetHost() != "" {
					out[subset{d.Spec.GetHost(), s.GetName()}] = true
				}
			}
		}
	}
	return out
}

// subsetsOf returns where a VirtualService sends requests and connections; copies of requests may get lost.
func subsetsOf(vs *mesh.VirtualService) map[subset]bool {
	out := map[subset]bool{}
	add := func(d *networking.Destination) {
		if d.GetHost() != "" {
			out[subset{d.GetHost(), d.GetSubset()}] = true
		}
	}
	for _, h := range vs.Spec.GetHttp() {
		for _, d := range h.GetRoute() {
			add(d.GetDestination())
		}
	}
	for _, t := range vs.Spec.GetTls() {
		for _, d := range t.GetRoute() {
			add(d.GetDestination())
		}
	}
	for _, t := range vs.Spec.GetTcp() {
		for _, d := range t.GetRoute() {
			add(d.GetDestination())
		}
	}
	return out
}
