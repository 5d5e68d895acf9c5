package peering

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	federationv1 "github.com/isthmus-mesh/isthmus/api/federation/v1"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/xds"
	"github.com/isthmus-mesh/isthmus/federation/protocol"
	"github.com/isthmus-mesh/isthmus/internal/xdsclient"
)

// ReplicaNode is what the node id of a replica that follows begins with.
const ReplicaNode = "replica~"

// Standing is where this replica stands among those of its cluster.
type Standing struct {
	// Leads: it speaks for the cluster. Term grows with each time that it begins to.
	Leads bool
	Term  uint64
	// Leader is where the replica that leads is dialled; invalid: there is none, or its address is not known.
	Leader netip.AddrPort
	// Known: it was found out whether there is a leader.
	Known bool
}

// Leadership says which replica speaks for the cluster.
type Leadership interface {
	// Current returns the standing, and a channel closed when it is outdated.
	Current() (Standing, <-chan struct{})
	// Begin is called before this replica speaks, with what it holds (LastHeard in time since now). It returns what to
	// start from, with an epoch of the local cluster that nobody has used. It may block until ctx ends.
	Begin(ctx context.Context, held protocol.State) (protocol.State, error)
	// Dial opens a connection to the leader, as this cluster's control plane.
	Dial(leader netip.AddrPort) (*grpc.ClientConn, error)
	// Node names this replica to the leader, behind ReplicaNode.
	Node() string
}

// ErrFollower is wrapped by what only the leader can do.
var ErrFollower = errors.New("this replica of isthmusd follows another one")

// Times of a replica that follows.
const (
	// beatGrace is how long the clock of a follower runs on without a beat of its leader. Then it stands still: while
	// nobody listens to the peers, none of them becomes late.
	beatGrace = 1500 * time.Millisecond
	// followSync bounds how long a start waits for the leader's records.
	followSync = 5 * time.Second
	beginAgain = time.Second
)

// following is the state of a replica that follows.
type following struct {
	heard  time.Duration // the leader's last beat, on the clock of the core
	hashes map[mesh.ClusterID][]byte
	synced bool
}

// now is the clock of the core. That of a follower stands still while its leader is silent.
func (p *Peering) now() time.Duration {
	now := time.Since(p.start)
	if p.follows == nil {
		return now
	}
	if limit := p.follows.heard + beatGrace; now > limit {
		p.start = p.start.Add(now - limit)
		return limit
	}
	return now
}

// takePart speaks for the cluster or follows, as the standing says, until ctx ends.
func (p *Peering) takePart(ctx context.Context) error {
	for ctx.Err() == nil {
		s, _ := p.cfg.Lead.Current()
		term, end := context.WithCancel(ctx)
		watched := make(chan struct{})
		go func() {
			defer close(watched)
			defer end()
			p.outlast(term, s)
		}()
		var err error
		if s.Leads {
			err = p.lead(term)
		} else {
			err = p.follow(term, s)
		}
		end()
		<-watched
		if err != nil {
			return err
		}
	}
	return nil
}

