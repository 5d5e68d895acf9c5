package operator

import (
	"context"

	"github.com/isthmus-mesh/isthmus/api/admin"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/federation/protocol"
	"github.com/isthmus-mesh/isthmus/internal/diag"
)

// leave takes this cluster out of the mesh, or says what that would do.
func (s *Server) leave(ctx context.Context, r admin.LeaveRequest) (admin.LeaveReply, error) {
	out := admin.LeaveReply{Cluster: string(s.cfg.Local.ID), Members: []string{}, Exports: []string{}, Imports: []string{}, Heard: []string{}, Unheard: []string{}, DryRun: r.DryRun}
	for _, p := range s.cfg.Peering.Status().Peers {
		if p.State == protocol.Approved {
			out.Members = append(out.Members, string(p.Name))
		}
	}
	if len(out.Members) == 0 {
		return out, diag.Hint(&protocol.Refusal{Reason: protocol.ReasonUnknownPeer, Message: "cluster " + out.Cluster + " is in no mesh: nothing is to be left"}, "isthmus peers lists the clusters that are known")
	}
	if snap, _ := s.cfg.Snapshots.Latest(); snap != nil {
		imported := map[string]bool{}
		for _, i := range snap.Imports {
			imported[mesh.GlobalHost(i.Name, i.Namespace)] = imported[mesh.GlobalHost(i.Name, i.Namespace)] || i.Cluster != s.cfg.Local.ID
		}
		for _, svc := range snap.Services {
			if svc.Exported {
				out.Exports = append(out.Exports, svc.Host)
			}
			if imported[svc.Host] {
				out.Imports = append(out.Imports, svc.Host)
			}
		}
	}
	if r.DryRun {
		return out, nil
	}
	gone, err := s.cfg.Peering.Leave(ctx)
	for _, id := range gone.Heard {
		out.Heard = append(out.Heard, string(id))
	}
	for _, id := range gone.Unheard {
		out.Unheard = append(out.Unheard, string(id))
	}
	if err == nil {
		s.cfg.Log.Info("left the mesh", "part", "operator", "heard", out.Heard, "unheard", out.Unheard)
	}
	return out, err
}
