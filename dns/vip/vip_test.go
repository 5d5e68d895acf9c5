package vip

import (
	"cmp"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func names(t *rapid.T, label string) []string {
	return rapid.SliceOfDistinct(rapid.StringMatching(`[a-z]{1,3}\.[a-z]{1,2}\.global`), rapid.ID[string]).Draw(t, label)
}

func shared(names []string) []Host {
	var out []Host
	for _, n := range names {
		out = append(out, Host{Name: n, Shared: true})
	}
	return out
}

// tiny makes collisions the rule.
var tiny = Ranges{V4: netip.MustParsePrefix("240.0.0.0/26"), V6: netip.MustParsePrefix("fd00::/122")}

// small makes collisions common.
var small = Ranges{V4: netip.MustParsePrefix("240.0.0.0/22"), V6: netip.MustParsePrefix("fd00::/118")}

func TestOrderAndLocalHostsDoNotMatter(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		hosts := shared(names(t, "hosts"))
		want, _ := Assign(Request{Hosts: hosts, Ranges: DefaultRanges()})
		mixed := append(rapid.Permutation(hosts).Draw(t, "order"), Host{Name: "x.default.svc.cluster.local"}, Host{Name: "y.default.svc.cluster.local"})
		got, _ := Assign(Request{Hosts: mixed, Ranges: DefaultRanges()})
		for _, h := range hosts {
			if !slices.Equal(got[h.Name], want[h.Name]) {
				t.Fatalf("%s: %v, alone %v", h.Name, got[h.Name], want[h.Name])
			}
		}
	})
}

func TestKeptAndUnique(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		first, _ := Assign(Request{Hosts: shared(names(t, "first")), Ranges: small})
		hosts := shared(names(t, "second"))
		for name, addrs := range first {
			hosts = slices.DeleteFunc(hosts, func(h Host) bool { return h.Name == name })
			hosts = append(hosts, Host{Name: name, Shared: true, Held: addrs})
		}
		second, conflicts := Assign(Request{Hosts: hosts, Ranges: small})
		if len(conflicts) != 0 {
			t.Fatalf("conflicts: %v", conflicts)
		}
		seen := map[netip.Addr]string{}
		for name, addrs := range second {
			if len(addrs) != 2 || !addrs[0].Is4() || !addrs[1].Is6() {
				t.Fatalf("%s: %v", name, addrs)
			}
			for _, a := range addrs {
				if other, dup := seen[a]; dup {
					t.Fatalf("%s and %s share %s", name, other, a)
				}
				seen[a] = name
			}
		}
		for name, addrs := range first {
			if !slices.Equal(second[name], addrs) {
				t.Fatalf("%s moved from %v to %v", name, addrs, second[name])
			}
		}
	})
}

// Clusters that see the same claims agree, whatever each of them held before.
func TestClaimsDecide(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		hosts := shared(names(t, "hosts"))
		hosts = hosts[:min(len(hosts), 20)]
		claimed := map[string]netip.Addr{}
		for i := range hosts {
			addr := Follow(hosts[i].Name, true, rapid.Uint32Range(0, 3).Draw(t, "round"), tiny)[0]
			hosts[i].Claims = []Claim{{Addr: addr, Since: rapid.Int64Range(0, 3).Draw(t, "since")}}
			claimed[hosts[i].Name] = addr
		}
		other := slices.Clone(hosts)
		for i := range other {
			other[i].Held = Follow(hosts[i].Name, true, 9, tiny)
		}
		a, _ := Assign(Request{Hosts: hosts, Ranges: tiny})
		b, _ := Assign(Request{Hosts: other, Ranges: tiny})
		for name, addr := range claimed {
			// The strongest claim on an address has it, in both.
			strongest := slices.MinFunc(slices.DeleteFunc(slices.Clone(hosts), func(h Host) bool { return claimed[h.Name] != addr }), func(x, y Host) int {
				return cmp.Or(cmp.Compare(since(x), since(y)), strings.Compare(x.Name, y.Name))
			})
			if name == strongest.Name && (a[name][0] != addr || b[name][0] != addr) {
				t.Fatalf("%s claims %s and has %s and %s", name, addr, a[name][0], b[name][0])
			}
		}
	})
}

func since(h Host) int64 {
	if h.Claims[0].Since == 0 {
		return math.MaxInt64
	}
	return h.Claims[0].Since
}

func TestReservedIsNotHandedOut(t *testing.T) {
	addr := Follow("a.b.global", true, 0, small)[0]
	got, conflicts := Assign(Request{
		Hosts:    []Host{{Name: "a.b.global", Shared: true, Claims: []Claim{{Addr: addr}}}},
		Reserved: map[netip.Addr]string{addr: "mine.example"}, Ranges: small,
	})
	if got["a.b.global"][0] == addr {
		t.Fatalf("%s was handed out although reserved", addr)
	}
	if len(conflicts) != 1 || conflicts[0].Holder != "mine.example" {
		t.Fatalf("conflicts: %v", conflicts)
	}
}

// A claim that does not follow from the name is none: else an exporter could take any name's address.
func TestClaimOnAnothersAddress(t *testing.T) {
	victim := Follow("victim.b.global", true, 0, DefaultRanges())
	got, _ := Assign(Request{Ranges: DefaultRanges(), Hosts: []Host{
		{Name: "a.b.global", Shared: true, Claims: []Claim{{victim[0], 1}, {victim[1], 1}}},
		{Name: "victim.b.global", Shared: true, Claims: []Claim{{victim[0], 2}, {victim[1], 2}}},
	}})
	if !slices.Equal(got["victim.b.global"], victim) {
		t.Errorf("the victim moved to %v", got["victim.b.global"])
	}
}

func TestFull(t *testing.T) {
	var hosts []Host
	for i := range 200 {
		hosts = append(hosts, Host{Name: fmt.Sprintf("h%d.b.global", i), Shared: true})
	}
	got, conflicts := Assign(Request{Hosts: hosts, Ranges: mid})
	if len(got) >= 130 || len(conflicts) == 0 || conflicts[0].String() != conflicts[0].Host+": the virtual address range is full" {
		t.Errorf("%d hosts, %v", len(got), conflicts)
	}
}

func TestParseRanges(t *testing.T) {
	for _, c := range []struct {
		in   []string
		want string // the ranges, or a part of the error
	}{
		{nil, "240.0.0.0/4 fd69:7374:686d::/48"},
		{[]string{"242.0.0.0/8"}, "242.0.0.0/8 fd69:7374:686d::/48"},
		{[]string{"fd00:1::/64", "240.0.0.0/16"}, "240.0.0.0/16 fd00:1::/64"},
		{[]string{"10.0.0.0/8"}, "not within 240.0.0.0/4"},
		{[]string{"240.0.0.0/3"}, "not ADDRESS/BITS"},
		{[]string{"224.0.0.0/3"}, "not within"},
		{[]string{"240.0.0.0/24"}, "too small"},
		{[]string{"240.0.0.1/8"}, "not ADDRESS/BITS"},
		{[]string{"240.0.0.0/8", "241.0.0.0/8"}, "another range"},
		{[]string{"x"}, "not ADDRESS/BITS"},
	} {
		r, err := ParseRanges(c.in)
		got := fmt.Sprint(r.V4, " ", r.V6)
		if err != nil {
			got = err.Error()
		}
		if !strings.Contains(got, c.want) {
			t.Errorf("%v: %s, want %s", c.in, got, c.want)
		}
	}
}
