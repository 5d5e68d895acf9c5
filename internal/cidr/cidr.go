// Package cidr does arithmetic on lists of address ranges.
package cidr

import (
	"cmp"
	"net/netip"
	"slices"
)

// Aggregate returns the shortest sorted list of ranges with the same addresses: what lies in another range is dropped,
// and two halves become their whole. Ranges that are not valid are left out.
func Aggregate(in []netip.Prefix) []netip.Prefix {
	var out []netip.Prefix
	for _, p := range in {
		if p.IsValid() {
			out = append(out, p.Masked())
		}
	}
	slices.SortFunc(out, Compare)
	kept := out[:0]
	for _, p := range out {
		if n := len(kept); n > 0 && kept[n-1].Contains(p.Addr()) {
			continue // a wider one comes before what it has in it
		}
		kept = append(kept, p)
		for n := len(kept); n > 1 && halves(kept[n-2], kept[n-1]); n = len(kept) {
			kept = kept[:n-1]
			kept[n-2] = netip.PrefixFrom(kept[n-2].Addr(), kept[n-2].Bits()-1)
		}
	}
	return slices.Clip(kept)
}

// halves reports whether low and high are the two halves of one range.
func halves(low, high netip.Prefix) bool {
	if low.Bits() != high.Bits() || low.Bits() == 0 || low.Addr().BitLen() != high.Addr().BitLen() {
		return false
	}
	whole := netip.PrefixFrom(low.Addr(), low.Bits()-1).Masked()
	return whole.Addr() == low.Addr() && whole.Contains(high.Addr())
}

// Compare orders by address, then the wider range first.
func Compare(a, b netip.Prefix) int {
	return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
}

// Overlap returns the first two ranges, one of each list, that share addresses.
func Overlap(a, b []netip.Prefix) (x, y netip.Prefix, ok bool) {
	for _, x := range a {
		for _, y := range b {
			if x.Overlaps(y) {
				return x, y, true
			}
		}
	}
	return netip.Prefix{}, netip.Prefix{}, false
}

// Parse reads ranges; the second result is the first that is none, or empty.
func Parse(in []string) (out []netip.Prefix, wrong string) {
	for _, s := range in {
		p, err := netip.ParsePrefix(s)
		if err != nil || p.Addr().Is4In6() {
			return nil, s
		}
		out = append(out, p)
	}
	return Aggregate(out), ""
}
