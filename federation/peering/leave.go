package peering

import (
	"context"
	"fmt"
	"time"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/federation/protocol"
)

// hearFor bounds how long members are given to hear that this cluster leaves. One that heard it hangs up.
const hearFor = 10 * time.Second

// Departure is what leaving did.
type Departure struct {
	Heard   []mesh.ClusterID // members that hung up on hearing it
	Unheard []mesh.ClusterID // members that were not reached: others tell them, or the lease of this cluster ends there
}

// Leave withdraws all that this cluster exports, tells the members that it goes, and drops them. What ctx ends is the
// waiting for those that do not hear it; the cluster leaves all the same.
func (p *Peering) Leave(ctx context.Context) (Departure, error) {
	var out Departure
	up := map[mesh.ClusterID]bool{}
	err := p.call(ctx, func(ctx context.Context, now time.Duration) error {
		for _, peer := range p.core.Peers() {
			if peer.State == protocol.Approved {
				up[peer.Name] = peer.Path != ""
			}
		}
		if len(up) == 0 {
			return &protocol.Refusal{Reason: protocol.ReasonUnknownPeer, Message: fmt.Sprintf("cluster %s is in no mesh: it has no members but itself", p.cfg.Core.Name)}
		}
		return p.act(ctx, p.core.Step(now, protocol.Leave{}))
	})
	if err != nil {
		return out, err
	}
	waiting, cancel := context.WithTimeout(ctx, hearFor)
	defer cancel()
	look := time.NewTicker(100 * time.Millisecond)
	defer look.Stop()
	for still := true; still && waiting.Err() == nil; {
		select {
		case <-waiting.Done():
		case <-look.C:
		}
		still = false
		for _, peer := range p.Status().Peers {
			still = still || up[peer.Name] && peer.Path != ""
		}
	}
	err = p.change(context.WithoutCancel(ctx), func() error {
		for _, peer := range p.core.Peers() {
			switch {
			case peer.State != protocol.Approved:
			case up[peer.Name] && peer.Path == "":
				out.Heard = append(out.Heard, peer.Name)
			default:
				out.Unheard = append(out.Unheard, peer.Name)
			}
		}
		return nil
	}, protocol.Left{})
	return out, err
}
