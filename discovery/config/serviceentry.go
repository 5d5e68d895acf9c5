package config

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	networking "istio.io/api/networking/v1"

	"github.com/isthmus-mesh/isthmus/discovery/config/written"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

func (o *object) serviceEntry() {
	spec := &networking.ServiceEntry{}
	if _, ok := o.Spec(spec); !ok {
		return
	}
	decl := &mesh.ServiceDecl{Object: o.Ref, External: spec.Location == networking.ServiceEntry_MESH_EXTERNAL}
	decl.Hosts = o.entryHosts(spec)
	decl.Ports = o.entryPorts(spec)
	decl.Addresses, decl.Ranges = o.entryAddresses(spec)
	decl.OneAddress = spec.Resolution == networking.ServiceEntry_DNS_ROUND_ROBIN
	if decl.OneAddress && len(spec.Endpoints) > 1 {
		o.Reject("spec.endpoints", written.ReasonConflict, "resolution DNS_ROUND_ROBIN takes one endpoint", "keep one, or write resolution DNS")
	}
	decl.Resolution = o.resolution(spec)
	if spec.WorkloadSelector != nil {
		decl.Selector = spec.WorkloadSelector.Labels
		if len(decl.Selector) == 0 {
			o.Reject("spec.workloadSelector", written.ReasonMissing, "selects by no label", "add labels or remove the selector")
		}
		if len(spec.Endpoints) > 0 {
			o.Reject("spec.workloadSelector", written.ReasonConflict, "stands beside endpoints", "remove one of the two")
		}
	}
	for i, e := range spec.Endpoints {
		if out := o.entryEndpoint(fmt.Sprintf("spec.endpoints[%d]", i), spec, e); out != nil {
			decl.Endpoints = append(decl.Endpoints, out)
		}
	}
	decl.VisibleTo = o.Visibility("spec.exportTo", spec.ExportTo)
	decl.SubjectAltNames = slices.Compact(slices.Sorted(slices.Values(spec.SubjectAltNames)))
	decl.Export, decl.ExportTo = o.exported()
	if !o.Failed {
		o.d.in.Services = append(o.d.in.Services, perHost(decl)...)
	}
}

// perHost gives hosts that are resolved by their own name a declaration each, with themselves as endpoint.
func perHost(decl *mesh.ServiceDecl) []*mesh.ServiceDecl {
	if decl.Resolution != mesh.DNS || len(decl.Endpoints) > 0 || decl.Selector != nil {
		return []*mesh.ServiceDecl{decl}
	}
	var out []*mesh.ServiceDecl
	for _, host := range decl.Hosts {
		d := *decl
		d.Hosts = []string{host}
		e := &mesh.Endpoint{Workload: workloadName(host), Namespace: decl.Object.Namespace, Address: host, Ports: map[uint32]uint32{}, Ready: true}
		for _, p := range decl.Ports {
			e.Ports[p.Number] = cmp.Or(p.Target, p.Number)
		}
		d.Endpoints = []*mesh.Endpoint{e}
		out = append(out, &d)
	}
	return out
}

func (o *object) entryHosts(spec *networking.ServiceEntry) []string {
	if len(spec.Hosts) == 0 {
		o.Reject("spec.hosts", written.ReasonMissing, "the ServiceEntry has no host", "name one")
	}
	var out []string
	for i, h := range spec.Hosts {
		at := fmt.Sprintf("spec.hosts[%d]", i)
		h = strings.TrimSuffix(strings.ToLower(h), ".")
		o.CheckHost(at, h)
		switch {
		case h == "*":
			o.Invalid(at, "a ServiceEntry cannot stand for all hosts", `write a domain, for example "*.example.com"`)
		case slices.Contains(out, h):
			o.Reject(at, written.ReasonDuplicate, written.Show(h)+" is named twice", "remove one")
		}
		out = append(out, h)
	}
	return out
}

