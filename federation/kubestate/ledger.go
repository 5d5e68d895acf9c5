package kubestate

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	federationv1 "github.com/isthmus-mesh/isthmus/api/federation/v1"
	"github.com/isthmus-mesh/isthmus/api/isthmus/v1alpha1"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/federation/protocol"
)

// How often Peer objects are written. Statements about members are written at once, the rest is a fallback for the
// loss of every replica.
const (
	soon    = time.Second      // after a statement that must outlive the replicas
	later   = 15 * time.Second // after a change of marks alone
	retryIn = 2 * time.Second
)

// vitalTimeout bounds a write that is waited for. The federation stands still meanwhile, so it is short; what it did
// not write is tried again.
const vitalTimeout = 2 * time.Second

// maxPeerBytes bounds the records in one Peer object; etcd takes 1.5 MiB.
const maxPeerBytes = 700 << 10

// ErrDeposed is wrapped when another leader has raised the epoch.
var ErrDeposed = errors.New("another replica leads")

// Cache is where a replica keeps everything for its own restart, on its own disk.
type Cache interface {
	Commit(actions []protocol.Action) error
	Heard(map[mesh.ClusterID]time.Time) error
}

// LedgerConfig describes the ledger of one replica.
type LedgerConfig struct {
	Client *Client
	Local  mesh.ClusterID
	// TrustDomain and FederationKey, the public half, are the local cluster's.
	TrustDomain   mesh.TrustDomain
	FederationKey ed25519.PublicKey
	Cache         Cache
	// Peers says how other clusters stand, for those who read Peer objects.
	Peers func() []protocol.Peer
	Log   *slog.Logger
}

// Ledger keeps, as Peer objects, what must outlive every replica: statements about members, evictions, descriptions of
// clusters, deletions, and how far each origin had come. The leader writes; all replicas note. It is a peering.Log.
type Ledger struct {
	cfg  LedgerConfig
	wake chan struct{}

	mu      sync.Mutex
	writing sync.Mutex // one writer of objects at a time
	origins map[mesh.ClusterID]*kept
	epoch   uint64 // claimed; 0: this replica does not lead
}

// kept is what is held of one origin.
type kept struct {
	records map[string]*federationv1.Record // by resource name
	mark    protocol.Mark
	heard   time.Time
	due     time.Time // when to write; zero: nothing new
}

// NewLedger makes a ledger; it reads nothing.
func NewLedger(cfg LedgerConfig) *Ledger {
	return &Ledger{cfg: cfg, wake: make(chan struct{}, 1), origins: map[mesh.ClusterID]*kept{}}
}

// lasting reports whether a record is kept in the API.
func lasting(kind string) bool {
	return kind == protocol.KindMember || kind == protocol.KindCluster || kind == protocol.KindTombstone || kind == protocol.KindPending || kind == protocol.KindDrain
}

// vital reports whether a change must be in the API before anybody acts on it: what this cluster says of members.
func (l *Ledger) vital(origin, kind, key string) bool {
	return origin == string(l.cfg.Local) && (kind == protocol.KindMember || kind == protocol.KindPending || kind == protocol.KindDrain ||
		kind == protocol.KindTombstone && strings.HasPrefix(key, protocol.KindMember+"/"))
}

