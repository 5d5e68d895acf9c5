// Package memo remembers the parts of translations with what they were made of, for all proxies of one control plane: a part
// that would come out the same is not made again, whoever it is for. It is pure bookkeeping: what a part depends on, its
// maker says.
package memo

import (
	"hash/maphash"
	"slices"

	"google.golang.org/protobuf/proto"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// Key names a part.
type Key struct {
	Kind, Name string
	Port       uint32
}

// Memo holds parts. Nil remembers nothing. It is not safe for concurrent use, and what it returns is not to be changed.
type Memo struct {
	// Pack, if it is set, turns messages into what is kept and returned of them instead, such as their encoding.
	Pack func(proto.Message) any

	stamp      []any
	parts      map[uint64]*part
	now        uint64 // counts sweeps
	limit      int    // at so many parts some are forgotten
	made, used int
}

type part struct {
	key      Key
	from     []any
	value    any
	problems []mesh.Problem
	seen     uint64 // the sweep before which it was last used
	next     *part  // with the same hash
}

// Begin starts a translation. The stamp is what every part depends on: when it is not that of the translation before,
// nothing is remembered. Its values are comparable: pointers that stand for what never changes, and texts.
func (m *Memo) Begin(stamp []any) {
	if m == nil {
		return
	}
	if m.parts == nil || !slices.Equal(m.stamp, stamp) {
		m.parts, m.stamp = map[uint64]*part{}, stamp
	}
}

// recent is how many rounds a part is kept without being used, once there are many.
const recent = 8

// Sweep ends a round of translations. When there are twice as many parts as after the last time that it was so, those that
// were not used lately are forgotten.
func (m *Memo) Sweep() {
	now := m.now
	m.now++
	if len(m.parts) <= max(m.limit, 4096) {
		return
	}
	for h, p := range m.parts {
		if p.seen+recent < now {
			delete(m.parts, h)
		}
	}
	m.limit = 2 * len(m.parts)
}

// Counts returns how many parts were made, and how many were there already, since it was last asked.
func (m *Memo) Counts() (made, used int) {
	made, used = m.made, m.used
	m.made, m.used = 0, 0
	return made, used
}

var seed = maphash.MakeSeed()

func hash(key Key, from []any) uint64 {
	var h maphash.Hash
	h.SetSeed(seed)
	maphash.WriteComparable(&h, key)
	for _, x := range from {
		maphash.WriteComparable(&h, x)
	}
	return h.Sum64()
}

// Of returns the part of that name that is made from these values, which are comparable: one that is remembered, else what
// build makes. Problems that build adds to the list are added then, too.
func Of[T any](m *Memo, key Key, from []any, problems *[]mesh.Problem, build func() T) T {
	if m == nil {
		return build()
	}
	h := hash(key, from)
	for p := m.parts[h]; p != nil; p = p.next {
		if p.key == key && slices.Equal(p.from, from) {
			m.used++
			p.seen = m.now
			m.parts[h].seen = m.now
			*problems = append(*problems, p.problems...)
			return p.value.(T)
		}
	}
	m.made++
	before := len(*problems)
	value := build()
	m.parts[h] = &part{key: key, from: from, value: value, problems: slices.Clone((*problems)[before:]), seen: m.now, next: m.parts[h]}
	return value
}
