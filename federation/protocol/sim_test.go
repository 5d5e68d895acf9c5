package protocol

import (
	"cmp"
	"container/heap"
	"crypto/ed25519"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	federationv1 "github.com/isthmus-mesh/isthmus/api/federation/v1"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"google.golang.org/protobuf/proto"
)

// The simulation runs five cores over a network that cuts (also one way), delays, reorders, loses and doubles, with
// crashes, disks restored from an old copy, clock jumps, evictions and a forger. Everything follows from the seed:
// SIM_SEED=n replays one and prints its story, SIM_SEEDS=n runs more of them.

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
	believeAnything bool // signatures are not checked
	forgetTombs     bool // the disk loses tombstones
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
	evicted map[mesh.ClusterID]bool
}

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
	cut      map[[2]mesh.ClusterID]bool
	sessions map[[2]mesh.ClusterID]uint64 // of the stream between two, in order of names
	session  uint64
	queue    simQueue
	sent     int
	quiet    bool
	ttl      time.Duration  // of tombstones
	direct   bool           // streams carry the records of their two ends only
	evicted  mesh.ClusterID // at most one
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
		cut: map[[2]mesh.ClusterID]bool{}, sessions: map[[2]mesh.ClusterID]uint64{}, tell: tell,
	}
	s.direct = s.rng.IntN(2) == 0
	if s.rng.IntN(3) == 0 { // forgotten while clusters are away
		s.ttl = 10 * time.Minute
	}
	for _, id := range simNames {
		n := &simNode{
			id: id, key: newSimKey(string(id)), disk: map[string]*federationv1.Record{}, marks: map[mesh.ClusterID]Mark{},
			wanted: map[string]Statement{}, highest: map[string]Mark{}, evicted: map[mesh.ClusterID]bool{},
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
	n.dials, n.streams, n.up = map[mesh.ClusterID]bool{}, map[mesh.ClusterID]map[string]string{}, true
	n.core = New(Config{
		Name: n.id, TrustDomain: n.td(), PublicKey: n.key.pub, Sign: n.key.sign, Verify: verify,
		Beat: uint64(s.now/time.Second) + n.starts*10, Seed: s.rng.Uint64(), TombstoneTTL: s.ttl,
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
	var puts []*federationv1.Record
	for _, a := range actions {
		switch a := a.(type) {
		case Persist:
			s.checkPersist(n, a.Record)
			n.disk[ResourceName(a.Record)] = a.Record
			puts = append(puts, a.Record)
		case Remove:
			name := string(a.Origin) + "/" + a.Kind + "/" + a.Key
			s.checkRemove(n, a, actions, ev)
			delete(n.disk, name)
		case Broadcast:
			if !Visible(a.Record, "nobody") {
				s.fail("%s broadcasts %s, which is not for everyone", n.id, ResourceName(a.Record))
			}
			for _, id := range simNames {
				s.gossip(n.id, id, Received{From: n.id, Way: Gossip, Record: a.Record})
			}
		case Connect:
			n.dials[a.Peer] = true
		case Disconnect:
			delete(n.dials, a.Peer)
			s.hangup(n.id, a.Peer)
		case Resync:
			s.say("%s asks %s for %s", n.id, a.Peer, a.Origin)
			s.resync(n, a)
		case FreshnessChanged:
			s.say("%s sees %s %s", n.id, a.Origin, a.Freshness)
		case Reject:
			s.say("%s rejects %s of %s: %s: %s", n.id, a.Record, a.From, a.Reason, a.Message)
		}
	}
	for id := range n.core.origins {
		if m := n.core.Mark(id); n.marks[id].Less(m) {
			n.marks[id] = m
		}
	}
	if m := n.core.Mark(n.id); m.Less(n.own) {
		s.fail("own mark of %s fell from %v to %v", n.id, n.own, m)
	} else {
		n.own = m
	}
	for _, peer := range simNames {
		if sent := n.streams[peer]; sent != nil {
			for _, r := range puts {
				s.stream(n, peer, sent, r)
			}
		}
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
	s.say("%s holds %s %s", n.id, ResourceName(r), Version(r))
	origin := s.nodes[mesh.ClusterID(r.Origin)]
	if origin == nil || !s.keys.verify(origin.key.pub, SignedBytes(r), r.Signature) {
		s.fail("%s took %s, which %s did not sign", n.id, ResourceName(r), r.Origin)
		return
	}
	if n.evicted[origin.id] {
		s.fail("%s took %s of a cluster it evicted", n.id, ResourceName(r))
	}
	if !Visible(r, n.id) {
		s.fail("%s took %s, which is not exported to it", n.id, ResourceName(r))
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
	s.say("%s drops %s/%s/%s", n.id, a.Origin, a.Kind, a.Key)
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

func (s *sim) blocked(a, b mesh.ClusterID) bool { return s.cut[[2]mesh.ClusterID{a, b}] }

func (s *sim) post(from, to mesh.ClusterID, session uint64, ev Event) {
	s.sent++
	heap.Push(&s.queue, simMessage{s.now + time.Duration(5+s.rng.IntN(400))*time.Millisecond, s.sent, from, to, session, ev})
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

func pairOf(a, b mesh.ClusterID) [2]mesh.ClusterID {
	if a > b {
		a, b = b, a
	}
	return [2]mesh.ClusterID{a, b}
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
	s.post(n.id, peer, s.sessions[pairOf(n.id, peer)], Received{From: n.id, Way: Stream, Record: r})
}

func (s *sim) resync(n *simNode, a Resync) {
	peer := s.nodes[a.Peer]
	session := s.sessions[pairOf(n.id, a.Peer)]
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
	if s.sessions[pairOf(a, b)] == 0 {
		return
	}
	delete(s.sessions, pairOf(a, b))
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
			if s.sessions[pairOf(a, b)] != 0 || !na.up || !nb.up || !na.dials[b] || !nb.dials[a] || s.blocked(a, b) || s.blocked(b, a) {
				continue
			}
			s.session++
			s.sessions[pairOf(a, b)] = s.session
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
			if s.blocked(m.from, m.to) || m.session != 0 && s.sessions[pairOf(m.from, m.to)] != m.session {
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
			for k := range 4 { // its own digest to all, what it knows of others to one
				to := simNames[(i+k+1)%len(simNames)]
				s.gossip(id, to, Heard{Origin: id, Digest: n.core.OwnDigest(), From: id})
			}
			to := simNames[s.rng.IntN(len(simNames))]
			for _, d := range n.core.Digests() {
				s.gossip(id, to, Heard{Origin: mesh.ClusterID(d.Origin), Digest: d, From: id})
			}
		}
	}
}

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
			n.wanted[kind+"/"+key] = Statement{kind, key, s.body(kind, to)}
		}
		s.declare(n)
	case k < 60:
		other := s.any()
		s.say("cut from %s to %s", n.id, other.id)
		s.cut[[2]mesh.ClusterID{n.id, other.id}] = true
		if s.rng.IntN(2) == 0 {
			s.cut[[2]mesh.ClusterID{other.id, n.id}] = true
		}
		s.hangup(n.id, other.id)
	case k < 68:
		s.say("the network heals")
		clear(s.cut)
	case k < 76:
		s.crash(n)
	case k < 82 && !n.up:
		s.say("%s starts", n.id)
		s.start(n)
		s.declare(n)
	case k < 84:
		s.say("%s is copied", n.id)
		n.backup = maps.Clone(n.disk)
	case k < 89 && n.backup != nil:
		s.crash(n)
		s.say("%s is restored from its copy", n.id)
		n.disk, n.marks, n.own, n.highest = maps.Clone(n.backup), map[mesh.ClusterID]Mark{}, Mark{}, map[string]Mark{}
		clear(n.evicted)
		s.start(n)
		s.declare(n)
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
	case k == 99 && s.evicted == "" && s.nodes["amber"].up:
		s.evicted = "dune"
		s.say("amber evicts dune")
		s.nodes["amber"].evicted["dune"] = true
		s.step(s.nodes["amber"], Evict{"dune"})
	}
}

func (s *sim) crash(n *simNode) {
	if !n.up {
		return
	}
	s.say("%s crashes", n.id)
	for _, id := range simNames {
		s.hangup(n.id, id)
	}
	n.up = false
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

// settle heals everything, waits, and compares.
func (s *sim) settle() {
	s.quiet = true
	s.say("all heals")
	clear(s.cut)
	for _, id := range simNames {
		if n := s.nodes[id]; !n.up {
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
		n := s.nodes[at]
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
			want, got := liveOf(o.core, of, at), liveOf(n.core, of, at)
			if !slices.Equal(want, got) {
				return fmt.Errorf("%s holds of %s:\n  %s\nwant:\n  %s", at, of, strings.Join(got, "\n  "), strings.Join(want, "\n  "))
			}
			for _, p := range n.core.Peers() {
				if p.Name == of && p.Freshness != mesh.Fresh {
					return fmt.Errorf("%s sees %s %s", at, of, p.Freshness)
				}
			}
		}
		for gone := range n.evicted {
			if n.core.members[gone] != nil || len(liveOf(n.core, gone, at)) > 0 {
				return fmt.Errorf("%s still holds %s, which it evicted", at, gone)
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

func liveOf(c *Core, origin, to mesh.ClusterID) []string {
	var out []string
	for _, r := range c.Records() {
		if r.Origin == string(origin) && r.Kind != KindTombstone && Visible(r, to) {
			out = append(out, fmt.Sprintf("%s %s %x", ResourceName(r), Version(r), sha256.Sum256(r.Body))[:60])
		}
	}
	return out
}

// simulate runs one seed and returns what broke, and the story.
func simulate(seed uint64, f faults, tell bool) (string, error) {
	s := newSim(seed, f, tell)
	s.run(2 * time.Second)
	for range 20 + s.rng.IntN(30) {
		s.disturb()
		if s.rng.IntN(2) == 0 {
			s.run(time.Duration(1+s.rng.IntN(4)) * 500 * time.Millisecond)
		}
		if s.broken != nil {
			break
		}
	}
	if s.broken == nil {
		s.settle()
	}
	return strings.Join(s.story, "\n"), s.broken
}

func seeds(t *testing.T, n uint64) uint64 {
	if v := os.Getenv("SIM_SEEDS"); v != "" {
		var err error
		if n, err = strconv.ParseUint(v, 10, 64); err != nil {
			t.Fatalf("SIM_SEEDS=%q: %v", v, err)
		}
	}
	return n
}

// search runs seeds until one breaks.
func search(n uint64, f faults) (uint64, error) {
	var (
		mu    sync.Mutex
		next  uint64
		found = n
		why   error
		wg    sync.WaitGroup
	)
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			for {
				mu.Lock()
				seed := next
				next++
				stop := seed >= n || why != nil
				mu.Unlock()
				if stop {
					return
				}
				if _, err := simulate(seed, f, false); err != nil {
					mu.Lock()
					if cmp.Compare(seed, found) < 0 {
						found, why = seed, err
					}
					mu.Unlock()
				}
			}
		})
	}
	wg.Wait()
	return found, why
}

func TestSimulation(t *testing.T) {
	if v := os.Getenv("SIM_SEED"); v != "" {
		seed, err := strconv.ParseUint(v, 10, 64)
		if err != nil {
			t.Fatalf("SIM_SEED=%q: %v", v, err)
		}
		story, err := simulate(seed, faults{}, true)
		t.Logf("seed %d:\n%s", seed, story)
		if err != nil {
			t.Fatal(err)
		}
		return
	}
	if seed, err := search(seeds(t, 2000), faults{}); err != nil {
		t.Fatalf("seed %d: %v\nreplay it with SIM_SEED=%d go test -v -run TestSimulation ./federation/protocol", seed, err, seed)
	}
}

// TestSimulationFinds breaks what the core rests on and wants the simulator to notice.
func TestSimulationFinds(t *testing.T) {
	for name, c := range map[string]struct {
		faults faults
		want   string
	}{
		"signatures not checked":      {faults{believeAnything: true}, "did not sign"},
		"tombstones lost by the disk": {faults{forgetTombs: true}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			seed, err := search(2000, c.faults)
			if err == nil {
				t.Fatal("not found in 2000 seeds")
			}
			if !strings.Contains(err.Error(), c.want) {
				t.Fatalf("found %v, want %q", err, c.want)
			}
			// The same seed tells the same story.
			one, err1 := simulate(seed, c.faults, true)
			two, err2 := simulate(seed, c.faults, true)
			if one != two || err1 == nil || err1.Error() != err2.Error() {
				t.Fatalf("seed %d does not replay: %v", seed, errors.Join(err1, err2))
			}
		})
	}
}
