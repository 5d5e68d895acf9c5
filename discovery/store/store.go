// Package store collects what the sources know, builds the next Snapshot from it and publishes it. It is the only
// part of a control plane that holds shared mutable state. It knows no source and no reader.
package store

import (
	"context"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/dns/vip"
)

// ControlPlanePort is where a control plane that is a Service listens for xDS, certificates and peers.
const ControlPlanePort = 15012

// Config says what the store builds.
type Config struct {
	// Local is the cluster whose control plane this is.
	Local *mesh.Cluster
	// Local.Gateways may be empty: then they are those of the local cluster on its network, as the sources tell. So may
	// Local.ControlPlane: then it is the address of this host, at ControlPlanePort.
	ControlPlaneHost string
	// Await names the sources whose first full report the first Snapshot waits for. Peers are never among them.
	Await []string
	// AwaitAtMost bounds that wait; after it the first Snapshot is built from what is there, and says what is
	// missing. Raising it delays a start without a source, lowering it risks a start with half a world.
	AwaitAtMost time.Duration
	// Quiet is the least time between two builds. The first change after a quiet time is built at once.
	// Raising it saves CPU in a storm of changes, lowering it shortens the way of the second change.
	Quiet time.Duration
	// Ranges are the virtual address ranges.
	Ranges vip.Ranges
	// Memory keeps virtual addresses over restarts.
	Memory Memory
	// Now tells the time, for how long addresses of hosts that are gone rest.
	Now func() time.Time
	// ClusterNames and PodNames give every exported service names for single clusters and pods. Without them headless
	// services have them, and those whose exports ask. Each name costs an address, and each pod that comes or goes
	// then a translation for every proxy.
	ClusterNames, PodNames bool
	// Derive makes of a Snapshot with all Services what its KubeObjects come to; declared finds a declaration by host,
	// before is the last result or nil. Nil: nothing. It is pure, and is not asked when only endpoints differ.
	Derive func(snap *mesh.Snapshot, declared func(host string) *mesh.ServiceDecl, before *mesh.Derived) *mesh.Derived
	// Check finds problems across objects of a finished Snapshot. Nil: none.
	Check func(*mesh.Snapshot) []mesh.Problem
}

// DefaultConfig returns a Config for the local cluster with the product's defaults.
func DefaultConfig(local *mesh.Cluster) Config {
	return Config{Local: local, AwaitAtMost: 10 * time.Second, Quiet: 10 * time.Millisecond, Ranges: vip.DefaultRanges(), Memory: NoMemory{}, Now: time.Now}
}

// Store is the mutable middle between sources and readers.
type Store struct {
	cfg     Config
	log     *slog.Logger
	metrics *metrics

	mu      sync.Mutex
	local   *mesh.Cluster
	held    map[string][]netip.Addr // what the next Snapshot remembers; nil: as before
	inputs  map[inputKey]mesh.Input
	built   map[inputKey]mesh.Input // what changed since the last build, as it was then
	waiting map[string]bool         // sources not synced yet
	dirty   chan struct{}           // holds one token while inputs are newer than the Snapshot

	out     sync.RWMutex
	latest  *mesh.Snapshot
	changed chan struct{}
}

type inputKey struct{ source, key string }

type metrics struct {
	builds   prometheus.Counter
	duration prometheus.Histogram
	services prometheus.Gauge
	problems prometheus.Gauge
	short    prometheus.Counter
}

// New makes a store; it builds nothing until Run.
func New(cfg Config, log *slog.Logger, reg prometheus.Registerer) *Store {
	f := promauto.With(reg)
	s := &Store{
		cfg: cfg, log: log, local: cfg.Local, inputs: map[inputKey]mesh.Input{}, built: map[inputKey]mesh.Input{}, waiting: map[string]bool{},
		dirty: make(chan struct{}, 1), changed: make(chan struct{}),
		metrics: &metrics{
			builds:   f.NewCounter(prometheus.CounterOpts{Namespace: "isthmus", Subsystem: "store", Name: "builds_total", Help: "Snapshots built."}),
			short:    f.NewCounter(prometheus.CounterOpts{Namespace: "isthmus", Subsystem: "store", Name: "short_builds_total", Help: "Of the Snapshots built, those that cost only what their changes touch."}),
			duration: f.NewHistogram(prometheus.HistogramOpts{Namespace: "isthmus", Subsystem: "store", Name: "build_seconds", Help: "Time to build one Snapshot.", Buckets: prometheus.ExponentialBuckets(0.0001, 4, 8)}),
			services: f.NewGauge(prometheus.GaugeOpts{Namespace: "isthmus", Subsystem: "store", Name: "services", Help: "Services in the newest Snapshot."}),
			problems: f.NewGauge(prometheus.GaugeOpts{Namespace: "isthmus", Subsystem: "store", Name: "problems", Help: "Problems in the newest Snapshot."}),
		},
	}
	for _, name := range cfg.Await {
		s.waiting[name] = true
	}
	return s
}

// Sink returns the sink for the source of that name. All sinks of one name share their keys.
func (s *Store) Sink(source string) mesh.Sink { return sink{s, source} }

type sink struct {
	store  *Store
	source string
}

