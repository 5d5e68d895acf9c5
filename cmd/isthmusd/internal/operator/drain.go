package operator

import (
	"context"
	"fmt"
	"net/http"
	"time"

	"github.com/isthmus-mesh/isthmus/api/admin"
	"github.com/isthmus-mesh/isthmus/internal/diag"
)

// Bounds of a drain.
const (
	drainOver = 10 * time.Minute
	longest   = 24 * time.Hour
)

// drain takes the traffic to a cluster away bit by bit, or gives it back.
func (s *Server) drain(w http.ResponseWriter, r *http.Request) {
	name := r.PathValue("name")
	take(audited(s, func(in admin.DrainRequest, _ struct{}) (string, string, map[string]string) {
		if in.Undo {
			return "peer.undrain", name, nil
		}
		return "peer.drain", name, map[string]string{"over": in.Over}
	}, func(ctx context.Context, in admin.DrainRequest) (struct{}, error) {
		if in.Undo {
			return struct{}{}, s.cfg.Peering.Undrain(ctx, name)
		}
		over := drainOver
		if in.Over != "" {
			var err error
			if over, err = time.ParseDuration(in.Over); err != nil || over < 0 || over > longest {
				return struct{}{}, diag.Hint(fmt.Errorf("over %q is not a duration of 24h at most", in.Over), "for example 10m; 0s takes all away at once")
			}
		}
		return struct{}{}, s.cfg.Peering.Drain(ctx, name, over)
	}))(w, r)
}
