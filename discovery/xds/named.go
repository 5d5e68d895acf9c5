package xds

import (
	"cmp"
	"hash/maphash"
	"iter"
	"maps"
	"slices"
	"strings"
)

// Named is a set of resources of one type by name. It is immutable: what differs little from another shares most of its
// memory with it, and the differences between the two are found without looking at what they share. Nil is an empty one.
type Named struct {
	shards []*shard // by hash of the name, a power of two
	n      int
	sum    uint64 // over the contents, see hashOf
}

// shard is sorted by name. Nil is an empty one.
type shard struct{ list []*Resource }

const (
	perShard   = 8 // resources in a shard of a new set, on average
	growShards = 4 // times as many before the set is laid out anew
)

var seed = maphash.MakeSeed()

// NewNamed returns the set of these resources. Of two with one name the last counts.
func NewNamed(resources iter.Seq[*Resource]) *Named {
	all := slices.Collect(resources)
	size := 1
	for size*perShard < len(all) {
		size *= 2
	}
	s := &Named{shards: make([]*shard, size)}
	for _, r := range all {
		at := s.at(r.Name)
		if s.shards[at] == nil {
			s.shards[at] = &shard{}
		}
		s.count(s.shards[at].put(r), r)
	}
	return s
}

// NamedOf returns the set of the values of a map.
func NamedOf(m map[string]*Resource) *Named { return NewNamed(maps.Values(m)) }

func (s *Named) at(name string) int { return int(maphash.String(seed, name) & uint64(len(s.shards)-1)) }

func compareName(r *Resource, name string) int { return strings.Compare(r.Name, name) }

// put changes the shard, and returns what was there.
func (h *shard) put(r *Resource) (was *Resource) {
	i, there := slices.BinarySearchFunc(h.list, r.Name, compareName)
	if there {
		was, h.list[i] = h.list[i], r
		return was
	}
	h.list = slices.Insert(h.list, i, r)
	return nil
}

// count accounts for now in the place of was; nil is nothing.
func (s *Named) count(was, now *Resource) {
	if was != nil {
		s.n, s.sum = s.n-1, s.sum-was.contentHash()
	}
	if now != nil {
		s.n, s.sum = s.n+1, s.sum+now.contentHash()
	}
}

// Len is how many resources there are.
func (s *Named) Len() int {
	if s == nil {
		return 0
	}
	return s.n
}

// hash is over the contents: equal sets, equal hashes, in every process.
func (s *Named) hash() uint64 {
	if s == nil {
		return 0
	}
	return s.sum
}

// same reports whether two sets hold the same, by count and hash.
func (s *Named) same(o *Named) bool { return s == o || s.Len() == o.Len() && s.hash() == o.hash() }

// Get returns the resource with the name, or nil.
func (s *Named) Get(name string) *Resource {
	if s == nil || s.n == 0 {
		return nil
	}
	h := s.shards[s.at(name)]
	if h == nil {
		return nil
	}
	if i, there := slices.BinarySearchFunc(h.list, name, compareName); there {
		return h.list[i]
	}
	return nil
}

// All visits the resources, in no order.
func (s *Named) All() iter.Seq[*Resource] {
	return func(yield func(*Resource) bool) {
		if s == nil {
			return
		}
		for _, h := range s.shards {
			if h == nil {
				continue
			}
			for _, r := range h.list {
				if !yield(r) {
					return
				}
			}
		}
	}
}

// Map returns the set of what f makes of each resource, of the same name.
func (s *Named) Map(f func(*Resource) *Resource) *Named {
	return NewNamed(func(yield func(*Resource) bool) {
		for r := range s.All() {
			if !yield(f(r)) {
				return
			}
		}
	})
}

// With returns the set with these resources put in, each in the place of that of its name. It costs what is put in, and
// little for the rest. A set that has them already is returned as it is.
func (s *Named) With(resources ...*Resource) *Named {
	if s == nil || s.n+len(resources) > len(s.shards)*perShard*growShards {
		return NewNamed(func(yield func(*Resource) bool) {
			for r := range s.All() {
				if !yield(r) {
					return
				}
			}
			for _, r := range resources {
				if !yield(r) {
					return
				}
			}
		})
	}
	var out *Named
	own := map[int]bool{}
	for _, r := range resources {
		if s.Get(r.Name) == r {
			continue
		}
		if out == nil {
			out = s.clone()
		}
		out.count(out.own(out.at(r.Name), own).put(r), r)
	}
	if out == nil {
		return s
	}
	return out
}

