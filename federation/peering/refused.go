package peering

import (
	"maps"
	"net/netip"
	"time"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/federation/policy"
	"github.com/isthmus-mesh/isthmus/federation/protocol"
)

// sayAgain is how long the log is silent about a peer and a reason that it has named: a peer that lies lies often.
const sayAgain = time.Minute

// refusals is what is not taken of peers.
type refusals struct {
	policy map[mesh.ClusterID]map[string]uint64 // of what they say now, by reason
	said   map[saying]time.Time
}

type saying struct {
	peer   mesh.ClusterID
	reason string
}

// due reports whether the log is to name this now.
func (r *refusals) due(peer mesh.ClusterID, reason string, now time.Time) bool {
	if r.said == nil {
		r.said = map[saying]time.Time{}
	}
	s := saying{peer, reason}
	if now.Sub(r.said[s]) < sayAgain && !r.said[s].IsZero() {
		return false
	}
	if len(r.said) > 4096 {
		clear(r.said)
	}
	r.said[s] = now
	return true
}

// counted is how many things were refused of each peer, by reason: records since the start, and what is wrong now in those
// that were taken.
func (r *refusals) counted(peers []protocol.Peer) map[mesh.ClusterID]map[string]uint64 {
	out := map[mesh.ClusterID]map[string]uint64{}
	for _, p := range peers {
		all := maps.Clone(p.Refused)
		for reason, n := range r.policy[p.Name] {
			if all == nil {
				all = map[string]uint64{}
			}
			all[reason] += n
		}
		if len(all) > 0 {
			out[p.Name] = all
		}
	}
	return out
}

// overCap is the problem of a peer that says more than it may.
func overCap(p protocol.Peer) mesh.Problem {
	return mesh.Problem{
		Object: mesh.ObjectRef{Kind: "Peer", Name: string(p.Name), Source: "cluster " + string(p.Name)}, Reason: protocol.ReasonOverCap,
		Message: "cluster " + string(p.Name) + " says more than a cluster may; what is over the cap is not used",
		Remedy:  "let it export less, or put it out: isthmus peer evict " + string(p.Name),
	}
}

// dialable keeps the gateways of a member that a control plane may dial: a member must not send us to ourselves, nor to a
// metadata service.
func (p *Peering) dialable(gateways []string) (out []string) {
	for _, g := range gateways {
		ap, err := netip.ParseAddrPort(g)
		if err == nil && ap.Port() != 0 && policy.BadAddress(ap.Addr(), p.cfg.Policy.AllowLoopback) == "" {
			out = append(out, g)
		}
	}
	return out
}
