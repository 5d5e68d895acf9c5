package main

import (
	"net/netip"
	"os"
	"testing"
)

func TestLedger(t *testing.T) {
	l := &ledger{dir: t.TempDir()}
	subnets := []netip.Prefix{netip.MustParsePrefix("10.1.0.0/29"), netip.MustParsePrefix("fd00:1::/64")}
	take := func(id, want4, want6 string) {
		t.Helper()
		got, err := l.take(id, subnets)
		if err != nil {
			t.Fatal(err)
		}
		if got[0].String() != want4 || got[1].String() != want6 {
			t.Errorf("%s got %v", id, got)
		}
	}
	take("a", "10.1.0.2", "fd00:1::2")
	take("b", "10.1.0.3", "fd00:1::3")
	if err := l.release("a"); err != nil {
		t.Fatal(err)
	}
	if err := l.release("a"); err != nil {
		t.Error("releasing twice:", err)
	}
	take("c", "10.1.0.4", "fd00:1::4") // not a's, though it is free
	take("d", "10.1.0.5", "fd00:1::5")
	take("e", "10.1.0.6", "fd00:1::6")
	take("f", "10.1.0.2", "fd00:1::7") // round to the first free one
	if got, err := l.take("g", subnets); err == nil {
		t.Errorf("a full range gave %v", got)
	}
	for _, e := range []string{"fd00-1--8"} { // a failed attempt keeps nothing
		if _, err := os.Stat(l.dir + "/" + e); err == nil {
			t.Errorf("%s is taken", e)
		}
	}
}

func TestHostLink(t *testing.T) {
	a, b := hostLink("0123"), hostLink("0124")
	if len(a) > 15 || a == b || a != hostLink("0123") {
		t.Errorf("%q, %q", a, b)
	}
}
