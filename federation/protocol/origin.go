package protocol

import (
	"bytes"
	"cmp"
	"crypto/ed25519"
	"maps"
	"slices"
	"strings"
	"time"

	federationv1 "github.com/isthmus-mesh/isthmus/api/federation/v1"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/federation/protocol/audience"
	"google.golang.org/protobuf/proto"
)

// slot names a record of one origin.
type slot struct{ kind, key string }

func (s slot) compare(o slot) int {
	return cmp.Or(cmp.Compare(s.kind, o.kind), cmp.Compare(s.key, o.key))
}

// tomb is the slot of the tombstone that covers s.
func (s slot) tomb() slot { return slot{KindTombstone, s.kind + "/" + s.key} }

// covered is the slot that the tombstone s covers.
func (s slot) covered() slot {
	kind, key, _ := strings.Cut(s.key, "/")
	return slot{kind, key}
}

// entry is one record held.
type entry struct {
	rec      *federationv1.Record
	aud      audience.Set
	member   *federationv1.Member // kinds member and pending
	at       time.Duration        // when it came
	verified bool                 // false: from disk, not needed yet
	adopted  bool                 // said by us, learnt from others
}

func (e *entry) size() int { return len(e.rec.Key) + len(e.rec.Body) + 128 }

// origin is all that is known of one cluster.
type origin struct {
	id      mesh.ClusterID
	entries map[slot]*entry
	vouches map[mesh.ClusterID]*entry // its member records
	pending *federationv1.Member      // waits for approval here
	mark    Mark                      // of everything
	public  Mark                      // of what every member may see
	counts  map[string]int
	bytes   int
	cluster *federationv1.Cluster
	digest  []byte // nil: to be computed

	alive     life
	behind    *behind
	connected *Connect
	refused   map[string]uint64 // things not taken of it, by reason
	problem   string
	capped    bool          // something was over a cap,
	cappedAt  time.Duration // last then
	leap      bool          // the operator approves the next jump
}

// member is a cluster we trust, and who vouches for it.
type member struct {
	name     mesh.ClusterID
	td       mesh.TrustDomain
	key      ed25519.PublicKey
	tokenID  string
	vouchers []mesh.ClusterID
}

// newEntry decodes what the core needs of a body.
func newEntry(r *federationv1.Record) (*entry, *Refusal) {
	e := &entry{rec: r}
	if ref := checkUnfolded(r); ref != nil {
		return nil, ref
	}
	var err error
	if e.aud, err = audienceOf(r.GetKind(), r.GetBody()); err != nil {
		return nil, refuse(ReasonMalformed, "body of %s %s does not decode", r.Kind, quote(r.Key))
	}
	if r.GetKind() == KindMember || r.GetKind() == KindPending {
		e.member = &federationv1.Member{}
		if err := proto.Unmarshal(r.Body, e.member); err != nil {
			return nil, refuse(ReasonMalformed, "body of %s %s does not decode", r.Kind, quote(r.Key))
		}
		if ref := checkMember(e.member); ref != nil {
			return nil, ref
		}
		if e.member.Name != r.Key {
			return nil, refuse(ReasonBadName, "member record %s describes %s", r.Key, e.member.Name)
		}
	}
	return e, nil
}

func checkMember(m *federationv1.Member) *Refusal {
	switch {
	case m == nil:
		return refuse(ReasonMalformed, "member is missing")
	case !mesh.IsLabel(m.Name):
		return refuse(ReasonBadName, "member name %s is not a DNS label", quote(m.Name))
	case !IsDomain(m.TrustDomain):
		return refuse(ReasonBadName, "trust domain %s of member %s is not a DNS name", quote(m.TrustDomain), m.Name)
	case len(m.FederationKey) != ed25519.PublicKeySize:
		return refuse(ReasonMalformed, "federation key of member %s has %d bytes, want %d", m.Name, len(m.FederationKey), ed25519.PublicKeySize)
	}
	return nil
}

// verdict is what a record is beside what is held.
type verdict int

const (
	newer verdict = iota
	same
	stale
	conflict
)

// judge compares a record with what is held in its slot. It is the whole merge rule.
func (o *origin) judge(s slot, r *federationv1.Record) verdict {
	if held := o.entries[s]; held != nil {
		switch d := Compare(r, held.rec); {
		case d < 0:
			return stale
		case d == 0 && bytes.Equal(r.Body, held.rec.Body) && r.TtlSeconds == held.rec.TtlSeconds:
			return same
		case d == 0:
			return conflict
		}
	}
	other := s.tomb()
	if s.kind == KindTombstone {
		other = s.covered()
	}
	if held := o.entries[other]; held != nil {
		d := Compare(r, held.rec)
		if d == 0 {
			return conflict
		}
		if d < 0 && s.kind != KindTombstone {
			return stale
		}
	}
	return newer
}

// older reports whether the slot holds something older than r.
func (o *origin) older(s slot, r *federationv1.Record) bool {
	held := o.entries[s]
	return held != nil && Compare(held.rec, r) < 0
}

// put holds e, with all that is derived from it.
func (o *origin) put(s slot, e *entry) {
	if _, ok := o.entries[s]; ok {
		o.drop(s)
	}
	o.entries[s] = e
	o.bytes += e.size()
	o.counts[s.kind]++
	o.digest = nil
	if private(s.kind) {
		return
	}
	if at := (Mark{e.rec.Epoch, e.rec.Seq}); o.mark.Less(at) {
		o.mark = at
	}
	if at := (Mark{e.rec.Epoch, e.rec.Seq}); e.aud.Everyone() && o.public.Less(at) {
		o.public = at
	}
	switch s.kind {
	case KindMember:
		o.vouches[mesh.ClusterID(s.key)] = e
	case KindCluster:
		o.cluster = &federationv1.Cluster{}
		if proto.Unmarshal(e.rec.Body, o.cluster) != nil {
			o.cluster = nil
		}
	}
}

// drop forgets what the slot holds.
func (o *origin) drop(s slot) {
	e := o.entries[s]
	if e == nil {
		return
	}
	delete(o.entries, s)
	o.bytes -= e.size()
	o.counts[s.kind]--
	o.digest = nil
	switch s.kind {
	case KindMember:
		delete(o.vouches, mesh.ClusterID(s.key))
	case KindCluster:
		o.cluster = nil
	}
}

// sorted returns the slots held, in order.
func (o *origin) sorted() []slot { return slices.SortedFunc(maps.Keys(o.entries), slot.compare) }