func (s *Named) clone() *Named {
	return &Named{shards: slices.Clone(s.shards), n: s.n, sum: s.sum}
}

// own makes the shard one that s may change; those in mine are.
func (s *Named) own(at int, mine map[int]bool) *shard {
	if !mine[at] {
		mine[at] = true
		next := &shard{}
		if h := s.shards[at]; h != nil {
			next.list = slices.Clone(h.list)
		}
		s.shards[at] = next
	}
	return s.shards[at]
}

// without returns the set without the resources of these names.
func (s *Named) without(names ...string) *Named {
	var out *Named
	own := map[int]bool{}
	for _, name := range names {
		if s.Get(name) == nil {
			continue
		}
		if out == nil {
			out = s.clone()
		}
		at := out.at(name)
		h := out.own(at, own)
		i, there := slices.BinarySearchFunc(h.list, name, compareName)
		if !there {
			continue // named twice
		}
		out.count(h.list[i], nil)
		if h.list = slices.Delete(h.list, i, i+1); len(h.list) == 0 {
			out.shards[at], own[at] = nil, false
		}
	}
	if out == nil {
		return s
	}
	if out.n == 0 {
		return nil
	}
	return out
}

// sharing returns s with everything that is the same in old replaced by what old has; old itself if all is.
func (s *Named) sharing(old *Named) *Named {
	if old == nil || s == nil || s == old {
		return s
	}
	if len(s.shards) != len(old.shards) {
		return NewNamed(func(yield func(*Resource) bool) {
			for r := range s.All() {
				if o := old.Get(r.Name); o != nil && o.Version == r.Version {
					r = o
				}
				if !yield(r) {
					return
				}
			}
		})
	}
	out := &Named{shards: make([]*shard, len(s.shards)), n: s.n, sum: s.sum}
	same := true
	for i, h := range s.shards {
		out.shards[i] = h.sharing(old.shards[i])
		same = same && out.shards[i] == old.shards[i]
	}
	if same {
		return old
	}
	return out
}

func (h *shard) sharing(old *shard) *shard {
	if h == nil || old == nil || h == old {
		return h
	}
	same := len(h.list) == len(old.list)
	list := slices.Clone(h.list)
	for i, r := range list {
		at, there := slices.BinarySearchFunc(old.list, r.Name, compareName)
		if there && old.list[at].Version == r.Version {
			list[i] = old.list[at]
		} else {
			same = false
		}
	}
	if same {
		return old
	}
	return &shard{list}
}

// diff returns the sorted names that were added, changed or removed.
func diff(before, after *Named) []string {
	if before == after {
		return nil
	}
	var names []string
	if before == nil || after == nil || len(before.shards) != len(after.shards) {
		for a := range after.All() {
			if b := before.Get(a.Name); b == nil || b.Version != a.Version {
				names = append(names, a.Name)
			}
		}
		for b := range before.All() {
			if after.Get(b.Name) == nil {
				names = append(names, b.Name)
			}
		}
	} else {
		for i, h := range after.shards {
			if h != before.shards[i] {
				names = before.shards[i].diff(h, names)
			}
		}
	}
	slices.Sort(names)
	return names
}

// diff adds the names of what differs in two shards.
func (h *shard) diff(after *shard, names []string) []string {
	var x, y []*Resource
	if h != nil {
		x = h.list
	}
	if after != nil {
		y = after.list
	}
	for len(x) > 0 || len(y) > 0 {
		switch {
		case len(y) == 0 || len(x) > 0 && cmp.Less(x[0].Name, y[0].Name):
			names, x = append(names, x[0].Name), x[1:]
		case len(x) == 0 || cmp.Less(y[0].Name, x[0].Name):
			names, y = append(names, y[0].Name), y[1:]
		default:
			if x[0] != y[0] && x[0].Version != y[0].Version {
				names = append(names, x[0].Name)
			}
			x, y = x[1:], y[1:]
		}
	}
	return names
}
