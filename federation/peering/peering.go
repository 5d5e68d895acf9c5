// Package peering drives the federation core: it owns the one goroutine that steps it, streams signed records to and
// from other clusters over delta xDS, keeps them on disk and reports what peers export to the store.
//
// It decides nothing about records; federation/protocol does. It never deletes what a silent peer said.
package peering

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
	"google.golang.org/protobuf/encoding/protodelim"

	federationv1 "github.com/isthmus-mesh/isthmus/api/federation/v1"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/federation/policy"
	"github.com/isthmus-mesh/isthmus/federation/protocol"
)

// Log keeps the core's state over restarts: the ledger.
type Log interface {
	// Commit writes the Persist and Remove actions in one transaction, durably, or nothing.
	Commit(actions []protocol.Action) error
	// Heard notes when each origin was last heard.
	Heard(map[mesh.ClusterID]time.Time) error
}

// Config describes one cluster's part in the federation. All fields are needed but Dial and Broadcast.
type Config struct {
	Core  protocol.Config
	State protocol.State
	Log   Log
	// Local is this cluster; its record is made from it.
	Local *mesh.Cluster
	// Snapshots give what this cluster exports.
	Snapshots mesh.Snapshots
	// Policy steers what is believed of peers.
	Policy policy.Options
	// Sink takes what the members export, one input for each.
	Sink mesh.Sink
	// Trust is told the roots of every approved member, and what is no longer trusted by its absence.
	Trust func(map[mesh.TrustDomain][]byte)
	// Evicted is told what changes with each cluster that is evicted. Nil: nobody wants it.
	Evicted func(evictions string)
	// Changed is told of each cluster whose standing is another than before, by whoever: no state is that of a name which is
	// not known. by says who spoke. It must not block. Nil: nobody wants it.
	Changed func(name mesh.ClusterID, was, now protocol.PeerState, by []mesh.ClusterID)
	// TLS gives the client configuration for the record stream of a member.
	TLS func(mesh.TrustDomain) *tls.Config
	// Dial opens the connections of record streams; nil is the network.
	Dial func(ctx context.Context, addr string) (net.Conn, error)
	// Broadcast offers a packet to gossip.
	Broadcast func(key string, b []byte)
	// Lead says which of several replicas speaks for the cluster; the others follow it. nil: there is one.
	Lead   Leadership
	Logger *slog.Logger
	Reg    prometheus.Registerer
}

// Peering is the driver.
type Peering struct {
	cfg     Config
	start   time.Time
	events  chan protocol.Event
	calls   chan call
	status  atomic.Pointer[Status]
	rejects *prometheus.CounterVec
	ended   chan struct{}

	// The rest belongs to the goroutine of Run.
	core    *protocol.Core
	local   *mesh.Cluster // the newest
	follows *following    // nil: this replica speaks
	links   map[mesh.ClusterID]*link
	given   map[mesh.ClusterID]bool // origins whose input the sink has
	trusted map[mesh.TrustDomain][]byte
	bans    string // as Evicted was told
	stale   map[mesh.ClusterID]time.Time
	drained map[mesh.ClusterID]uint32 // as the sink was told
	beaten  uint64                    // the own beat last served
	refused refusals
	encoded encodings
	memo    policy.Memo

	mu       sync.Mutex
	feeds    map[mesh.ClusterID]*feed
	replicas *feed // nil: this replica does not speak
}

// Status is what operators see.
type Status struct {
	Peers    []protocol.Peer
	Start    time.Time                    // zero of Peer.LastHeard
	Stale    map[mesh.ClusterID]time.Time // since when a peer that is not fresh was last heard
	Gateways map[mesh.ClusterID]string    // gateway that carries the record stream now
	Digests  []*federationv1.Digest
	// Refused counts what is not taken of each peer, by reason.
	Refused map[mesh.ClusterID]map[string]uint64
	// Banned holds the members that have evicted this cluster: their workloads refuse it.
	Banned map[mesh.ClusterID]bool
	// Down says why the record stream of a member is not up, in the words of the last try.
	Down map[mesh.ClusterID]string
}

// errEnded is returned by calls after Run has ended.
var errEnded = errors.New("the federation is shutting down")

