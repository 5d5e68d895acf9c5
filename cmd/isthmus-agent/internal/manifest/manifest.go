// Package manifest remembers what joining the mesh wrote on this machine, so that leaving takes back exactly that: a file
// that was changed since is moved aside, not deleted, and folders are as they were.
package manifest

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"github.com/isthmus-mesh/isthmus/cmd/isthmus-agent/internal/ca"
)

// File is the name of the manifest in the agent's data folder.
const File = "manifest.json"

// maxSize is the largest manifest that is read, in bytes.
const maxSize = 64 << 10

// Manifest is what was written, in the order of writing.
type Manifest struct {
	Files   []Entry  `json:"files"`
	Folders []Folder `json:"folders,omitempty"`
}

// Entry is one file that did not exist before.
type Entry struct {
	Path   string `json:"path"`
	SHA256 string `json:"sha256"` // of the content as it was written, in hex
}

// Folder is one folder that was made, or that was there with another mode.
type Folder struct {
	Path string      `json:"path"`
	Made bool        `json:"made,omitempty"`
	Mode fs.FileMode `json:"mode,omitempty"` // the permissions before, unless Made
}

// Add notes that path is about to be written with data.
func (m *Manifest) Add(path string, data []byte) {
	m.Forget(path)
	m.Files = append(m.Files, Entry{path, sum(data)})
}

// Forget takes path off the list.
func (m *Manifest) Forget(path string) {
	m.Files = slices.DeleteFunc(m.Files, func(e Entry) bool { return e.Path == path })
}

// Has reports whether path was noted.
func (m *Manifest) Has(path string) bool {
	return slices.ContainsFunc(m.Files, func(e Entry) bool { return e.Path == path })
}

// MakeFolder makes dir with its parents and notes what it made, or the mode of dir if it was there.
func (m *Manifest) MakeFolder(dir string, mode fs.FileMode) error {
	var missing []string
	for at := dir; ; at = filepath.Dir(at) {
		info, err := os.Stat(at)
		if err == nil {
			if at == dir {
				m.Folders = append(m.Folders, Folder{Path: dir, Mode: info.Mode().Perm()})
			}
			break
		}
		if !errors.Is(err, fs.ErrNotExist) || at == filepath.Dir(at) {
			return fmt.Errorf("look at %s: %w", at, err)
		}
		missing = append(missing, at)
	}
	for _, at := range slices.Backward(missing) { // parents first
		m.Folders = append(m.Folders, Folder{Path: at, Made: true})
	}
	if err := os.MkdirAll(dir, mode); err != nil {
		return fmt.Errorf("make folder: %w", err)
	}
	return nil
}

// Save writes the manifest into dir.
func (m *Manifest) Save(dir string) error {
	data, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return fmt.Errorf("write manifest: %w", err)
	}
	return ca.WriteFile(filepath.Join(dir, File), append(data, '\n'), 0o600)
}

// Load reads the manifest in dir. Without one it is empty.
func Load(dir string) (*Manifest, error) {
	path := filepath.Join(dir, File)
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return &Manifest{}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read manifest: %w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxSize+1))
	if err != nil {
		return nil, fmt.Errorf("read manifest %s: %w", path, err)
	}
	if len(data) > maxSize {
		return nil, fmt.Errorf("manifest %s has over %d bytes", path, maxSize)
	}
	var m Manifest
	if err := json.Unmarshal(data, &m); err != nil {
		return nil, fmt.Errorf("manifest %s: %w", path, err)
	}
	for _, e := range m.Files {
		if !filepath.IsAbs(e.Path) {
			return nil, fmt.Errorf("manifest %s: %q is not an absolute path", path, e.Path)
		}
	}
	return &m, nil
}

// Saved is a file that was changed since it was written, and where it was moved.
type Saved struct{ Path, To string }

// Remove deletes the file at path as it was written; one that was changed since is moved aside, and one that is gone is
// none of our business. A path that was not noted is left alone.
func (m *Manifest) Remove(path string) (*Saved, error) {
	i := slices.IndexFunc(m.Files, func(e Entry) bool { return e.Path == path })
	if i < 0 {
		return nil, nil
	}
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if sum(data) == m.Files[i].SHA256 {
		return nil, os.Remove(path)
	}
	to, err := aside(path)
	if err != nil {
		return nil, err
	}
	return &Saved{path, to}, os.Rename(path, to)
}

// aside finds a name that no file has.
func aside(path string) (string, error) {
	to := path + ".saved"
	for n := 2; n < 1000; n++ {
		if _, err := os.Lstat(to); errors.Is(err, fs.ErrNotExist) {
			return to, nil
		} else if err != nil {
			return "", err
		}
		to = path + ".saved" + strconv.Itoa(n)
	}
	return "", fmt.Errorf("%s.saved and 998 more exist", path)
}

// Restore gives folders their mode back and removes those that were made, unless something of others is in them.
func (m *Manifest) Restore() error {
	var errs []error
	for _, f := range slices.Backward(m.Folders) {
		if f.Made {
			_ = os.Remove(f.Path) // fails when it is not empty, as it should
			continue
		}
		if err := os.Chmod(f.Path, f.Mode); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

func sum(data []byte) string {
	s := sha256.Sum256(data)
	return hex.EncodeToString(s[:])
}
