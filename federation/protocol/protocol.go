// Package protocol is the core of the federation as a pure state machine: events and the time go in, actions come
// out. It decides who is a member, which signed record is newest, what was deleted, how fresh a peer's state is and
// when to ask again. It knows no goroutine, clock, socket or file: the same events give the same actions.
//
// # Trust
//
// The local cluster vouches for the clusters its operator admitted, and for the cluster whose token it redeemed, by
// signed member records. A cluster is a member when a chain of member records leads to it from the local one. A
// member record introduces a name; it never changes the key of a known one, and withdrawing it (a tombstone by the
// same origin) ends only what that origin vouched for. A name the local operator evicted stays out, whoever vouches.
// A cluster that leaves withdraws itself, by a tombstone of its own name. It is out for all who hear of it, and may join
// again.
//
// # Merge
//
// For every (origin, kind, key) the highest (epoch, seq) wins. A tombstone is a record of its own that covers every
// older record of the key it names; it is kept for its TTL, that of a member for ever. Merging is commutative,
// associative and idempotent, so it does not matter which way a record comes or how often.
//
// # Audience
//
// A service or endpoints record may name the clusters it is for; nobody serves it to others. A tombstone carries the
// audience of everything it covers. Digests and broadcasts cover only records that every member may see, because all
// members compare them.
package protocol

import (
	"crypto/ed25519"
	"errors"
	"fmt"
	"time"

	federationv1 "github.com/isthmus-mesh/isthmus/api/federation/v1"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/federation/protocol/body"
)

// Config is what a Core is made with. Zero durations and caps mean the default.
type Config struct {
	// Name and TrustDomain are the local cluster's.
	Name        mesh.ClusterID
	TrustDomain mesh.TrustDomain
	// PublicKey verifies and Sign makes the local cluster's signatures (Ed25519).
	PublicKey ed25519.PublicKey
	Sign      func(msg []byte) []byte
	// Verify checks a signature; nil is ed25519.Verify. A driver may put a cache in front of it.
	Verify func(pub ed25519.PublicKey, msg, sig []byte) bool
	// LateAfter is how long a peer stays fresh without a beat (3 s). Lower notices a loss sooner, and takes a short
	// stall for one.
	LateAfter time.Duration
	// Lease is how long a silent peer stays late before it is expired (10 min), unless its own records say less.
	Lease time.Duration
	// TombstoneTTL is how long deletions are remembered (7 days). A member that was away for longer still converges,
	// by way of the origin, which deletes again what comes back to it.
	TombstoneTTL time.Duration
	// ResyncAfter is how long a differing digest is tolerated before a peer is asked again (500 ms). Lower asks for
	// what is already on its way.
	ResyncAfter time.Duration
	// MaxRecords and MaxBytes cap what is held of one origin (100,000 records, 24 MiB).
	MaxRecords, MaxBytes int
	// SharedTrustDomain allows members that share the local trust domain, with the same roots.
	SharedTrustDomain bool
	// Beat is where the local beat starts; it must be higher than at the last start (seconds of the wall clock do).
	Beat uint64
	// Seed feeds every random choice. It must differ from one start to the next.
	Seed uint64

	mutant mutant // tests only
}

// Validate reports what a Core cannot work with.
func (c Config) Validate() error {
	switch {
	case !mesh.IsLabel(string(c.Name)):
		return fmt.Errorf("cluster name %q is not a DNS label", c.Name)
	case !IsDomain(string(c.TrustDomain)):
		return fmt.Errorf("trust domain %q of cluster %s is not a lower-case DNS name", c.TrustDomain, c.Name)
	case len(c.PublicKey) != ed25519.PublicKeySize:
		return fmt.Errorf("federation key of cluster %s has %d bytes, want %d", c.Name, len(c.PublicKey), ed25519.PublicKeySize)
	case c.Sign == nil:
		return errors.New("federation key cannot sign: Config.Sign is missing")
	}
	return nil
}

