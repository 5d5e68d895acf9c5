package vip

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// node is one cluster of a simulated mesh: what it exports, what it remembers, and what it last heard of the others.
type node struct {
	exports map[string]int64 // by name, since when
	table   Table
	heard   []map[string][]Claim // of each node, by name
	has     map[string][]netip.Addr
}

// said is what a node tells the others.
func (n *node) said() map[string][]Claim {
	out := map[string][]Claim{}
	for name, since := range n.exports {
		for _, a := range n.has[name] {
			out[name] = append(out[name], Claim{a, since})
		}
	}
	return out
}

// settle is what a control plane does at each change.
func (n *node) settle(self int, now time.Time) {
	wants := map[string]*Want{}
	of := func(name string) *Want {
		if wants[name] == nil {
			wants[name] = &Want{Name: name, Shared: true, Needs: true}
		}
		return wants[name]
	}
	for name, since := range n.exports {
		w := of(name)
		w.Exported, w.Since = true, since
	}
	for i, claims := range n.heard {
		if i == self {
			continue
		}
		for name, c := range claims {
			w := of(name)
			w.Claims = append(w.Claims, c...)
		}
	}
	var list []Want
	for _, name := range slices.Sorted(maps.Keys(wants)) {
		list = append(list, *wants[name])
	}
	s := Settle(list, n.table, mid, now)
	n.table, n.has = s.Table, map[string][]netip.Addr{}
	for i, w := range list {
		n.has[w.Name] = s.Addresses[i]
	}
}

var mid = Ranges{V4: netip.MustParsePrefix("240.0.0.0/24"), V6: netip.MustParsePrefix("fd00::/120")}

// TestMesh: clusters export and stop exporting names, in partitions, with an address range so small that names collide all
// the time. In one cluster no two names ever share an address. Once all hear each other again they agree, and whoever had
// the oldest claim on an address still has it: only losers have moved.
func TestMesh(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		now := time.Unix(1_000_000, 0)
		nodes := make([]*node, rapid.IntRange(2, 5).Draw(t, "clusters"))
		for i := range nodes {
			nodes[i] = &node{exports: map[string]int64{}, heard: make([]map[string][]Claim, len(nodes))}
		}
		up := func(i, j int) bool { return true }
		round := func() {
			for i, n := range nodes {
				for j, o := range nodes {
					if i != j && up(i, j) {
						n.heard[j] = o.said()
					}
				}
				n.settle(i, now)
				unique(t, fmt.Sprint("cluster ", i), n.has)
			}
		}
		for range rapid.IntRange(1, 10).Draw(t, "steps") {
			now = now.Add(time.Duration(rapid.IntRange(1, 7200).Draw(t, "seconds")) * time.Second)
			n := rapid.SampledFrom(nodes).Draw(t, "cluster")
			for range rapid.IntRange(1, 6).Draw(t, "exports") {
				name := fmt.Sprintf("s%d.ns.global", rapid.IntRange(0, 30).Draw(t, "name"))
				if _, there := n.exports[name]; there {
					delete(n.exports, name)
				} else {
					n.exports[name] = now.Unix() * rapid.Int64Range(0, 1).Draw(t, "known") // 0: unknown
				}
			}
			side := rapid.SliceOfN(rapid.Bool(), len(nodes), len(nodes)).Draw(t, "sides")
			up = func(i, j int) bool { return side[i] == side[j] }
			round()
			round()
		}
		up = func(i, j int) bool { return true }
		before := oldest(nodes)
		for range 12 {
			round()
		}
		for _, n := range nodes[1:] {
			for name, addrs := range n.has {
				if !slices.Equal(addrs, nodes[0].has[name]) {
					t.Fatalf("%s is %v here and %v there", name, addrs, nodes[0].has[name])
				}
			}
		}
		for addr, name := range before {
			if !slices.Contains(nodes[0].has[name], addr) {
				t.Fatalf("%s had the oldest claim on %s and was moved to %v", name, addr, nodes[0].has[name])
			}
		}
		settled := maps.Clone(nodes[0].has)
		round()
		if !maps.EqualFunc(settled, nodes[0].has, slices.Equal[[]netip.Addr]) {
			t.Fatal("addresses moved without a change")
		}
	})
}

func unique(t *rapid.T, where string, has map[string][]netip.Addr) {
	seen := map[netip.Addr]string{}
	for name, addrs := range has {
		for _, a := range addrs {
			if other := seen[a]; other != "" {
				t.Fatalf("%s: %s and %s share %s", where, name, other, a)
			}
			seen[a] = name
		}
	}
}

