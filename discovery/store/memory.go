package store

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
)

// Memory keeps the virtual addresses a cluster has answered with, so that a restart moves none.
type Memory interface {
	// Load returns the addresses by host.
	Load() (map[string][]netip.Addr, error)
	// Save replaces them.
	Save(map[string][]netip.Addr) error
}

// NoMemory forgets.
type NoMemory struct{}

// Load implements Memory.
func (NoMemory) Load() (map[string][]netip.Addr, error) { return nil, nil }

// Save implements Memory.
func (NoMemory) Save(map[string][]netip.Addr) error { return nil }

// FileMemory keeps them as a JSON object in the file of that path, replaced atomically.
type FileMemory string

// Load implements Memory. A file that is not there is an empty memory.
func (f FileMemory) Load() (map[string][]netip.Addr, error) {
	data, err := os.ReadFile(string(f))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read virtual addresses: %w", err)
	}
	var out map[string][]netip.Addr
	if err := json.Unmarshal(data, &out); err != nil {
		return nil, fmt.Errorf("read virtual addresses %s: %w", string(f), err)
	}
	return out, nil
}

// Save implements Memory.
func (f FileMemory) Save(m map[string][]netip.Addr) error {
	data, err := json.MarshalIndent(m, "", " ")
	if err != nil {
		return fmt.Errorf("keep virtual addresses: %w", err)
	}
	tmp := filepath.Join(filepath.Dir(string(f)), "."+filepath.Base(string(f))+".new")
	if err := os.WriteFile(tmp, data, 0o600); err != nil {
		return fmt.Errorf("keep virtual addresses: %w", err)
	}
	if err := os.Rename(tmp, string(f)); err != nil {
		return fmt.Errorf("keep virtual addresses: %w", err)
	}
	return nil
}
