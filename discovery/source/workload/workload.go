// Package workload is the source of machines that register themselves: a machine is a workload of the cluster while
// its agent is connected, and for a grace time after it was lost without a word.
package workload

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// Machine is one machine as its token described it and as it last reported itself.
type Machine struct {
	Name           string            `json:"name"`
	Namespace      string            `json:"namespace"`
	ServiceAccount string            `json:"serviceAccount"`
	Network        mesh.NetworkID    `json:"network,omitempty"`
	Labels         map[string]string `json:"labels,omitempty"`
	Ports          map[string]uint32 `json:"ports,omitempty"`
	Addresses      []string          `json:"addresses"`
	// Registered is kept, so that a restart of isthmusd takes no machine out.
	Registered bool `json:"registered"`
}

func (m Machine) key() string { return m.Namespace + "." + m.Name }

// State is one machine for status.
type State struct {
	Machine
	Connected bool
	Since     time.Time // when it connected or was lost
}

// Config describes the source.
type Config struct {
	// Dir keeps one file for each machine.
	Dir string
	// Sink takes the registered ones.
	Sink mesh.Sink
	// Grace is how long a machine that was lost without a word stays registered. Raising it rides out longer breaks,
	// lowering it takes dead machines out sooner.
	Grace time.Duration
	Log   *slog.Logger
}

// Source holds the machines of one cluster.
type Source struct {
	cfg Config

	mu       sync.Mutex
	machines map[string]*entry
	wake     chan struct{}
}

type entry struct {
	Machine
	streams int
	since   time.Time
}

// ErrUnknown is wrapped when a machine connects that no token ever admitted here.
var ErrUnknown = errors.New("no token admitted this machine here")

// New reads the machines that were admitted before. Files that cannot be read are reported and skipped.
func New(cfg Config) (*Source, error) {
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("keep machines: %w", err)
	}
	files, err := os.ReadDir(cfg.Dir)
	if err != nil {
		return nil, fmt.Errorf("read machines: %w", err)
	}
	s := &Source{cfg: cfg, machines: map[string]*entry{}, wake: make(chan struct{}, 1)}
	now := time.Now()
	for _, f := range files {
		if !strings.HasSuffix(f.Name(), ".json") {
			continue
		}
		var m Machine
		data, err := os.ReadFile(filepath.Join(cfg.Dir, f.Name()))
		if err == nil {
			err = json.Unmarshal(data, &m)
		}
		if err != nil || m.Name == "" || f.Name() != m.key()+".json" {
			cfg.Log.Error("machine not loaded", "part", "source/workload", "file", f.Name(), "err", err)
			continue
		}
		s.machines[m.key()] = &entry{Machine: m, since: now}
	}
	return s, nil
}

// Admit keeps what a redeemed token says about a machine. It is idempotent.
func (s *Source) Admit(m Machine) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.machines[m.key()]
	if e == nil {
		e = &entry{since: time.Now()}
	}
	m.Registered = e.Registered
	if err := s.save(m); err != nil {
		return err
	}
	e.Machine = m
	s.machines[m.key()] = e
	return nil
}

// Lookup returns a machine that was admitted.
func (s *Source) Lookup(namespace, name string) (Machine, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if e := s.machines[namespace+"."+name]; e != nil {
		return e.Machine, true
	}
	return Machine{}, false
}

