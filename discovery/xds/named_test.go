package xds

import (
	"fmt"
	"maps"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

// A Named is a map, however it came about.
func TestNamedIsAMap(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var s *Named
		want := map[string]*Resource{}
		for range rapid.IntRange(1, 6).Draw(t, "steps") {
			before, had := s, maps.Clone(want)
			var put []*Resource
			for range rapid.IntRange(0, 60).Draw(t, "put") {
				r := thing(thingType, fmt.Sprint(rapid.IntRange(0, 200).Draw(t, "name")), rapid.SampledFrom([]string{"1", "2"}).Draw(t, "text"))
				put, want[r.Name] = append(put, r), r
			}
			switch rapid.IntRange(0, 3).Draw(t, "how") {
			case 0:
				s = NamedOf(want).sharing(before)
			case 1: // some are gone
				for i := range rapid.IntRange(0, 200).Draw(t, "gone") {
					delete(want, fmt.Sprint(i))
				}
				s = NamedOf(want).sharing(before)
			default:
				s = s.With(put...)
			}
			var names []string
			for _, name := range slices.Sorted(maps.Keys(want)) {
				if r := s.Get(name); r == nil || r.Version != want[name].Version {
					t.Fatalf("%s is %v, not %v", name, r, want[name])
				}
				if had[name] == nil || had[name].Version != want[name].Version {
					names = append(names, name)
				}
			}
			for name := range had {
				if want[name] == nil {
					names = append(names, name)
				}
			}
			slices.Sort(names)
			if got := diff(before, s); !slices.Equal(got, names) {
				t.Fatalf("differences %v, not %v", got, names)
			}
			if n := len(slices.Collect(s.All())); s.Len() != len(want) || n != len(want) || s.Get("none") != nil {
				t.Fatalf("%d and %d of %d", s.Len(), n, len(want))
			}
			for name, r := range had { // the one before is as it was
				if before.Get(name) == nil || before.Get(name).Version != r.Version {
					t.Fatalf("%s changed under a reader", name)
				}
			}
		}
	})
}

// One change of ten thousand copies one shard, and is found without looking at the others.
func TestNamedSharesWhatIsTheSame(t *testing.T) {
	all := map[string]*Resource{}
	for i := range 10_000 {
		r := thing(thingType, fmt.Sprint("service-", i), "1")
		all[r.Name] = r
	}
	before := NamedOf(all)
	after := before.With(thing(thingType, "service-7", "2"))
	others := 0
	for i := range before.shards {
		if before.shards[i] != after.shards[i] {
			others++
		}
	}
	if others != 1 {
		t.Errorf("%d shards of %d were copied", others, len(before.shards))
	}
	if after.With(after.Get("service-7")) != after {
		t.Error("putting in what is there made another set")
	}
}
