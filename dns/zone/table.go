package zone

import (
	"hash/maphash"
	"iter"
	"net/netip"
)

// table is an immutable hash table of entries in two steps, chunks of buckets, so that the next one shares all but the
// few kilobytes on the way to what has changed. An entry may be there under several keys.
type table struct {
	seed   maphash.Seed
	chunks []*chunk // a power of two of them
	n      int
}

const (
	chunkBits = 6
	// load is how many entries a bucket holds at most on average; more make a larger table of it.
	load = 8
)

type (
	chunk  [1 << chunkBits]bucket
	bucket []slot
	// slot has the hash beside the entry: others in the bucket are passed over without a look at them.
	slot struct {
		hash uint32
		e    *entry
	}
)

// newTable returns an empty table with room for n entries.
func newTable(n int) *table {
	chunks := 1
	for chunks<<chunkBits*load/2 < n {
		chunks *= 2
	}
	t := &table{seed: maphash.MakeSeed(), chunks: make([]*chunk, chunks)}
	for i := range t.chunks {
		t.chunks[i] = new(chunk)
	}
	return t
}

func (t *table) at(hash uint32) bucket {
	return t.chunks[hash>>chunkBits&uint32(len(t.chunks)-1)][hash&(1<<chunkBits-1)]
}

// byName returns the entry of exactly that name, or nil, in a table by name.
func (t *table) byName(name []byte) *entry {
	hash := uint32(maphash.Bytes(t.seed, name))
	for _, s := range t.at(hash) {
		if s.hash == hash && s.e.name == string(name) {
			return s.e
		}
	}
	return nil
}

// byAddr returns the entry with the smallest name that has the address, or nil, in a table by address.
func (t *table) byAddr(a netip.Addr) *entry {
	var best *entry
	hash := t.hashAddr(a)
	for _, s := range t.at(hash) {
		if s.hash == hash && s.e.hasAddr(a) && (best == nil || s.e.name < best.name) {
			best = s.e
		}
	}
	return best
}

func (t *table) hashName(name string) uint32 { return uint32(maphash.String(t.seed, name)) }

func (t *table) hashAddr(a netip.Addr) uint32 {
	b := a.As16()
	return uint32(maphash.Bytes(t.seed, b[:]))
}

// editor makes the next table. It copies what it touches once.
type editor struct {
	t     *table
	owned map[*chunk]*[1 << chunkBits]bool // chunks of ours, and which of their buckets are
}

func (t *table) edit() *editor {
	next := *t
	next.chunks = append([]*chunk(nil), t.chunks...)
	return &editor{t: &next, owned: map[*chunk]*[1 << chunkBits]bool{}}
}

// done returns the next table, a larger one if there is much in it.
func (d *editor) done() *table {
	if !d.t.full() {
		return d.t
	}
	l := editor{t: newTable(2 * d.t.n), owned: map[*chunk]*[1 << chunkBits]bool{}}
	l.t.seed = d.t.seed
	for s := range d.t.all() {
		l.swap(s.hash, nil, s.e)
	}
	return l.t
}

// bucket returns the bucket of a hash to write to.
func (d *editor) bucket(hash uint32) *bucket {
	at := &d.t.chunks[hash>>chunkBits&uint32(len(d.t.chunks)-1)]
	mine := d.owned[*at]
	if mine == nil {
		c := **at
		*at, mine = &c, new([1 << chunkBits]bool)
		d.owned[*at] = mine
	}
	i := hash & (1<<chunkBits - 1)
	b := &(*at)[i]
	if !mine[i] {
		mine[i] = true
		*b = append(make(bucket, 0, len(*b)+1), *b...)
	}
	return b
}

// swap puts next in the place of old under a hash; either may be nil.
func (d *editor) swap(hash uint32, old, next *entry) {
	b := d.bucket(hash)
	for i, s := range *b {
		if s.e != old || s.hash != hash || old == nil {
			continue
		}
		if next != nil {
			(*b)[i].e = next
			return
		}
		last := len(*b) - 1
		(*b)[i], (*b)[last] = (*b)[last], slot{}
		*b = (*b)[:last]
		d.t.n--
		return
	}
	if next != nil {
		*b = append(*b, slot{hash, next})
		d.t.n++
	}
}

// full reports whether a larger table is due.
func (t *table) full() bool { return t.n > len(t.chunks)<<chunkBits*load }

// all gives every entry, once for each of its keys.
func (t *table) all() iter.Seq[slot] {
	return func(yield func(slot) bool) {
		for _, c := range t.chunks {
			for _, b := range c {
				for _, s := range b {
					if !yield(s) {
						return
					}
				}
			}
		}
	}
}
