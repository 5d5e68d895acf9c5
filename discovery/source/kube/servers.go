package kube

import (
	"cmp"
	"slices"
	"sync"

	"k8s.io/client-go/rest"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// Server is one API server that is read.
type Server struct {
	Cluster mesh.ClusterID
	Remote  bool
	Config  *rest.Config // not to be changed; new credentials are a new one
}

// servers tells those who wait for the list of API servers to change.
type servers struct {
	mu      sync.Mutex
	changed chan struct{}
}

func (s *servers) wait() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.changed == nil {
		s.changed = make(chan struct{})
	}
	return s.changed
}

func (s *servers) tell() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.changed != nil {
		close(s.changed)
		s.changed = nil
	}
}

// Servers returns the API servers that are read, the local one first, and a channel that is closed when the list or the
// credentials of one of them change.
func (s *Source) Servers() ([]Server, <-chan struct{}) {
	changed := s.servers.wait()
	out := []Server{{Cluster: s.cfg.Cluster, Config: s.cfg.API}}
	for id, r := range s.remotes.running() {
		out = append(out, Server{Cluster: id, Remote: true, Config: r.config})
	}
	slices.SortFunc(out[1:], func(a, b Server) int { return cmp.Compare(a.Cluster, b.Cluster) })
	return out, changed
}
