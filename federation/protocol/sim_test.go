package protocol

import (
	"container/heap"
	"crypto/ed25519"
	"crypto/sha256"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	federationv1 "github.com/isthmus-mesh/isthmus/api/federation/v1"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"google.golang.org/protobuf/proto"
)

// The simulation runs five cores over a network that cuts (also one way), delays, reorders, loses and doubles, with
// crashes (also between the disk and the network), disks lost or restored from an old copy, clock jumps, evictions and
// a forger. Everything follows from the seed: SIM_SEED=n replays one and prints its story, SIM_SEEDS=n runs more of
// them; make simulate does either. The invariants are in sim_check_test.go.

var simNames = []mesh.ClusterID{"amber", "birch", "cedar", "dune", "elm"}

// simKey is a cheap signature with the shape of Ed25519: whoever knows the secret signs.
type simKey struct{ pub, secret []byte }

func newSimKey(name string) simKey {
	secret := sha256.Sum256([]byte("secret of " + name))
	pub := sha256.Sum256(secret[:])
	return simKey{pub[:], secret[:]}
}

func (k simKey) sign(msg []byte) []byte {
	h := sha256.New()
	h.Write(k.secret)
	h.Write(msg)
	return h.Sum(h.Sum(nil)) // 64 bytes
}

type simKeys map[string]simKey // by public key

func (k simKeys) verify(pub ed25519.PublicKey, msg, sig []byte) bool {
	key, ok := k[string(pub)]
	return ok && string(key.sign(msg)) == string(sig)
}

// faults break the simulation on purpose: it must find them.
type faults struct {
	believeAnything bool   // signatures are not checked
	forgetTombs     bool   // the disk loses tombstones
	mutant          mutant // a rule of the core
}

type simNode struct {
	id      mesh.ClusterID
	key     simKey
	core    *Core
	up      bool
	starts  uint64
	skew    time.Duration
	disk    map[string]*federationv1.Record
	marks   map[mesh.ClusterID]Mark
	backup  map[string]*federationv1.Record
	wanted  map[string]Statement
	dials   map[mesh.ClusterID]bool
	streams map[mesh.ClusterID]map[string]string // what was sent to the peer on the present stream: name -> version
	highest map[string]Mark                      // newest version ever persisted, by origin and slot
	own     Mark
	reached map[mesh.ClusterID]Mark // the mark of each origin, as this node saw it last
	doomed  doom
	evicted map[mesh.ClusterID]bool
}

// doom is when a node crashes within its next step that keeps something.
type doom uint8

const (
	never        doom = iota
	beforeCommit      // nothing is kept
	afterCommit       // kept, and told to nobody
)

type simMessage struct {
	at       time.Duration
	n        int
	from, to mesh.ClusterID
	session  uint64 // of the stream; 0: gossip
	ev       Event
}

type simQueue []simMessage

func (q simQueue) Len() int { return len(q) }
func (q simQueue) Less(i, j int) bool {
	return q[i].at < q[j].at || q[i].at == q[j].at && q[i].n < q[j].n
}
func (q simQueue) Swap(i, j int) { q[i], q[j] = q[j], q[i] }
func (q *simQueue) Push(x any)   { *q = append(*q, x.(simMessage)) }
func (q *simQueue) Pop() any {
	old := *q
	m := old[len(old)-1]
	*q = old[:len(old)-1]
	return m
}

type sim struct {
	rng      *rand.Rand
	faults   faults
	keys     simKeys
	now      time.Duration
	nodes    map[mesh.ClusterID]*simNode
	cut      [5][5]bool   // from, to
	sessions [5][5]uint64 // of the stream between two, lower one first; 0: none
	session  uint64
	queue    simQueue
	sent     int
	quiet    bool
	ttl      time.Duration       // of tombstones
	direct   bool                // streams carry the records of their two ends only
	evicted  mesh.ClusterID      // at most one
	said     map[string][]string // body of every statement ever wanted, by origin, kind, key and body: whom it is for
	versions map[string]string   // what a version of an origin was taken for
	story    []string
	tell     bool
	broken   error
}

func (s *sim) say(format string, args ...any) {
	if s.tell {
		s.story = append(s.story, fmt.Sprintf("%8.2fs ", s.now.Seconds())+fmt.Sprintf(format, args...))
	}
}

