// Package ledger keeps on disk what a cluster must not forget: the signed records of every member, how far each
// origin had come, and the grants of tokens. It knows the file and its form, not what the records mean.
package ledger

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"time"

	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
	"google.golang.org/protobuf/proto"

	federationv1 "github.com/isthmus-mesh/isthmus/api/federation/v1"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/federation/protocol"
)

var (
	bucketRecords = []byte("records") // ORIGIN/KIND/KEY -> sealed Record
	bucketMeta    = []byte("meta")    // ORIGIN -> sealed epoch, seq, last heard
)

const lockWait = time.Second

// ErrCorrupt is wrapped by the error of an entry whose checksum or form is wrong.
var ErrCorrupt = errors.New("entry is corrupt")

// Ledger is an open file. It is safe for concurrent use.
type Ledger struct{ db *bolt.DB }

// Meta is how far an origin had come when it was last written.
type Meta struct {
	Epoch, Seq uint64    // never falls
	LastHeard  time.Time // zero: never
}

// Contents is what a ledger held when it was loaded.
type Contents struct {
	Records []*federationv1.Record // sorted by resource name
	Meta    map[mesh.ClusterID]Meta
	Skipped []error // one for each corrupt entry; each wraps ErrCorrupt
}

// Open opens the file, or makes it. Only one process can have it open.
func Open(path string) (*Ledger, error) {
	db, err := bolt.Open(path, 0o600, &bolt.Options{Timeout: lockWait, FreelistType: bolt.FreelistMapType, NoFreelistSync: true})
	switch {
	case errors.Is(err, bolterrors.ErrTimeout):
		return nil, fmt.Errorf("ledger %s is in use by another process; stop that process or set another dataDir: %w", path, err)
	case errors.Is(err, bolterrors.ErrInvalid), errors.Is(err, bolterrors.ErrChecksum), errors.Is(err, bolterrors.ErrVersionMismatch):
		return nil, fmt.Errorf("ledger %s is not readable; move it away, restart, and what peers hold comes back: %w", path, err)
	case err != nil:
		return nil, fmt.Errorf("open ledger %s: %w", path, err)
	}
	err = db.Update(func(tx *bolt.Tx) error {
		for _, name := range [][]byte{bucketRecords, bucketMeta} {
			if _, err := tx.CreateBucketIfNotExists(name); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("prepare ledger %s: %w", path, err), db.Close())
	}
	return &Ledger{db: db}, nil
}

// Path returns the name of the file.
func (l *Ledger) Path() string { return l.db.Path() }

// Close gives the file free.
func (l *Ledger) Close() error {
	if err := l.db.Close(); err != nil {
		return fmt.Errorf("close ledger: %w", err)
	}
	return nil
}

// Load reads everything. Corrupt entries are left out and named in Skipped.
func (l *Ledger) Load() (Contents, error) {
	out := Contents{Meta: map[mesh.ClusterID]Meta{}}
	err := l.db.View(func(tx *bolt.Tx) error {
		skip := func(what string, key []byte, err error) {
			out.Skipped = append(out.Skipped, fmt.Errorf("ledger %s: %s %q: %w: %w", l.db.Path(), what, key, ErrCorrupt, err))
		}
		err := tx.Bucket(bucketRecords).ForEach(func(k, v []byte) error {
			r := &federationv1.Record{}
			data, err := unseal(v)
			if err == nil {
				err = proto.Unmarshal(data, r)
			}
			if err == nil && protocol.ResourceName(r) != string(k) {
				err = fmt.Errorf("holds %q", protocol.ResourceName(r))
			}
			if err != nil {
				skip("record", k, err)
				return nil
			}
			out.Records = append(out.Records, r)
			return nil
		})
		if err != nil {
			return err
		}
		return tx.Bucket(bucketMeta).ForEach(func(k, v []byte) error {
			m, err := decodeMeta(v)
			if err != nil {
				skip("meta", k, err)
				return nil
			}
			out.Meta[mesh.ClusterID(k)] = m
			return nil
		})
	})
	if err != nil {
		return Contents{}, fmt.Errorf("load ledger %s: %w", l.db.Path(), err)
	}
	return out, nil
}

// State gives Contents the form in which a core starts, on a monotonic clock that shows now when the wall clock
// shows wall.
func (c Contents) State(now time.Duration, wall time.Time) protocol.State {
	s := protocol.State{Records: c.Records, Marks: map[mesh.ClusterID]protocol.Mark{}, LastHeard: map[mesh.ClusterID]time.Duration{}}
	for id, m := range c.Meta {
		s.Marks[id] = protocol.Mark{Epoch: m.Epoch, Seq: m.Seq}
		if !m.LastHeard.IsZero() && m.LastHeard.Before(wall) {
			s.LastHeard[id] = now - wall.Sub(m.LastHeard)
		}
	}
	return s
}

// Commit writes the Persist and Remove actions of one step, in order, in one transaction, and raises the mark of
// every origin that said something new. Other actions are passed over. Nothing is written when there is nothing to.
func (l *Ledger) Commit(actions []protocol.Action) error {
	writes := 0
	for _, a := range actions {
		switch a.(type) {
		case protocol.Persist, protocol.Remove:
			writes++
		}
	}
	if writes == 0 {
		return nil
	}
	err := l.db.Update(func(tx *bolt.Tx) error {
		records := tx.Bucket(bucketRecords)
		marks := map[mesh.ClusterID]protocol.Mark{}
		for _, a := range actions {
			var err error
			switch a := a.(type) {
			case protocol.Persist:
				err = put(records, a.Record)
				at := protocol.Mark{Epoch: a.Record.Epoch, Seq: a.Record.Seq}
				if id := mesh.ClusterID(a.Record.Origin); marks[id].Less(at) {
					marks[id] = at
				}
			case protocol.Remove:
				err = records.Delete([]byte(string(a.Origin) + "/" + a.Kind + "/" + a.Key))
			}
			if err != nil {
				return err
			}
		}
		for id, at := range marks {
			if err := raise(tx, id, at, time.Time{}); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("write %d records to ledger %s: %w", writes, l.db.Path(), err)
	}
	return nil
}

// Heard notes when each origin was last heard.
func (l *Ledger) Heard(at map[mesh.ClusterID]time.Time) error {
	if len(at) == 0 {
		return nil
	}
	err := l.db.Update(func(tx *bolt.Tx) error {
		for id, t := range at {
			if err := raise(tx, id, protocol.Mark{}, t); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("note peers heard in ledger %s: %w", l.db.Path(), err)
	}
	return nil
}

func put(b *bolt.Bucket, r *federationv1.Record) error {
	data, err := proto.MarshalOptions{Deterministic: true}.Marshal(r)
	if err != nil {
		return fmt.Errorf("encode record %s: %w", protocol.ResourceName(r), err)
	}
	return b.Put([]byte(protocol.ResourceName(r)), seal(data))
}

// raise lets neither the mark nor the time fall.
func raise(tx *bolt.Tx, id mesh.ClusterID, at protocol.Mark, heard time.Time) error {
	if id == "" {
		return errors.New("record without an origin")
	}
	b := tx.Bucket(bucketMeta)
	m, err := decodeMeta(b.Get([]byte(id)))
	if err != nil {
		m = Meta{}
	}
	if (protocol.Mark{Epoch: m.Epoch, Seq: m.Seq}).Less(at) {
		m.Epoch, m.Seq = at.Epoch, at.Seq
	}
	if heard.After(m.LastHeard) {
		m.LastHeard = heard
	}
	data := binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(nil, m.Epoch), m.Seq)
	var nanos int64
	if !m.LastHeard.IsZero() {
		nanos = m.LastHeard.UnixNano()
	}
	return b.Put([]byte(id), seal(binary.BigEndian.AppendUint64(data, uint64(nanos))))
}

func decodeMeta(v []byte) (Meta, error) {
	data, err := unseal(v)
	if err != nil {
		return Meta{}, err
	}
	if len(data) != 24 {
		return Meta{}, fmt.Errorf("has %d bytes, want 24", len(data))
	}
	m := Meta{Epoch: binary.BigEndian.Uint64(data), Seq: binary.BigEndian.Uint64(data[8:])}
	if nanos := int64(binary.BigEndian.Uint64(data[16:])); nanos != 0 {
		m.LastHeard = time.Unix(0, nanos)
	}
	return m, nil
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// seal puts the version of the form and a checksum in front.
func seal(data []byte) []byte {
	b := append(make([]byte, 0, len(data)+5), 1)
	b = binary.BigEndian.AppendUint32(b, crc32.Checksum(data, castagnoli))
	return append(b, data...)
}

// unseal returns what seal was given; it stays valid only as long as v.
func unseal(v []byte) ([]byte, error) {
	switch {
	case len(v) < 5:
		return nil, fmt.Errorf("has %d bytes, want at least 5", len(v))
	case v[0] != 1:
		return nil, fmt.Errorf("has form %d, want 1", v[0])
	case binary.BigEndian.Uint32(v[1:5]) != crc32.Checksum(v[5:], castagnoli):
		return nil, errors.New("checksum differs")
	}
	return v[5:], nil
}
