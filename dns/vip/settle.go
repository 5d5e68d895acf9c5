package vip

import (
	"maps"
	"net/netip"
	"slices"
	"time"
)

// Want is one host and what is known of its addresses.
type Want struct {
	Name     string
	Shared   bool         // known in every cluster: a ".global" name
	Given    []netip.Addr // by the user
	Needs    bool         // it gets addresses when none are given
	Claims   []Claim      // of other clusters
	Exported bool         // by this cluster, too: what it holds is a claim like those of others
	Since    int64        // when Exported: since when, as in Claim
}

// Equal reports whether two want the same.
func (w Want) Equal(o Want) bool {
	return w.Name == o.Name && w.Shared == o.Shared && w.Needs == o.Needs && w.Exported == o.Exported && w.Since == o.Since &&
		slices.Equal(w.Given, o.Given) && slices.Equal(w.Claims, o.Claims)
}

// request returns what is asked for it, when it held some addresses.
func (w Want) request(held []netip.Addr) Host {
	h := Host{Name: w.Name, Shared: w.Shared, Claims: w.Claims, Held: held}
	if w.Exported {
		h.Claims = slices.Clone(w.Claims)
		for _, addr := range held {
			h.Claims = append(h.Claims, Claim{Addr: addr, Since: w.Since})
		}
	}
	return h
}

// Table is what one cluster remembers.
type Table struct {
	Held map[string][]netip.Addr // by host, those included that are gone and rest
	Gone map[string]time.Time    // since when hosts of Held want nothing
}

// Settled is what came of wants.
type Settled struct {
	Table     Table
	Addresses [][]netip.Addr // of each want
	InUse     []InUse
	Conflicts []Conflict
}

// InUse says that an address that a user gave to a want is that of a host of the whole mesh, which no cluster takes for
// a host of its own.
type InUse struct {
	Want   int // its index
	Addr   netip.Addr
	Holder string
}

// Settle gives every want its addresses: those the user gave, else those it held, else new ones. It is pure: equal
// arguments give equal results.
func Settle(wants []Want, t Table, ranges Ranges, now time.Time) Settled {
	out := Settled{Addresses: make([][]netip.Addr, len(wants))}
	r := Request{Reserved: map[netip.Addr]string{}, Ranges: ranges}
	mesh := meshAddresses(wants, t, ranges)
	for i, w := range wants {
		given := slices.DeleteFunc(slices.Clone(w.Given), func(addr netip.Addr) bool {
			holder, used := mesh[addr]
			if used {
				out.InUse = append(out.InUse, InUse{i, addr, holder})
			}
			return used
		})
		out.Addresses[i] = given
		for _, addr := range given {
			r.Reserved[addr] = w.Name
		}
		if len(given) == 0 && w.Needs {
			r.Hosts = append(r.Hosts, w.request(t.Held[w.Name]))
		}
	}
	resting, gone := rest(t.Held, r.Hosts, t.Gone, now)
	r.Resting = holders(resting)
	assigned, conflicts := Assign(r)
	for i, w := range wants {
		if v, ok := assigned[w.Name]; ok {
			out.Addresses[i] = v
		}
	}
	maps.Copy(assigned, resting)
	out.Table, out.Conflicts = Table{assigned, gone}, conflicts
	return out
}

// meshAddresses returns the addresses of hosts of the whole mesh.
func meshAddresses(wants []Want, t Table, ranges Ranges) map[netip.Addr]string {
	a := assigner{ranges: ranges}
	out := map[netip.Addr]string{}
	for _, w := range wants {
		if !w.Shared || len(w.Given) > 0 {
			continue
		}
		for _, addr := range t.Held[w.Name] {
			out[addr] = w.Name
		}
		for _, c := range w.Claims {
			if a.follows(Host{Name: w.Name, Shared: true}, c.Addr) {
				out[c.Addr] = w.Name
			}
		}
	}
	return out
}
