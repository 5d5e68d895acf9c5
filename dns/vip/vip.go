// Package vip gives every host a stable virtual address, the same in every cluster and on every machine, without a
// central allocator: the address follows from the host's name. It is pure.
//
// Hosts of the whole mesh and hosts of one cluster draw from separate halves of the range, so that what one cluster
// declares for itself can never push a shared name to another address there.
package vip

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// Ranges are the prefixes to draw from.
type Ranges struct {
	V4 netip.Prefix // at least a /16; its lower half is for shared hosts, its upper half for local ones
	V6 netip.Prefix // at least a /64
}

// DefaultRanges returns 240.0.0.0/4 (RFC 1112, section 4: reserved) and a unique local prefix (RFC 4193).
func DefaultRanges() Ranges {
	return Ranges{V4: netip.MustParsePrefix("240.0.0.0/4"), V6: netip.MustParsePrefix("fd69:7374:686d::/48")}
}

// Host is one name that wants addresses.
type Host struct {
	Name   string
	Shared bool         // known in every cluster: a ".global" name
	Claims []netip.Addr // what exporters already use for it, in any order
	Held   []netip.Addr // what this cluster answered before
}

// Conflict says that a claim could not be granted.
type Conflict struct {
	Host   string
	Addr   netip.Addr
	Holder string // the host that keeps the address; empty when the address lies outside the ranges
}

// String returns the line shown to users.
func (c Conflict) String() string {
	if c.Holder == "" {
		return fmt.Sprintf("%s: %s is outside the virtual address range", c.Host, c.Addr)
	}
	return fmt.Sprintf("%s: %s belongs to %s", c.Host, c.Addr, c.Holder)
}

// Assign returns an IPv4 and an IPv6 address for each host, in that order. reserved are addresses users gave to
// hosts of their own; they are never handed out. The result depends on the set of hosts, not on its order. A host with a claim or a held
// address keeps it whatever other hosts come and go; of two hosts with one address the smaller name keeps it.
func Assign(hosts []Host, reserved map[netip.Addr]string, r Ranges) (map[string][]netip.Addr, []Conflict) {
	hosts = slices.Clone(hosts)
	slices.SortFunc(hosts, func(a, b Host) int {
		return cmp.Or(cmp.Compare(strength(a), strength(b)), strings.Compare(a.Name, b.Name))
	})
	a := assigner{ranges: r, taken: make(map[netip.Addr]string, 2*len(hosts)+len(reserved)), out: make(map[string][]netip.Addr, len(hosts))}
	for addr, holder := range reserved {
		a.taken[addr] = holder
	}
	// First all that have an address already, then the new ones: a newcomer never takes what is in use.
	kept := make([][2]netip.Addr, len(hosts))
	for i, h := range hosts {
		kept[i] = [2]netip.Addr{a.keep(h, false), a.keep(h, true)}
	}
	for i, h := range hosts {
		for six, addr := range kept[i] {
			if !addr.IsValid() {
				addr = a.draw(h, six == 1)
			}
			a.out[h.Name] = append(a.out[h.Name], addr)
		}
	}
	slices.SortFunc(a.conflicts, func(x, y Conflict) int {
		return cmp.Or(strings.Compare(x.Host, y.Host), x.Addr.Compare(y.Addr))
	})
	return a.out, a.conflicts
}

// strength orders hosts whose address is known to others before those only we remember, before new ones.
func strength(h Host) int {
	switch {
	case len(h.Claims) > 0:
		return 0
	case len(h.Held) > 0:
		return 1
	}
	return 2
}

type assigner struct {
	ranges    Ranges
	taken     map[netip.Addr]string
	out       map[string][]netip.Addr
	conflicts []Conflict
}

// keep returns the address h had, or the zero Addr when it had none that it may keep.
func (a *assigner) keep(h Host, six bool) netip.Addr {
	claims := slices.Clone(h.Claims)
	slices.SortFunc(claims, netip.Addr.Compare)
	for _, addr := range append(claims, h.Held...) {
		if addr.Is6() != six {
			continue
		}
		holder, used := a.taken[addr]
		switch {
		case !a.prefix(h.Shared, six).Contains(addr):
			a.conflicts = append(a.conflicts, Conflict{Host: h.Name, Addr: addr})
		case used:
			a.conflicts = append(a.conflicts, Conflict{Host: h.Name, Addr: addr, Holder: holder})
		default:
			a.taken[addr] = h.Name
			return addr
		}
	}
	return netip.Addr{}
}

// draw derives an address from the name, trying the next hash while one is in use.
func (a *assigner) draw(h Host, six bool) netip.Addr {
	p := a.prefix(h.Shared, six)
	for round := uint32(0); ; round++ {
		addr := at(p, sha256.Sum256(binary.BigEndian.AppendUint32([]byte(h.Name+"\x00"), round)))
		if _, used := a.taken[addr]; !used && usable(addr) {
			a.taken[addr] = h.Name
			return addr
		}
	}
}

// prefix returns the half of the range for shared or for local hosts.
func (a *assigner) prefix(shared, six bool) netip.Prefix {
	p := a.ranges.V4
	if six {
		p = a.ranges.V6
	}
	b := p.Addr().AsSlice()
	if !shared {
		b[p.Bits()/8] |= 0x80 >> (p.Bits() % 8)
	}
	half, _ := netip.AddrFromSlice(b)
	return netip.PrefixFrom(half, p.Bits()+1)
}

// at returns the address in p whose host bits come from sum.
func at(p netip.Prefix, sum [32]byte) netip.Addr {
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		bit := byte(0x80 >> (i % 8))
		b[i/8] = b[i/8]&^bit | sum[i/8]&bit
	}
	addr, _ := netip.AddrFromSlice(b)
	return addr
}

// usable refuses addresses that resolvers and kernels treat specially: the limited broadcast block and .0 and .255.
func usable(a netip.Addr) bool {
	if a.Is6() {
		return true
	}
	b := a.As4()
	return b[0] != 255 && b[3] != 0 && b[3] != 255
}
