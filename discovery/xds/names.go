package xds

import (
	"hash/maphash"
	"slices"
	"sync"
	"weak"
)

// nameSet is a set of resource names. It is immutable; streams that ask for the same share one. Nil is an empty one.
type nameSet struct{ list []string } // sorted

func (n *nameSet) len() int {
	if n == nil {
		return 0
	}
	return len(n.list)
}

func (n *nameSet) has(name string) bool {
	if n == nil {
		return false
	}
	_, there := slices.BinarySearch(n.list, name)
	return there
}

func (n *nameSet) all() []string {
	if n == nil {
		return nil
	}
	return n.list
}

// missing returns those of the sorted names that n does not have.
func (n *nameSet) missing(names []string) []string {
	var out []string
	rest := n.all()
	for _, name := range names {
		i, there := slices.BinarySearch(rest, name)
		if rest = rest[i:]; !there {
			out = append(out, name)
		}
	}
	return out
}

// merged returns the names of two sorted lists that have none in common, sorted.
func merged(a, b []string) []string {
	out := make([]string, 0, len(a)+len(b))
	for len(a) > 0 && len(b) > 0 {
		if a[0] < b[0] {
			out, a = append(out, a[0]), a[1:]
		} else {
			out, b = append(out, b[0]), b[1:]
		}
	}
	return append(append(out, a...), b...)
}

// sortedNames returns the names sorted and each once, without the wildcard, and whether that was among them.
func sortedNames(names []string) (sorted []string, all bool) {
	sorted = slices.Compact(slices.Sorted(slices.Values(names)))
	if i, there := slices.BinarySearch(sorted, everything); there {
		return slices.Delete(sorted, i, i+1), true
	}
	return sorted, false
}

// nameSets are the sets that some stream has, by hash.
type nameSets struct {
	mu    sync.Mutex
	known map[uint64]weak.Pointer[nameSet]
	limit int // at so many those that are gone are swept
}

// of returns the set of these names, which are sorted and each there once. It may keep the list.
func (k *nameSets) of(sorted []string) *nameSet {
	if len(sorted) == 0 {
		return nil
	}
	hash := hashOfList(sorted)
	k.mu.Lock()
	defer k.mu.Unlock()
	if p, ok := k.known[hash]; ok {
		if n := p.Value(); n != nil && slices.Equal(n.list, sorted) {
			return n
		}
	}
	if k.known == nil {
		k.known, k.limit = map[uint64]weak.Pointer[nameSet]{}, 64
	}
	if len(k.known) >= k.limit {
		for h, p := range k.known {
			if p.Value() == nil {
				delete(k.known, h)
			}
		}
		k.limit = max(64, 2*len(k.known))
	}
	n := &nameSet{slices.Clip(sorted)}
	k.known[hash] = weak.Make(n)
	return n
}

// hashOfList tells lists of names apart, in their order. It is the same in this process only.
func hashOfList(names []string) uint64 {
	var h maphash.Hash
	h.SetSeed(seed)
	for _, name := range names {
		_, _ = h.WriteString(name)
		_ = h.WriteByte(0)
	}
	return h.Sum64()
}
