package operator

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"time"

	"github.com/isthmus-mesh/isthmus/api/admin"
	"github.com/isthmus-mesh/isthmus/cmd/isthmusd/internal/authority"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/federation/protocol"
	"github.com/isthmus-mesh/isthmus/internal/diag"
)

// trust says where the roots stand.
func (s *Server) trust() admin.Trust {
	st := s.cfg.Trust.Status()
	out := admin.Trust{
		Cluster: string(s.cfg.Local.ID), TrustDomain: string(s.cfg.Local.TrustDomain), Phase: st.Phase, Given: st.Given,
		Started: st.Started, By: st.By, Expires: st.Expires, Roots: []admin.TrustRoot{}, Lagging: []admin.TrustLag{}, Domains: []admin.TrustDomain{},
	}
	for _, r := range st.Roots {
		out.Roots = append(out.Roots, admin.TrustRoot{Subject: r.Subject, Fingerprint: r.Fingerprint, State: r.State, NotAfter: r.NotAfter, Until: r.Until})
	}
	for _, l := range st.Lags {
		out.Lagging = append(out.Lagging, admin.TrustLag{Kind: l.Kind, Name: l.Name, Why: l.Why})
	}
	if snap, _ := s.cfg.Snapshots.Latest(); snap != nil {
		for _, c := range snap.Clusters {
			if c.TrustDomain != s.cfg.Local.TrustDomain && len(c.Roots) > 0 {
				out.Domains = append(out.Domains, admin.TrustDomain{Name: string(c.TrustDomain), Cluster: string(c.ID), Roots: authority.Fingerprints(c.Roots)})
			}
		}
	}
	return out
}

// rotate begins, hastens or gives up a rotation, and says where it stands.
func (s *Server) rotate(ctx context.Context, r admin.RotateRequest) (admin.Trust, error) {
	o := authority.Options{Now: r.Now, By: Who(ctx)}
	if r.Overlap != "" {
		d, err := time.ParseDuration(r.Overlap)
		if err != nil || d < 0 {
			return admin.Trust{}, diag.Hint(fmt.Errorf("overlap %q is not a duration", r.Overlap), "for example 30m; 0s ends the trust in the old root at once")
		}
		o.Overlap = &d
	}
	var err error
	if r.Cancel {
		err = s.cfg.Trust.Cancel(ctx, o.By)
	} else {
		err = s.cfg.Trust.Rotate(ctx, o)
	}
	return s.trust(), err
}

// evict puts a cluster out, and says who goes with it and who keeps it.
func (s *Server) evict(r *http.Request) (admin.EvictReply, error) {
	name := r.PathValue("name")
	out := admin.EvictReply{Cluster: name, State: string(protocol.Evicted)}
	before := map[mesh.ClusterID]bool{}
	for _, p := range s.cfg.Peering.Status().Peers {
		if before[p.Name] = p.State == protocol.Approved; string(p.Name) != name {
			continue
		}
		for _, by := range p.VouchedBy {
			if by != s.cfg.Local.ID && p.State == protocol.Approved {
				out.Elsewhere = append(out.Elsewhere, string(by))
			}
		}
	}
	if err := s.retire(r.Context(), name); err != nil {
		return out, err
	}
	if err := s.cfg.Peering.Evict(r.Context(), name); err != nil {
		return out, err
	}
	after := map[mesh.ClusterID]bool{}
	for _, p := range s.cfg.Peering.Status().Peers {
		after[p.Name] = p.State == protocol.Approved
	}
	for id := range before {
		if before[id] && !after[id] && string(id) != name {
			out.Also = append(out.Also, string(id))
		}
	}
	slices.Sort(out.Also)
	out.Elsewhere = slices.DeleteFunc(out.Elsewhere, func(id string) bool { return !after[mesh.ClusterID(id)] })
	return out, nil
}