func (c Config) withDefaults() Config {
	def := func(d *time.Duration, v time.Duration) {
		if *d <= 0 {
			*d = v
		}
	}
	def(&c.LateAfter, 3*time.Second)
	def(&c.Lease, 10*time.Minute)
	def(&c.TombstoneTTL, 7*24*time.Hour)
	def(&c.ResyncAfter, 500*time.Millisecond)
	if c.MaxRecords <= 0 {
		c.MaxRecords = 100_000
	}
	if c.MaxBytes <= 0 {
		c.MaxBytes = 24 << 20
	}
	if c.Verify == nil {
		c.Verify = ed25519.Verify
	}
	return c
}

// Mark is how far an origin has come. It never falls.
type Mark struct{ Epoch, Seq uint64 }

// Less orders marks.
func (m Mark) Less(o Mark) bool {
	return m.Epoch < o.Epoch || m.Epoch == o.Epoch && m.Seq < o.Seq
}

// State is what a Core starts from: everything its driver kept of Persist and Remove actions, and how far each
// origin had come. The zero State is a cluster that has never run.
type State struct {
	Records []*federationv1.Record
	Marks   map[mesh.ClusterID]Mark
	// LastHeard is on the clock of Step: what was heard before the start is usually negative.
	LastHeard map[mesh.ClusterID]time.Duration
}

// Event is something that happened. The types below are all there are.
type Event interface{ event() }

type (
	// Tick lets time pass; send one at least every LateAfter/4.
	Tick struct{}
	// Declare is the whole set of the local cluster's own service, endpoints and cluster statements. What changed is
	// signed anew, what vanished is deleted by a tombstone. The cluster record is never deleted.
	Declare struct{ Statements []Statement }
	// Admit lets a cluster in that redeemed a token of ours, or whom the operator vouched for. Pending waits for Approve.
	Admit struct {
		Member        *federationv1.Member
		ClusterRecord *federationv1.Record // may be nil
		Pending       bool
	}
	// Approve makes a pending cluster a member. Of a member it takes whatever numbers its next record has.
	Approve struct{ Name mesh.ClusterID }
	// Evict puts a cluster out, drops all it said, and keeps its name out until it is admitted again.
	Evict struct{ Name mesh.ClusterID }
	// Drain takes the traffic to a member away as the ramp says; Undo gives all back. It is said to nobody.
	Drain struct {
		Name mesh.ClusterID
		Ramp body.Ramp
		Undo bool
	}
	// Leave withdraws all that the local cluster exports and says that it goes. Members still hear it until Left.
	Leave struct{}
	// Left drops every other cluster and all they said, without a ban. The local one is then as it was before it joined.
	Left struct{}
	// Joined says that we redeemed a token. The signature over the reply was checked by the driver against the
	// issuer's key, which is Issuer.FederationKey. Issuer nil: the first cluster record describes it.
	Joined struct {
		Issuer  *federationv1.Member
		Records []*federationv1.Record
	}
	// Received is a record from a peer. From is the authenticated sender, not the origin.
	Received struct {
		From   mesh.ClusterID
		Way    Way
		Record *federationv1.Record
	}
	// Link says that the record stream of a peer came up or went down. Path is "direct" or "via X".
	Link struct {
		Peer mesh.ClusterID
		Up   bool
		Path string
	}
	// Heard is a digest: what From says of Origin. The origin's own one (From == Origin) is its sign of life.
	Heard struct {
		Origin mesh.ClusterID
		Digest *federationv1.Digest
		From   mesh.ClusterID
	}
	// Refused is something from a peer that is no record: the driver could not read it.
	Refused struct {
		From    mesh.ClusterID
		Refusal *Refusal
	}
	// MemberDead is gossip's opinion. It deletes nothing; with no beat for half of LateAfter it makes the peer late.
	MemberDead struct{ Name mesh.ClusterID }
)

// Statement is one thing the local cluster says: the body of a service, endpoints or cluster record.
type Statement struct {
	Kind string
	Key  string
	Body []byte
}

// Way is how a record came.
type Way string

// The ways of records.
const (
	Stream Way = "stream"
	Gossip Way = "gossip"
	Join   Way = "join"
)

