// Package vips keeps the virtual addresses of a cluster for all replicas of isthmusd, in a ConfigMap.
package vips

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/isthmus-mesh/isthmus/discovery/store"
	"github.com/isthmus-mesh/isthmus/federation/kubestate"
)

// The table of virtual addresses in the root namespace.
const (
	configMap   = "isthmus-addresses"
	tableKey    = "addresses.json.gz" // base64
	maxUnpacked = 64 << 20            // bytes, unpacked
	poll        = 5 * time.Second
)

// Config says where the table is and who writes it.
type Config struct {
	Client *kubestate.Client
	// File is what this replica starts from without the API.
	File store.FileMemory
	// Leads reports whether this replica writes the table.
	Leads func() bool
	Log   *slog.Logger
}

// Memory keeps virtual addresses in a ConfigMap: the leader writes it, the others follow. Addresses follow from
// names, so all replicas have the same anyway but for collisions, which depend on who was first. It is a store.Memory.
type Memory struct {
	cfg  Config
	wake chan struct{}

	mu   sync.Mutex
	held map[string][]netip.Addr // what the store has
}

// New makes a Memory; nothing is read before Load.
func New(cfg Config) *Memory { return &Memory{cfg: cfg, wake: make(chan struct{}, 1)} }

// Load implements store.Memory.
func (m *Memory) Load() (map[string][]netip.Addr, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	out, err := m.read(ctx)
	if err != nil {
		m.cfg.Log.Warn("virtual addresses are read from the data directory", "part", "state", "err", err)
		out, err = m.cfg.File.Load()
	}
	m.mu.Lock()
	m.held = out
	m.mu.Unlock()
	return out, err
}

// Save implements store.Memory. The ConfigMap follows by and by: no snapshot waits for the API.
func (m *Memory) Save(addresses map[string][]netip.Addr) error {
	m.mu.Lock()
	m.held = addresses
	m.mu.Unlock()
	select {
	case m.wake <- struct{}{}:
	default:
	}
	return m.cfg.File.Save(addresses)
}

func (m *Memory) read(ctx context.Context) (map[string][]netip.Addr, error) {
	data, err := m.cfg.Client.ConfigMap(ctx, configMap)
	if err != nil || data[tableKey] == "" {
		return nil, err
	}
	return unpack(data[tableKey])
}

func pack(in map[string][]netip.Addr) (string, error) {
	data, err := json.Marshal(in)
	if err != nil {
		return "", err
	}
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	if _, err := z.Write(data); err != nil {
		return "", err
	}
	if err := z.Close(); err != nil {
		return "", err
	}
	return base64.StdEncoding.EncodeToString(b.Bytes()), nil
}

func unpack(s string) (map[string][]netip.Addr, error) {
	fail := func(err error) (map[string][]netip.Addr, error) {
		return nil, fmt.Errorf("virtual addresses in ConfigMap %s do not decode: %w", configMap, err)
	}
	z, err := gzip.NewReader(base64.NewDecoder(base64.StdEncoding, bytes.NewReader([]byte(s))))
	if err != nil {
		return fail(err)
	}
	data, err := io.ReadAll(io.LimitReader(z, maxUnpacked))
	if err != nil {
		return fail(err)
	}
	var out map[string][]netip.Addr
	if err := json.Unmarshal(data, &out); err != nil {
		return fail(err)
	}
	return out, nil
}

// Run writes the table while this replica leads, and takes the leader's while it does not.
func (m *Memory) Run(ctx context.Context, st *store.Store) error {
	tick := time.NewTicker(poll)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-m.wake:
		case <-tick.C:
		}
		call, cancel := context.WithTimeout(ctx, 5*time.Second)
		err := m.sync(call, st)
		cancel()
		if err != nil && ctx.Err() == nil {
			m.cfg.Log.Warn("virtual addresses are not in step with the other replicas", "part", "state", "err", err)
		}
	}
}

func (m *Memory) sync(ctx context.Context, st *store.Store) error {
	theirs, err := m.read(ctx)
	if err != nil {
		return err
	}
	m.mu.Lock()
	ours := m.held
	m.mu.Unlock()
	if ours == nil || maps.EqualFunc(ours, theirs, slices.Equal[[]netip.Addr]) {
		return nil
	}
	if m.cfg.Leads() {
		packed, err := pack(ours)
		if err != nil {
			return err
		}
		return m.cfg.Client.UpdateConfigMap(ctx, configMap, func(data map[string]string) bool {
			changed := data[tableKey] != packed
			data[tableKey] = packed
			return changed
		})
	}
	for host, addr := range theirs { // what the leader does not know yet is no conflict
		if have, ok := ours[host]; ok && !slices.Equal(have, addr) {
			st.SetHeld(theirs)
			return nil
		}
	}
	return nil
}
