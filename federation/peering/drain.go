package peering

import (
	"context"
	"maps"
	"time"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/federation/protocol"
	"github.com/isthmus-mesh/isthmus/federation/protocol/body"
)

// Drain takes the traffic of this cluster to a member away, bit by bit until it is over; a second one begins anew.
func (p *Peering) Drain(ctx context.Context, name string, over time.Duration) error {
	return p.change(ctx, nil, protocol.Drain{Name: mesh.ClusterID(name), Ramp: body.Ramp{Begun: time.Now(), Over: over}})
}

// Undrain gives all back at once.
func (p *Peering) Undrain(ctx context.Context, name string) error {
	return p.change(ctx, nil, protocol.Drain{Name: mesh.ClusterID(name), Undo: true})
}

// taken is how much of each member's traffic is taken away now.
func (p *Peering) taken() map[mesh.ClusterID]uint32 {
	var out map[mesh.ClusterID]uint32
	for id, ramp := range p.core.Drains() {
		if n := ramp.Taken(time.Now()); n > 0 {
			if out == nil {
				out = map[mesh.ClusterID]uint32{}
			}
			out[id] = n
		}
	}
	return out
}

// ramp reports anew when a drain made a step.
func (p *Peering) ramp() {
	if !maps.Equal(p.taken(), p.drained) {
		p.publish(true)
	}
}