// New loads the core; nothing runs until Run.
func New(cfg Config) (*Peering, error) {
	if err := cfg.Core.Validate(); err != nil {
		return nil, fmt.Errorf("federation: %w", err)
	}
	p := &Peering{
		cfg: cfg, start: time.Now(), events: make(chan protocol.Event, 1024), calls: make(chan call), ended: make(chan struct{}),
		links: map[mesh.ClusterID]*link{}, given: map[mesh.ClusterID]bool{}, stale: map[mesh.ClusterID]time.Time{}, feeds: map[mesh.ClusterID]*feed{},
		rejects: promauto.With(cfg.Reg).NewCounterVec(prometheus.CounterOpts{
			Namespace: "isthmus", Subsystem: "peering", Name: "rejected_total", Help: "Records and statements that were not taken, by reason.",
		}, []string{"reason"}),
	}
	p.local = cfg.Local
	p.core = protocol.New(cfg.Core, cfg.State)
	p.publish(true)
	if cfg.Lead == nil {
		cfg.Sink.Synced() // what was kept is there before the first snapshot: a restart takes nothing away
	}
	return p, nil
}

// Status returns the newest status; its values must not be changed.
func (p *Peering) Status() *Status { return p.status.Load() }

// Run steps the core until ctx ends. It returns an error when the ledger cannot be written.
func (p *Peering) Run(ctx context.Context) error {
	defer close(p.ended)
	if p.cfg.Lead == nil {
		return p.speak(ctx)
	}
	return p.takePart(ctx)
}

// speak is this cluster's part in the federation, until ctx ends.
func (p *Peering) speak(ctx context.Context) error {
	defer p.stopLinks()
	tick := time.NewTicker(250 * time.Millisecond)
	defer tick.Stop()
	if err := p.step(ctx, protocol.Tick{}); err != nil {
		return err
	}
	snap, changed := p.cfg.Snapshots.Latest()
	for declared := false; ; {
		if !declared {
			declared = true
			if snap != nil {
				if err := p.step(ctx, p.declaration(snap)); err != nil {
					return err
				}
			}
		}
		var err error
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			err = p.step(ctx, protocol.Tick{})
			p.beat()
			p.ramp()
		case ev := <-p.events:
			err = p.step(ctx, p.more(ev)...)
		case c := <-p.calls:
			c.result <- c.do(ctx, p.now())
			err = p.step(ctx, protocol.Tick{})
		case <-changed:
			snap, changed = p.cfg.Snapshots.Latest()
			declared = false
		}
		if err != nil {
			return err
		}
	}
}

// more takes what else is waiting, so that a burst of records is one transaction and one snapshot.
func (p *Peering) more(first protocol.Event) []protocol.Event {
	out := []protocol.Event{first}
	for len(out) < 512 {
		select {
		case ev := <-p.events:
			out = append(out, ev)
		default:
			return out
		}
	}
	return out
}

func (p *Peering) declaration(snap *mesh.Snapshot) protocol.Declare {
	p.local = snap.Local
	own := policy.ClusterStatement(snap.Local, p.cfg.Core.PublicKey, []string{"pod-sni", capGzip})
	return protocol.Declare{Statements: append(policy.Exports(snap), own)}
}

// step feeds events to the core and does what it asks.
func (p *Peering) step(ctx context.Context, events ...protocol.Event) error {
	var actions []protocol.Action
	now := p.now()
	for _, ev := range events {
		actions = append(actions, p.core.Step(now, ev)...)
	}
	return p.act(ctx, actions)
}

func (p *Peering) act(ctx context.Context, actions []protocol.Action) error {
	if err := p.cfg.Log.Commit(actions); err != nil {
		return fmt.Errorf("federation: %w", err)
	}
	var changed, touched bool       // records or freshness; anything else that is shown
	var connects []protocol.Connect // once the roots of the members are in force
	for _, a := range actions {
		switch a := a.(type) {
		case protocol.Persist, protocol.Remove:
			changed = true
		case protocol.Broadcast:
			p.broadcast(a.Record)
		case protocol.Connect:
			connects, touched = append(connects, a), true
		case protocol.Disconnect:
			connects = slices.DeleteFunc(connects, func(c protocol.Connect) bool { return c.Peer == a.Peer })
			p.disconnect(a.Peer)
			touched = true
		case protocol.Resync:
			if l := p.links[a.Peer]; l != nil {
				l.restart(ctx)
			}
		case protocol.FreshnessChanged:
			p.freshness(a)
			changed = true
		case protocol.Reject:
			p.rejects.WithLabelValues(a.Reason).Inc()
			if p.refused.due(a.From, a.Reason, time.Now()) {
				p.cfg.Logger.Warn("record not taken", "peer", a.From, "record", a.Record, "reason", a.Reason, "err", a.Message)
			}
			touched = true
		}
	}
	if changed || touched {
		p.publish(changed)
	}
	for _, c := range connects {
		if p.follows == nil {
			p.connect(ctx, c)
		}
	}
	return nil
}

