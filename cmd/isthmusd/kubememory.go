package main

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/isthmus-mesh/isthmus/discovery/store"
)

// The table of virtual addresses in the root namespace.
const (
	addressesMap = "isthmus-addresses"
	addressesKey = "addresses.json.gz" // base64
	maxAddresses = 64 << 20            // bytes, unpacked
	memoryPoll   = 5 * time.Second
)

// kubeMemory keeps virtual addresses in a ConfigMap: the leader writes it, the others follow. Addresses follow from
// names, so all replicas have the same anyway but for collisions, which depend on who was first. It is a store.Memory.
type kubeMemory struct {
	state *kubeState
	file  store.FileMemory // for a start without the API
	wake  chan struct{}

	mu   sync.Mutex
	held map[string][]netip.Addr // what the store has
}

// Load implements store.Memory.
func (m *kubeMemory) Load() (map[string][]netip.Addr, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	out, err := m.read(ctx)
	if err != nil {
		m.state.log.Warn("virtual addresses are read from the data directory", "part", "state", "err", err)
		out, err = m.file.Load()
	}
	m.mu.Lock()
	m.held = out
	m.mu.Unlock()
	return out, err
}

// Save implements store.Memory. The ConfigMap follows by and by: no snapshot waits for the API.
func (m *kubeMemory) Save(addresses map[string][]netip.Addr) error {
	m.mu.Lock()
	m.held = addresses
	m.mu.Unlock()
	select {
	case m.wake <- struct{}{}:
	default:
	}
	return m.file.Save(addresses)
}

func (m *kubeMemory) read(ctx context.Context) (map[string][]netip.Addr, error) {
	data, err := m.state.client.ConfigMap(ctx, addressesMap)
	if err != nil || data[addressesKey] == "" {
		return nil, err
	}
	return unpackAddresses(data[addressesKey])
}

func packAddresses(in map[string][]netip.Addr) (string, error) {
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

func unpackAddresses(s string) (map[string][]netip.Addr, error) {
	fail := func(err error) (map[string][]netip.Addr, error) {
		return nil, fmt.Errorf("virtual addresses in ConfigMap %s do not decode: %w", addressesMap, err)
	}
	z, err := gzip.NewReader(base64.NewDecoder(base64.StdEncoding, bytes.NewReader([]byte(s))))
	if err != nil {
		return fail(err)
	}
	data, err := io.ReadAll(io.LimitReader(z, maxAddresses))
	if err != nil {
		return fail(err)
	}
	var out map[string][]netip.Addr
	if err := json.Unmarshal(data, &out); err != nil {
		return fail(err)
	}
	return out, nil
}

// run writes the table while this replica leads, and takes the leader's while it does not.
func (m *kubeMemory) run(ctx context.Context, st *store.Store) error {
	tick := time.NewTicker(memoryPoll)
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
			m.state.log.Warn("virtual addresses are not in step with the other replicas", "part", "state", "err", err)
		}
	}
}

func (m *kubeMemory) sync(ctx context.Context, st *store.Store) error {
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
	if leading, _ := m.state.leads(); leading {
		packed, err := packAddresses(ours)
		if err != nil {
			return err
		}
		return m.state.client.UpdateConfigMap(ctx, addressesMap, func(data map[string]string) bool {
			changed := data[addressesKey] != packed
			data[addressesKey] = packed
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
