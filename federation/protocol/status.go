package protocol

import (
	"cmp"
	"crypto/ed25519"
	"maps"
	"slices"
	"time"

	federationv1 "github.com/isthmus-mesh/isthmus/api/federation/v1"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/federation/protocol/body"
)

// cappedFor is how long a peer counts as over its caps: what it says too much comes again with every resync.
const cappedFor = 5 * time.Minute

// PeerState is where a cluster stands with us.
type PeerState string

// The states of peers.
const (
	Pending  PeerState = "pending"
	Approved PeerState = "approved"
	Evicted  PeerState = "evicted"
	Gone     PeerState = "left"
)

// Peer is what is known of another cluster, for status and for the trust of connections.
type Peer struct {
	Name          mesh.ClusterID
	TrustDomain   mesh.TrustDomain
	FederationKey ed25519.PublicKey
	TokenID       string
	VouchedBy     []mesh.ClusterID // sorted by distance from us
	State         PeerState
	Freshness     mesh.Freshness
	LastHeard     time.Duration // on the clock of Step; when it became known if Heard is false
	Heard         bool
	Path          string                // "direct", "via X"; empty: no stream
	Cluster       *federationv1.Cluster // its cluster record; nil when it has not come yet
	Epoch, Seq    uint64
	Services      int
	Endpoints     int // endpoints records: one for each service that has some
	Tombstones    int
	Bytes         int
	Refused       map[string]uint64 // things not taken of it since the start, by reason
	OverCap       bool              // it said more than its caps within the last five minutes
	LastProblem   string
	Drain         body.Ramp // of the traffic to it
}

// Peers returns every other cluster that is a member, waits, was evicted, or left not long ago, sorted by name.
func (c *Core) Peers() []Peer {
	var out []Peer
	drains := c.Drains()
	for id, o := range c.origins {
		m := c.members[id]
		if id != c.cfg.Name && m == nil && o.pending == nil && o.departure() != nil {
			out = append(out, Peer{Name: id, State: Gone})
		}
		if id == c.cfg.Name || m == nil && o.pending == nil {
			continue
		}
		p := Peer{
			Name: id, State: Pending, Freshness: o.alive.fresh, LastHeard: c.outside(o.alive.lastHeard()), Heard: o.alive.heard,
			Path: c.links[id], Cluster: o.cluster, Epoch: o.mark.Epoch, Seq: o.mark.Seq,
			Services: o.counts[KindService], Endpoints: o.counts[KindEndpoints], Tombstones: o.counts[KindTombstone],
			Bytes: o.bytes, Refused: maps.Clone(o.refused), OverCap: o.capped && c.now-o.cappedAt < cappedFor, LastProblem: o.problem,
		}
		if m != nil {
			p.State, p.TrustDomain, p.FederationKey = Approved, m.td, m.key
			p.Drain = drains[id]
			p.TokenID, p.VouchedBy = m.tokenID, slices.Clone(m.vouchers)
		} else {
			p.TrustDomain, p.FederationKey, p.TokenID = mesh.TrustDomain(o.pending.TrustDomain), o.pending.FederationKey, o.pending.TokenId
		}
		out = append(out, p)
	}
	for name, by := range c.evicted() {
		out = append(out, Peer{Name: name, State: Evicted, VouchedBy: []mesh.ClusterID{by}, LastProblem: "evicted by " + string(by)})
	}
	slices.SortFunc(out, func(a, b Peer) int { return cmp.Compare(a.Name, b.Name) })
	return out
}

// evicted returns the names that are out because of a tombstone, and whose it is: ours first.
func (c *Core) evicted() map[mesh.ClusterID]mesh.ClusterID {
	out := map[mesh.ClusterID]mesh.ClusterID{}
	for _, id := range append([]mesh.ClusterID{c.cfg.Name}, c.order...) {
		o := c.origins[id]
		if o == nil || o.counts[KindTombstone] == 0 {
			continue
		}
		for s := range o.entries {
			name := mesh.ClusterID(s.covered().key)
			if s.kind != KindTombstone || s.covered().kind != KindMember || name == c.cfg.Name || c.members[name] != nil || c.origins[name] != nil {
				continue
			}
			if o.vouches[name] == nil && out[name] == "" && !Withdrawn(o.entries[s].rec) {
				out[name] = id
			}
		}
	}
	return out
}

// Records returns what is held of us and of every member, sorted by resource name. Neither the slice nor the
// records may be changed. An equal slice is returned until something changes.
func (c *Core) Records() []*federationv1.Record {
	if c.records != nil {
		return c.records
	}
	type named struct {
		name string
		rec  *federationv1.Record
	}
	var all []named
	for id, o := range c.origins {
		if id != c.cfg.Name && c.members[id] == nil && o.departure() == nil {
			continue
		}
		for s, e := range o.entries {
			if !private(s.kind) {
				all = append(all, named{ResourceName(e.rec), e.rec})
			}
		}
	}
	slices.SortFunc(all, func(a, b named) int { return cmp.Compare(a.name, b.name) })
	c.records = make([]*federationv1.Record, len(all))
	for i, n := range all {
		c.records[i] = n.rec
	}
	return c.records
}

// RecordsFor returns the part of Records that the peer may see. Its own come back to it: that is how a cluster
// learns that it lost state. A stream must carry at least the records of its two ends; those of others may be left to
// their own streams and to Resync.
func (c *Core) RecordsFor(to mesh.ClusterID) []*federationv1.Record {
	var out []*federationv1.Record
	for _, r := range c.Records() {
		o := c.origins[mesh.ClusterID(r.Origin)]
		if o.id == to || o.entries[slot{r.Kind, r.Key}].aud.Has(to) {
			out = append(out, r)
		}
	}
	return out
}

// OwnDigest is the local cluster's sign of life. Send it once a second.
func (c *Core) OwnDigest() *federationv1.Digest { return c.digestOf(c.self) }

// Digests returns one digest for us and every member, sorted by origin. That of a member carries the newest beat we
// know, so that it can be relayed.
func (c *Core) Digests() []*federationv1.Digest {
	out := make([]*federationv1.Digest, 0, len(c.order)+1)
	for _, id := range slices.Sorted(maps.Keys(c.origins)) {
		if id == c.cfg.Name || c.members[id] != nil {
			out = append(out, c.digestOf(c.origins[id]))
		}
	}
	return out
}

func (c *Core) digestOf(o *origin) *federationv1.Digest {
	d := &federationv1.Digest{
		Origin: string(o.id), Epoch: o.public.Epoch, Seq: o.public.Seq, Hash: slices.Clone(c.hash(o)), Beat: o.alive.beat,
	}
	if o == c.self {
		d.Beat = c.cfg.Beat + 1 + uint64((c.now-c.start)/time.Second)
	}
	return d
}

// Mark returns how far an origin has come; zero when nothing is known of it.
func (c *Core) Mark(id mesh.ClusterID) Mark {
	if o := c.origins[id]; o != nil {
		return o.mark
	}
	return Mark{}
}
