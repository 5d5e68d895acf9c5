package peering

import (
	"fmt"
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
	records map[*federationv1.Record]*xds.Resource // encoded once
}

// Latest implements xds.Feed.
func (f *feed) Latest() (xds.Set, <-chan struct{}) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.set, f.changed
}

// serve publishes the records, encoding those that are new.
func (f *feed) serve(records []*federationv1.Record, digests []*federationv1.Digest) {
	encoded, named := map[*federationv1.Record]*xds.Resource{}, map[string]*xds.Resource{}
	for _, r := range records {
		x := f.records[r]
		if x == nil {
			x = xds.NewResource(protocol.ResourceName(r), r)
		}
		if x != nil {
			encoded[r], named[x.Name] = x, x
		}
	}
	f.records = encoded
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
		f.serve(p.core.RecordsFor(peer.Name), digests)
	}
	if p.cfg.Lead != nil {
		if p.replicas == nil {
			p.replicas = &feed{changed: make(chan struct{})}
		}
		p.replicas.serve(p.core.State().Records, digests)
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
	for _, f := range p.feeds {
		f.publish(xds.Set{RecordType: f.set[RecordType], DigestType: digestSet(digests)})
	}
	if f := p.replicas; f != nil {
		f.publish(xds.Set{RecordType: f.set[RecordType], DigestType: digestSet(digests)})
	}
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
