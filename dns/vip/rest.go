package vip

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"
	"time"
)

const (
	// RestsFor is how long the address of a host that is gone is given to no other: clients may still have it.
	RestsFor = 24 * time.Hour
	// MaxResting is how many hosts that are gone are remembered; of more, those that went last.
	MaxResting = 1 << 16
)

// rest returns, of the addresses that hosts held, those of hosts that are not among the ones that want some now and went
// less than RestsFor ago, and when each of them went, as far as was known, else now.
func rest(held map[string][]netip.Addr, hosts []Host, since map[string]time.Time, now time.Time) (map[string][]netip.Addr, map[string]time.Time) {
	here := make(map[string]bool, len(hosts))
	for _, h := range hosts {
		here[h.Name] = true
	}
	resting, went := map[string][]netip.Addr{}, map[string]time.Time{}
	for host, addrs := range held {
		at, known := since[host]
		if !known {
			at = now
		}
		if !here[host] && now.Sub(at) < RestsFor {
			resting[host], went[host] = addrs, at
		}
	}
	if len(resting) <= MaxResting {
		return resting, went
	}
	names := make([]string, 0, len(resting))
	for host := range resting {
		names = append(names, host)
	}
	slices.SortFunc(names, func(x, y string) int { return cmp.Or(went[y].Compare(went[x]), strings.Compare(x, y)) })
	for _, host := range names[MaxResting:] {
		delete(resting, host)
		delete(went, host)
	}
	return resting, went
}

// holders returns whose each address is.
func holders(held map[string][]netip.Addr) map[netip.Addr]string {
	out := make(map[netip.Addr]string, 2*len(held))
	for host, addrs := range held {
		for _, a := range addrs {
			out[a] = max(out[a], host) // two that held one address: an old conflict
		}
	}
	return out
}
