package protocol

import (
	"crypto/sha256"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	federationv1 "github.com/isthmus-mesh/isthmus/api/federation/v1"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// The invariants:
//   - no record its origin did not sign, and no endpoint its origin did not export to the holder (the simulation keeps
//     its own account of who exported what to whom);
//   - a tombstone is final: nothing that it covers is taken after it;
//   - nothing from an evicted key, and no dial to it;
//   - lost is not empty: a live record goes only by a newer tombstone of its origin, or with its membership;
//   - (epoch, seq) never falls, of nobody, and no version stands for two things;
//   - quiet and healed means equal state.

// saying names a statement of an origin.
func saying(origin mesh.ClusterID, kind, key string, body []byte) string {
	return string(origin) + "|" + kind + "|" + key + "|" + string(body)
}

// exported reports whether the origin of a live record ever exported that very thing to a cluster.
func (s *sim) exported(r *federationv1.Record, to mesh.ClusterID) bool {
	if r.Kind != KindService && r.Kind != KindEndpoints || r.Origin == string(to) {
		return true
	}
	aud, known := s.said[saying(mesh.ClusterID(r.Origin), r.Kind, r.Key, r.Body)]
	return known && (aud == nil || slices.Contains(aud, string(to)))
}

// checkMarks: how far an origin has come never falls, while it is known.
func (s *sim) checkMarks(n *simNode) {
	for _, id := range simNames {
		m := n.core.Mark(id)
		if m == (Mark{}) { // forgotten with its membership: checkRemove sees to that
			delete(n.reached, id)
			continue
		}
		if m.Less(n.reached[id]) {
			s.fail("mark of %s at %s fell from %v to %v", id, n.id, n.reached[id], m)
		}
		n.reached[id] = m
	}
	if m := n.core.Mark(n.id); m.Less(n.own) {
		s.fail("own mark of %s fell from %v to %v", n.id, n.own, m)
	} else {
		n.own = m
	}
}

func coveredSlot(r *federationv1.Record) slot {
	s := slot{r.Kind, r.Key}
	if s.kind == KindTombstone {
		return s.covered()
	}
	return s
}

func (s *sim) checkPersist(n *simNode, r *federationv1.Record) {
	if r.Kind == KindPending {
		return
	}
	at := Mark{r.Epoch, r.Seq}
	if s.tell {
		s.say("%s holds %s %s", n.id, ResourceName(r), Version(r))
	}
	origin := s.nodes[mesh.ClusterID(r.Origin)]
	if origin == nil || !s.keys.verify(origin.key.pub, SignedBytes(r), r.Signature) {
		s.fail("%s took %s, which %s did not sign", n.id, ResourceName(r), r.Origin)
		return
	}
	if n.evicted[origin.id] {
		s.fail("%s took %s of a cluster it evicted", n.id, ResourceName(r))
	}
	if !s.exported(r, n.id) || !Visible(r, n.id) {
		s.fail("%s took %s %s, which is not exported to it", n.id, ResourceName(r), Version(r))
	}
	version := r.Origin + " " + Version(r)
	if what := r.Kind + " " + r.Key + " " + string(r.Body); s.versions[version] == "" {
		s.versions[version] = what
	} else if s.versions[version] != what {
		s.fail("%s is %q and %q", version, s.versions[version], what)
	}
	// A tombstone may come after the record that follows it; a live record must be newer than all before it.
	sl := coveredSlot(r)
	key := r.Origin + "/" + sl.kind + "/" + sl.key
	if r.Kind != KindTombstone && !n.highest[key].Less(at) {
		s.fail("%s took %s %s after version %v of it", n.id, ResourceName(r), Version(r), n.highest[key])
	}
	if n.highest[key].Less(at) {
		n.highest[key] = at
	}
}

// checkRemove: a live record goes only with a tombstone that covers it, or with its origin's membership.
func (s *sim) checkRemove(n *simNode, a Remove, actions []Action, ev Event) {
	if s.tell {
		s.say("%s drops %s/%s/%s", n.id, a.Origin, a.Kind, a.Key)
	}
	if held := n.disk[string(a.Origin)+"/"+a.Kind+"/"+a.Key]; a.Kind == KindTombstone && s.ttl < time.Hour && held != nil {
		gone := coveredSlot(held)
		delete(n.highest, string(a.Origin)+"/"+gone.kind+"/"+gone.key)
	}
	if a.Kind == KindTombstone || a.Kind == KindPending {
		return
	}
	held := n.disk[string(a.Origin)+"/"+a.Kind+"/"+a.Key]
	for _, other := range actions {
		p, ok := other.(Persist)
		if !ok || p.Record.Kind != KindTombstone {
			continue
		}
		if p.Record.Origin == string(a.Origin) && coveredSlot(p.Record) == (slot{a.Kind, a.Key}) && Compare(p.Record, held) > 0 {
			return
		}
		if coveredSlot(p.Record).kind == KindMember && n.core.members[a.Origin] == nil {
			for key := range n.highest { // it may be admitted again, and begin anew
				if strings.HasPrefix(key, string(a.Origin)+"/") {
					delete(n.highest, key)
				}
			}
			return
		}
	}
	s.fail("%s dropped %s/%s/%s at %T with no deletion by its origin", n.id, a.Origin, a.Kind, a.Key, ev)
}

// settle heals everything, waits, and compares.
func (s *sim) settle() {
	s.quiet = true
	s.say("all heals")
	s.cut = [5][5]bool{}
	for _, id := range simNames {
		n := s.nodes[id]
		n.doomed = never
		if !n.up {
			s.start(n)
			s.declare(n)
		}
	}
	s.run(12 * time.Second)
	for i := 0; i < 4 && s.broken == nil && s.compare() != nil; i++ {
		s.run(10 * time.Second)
	}
	if err := s.compare(); err != nil {
		s.fail("healed and quiet, but %v", err)
	}
}

// compare reports the first difference between what a cluster says to another and what that one holds.
func (s *sim) compare() error {
	for _, at := range simNames {
		n, peers := s.nodes[at], s.nodes[at].core.Peers()
		for _, of := range simNames {
			o := s.nodes[of]
			if at == of {
				if err := s.compareOwn(n); err != nil {
					return err
				}
				continue
			}
			if trusts, back := n.core.members[of] != nil, o.core.members[at] != nil; !trusts || !back {
				if s.evicted == "" || trusts && back {
					return fmt.Errorf("%s and %s do not know each other", at, of)
				}
				continue // the evicted cluster knows others who do not know it
			}
			if s.evicted == at || s.evicted == of {
				continue
			}
			want, got := s.liveOf(o.core, of, at), s.liveOf(n.core, of, at)
			if !slices.Equal(want, got) {
				return fmt.Errorf("%s holds of %s:\n  %s\nwant:\n  %s", at, of, strings.Join(got, "\n  "), strings.Join(want, "\n  "))
			}
			for _, p := range peers {
				if p.Name == of && p.Freshness != mesh.Fresh {
					return fmt.Errorf("%s sees %s %s", at, of, p.Freshness)
				}
			}
		}
		for gone := range n.evicted {
			if n.core.members[gone] != nil {
				return fmt.Errorf("%s is a member at %s, which evicted it", gone, at)
			}
			for _, name := range slices.Sorted(maps.Keys(n.disk)) {
				if strings.HasPrefix(name, string(gone)+"/") {
					return fmt.Errorf("%s still holds %s, whose origin it evicted", at, name)
				}
			}
		}
	}
	return nil
}

func (s *sim) compareOwn(n *simNode) error {
	got := map[string]bool{}
	for _, r := range n.core.Records() {
		if r.Origin != string(n.id) || r.Kind != KindService && r.Kind != KindEndpoints {
			continue
		}
		want, ok := n.wanted[r.Kind+"/"+r.Key]
		if !ok || string(want.Body) != string(r.Body) {
			return fmt.Errorf("%s says %s, which it does not want", n.id, ResourceName(r))
		}
		got[r.Kind+"/"+r.Key] = true
	}
	if len(got) != len(n.wanted) {
		return fmt.Errorf("%s says %d statements, wants %d", n.id, len(got), len(n.wanted))
	}
	return nil
}

// liveOf is what a core holds of an origin, of that which the origin exports to a cluster.
func (s *sim) liveOf(c *Core, origin, to mesh.ClusterID) []string {
	var out []string
	for _, r := range c.Records() {
		if r.Origin == string(origin) && r.Kind != KindTombstone && s.exported(r, to) {
			out = append(out, fmt.Sprintf("%s %s %x", ResourceName(r), Version(r), sha256.Sum256(r.Body))[:60])
		}
	}
	return out
}
