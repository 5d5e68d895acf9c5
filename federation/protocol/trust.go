package protocol

import (
	"bytes"
	"maps"
	"slices"

	federationv1 "github.com/isthmus-mesh/isthmus/api/federation/v1"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/federation/protocol/audience"
	"google.golang.org/protobuf/proto"
)

// banned reports whether the local operator evicted the name, and did not admit it again.
func (c *Core) banned(id mesh.ClusterID) bool {
	s := slot{KindMember, string(id)}
	t := c.self.entries[s.tomb()]
	return t != nil && c.self.entries[s] == nil && !Withdrawn(t.rec) && c.cfg.mutant != banForgotten
}

// trusted follows member records from the local cluster. Nearer vouchers win, then those first in order. Members that
// left are not among the found, and vouch for nobody.
func (c *Core) trusted() (found, gone map[mesh.ClusterID]*member) {
	found, gone = map[mesh.ClusterID]*member{}, map[mesh.ClusterID]*member{}
	domains := map[mesh.TrustDomain]bool{c.cfg.TrustDomain: true}
	self := &member{name: c.cfg.Name, td: c.cfg.TrustDomain, key: c.cfg.PublicKey}
	for queue := []*member{self}; len(queue) > 0; queue = queue[1:] {
		from := queue[0]
		o := c.origins[from.name]
		if o == nil {
			continue
		}
		for _, name := range slices.Sorted(maps.Keys(o.vouches)) {
			e := o.vouches[name]
			if name == c.cfg.Name || c.banned(name) {
				continue
			}
			if !e.verified {
				if e.verified = c.cfg.Verify(from.key, SignedBytes(e.rec), e.rec.Signature); !e.verified {
					continue
				}
			}
			td := mesh.TrustDomain(e.member.TrustDomain)
			if known := found[name]; known != nil {
				if known.td == td && bytes.Equal(known.key, e.member.FederationKey) {
					known.vouchers = append(known.vouchers, from.name)
				}
				continue
			}
			if domains[td] && !c.sharing(td) {
				continue
			}
			if d := c.origins[name].departure(); d != nil && c.cfg.Verify(e.member.FederationKey, SignedBytes(d.rec), d.rec.Signature) {
				gone[name] = &member{name: name, td: td, key: e.member.FederationKey}
				continue
			}
			domains[td] = true
			m := &member{name: name, td: td, key: e.member.FederationKey, tokenID: e.member.TokenId, vouchers: []mesh.ClusterID{from.name}}
			found[name] = m
			queue = append(queue, m)
		}
	}
	return found, gone
}

// settle works out anew who is a member: those that are out lose all they said, those that are in are asked for.
func (c *Core) settle() {
	old := c.members
	next, gone := c.trusted()
	c.members, c.gone = next, gone
	c.order = slices.Sorted(maps.Keys(next))
	changed := false
	for _, name := range slices.Sorted(maps.Keys(old)) {
		if m := next[name]; m == nil || !bytes.Equal(m.key, old[name].key) || m.td != old[name].td {
			c.forget(name)
			changed = true
		}
	}
	for _, name := range c.order {
		m := old[name]
		if m != nil && bytes.Equal(m.key, next[name].key) && m.td == next[name].td {
			continue
		}
		changed = true
		c.originOf(name).begin(c.now)
		for _, peer := range slices.Sorted(maps.Keys(c.links)) {
			c.do(Resync{Peer: peer, Origin: name})
		}
	}
	if changed {
		c.topology, c.records = true, nil
	}
}

// forget drops all that an origin said, but that it left.
func (c *Core) forget(name mesh.ClusterID) {
	c.undrain(name)
	o := c.origins[name]
	if o == nil {
		return
	}
	left := o.departure()
	for _, s := range o.sorted() {
		if left == nil || s != farewell(name) {
			c.remove(o, s)
		}
	}
	if left == nil {
		delete(c.origins, name)
	}
	delete(c.links, name)
	if o.connected != nil {
		o.connected = nil
		c.do(Disconnect{name})
	}
}

// connect brings the wanted connections in line with members and their cluster records.
func (c *Core) connect() {
	for _, name := range c.order {
		o := c.origins[name]
		if o == nil {
			continue
		}
		if o.cluster == nil || len(o.cluster.Gateways) == 0 {
			if o.connected != nil {
				o.connected = nil
				c.do(Disconnect{name})
			}
			continue
		}
		want := &Connect{Peer: name, Gateways: o.cluster.Gateways, TrustDomain: c.members[name].td}
		if o.connected != nil && o.connected.TrustDomain == want.TrustDomain && slices.Equal(o.connected.Gateways, want.Gateways) {
			continue
		}
		o.connected = want
		c.do(*want)
	}
}

// CanAdmit reports whether a cluster could be admitted under this name, trust domain and key; the error is a
// *Refusal whose message is for the one who asks. The same member may be admitted again.
func (c *Core) CanAdmit(m *federationv1.Member) error {
	if ref := c.canAdmit(m); ref != nil {
		return ref
	}
	return nil
}

