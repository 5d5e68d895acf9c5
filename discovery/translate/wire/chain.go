package wire

import (
	"slices"

	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
)

// FreeMatch reports whether no chain has the match, or one of its server names at the same addresses: Envoy refuses a
// listener with two.
func FreeMatch(chains []*listenerv3.FilterChain, m *listenerv3.FilterChainMatch) bool {
	ranges := func(m *listenerv3.FilterChainMatch) string {
		return (&listenerv3.FilterChainMatch{PrefixRanges: m.GetPrefixRanges(), SourcePrefixRanges: m.GetSourcePrefixRanges()}).String()
	}
	return !slices.ContainsFunc(chains, func(c *listenerv3.FilterChain) bool {
		o := c.GetFilterChainMatch()
		if ranges(o) != ranges(m) {
			return false
		}
		return len(m.ServerNames) == 0 && len(o.ServerNames) == 0 || slices.ContainsFunc(m.ServerNames, func(n string) bool { return slices.Contains(o.ServerNames, n) })
	})
}

// PlainChains returns the chains that do not ask for server names or addresses again, for connections without TLS: Envoy does
// not look back once the transport matches.
func PlainChains(chains []*listenerv3.FilterChain) (out []*listenerv3.FilterChain) {
	for _, c := range chains {
		if m := c.GetFilterChainMatch(); len(m.GetServerNames()) == 0 && len(m.GetPrefixRanges()) == 0 {
			out = append(out, &listenerv3.FilterChain{
				FilterChainMatch: &listenerv3.FilterChainMatch{TransportProtocol: "raw_buffer", SourcePrefixRanges: m.GetSourcePrefixRanges()}, Filters: c.GetFilters(),
			})
		}
	}
	return out
}
