package relay

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	setstatev3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/set_filter_state/v3"
	tcpproxyv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	"google.golang.org/protobuf/proto"

	"github.com/isthmus-mesh/isthmus/eastwest/sni"
)

const (
	clusterKey      = "envoy.tcp_proxy.cluster"
	requestedServer = "%REQUESTED_SERVER_NAME%"
)

// chain is a filter chain in the relay's terms.
type chain struct {
	names  []string // server names in lower case, "*." in front of those that cover all below
	alpn   []string // one of these must be offered; empty: no demand
	prefix string   // with byName: precedes the server name in the name of the cluster
	byName bool
	target string // otherwise: the cluster
}

// offered reports whether the client offers what the chain demands.
func (c *chain) offered(protocols []string) bool {
	return len(c.alpn) == 0 || slices.ContainsFunc(protocols, func(p string) bool { return slices.Contains(c.alpn, p) })
}

// instance is one pod, or one address of a control plane.
type instance struct {
	addrs  []netip.AddrPort // tried in this order
	weight uint32
}

// upstream is a cluster: instances that take turns, each as often as its weight says.
type upstream struct {
	instances []instance
	total     uint64 // sum of the weights
	turn      atomic.Uint64
}

// pick returns the index of the instance whose turn it is. There must be one.
func (u *upstream) pick() int {
	n := (u.turn.Add(1) - 1) % u.total
	if u.total == uint64(len(u.instances)) {
		return int(n)
	}
	for i := range u.instances {
		w := uint64(u.instances[i].weight)
		if n < w {
			return i
		}
		n -= w
	}
	return 0 // not reached: the weights add up to total
}

// route is where a server name leads.
type route struct {
	chain *chain
	up    *upstream // nil: nowhere
}

// table is an immutable index server name -> route. Every name that leads somewhere is in it in full, so that one
// look-up decides.
type table map[string]route

// newTable joins chains to clusters: exact names of chains, and for chains with a wildcard the names of the clusters
// they cover. As in Envoy an exact name wins, then the longest wildcard.
func newTable(chains []*chain, clusters map[string]*upstream) table {
	out := make(table, len(clusters)+len(chains))
	wild := map[string]*chain{} // by what follows "*."
	var prefixes []string
	for _, c := range chains {
		for _, name := range c.names {
			if rest, ok := strings.CutPrefix(name, "*."); ok {
				wild[rest] = c
				if !slices.Contains(prefixes, c.prefix) {
					prefixes = append(prefixes, c.prefix)
				}
				continue
			}
			target := c.target
			if c.byName {
				target = c.prefix + name
			}
			out[name] = route{chain: c, up: clusters[target]}
		}
	}
	for cluster, up := range clusters {
		for _, prefix := range prefixes {
			name, ok := strings.CutPrefix(cluster, prefix)
			if !ok {
				continue
			}
			if _, exact := out[name]; exact {
				continue
			}
			if c := covering(wild, name); c != nil && c.prefix == prefix {
				out[name] = route{chain: c, up: up}
			}
		}
	}
	return out
}

// covering returns the chain with the longest wildcard over name.
func covering(wild map[string]*chain, name string) *chain {
	for {
		_, rest, ok := strings.Cut(name, ".")
		if !ok {
			return nil
		}
		if c := wild[rest]; c != nil {
			return c
		}
		name = rest
	}
}

// parseListener reads the chains of a listener. What the relay would have to treat otherwise than Envoy is refused.
func parseListener(l *listenerv3.Listener) ([]*chain, error) {
	if l.GetDefaultFilterChain() != nil || l.GetFilterChainMatcher() != nil {
		return nil, fmt.Errorf("listener %s: a default chain or a chain matcher is not supported", l.GetName())
	}
	owner := map[string]string{}
	var out []*chain
	for _, fc := range l.GetFilterChains() {
		c, err := parseChain(fc)
		if err != nil {
			return nil, fmt.Errorf("listener %s: chain %s: %w", l.GetName(), fc.GetName(), err)
		}
		for _, name := range c.names {
			if other, ok := owner[name]; ok {
				return nil, fmt.Errorf("listener %s: chains %s and %s both have the server name %s", l.GetName(), other, fc.GetName(), name)
			}
			owner[name] = fc.GetName()
		}
		out = append(out, c)
	}
	return out, nil
}

