package translate

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/translate/remote"
	"github.com/isthmus-mesh/isthmus/discovery/translate/wire"
	"github.com/isthmus-mesh/isthmus/eastwest/sni"
	"github.com/isthmus-mesh/isthmus/topologies"
)

// externalNetwork is the network of endpoints that egress gateways alone are to call.
const externalNetwork = mesh.ExternalNetwork

// located is an endpoint as this proxy reaches it.
type located struct {
	*mesh.Endpoint
	lb     *endpointv3.LbEndpoint // nil: behind gateways that are told the service
	key    string                 // unique in an assignment
	behind *mesh.Network
}

func (v *view) locate(u upstream, plain bool) []located {
	var out []located
	seen := map[string]bool{}
	spare := 0 // endpoints for the egress gateway
	for _, e := range v.dnsDefault(u) {
		if !e.Ready || !topologies.Selects(u.labels, e) || !serves(e, u.port) || !v.views(e) {
			continue
		}
		l, ok := v.locateOne(u, e, plain)
		if !ok || seen[l.key] {
			continue
		}
		seen[l.key] = true
		if v.isSpare(e) {
			spare++
		}
		out = append(out, l)
	}
	if spare > 0 && spare < len(out) {
		out = slices.DeleteFunc(out, func(l located) bool { return v.isSpare(l.Endpoint) })
	}
	slices.SortFunc(out, func(a, b located) int { return cmp.Compare(a.key, b.key) })
	return out
}

// views reports whether the endpoint is on one of the networks that the proxy asked to see.
func (v *view) views(e *mesh.Endpoint) bool {
	return len(v.proxy.NetworkView) == 0 || slices.Contains(v.proxy.NetworkView, e.Network)
}

// isSpare reports whether the endpoint is meant for egress gateways, which ask to see its network. Others take it only
// where there is nothing else.
func (v *view) isSpare(e *mesh.Endpoint) bool {
	return e.Network == externalNetwork && len(v.proxy.NetworkView) == 0 && v.snap.Network(externalNetwork) == nil
}

// serves reports whether the endpoint has the port: one cluster may have it and another not yet.
func serves(e *mesh.Endpoint, p mesh.Port) bool { return e.Ports == nil || e.Ports[p.Number] != 0 }

// dnsDefault returns the service's endpoints; a DNS service without any is its own host.
func (v *view) dnsDefault(u upstream) []*mesh.Endpoint {
	s := u.service
	if len(s.Endpoints) > 0 || s.Resolution != mesh.DNS || strings.HasPrefix(s.Host, "*") {
		return s.Endpoints
	}
	return []*mesh.Endpoint{{Address: s.Host, Ready: true}}
}

func (v *view) locateOne(u upstream, e *mesh.Endpoint, plain bool) (located, bool) {
	path := topologies.Reach(v.snap, v.network, e)
	port := e.PortOf(u.port)
	l := located{Endpoint: e, lb: remote.Endpoint(nil)}
	if path.NoGateway && u.service.Object.Kind == "ServiceEntry" && e.Network != externalNetwork {
		v.problems.add(u.service.Object, "spec.endpoints", reasonNoGateway, "network "+string(e.Network)+" has no gateway, its endpoints are called directly")
	}
	switch {
	case path.Direct:
		path, unix := strings.CutPrefix(e.Address, "unix://")
		if _, err := netip.ParseAddr(e.Address); err != nil && !unix && u.service.Resolution != mesh.DNS {
			v.problems.add(u.service.Object, "", reasonInvalid, "address "+e.Address+" of endpoint "+e.Workload+" is not an IP")
			return l, false
		}
		l.key = e.Address + "|" + wire.Itoa(port)
		l.lb.GetEndpoint().Address = wire.Socket(e.Address, port)
		if unix {
			l.lb.GetEndpoint().Address = wire.Pipe(path)
		}
		// What a proxy sends to its own workload is not captured again, so nobody would end mutual TLS there.
		if !plain && !v.isSelf(e) && v.takesTLS(e, u.port) {
			l.lb.Metadata = endpointMetadata(e, "tlsMode", "istio")
		} else if e.Workload != "" && !plain {
			l.lb.Metadata = endpointMetadata(e)
		}
	case path.Network != nil && !plain && u.carriesMeshTLS() && v.takesTLS(e, u.port):
		l.lb, l.behind, l.key = nil, path.Network, string(e.Network)+"|"+string(e.Cluster)+"|"+e.Namespace+"|"+e.Workload+"|"+e.Address+"|"+wire.Itoa(port)
	case path.Network == nil && path.Reachable() && !plain && u.carriesMeshTLS() && u.service.Resolution != mesh.DNS:
		name, err := sni.Pod{Workload: e.Workload, Port: u.port.Number, Cluster: e.Cluster, Service: u.service.Name, Namespace: u.service.Namespace}.Name()
		if err != nil {
			v.problems.add(u.service.Object, "", reasonServerName, err.Error())
			return l, false
		}
		l.key = name
		l.lb.GetEndpoint().Address = wire.Internal(remote.PeerName(e.Cluster), name)
		l.lb.GetEndpoint().Hostname = name
		l.lb.Metadata = endpointMetadata(e, "tlsMode", "istio", "via", "gateway")
	default:
		return l, false
	}
	return l, true
}

// endpointMetadata chooses the transport socket, and names the instance for access logs and for the administrator.
func endpointMetadata(e *mesh.Endpoint, match ...string) *corev3.Metadata {
	return metadata([]string{"cluster", string(e.Cluster), "workload", e.Namespace + "/" + e.Workload}, match)
}

func metadata(own, match []string) *corev3.Metadata {
	m := &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{"isthmus": wire.Strings(own...)}}
	if len(match) > 0 {
		m.FilterMetadata["envoy.transport_socket_match"] = wire.Strings(match...)
	}
	return m
}

// vips are the addresses by which the proxy's workload calls s: those of its own cluster. An address of another cluster
// is left out where it is another service's here.
func (v *view) vips(s *mesh.Service) []netip.Addr {
	if own, ok := s.ClusterVIPs[v.proxy.Cluster]; ok {
		return own
	}
	if v.proxy.Cluster == v.snap.Local.ID {
		return s.VIPs
	}
	if v.taken == nil {
		v.taken = map[netip.Addr]bool{}
		for _, o := range v.snap.Services {
			for _, a := range o.ClusterVIPs[v.proxy.Cluster] {
				v.taken[a] = true
			}
		}
	}
	return slices.DeleteFunc(slices.Clone(s.VIPs), func(a netip.Addr) bool { return v.taken[a] })
}