// Load returns what the Peer objects hold, and holds it.
func (l *Ledger) Load(ctx context.Context) (protocol.State, map[mesh.ClusterID]time.Time, error) {
	s, heard := protocol.State{Marks: map[mesh.ClusterID]protocol.Mark{}}, map[mesh.ClusterID]time.Time{}
	origins := map[mesh.ClusterID]*kept{}
	err := list(ctx, l.cfg.Client, v1alpha1.PeerResource, func(list *v1alpha1.PeerList) error {
		for i := range list.Items {
			o := &list.Items[i]
			id := mesh.ClusterID(o.Name)
			k := &kept{records: map[string]*federationv1.Record{}, mark: protocol.Mark{Epoch: o.Status.Epoch, Seq: o.Status.Seq}, heard: o.Status.LastHeard}
			for _, data := range o.Status.Records {
				r := new(federationv1.Record)
				if err := proto.Unmarshal(data, r); err != nil || r.Origin != o.Name || !lasting(r.Kind) {
					l.cfg.Log.Error("a record in a Peer object is not loaded", "part", "ledger", "peer", id, "err", err)
					continue
				}
				k.records[protocol.ResourceName(r)] = r
				s.Records = append(s.Records, r)
			}
			origins[id], s.Marks[id], heard[id] = k, k.mark, k.heard
		}
		return nil
	})
	if err != nil {
		return s, nil, l.cfg.Client.explain("list", "Peers", "", err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.origins = origins
	return s, heard, nil
}

// Claim raises the own epoch over every one that was used and over atLeast, by compare-and-swap, and returns it. From
// then on this replica writes, until Resign or until another claims a higher one.
func (l *Ledger) Claim(ctx context.Context, atLeast uint64) (uint64, error) {
	l.writing.Lock()
	defer l.writing.Unlock()
	var epoch uint64
	err := l.update(ctx, l.cfg.Local, func(o *v1alpha1.Peer) error {
		epoch = max(o.Status.Epoch, atLeast) + 1
		o.Spec.TrustDomain, o.Spec.FederationKey = string(l.cfg.TrustDomain), l.cfg.FederationKey
		o.Status.Epoch, o.Status.State = epoch, v1alpha1.PeerSelf
		return nil
	})
	if err != nil {
		return 0, fmt.Errorf("raise the epoch: %w", err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.epoch = epoch
	now := time.Now()
	for _, k := range l.origins {
		k.due = now.Add(soon)
	}
	l.poke()
	return epoch, nil
}

// Resign ends the writing of this replica.
func (l *Ledger) Resign() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.epoch = 0
}

// Commit implements peering.Log: all of it in the cache, then what must outlive the replica in the API. The API being
// away fails nothing: it is tried again.
func (l *Ledger) Commit(actions []protocol.Action) error {
	if err := l.cfg.Cache.Commit(actions); err != nil {
		return err
	}
	now, vital := time.Now(), false
	l.mu.Lock()
	for _, a := range actions {
		switch a := a.(type) {
		case protocol.Persist:
			r := a.Record
			k := l.origin(mesh.ClusterID(r.Origin))
			if at := (protocol.Mark{Epoch: r.Epoch, Seq: r.Seq}); k.mark.Less(at) {
				k.mark = at
			}
			after := later
			if lasting(r.Kind) {
				k.records[protocol.ResourceName(r)], after = r, soon
			}
			k.want(now.Add(after))
			vital = vital || l.vital(r.Origin, r.Kind, r.Key)
		case protocol.Remove:
			name := string(a.Origin) + "/" + a.Kind + "/" + a.Key
			if k := l.origins[a.Origin]; k != nil && k.records[name] != nil {
				delete(k.records, name)
				k.want(now.Add(soon))
				vital = vital || l.vital(string(a.Origin), a.Kind, a.Key)
			}
		}
	}
	leads := l.epoch != 0
	l.mu.Unlock()
	if vital && leads {
		ctx, cancel := context.WithTimeout(context.Background(), vitalTimeout)
		defer cancel()
		if err := l.write(ctx, l.cfg.Local); err != nil {
			l.cfg.Log.Error("what this cluster says of members is not in the Kubernetes API yet", "part", "ledger", "err", err)
		}
	}
	l.poke()
	return nil
}

// Heard implements peering.Log.
func (l *Ledger) Heard(at map[mesh.ClusterID]time.Time) error {
	l.mu.Lock()
	for id, t := range at {
		if k := l.origin(id); t.After(k.heard) {
			if t.Sub(k.heard) > 4*later {
				k.want(time.Now().Add(later))
			}
			k.heard = t
		}
	}
	l.mu.Unlock()
	l.poke()
	return l.cfg.Cache.Heard(at)
}

func (l *Ledger) origin(id mesh.ClusterID) *kept {
	k := l.origins[id]
	if k == nil {
		k = &kept{records: map[string]*federationv1.Record{}}
		l.origins[id] = k
	}
	return k
}

func (k *kept) want(at time.Time) {
	if k.due.IsZero() || at.Before(k.due) {
		k.due = at
	}
}

func (l *Ledger) poke() {
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// Run writes what is due until ctx ends, and then, if this replica still leads, all that is not written yet.
func (l *Ledger) Run(ctx context.Context) error {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			last, cancel := context.WithTimeout(context.WithoutCancel(ctx), vitalTimeout)
			defer cancel()
			l.flush(last, time.Now().Add(time.Hour))
			return nil
		case <-l.wake:
		case <-timer.C:
		}
		next := l.flush(ctx, time.Now())
		if next.IsZero() {
			next = time.Now().Add(time.Hour)
		}
		timer.Reset(max(time.Until(next), 100*time.Millisecond))
	}
}

// flush writes every origin that is due, and says when the next is.
func (l *Ledger) flush(ctx context.Context, now time.Time) (next time.Time) {
	l.mu.Lock()
	var due []mesh.ClusterID
	for id, k := range l.origins {
		switch {
		case l.epoch == 0 || k.due.IsZero():
		case !k.due.After(now):
			due = append(due, id)
		case next.IsZero() || k.due.Before(next):
			next = k.due
		}
	}
	l.mu.Unlock()
	slices.Sort(due)
	for _, id := range due {
		err := l.write(ctx, id)
		if errors.Is(err, ErrDeposed) {
			l.cfg.Log.Warn("peers are not written: another replica leads", "part", "ledger")
			l.Resign()
			return time.Time{}
		}
		if err != nil {
			l.cfg.Log.Warn("a peer is not written to the Kubernetes API; it is tried again", "part", "ledger", "peer", id, "err", err)
			if again := time.Now().Add(retryIn); next.IsZero() || again.Before(next) {
				next = again
			}
		}
	}
	return next
}