func (s *sim) fail(format string, args ...any) {
	if s.broken == nil {
		s.broken = fmt.Errorf("at %s: "+format, append([]any{s.now}, args...)...)
		s.say("BROKEN: %v", s.broken)
	}
}

func newSim(seed uint64, f faults, tell bool) *sim {
	s := &sim{
		ttl: 24 * time.Hour,
		rng: rand.New(rand.NewPCG(seed, 1)), faults: f, keys: simKeys{}, nodes: map[mesh.ClusterID]*simNode{},
		tell: tell, said: map[string][]string{}, versions: map[string]string{},
	}
	s.direct = s.rng.IntN(2) == 0
	if s.rng.IntN(3) == 0 { // forgotten while clusters are away
		s.ttl = 10 * time.Minute
	}
	for _, id := range simNames {
		n := &simNode{
			id: id, key: newSimKey(string(id)), disk: map[string]*federationv1.Record{}, marks: map[mesh.ClusterID]Mark{},
			wanted: map[string]Statement{}, highest: map[string]Mark{}, evicted: map[mesh.ClusterID]bool{},
			reached: map[mesh.ClusterID]Mark{},
		}
		s.keys[string(n.key.pub)] = n.key
		s.nodes[id] = n
		s.start(n)
		s.declare(n)
	}
	// amber admits birch, cedar and dune; birch admits elm.
	for _, pair := range [][2]mesh.ClusterID{{"amber", "birch"}, {"amber", "cedar"}, {"amber", "dune"}, {"birch", "elm"}} {
		s.join(s.nodes[pair[0]], s.nodes[pair[1]], s.rng.IntN(2) == 0)
	}
	if s.rng.IntN(2) == 0 { // a second voucher
		s.step(s.nodes["birch"], Admit{Member: s.nodes["dune"].member()})
	}
	return s
}

func (n *simNode) td() mesh.TrustDomain { return mesh.TrustDomain(n.id + ".mesh") }

func (n *simNode) member() *federationv1.Member {
	return &federationv1.Member{Name: string(n.id), TrustDomain: string(n.td()), FederationKey: n.key.pub}
}

func (s *sim) start(n *simNode) {
	n.starts++
	state := State{Marks: maps.Clone(n.marks), LastHeard: map[mesh.ClusterID]time.Duration{}}
	for _, name := range slices.Sorted(maps.Keys(n.disk)) {
		if s.faults.forgetTombs && n.disk[name].Kind == KindTombstone {
			continue
		}
		state.Records = append(state.Records, n.disk[name])
	}
	verify := s.keys.verify
	if s.faults.believeAnything {
		verify = func(ed25519.PublicKey, []byte, []byte) bool { return true }
	}
	n.doomed, n.reached = never, map[mesh.ClusterID]Mark{}
	n.dials, n.streams, n.up = map[mesh.ClusterID]bool{}, map[mesh.ClusterID]map[string]string{}, true
	n.core = New(Config{
		Name: n.id, TrustDomain: n.td(), PublicKey: n.key.pub, Sign: n.key.sign, Verify: verify,
		Beat: uint64(s.now/time.Second) + n.starts*10, Seed: s.rng.Uint64(), TombstoneTTL: s.ttl,
		mutant: s.faults.mutant,
	}, state)
	s.step(n, Tick{})
}

func (s *sim) join(issuer, joiner *simNode, pending bool) {
	s.say("%s joins by %s, pending=%v", joiner.id, issuer.id, pending)
	var record *federationv1.Record
	for _, r := range joiner.core.Records() {
		if r.Origin == string(joiner.id) && r.Kind == KindCluster {
			record = r
		}
	}
	s.step(issuer, Admit{Member: joiner.member(), ClusterRecord: record, Pending: pending})
	if pending {
		s.step(issuer, Approve{joiner.id})
	}
	var records []*federationv1.Record
	for _, r := range issuer.core.Records() {
		if r.Kind == KindMember || r.Kind == KindCluster || r.Kind == KindTombstone && strings.HasPrefix(r.Key, KindMember) {
			records = append(records, r)
		}
	}
	s.rng.Shuffle(len(records), func(i, j int) { records[i], records[j] = records[j], records[i] })
	s.step(joiner, Joined{Issuer: issuer.member(), Records: records})
}

