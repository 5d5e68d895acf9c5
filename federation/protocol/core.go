package protocol

import (
	"bytes"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"time"

	federationv1 "github.com/isthmus-mesh/isthmus/api/federation/v1"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"google.golang.org/protobuf/proto"
)

// Core is the state machine. It is not safe for concurrent use; its driver owns it.
type Core struct {
	cfg     Config
	rng     *rand.Rand
	started bool
	now     time.Duration // never falls, and goes on where the driver's clock fell back
	clock   time.Duration // what the driver's clock said last
	start   time.Duration

	self    *origin
	origins map[mesh.ClusterID]*origin // the local one, members and pending ones
	members map[mesh.ClusterID]*member // whom we trust, ourselves not included
	gone    map[mesh.ClusterID]*member // who left, and is still vouched for
	order   []mesh.ClusterID           // their names, sorted
	links   map[mesh.ClusterID]string  // peers whose stream is up, and its path

	wanted   map[slot][]byte // what Declare said last
	declared bool
	leaving  bool // nothing more is said until the members had time to hear it

	out       []Action
	topology  bool // members or cluster records changed
	records   []*federationv1.Record
	nextSweep time.Duration
}

// New makes a Core. It does nothing before the first Step.
func New(cfg Config, state State) *Core {
	cfg = cfg.withDefaults()
	c := &Core{
		cfg: cfg, rng: rand.New(rand.NewPCG(cfg.Seed, 0x69737468)),
		origins: map[mesh.ClusterID]*origin{}, members: map[mesh.ClusterID]*member{}, links: map[mesh.ClusterID]string{},
	}
	c.self = c.originOf(cfg.Name)
	c.load(state)
	return c
}

func (c *Core) load(state State) {
	for _, r := range state.Records {
		s := slot{r.GetKind(), r.GetKey()}
		e, ref := newEntry(r)
		if private(s.kind) && r.Origin == string(c.cfg.Name) {
			if ref == nil {
				if s.kind == KindPending {
					c.originOf(mesh.ClusterID(s.key)).pending = e.member
				}
				c.self.put(s, e)
			}
			continue
		}
		if ref == nil {
			ref = validate(r)
		}
		if ref != nil { // not ours to read any more
			c.out = append(c.out, Remove{mesh.ClusterID(r.GetOrigin()), r.GetKind(), r.GetKey()})
			continue
		}
		o := c.originOf(mesh.ClusterID(r.Origin))
		if o.judge(s, r) != newer {
			c.out = append(c.out, Remove{o.id, s.kind, s.key})
			continue
		}
		o.put(s, e)
		if covered := s.covered(); s.kind == KindTombstone && o.older(covered, r) {
			o.drop(covered)
			c.out = append(c.out, Remove{o.id, covered.kind, covered.key})
		}
	}
	for _, id := range slices.Sorted(maps.Keys(state.Marks)) {
		if o := c.origins[id]; o != nil && o.mark.Less(state.Marks[id]) {
			o.mark = state.Marks[id]
		}
	}
	for id, at := range state.LastHeard {
		if o := c.origins[id]; o != nil {
			o.alive.last, o.alive.heard = at, true
		}
	}
	if c.self.mark.Epoch == 0 || c.cfg.mutant == marksLost {
		c.self.mark.Seq = 0
		c.self.mark.Epoch = 1
	}
	// A ledger restored from a copy would say again, with other bodies, numbers that were said before. Skipping a
	// random stretch keeps the two apart, so that digests differ and the loss is noticed.
	c.self.mark.Seq += 1 + c.rng.Uint64N(1<<24)
	c.settle()
	for _, id := range slices.Sorted(maps.Keys(c.origins)) {
		if id != c.cfg.Name && c.members[id] == nil && c.origins[id].pending == nil {
			c.forget(id)
		}
	}
}

