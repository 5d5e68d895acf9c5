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
	"math"
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

// ParseRanges reads an IPv4 and an IPv6 prefix, ADDRESS/BITS; one that is not given is that of DefaultRanges. They lie
// within 240.0.0.0/4 and fd00::/8, since other clusters take no others, and have 2^12 addresses at least.
func ParseRanges(texts []string) (Ranges, error) {
	r := DefaultRanges()
	seen := map[bool]bool{}
	for _, text := range texts {
		p, err := netip.ParsePrefix(text)
		if err != nil || p != p.Masked() {
			return r, fmt.Errorf("%q is not ADDRESS/BITS of a network", text)
		}
		within, at := netip.MustParsePrefix("240.0.0.0/4"), &r.V4
		if p.Addr().Is6() {
			within, at = netip.MustParsePrefix("fd00::/8"), &r.V6
		}
		switch {
		case seen[p.Addr().Is6()]:
			return r, fmt.Errorf("%s: there is another range of the family", p)
		case !within.Contains(p.Addr()) || p.Bits() < within.Bits():
			return r, fmt.Errorf("%s is not within %s", p, within)
		case p.Addr().BitLen()-p.Bits() < 12:
			return r, fmt.Errorf("%s is too small: 4096 addresses are wanted at least", p)
		}
		*at, seen[p.Addr().Is6()] = p, true
	}
	return r, nil
}

// Host is one name that wants addresses.
type Host struct {
	Name   string
	Shared bool         // known in every cluster: a ".global" name
	Claims []Claim      // what exporters use for it, this cluster among them, in any order
	Held   []netip.Addr // what this cluster answered before
}

// Claim is an address that an exporter uses for a host. The claims in the records of all members are the table that
// every cluster settles collisions by.
type Claim struct {
	Addr  netip.Addr
	Since int64 // seconds since 1970: when the export was made; 0: unknown, which counts as the latest
}

// Request is what Assign goes by.
type Request struct {
	Hosts []Host
	// Reserved are addresses users gave to hosts, by address: they win.
	Reserved map[netip.Addr]string
	// Resting are addresses of hosts that are gone, by address: no other host draws them. A claim still gets them.
	Resting map[netip.Addr]string
	Ranges  Ranges
}

// Conflict says that a claim could not be granted.
type Conflict struct {
	Host   string
	Addr   netip.Addr // invalid: the range is full
	Holder string     // the host that keeps the address; empty when the address lies outside the ranges
}

// String returns the line shown to users.
func (c Conflict) String() string {
	if !c.Addr.IsValid() {
		return c.Host + ": the virtual address range is full"
	}
	if c.Holder == "" {
		return fmt.Sprintf("%s: %s is outside the virtual address range", c.Host, c.Addr)
	}
	return fmt.Sprintf("%s: %s belongs to %s", c.Host, c.Addr, c.Holder)
}

// Assign returns an IPv4 and an IPv6 address for each host, in that order, as long as there are some. The result depends on the sets in r, not on
// their order. A host with a claim or a held address keeps it whatever other hosts come and go. Of two hosts with claims
// on one address the one exported first keeps it, at one time the smaller name: so do all clusters that know the same
// claims. The other gets the next address that follows from its name.
func Assign(r Request) (map[string][]netip.Addr, []Conflict) {
	a := assigner{ranges: r.Ranges, resting: r.Resting, taken: make(map[netip.Addr]string, 2*len(r.Hosts)+len(r.Reserved)), out: make(map[string][]netip.Addr, len(r.Hosts))}
	for addr, holder := range r.Reserved {
		a.taken[addr] = holder
	}
	hosts := slices.SortedFunc(slices.Values(r.Hosts), func(x, y Host) int { return strings.Compare(x.Name, y.Name) })
	// First what is claimed, then what is held, then the new ones: a newcomer never takes what is in use.
	got := make([][2]netip.Addr, len(hosts))
	for _, c := range a.claims(hosts) {
		if at := &got[c.host][six(c.Addr)]; !at.IsValid() && a.grant(hosts[c.host], c.Addr) {
			*at = c.Addr
		}
	}
	for i, h := range hosts {
		for _, addr := range h.Held {
			if at := &got[i][six(addr)]; !at.IsValid() && a.grant(h, addr) {
				*at = addr
			}
		}
	}
	for i, h := range hosts {
		for six, addr := range got[i] {
			if !addr.IsValid() {
				addr = a.draw(h, six == 1)
			}
			if addr.IsValid() {
				a.out[h.Name] = append(a.out[h.Name], addr)
			}
		}
	}
	slices.SortFunc(a.conflicts, func(x, y Conflict) int {
		return cmp.Or(strings.Compare(x.Host, y.Host), x.Addr.Compare(y.Addr))
	})
	return a.out, slices.Compact(a.conflicts)
}

