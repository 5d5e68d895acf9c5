package protocol

import (
	"bytes"
	"maps"
	"slices"
	"time"

	federationv1 "github.com/isthmus-mesh/isthmus/api/federation/v1"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// life is when and how an origin was heard.
type life struct {
	since time.Duration // of our knowing it: nothing could be heard before
	last  time.Duration
	heard bool // last is set
	dead  bool // gossip thinks so
	fresh mesh.Freshness
	beat  uint64
	lanes map[mesh.ClusterID]uint64 // the newest beat, by who told
}

// behind is a digest that differs from ours.
type behind struct {
	peer  mesh.ClusterID
	hash  []byte
	at    time.Duration // when to ask
	delay time.Duration
}

const maxResyncDelay = 30 * time.Second

// begin starts an origin's grace.
func (o *origin) begin(now time.Duration) {
	o.alive.since, o.alive.fresh, o.alive.dead = now, mesh.Fresh, false
}

// age is how long nothing was heard that could have been.
func (l *life) age(now time.Duration) time.Duration {
	at := l.since
	if l.heard {
		at = max(at, l.last)
	}
	return now - at
}

// sign notes a sign of life.
func (c *Core) sign(o *origin) {
	o.alive.last, o.alive.heard, o.alive.dead = c.now, true, false
	c.refresh(o)
}

// refresh works out the freshness of a member.
func (c *Core) refresh(o *origin) {
	if c.members[o.id] == nil {
		return
	}
	lease := c.cfg.Lease
	if e := o.entries[slot{KindCluster, ""}]; e != nil && e.rec.TtlSeconds > 0 {
		lease = max(c.cfg.LateAfter, min(lease, time.Duration(e.rec.TtlSeconds)*time.Second))
	}
	f := mesh.Fresh
	switch age := o.alive.age(c.now); {
	case age > lease:
		f = mesh.Expired
	case age > c.cfg.LateAfter || o.alive.dead && age > c.cfg.LateAfter/2:
		f = mesh.Late
	}
	if f != o.alive.fresh {
		o.alive.fresh = f
		if f == mesh.Expired && c.cfg.mutant == silenceDeletes {
			c.dropSilent(o)
		}
		c.do(FreshnessChanged{Origin: o.id, Freshness: f, Since: c.outside(o.alive.lastHeard())})
	}
}

// outside is a time of ours on the clock of the driver.
func (c *Core) outside(t time.Duration) time.Duration { return t + c.clock - c.now }

func (l *life) lastHeard() time.Duration {
	if l.heard {
		return l.last
	}
	return l.since
}

func (c *Core) dead(name mesh.ClusterID) {
	if o := c.origins[name]; o != nil && c.members[name] != nil {
		o.alive.dead = true
		c.refresh(o)
	}
}

func (c *Core) link(e Link) {
	o := c.origins[e.Peer]
	if o == nil || c.members[e.Peer] == nil {
		return
	}
	if !e.Up {
		delete(c.links, e.Peer)
		return
	}
	if e.Path == "" {
		e.Path = "direct"
	}
	c.links[e.Peer] = e.Path
	delete(o.alive.lanes, e.Peer) // it may have started again, with a lower beat
	for _, o := range c.origins { // ask soon what could not be asked
		if o.behind != nil {
			o.behind.delay = c.cfg.ResyncAfter
			o.behind.at = min(o.behind.at, c.now+c.cfg.ResyncAfter)
		}
	}
}

// hear takes a digest: a sign of life of its origin, and a hint that we lack something.
func (c *Core) hear(e Heard) {
	d := e.Digest
	if d == nil || len(d.Hash) > 64 || d.Origin != "" && d.Origin != string(e.Origin) {
		return
	}
	if e.Origin != c.cfg.Name {
		o := c.origins[e.Origin]
		if o == nil || c.members[e.Origin] == nil {
			return
		}
		if o.alive.beats(e.From, d.Beat, e.From == e.Origin) {
			c.sign(o)
		}
		c.compare(o, e)
		return
	}
	c.compare(c.self, e)
}

// beats notes a beat and reports whether it is a sign of life. What one peer tells is compared only with what the
// same peer told before, so that none can spoil another's word. The first word of a relay is where it starts.
func (l *life) beats(from mesh.ClusterID, beat uint64, direct bool) bool {
	if direct && beat == 0 {
		return true
	}
	last, known := l.lanes[from]
	if known && beat <= last {
		return false
	}
	if l.lanes == nil {
		l.lanes = map[mesh.ClusterID]uint64{}
	}
	l.lanes[from] = beat
	if direct {
		l.beat = beat
		return true
	}
	if known && beat > l.beat && (l.beat == 0 || beat-l.beat < 1<<20) {
		l.beat = beat
	}
	return known
}

// compare notes that a peer's digest of an origin differs from ours in a way that it can tell us more.
func (c *Core) compare(o *origin, e Heard) {
	theirs := Mark{e.Digest.Epoch, e.Digest.Seq}
	equal := bytes.Equal(e.Digest.Hash, c.hash(o))
	if equal || c.cfg.mutant == neverAsks {
		if o.behind != nil && (e.From == o.id || e.From == o.behind.peer) {
			o.behind = nil
		}
		return
	}
	// An origin knows best. Others may be behind us: they will see it themselves. Of ourselves they may hold what we
	// have forgotten.
	if e.From != o.id && theirs.Less(o.public) && o != c.self {
		return
	}
	if o.behind == nil {
		delay := c.cfg.ResyncAfter
		if o == c.self && !o.public.Less(theirs) {
			delay *= 4 // most likely it is behind
		}
		o.behind = &behind{peer: e.From, hash: slices.Clone(e.Digest.Hash), at: c.now + delay, delay: delay}
		return
	}
	o.behind.peer, o.behind.hash = e.From, slices.Clone(e.Digest.Hash)
}

func (c *Core) tick() {
	for _, id := range append(slices.Clone(c.order), c.cfg.Name) {
		o := c.origins[id]
		if o == nil {
			continue
		}
		c.refresh(o)
		b := o.behind
		if b == nil || c.now < b.at {
			continue
		}
		if bytes.Equal(b.hash, c.hash(o)) || c.members[b.peer] == nil {
			o.behind = nil
			continue
		}
		peer := b.peer
		if _, up := c.links[peer]; !up { // whoever told cannot be asked: any other may have it too
			if len(c.links) == 0 {
				continue
			}
			peer = slices.Sorted(maps.Keys(c.links))[c.rng.IntN(len(c.links))]
		}
		c.do(Resync{Peer: peer, Origin: id})
		b.delay = min(2*b.delay, maxResyncDelay)
		b.at = c.now + b.delay/2 + time.Duration(c.rng.Int64N(int64(b.delay)))
	}
	if c.now >= c.nextSweep {
		c.nextSweep = c.now + c.sweepEvery()
		c.sweep()
	}
}

func (c *Core) sweepEvery() time.Duration {
	return min(time.Minute, max(time.Second, c.cfg.TombstoneTTL/4))
}

// sweep forgets tombstones at the end of their TTL. Those of members stay: an evicted key must not come back.
func (c *Core) sweep() {
	for _, id := range append(slices.Clone(c.order), c.cfg.Name) {
		o := c.origins[id]
		if o == nil || o.counts[KindTombstone] == 0 {
			continue
		}
		for _, s := range o.sorted() {
			if s.kind != KindTombstone || s.covered().kind == KindMember {
				continue
			}
			e := o.entries[s]
			ttl := max(time.Duration(e.rec.TtlSeconds)*time.Second, time.Minute)
			if c.now-e.at > min(ttl, 30*24*time.Hour) {
				c.remove(o, s)
			}
		}
	}
	for _, id := range slices.Sorted(maps.Keys(c.origins)) {
		o := c.origins[id]
		if d := o.departure(); d != nil && o != c.self && c.members[id] == nil && o.pending == nil && c.now-d.at > c.cfg.TombstoneTTL {
			c.putAway(id)
		}
	}
}

// hash returns the digest hash of an origin.
func (c *Core) hash(o *origin) []byte {
	if o.digest == nil {
		public := make([]*federationv1.Record, 0, len(o.entries))
		for s, e := range o.entries {
			if s.kind != KindTombstone && !private(s.kind) && e.aud.Everyone() {
				public = append(public, e.rec)
			}
		}
		o.digest = hashOf(public)
	}
	return o.digest
}
