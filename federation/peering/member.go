package peering

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"time"

	federationv1 "github.com/isthmus-mesh/isthmus/api/federation/v1"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/federation/protocol"
)

// Admit makes a cluster that redeemed our token a member, or lets it wait. It returns the records the joiner needs.
func (p *Peering) Admit(ctx context.Context, m *federationv1.Member, cluster *federationv1.Record, pending bool) ([]*federationv1.Record, bool, error) {
	err := p.change(ctx, func() error { return p.core.CanAdmit(m) }, protocol.Admit{Member: m, ClusterRecord: cluster, Pending: pending})
	if err != nil {
		return nil, false, err
	}
	var records []*federationv1.Record
	waits := false
	err = p.call(ctx, func(context.Context, time.Duration) error {
		for _, peer := range p.core.Peers() {
			waits = waits || string(peer.Name) == m.Name && peer.State == protocol.Pending
		}
		var others []*federationv1.Record
		for _, r := range p.core.Records() {
			switch own := r.Origin == string(p.cfg.Core.Name); {
			case r.Kind != protocol.KindCluster && r.Kind != protocol.KindMember, waits && (!own || r.Kind == protocol.KindMember):
			case own:
				records = append(records, r)
			default:
				others = append(others, r)
			}
		}
		records = append(records, others...) // the issuer's own first: they introduce the others
		return nil
	})
	return records, waits, err
}

// Joined takes what the issuer of a redeemed token told us.
func (p *Peering) Joined(ctx context.Context, records []*federationv1.Record) error {
	return p.change(ctx, nil, protocol.Joined{Records: records})
}

// Approve makes a pending cluster a member.
func (p *Peering) Approve(ctx context.Context, name string) error {
	return p.change(ctx, nil, protocol.Approve{Name: mesh.ClusterID(name)})
}

// Evict puts a cluster out. One that is not known here is refused: most likely the name is a slip.
func (p *Peering) Evict(ctx context.Context, name string) error {
	known := func() error {
		for _, peer := range p.core.Peers() {
			if string(peer.Name) == name {
				return nil
			}
		}
		return &protocol.Refusal{Reason: protocol.ReasonUnknownPeer, Message: fmt.Sprintf("no cluster %q is known here", name)}
	}
	return p.change(ctx, known, protocol.Evict{Name: mesh.ClusterID(name)})
}

// OwnRecord returns the local cluster's signed cluster record, for a join request.
func (p *Peering) OwnRecord(ctx context.Context) (*federationv1.Record, error) {
	var own *federationv1.Record
	err := p.call(ctx, func(context.Context, time.Duration) error {
		for _, r := range p.core.Records() {
			if r.Origin == string(p.cfg.Core.Name) && r.Kind == protocol.KindCluster {
				own = r
			}
		}
		if own == nil {
			return errors.New("this cluster's own record is not made yet: its first snapshot is still being built")
		}
		return nil
	})
	return own, err
}

// evictions tells what names all that was evicted, here and by members.
func (p *Peering) evictions() {
	sum, some := sha256.New(), false
	for _, r := range p.core.Records() {
		if r.Kind == protocol.KindTombstone && strings.HasPrefix(r.Key, protocol.KindMember+"/") && !protocol.Withdrawn(r) {
			some = true
			fmt.Fprintln(sum, protocol.ResourceName(r), protocol.Version(r))
		}
	}
	bans := ""
	if some {
		bans = hex.EncodeToString(sum.Sum(nil)[:8])
	}
	if bans != p.bans && p.cfg.Evicted != nil {
		p.bans = bans
		p.cfg.Evicted(bans)
	}
}
