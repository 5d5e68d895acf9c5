package authority

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"sync"
)

// keeper is where the parts of the CA are, for all replicas of this cluster's isthmusd.
type keeper interface {
	// Given reads the CA that the operator gave, by the names of its parts; nil: none. from names it in messages.
	Given(ctx context.Context) (parts map[string][]byte, from string, err error)
	// Own reads the parts of the one that was made here. With change it is written by compare-and-swap: change works on a
	// copy, says whether to write, and may be called again when another replica was faster.
	Own(ctx context.Context, change func(parts map[string][]byte) (bool, error)) (map[string][]byte, error)
	// Roots does the same for the list of roots, a text.
	Roots(ctx context.Context, change func(text string) (string, bool)) error
}

// Names of the parts, and of the files of a made root; the first are Istio's.
const (
	PartCert  = "ca-cert.pem"
	PartKey   = "ca-key.pem"
	PartRoot  = "root-cert.pem"
	PartChain = "cert-chain.pem"

	madeKeyFile = "root-key.pem"
	stateFile   = "authority.json"
	rootsFile   = "authority-roots.json"
	maxPart     = 1 << 20
)

// files is the keeper of one isthmusd without Kubernetes. A root that was never changed is in root-cert.pem and
// root-key.pem; from the first rotation on all is in authority.json.
type files struct {
	dir   string // isthmusd's own
	given string // the operator's; empty: none
	mu    sync.Mutex
}

// ReadGiven reads the parts that are in a folder; nil when there is none of them.
func ReadGiven(dir string) (map[string][]byte, error) {
	out := map[string][]byte{}
	for _, name := range []string{PartCert, PartKey, PartRoot, PartChain} {
		data, err := os.ReadFile(filepath.Join(dir, name))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("given CA: %w", err)
		}
		if len(data) <= maxPart {
			out[name] = data
		}
	}
	if len(out) == 0 {
		return nil, nil
	}
	return out, nil
}

// Given implements keeper.
func (f *files) Given(context.Context) (map[string][]byte, string, error) {
	if f.given == "" {
		return nil, "", nil
	}
	parts, err := ReadGiven(f.given)
	return parts, "in " + f.given, err
}

// Own implements keeper.
func (f *files) Own(_ context.Context, change func(map[string][]byte) (bool, error)) (map[string][]byte, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	parts := map[string][]byte{}
	data, err := os.ReadFile(filepath.Join(f.dir, stateFile))
	switch {
	case err == nil:
		if err := json.Unmarshal(data, &parts); err != nil {
			return nil, fmt.Errorf("%s does not decode: %w; restore it from a backup", filepath.Join(f.dir, stateFile), err)
		}
	case errors.Is(err, fs.ErrNotExist):
		for part, file := range map[string]string{PartCert: PartRoot, PartKey: madeKeyFile} {
			if parts[part], err = os.ReadFile(filepath.Join(f.dir, file)); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return nil, err
			}
		}
		parts[PartRoot], parts[PartChain] = parts[PartCert], parts[PartCert]
	default:
		return nil, err
	}
	if change == nil {
		return parts, nil
	}
	next := maps.Clone(parts)
	write, err := change(next)
	if err != nil || !write {
		return parts, err
	}
	if data, err = json.Marshal(next); err == nil {
		err = replace(filepath.Join(f.dir, stateFile), data)
	}
	return next, err
}

// Roots implements keeper.
func (f *files) Roots(_ context.Context, change func(string) (string, bool)) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	path := filepath.Join(f.dir, rootsFile)
	data, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if text, write := change(string(data)); write {
		return replace(path, []byte(text))
	}
	return nil
}

// replace writes a file that is there whole or as before, also after a crash; only its owner reads it.
func replace(path string, data []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".new-*")
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	defer os.Remove(f.Name())
	_, err = f.Write(data)
	if err = errors.Join(err, f.Chmod(0o600), f.Sync(), f.Close()); err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}
