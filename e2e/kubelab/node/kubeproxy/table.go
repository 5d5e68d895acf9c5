package kubeproxy

import (
	"net/netip"
	"slices"
	"sort"
	"strconv"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
)

// frontend is an address and port that Services are dialed at.
type frontend struct {
	addr  netip.Addr
	proto uint8 // unix.IPPROTO_*
	port  uint16
	// external connections get the router's source address, so that answers return through it.
	masquerade bool
	backends   []netip.AddrPort
	// byNode replaces backends for connections from pods of a node, when they are to stay on their node. Others are
	// refused.
	byNode map[string][]netip.AddrPort
}

// input is all that the table is made from.
type input struct {
	services []*corev1.Service
	slices   []*discoveryv1.EndpointSlice
	nodes    []Node
	balancer map[string]netip.Addr // by namespace/name
}

type endpoint struct {
	addr netip.AddrPort
	node string
}

// table returns the frontends in order. It is pure.
func table(in input) []frontend {
	byService := map[string][]*discoveryv1.EndpointSlice{}
	for _, s := range in.slices {
		key := s.Namespace + "/" + s.Labels[discoveryv1.LabelServiceName]
		byService[key] = append(byService[key], s)
	}
	var out []frontend
	for _, svc := range in.services {
		if svc.Spec.Type == corev1.ServiceTypeExternalName || svc.Spec.ClusterIP == corev1.ClusterIPNone {
			continue
		}
		for i := range svc.Spec.Ports {
			out = append(out, in.port(svc, &svc.Spec.Ports[i], byService[svc.Namespace+"/"+svc.Name])...)
		}
	}
	sort.SliceStable(out, func(i, j int) bool {
		a, b := out[i], out[j]
		if c := a.addr.Compare(b.addr); c != 0 {
			return c < 0
		}
		if a.proto != b.proto {
			return a.proto < b.proto
		}
		return a.port < b.port
	})
	return slices.CompactFunc(out, func(a, b frontend) bool { return a.addr == b.addr && a.proto == b.proto && a.port == b.port })
}

func (in *input) port(svc *corev1.Service, p *corev1.ServicePort, list []*discoveryv1.EndpointSlice) []frontend {
	proto, ok := map[corev1.Protocol]uint8{
		"": unix.IPPROTO_TCP, corev1.ProtocolTCP: unix.IPPROTO_TCP, corev1.ProtocolUDP: unix.IPPROTO_UDP, corev1.ProtocolSCTP: unix.IPPROTO_SCTP,
	}[p.Protocol]
	if !ok {
		return nil
	}
	var out []frontend
	cache := map[bool][]endpoint{}
	endpoints := func(a netip.Addr) []endpoint {
		if _, ok := cache[a.Is6()]; !ok {
			cache[a.Is6()] = endpointsOf(list, p, a.Is6())
		}
		return cache[a.Is6()]
	}
	for _, text := range svc.Spec.ClusterIPs {
		a, err := netip.ParseAddr(text)
		if err != nil {
			continue
		}
		f := frontend{addr: a, proto: proto, port: uint16(p.Port), backends: addresses(endpoints(a), "")}
		if svc.Spec.InternalTrafficPolicy != nil && *svc.Spec.InternalTrafficPolicy == corev1.ServiceInternalTrafficPolicyLocal {
			f.byNode = map[string][]netip.AddrPort{}
			for _, n := range in.nodes {
				f.byNode[n.Name] = addresses(endpoints(a), n.Name)
			}
		}
		out = append(out, f)
	}
	local := svc.Spec.ExternalTrafficPolicy == corev1.ServiceExternalTrafficPolicyLocal
	external := func(a netip.Addr, port int32, node string) {
		f := frontend{addr: a, proto: proto, port: uint16(port), masquerade: !local}
		if !local {
			node = ""
		}
		f.backends = addresses(endpoints(a), node)
		out = append(out, f)
	}
	for _, text := range svc.Spec.ExternalIPs {
		if a, err := netip.ParseAddr(text); err == nil {
			external(a, p.Port, "")
		}
	}
	if a, ok := in.balancer[svc.Namespace+"/"+svc.Name]; ok {
		external(a, p.Port, "")
	}
	if p.NodePort != 0 {
		for _, n := range in.nodes {
			for _, a := range n.Addresses {
				external(a, p.NodePort, n.Name)
			}
		}
	}
	return out
}

func addresses(list []endpoint, node string) []netip.AddrPort {
	var out []netip.AddrPort
	for _, e := range list {
		if node == "" || e.node == node {
			out = append(out, e.addr)
		}
	}
	return out
}

// endpointsOf returns the ready endpoints of a port in one family; when there are none, those that end but still serve.
func endpointsOf(list []*discoveryv1.EndpointSlice, p *corev1.ServicePort, v6 bool) []endpoint {
	want := discoveryv1.AddressTypeIPv4
	if v6 {
		want = discoveryv1.AddressTypeIPv6
	}
	var ready, ending []endpoint
	for _, s := range list {
		if s.AddressType != want {
			continue
		}
		port := portOf(s, p)
		if port == 0 {
			continue
		}
		for _, e := range s.Endpoints {
			for _, text := range e.Addresses {
				a, err := netip.ParseAddr(text)
				if err != nil {
					continue
				}
				one := endpoint{addr: netip.AddrPortFrom(a, port)}
				if e.NodeName != nil {
					one.node = *e.NodeName
				}
				c := e.Conditions
				switch {
				case c.Ready == nil || *c.Ready:
					ready = append(ready, one)
				case c.Serving != nil && *c.Serving && c.Terminating != nil && *c.Terminating:
					ending = append(ending, one)
				}
			}
		}
	}
	if len(ready) == 0 {
		ready = ending
	}
	sort.Slice(ready, func(i, j int) bool { return ready[i].addr.Compare(ready[j].addr) < 0 })
	return slices.CompactFunc(ready, func(a, b endpoint) bool { return a.addr == b.addr })
}

func portOf(s *discoveryv1.EndpointSlice, p *corev1.ServicePort) uint16 {
	for _, sp := range s.Ports {
		name := ""
		if sp.Name != nil {
			name = *sp.Name
		}
		if name != p.Name {
			continue
		}
		if sp.Port != nil && *sp.Port > 0 && *sp.Port < 1<<16 {
			return uint16(*sp.Port)
		}
		if n, err := strconv.ParseUint(p.TargetPort.String(), 10, 16); err == nil && sp.Port == nil {
			return uint16(n)
		}
	}
	return 0
}