func (s *sim) declare(n *simNode) {
	body, _ := proto.MarshalOptions{Deterministic: true}.Marshal(&federationv1.Cluster{
		TrustDomain: string(n.td()), Network: string(n.id), Gateways: []string{"192.0.2.1:15443"}, FederationKey: n.key.pub,
	})
	statements := []Statement{{Kind: KindCluster, Body: body}}
	for _, key := range slices.Sorted(maps.Keys(n.wanted)) {
		statements = append(statements, n.wanted[key])
	}
	s.step(n, Declare{statements})
}

// step runs one event and does what the core asks, checking every action.
func (s *sim) step(n *simNode, ev Event) {
	if !n.up {
		return
	}
	actions := n.core.Step(s.now+n.skew, ev)
	if n.doomed == beforeCommit && keeps(actions) {
		s.crash(n)
		return
	}
	if len(actions) == 0 {
		return
	}
	puts := s.commit(n, actions, ev)
	if n.doomed == afterCommit && keeps(actions) {
		s.crash(n)
		return
	}
	for _, a := range actions {
		s.act(n, a)
	}
	s.checkMarks(n)
	for _, peer := range simNames {
		if sent := n.streams[peer]; sent != nil {
			for _, r := range puts {
				s.stream(n, peer, sent, r)
			}
		}
	}
}

// keeps reports whether there is something for the disk.
func keeps(actions []Action) bool {
	return slices.ContainsFunc(actions, func(a Action) bool {
		_, put := a.(Persist)
		_, del := a.(Remove)
		return put || del
	})
}

// commit does what is for the disk, in one transaction.
func (s *sim) commit(n *simNode, actions []Action, ev Event) (puts []*federationv1.Record) {
	for _, a := range actions {
		switch a := a.(type) {
		case Persist:
			s.checkPersist(n, a.Record)
			n.disk[ResourceName(a.Record)] = a.Record
			puts = append(puts, a.Record)
		case Remove:
			s.checkRemove(n, a, actions, ev)
			delete(n.disk, string(a.Origin)+"/"+a.Kind+"/"+a.Key)
		}
	}
	for _, id := range simNames {
		if m := n.core.Mark(id); n.marks[id].Less(m) {
			n.marks[id] = m
		}
	}
	return puts
}

// act does the rest.
func (s *sim) act(n *simNode, a Action) {
	switch a := a.(type) {
	case Broadcast:
		if !Visible(a.Record, "nobody") {
			s.fail("%s broadcasts %s, which is not for everyone", n.id, ResourceName(a.Record))
		}
		for _, id := range simNames {
			s.gossip(n.id, id, Received{From: n.id, Way: Gossip, Record: a.Record})
		}
	case Connect:
		if n.evicted[a.Peer] {
			s.fail("%s dials %s, which it evicted", n.id, a.Peer)
		}
		n.dials[a.Peer] = true
	case Disconnect:
		delete(n.dials, a.Peer)
		s.hangup(n.id, a.Peer)
	case Resync:
		if s.tell {
			s.say("%s asks %s for %s", n.id, a.Peer, a.Origin)
		}
		s.resync(n, a)
	case FreshnessChanged:
		if s.tell {
			s.say("%s sees %s %s", n.id, a.Origin, a.Freshness)
		}
	case Reject:
		if s.tell {
			s.say("%s rejects %s of %s: %s: %s", n.id, a.Record, a.From, a.Reason, a.Message)
		}
	}
}

func (s *sim) blocked(a, b mesh.ClusterID) bool { return s.cut[nth(a)][nth(b)] }

func (s *sim) post(from, to mesh.ClusterID, session uint64, ev Event) {
	s.sent++
	delay := time.Duration(5+s.rng.IntN(400)) * time.Millisecond
	if !s.quiet && s.rng.IntN(40) == 0 {
		delay *= 20 // a stall: much is newer when it comes
	}
	heap.Push(&s.queue, simMessage{s.now + delay, s.sent, from, to, session, ev})
}

func (s *sim) gossip(from, to mesh.ClusterID, ev Event) {
	if from == to || !s.quiet && s.rng.IntN(5) == 0 { // lost
		return
	}
	s.post(from, to, 0, ev)
	if s.rng.IntN(8) == 0 { // doubled
		s.post(from, to, 0, ev)
	}
}

// nth is the index of a name in simNames.
func nth(id mesh.ClusterID) int { return int(id[0] - 'a') }

// between is the session of the stream between two.
func (s *sim) between(a, b mesh.ClusterID) *uint64 {
	i, j := nth(a), nth(b)
	return &s.sessions[min(i, j)][max(i, j)]
}

