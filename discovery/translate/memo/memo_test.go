package memo

import (
	"fmt"
	"slices"
	"testing"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// TestOf makes parts once for equal values, with their problems each time, and anew for others.
func TestOf(t *testing.T) {
	var m Memo
	m.Begin([]any{"stamp"})
	made := 0
	of := func(name string, from ...any) (string, []mesh.Problem) {
		var problems []mesh.Problem
		v := Of(&m, Key{Kind: "k", Name: name}, from, &problems, func() string {
			made++
			problems = append(problems, mesh.Problem{Reason: name})
			return fmt.Sprint(name, from)
		})
		return v, problems
	}
	x, y := new(int), new(int)
	for _, c := range []struct {
		name string
		from []any
		made int
	}{{"a", []any{x}, 1}, {"a", []any{x}, 1}, {"a", []any{y}, 2}, {"a", []any{x}, 2}, {"b", []any{x}, 3}, {"b", []any{x, "l"}, 4}, {"b", nil, 5}, {"b", []any{}, 5}} {
		v, problems := of(c.name, c.from...)
		if v != fmt.Sprint(c.name, c.from) && len(c.from) > 0 || made != c.made || !slices.Equal(problems, []mesh.Problem{{Reason: c.name}}) {
			t.Errorf("%s of %v: %s, %v, %d were made, want %d", c.name, c.from, v, problems, made, c.made)
		}
	}
	m.Begin([]any{"stamp"})
	if of("a", x); made != 5 {
		t.Error("an equal stamp forgot a part")
	}
	m.Begin([]any{"another"})
	if of("a", x); made != 6 {
		t.Error("another stamp kept a part")
	}
}

// TestSweep keeps what is used, and bounds what is not.
func TestSweep(t *testing.T) {
	var m Memo
	m.Begin(nil)
	made := 0
	use := func(name string) {
		Of(&m, Key{Name: name}, nil, new([]mesh.Problem), func() int { made++; return made })
	}
	for i := range 100_000 {
		use(fmt.Sprint(i))
		use("kept")
		if i%100 == 0 {
			m.Sweep()
		}
	}
	if made != 100_001 {
		t.Errorf("%d were made", made)
	}
	if len(m.parts) > 10_000 {
		t.Errorf("%d parts are kept", len(m.parts))
	}
}
