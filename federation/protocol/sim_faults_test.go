package protocol

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"time"

	federationv1 "github.com/isthmus-mesh/isthmus/api/federation/v1"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"google.golang.org/protobuf/proto"
)

func (s *sim) any() *simNode { return s.nodes[simNames[s.rng.IntN(len(simNames))]] }

// disturb does one thing that happens to clusters.
func (s *sim) disturb() {
	n := s.any()
	switch k := s.rng.IntN(100); {
	case k < 45 && n.up:
		kind, key := []string{KindService, KindEndpoints}[s.rng.IntN(2)], fmt.Sprintf("default/s%d", s.rng.IntN(5))
		if s.rng.IntN(3) == 0 {
			s.say("%s withdraws %s %s", n.id, kind, key)
			delete(n.wanted, kind+"/"+key)
		} else {
			var to []string
			for _, id := range simNames {
				if s.rng.IntN(4) == 0 {
					to = append(to, string(id))
				}
			}
			if s.rng.IntN(2) == 0 {
				to = nil
			}
			s.say("%s exports %s %s to %v", n.id, kind, key, to)
			st := Statement{kind, key, s.body(kind, to)}
			n.wanted[kind+"/"+key], s.said[saying(n.id, kind, key, st.Body)] = st, to
		}
		s.declare(n)
	case k < 60:
		other := s.any()
		s.say("cut from %s to %s", n.id, other.id)
		s.cut[nth(n.id)][nth(other.id)] = true
		if s.rng.IntN(2) == 0 {
			s.cut[nth(other.id)][nth(n.id)] = true
		}
		s.hangup(n.id, other.id)
	case k < 68:
		s.say("the network heals")
		s.cut = [5][5]bool{}
	case k < 73:
		s.crash(n)
	case k < 76:
		n.doomed = []doom{beforeCommit, afterCommit}[s.rng.IntN(2)]
	case k < 82 && !n.up:
		s.say("%s starts", n.id)
		s.start(n)
		s.declare(n)
	case k < 84:
		s.say("%s is copied", n.id)
		n.backup = maps.Clone(n.disk)
	case k < 89 && n.backup != nil && s.described(n):
		s.crash(n)
		s.say("%s is restored from its copy", n.id)
		s.restore(n, n.backup)
	case k < 90:
		s.lose(n)
	case k < 93:
		d := time.Duration(s.rng.IntN(int(time.Hour)))
		s.say("the clock of %s jumps by %s", n.id, d)
		n.skew += d
		if s.rng.IntN(3) == 0 {
			n.skew -= 2 * d
		}
	case k < 96:
		s.forge(n)
	case k < 99 && n.up: // a faulty peer says what it holds to somebody it is not for
		other := s.any()
		for _, r := range n.core.Records() {
			if other != n && s.rng.IntN(2) == 0 {
				s.post(n.id, other.id, 0, Received{From: n.id, Way: Stream, Record: r})
			}
		}
	case k == 99 && s.evicted == "" && s.nodes["amber"].up && s.described(s.nodes["dune"]):
		s.say("amber evicts dune")
		amber := s.nodes["amber"]
		s.step(amber, Evict{"dune"})
		if amber.disk["amber/"+KindTombstone+"/"+KindMember+"/dune"] != nil { // it may have crashed over it
			s.evicted, amber.evicted["dune"] = "dune", true
		}
	}
}

// restore starts a node from another disk than it left.
func (s *sim) restore(n *simNode, disk map[string]*federationv1.Record) {
	n.disk, n.marks, n.own, n.highest = maps.Clone(disk), map[mesh.ClusterID]Mark{}, Mark{}, map[string]Mark{}
	clear(n.evicted)
	s.start(n)
	s.declare(n)
}

// described reports whether the others all know the roots of every cluster, so that n may have another disk. Where a
// part of them does not know the rest, no connection between them can be trusted: an operator must join them again.
func (s *sim) described(n *simNode) bool {
	for _, of := range simNames {
		for _, at := range simNames {
			if at != of && at != n.id && at != s.evicted && of != s.evicted && s.nodes[at].disk[string(of)+"/"+KindCluster+"/"] == nil {
				return false
			}
		}
	}
	return true
}

// lose takes all state but the keys from a node, which joins again by a member that is up.
func (s *sim) lose(n *simNode) {
	if s.evicted == n.id || !s.described(n) {
		return
	}
	i := slices.IndexFunc(simNames, func(id mesh.ClusterID) bool {
		return id != n.id && id != s.evicted && s.nodes[id].up && !s.blocked(id, n.id) && !s.blocked(n.id, id) && s.nodes[id].core.members[n.id] != nil
	})
	if i < 0 {
		return
	}
	s.crash(n)
	s.say("%s loses its disk", n.id)
	s.restore(n, map[string]*federationv1.Record{})
	s.join(s.nodes[simNames[i]], n, false)
}

func (s *sim) crash(n *simNode) {
	if !n.up {
		return
	}
	s.say("%s crashes", n.id)
	n.up = false
	for _, id := range simNames {
		s.hangup(n.id, id)
	}
}

func (s *sim) body(kind string, to []string) []byte {
	var m proto.Message = &federationv1.Service{Labels: map[string]string{"v": strconv.Itoa(s.rng.IntN(1000))}, ExportTo: to}
	if kind == KindEndpoints {
		m = &federationv1.Endpoints{Endpoints: []*federationv1.Endpoint{{Workload: "w" + strconv.Itoa(s.rng.IntN(1000))}}, ExportTo: to}
	}
	b, _ := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	return b
}

// forge delivers records signed by a key nobody admitted, and changed records of others.
func (s *sim) forge(n *simNode) {
	mallory := newSimKey("mallory")
	origin := string(s.any().id)
	if s.rng.IntN(3) == 0 {
		origin = "mallory"
	}
	kind, key := KindService, fmt.Sprintf("default/s%d", s.rng.IntN(5))
	switch s.rng.IntN(4) {
	case 0:
		kind, key = KindTombstone, KindService+"/"+key
	case 1:
		kind, key = KindMember, "mallory"
	}
	r := &federationv1.Record{Origin: origin, Kind: kind, Key: key, Epoch: 1 + s.rng.Uint64N(3), Seq: 1 + s.rng.Uint64N(1<<27), Body: s.body(KindService, nil)}
	if kind == KindMember {
		r.Body, _ = proto.Marshal(&federationv1.Member{Name: "mallory", TrustDomain: "mallory.mesh", FederationKey: mallory.pub})
	}
	Sign(r, mallory.sign)
	from := s.any().id
	s.say("%s is told a forged %s %s by %s", n.id, ResourceName(r), Version(r), from)
	s.step(n, Received{From: from, Way: Stream, Record: r})
}