func parseChain(fc *listenerv3.FilterChain) (*chain, error) {
	match := fc.GetFilterChainMatch()
	rest := &listenerv3.FilterChainMatch{}
	if match != nil {
		rest = proto.Clone(match).(*listenerv3.FilterChainMatch)
	}
	rest.ServerNames, rest.ApplicationProtocols = nil, nil
	switch {
	case len(match.GetServerNames()) == 0:
		return nil, errors.New("it has no server name, so it would take every connection")
	case proto.Size(rest) != 0:
		return nil, errors.New("it matches on more than server names and application protocols")
	case fc.GetTransportSocket() != nil:
		return nil, errors.New("it has a transport socket, but the relay terminates no TLS")
	}
	c := &chain{alpn: match.GetApplicationProtocols()}
	proxied := false
	for _, f := range fc.GetFilters() {
		if proxied {
			return nil, fmt.Errorf("filter %s follows tcp_proxy", f.GetName())
		}
		m, err := f.GetTypedConfig().UnmarshalNew()
		if err != nil {
			return nil, fmt.Errorf("filter %s: %w", f.GetName(), err)
		}
		switch m := m.(type) {
		case *setstatev3.Config:
			if c.prefix, err = clusterFormat(m); err != nil {
				return nil, fmt.Errorf("filter %s: %w", f.GetName(), err)
			}
			c.byName = true
		case *tcpproxyv3.TcpProxy:
			proxied, c.target = true, m.GetCluster()
		default:
			return nil, fmt.Errorf("filter %s is not supported", f.GetName())
		}
	}
	if !proxied || (!c.byName && c.target == "") {
		return nil, errors.New("it has no tcp_proxy with a cluster")
	}
	for _, name := range match.GetServerNames() {
		lower := strings.ToLower(name)
		if strings.HasPrefix(lower, "*.") && !c.byName {
			return nil, fmt.Errorf("the wildcard %s must lead to clusters by server name", name)
		}
		if len(lower) > sni.MaxLen+2 || strings.Contains(strings.TrimPrefix(lower, "*."), "*") {
			return nil, fmt.Errorf("%q is no server name", name)
		}
		c.names = append(c.names, lower)
	}
	return c, nil
}

// clusterFormat returns what precedes the server name in the name of the cluster.
func clusterFormat(m *setstatev3.Config) (string, error) {
	if vs := m.GetOnNewConnection(); len(vs) == 1 && vs[0].GetObjectKey() == clusterKey {
		text := vs[0].GetFormatString().GetTextFormatSource().GetInlineString()
		if prefix, ok := strings.CutSuffix(text, requestedServer); ok && !strings.Contains(prefix, "%") {
			return prefix, nil
		}
	}
	return "", fmt.Errorf("only %s from %s is supported", clusterKey, requestedServer)
}

// parseCluster reads the addresses of a STATIC cluster.
func parseCluster(c *clusterv3.Cluster) (*upstream, error) {
	if c.GetType() != clusterv3.Cluster_STATIC || c.GetClusterType() != nil || c.GetTransportSocket() != nil {
		return nil, fmt.Errorf("cluster %s: only STATIC clusters without transport socket are supported", c.GetName())
	}
	up := &upstream{}
	for _, locality := range c.GetLoadAssignment().GetEndpoints() {
		for _, e := range locality.GetLbEndpoints() {
			if e.GetHealthStatus() == corev3.HealthStatus_UNHEALTHY || e.GetHealthStatus() == corev3.HealthStatus_DRAINING {
				continue
			}
			addrs, err := addresses(e.GetEndpoint())
			if err != nil {
				return nil, fmt.Errorf("cluster %s: %w", c.GetName(), err)
			}
			weight := max(1, e.GetLoadBalancingWeight().GetValue())
			up.instances = append(up.instances, instance{addrs: addrs, weight: weight})
			up.total += uint64(weight)
		}
	}
	return up, nil
}

func addresses(e *endpointv3.Endpoint) ([]netip.AddrPort, error) {
	all := []*corev3.Address{e.GetAddress()}
	for _, a := range e.GetAdditionalAddresses() {
		all = append(all, a.GetAddress())
	}
	var out []netip.AddrPort
	for _, a := range all {
		s := a.GetSocketAddress()
		addr, err := netip.ParseAddr(s.GetAddress())
		if err != nil || s.GetPortValue() == 0 || s.GetPortValue() > 65535 {
			return nil, fmt.Errorf("%q port %d is not an IP address and a port", s.GetAddress(), s.GetPortValue())
		}
		out = append(out, netip.AddrPortFrom(addr, uint16(s.GetPortValue())))
	}
	return out, nil
}
