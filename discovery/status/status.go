// Package status writes to Kubernetes APIs what the mesh says of the objects in them: conditions of ServiceExports and
// of Istio's objects, ServiceImports with their EndpointSlices, Events for Problems, and the ConfigMap with the root
// certificates in every namespace. What should be there is a pure function of a Snapshot; the rest of the package
// brings the API servers in line, on the leader alone, and writes nothing that is already right.
package status

import (
	"context"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
	"k8s.io/client-go/rest"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// Cluster is one API server to write to.
type Cluster struct {
	ID mesh.ClusterID
	// Local: the cluster of the control plane. ServiceExports, Istio's objects and Events are written there alone; root
	// certificates and ServiceImports in every cluster.
	Local bool
	// Config reaches it. It is not changed. Another pointer means another connection.
	Config *rest.Config
}

// Clusters gives the API servers that are known and a channel that is closed when they change.
type Clusters interface {
	Latest() ([]Cluster, <-chan struct{})
}

// Config says what is written, where and when.
type Config struct {
	Snapshots mesh.Snapshots
	// Problems returns those found beside the Snapshot's own, in translations; nil: none. It is asked twice for each Snapshot.
	Problems func() []mesh.Problem
	Clusters Clusters
	// Leading tells whether this replica writes, and gives a channel that is closed when that changes; nil: always.
	Leading func() (bool, <-chan struct{})
	// Deploy makes the objects that run Gateways, in the local cluster. It needs the right to.
	Deploy bool
	// Sink takes what could not be written, as Problems; nil: they are only logged.
	Sink mesh.Sink
	// QPS limits the requests to each API server; 0 is 20. Raising it makes many changes visible sooner, lowering it spares the server.
	QPS float32
	Log *slog.Logger
	Reg prometheus.Registerer
}

// Root certificates in every namespace, as Istio names them.
const (
	// RootConfigMap is the name of the ConfigMap.
	RootConfigMap = "istio-ca-root-cert"
	// RootKey is its key.
	RootKey = "root-cert.pem"
)

// Status writes. It is idle while another replica leads.
type Status struct {
	cfg     Config
	log     *slog.Logger
	metrics *metrics

	mu       sync.Mutex
	problems map[string]mesh.Problem // by where and what
}

type metrics struct {
	writes *prometheus.CounterVec
	errors *prometheus.CounterVec
}

// New makes a Status; it does nothing until Run.
func New(cfg Config) *Status {
	if cfg.QPS == 0 {
		cfg.QPS = 20
	}
	f := promauto.With(cfg.Reg)
	return &Status{
		cfg: cfg, log: cfg.Log.With("part", "status"), problems: map[string]mesh.Problem{},
		metrics: &metrics{
			writes: f.NewCounterVec(prometheus.CounterOpts{Namespace: "isthmus", Subsystem: "status", Name: "writes_total", Help: "Objects written to Kubernetes APIs, by kind."}, []string{"kind"}),
			errors: f.NewCounterVec(prometheus.CounterOpts{Namespace: "isthmus", Subsystem: "status", Name: "errors_total", Help: "Writes that failed and are tried again, by kind."}, []string{"kind"}),
		},
	}
}

// Run writes while this replica leads, until ctx ends; then it returns nil.
func (s *Status) Run(ctx context.Context) error {
	if s.cfg.Sink != nil {
		defer s.cfg.Sink.Forget("status")
	}
	for ctx.Err() == nil {
		leads, changed := s.leading()
		if !leads {
			select {
			case <-changed:
			case <-ctx.Done():
			}
			continue
		}
		term, end := context.WithCancel(ctx)
		done := make(chan struct{})
		go func() {
			defer close(done)
			s.lead(term)
		}()
		for leads && ctx.Err() == nil {
			select {
			case <-changed:
				leads, changed = s.leading()
			case <-ctx.Done():
			}
		}
		end()
		<-done
		s.clear()
	}
	return nil
}

func (s *Status) leading() (bool, <-chan struct{}) {
	if s.cfg.Leading == nil {
		return true, nil
	}
	return s.cfg.Leading()
}

const (
	// least is the shortest time between two looks at the Snapshot.
	least = 100 * time.Millisecond
	// settled is when the Problems of a Snapshot's translations are complete; they are looked at then once more.
	settled = 2 * time.Second
)

// lead keeps every API server in line until ctx ends.
func (s *Status) lead(ctx context.Context) {
	var (
		wg      sync.WaitGroup
		servers = map[mesh.ClusterID]*server{}
		now     *desired
		of      *mesh.Snapshot
		again   bool // look at the same Snapshot again
	)
	defer wg.Wait()
	for {
		snap, outdated := s.cfg.Snapshots.Latest()
		var later <-chan time.Time
		if snap != nil && complete(snap) && (snap != of || again) {
			problems := snap.Problems
			if s.cfg.Problems != nil {
				problems = slices.Concat(problems, s.cfg.Problems())
				if snap != of { // translations may still be at it
					later = time.After(settled)
				}
			}
			of, now = snap, compute(snap, problems, now)
		}
		again = false
		clusters, others := s.cfg.Clusters.Latest()
		if now != nil {
			s.follow(ctx, &wg, servers, clusters, now)
		}
		select {
		case <-outdated:
		case <-others:
		case <-later:
			again = true
		case <-ctx.Done():
			return
		}
		select {
		case <-time.After(least):
		case <-ctx.Done():
			return
		}
	}
}

// complete reports whether every source that the first Snapshot waits for has reported: what is missing from one that
// was made without them is not gone.
func complete(snap *mesh.Snapshot) bool {
	return !slices.ContainsFunc(snap.Problems, func(p mesh.Problem) bool { return p.Object.Kind == "Source" && p.Reason == "NotSynced" })
}

// follow starts and ends servers as clusters come and go, and tells each what is desired now.
func (s *Status) follow(ctx context.Context, wg *sync.WaitGroup, servers map[mesh.ClusterID]*server, clusters []Cluster, now *desired) {
	known := map[mesh.ClusterID]Cluster{}
	for _, c := range clusters {
		known[c.ID] = c
	}
	for id, srv := range servers {
		if c, ok := known[id]; !ok || c.Config != srv.cluster.Config {
			srv.end()
			delete(servers, id)
			s.forget(string(id) + "/")
		}
	}
	for id, c := range known {
		srv := servers[id]
		if srv == nil {
			made, err := s.newServer(c)
			if err != nil {
				s.report(string(id)+"/", problem("Cluster", string(id), "Unusable", err.Error(), "correct the kubeconfig in its remote secret"))
				continue
			}
			srv = made
			servers[id] = srv
			term, end := context.WithCancel(ctx)
			srv.end = end
			srv.want(now)
			wg.Go(func() { srv.run(term) })
		}
		srv.want(now)
	}
}

func problem(kind, name, reason, message, remedy string) mesh.Problem {
	return mesh.Problem{Object: mesh.ObjectRef{Kind: kind, Name: name}, Reason: reason, Message: message, Remedy: remedy}
}

// report keeps a Problem under a key until forget or clear.
func (s *Status) report(key string, p mesh.Problem) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.problems[key] == p {
		return
	}
	s.problems[key] = p
	s.log.Warn("status not written", "object", p.Object.String(), "reason", p.Reason, "err", p.Message)
	s.tell()
}

// forget ends the Problem of the key, or those of every key below one that ends in a slash.
func (s *Status) forget(key string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := len(s.problems)
	for k := range s.problems {
		if k == key || key[len(key)-1] == '/' && len(k) >= len(key) && k[:len(key)] == key {
			delete(s.problems, k)
		}
	}
	if len(s.problems) != n {
		s.tell()
	}
}

func (s *Status) clear() {
	s.mu.Lock()
	defer s.mu.Unlock()
	clear(s.problems)
	s.tell()
}

// tell hands the Problems to the sink. The caller holds mu.
func (s *Status) tell() {
	if s.cfg.Sink == nil {
		return
	}
	var in mesh.Input
	for _, p := range s.problems {
		in.Problems = append(in.Problems, p)
	}
	s.cfg.Sink.Report("status", in)
}
