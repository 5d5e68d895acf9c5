package main

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/isthmus-mesh/isthmus/cmd/isthmusd/internal/views"
	"github.com/isthmus-mesh/isthmus/discovery/source/kube"
	"github.com/isthmus-mesh/isthmus/discovery/status"
	"github.com/isthmus-mesh/isthmus/discovery/store"
)

// writeStatus makes the part that writes to the API servers that are read, while this replica leads; none where there
// are none.
func (d *daemon) writeStatus(st *store.Store, vs *views.Views, reg prometheus.Registerer) []part {
	if d.kube == nil {
		return nil
	}
	var leading func() (bool, <-chan struct{})
	if e := d.kept.election; e != nil {
		leading = func() (bool, <-chan struct{}) {
			t, changed := e.Current()
			return t.Leading, changed
		}
	}
	s := status.New(status.Config{
		Snapshots: st, Problems: vs.Problems, Clusters: apiServers{d.kube}, Leading: leading, Deploy: d.cfg.Source.Kube.DeployGateways, Sink: st.Sink("status"), Log: d.log, Reg: reg,
	})
	return []part{{"discovery/status", s.Run}}
}

// apiServers are the API servers of the source, to be written to.
type apiServers struct{ source *kube.Source }

// Latest implements status.Clusters.
func (a apiServers) Latest() ([]status.Cluster, <-chan struct{}) {
	servers, changed := a.source.Servers()
	out := make([]status.Cluster, 0, len(servers))
	for _, s := range servers {
		out = append(out, status.Cluster{ID: s.Cluster, Local: !s.Remote, Config: s.Config})
	}
	return out, changed
}
