package cidr_test

import (
	"fmt"
	"net/netip"
	"testing"

	"pgregory.net/rapid"

	"github.com/isthmus-mesh/isthmus/internal/cidr"
)

func prefixes(s ...string) (out []netip.Prefix) {
	for _, p := range s {
		out = append(out, netip.MustParsePrefix(p))
	}
	return out
}

func TestAggregate(t *testing.T) {
	for _, c := range []struct{ in, want []netip.Prefix }{
		{nil, nil},
		{prefixes("10.0.0.7/24"), prefixes("10.0.0.0/24")},
		{prefixes("10.0.1.0/24", "10.0.0.0/24"), prefixes("10.0.0.0/23")},
		{prefixes("10.0.1.0/24", "10.0.2.0/24"), prefixes("10.0.1.0/24", "10.0.2.0/24")}, // neighbours, not halves
		{prefixes("10.0.0.0/24", "10.0.1.0/24", "10.0.2.0/23"), prefixes("10.0.0.0/22")},
		{prefixes("10.0.0.0/8", "10.1.0.0/16", "fd00::/64", "fd00:0:0:1::/64"), prefixes("10.0.0.0/8", "fd00::/63")},
		{prefixes("0.0.0.0/0", "::/0"), prefixes("0.0.0.0/0", "::/0")},
	} {
		if got := cidr.Aggregate(c.in); fmt.Sprint(got) != fmt.Sprint(c.want) {
			t.Errorf("Aggregate(%v) = %v, want %v", c.in, got, c.want)
		}
	}
}

// The list has the same addresses as before, and no two ranges overlap.
func TestAggregateKeepsAddresses(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		in := rapid.SliceOfN(rapid.Custom(func(t *rapid.T) netip.Prefix {
			return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, 0, rapid.Byte().Draw(t, "last")}), rapid.IntRange(24, 32).Draw(t, "bits"))
		}), 0, 12).Draw(t, "ranges")
		out := cidr.Aggregate(in)
		for i := range 256 {
			a := netip.AddrFrom4([4]byte{10, 0, 0, byte(i)})
			was, is := 0, 0
			for _, p := range in {
				if p.Masked().Contains(a) {
					was = 1
				}
			}
			for _, p := range out {
				if p.Contains(a) {
					is++
				}
			}
			if was != is {
				t.Fatalf("%s is in %d ranges of %v, it was in some of %v: %d", a, is, out, in, was)
			}
		}
	})
}

func TestOverlap(t *testing.T) {
	if x, y, ok := cidr.Overlap(prefixes("10.0.0.0/16", "10.9.0.0/16"), prefixes("10.1.0.0/16", "10.9.3.0/24")); !ok || x.String() != "10.9.0.0/16" || y.String() != "10.9.3.0/24" {
		t.Errorf("%v %v %v", x, y, ok)
	}
	if _, _, ok := cidr.Overlap(prefixes("10.0.0.0/16"), prefixes("10.1.0.0/16", "fd00::/8")); ok {
		t.Error("ranges that share nothing overlap")
	}
}

func TestParse(t *testing.T) {
	if got, wrong := cidr.Parse([]string{"10.0.1.0/24", "10.0.0.0/24"}); wrong != "" || fmt.Sprint(got) != "[10.0.0.0/23]" {
		t.Errorf("%v, %q", got, wrong)
	}
	for _, s := range []string{"10.0.0.1", "", "10.0.0.0/33", "::ffff:10.0.0.0/104"} {
		if _, wrong := cidr.Parse([]string{"10.0.0.0/8", s}); wrong != s {
			t.Errorf("%q is taken", s)
		}
	}
}
