// Package kube is the source that reads Kubernetes API servers: that of the local cluster, and those of the clusters
// whose remote secrets the local one holds.
//
// It knows how to list and watch, and what to do when an API server is away, a right is missing or a kind is not
// installed; what the objects mean is discovery/config's.
package kube

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"k8s.io/client-go/rest"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// Config says which API servers are read and who is told.
type Config struct {
	// Cluster is the name of the local cluster.
	Cluster mesh.ClusterID
	// TrustDomain is the local one; the mesh's configuration is completed with it.
	TrustDomain mesh.TrustDomain
	// Network is the one that the local cluster is said to be on, to be compared with what its API says.
	Network mesh.NetworkID
	// API is how the local API server is reached.
	API *rest.Config
	// Namespace is the root namespace: remote secrets and the ConfigMap of the mesh are there. Empty means "istio-system".
	Namespace string
	// EverySecret reads the Secrets of gateways in all namespaces, not only in the root namespace. It needs the right to.
	EverySecret bool
	// Domain is the clusters' DNS domain; empty means "cluster.local".
	Domain string
	// Sink is told each object under a key of its own.
	Sink mesh.Sink
	// Log gets what an operator would act on. Nil: nothing is logged.
	Log *slog.Logger
	// Reg is where metrics are registered. Nil: nowhere.
	Reg prometheus.Registerer
	// Beat is the time between two looks at whether an API server is there and what it serves. Raising it saves small
	// requests and delays the report of a lost server and the use of a new kind. 0 means one second.
	Beat time.Duration
	// Memory has what was read before, for a start while an API server is away. Nil: nothing.
	Memory Memory
	// Retry is the longest pause between two tries to list or watch a kind. Raising it saves requests that fail and
	// delays recovery. 0 means two seconds.
	Retry time.Duration
}

// Source keeps a Sink told of what API servers hold.
type Source struct {
	cfg   Config
	log   *slog.Logger
	local *cluster

	metrics *metrics
	remotes *remotes
	servers servers
}

// New makes a source; it connects to nothing until Run.
func New(cfg Config) (*Source, error) {
	if cfg.API == nil {
		return nil, errors.New("source kube: no API server is named")
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Namespace == "" {
		cfg.Namespace = "istio-system"
	}
	if cfg.Beat <= 0 {
		cfg.Beat = time.Second
	}
	if cfg.Retry <= 0 {
		cfg.Retry = 2 * time.Second
	}
	quietLibrary()
	s := &Source{cfg: cfg, log: cfg.Log.With("part", "discovery/source/kube"), metrics: newMetrics(cfg.Reg)}
	s.local = newCluster(s, cfg.Cluster, false)
	s.remotes = newRemotes(s)
	var err error
	if s.local.conn, err = dial(cfg.API); err != nil {
		return nil, fmt.Errorf("source kube: %w", err)
	}
	return s, nil
}

// Run reports what the API servers hold until ctx ends; then it returns nil. It says Synced when every kind of the
// local cluster that it may read and that is installed has been reported. An API server that is away is no error.
func (s *Source) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { s.remotes.run(ctx) })
	s.local.run(ctx)
	s.local.conn.close()
	return nil
}

// State is what status says of one cluster.
type State struct {
	Cluster   mesh.ClusterID
	Remote    bool
	Server    string // URL of the API server
	Connected bool
	Since     time.Time // when it connected or was lost; zero before the first connection
	Error     string    // why it is lost
	Kinds     []KindState
}

// KindState is what status says of one kind in one cluster.
type KindState struct {
	Kind    string
	Version string // as served; empty when absent
	Objects int
	State   string // synced, syncing, absent, forbidden, failed
	Message string // what is wrong
	Remedy  string
}

// States of a kind.
const (
	StateSyncing   = "syncing"   // not listed yet
	StateSynced    = "synced"    // listed and watched
	StateAbsent    = "absent"    // not installed in the cluster
	StateForbidden = "forbidden" // a right is missing; what was known before is kept
	StateFailed    = "failed"    // listing or watching fails; what was known before is kept
)

// Status returns the local cluster, then the remote ones by name.
func (s *Source) Status() []State {
	out := []State{s.local.status()}
	for _, c := range s.remotes.clusters() {
		out = append(out, c.status())
	}
	slices.SortFunc(out[1:], func(a, b State) int { return strings.Compare(string(a.Cluster), string(b.Cluster)) })
	return out
}

// cluster returns the cluster of that name if its API server is read; "" is the local one.
func (s *Source) cluster(id mesh.ClusterID) *cluster {
	if id == "" || id == s.cfg.Cluster {
		return s.local
	}
	for _, c := range s.remotes.clusters() {
		if c.id == id {
			return c
		}
	}
	return nil
}
