package protocol

import (
	"bytes"
	"maps"
	"slices"

	federationv1 "github.com/isthmus-mesh/isthmus/api/federation/v1"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/federation/protocol/body"
)

// A cluster leaves by a tombstone for its own member record, signed by itself: its departure. It holds until the cluster
// says what it is anew, which it does when it joins again. Whoever vouched for it withdraws that, without a ban. The
// departure is kept after all else of the cluster is dropped, so that what others still hold of it does not come back.

// Withdrawn reports whether a tombstone of a member is the end of a membership that nobody is to blame for: one of the
// two left.
func Withdrawn(r *federationv1.Record) bool {
	return body.IsLeft(r.GetBody())
}

// farewell is the slot of the departure of a cluster.
func farewell(id mesh.ClusterID) slot { return slot{KindMember, string(id)}.tomb() }

// isFarewell reports whether the record is the departure of its origin.
func isFarewell(r *federationv1.Record) bool {
	return r.GetKind() == KindTombstone && r.GetKey() == KindMember+"/"+r.GetOrigin()
}

// departure is the departure that holds, or nil.
func (o *origin) departure() *entry {
	if o == nil {
		return nil
	}
	left, cluster := o.entries[farewell(o.id)], o.entries[slot{KindCluster, ""}]
	if left == nil || cluster != nil && Compare(cluster.rec, left.rec) > 0 {
		return nil
	}
	return left
}

// leave withdraws what the local cluster exports and says that it goes. Its members still hear it.
func (c *Core) leave() {
	c.leaving = true
	for _, s := range c.self.sorted() {
		if s.kind == KindService || s.kind == KindEndpoints {
			c.bury(s, c.self.entries[s].aud)
		}
	}
	c.say(KindTombstone, farewell(c.cfg.Name).key, body.Left)
}

// left drops every other cluster. From then on the local one is as it was before it ever joined.
func (c *Core) left() {
	c.leaving = false
	for _, name := range slices.Sorted(maps.Keys(c.self.vouches)) {
		c.withdraw(name)
	}
	for id, o := range c.origins {
		if o.pending != nil {
			c.unwait(id)
		}
	}
	if held := c.self.entries[slot{KindCluster, ""}]; held != nil {
		c.say(KindCluster, "", held.rec.Body) // newer than the departure: whoever lets us in again has it
	}
	c.settle()
	for _, id := range slices.Sorted(maps.Keys(c.origins)) {
		if o := c.origins[id]; o != c.self && c.members[id] == nil && o.departure() == nil {
			c.forget(id)
		}
	}
	if c.declared {
		c.reconcile()
	}
}

// withdraw ends what the local cluster vouched for, without a ban.
func (c *Core) withdraw(name mesh.ClusterID) {
	if c.self.vouches[name] != nil {
		c.say(KindTombstone, farewell(name).key, body.Left)
	}
}

// goodbye takes note that a member said that it goes. Those whom it let in stay: the local cluster vouches for them now.
func (c *Core) goodbye(id mesh.ClusterID) {
	o := c.origins[id]
	if o.departure() == nil {
		return
	}
	for _, name := range slices.Sorted(maps.Keys(o.vouches)) {
		if e := o.vouches[name]; c.members[name] != nil && e.verified && c.self.vouches[name] == nil && bytes.Equal(e.member.FederationKey, c.members[name].key) {
			c.say(KindMember, string(name), e.rec.Body)
		}
	}
	c.withdraw(id)
	c.unwait(id)
}

// back takes the cluster record with which a cluster that left is in again: it is newer than the departure, and somebody
// vouches for it. Nil: it is not that.
func (c *Core) back(r *federationv1.Record) *member {
	m, o := c.gone[mesh.ClusterID(r.Origin)], c.origins[mesh.ClusterID(r.Origin)]
	if d := o.departure(); m == nil || d == nil || r.Kind != KindCluster || Compare(r, d.rec) <= 0 {
		return nil
	}
	return m
}

// putAway drops what is kept of a cluster that left.
func (c *Core) putAway(id mesh.ClusterID) {
	o := c.origins[id]
	for _, s := range o.sorted() {
		c.remove(o, s)
	}
	delete(c.origins, id)
}