type assigner struct {
	ranges    Ranges
	resting   map[netip.Addr]string
	taken     map[netip.Addr]string
	out       map[string][]netip.Addr
	conflicts []Conflict
}

// claim is one of a host, by index.
type claim struct {
	Claim
	host int
}

// claims returns all claims that can be, the strongest first. One that does not follow from the name is none: nobody can
// claim the address of another's name on purpose.
func (a *assigner) claims(hosts []Host) []claim {
	var all []claim
	for i, h := range hosts {
		for _, c := range h.Claims {
			if a.follows(h, c.Addr) {
				if c.Since == 0 {
					c.Since = math.MaxInt64
				}
				all = append(all, claim{c, i})
			}
		}
	}
	slices.SortFunc(all, func(x, y claim) int {
		return cmp.Or(cmp.Compare(x.Since, y.Since), cmp.Compare(x.host, y.host), x.Addr.Compare(y.Addr))
	})
	return all
}

// maxRounds is how many addresses a name has before it may be claimed no more. That so many of them are in use at once
// does not happen: of 100,000 names in the default range one in ten million has four.
const maxRounds = 16

// follows reports whether the host can have drawn the address.
func (a *assigner) follows(h Host, addr netip.Addr) bool {
	p := a.prefix(h.Shared, addr.Is6())
	if !p.Contains(addr) {
		return false
	}
	for round := range uint32(maxRounds) {
		if drawn(p, h.Name, round) == addr {
			return true
		}
	}
	return false
}

// grant gives the host an address that is free, and reports whether it is.
func (a *assigner) grant(h Host, addr netip.Addr) bool {
	holder, used := a.taken[addr]
	switch {
	case !a.prefix(h.Shared, addr.Is6()).Contains(addr):
		a.conflicts = append(a.conflicts, Conflict{Host: h.Name, Addr: addr})
		return false
	case used && holder == h.Name:
		return true
	case used:
		a.conflicts = append(a.conflicts, Conflict{Host: h.Name, Addr: addr, Holder: holder})
		return false
	}
	a.taken[addr] = h.Name
	return true
}

// draw derives an address from the name, trying the next hash while one is in use or rests.
func (a *assigner) draw(h Host, six bool) netip.Addr {
	p := a.prefix(h.Shared, six)
	for round := range uint32(maxDraws) {
		addr := drawn(p, h.Name, round)
		_, used := a.taken[addr]
		before := a.resting[addr]
		if used || before != "" && before != h.Name && round < maxRounds || !usable(addr) {
			continue
		}
		a.taken[addr] = h.Name
		return addr
	}
	a.conflicts = append(a.conflicts, Conflict{Host: h.Name})
	return netip.Addr{}
}

// maxDraws is when a range counts as full.
const maxDraws = 1 << 12

// Follow returns the IPv4 and the IPv6 address that a name draws in one round; it has those of round 0 unless others have
// them.
func Follow(name string, shared bool, round uint32, r Ranges) []netip.Addr {
	a := assigner{ranges: r}
	return []netip.Addr{drawn(a.prefix(shared, false), name, round), drawn(a.prefix(shared, true), name, round)}
}

// drawn is the address that follows from a name in one round.
func drawn(p netip.Prefix, name string, round uint32) netip.Addr {
	return at(p, sha256.Sum256(binary.BigEndian.AppendUint32([]byte(name+"\x00"), round)))
}

func six(a netip.Addr) int {
	if a.Is6() {
		return 1
	}
	return 0
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