// Step takes one event at the monotonic time now and returns what is to be done about it.
func (c *Core) Step(now time.Duration, ev Event) []Action {
	if !c.started {
		c.started, c.start, c.now, c.clock = true, now, now, now
		for _, o := range c.origins {
			o.begin(now)
		}
		c.nextSweep = now + c.sweepEvery()
	}
	c.now += max(0, now-c.clock)
	c.clock = now
	switch e := ev.(type) {
	case Tick:
		c.tick()
	case Declare:
		c.declare(e.Statements)
	case Admit:
		c.admit(e)
	case Approve:
		c.approve(e.Name)
	case Evict:
		c.evict(e.Name)
	case Drain:
		c.drain(e)
	case Leave:
		c.leave()
	case Left:
		c.left()
	case Joined:
		c.joined(e)
	case Received:
		c.receive(e.From, e.Way, e.Record)
	case Link:
		c.link(e)
	case Heard:
		c.hear(e)
	case Refused:
		c.reject(e.From, e.From, "", e.Refusal)
	case MemberDead:
		c.dead(e.Name)
	case Replicate:
		c.replicate(e)
	}
	if c.topology {
		c.topology = false
		c.connect()
	}
	out := c.out
	c.out = nil
	return out
}

func (c *Core) do(a ...Action) { c.out = append(c.out, a...) }

// originOf returns the origin, made when new.
func (c *Core) originOf(id mesh.ClusterID) *origin {
	o := c.origins[id]
	if o == nil {
		o = &origin{id: id, entries: map[slot]*entry{}, vouches: map[mesh.ClusterID]*entry{}, counts: map[string]int{}}
		o.begin(c.now)
		c.origins[id] = o
	}
	return o
}

// apply holds and persists a record that judge called newer, and drops what it covers.
func (c *Core) apply(o *origin, e *entry) {
	s := slot{e.rec.Kind, e.rec.Key}
	e.at = c.now
	o.put(s, e)
	c.records = nil
	c.do(Persist{e.rec})
	if covered := s.covered(); s.kind == KindTombstone && o.older(covered, e.rec) {
		c.remove(o, covered)
	}
	if s.kind == KindCluster {
		c.topology = true
	}
}

func (c *Core) remove(o *origin, s slot) {
	o.drop(s)
	c.records = nil
	c.do(Remove{o.id, s.kind, s.key})
}

// reject reports something that was not taken, and counts it against blame.
func (c *Core) reject(from, blame mesh.ClusterID, name string, ref *Refusal) {
	if len(name) > 512 {
		name = name[:512]
	}
	if o := c.origins[blame]; o != nil {
		if o.refused == nil {
			o.refused = map[string]uint64{}
		}
		if o.refused[ref.Reason]++; ref.Reason == ReasonOverCap {
			o.capped, o.cappedAt = true, c.now
		}
		o.problem = ref.Reason + ": " + ref.Message
	}
	c.do(Reject{From: from, Record: name, Reason: ref.Reason, Message: ref.Message})
}

