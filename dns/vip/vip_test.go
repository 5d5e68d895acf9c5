package vip

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
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

// small makes collisions common.
var small = Ranges{V4: netip.MustParsePrefix("240.0.0.0/22"), V6: netip.MustParsePrefix("fd00::/118")}

func TestOrderAndLocalHostsDoNotMatter(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		hosts := shared(names(t, "hosts"))
		want, _ := Assign(hosts, nil, DefaultRanges())
		mixed := append(rapid.Permutation(hosts).Draw(t, "order"), Host{Name: "x.default.svc.cluster.local"}, Host{Name: "y.default.svc.cluster.local"})
		got, _ := Assign(mixed, nil, DefaultRanges())
		for _, h := range hosts {
			if !slices.Equal(got[h.Name], want[h.Name]) {
				t.Fatalf("%s: %v, alone %v", h.Name, got[h.Name], want[h.Name])
			}
		}
	})
}

func TestKeptAndUnique(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		first, _ := Assign(shared(names(t, "first")), nil, small)
		hosts := shared(names(t, "second"))
		for name, addrs := range first {
			hosts = slices.DeleteFunc(hosts, func(h Host) bool { return h.Name == name })
			hosts = append(hosts, Host{Name: name, Shared: true, Held: addrs})
		}
		second, conflicts := Assign(hosts, nil, small)
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
		pool := []netip.Addr{netip.MustParseAddr("240.0.0.7"), netip.MustParseAddr("240.0.0.8"), netip.MustParseAddr("240.0.1.9")}
		claimed := map[string]netip.Addr{}
		for i := range hosts {
			hosts[i].Claims = []netip.Addr{rapid.SampledFrom(pool).Draw(t, fmt.Sprint("claim", i))}
			claimed[hosts[i].Name] = hosts[i].Claims[0]
		}
		other := slices.Clone(hosts)
		for i := range other {
			other[i].Held = []netip.Addr{netip.MustParseAddr("240.0.1.77")}
		}
		a, _ := Assign(hosts, nil, small)
		// What is held matters only to hosts whose claim was lost; those keep unique addresses all the same.
		b, _ := Assign(other, nil, small)
		winners := map[netip.Addr]string{}
		for _, name := range slices.Sorted(maps.Keys(a)) {
			if addr := a[name][0]; addr == claimed[name] { // not one that it drew
				winners[addr] = name
			}
		}
		for addr, name := range winners {
			if b[name][0] != addr {
				t.Fatalf("%s: %s there, %s here", name, addr, b[name][0])
			}
		}
	})
}

func TestReservedIsNotHandedOut(t *testing.T) {
	free, _ := Assign([]Host{{Name: "a.b.global", Shared: true}}, nil, small)
	addr := free["a.b.global"][0]
	got, conflicts := Assign([]Host{{Name: "a.b.global", Shared: true, Claims: []netip.Addr{addr}}}, map[netip.Addr]string{addr: "mine.example"}, small)
	if got["a.b.global"][0] == addr {
		t.Fatalf("%s was handed out although reserved", addr)
	}
	if len(conflicts) != 1 || conflicts[0].Holder != "mine.example" {
		t.Fatalf("conflicts: %v", conflicts)
	}
}
