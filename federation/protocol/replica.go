package protocol

import (
	"maps"
	"slices"
	"time"

	federationv1 "github.com/isthmus-mesh/isthmus/api/federation/v1"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// Replicate is what the leader of the local cluster holds, told to a replica that follows it: a record, or the name of
// one that it dropped. The leader has judged it; signatures of those who vouch are checked all the same. A core that
// is stepped with this, with Heard and with Tick alone signs nothing.
type Replicate struct {
	Record *federationv1.Record
	Gone   string // resource name
}

func (Replicate) event() {}

// replicate takes the leader's word. That it dropped a record means something for clusters that waited and for drains, only:
// everything else goes by a tombstone, or with its origin. So an empty leader takes nothing away.
func (c *Core) replicate(e Replicate) {
	if e.Record == nil {
		origin, kind, key, err := ParseResourceName(e.Gone)
		if err == nil && kind == KindPending && origin == c.cfg.Name {
			c.unwait(mesh.ClusterID(key))
		}
		if err == nil && kind == KindDrain && origin == c.cfg.Name {
			c.undrain(mesh.ClusterID(key))
		}
		return
	}
	r := e.Record
	s := slot{r.GetKind(), r.GetKey()}
	x, ref := newEntry(r)
	if ref == nil && !private(s.kind) {
		ref = validate(r)
	}
	if ref != nil {
		c.reject(c.cfg.Name, c.cfg.Name, ResourceName(r), ref)
		return
	}
	o := c.originOf(mesh.ClusterID(r.Origin))
	if private(s.kind) {
		if o == c.self {
			if s.kind == KindPending {
				c.originOf(mesh.ClusterID(s.key)).pending = x.member
			}
			c.apply(o, x)
		}
		return
	}
	if v := o.judge(s, r); v != newer && v != conflict {
		return
	}
	c.apply(o, x)
	if s.kind == KindMember || s.kind == KindTombstone && s.covered().kind == KindMember {
		c.settle()
	}
}

// State returns everything that is held, as another Core could start from it.
func (c *Core) State() State {
	s := State{Marks: map[mesh.ClusterID]Mark{}, LastHeard: map[mesh.ClusterID]time.Duration{}}
	for _, id := range slices.Sorted(maps.Keys(c.origins)) {
		o := c.origins[id]
		s.Marks[id] = o.mark
		if o.alive.heard {
			s.LastHeard[id] = c.outside(o.alive.last)
		}
		for _, slot := range o.sorted() {
			s.Records = append(s.Records, o.entries[slot].rec)
		}
	}
	return s
}

// Join adds what other holds: of each record the newest, of each origin the furthest mark and the latest word. The
// clusters that wait for approval, and the drains, are those of other, if it says anything of the local cluster.
func (s State) Join(local mesh.ClusterID, other State) State {
	out := State{Marks: maps.Clone(s.Marks), LastHeard: maps.Clone(s.LastHeard)}
	if out.Marks == nil {
		out.Marks = map[mesh.ClusterID]Mark{}
	}
	if out.LastHeard == nil {
		out.LastHeard = map[mesh.ClusterID]time.Duration{}
	}
	for id, m := range other.Marks {
		if out.Marks[id].Less(m) {
			out.Marks[id] = m
		}
	}
	for id, at := range other.LastHeard {
		if have, ok := out.LastHeard[id]; !ok || have < at {
			out.LastHeard[id] = at
		}
	}
	decides := slices.ContainsFunc(other.Records, func(r *federationv1.Record) bool { return r.Origin == string(local) })
	newest := map[string]*federationv1.Record{}
	for _, r := range s.Records {
		if !private(r.Kind) || !decides {
			newest[ResourceName(r)] = r
		}
	}
	for _, r := range other.Records {
		if have := newest[ResourceName(r)]; have == nil || Compare(have, r) < 0 {
			newest[ResourceName(r)] = r
		}
	}
	for _, name := range slices.Sorted(maps.Keys(newest)) {
		out.Records = append(out.Records, newest[name])
	}
	return out
}
