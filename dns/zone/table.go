package zone

import (
	"hash/maphash"
	"net/netip"
	"slices"
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
	bucket []*entry
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

func (t *table) at(hash uint64) bucket {
	return t.chunks[hash>>chunkBits&uint64(len(t.chunks)-1)][hash&(1<<chunkBits-1)]
}

// byName returns the entry of exactly that name, or nil.
func (t *table) byName(name []byte) *entry {
	for _, e := range t.at(maphash.Bytes(t.seed, name)) {
		if e.name == string(name) {
			return e
		}
	}
	return nil
}

// byAddr returns the entry with the smallest name whose reverse name is that of a, or nil.
func (t *table) byAddr(a netip.Addr) *entry {
	var best *entry
	for _, e := range t.at(t.hashAddr(a)) {
		if e.hasAddr(a) && (best == nil || e.name < best.name) {
			best = e
		}
	}
	return best
}

func (t *table) hashAddr(a netip.Addr) uint64 {
	b := a.As16()
	return maphash.Bytes(t.seed, b[:])
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

// bucket returns the bucket of a hash to write to.
func (d *editor) bucket(hash uint64) *bucket {
	at := &d.t.chunks[hash>>chunkBits&uint64(len(d.t.chunks)-1)]
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
func (d *editor) swap(hash uint64, old, next *entry) {
	b := d.bucket(hash)
	for i, e := range *b {
		if e != old || old == nil {
			continue
		}
		if next != nil {
			(*b)[i] = next
			return
		}
		last := len(*b) - 1
		(*b)[i], (*b)[last] = (*b)[last], nil
		*b = (*b)[:last]
		d.t.n--
		return
	}
	if next != nil {
		*b = append(*b, next)
		d.t.n++
	}
}

// full reports whether a larger table is due.
func (t *table) full() bool { return t.n > len(t.chunks)<<chunkBits*load }

// larger returns a table of the same entries with room for as many more.
func (t *table) larger() *table {
	d := editor{t: newTable(2 * t.n), owned: map[*chunk]*[1 << chunkBits]bool{}}
	t.eachName(func(e *entry) bool {
		for _, h := range e.hashes(d.t) {
			d.swap(h, nil, e)
		}
		return true
	})
	return d.t
}

// eachName calls f with every entry once, until it returns false.
func (t *table) eachName(f func(*entry) bool) {
	for i, c := range t.chunks {
		for j, b := range c {
			for k, e := range b {
				// An entry is found under its addresses, too: here, and perhaps in this very bucket.
				h := maphash.String(t.seed, e.name)
				if h>>chunkBits&uint64(len(t.chunks)-1) != uint64(i) || h&(1<<chunkBits-1) != uint64(j) || slices.Contains(b[:k], e) {
					continue
				}
				if !f(e) {
					return
				}
			}
		}
	}
}
