// Package lists compares and changes lists of pointers that are sorted and shared, and never writes to them. It is pure.
package lists

import (
	"reflect"
	"slices"
)

// Differences returns what is in one list and not in the other, by pointer.
func Differences[T any](old, now []*T) (gone, come []*T) {
	if slices.Equal(old, now) {
		return nil, nil
	}
	had := make(map[*T]bool, len(old))
	for _, x := range old {
		had[x] = true
	}
	for _, x := range now {
		if had[x] {
			delete(had, x)
		} else {
			come = append(come, x)
		}
	}
	for _, x := range old {
		if had[x] {
			gone = append(gone, x)
		}
	}
	return gone, come
}

// Patched returns a sorted list without what is gone, with what has come. What compares as equal is the same object.
func Patched[T any](list, gone, come []T, compare func(a, b T) int) []T {
	if len(gone)+len(come) == 0 {
		return list
	}
	out := slices.Grow(slices.Clone(list), len(come))
	var more []T
	for _, x := range come {
		if i, there := slices.BinarySearchFunc(out, x, compare); there {
			out[i] = x // the most often: it is another value
		} else {
			more = append(more, x)
		}
	}
	for _, x := range gone {
		if i, there := slices.BinarySearchFunc(out, x, compare); there && !slices.ContainsFunc(come, func(y T) bool { return compare(x, y) == 0 }) {
			out = slices.Delete(out, i, i+1)
		}
	}
	for _, x := range more {
		i, _ := slices.BinarySearchFunc(out, x, compare)
		out = slices.Insert(out, i, x)
	}
	if len(out) == 0 {
		return nil
	}
	return out
}

// Shared returns now with values that equal those of old replaced by those. It compares from both ends: what lies between is taken as new.
func Shared[T any](old, now []*T) []*T {
	if len(old) == 0 || len(now) == 0 || slices.Equal(old, now) {
		return now
	}
	out := slices.Clone(now)
	same := func(i, j int) bool {
		if old[i] != now[j] && !reflect.DeepEqual(old[i], now[j]) {
			return false
		}
		out[j] = old[i]
		return true
	}
	n := min(len(old), len(now))
	head := 0
	for head < n && same(head, head) {
		head++
	}
	for tail := 1; tail <= n-head && same(len(old)-tail, len(now)-tail); tail++ {
		continue
	}
	if len(old) == len(now) { // most often one object in the middle is another
		for i := head; i < n; i++ {
			same(i, i)
		}
	}
	return out
}