func (c *Core) canAdmit(m *federationv1.Member) *Refusal {
	if ref := checkMember(m); ref != nil {
		return ref
	}
	if mesh.ClusterID(m.Name) == c.cfg.Name {
		return refuse(ReasonNameTaken, "cluster name %s is that of the issuer itself", m.Name)
	}
	if o := c.origins[mesh.ClusterID(m.Name)]; o != nil && o.pending != nil {
		if o.pending.TrustDomain != m.TrustDomain || !bytes.Equal(o.pending.FederationKey, m.FederationKey) {
			return refuse(ReasonNameTaken, "cluster name %s is taken by another key that waits for approval", m.Name)
		}
	}
	ref := c.checkVouch(m)
	if ref != nil && ref.Reason == ReasonKeyChanged {
		return refuse(ReasonNameTaken, "cluster name %s is taken by another key", m.Name)
	}
	return ref
}

// vouch makes the member record of a cluster, unless it says so already, and drops its waiting.
func (c *Core) vouch(m *federationv1.Member) bool {
	if ref := c.canAdmit(m); ref != nil {
		c.reject(c.cfg.Name, c.cfg.Name, string(c.cfg.Name)+"/"+KindMember+"/"+m.GetName(), ref)
		return false
	}
	if held := c.self.vouches[mesh.ClusterID(m.Name)]; held == nil || !bytes.Equal(held.member.FederationKey, m.FederationKey) || held.member.TrustDomain != m.TrustDomain {
		body, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
		if err != nil {
			c.reject(c.cfg.Name, c.cfg.Name, m.Name, refuse(ReasonBadStatement, "member %s does not encode: %v", m.Name, err))
			return false
		}
		c.say(KindMember, m.Name, body)
	}
	c.unwait(mesh.ClusterID(m.Name))
	c.settle()
	return true
}

// unwait ends the waiting of a pending cluster.
func (c *Core) unwait(name mesh.ClusterID) {
	if o := c.origins[name]; o != nil && o.pending != nil {
		o.pending = nil
		c.remove(c.self, slot{KindPending, string(name)})
	}
}

func (c *Core) admit(e Admit) {
	name := mesh.ClusterID(e.Member.GetName())
	if !e.Pending || c.members[name] != nil {
		if c.vouch(e.Member) && e.ClusterRecord != nil {
			c.receive(name, Join, e.ClusterRecord)
		}
		return
	}
	if ref := c.canAdmit(e.Member); ref != nil {
		c.reject(c.cfg.Name, c.cfg.Name, string(c.cfg.Name)+"/"+KindPending+"/"+string(name), ref)
		return
	}
	body, err := proto.MarshalOptions{Deterministic: true}.Marshal(e.Member)
	if err != nil {
		return
	}
	o := c.originOf(name)
	if o.pending == nil {
		o.pending = e.Member
		c.apply(c.self, &entry{
			rec:    &federationv1.Record{Origin: string(c.cfg.Name), Kind: KindPending, Key: string(name), Body: body},
			member: e.Member, verified: true, aud: audience.Set{},
		})
	}
	if ref := c.introduce(o, e.Member, e.ClusterRecord); ref != nil {
		c.reject(name, name, ResourceName(e.ClusterRecord), ref)
	}
}

// introduce holds the cluster record of a pending cluster.
func (c *Core) introduce(o *origin, m *federationv1.Member, r *federationv1.Record) *Refusal {
	if r == nil {
		return nil
	}
	if ref := validate(r); ref != nil {
		return ref
	}
	as := &member{name: o.id, td: mesh.TrustDomain(m.TrustDomain), key: m.FederationKey}
	if r.Origin != m.Name || r.Kind != KindCluster || !c.cfg.Verify(as.key, SignedBytes(r), r.Signature) {
		return refuse(ReasonBadSignature, "cluster record of %s is not signed by its federation key", m.Name)
	}
	if ref := c.checkCluster(as, r.Body); ref != nil {
		return ref
	}
	if o.judge(slot{r.Kind, r.Key}, r) == newer {
		e, ref := newEntry(r)
		if ref != nil {
			return ref
		}
		e.verified = true
		c.apply(o, e)
	}
	return nil
}

func (c *Core) approve(name mesh.ClusterID) {
	o := c.origins[name]
	if o == nil || o.pending == nil {
		if c.members[name] == nil {
			c.reject(c.cfg.Name, "", string(name), refuse(ReasonUnknownPeer, "cluster %s does not wait for approval", quote(string(name))))
		} else {
			c.origins[name].leap = true
		}
		return
	}
	c.vouch(o.pending)
}

func (c *Core) evict(name mesh.ClusterID) {
	if !mesh.IsLabel(string(name)) || name == c.cfg.Name {
		c.reject(c.cfg.Name, "", quote(string(name)), refuse(ReasonUnknownPeer, "cluster %s cannot be evicted", quote(string(name))))
		return
	}
	c.unwait(name)
	if !c.banned(name) {
		c.bury(slot{KindMember, string(name)}, nil)
	}
	if c.members[name] == nil {
		c.forget(name)
	}
	c.settle()
	if o := c.origins[name]; o.departure() != nil && c.members[name] == nil {
		c.putAway(name)
	}
}