// outlast blocks until ctx ends or the standing is another.
func (p *Peering) outlast(ctx context.Context, s Standing) {
	for {
		now, changed := p.cfg.Lead.Current()
		if now != s {
			return
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}

// lead begins a term and speaks until ctx ends.
func (p *Peering) lead(ctx context.Context) error {
	p.follows = nil
	state, err := p.cfg.Lead.Begin(ctx, p.held())
	for err != nil {
		p.cfg.Logger.Error("cannot lead yet", "part", "peering", "err", err)
		select {
		case <-ctx.Done():
			return nil
		case c := <-p.calls:
			c.result <- fmt.Errorf("this replica begins to lead: %w", err)
			continue
		case <-time.After(beginAgain):
		}
		state, err = p.cfg.Lead.Begin(ctx, p.held())
	}
	p.restart(state)
	p.cfg.Sink.Synced()
	defer p.silence()
	return p.speak(ctx)
}

// held is what the core holds, with times since now.
func (p *Peering) held() protocol.State {
	s, now := p.core.State(), p.now()
	for id, at := range s.LastHeard {
		s.LastHeard[id] = at - now
	}
	return s
}

// restart begins anew from a state with times since now. What was under way from before is dropped.
func (p *Peering) restart(s protocol.State) {
	for drained := false; !drained; {
		select {
		case <-p.events:
		default:
			drained = true
		}
	}
	p.start, p.stale = time.Now(), map[mesh.ClusterID]time.Time{}
	c := p.cfg.Core
	c.Beat, c.Seed = max(c.Beat, uint64(p.start.Unix())), uint64(p.start.UnixNano())
	p.core = protocol.New(c, s)
	p.publish(true)
}

// silence ends the feeds: their readers hear no more beats and come again to whoever leads.
func (p *Peering) silence() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.feeds, p.replicas = map[mesh.ClusterID]*feed{}, nil
}

// Replicas returns what followers are served: everything.
func (p *Peering) Replicas() (xds.Feed, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.replicas == nil {
		return nil, ErrFollower
	}
	return p.replicas, nil
}

// follow keeps the core equal to the leader's until ctx ends. It says nothing to anybody.
func (p *Peering) follow(ctx context.Context, s Standing) error {
	held := p.held()
	p.follows = &following{hashes: map[mesh.ClusterID][]byte{}}
	p.restart(held)
	if s.Leader.IsValid() {
		done := make(chan struct{})
		client := xdsclient.New(p.replication(ctx, s))
		go func() {
			defer close(done)
			if err := client.Run(ctx); err != nil {
				p.cfg.Logger.Error("stream of the leader ended", "part", "peering", "err", err)
			}
		}()
		defer func() { <-done }()
	} else if s.Known {
		p.inSync()
	}
	late := time.NewTimer(followSync)
	defer late.Stop()
	for {
		snap, changed := p.cfg.Snapshots.Latest()
		if snap != nil && snap.Local != p.local {
			p.local = snap.Local
			p.publish(true)
		}
		select {
		case <-ctx.Done():
			return nil
		case ev := <-p.events:
			if err := p.step(ctx, p.replicated(p.more(ev))...); err != nil {
				return err
			}
			p.compare()
			p.ramp()
		case c := <-p.calls:
			c.result <- fmt.Errorf("%w; the one that leads answers: %s", ErrFollower, s.Leader)
		case <-late.C:
			p.inSync()
		case <-changed:
		}
	}
}

// inSync lets the first snapshot be built.
func (p *Peering) inSync() {
	if !p.follows.synced {
		p.follows.synced = true
		p.cfg.Sink.Synced()
	}
}

// replicated keeps the events that come from the leader, and lets time pass with each of its beats.
func (p *Peering) replicated(events []protocol.Event) []protocol.Event {
	var out []protocol.Event
	for _, ev := range events {
		switch e := ev.(type) {
		case protocol.Replicate:
			out = append(out, e)
		case protocol.Heard:
			if e.From != p.cfg.Core.Name {
				continue
			}
			p.follows.hashes[e.Origin] = e.Digest.GetHash()
			out = append(out, e)
			if e.Origin == p.cfg.Core.Name {
				p.follows.heard = p.now()
				out = append(out, protocol.Tick{})
			}
		}
	}
	return out
}

// compare notes that everything the leader has is here.
func (p *Peering) compare() {
	if p.follows.synced || len(p.follows.hashes) == 0 {
		return
	}
	ours := map[mesh.ClusterID][]byte{}
	for _, d := range p.core.Digests() {
		ours[mesh.ClusterID(d.Origin)] = d.Hash
	}
	for id, theirs := range p.follows.hashes {
		if !bytes.Equal(ours[id], theirs) {
			return
		}
	}
	p.inSync()
}

// replication is the client of the leader's stream. It resumes from what is held.
func (p *Peering) replication(ctx context.Context, s Standing) xdsclient.Config {
	held := map[string]string{}
	for _, r := range p.core.State().Records {
		if x := xds.NewResource(protocol.ResourceName(r), r); x != nil {
			held[x.Name] = x.Version
		}
	}
	return xdsclient.Config{
		Dial:             func(context.Context) (*grpc.ClientConn, error) { return p.cfg.Lead.Dial(s.Leader) },
		Node:             &corev3.Node{Id: ReplicaNode + p.cfg.Lead.Node(), Cluster: string(p.cfg.Core.Name)},
		Subscribe:        map[string][]string{RecordType: nil, DigestType: nil},
		Resume:           map[string]map[string]string{RecordType: held},
		OnUpdate:         func(u xdsclient.Update) error { p.fromLeader(ctx, u); return nil },
		HeartbeatTimeout: silence,
		ConnectTimeout:   2 * time.Second,
		Backoff:          xdsclient.Backoff{Base: 100 * time.Millisecond, Max: time.Second},
		OnState: func(up bool, err error) {
			if up {
				p.cfg.Logger.Info("follows the leader", "part", "peering", "leader", s.Leader.String())
			} else if ctx.Err() == nil {
				p.cfg.Logger.Warn("the leader is not heard", "part", "peering", "leader", s.Leader.String(), "err", err)
			}
		},
		Log: p.cfg.Logger,
	}
}

// fromLeader hands over what the leader sent.
func (p *Peering) fromLeader(ctx context.Context, u xdsclient.Update) {
	for _, r := range u.Added {
		body := r.GetResource().GetValue()
		switch u.TypeURL {
		case RecordType:
			rec := new(federationv1.Record)
			if len(body) > protocol.MaxRecordSize || proto.Unmarshal(body, rec) != nil {
				p.rejects.WithLabelValues(protocol.ReasonMalformed).Inc()
				continue
			}
			p.send(ctx, protocol.Replicate{Record: rec})
		case DigestType:
			d := new(federationv1.Digest)
			if len(body) <= 4096 && r.GetResource().UnmarshalTo(d) == nil {
				p.send(ctx, protocol.Heard{Origin: mesh.ClusterID(d.Origin), Digest: d, From: p.cfg.Core.Name})
			}
		}
	}
	if u.TypeURL == RecordType {
		for _, name := range u.Removed {
			p.send(ctx, protocol.Replicate{Gone: name})
		}
	}
}