// Report implements mesh.Sink.
func (k sink) Report(key string, in mesh.Input) {
	s, id := k.store, inputKey{k.source, key}
	s.mu.Lock()
	old := s.inputs[id]
	s.mu.Unlock()
	in = sharing(old, in)
	s.mu.Lock()
	s.note(id)
	s.inputs[id] = in
	s.mu.Unlock()
	s.touch()
}

// Forget implements mesh.Sink.
func (k sink) Forget(key string) {
	k.store.mu.Lock()
	k.store.note(inputKey{k.source, key})
	delete(k.store.inputs, inputKey{k.source, key})
	k.store.mu.Unlock()
	k.store.touch()
}

// note keeps what the last build saw under a key that is about to change. The caller holds mu.
func (s *Store) note(id inputKey) {
	if _, noted := s.built[id]; !noted {
		s.built[id] = s.inputs[id]
	}
}

// changes returns what differs from the last build, in the order of keys, and begins anew. The caller holds mu.
func (s *Store) changes() []change {
	out := make([]change, 0, len(s.built))
	for _, id := range slices.SortedFunc(maps.Keys(s.built), compareKeys) {
		out = append(out, change{s.built[id], s.inputs[id]})
	}
	s.built = map[inputKey]mesh.Input{}
	return out
}

// Synced implements mesh.Sink.
func (k sink) Synced() {
	k.store.mu.Lock()
	delete(k.store.waiting, k.source)
	k.store.mu.Unlock()
	k.store.touch()
}

// UpdateLocal changes the local cluster of the next Snapshot: its gateways or roots are others. Name, trust domain and
// network must stay.
func (s *Store) UpdateLocal(change func(*mesh.Cluster)) {
	s.mu.Lock()
	next := *s.local
	change(&next)
	s.local = &next
	s.mu.Unlock()
	s.touch()
}

// SetHeld replaces the virtual addresses that are remembered: another replica of the same cluster has settled them.
func (s *Store) SetHeld(addresses map[string][]netip.Addr) {
	s.mu.Lock()
	s.held = maps.Clone(addresses)
	s.mu.Unlock()
	s.touch()
}

func (s *Store) touch() {
	select {
	case s.dirty <- struct{}{}:
	default:
	}
}

// Latest implements mesh.Snapshots.
func (s *Store) Latest() (*mesh.Snapshot, <-chan struct{}) {
	s.out.RLock()
	defer s.out.RUnlock()
	return s.latest, s.changed
}

// Run builds and publishes Snapshots until ctx ends; then it returns nil.
func (s *Store) Run(ctx context.Context) error {
	if err := s.await(ctx); err != nil {
		return nil
	}
	b := newBuilder(s.cfg)
	for {
		started := time.Now()
		s.mu.Lock()
		changes, missing := s.changes(), s.missing()
		b.cfg.Local = s.local
		if s.held != nil {
			b.held, b.assigned, s.held = s.held, nil, nil
		}
		s.mu.Unlock()
		short := b.short
		snap := b.next(changes, s.all, missing)
		s.metrics.builds.Inc()
		s.metrics.short.Add(float64(b.short - short))
		s.metrics.duration.Observe(time.Since(started).Seconds())
		s.metrics.services.Set(float64(len(snap.Services)))
		s.metrics.problems.Set(float64(len(snap.Problems)))
		s.publish(snap)
		quiet := time.NewTimer(s.cfg.Quiet)
		select {
		case <-quiet.C:
		case <-ctx.Done():
			quiet.Stop()
			return nil
		}
		select {
		case <-s.dirty:
		case <-ctx.Done():
			return nil
		}
	}
}

// all returns the inputs for a build from nothing else.
func (s *Store) all() []mesh.Input {
	s.mu.Lock()
	defer s.mu.Unlock()
	clear(s.built)
	return s.sorted()
}

// sorted returns the inputs in the order of their keys. The caller holds mu.
func (s *Store) sorted() []mesh.Input {
	keys := slices.SortedFunc(maps.Keys(s.inputs), compareKeys)
	inputs := make([]mesh.Input, len(keys))
	for i, k := range keys {
		inputs[i] = s.inputs[k]
	}
	return inputs
}

// await blocks until every awaited source is synced or the deadline has passed.
func (s *Store) await(ctx context.Context) error {
	deadline := time.NewTimer(s.cfg.AwaitAtMost)
	defer deadline.Stop()
	for {
		s.mu.Lock()
		missing := s.missing()
		s.mu.Unlock()
		if len(missing) == 0 {
			return nil
		}
		select {
		case <-s.dirty:
		case <-deadline.C:
			s.log.Warn("building the first snapshot without some sources", "sources", missing)
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// missing returns the awaited sources that are not synced, sorted. The caller holds mu.
func (s *Store) missing() []string {
	out := make([]string, 0, len(s.waiting))
	for name := range s.waiting {
		out = append(out, name)
	}
	slices.Sort(out)
	return out
}

func (s *Store) publish(snap *mesh.Snapshot) {
	s.out.Lock()
	defer s.out.Unlock()
	s.latest = snap
	close(s.changed)
	s.changed = make(chan struct{})
}
