package protocol

import (
	"bytes"
	"maps"
	"slices"
	"time"

	federationv1 "github.com/isthmus-mesh/isthmus/api/federation/v1"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/federation/protocol/audience"
	"google.golang.org/protobuf/proto"
)

// say signs and holds a new statement of the local cluster.
func (c *Core) say(kind, key string, body []byte) {
	ttl := c.cfg.Lease
	if kind == KindTombstone {
		ttl = c.cfg.TombstoneTTL
	}
	c.self.mark.Seq++
	if c.self.mark.Seq > MaxSeq {
		c.self.mark = Mark{c.self.mark.Epoch + 1, 1}
	}
	r := &federationv1.Record{
		Origin: string(c.cfg.Name), Kind: kind, Key: key, Epoch: c.self.mark.Epoch, Seq: c.self.mark.Seq,
		TtlSeconds: uint32(min(ttl/time.Second, 1<<31)), Body: body,
	}
	Sign(r, c.cfg.Sign)
	e, ref := newEntry(r)
	if ref != nil {
		c.reject(c.cfg.Name, c.cfg.Name, ResourceName(r), refuse(ReasonBadStatement, "%s", ref.Message))
		return
	}
	e.verified = true
	c.apply(c.self, e)
	if e.aud.Everyone() && proto.Size(r) <= MaxBroadcast {
		c.do(Broadcast{r})
	}
}

// bury deletes a statement of the local cluster for everyone in aud, and for all whom an earlier tombstone told.
func (c *Core) bury(s slot, aud audience.Set) {
	if t := c.self.entries[s.tomb()]; t != nil {
		aud = aud.Union(t.aud)
	}
	c.say(KindTombstone, s.tomb().key, aud.Body())
}

func (c *Core) declare(statements []Statement) {
	wanted := make(map[slot][]byte, len(statements))
	for _, st := range statements {
		s := slot{st.Kind, st.Key}
		if ref := c.checkStatement(st); ref != nil {
			c.reject(c.cfg.Name, c.cfg.Name, string(c.cfg.Name)+"/"+st.Kind+"/"+st.Key, ref)
			held := c.self.entries[s]
			if held == nil {
				continue
			}
			st.Body = held.rec.Body // the last good one stays
		}
		if _, twice := wanted[s]; !twice {
			wanted[s] = st.Body
		}
	}
	c.wanted, c.declared = wanted, true
	if !c.leaving && c.self.departure() != nil && len(c.members) > 0 {
		c.left() // it was ended in between
		return
	}
	c.reconcile()
}

func (c *Core) checkStatement(st Statement) *Refusal {
	if st.Kind != KindCluster && st.Kind != KindService && st.Kind != KindEndpoints {
		return refuse(ReasonBadStatement, "kind %s cannot be declared", quote(st.Kind))
	}
	if ref := checkKey(st.Kind, st.Key); ref != nil {
		return refuse(ReasonBadStatement, "%s", ref.Message)
	}
	if len(st.Body) > MaxBody {
		return refuse(ReasonBadStatement, "body of %s %s has %d bytes, %d are allowed", st.Kind, st.Key, len(st.Body), MaxBody)
	}
	if _, err := audienceOf(st.Kind, st.Body); err != nil {
		return refuse(ReasonBadStatement, "body of %s %s does not decode", st.Kind, st.Key)
	}
	if st.Kind == KindCluster {
		self := &member{name: c.cfg.Name, td: c.cfg.TrustDomain, key: c.cfg.PublicKey}
		cl := &federationv1.Cluster{}
		if err := proto.Unmarshal(st.Body, cl); err != nil {
			return refuse(ReasonBadStatement, "cluster record does not decode")
		}
		if cl.TrustDomain != string(self.td) || !bytes.Equal(cl.FederationKey, self.key) {
			return refuse(ReasonBadStatement, "cluster record does not carry our own trust domain and federation key")
		}
	}
	return nil
}

