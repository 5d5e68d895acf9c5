package ledger

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"

	bolt "go.etcd.io/bbolt"
)

// ErrVersion is wrapped by CAS when the key has another version than the caller believed.
var ErrVersion = errors.New("changed by somebody else")

// Bucket is a named set of keys with versions. A version is never used twice in a bucket, not even for a key that
// was deleted and made again. It is safe for concurrent use.
type Bucket struct {
	l    *Ledger
	name []byte
}

// Bucket returns the bucket with that name. It is made when it is first written to.
func (l *Ledger) Bucket(name string) *Bucket { return &Bucket{l: l, name: []byte("kv/" + name)} }

// Get returns the value and its version; nil and 0 for a key that is not there.
func (b *Bucket) Get(key string) (value []byte, version uint64, err error) {
	err = b.l.db.View(func(tx *bolt.Tx) error {
		bucket := tx.Bucket(b.name)
		if bucket == nil {
			return nil
		}
		value, version, err = decodeValue(bucket.Get([]byte(key)))
		return err
	})
	if err != nil {
		return nil, 0, b.fail("read", key, err)
	}
	return value, version, nil
}

// CAS writes the value if the key still has that version (0: it must not be there). It is on disk when CAS returns.
// The error wraps ErrVersion when another was faster.
func (b *Bucket) CAS(key string, value []byte, version uint64) error {
	if key == "" {
		return b.fail("write", key, errors.New("key is empty"))
	}
	err := b.l.db.Update(func(tx *bolt.Tx) error {
		bucket, err := tx.CreateBucketIfNotExists(b.name)
		if err != nil {
			return err
		}
		_, held, err := decodeValue(bucket.Get([]byte(key)))
		if err != nil {
			return err
		}
		if held != version {
			return fmt.Errorf("version is %d, not %d: %w", held, version, ErrVersion)
		}
		next, err := bucket.NextSequence()
		if err != nil {
			return err
		}
		return bucket.Put([]byte(key), seal(append(binary.BigEndian.AppendUint64(nil, next), value...)))
	})
	if err != nil {
		return b.fail("write", key, err)
	}
	return nil
}

// List returns every key with that prefix and its value. Corrupt ones are left out; the error names them, and the
// map holds all others.
func (b *Bucket) List(prefix string) (map[string][]byte, error) {
	out := map[string][]byte{}
	var bad []error
	err := b.l.db.View(func(tx *bolt.Tx) error {
		bucket := tx.Bucket(b.name)
		if bucket == nil {
			return nil
		}
		c := bucket.Cursor()
		for k, v := c.Seek([]byte(prefix)); k != nil && bytes.HasPrefix(k, []byte(prefix)); k, v = c.Next() {
			value, _, err := decodeValue(v)
			if err != nil {
				bad = append(bad, b.fail("read", string(k), err))
				continue
			}
			out[string(k)] = value
		}
		return nil
	})
	if err != nil {
		return nil, b.fail("list", prefix, err)
	}
	return out, errors.Join(bad...)
}

// Delete removes a key; one that is not there is no error.
func (b *Bucket) Delete(key string) error {
	err := b.l.db.Update(func(tx *bolt.Tx) error {
		if bucket := tx.Bucket(b.name); bucket != nil {
			return bucket.Delete([]byte(key))
		}
		return nil
	})
	if err != nil {
		return b.fail("delete", key, err)
	}
	return nil
}

func (b *Bucket) fail(verb, key string, err error) error {
	return fmt.Errorf("ledger %s: %s %q of %s: %w", b.l.db.Path(), verb, key, bytes.TrimPrefix(b.name, []byte("kv/")), err)
}

// decodeValue copies the value out of the transaction.
func decodeValue(v []byte) ([]byte, uint64, error) {
	if v == nil {
		return nil, 0, nil
	}
	data, err := unseal(v)
	if err == nil && len(data) < 8 {
		err = fmt.Errorf("has %d bytes, want at least 8", len(data))
	}
	if err != nil {
		return nil, 0, fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	return append([]byte{}, data[8:]...), binary.BigEndian.Uint64(data), nil
}