func (o *object) entryPorts(spec *networking.ServiceEntry) []mesh.Port {
	if len(spec.Ports) == 0 {
		o.Reject("spec.ports", written.ReasonMissing, "the ServiceEntry has no port", "add one")
	}
	var out []mesh.Port
	for i, p := range spec.Ports {
		at := fmt.Sprintf("spec.ports[%d]", i)
		o.CheckPort(at+".number", int64(p.GetNumber()))
		if p.GetTargetPort() != 0 {
			o.CheckPort(at+".targetPort", int64(p.GetTargetPort()))
		}
		if p.GetName() == "" {
			o.Reject(at+".name", written.ReasonMissing, "the port has no name", "give it one")
		}
		port := mesh.Port{Name: p.GetName(), Number: p.GetNumber(), Target: p.GetTargetPort(), Protocol: written.Protocol("", p.GetName())}
		port.Sniffed = p.GetProtocol() == "" && written.Sniffed("", p.GetName(), p.GetNumber())
		if p.GetProtocol() != "" {
			known, ok := written.ProtocolNamed(p.GetProtocol())
			if !ok {
				o.Invalid(at+".protocol", written.Show(p.GetProtocol())+" is not a protocol", "write one of HTTP, HTTP2, GRPC, HTTPS, TLS, TCP, UDP, MONGO, REDIS, MYSQL")
			}
			port.Protocol = known
		}
		for _, q := range out {
			if q.Number == port.Number {
				o.Reject(at+".number", written.ReasonDuplicate, fmt.Sprintf("port %d is declared twice", port.Number), "remove one of the two")
			}
			if q.Name == port.Name {
				o.Reject(at+".name", written.ReasonDuplicate, "two ports are named "+written.Show(port.Name), "name each port")
			}
		}
		out = append(out, port)
	}
	return out
}

// entryAddresses takes single addresses, also when written as a prefix, and ranges.
func (o *object) entryAddresses(spec *networking.ServiceEntry) (addresses []netip.Addr, ranges []netip.Prefix) {
	var single, fields []string
	for i, s := range spec.Addresses {
		at := fmt.Sprintf("spec.addresses[%d]", i)
		if prefix, err := netip.ParsePrefix(s); err == nil {
			if s = prefix.Addr().String(); !prefix.IsSingleIP() {
				ranges = append(ranges, prefix.Masked())
				continue
			}
		}
		single, fields = append(single, s), append(fields, at)
	}
	slices.SortFunc(ranges, func(a, b netip.Prefix) int { return cmp.Compare(a.String(), b.String()) })
	return o.Addresses(single, func(i int) string { return fields[i] }), slices.Compact(ranges)
}

func (o *object) resolution(spec *networking.ServiceEntry) mesh.Resolution {
	switch spec.Resolution {
	case networking.ServiceEntry_NONE:
		if len(spec.Endpoints) > 0 {
			o.Reject("spec.endpoints", written.ReasonConflict, "resolution NONE takes no endpoints", "write resolution STATIC or DNS")
		}
		return mesh.None
	case networking.ServiceEntry_DNS, networking.ServiceEntry_DNS_ROUND_ROBIN:
		wild := slices.ContainsFunc(spec.Hosts, func(h string) bool { return strings.HasPrefix(h, "*") })
		if wild && len(spec.Endpoints) == 0 {
			o.Reject("spec.resolution", written.ReasonConflict, "a wildcard host cannot be resolved", "name endpoints, or write resolution NONE")
		}
		return mesh.DNS
	case networking.ServiceEntry_DYNAMIC_DNS:
		o.dynamic(spec)
		return mesh.Dynamic
	}
	return mesh.Static
}

// dynamic checks what is resolved by the name that each request asks for.
func (o *object) dynamic(spec *networking.ServiceEntry) {
	for i, h := range spec.Hosts {
		if !strings.HasPrefix(h, "*.") {
			o.Reject(fmt.Sprintf("spec.hosts[%d]", i), written.ReasonConflict, "resolution DYNAMIC_DNS is for wildcard hosts", "write *.DOMAIN, or resolution DNS")
		}
	}
	for i, p := range spec.Ports {
		known, ok := written.ProtocolNamed(p.GetProtocol())
		if tcp := ok && known == mesh.TCP || p.GetProtocol() == "" && written.Protocol("", p.GetName()) == mesh.TCP; tcp {
			o.Reject(fmt.Sprintf("spec.ports[%d].protocol", i), written.ReasonConflict, "nothing in plain TCP says which host is meant", "write HTTP or TLS, or name the hosts")
		}
	}
	if len(spec.Endpoints) > 0 {
		o.Unsupported("spec.endpoints", "hosts are resolved by their names")
		spec.Endpoints = nil
	}
}