// reconcile makes what we said equal to what is wanted.
func (c *Core) reconcile() {
	if c.leaving {
		return
	}
	for _, s := range slices.SortedFunc(maps.Keys(c.wanted), slot.compare) {
		body := c.wanted[s]
		held := c.self.entries[s]
		// A new epoch is told by the cluster record at least, so that what an earlier leader still says is old.
		if held != nil && bytes.Equal(held.rec.Body, body) && (s.kind != KindCluster || held.rec.Epoch == c.self.mark.Epoch) {
			continue
		}
		aud, err := audienceOf(s.kind, body)
		if err != nil {
			continue
		}
		if held != nil && !aud.Covers(held.aud) {
			c.bury(s, held.aud) // for those who may not see what comes next
		}
		c.say(s.kind, s.key, body)
	}
	var gone []slot
	for s := range c.self.entries {
		if _, ok := c.wanted[s]; !ok && (s.kind == KindService || s.kind == KindEndpoints) {
			gone = append(gone, s)
		}
	}
	slices.SortFunc(gone, slot.compare)
	for _, s := range gone {
		c.bury(s, c.self.entries[s].aud)
	}
}

// echo takes a record of our own that came back. If it is newer than what we hold, our state was lost: the number
// is ours, we do not remember it.
func (c *Core) echo(from mesh.ClusterID, r *federationv1.Record) bool {
	s, name := slot{r.Kind, r.Key}, ResourceName(r)
	v := c.self.judge(s, r)
	if v == same {
		return false
	}
	if !c.cfg.Verify(c.cfg.PublicKey, SignedBytes(r), r.Signature) {
		c.reject(from, from, name, refuse(ReasonBadSignature, "%s is not signed by our own federation key", name))
		return false
	}
	e, ref := newEntry(r)
	if ref != nil {
		return false // signed by us, and of no use
	}
	if c.self.jumps(r) {
		c.reject(from, from, name, refuse(ReasonJump, "%s %s is signed by our key, which never got that far: somebody else has it", name, Version(r)))
		return false
	}
	if v == stale {
		return c.cover(s, e)
	}
	if e.member != nil {
		if ref := c.checkVouch(e.member); ref != nil {
			c.reject(from, c.cfg.Name, name, ref)
			return false
		}
	}
	lost := v == conflict || c.self.mark.Less(Mark{r.Epoch, r.Seq}) || c.self.older(s, r)
	if s.kind != KindTombstone {
		lost = lost || c.self.older(s.tomb(), r)
	}
	if lost { // before apply: what we hold now is signed anew, what came back is not
		c.raise(r.Epoch, s, v)
	}
	if v == newer && c.self.judge(s, r) == newer {
		e.verified, e.adopted = true, true
		c.apply(c.self, e)
	}
	if c.declared {
		c.reconcile()
	}
	c.settle()
	return true
}

// raise begins an epoch after every one known and says again what we hold, except what the record that came back
// (in slot back, when it is newer) replaces.
func (c *Core) raise(seen uint64, back slot, v verdict) {
	if c.cfg.mutant == epochStays {
		return
	}
	// A cluster that loses its state twice may begin the same epoch twice: see load for the random stretch.
	c.self.mark = Mark{max(c.self.mark.Epoch, seen) + 1, c.rng.Uint64N(1 << 24)}
	skip := map[slot]bool{}
	if v == newer {
		skip[back] = true
		if back.kind == KindTombstone {
			skip[back.covered()] = true
		} else {
			skip[back.tomb()] = true
		}
	}
	for _, s := range c.self.sorted() {
		e := c.self.entries[s]
		if e == nil || skip[s] || private(s.kind) || s == farewell(c.cfg.Name) && !c.leaving || e.adopted && (v != conflict || s != back) {
			continue
		}
		if s.kind == KindTombstone && c.self.entries[s.covered()] != nil {
			continue // the live record is newer and stays so
		}
		c.say(s.kind, s.key, e.rec.Body)
	}
}

// cover deletes an old statement of ours that somebody still holds and nothing newer would reach: its audience is
// not that of the present record, and the tombstone is forgotten.
func (c *Core) cover(s slot, old *entry) bool {
	if s.kind != KindService && s.kind != KindEndpoints {
		return false
	}
	live, tomb := c.self.entries[s], c.self.entries[s.tomb()]
	if live != nil && live.aud.Covers(old.aud) || tomb != nil && Compare(tomb.rec, old.rec) > 0 && tomb.aud.Covers(old.aud) {
		return false
	}
	aud := old.aud
	if live != nil {
		aud = aud.Union(live.aud)
	}
	c.bury(s, aud)
	if live != nil {
		c.say(s.kind, s.key, live.rec.Body)
	}
	return true
}