// oldest returns the names whose claim on an address is the strongest of all, and is also the strongest claim of the name.
func oldest(nodes []*node) map[netip.Addr]string {
	type strong struct {
		name  string
		addr  netip.Addr
		since int64
	}
	var all []strong
	for _, n := range nodes {
		for name, claims := range n.said() {
			for _, c := range claims {
				if c.Since == 0 {
					c.Since = 1 << 62
				}
				all = append(all, strong{name, c.Addr, c.Since})
			}
		}
	}
	slices.SortFunc(all, func(x, y strong) int {
		return cmp.Or(cmp.Compare(x.since, y.since), strings.Compare(x.name, y.name), x.addr.Compare(y.addr))
	})
	out, has := map[netip.Addr]string{}, map[string]bool{}
	for _, s := range all {
		key := s.name + fmt.Sprint(s.addr.Is4())
		if out[s.addr] == "" && !has[key] {
			out[s.addr], has[key] = s.name, true
		}
	}
	return out
}

// TestSimultaneous: two clusters give one address to two names at once. One name stays, the other moves once, to the same
// address in both.
func TestSimultaneous(t *testing.T) {
	// Two names whose first address is one.
	first, names := map[netip.Addr]string{}, []string{}
	for i := 0; len(names) == 0; i++ {
		name := fmt.Sprintf("n%03d.ns.global", i)
		a := Follow(name, true, 0, mid)[0]
		if other := first[a]; other != "" && usable(a) {
			names = []string{other, name}
		}
		first[a] = name
	}
	now := time.Unix(1000, 0)
	a := &node{exports: map[string]int64{names[1]: 10}, heard: make([]map[string][]Claim, 2)}
	b := &node{exports: map[string]int64{names[0]: 20}, heard: make([]map[string][]Claim, 2)}
	a.settle(0, now)
	b.settle(1, now)
	contested := a.has[names[1]][0]
	if b.has[names[0]][0] != contested {
		t.Fatalf("no conflict: %v and %v", a.has, b.has)
	}
	for range 4 {
		a.heard[1], b.heard[0] = b.said(), a.said()
		a.settle(0, now)
		b.settle(1, now)
		if a.has[names[1]][0] != contested || b.has[names[1]][0] != contested {
			t.Fatalf("the older export was moved: %v and %v", a.has, b.has)
		}
		if x, y := a.has[names[0]][0], b.has[names[0]][0]; x == contested || x != y {
			t.Fatalf("the newer export has %s and %s", x, y)
		}
	}
}

// TestRests: a name that is gone has its address back within a day, and nobody else gets it before.
func TestRests(t *testing.T) {
	now := time.Unix(1000, 0)
	gone := Want{Name: "gone.ns.global", Shared: true, Needs: true}
	s := Settle([]Want{gone}, Table{}, mid, now)
	had := s.Addresses[0]
	var others []Want
	for i := range 90 {
		others = append(others, Want{Name: fmt.Sprintf("o%02d.ns.global", i), Shared: true, Needs: true})
	}
	holder := func(s Settled) string {
		for i, a := range s.Addresses {
			if slices.Contains(a, had[0]) || slices.Contains(a, had[1]) {
				return others[i].Name
			}
		}
		return ""
	}
	s = Settle(nil, s.Table, mid, now.Add(time.Hour))
	if got := holder(Settle(others, s.Table, mid, now.Add(time.Hour+RestsFor-1))); got != "" {
		t.Errorf("%s got an address that rests", got)
	}
	if got := Settle([]Want{gone}, s.Table, mid, now.Add(2*time.Hour)).Addresses[0]; !slices.Equal(got, had) {
		t.Errorf("back with %v, had %v", got, had)
	}
	late := Settle(others, s.Table, mid, now.Add(time.Hour+RestsFor))
	if len(late.Table.Held) != len(others) {
		t.Errorf("%d hosts are remembered, want %d", len(late.Table.Held), len(others))
	}
	if holder(late) == "" {
		t.Error("the test shows nothing: nobody wants the address")
	}
}

// TestGivenWins: an address that a user gave goes to that host; only a host of the whole mesh is not moved for it.
func TestGivenWins(t *testing.T) {
	now := time.Unix(1000, 0)
	local := Want{Name: "a.ns.svc.cluster.local", Needs: true}
	s := Settle([]Want{local}, Table{}, mid, now)
	mine := Want{Name: "mine.example", Needs: true, Given: s.Addresses[0][:1]}
	after := Settle([]Want{local, mine}, s.Table, mid, now)
	if !slices.Equal(after.Addresses[1], mine.Given) || slices.Contains(after.Addresses[0], mine.Given[0]) || len(after.Conflicts) != 1 {
		t.Errorf("%+v", after)
	}
	mesh := Want{Name: "a.ns.global", Shared: true, Needs: true}
	s = Settle([]Want{mesh}, Table{}, mid, now)
	mine.Given = s.Addresses[0][:1]
	after = Settle([]Want{mesh, mine}, s.Table, mid, now)
	if !slices.Equal(after.Addresses[0], s.Addresses[0]) || len(after.InUse) != 1 || slices.Contains(after.Addresses[1], mine.Given[0]) {
		t.Errorf("%+v", after)
	}
}