// Connect registers the machine: its agent is there, under these addresses. The returned func says that the agent is
// gone, cleanly if it said goodbye.
func (s *Source) Connect(namespace, name, serviceAccount string, addresses []string) (gone func(clean bool), err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.machines[namespace+"."+name]
	if e == nil || e.ServiceAccount != serviceAccount {
		return nil, fmt.Errorf("machine %s/%s with service account %s: %w", namespace, name, serviceAccount, ErrUnknown)
	}
	for _, a := range addresses {
		ip, err := netip.ParseAddr(a)
		if err != nil || ip.IsLoopback() || ip.IsLinkLocalUnicast() || ip.IsMulticast() || ip.IsUnspecified() {
			return nil, fmt.Errorf("machine %s/%s: address %q is not one that others could reach", namespace, name, a)
		}
	}
	m := e.Machine
	m.Registered = true
	if len(addresses) > 0 {
		m.Addresses = slices.Clone(addresses)
	}
	if err := s.save(m); err != nil {
		return nil, err
	}
	e.Machine = m
	e.streams++
	e.since = time.Now()
	s.report(e)
	s.cfg.Log.Info("machine connected", "machine", m.key(), "addresses", m.Addresses)
	var once sync.Once
	return func(clean bool) { once.Do(func() { s.gone(e, clean) }) }, nil
}

func (s *Source) gone(e *entry, clean bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e.streams--
	if e.streams > 0 {
		return
	}
	e.since = time.Now()
	if clean {
		s.cfg.Log.Info("machine said goodbye", "machine", e.key())
		s.drop(e)
		return
	}
	s.cfg.Log.Warn("machine lost", "machine", e.key(), "grace", s.cfg.Grace)
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// drop takes a machine out. The caller holds mu.
func (s *Source) drop(e *entry) {
	e.Registered = false
	if err := s.save(e.Machine); err != nil {
		s.cfg.Log.Error("machine not kept", "machine", e.key(), "err", err)
	}
	s.cfg.Sink.Forget(e.key())
}

func (s *Source) report(e *entry) {
	s.cfg.Sink.Report(e.key(), mesh.Input{Workloads: []*mesh.Workload{{
		Object: mesh.ObjectRef{Kind: "WorkloadEntry", Namespace: e.Namespace, Name: e.Name, Source: "machine"},
		Name:   e.Name, Namespace: e.Namespace, Network: e.Network, Addresses: slices.Clone(e.Addresses), Labels: maps.Clone(e.Labels),
		ServiceAccount: e.ServiceAccount, Ports: maps.Clone(e.Ports), TLS: true, Ready: true, VM: true,
	}}})
}

// List returns the registered machines, sorted by namespace and name.
func (s *Source) List() []State {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []State
	for _, k := range slices.Sorted(maps.Keys(s.machines)) {
		if e := s.machines[k]; e.Registered {
			out = append(out, State{Machine: e.Machine, Connected: e.streams > 0, Since: e.since})
		}
	}
	return out
}

// Run reports the machines that were registered before a restart and takes out those whose grace time is over.
func (s *Source) Run(ctx context.Context) error {
	s.mu.Lock()
	for _, e := range s.machines {
		if e.Registered {
			s.report(e)
		}
	}
	s.mu.Unlock()
	s.cfg.Sink.Synced()
	for {
		next := s.expire(time.Now())
		timer := time.NewTimer(next)
		select {
		case <-timer.C:
		case <-s.wake:
			timer.Stop()
		case <-ctx.Done():
			timer.Stop()
			return nil
		}
	}
}

// expire drops what is overdue and returns the time to the next.
func (s *Source) expire(now time.Time) time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	next := time.Hour
	for _, e := range s.machines {
		if !e.Registered || e.streams > 0 {
			continue
		}
		if left := s.cfg.Grace - now.Sub(e.since); left > 0 {
			next = min(next, left)
			continue
		}
		s.cfg.Log.Warn("machine taken out", "machine", e.key(), "since", e.since)
		s.drop(e)
	}
	return next
}

func (s *Source) save(m Machine) error {
	data, err := json.MarshalIndent(m, "", " ")
	if err != nil {
		return err
	}
	path := filepath.Join(s.cfg.Dir, m.key()+".json")
	old, err := os.ReadFile(path)
	if err == nil && string(old) == string(data) {
		return nil
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("keep machine %s: %w", m.key(), err)
	}
	if err := os.WriteFile(path+".new", data, 0o600); err != nil {
		return fmt.Errorf("keep machine %s: %w", m.key(), err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		return fmt.Errorf("keep machine %s: %w", m.key(), err)
	}
	return nil
}
