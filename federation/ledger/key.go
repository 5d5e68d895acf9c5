package ledger

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
)

const redacted = "[redacted]"

// Key is the private federation key, which signs the cluster's records. It prints as [redacted].
type Key struct {
	sign   func(msg []byte) []byte // a closure, so that no printer reaches the key
	public ed25519.PublicKey
}

// NewKey wraps an Ed25519 private key.
func NewKey(private ed25519.PrivateKey) Key {
	public, _ := private.Public().(ed25519.PublicKey)
	return Key{sign: func(msg []byte) []byte { return ed25519.Sign(private, msg) }, public: public}
}

// Public returns the public half.
func (k Key) Public() ed25519.PublicKey { return k.public }

// Sign returns the Ed25519 signature over msg.
func (k Key) Sign(msg []byte) []byte { return k.sign(msg) }

// String, GoString, Format, LogValue and MarshalText keep the key out of every kind of output.
func (k Key) String() string { return redacted }

// GoString returns [redacted].
func (k Key) GoString() string { return redacted }

// Format prints [redacted] for every verb.
func (k Key) Format(f fmt.State, _ rune) { _, _ = f.Write([]byte(redacted)) }

// LogValue returns [redacted].
func (k Key) LogValue() slog.Value { return slog.StringValue(redacted) }

// MarshalText returns [redacted].
func (k Key) MarshalText() ([]byte, error) { return []byte(redacted), nil }

const keyBlock = "PRIVATE KEY"

// LoadOrCreateKey reads the Ed25519 key (PEM, PKCS #8) from path, or makes one there that only the owner can read.
// A key that others can read is refused.
func LoadOrCreateKey(path string) (Key, error) {
	key, err := loadKey(path)
	if !errors.Is(err, fs.ErrNotExist) {
		return key, err
	}
	data, err := MakeKey()
	if err != nil {
		return Key{}, err
	}
	if err := writeOnce(path, data); err != nil && !errors.Is(err, fs.ErrExist) {
		return Key{}, fmt.Errorf("write federation key %s: %w", path, err)
	}
	return loadKey(path) // another process may have been faster
}

// MakeKey makes an Ed25519 key, PKCS #8 in PEM.
func MakeKey() ([]byte, error) {
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make federation key: %w", err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		return nil, fmt.Errorf("encode federation key: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: keyBlock, Bytes: der}), nil
}

func loadKey(path string) (Key, error) {
	info, err := os.Stat(path)
	if err != nil {
		return Key{}, fmt.Errorf("federation key %s: %w", path, err)
	}
	if info.Mode().Perm()&0o077 != 0 {
		return Key{}, fmt.Errorf("federation key %s can be read by others (mode %04o); run: chmod 600 %s", path, info.Mode().Perm(), path)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return Key{}, fmt.Errorf("read federation key %s: %w", path, err)
	}
	return ParseKey(path, data)
}

// ParseKey reads what MakeKey made; from names it in errors.
func ParseKey(from string, data []byte) (Key, error) {
	bad := func(why string) (Key, error) {
		return Key{}, fmt.Errorf("federation key %s %s; restore it from a copy, or move it away and join again", from, why)
	}
	block, _ := pem.Decode(data)
	if block == nil || block.Type != keyBlock {
		return bad("is not a PEM private key")
	}
	parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return bad("is not a PKCS #8 key")
	}
	private, ok := parsed.(ed25519.PrivateKey)
	if !ok {
		return bad("is not an Ed25519 key")
	}
	return NewKey(private), nil
}

// writeOnce makes the file whole or not at all, and never replaces one.
func writeOnce(path string, data []byte) error {
	tmp, err := os.CreateTemp(filepath.Dir(path), ".key-*") // made with mode 0600
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(tmp.Name()) }()
	_, err = tmp.Write(data)
	if err = errors.Join(err, tmp.Sync(), tmp.Close()); err != nil {
		return err
	}
	return os.Link(tmp.Name(), path)
}