func (Tick) event()       {}
func (Declare) event()    {}
func (Admit) event()      {}
func (Approve) event()    {}
func (Evict) event()      {}
func (Drain) event()      {}
func (Leave) event()      {}
func (Left) event()       {}
func (Joined) event()     {}
func (Received) event()   {}
func (Link) event()       {}
func (Heard) event()      {}
func (Refused) event()    {}
func (MemberDead) event() {}

// Action is something the driver must do, in the order given. Persist and Remove of one Step belong in one transaction.
type Action interface{ action() }

type (
	// Persist keeps the record on disk, in place of one with the same name.
	Persist struct{ Record *federationv1.Record }
	// Remove takes a record off the disk.
	Remove struct {
		Origin    mesh.ClusterID
		Kind, Key string
	}
	// Broadcast offers a changed record of our own to gossip: it is small and for every member.
	Broadcast struct{ Record *federationv1.Record }
	// Connect asks for a record stream to the peer, or gives its changed addresses.
	Connect struct {
		Peer        mesh.ClusterID
		Gateways    []string
		TrustDomain mesh.TrustDomain
	}
	// Disconnect closes every connection with the peer: it is out, or has no address any more.
	Disconnect struct{ Peer mesh.ClusterID }
	// Resync asks Peer for its records of Origin (which may be ourselves), resuming from the versions we hold.
	Resync struct{ Peer, Origin mesh.ClusterID }
	// FreshnessChanged says how much the state of Origin is to be trusted, and since when.
	FreshnessChanged struct {
		Origin    mesh.ClusterID
		Freshness mesh.Freshness
		Since     time.Duration // Fresh: now; else when it was last heard
	}
	// Reject is something that was not taken. The driver counts and shows it.
	Reject struct {
		From    mesh.ClusterID // who sent it; the local cluster for its own statements
		Record  string         // resource name
		Reason  string         // CamelCase, one of the Reason constants
		Message string
	}
)

func (Persist) action()          {}
func (Remove) action()           {}
func (Broadcast) action()        {}
func (Connect) action()          {}
func (Disconnect) action()       {}
func (Resync) action()           {}
func (FreshnessChanged) action() {}
func (Reject) action()           {}

// The reasons of Reject.
const (
	ReasonMalformed       = "Malformed"        // not a record of this wire
	ReasonTooLarge        = "TooLarge"         // over a cap on one record
	ReasonBadName         = "BadName"          // origin or key is not made of DNS labels
	ReasonUnknownKind     = "UnknownKind"      // a kind this version does not know
	ReasonBadSequence     = "BadSequence"      // epoch or seq zero or beyond the cap
	ReasonJump            = "SequenceJump"     // so far ahead that no cluster gets there: kept out until the operator approves
	ReasonUnknownOrigin   = "UnknownOrigin"    // nobody we trust vouches for the origin
	ReasonEvicted         = "Evicted"          // the origin was evicted here
	ReasonNotApproved     = "NotApproved"      // the origin is pending
	ReasonBadSignature    = "BadSignature"     // not signed by the origin's federation key
	ReasonEquivocation    = "Equivocation"     // two different statements under one (epoch, seq)
	ReasonKeyChanged      = "KeyChanged"       // another key or trust domain for a known name
	ReasonTrustDomain     = "TrustDomainTaken" // the trust domain belongs to another member
	ReasonClusterMismatch = "ClusterMismatch"  // a cluster record that disagrees with the member record
	ReasonNotExported     = "NotExported"      // a record that is not for us
	ReasonOverCap         = "OriginOverCap"    // too many records or bytes of one origin
	ReasonBadStatement    = "BadStatement"     // a local statement that cannot be signed
	ReasonHandshake       = "HandshakeFailed"  // what answers at a gateway does not prove to be the member
	ReasonUnknownPeer     = "UnknownPeer"      // approve or evict of a name that cannot be
	ReasonNameTaken       = "NameTaken"        // admit of a name that another key has
	ReasonNoIssuer        = "NoIssuer"         // a join result that does not describe its issuer
)