// stream sends a record over the stream from n to peer, out of order as two ways of one record may be.
func (s *sim) stream(n *simNode, peer mesh.ClusterID, sent map[string]string, r *federationv1.Record) {
	name := ResourceName(r)
	if s.direct && r.Origin != string(n.id) && r.Origin != string(peer) {
		return
	}
	if sent[name] == Version(r) || !Visible(r, peer) || r.Kind == KindPending {
		return
	}
	sent[name] = Version(r)
	if !s.quiet && s.rng.IntN(30) == 0 && Visible(r, "nobody") {
		return // lost by a faulty peer: digests must show it
	}
	for range 1 + s.rng.IntN(12)/11 { // now and then doubled
		s.post(n.id, peer, *s.between(n.id, peer), Received{From: n.id, Way: Stream, Record: r})
	}
}

func (s *sim) resync(n *simNode, a Resync) {
	peer := s.nodes[a.Peer]
	session := *s.between(n.id, a.Peer)
	if session == 0 || !peer.up {
		return
	}
	for _, r := range peer.core.RecordsFor(n.id) {
		held := n.disk[ResourceName(r)]
		if r.Origin == string(a.Origin) && (held == nil || Version(held) != Version(r)) {
			s.post(peer.id, n.id, session, Received{From: peer.id, Way: Stream, Record: r})
		}
	}
}

// hangup ends the stream between two.
func (s *sim) hangup(a, b mesh.ClusterID) {
	if *s.between(a, b) == 0 {
		return
	}
	*s.between(a, b) = 0
	for _, end := range [][2]mesh.ClusterID{{a, b}, {b, a}} {
		n := s.nodes[end[0]]
		delete(n.streams, end[1])
		s.step(n, Link{Peer: end[1]})
	}
}

// dial brings up every stream that both ends want and the network allows.
func (s *sim) dial() {
	for i, a := range simNames {
		for _, b := range simNames[i+1:] {
			na, nb := s.nodes[a], s.nodes[b]
			if *s.between(a, b) != 0 || !na.up || !nb.up || !na.dials[b] || !nb.dials[a] || s.blocked(a, b) || s.blocked(b, a) {
				continue
			}
			s.session++
			*s.between(a, b) = s.session
			s.say("stream between %s and %s", a, b)
			for _, end := range [][2]*simNode{{na, nb}, {nb, na}} {
				n, peer := end[0], end[1]
				n.streams[peer.id] = map[string]string{}
				for _, r := range n.core.RecordsFor(peer.id) {
					if held := peer.disk[ResourceName(r)]; held == nil || Version(held) != Version(r) {
						s.stream(n, peer.id, n.streams[peer.id], r)
					}
				}
				s.step(n, Link{Peer: peer.id, Up: true, Path: "direct"})
			}
		}
	}
}

// run lets time pass in slices of half a second.
func (s *sim) run(d time.Duration) {
	for end := s.now + d; s.now < end && s.broken == nil; {
		next := s.now + 500*time.Millisecond
		for len(s.queue) > 0 && s.queue[0].at <= next {
			m := heap.Pop(&s.queue).(simMessage)
			s.now = max(s.now, m.at)
			if s.blocked(m.from, m.to) || m.session != 0 && *s.between(m.from, m.to) != m.session {
				continue
			}
			s.step(s.nodes[m.to], m.ev)
		}
		s.now = next
		s.dial()
		for i, id := range simNames {
			n := s.nodes[id]
			s.step(n, Tick{})
			if s.now%time.Second != 0 || !n.up {
				continue
			}
			s.digests(i, n)
		}
	}
}

// digests sends a node's own digest on every stream, all that it knows on one, and as hearsay to anybody.
func (s *sim) digests(i int, n *simNode) {
	all := n.core.Digests()
	told := simNames[s.rng.IntN(len(simNames))]
	for k := range 4 {
		to := simNames[(i+k+1)%len(simNames)]
		session := *s.between(n.id, to)
		if session == 0 {
			continue
		}
		for _, d := range all {
			if id := mesh.ClusterID(d.Origin); id == n.id || to == told {
				s.post(n.id, to, session, Heard{Origin: id, Digest: d, From: n.id})
			}
		}
	}
	if s.now%(2*time.Second) == 0 {
		to := simNames[s.rng.IntN(len(simNames))]
		for _, d := range all {
			s.gossip(n.id, to, Heard{Origin: mesh.ClusterID(d.Origin), Digest: d})
		}
	}
}
