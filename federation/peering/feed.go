package peering

import (
	"fmt"
	"slices"
	"sync"
	"time"

	federationv1 "github.com/isthmus-mesh/isthmus/api/federation/v1"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/xds"
	"github.com/isthmus-mesh/isthmus/federation/protocol"
)

// The resource types of the record stream.
const (
	RecordType = "type.googleapis.com/isthmus.federation.v1.Record"
	DigestType = "type.googleapis.com/isthmus.federation.v1.Digest"
)

// heardEvery is after how many beats it is kept on disk when peers were last heard. More often costs writes, less
// often makes the age of a peer that is away less exact after a restart.
const heardEvery = 10

// feed is what one member is served. It implements xds.Feed.
type feed struct {
	mu      sync.Mutex
	set     xds.Set
	changed chan struct{}
}

// Latest implements xds.Feed.
func (f *feed) Latest() (xds.Set, <-chan struct{}) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.set, f.changed
}

// encodings are the records as they are served, each encoded once for all who get it.
type encodings struct {
	old, next map[*federationv1.Record]*xds.Resource
}

// of returns the record encoded.
func (e *encodings) of(r *federationv1.Record) *xds.Resource {
	x := e.next[r]
	if x == nil {
		if x = e.old[r]; x == nil {
			x = xds.NewResource(protocol.ResourceName(r), r)
		}
		e.next[r] = x
	}
	return x
}

// turn forgets what was not asked for since the last turn.
func (e *encodings) turn() { e.old, e.next = e.next, map[*federationv1.Record]*xds.Resource{} }

// serve publishes the records.
func (f *feed) serve(records []*federationv1.Record, digests []*federationv1.Digest, e *encodings) {
	named := make(map[string]*xds.Resource, len(records))
	for _, r := range records {
		if x := e.of(r); x != nil {
			named[x.Name] = x
		}
	}
	f.publish(xds.Set{RecordType: xds.NamedOf(named), DigestType: digestSet(digests)})
}

func (f *feed) publish(set xds.Set) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.set = set
	close(f.changed)
	f.changed = make(chan struct{})
}

// Feed returns what the member of that trust domain is served; strangers, pending and evicted clusters get an error.
func (p *Peering) Feed(td mesh.TrustDomain) (xds.Feed, error) {
	for _, peer := range p.status.Load().Peers {
		if peer.TrustDomain == td && peer.State == protocol.Approved {
			p.mu.Lock()
			defer p.mu.Unlock()
			if f := p.feeds[peer.Name]; f != nil {
				return f, nil
			}
		}
	}
	for _, peer := range p.status.Load().Peers {
		if peer.TrustDomain == td && peer.State == protocol.Pending {
			return nil, fmt.Errorf("cluster %s waits for approval: isthmus peer approve %s in cluster %s", peer.Name, peer.Name, p.cfg.Core.Name)
		}
	}
	return nil, fmt.Errorf("cluster of trust domain %s is not a member of cluster %s", td, p.cfg.Core.Name)
}

// feed brings the feeds in line with the core's records. It runs in the goroutine of Run, or before it.
func (p *Peering) feed(peers []protocol.Peer, digests []*federationv1.Digest) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.encoded.turn()
	wanted := map[mesh.ClusterID]bool{}
	for _, peer := range peers {
		if peer.State != protocol.Approved {
			continue
		}
		wanted[peer.Name] = true
		f := p.feeds[peer.Name]
		if f == nil {
			f = &feed{changed: make(chan struct{})}
			p.feeds[peer.Name] = f
		}
		f.serve(p.core.RecordsFor(peer.Name), told(peer.Name, digests), &p.encoded)
	}
	if p.cfg.Lead != nil {
		if p.replicas == nil {
			p.replicas = &feed{changed: make(chan struct{})}
		}
		p.replicas.serve(p.core.State().Records, digests, &p.encoded)
	}
	for name, f := range p.feeds {
		if !wanted[name] {
			f.publish(xds.Set{RecordType: xds.NamedOf(nil), DigestType: xds.NamedOf(nil)})
			delete(p.feeds, name)
		}
	}
}

// beat renews the digests in every feed, once for each beat of our own.
func (p *Peering) beat() {
	own := p.core.OwnDigest().Beat
	if own == p.beaten {
		return
	}
	p.beaten = own
	digests := p.core.Digests()
	s := *p.status.Load()
	s.Digests, s.Peers, s.Gateways, s.Down = digests, p.core.Peers(), p.gateways(), p.down()
	p.status.Store(&s)
	if own%heardEvery == 0 {
		heard := map[mesh.ClusterID]time.Time{}
		for _, peer := range s.Peers {
			if peer.Heard {
				heard[peer.Name] = p.start.Add(peer.LastHeard)
			}
		}
		if err := p.cfg.Log.Heard(heard); err != nil {
			p.cfg.Logger.Error("last beats not kept", "part", "peering", "err", err)
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for name, f := range p.feeds {
		f.publish(xds.Set{RecordType: f.set[RecordType], DigestType: digestSet(told(name, digests))})
	}
	if f := p.replicas; f != nil {
		f.publish(xds.Set{RecordType: f.set[RecordType], DigestType: digestSet(digests)})
	}
}

// told are the digests as a member is told them: its own only when more than its beat changed, since it knows that.
func told(to mesh.ClusterID, digests []*federationv1.Digest) []*federationv1.Digest {
	out := slices.Clone(digests)
	for i, d := range out {
		if d.Origin == string(to) {
			out[i] = &federationv1.Digest{Origin: d.Origin, Epoch: d.Epoch, Seq: d.Seq, Hash: d.Hash}
		}
	}
	return out
}

func digestSet(digests []*federationv1.Digest) *xds.Named {
	out := make(map[string]*xds.Resource, len(digests))
	for _, d := range digests {
		if r := xds.NewResource(d.Origin, d); r != nil {
			out[d.Origin] = r
		}
	}
	return xds.NamedOf(out)
}