func (p *Peering) freshness(a protocol.FreshnessChanged) {
	if a.Freshness == mesh.Fresh {
		delete(p.stale, a.Origin)
		p.cfg.Logger.Info("peer is fresh again", "peer", a.Origin)
		return
	}
	p.stale[a.Origin] = p.start.Add(a.Since)
	p.cfg.Logger.Warn("peer was not heard", "peer", a.Origin, "state", a.Freshness.String(), "since", p.stale[a.Origin])
}

// publish brings the status in line with the core, and with records also the sink, the trust and the feeds.
func (p *Peering) publish(records bool) {
	peers := p.core.Peers()
	s := &Status{Peers: peers, Start: p.start, Stale: map[mesh.ClusterID]time.Time{}, Gateways: p.gateways(), Digests: p.core.Digests(), Banned: p.banned(), Down: p.down()}
	for id, at := range p.stale {
		if !slices.ContainsFunc(peers, func(x protocol.Peer) bool { return x.Name == id && x.State == protocol.Approved }) {
			delete(p.stale, id) // should it come again, it begins anew
			continue
		}
		s.Stale[id] = at
	}
	if records {
		p.report(peers, s.Banned)
		p.trust(peers)
		p.evictions()
		if p.follows == nil {
			p.feed(peers, s.Digests)
		}
	}
	s.Refused = p.refused.counted(peers)
	p.changed(p.status.Swap(s), peers)
}

// gateways says through which gateway each record stream goes now.
func (p *Peering) gateways() map[mesh.ClusterID]string {
	out := map[mesh.ClusterID]string{}
	for id, l := range p.links {
		out[id] = l.gateway()
	}
	return out
}

// report hands the members' exports to the sink.
func (p *Peering) report(peers []protocol.Peer, banned map[mesh.ClusterID]bool) {
	fresh, capped := map[mesh.ClusterID]mesh.Freshness{}, map[mesh.ClusterID]protocol.Peer{}
	for _, peer := range peers {
		fresh[peer.Name] = peer.Freshness
		if peer.OverCap {
			capped[peer.Name] = peer
		}
	}
	believe := p.cfg.Policy
	p.drained = p.taken()
	believe.Memo, believe.Drained = &p.memo, p.drained
	believe.OwnRanges = slices.Concat(believe.OwnRanges, p.local.PodRanges, p.local.ServiceRanges)
	// Only a peer that is not fresh carries a time: that of a fresh one changes all the time.
	origins, _ := policy.Imports(p.local, p.core.Records(), func(id mesh.ClusterID) (mesh.Freshness, time.Time) {
		return fresh[id], p.stale[id]
	}, believe)
	p.refused.policy = map[mesh.ClusterID]map[string]uint64{}
	gone := p.given
	p.given = map[mesh.ClusterID]bool{}
	for _, o := range origins {
		p.refused.policy[o.Cluster] = o.Refused
		if peer, over := capped[o.Cluster]; over {
			o.Input.Problems = append(o.Input.Problems, overCap(peer))
		}
		if banned[o.Cluster] { // its gateways answer, its workloads would refuse us
			o.Input = mesh.Input{Clusters: o.Input.Clusters, Problems: []mesh.Problem{{
				Object: mesh.ObjectRef{Kind: "Peer", Name: string(o.Cluster)}, Reason: "EvictedByPeer", Message: "cluster " + string(o.Cluster) + " has evicted this cluster; its services are not used",
				Remedy: "ask its operator to let this cluster in again: isthmus token create --for " + string(p.cfg.Core.Name) + " there, isthmus join here",
			}}}
		}
		p.cfg.Sink.Report(string(o.Cluster), o.Input)
		p.given[o.Cluster] = true
		delete(gone, o.Cluster)
	}
	for id := range gone {
		p.cfg.Sink.Forget(string(id))
	}
}

// trust hands over the roots of approved members when they changed.
func (p *Peering) trust(peers []protocol.Peer) {
	roots := map[mesh.TrustDomain][]byte{}
	for _, peer := range peers {
		if peer.State == protocol.Approved && peer.Cluster != nil {
			roots[peer.TrustDomain] = peer.Cluster.Bundle
		}
	}
	same := p.trusted != nil && len(roots) == len(p.trusted)
	for td, pem := range roots {
		same = same && bytes.Equal(p.trusted[td], pem)
	}
	if !same {
		p.trusted = roots
		p.cfg.Trust(roots)
	}
}