// entryEndpoint converts an inline endpoint; nil if it cannot be used.
func (o *object) entryEndpoint(at string, spec *networking.ServiceEntry, e *networking.WorkloadEntry) *mesh.Endpoint {
	out := &mesh.Endpoint{
		Namespace: o.Ref.Namespace, Network: mesh.NetworkID(e.GetNetwork()), Address: strings.ToLower(e.GetAddress()), Labels: e.GetLabels(),
		Locality: cmp.Or(e.GetLocality(), Locality(e.GetLabels())), Weight: e.GetWeight(), Ports: map[uint32]uint32{}, Ready: true,
		TLS: e.GetLabels()[labelTLSMode] == "istio",
	}
	a, err := netip.ParseAddr(out.Address)
	dns := spec.Resolution == networking.ServiceEntry_DNS || spec.Resolution == networking.ServiceEntry_DNS_ROUND_ROBIN
	switch {
	case err == nil && a.Zone() == "":
		out.Address = a.Unmap().String()
	case strings.HasPrefix(out.Address, "unix:"):
		out.Address = e.GetAddress() // paths have capitals
		o.socket(at, spec, e)
	case out.Address == "":
		o.Reject(at+".address", written.ReasonMissing, "the address is missing", "write an IP address")
	case !dns:
		o.Invalid(at+".address", written.Show(out.Address)+" is not an IP address", "write an IP address, or resolution DNS")
	default:
		o.CheckHost(at+".address", out.Address)
	}
	out.Workload = workloadName(out.Address)
	o.CheckPorts(at+".ports", e.GetPorts())
	o.CheckAccount(at+".serviceAccount", e.GetServiceAccount())
	known := map[string]bool{}
	for _, p := range spec.Ports {
		known[p.GetName()] = true
		n, ok := e.GetPorts()[p.GetName()]
		if !ok {
			n = cmp.Or(p.GetTargetPort(), p.GetNumber())
		}
		out.Ports[p.GetNumber()] = n
	}
	for _, name := range slices.Sorted(maps.Keys(e.GetPorts())) {
		if !known[name] {
			o.Reject(at+".ports["+name+"]", written.ReasonUnknownPort, "spec.ports has no port named "+written.Show(name), "add it there or remove it here")
		}
	}
	if ofAnotherCluster(spec, out.Ports) {
		// The address is dialled as it stands; it is what lies behind that is on another network. "external" says who dials it.
		if out.TLS = true; out.Network != mesh.ExternalNetwork {
			out.Network = ""
		}
	}
	return out
}

// socket checks an endpoint that is a unix socket.
func (o *object) socket(at string, spec *networking.ServiceEntry, e *networking.WorkloadEntry) {
	path, ok := strings.CutPrefix(e.GetAddress(), "unix://")
	switch {
	case !ok || !strings.HasPrefix(path, "/") && !strings.HasPrefix(path, "@"):
		o.Invalid(at+".address", written.Show(e.GetAddress())+" is not a unix socket", "write unix:///PATH, or unix://@NAME")
	case spec.Resolution != networking.ServiceEntry_STATIC:
		o.Invalid(at+".address", "a unix socket needs resolution STATIC", "write resolution: STATIC")
	case len(e.GetPorts()) > 0:
		o.Reject(at+".ports", written.ReasonConflict, "a unix socket has no ports", "remove them")
	}
}

// gatewayPort is where gateways between clusters listen; they take nothing but mesh TLS.
const gatewayPort = 15443

// ofAnotherCluster reports whether an endpoint with these ports is the gateway of another cluster: the form in which
// services of other clusters are written by hand.
func ofAnotherCluster(spec *networking.ServiceEntry, ports map[uint32]uint32) bool {
	for _, h := range spec.Hosts {
		if !strings.HasSuffix(strings.TrimSuffix(strings.ToLower(h), "."), mesh.GlobalSuffix) {
			return false
		}
	}
	for _, n := range ports {
		if n != gatewayPort {
			return false
		}
	}
	return spec.Location == networking.ServiceEntry_MESH_INTERNAL && len(ports) > 0
}