// receive takes a record that came from a peer and reports whether it changed anything.
func (c *Core) receive(from mesh.ClusterID, way Way, in *federationv1.Record) bool {
	if ref := validate(in); ref != nil {
		c.reject(from, from, ResourceName(in), ref)
		return false
	}
	// Only what the signature covers is kept.
	r := &federationv1.Record{
		Origin: in.Origin, Kind: in.Kind, Key: in.Key, Epoch: in.Epoch, Seq: in.Seq,
		TtlSeconds: in.TtlSeconds, Body: in.Body, Signature: in.Signature,
	}
	id, name := mesh.ClusterID(r.Origin), ResourceName(r)
	if id == c.cfg.Name {
		return c.echo(from, r)
	}
	m := c.members[id]
	if m == nil {
		m = c.back(r)
	}
	if m == nil {
		if c.origins[id].departure() == nil && !isFarewell(r) { // what is on its way of a cluster that left is no news
			c.reject(from, from, name, c.stranger(id))
		}
		return false
	}
	o := c.originOf(id)
	if way != Gossip && from == id {
		c.sign(o) // the sender is alive
	}
	s := slot{r.Kind, r.Key}
	v := c.judge(o, s, r)
	if v == stale || v == same {
		return false
	}
	if !c.cfg.Verify(m.key, SignedBytes(r), r.Signature) {
		c.reject(from, from, name, refuse(ReasonBadSignature, "%s is not signed by the federation key of %s", name, id))
		return false
	}
	if o.jumps(r) {
		c.reject(from, id, name, refuse(ReasonJump, "%s %s is too far after %d.%d; if cluster %s is in order, take it by: isthmus peer approve %s", name, Version(r), o.mark.Epoch, o.mark.Seq, id, id))
		return false
	}
	e, ref := c.check(o, m, s, r, v)
	if ref != nil {
		c.reject(from, id, name, ref)
		return false
	}
	e.verified, o.leap = true, false
	if o.behind != nil { // it is on its way: asking now would have it sent twice
		o.behind.at = max(o.behind.at, c.now+c.cfg.ResyncAfter)
	}
	before := len(c.out)
	c.apply(o, e)
	if isFarewell(r) {
		c.goodbye(id)
	}
	if r.Kind == KindMember || r.Kind == KindTombstone && s.covered().kind == KindMember || c.members[id] == nil {
		c.settle()
	}
	return len(c.out) > before
}

// stranger says why nothing is taken of an origin.
func (c *Core) stranger(id mesh.ClusterID) *Refusal {
	switch {
	case c.banned(id):
		return refuse(ReasonEvicted, "cluster %s was evicted here", id)
	case c.origins[id] != nil:
		return refuse(ReasonNotApproved, "cluster %s waits for approval", id)
	}
	return refuse(ReasonUnknownOrigin, "no member vouches for cluster %s", id)
}

// check applies the rules about content to a record whose signature is good.
func (c *Core) check(o *origin, m *member, s slot, r *federationv1.Record, v verdict) (*entry, *Refusal) {
	if v == conflict {
		return nil, refuse(ReasonEquivocation, "%s said two different things as %s of %s", r.Origin, Version(r), s.kind+" "+s.key)
	}
	e, ref := newEntry(r)
	if ref != nil {
		return nil, ref
	}
	if !e.aud.Has(c.cfg.Name) && c.cfg.mutant != everyAudience {
		return nil, refuse(ReasonNotExported, "%s of %s is not exported to %s", s.kind+" "+s.key, r.Origin, c.cfg.Name)
	}
	switch s.kind {
	case KindMember:
		ref = c.checkVouch(e.member)
	case KindCluster:
		ref = c.checkCluster(m, r.Body)
	}
	if ref != nil {
		return nil, ref
	}
	held, covers := o.entries[s], s.kind == KindTombstone && o.entries[s.covered()] != nil
	grow := e.size()
	if held != nil {
		grow -= held.size()
	} else if len(o.entries) >= c.cfg.MaxRecords && !covers {
		return nil, refuse(ReasonOverCap, "%s has more than %d records", r.Origin, c.cfg.MaxRecords)
	}
	if grow > 0 && o.bytes+grow > c.cfg.MaxBytes && !covers {
		return nil, refuse(ReasonOverCap, "records of %s have more than %d bytes", r.Origin, c.cfg.MaxBytes)
	}
	return e, nil
}

// checkVouch keeps a member record from changing what is known.
func (c *Core) checkVouch(m *federationv1.Member) *Refusal {
	name, td := mesh.ClusterID(m.Name), mesh.TrustDomain(m.TrustDomain)
	if name == c.cfg.Name {
		if td != c.cfg.TrustDomain || !bytes.Equal(m.FederationKey, c.cfg.PublicKey) {
			return refuse(ReasonKeyChanged, "member record gives cluster %s, which is us, another key or trust domain", name)
		}
		return nil
	}
	if known := c.members[name]; known != nil {
		if td != known.td || !bytes.Equal(m.FederationKey, known.key) {
			return refuse(ReasonKeyChanged, "member record gives cluster %s another key or trust domain", name)
		}
		return nil
	}
	if c.sharing(td) {
		return nil
	}
	if td == c.cfg.TrustDomain {
		return refuse(ReasonTrustDomain, "trust domain %s of cluster %s is our own", td, name)
	}
	for _, other := range c.order {
		if c.members[other].td == td {
			return refuse(ReasonTrustDomain, "trust domain %s of cluster %s is that of cluster %s", td, name, other)
		}
	}
	return nil
}