func (p *Peering) broadcast(r *federationv1.Record) {
	var b bytes.Buffer
	if _, err := protodelim.MarshalTo(&b, r); err == nil && p.cfg.Broadcast != nil {
		p.cfg.Broadcast(protocol.ResourceName(r), b.Bytes())
	}
}

// OnPacket takes a gossip broadcast: one record. It drops it when the core is behind; streams bring it again.
func (p *Peering) OnPacket(b []byte) {
	r := new(federationv1.Record)
	if len(b) > 2*protocol.MaxBroadcast || protodelim.UnmarshalFrom(bytes.NewReader(b), r) != nil || protocol.Validate(r) != nil {
		return
	}
	p.offer(protocol.Received{Way: protocol.Gossip, Record: r})
}

// GossipState returns our digests for a member that exchanges states over gossip.
func (p *Peering) GossipState() []byte {
	var b bytes.Buffer
	for _, d := range p.status.Load().Digests {
		if _, err := protodelim.MarshalTo(&b, d); err != nil || b.Len() > 1<<20 {
			break
		}
	}
	return b.Bytes()
}

// OnGossipState takes what a member said there. Who said it is not proven, so it counts as hearsay.
func (p *Peering) OnGossipState(b []byte) {
	r := bytes.NewReader(b)
	for n := 0; r.Len() > 0 && n < 10000; n++ {
		d := new(federationv1.Digest)
		if (protodelim.UnmarshalOptions{MaxSize: 4096}).UnmarshalFrom(r, d) != nil {
			return
		}
		p.offer(protocol.Heard{Origin: mesh.ClusterID(d.Origin), Digest: d})
	}
}

// OnMember takes gossip's opinion on a member.
func (p *Peering) OnMember(name string, alive bool) {
	if !alive {
		p.offer(protocol.MemberDead{Name: mesh.ClusterID(name)})
	}
}

// Members returns the names of approved members, for gossip.
func (p *Peering) Members() []string {
	var out []string
	for _, peer := range p.status.Load().Peers {
		if peer.State == protocol.Approved {
			out = append(out, string(peer.Name))
		}
	}
	return out
}

// Gateways returns where an approved member is dialled, and its trust domain.
func (p *Peering) Gateways(name string) ([]netip.AddrPort, mesh.TrustDomain) {
	for _, peer := range p.status.Load().Peers {
		if string(peer.Name) == name && peer.State == protocol.Approved && peer.Cluster != nil {
			return addresses(p.dialable(peer.Cluster.Gateways)), peer.TrustDomain
		}
	}
	return nil, ""
}

func addresses(in []string) []netip.AddrPort {
	var out []netip.AddrPort
	for _, s := range in {
		if a, err := netip.ParseAddrPort(s); err == nil {
			out = append(out, a)
		}
	}
	return out
}

// offer hands an event over unless the core is behind.
func (p *Peering) offer(ev protocol.Event) {
	select {
	case p.events <- ev:
	default:
	}
}

// send hands an event over and waits for room: a stream is slowed down, not cut.
func (p *Peering) send(ctx context.Context, ev protocol.Event) {
	select {
	case p.events <- ev:
	case <-ctx.Done():
	case <-p.ended:
	}
}

// call is something to be done between two steps.
type call struct {
	do     func(ctx context.Context, now time.Duration) error
	result chan error
}

// call runs f between two steps and returns its error. f gets the context of Run: what it starts outlives the caller.
func (p *Peering) call(ctx context.Context, f func(ctx context.Context, now time.Duration) error) error {
	c := call{f, make(chan error, 1)}
	select {
	case p.calls <- c:
	case <-ctx.Done():
		return ctx.Err()
	case <-p.ended:
		return errEnded
	}
	return <-c.result
}

// change steps one event and reports the first refusal it met as an error.
func (p *Peering) change(ctx context.Context, check func() error, ev protocol.Event) error {
	return p.call(ctx, func(ctx context.Context, now time.Duration) error {
		if check != nil {
			if err := check(); err != nil {
				return err
			}
		}
		actions := p.core.Step(now, ev)
		var refusal error
		for _, a := range actions {
			if r, ok := a.(protocol.Reject); ok && refusal == nil {
				refusal = &protocol.Refusal{Reason: r.Reason, Message: r.Message}
			}
		}
		if err := p.act(ctx, actions); err != nil {
			return err
		}
		return refusal
	})
}