// sharing reports whether several members may have the trust domain.
func (c *Core) sharing(td mesh.TrustDomain) bool {
	return c.cfg.SharedTrustDomain && td == c.cfg.TrustDomain
}

// maxTrusts bounds the trust domains that a cluster may say it trusts.
const maxTrusts = 4096

// checkCluster keeps a cluster record in line with the member record that introduced the cluster.
func (c *Core) checkCluster(m *member, body []byte) *Refusal {
	cl := &federationv1.Cluster{}
	if err := proto.Unmarshal(body, cl); err != nil {
		return refuse(ReasonMalformed, "cluster record of %s does not decode", m.name)
	}
	switch {
	case cl.TrustDomain != string(m.td):
		return refuse(ReasonClusterMismatch, "cluster record of %s claims trust domain %s, it was admitted with %s", m.name, quote(cl.TrustDomain), m.td)
	case !bytes.Equal(cl.FederationKey, m.key):
		return refuse(ReasonClusterMismatch, "cluster record of %s carries another federation key than it was admitted with", m.name)
	case len(cl.Gateways) > 64 || len(cl.Capabilities) > 64 || len(cl.Trusts) > maxTrusts:
		return refuse(ReasonTooLarge, "cluster record of %s has more than 64 gateways or capabilities, or trusts more than %d domains", m.name, maxTrusts)
	case len(cl.PodRanges) > 1024 || len(cl.ServiceRanges) > 1024:
		return refuse(ReasonTooLarge, "cluster record of %s has more than 1024 address ranges", m.name)
	case m.td == c.cfg.TrustDomain && c.self.cluster != nil && !bytes.Equal(cl.Bundle, c.self.cluster.Bundle):
		return refuse(ReasonClusterMismatch, "cluster record of %s carries other roots for the shared trust domain %s", m.name, m.td)
	}
	return nil
}

// joined takes what the issuer of our token told us.
func (c *Core) joined(e Joined) {
	issuer := e.Issuer
	if issuer == nil {
		for _, r := range e.Records {
			cl := &federationv1.Cluster{}
			if r.GetKind() == KindCluster && proto.Unmarshal(r.GetBody(), cl) == nil {
				issuer = &federationv1.Member{Name: r.Origin, TrustDomain: cl.TrustDomain, FederationKey: cl.FederationKey}
				break
			}
		}
	}
	if ref := checkMember(issuer); ref != nil {
		c.reject(c.cfg.Name, "", "", refuse(ReasonNoIssuer, "the reply to the join does not describe its issuer: %s", ref.Message))
		return
	}
	if !c.vouch(issuer) {
		return
	}
	// A record may come before the one that introduces its origin: go on as long as one more is taken.
	left := e.Records
	for taken := true; taken; {
		taken = false
		var later []*federationv1.Record
		for _, r := range left {
			if c.members[mesh.ClusterID(r.GetOrigin())] == nil && r.GetOrigin() != string(c.cfg.Name) {
				later = append(later, r)
				continue
			}
			taken = c.receive(mesh.ClusterID(issuer.Name), Join, r) || taken
		}
		left = later
	}
	for _, r := range left {
		c.receive(mesh.ClusterID(issuer.Name), Join, r) // says why not
	}
}

// String names the core in logs.
func (c *Core) String() string { return fmt.Sprintf("federation core of %s", c.cfg.Name) }
