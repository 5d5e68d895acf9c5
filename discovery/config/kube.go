//lint:file-ignore SA1019 Folders still hold the older fields and kinds; they are converted here.

package config

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/apimachinery/pkg/util/validation"
	mcsv1beta1 "sigs.k8s.io/mcs-api/pkg/apis/v1beta1"

	"github.com/isthmus-mesh/isthmus/discovery/config/written"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

func (o *object) service() {
	var s corev1.Service
	if !o.Into(&s) {
		return
	}
	o.Meta = s.ObjectMeta
	if e := validation.IsDNS1123Label(s.Name); len(e) > 0 {
		o.Invalid("metadata.name", written.Show(s.Name)+" is not the name of a Service", written.Rule(e))
	}
	decl := &mesh.ServiceDecl{
		Object: o.Ref, Cluster: o.d.opts.cluster(), Hosts: []string{o.Host(s.Name)}, Ports: o.servicePorts(s.Spec.Ports), Facts: facts(&s),
		PublishNotReady: s.Spec.PublishNotReadyAddresses, Outside: ExternalAddresses(&s), Balanced: s.Spec.Type == corev1.ServiceTypeLoadBalancer,
	}
	if len(s.Spec.Selector) > 0 {
		decl.Selector = s.Spec.Selector
	}
	ips, at := s.Spec.ClusterIPs, func(i int) string { return fmt.Sprintf("spec.clusterIPs[%d]", i) }
	if len(ips) == 0 && s.Spec.ClusterIP != "" {
		ips, at = []string{s.Spec.ClusterIP}, func(int) string { return "spec.clusterIP" }
	}
	switch {
	case s.Spec.Type == corev1.ServiceTypeExternalName:
		o.externalName(decl, s.Spec.ExternalName)
	case slices.Contains(ips, corev1.ClusterIPNone):
		decl.Headless = true
	default:
		decl.Addresses = o.Addresses(ips, at)
		if len(s.Spec.Ports) == 0 {
			o.Reject("spec.ports", written.ReasonMissing, "the Service has no port", "add one")
		}
	}
	if v, ok := s.Annotations[annVisibility]; ok && v != "" {
		decl.VisibleTo = o.Visibility("metadata.annotations["+annVisibility+"]", strings.Split(v, ","))
	}
	o.unsupportedService(&s)
	decl.Export, decl.ExportTo = o.exported()
	if network := s.Labels[labelNetwork]; network != "" && !o.Failed {
		o.serviceGateways(mesh.NetworkID(network), &s)
	}
	if !o.Failed {
		o.d.in.Services = append(o.d.in.Services, decl)
	}
}

// externalName makes the Service a name for a host outside.
func (o *object) externalName(decl *mesh.ServiceDecl, name string) {
	name = strings.TrimSuffix(strings.ToLower(name), ".")
	o.CheckHost("spec.externalName", name)
	if strings.HasPrefix(name, "*") {
		o.Invalid("spec.externalName", written.Show(name)+" is not one host", "name one host")
	}
	decl.Selector, decl.Resolution, decl.External = nil, mesh.DNS, true
	e := &mesh.Endpoint{Workload: workloadName(name), Namespace: o.Ref.Namespace, Address: name, Ports: map[uint32]uint32{}, Ready: true}
	for _, p := range decl.Ports {
		e.Ports[p.Number] = cmp.Or(p.Target, p.Number)
	}
	decl.Endpoints = []*mesh.Endpoint{e}
}

// servicePorts converts the ports. Of a number that is both TCP and UDP, as DNS servers have it, only TCP is kept.
func (o *object) servicePorts(in []corev1.ServicePort) []mesh.Port {
	var out []mesh.Port
	names := map[string]bool{}
	for i, p := range in {
		at := fmt.Sprintf("spec.ports[%d]", i)
		if !o.CheckPort(at+".port", int64(p.Port)) {
			continue
		}
		if names[p.Name] {
			o.Reject(at+".name", written.ReasonDuplicate, "two ports are named "+written.Show(p.Name), "name each port")
		}
		names[p.Name] = true
		port := mesh.Port{Name: p.Name, Number: uint32(p.Port)}
		switch p.Protocol {
		case "", corev1.ProtocolTCP:
			app := ""
			if p.AppProtocol != nil {
				app = *p.AppProtocol
			}
			port.Protocol = written.Protocol(app, p.Name)
			if port.Protocol == mesh.UDP {
				port.Protocol = mesh.TCP
			}
			port.Sniffed = port.Protocol == mesh.TCP && written.Sniffed(app, p.Name, port.Number)
		case corev1.ProtocolUDP:
			port.Protocol = mesh.UDP
		case corev1.ProtocolSCTP:
			o.Unsupported(at+".protocol", "the port is left out")
			continue
		default:
			o.Invalid(at+".protocol", written.Show(string(p.Protocol))+" is not a protocol", "write TCP or UDP")
		}
		o.targetPort(at+".targetPort", p.TargetPort, &port)
		same := slices.IndexFunc(out, func(q mesh.Port) bool { return q.Number == port.Number })
		switch {
		case same < 0:
			out = append(out, port)
		case out[same].Protocol == mesh.UDP && port.Protocol != mesh.UDP:
			out[same] = port
		case (out[same].Protocol == mesh.UDP) == (port.Protocol == mesh.UDP):
			o.Reject(at+".port", written.ReasonDuplicate, fmt.Sprintf("port %d is declared twice", port.Number), "remove one of the two")
		}
	}
	return out
}

func (o *object) targetPort(field string, t intstr.IntOrString, port *mesh.Port) {
	switch {
	case t.Type == intstr.String && t.StrVal != "":
		if e := validation.IsValidPortName(t.StrVal); len(e) > 0 {
			o.Invalid(field, written.Show(t.StrVal)+" is not the name of a port", written.Rule(e))
		}
		port.TargetName = t.StrVal
	case t.IntVal != 0 && o.CheckPort(field, int64(t.IntVal)):
		port.Target = uint32(t.IntVal)
	}
}

// unsupportedService says what of a Service is not honoured.
func (o *object) unsupportedService(s *corev1.Service) {
	if s.Spec.SessionAffinity == corev1.ServiceAffinityClientIP {
		o.Unsupported("spec.sessionAffinity", "a DestinationRule with loadBalancer.consistentHash.useSourceIp does the same")
	}
	if p := s.Spec.InternalTrafficPolicy; p != nil && *p == corev1.ServiceInternalTrafficPolicyLocal {
		o.Unsupported("spec.internalTrafficPolicy", "endpoints on all nodes are used")
	}
	if s.Spec.TrafficDistribution != nil {
		o.Unsupported("spec.trafficDistribution", "endpoints in all zones are used")
	}
}

func (o *object) endpointSlice() {
	var s discoveryv1.EndpointSlice
	if !o.Into(&s) {
		return
	}
	if _, imported := s.Labels[mcsv1beta1.LabelServiceName]; imported {
		return // of a ServiceImport: what it says is known from the exporter
	}
	out := &mesh.EndpointSlice{Object: o.Ref, Cluster: o.d.opts.cluster(), Service: s.Labels[labelSliceName], PortNames: map[string]uint32{}}
	if out.Service == "" {
		o.Reject("metadata.labels", written.ReasonMissing, "the label "+labelSliceName+" is missing", "name the slice's Service in it")
	}
	switch s.AddressType {
	case discoveryv1.AddressTypeIPv4, discoveryv1.AddressTypeIPv6:
	case discoveryv1.AddressTypeFQDN:
		o.Unsupported("addressType", "the slice is left out; use a ServiceEntry with resolution DNS")
		return
	default:
		o.Invalid("addressType", written.Show(string(s.AddressType))+" is not an address type", "write IPv4 or IPv6")
	}
	for i, p := range s.Ports {
		name := ""
		if p.Name != nil {
			name = *p.Name
		}
		if p.Port == nil {
			o.Unsupported(fmt.Sprintf("ports[%d].port", i), "a port without a number is left out")
		} else if o.CheckPort(fmt.Sprintf("ports[%d].port", i), int64(*p.Port)) {
			out.PortNames[name] = uint32(*p.Port)
		}
	}
	for i, e := range s.Endpoints {
		for _, a := range o.Addresses(e.Addresses, func(j int) string { return fmt.Sprintf("endpoints[%d].addresses[%d]", i, j) }) {
			ep := sliceEndpoint(o.Ref.Namespace, a.String(), out.PortNames)
			ep.Ready = e.Conditions.Ready == nil || *e.Conditions.Ready
			if e.NodeName != nil {
				ep.Locality = o.d.opts.Nodes[*e.NodeName].Locality
			}
			if e.TargetRef != nil && e.TargetRef.Name != "" {
				ep.Workload = e.TargetRef.Name
			} else if e.Hostname != nil && *e.Hostname != "" {
				ep.Workload = *e.Hostname
			}
			out.Endpoints = append(out.Endpoints, ep)
		}
	}
	if !o.Failed {
		o.d.in.Slices = append(o.d.in.Slices, out)
	}
}

// endpoints converts the older kind: a slice for each subset.
func (o *object) endpoints() {
	var e corev1.Endpoints // folders still have them
	if !o.Into(&e) {
		return
	}
	var out []*mesh.EndpointSlice
	for i, sub := range e.Subsets {
		slice := &mesh.EndpointSlice{Object: o.Ref, Cluster: o.d.opts.cluster(), Service: e.Name, PortNames: map[string]uint32{}}
		for j, p := range sub.Ports {
			if o.CheckPort(fmt.Sprintf("subsets[%d].ports[%d].port", i, j), int64(p.Port)) {
				slice.PortNames[p.Name] = uint32(p.Port)
			}
		}
		add := func(field string, addresses []corev1.EndpointAddress, ready bool) {
			for j, a := range addresses {
				for _, ip := range o.Addresses([]string{a.IP}, func(int) string { return fmt.Sprintf("subsets[%d].%s[%d].ip", i, field, j) }) {
					ep := sliceEndpoint(o.Ref.Namespace, ip.String(), slice.PortNames)
					ep.Ready = ready
					if a.TargetRef != nil && a.TargetRef.Name != "" {
						ep.Workload = a.TargetRef.Name
					} else if a.Hostname != "" {
						ep.Workload = a.Hostname
					}
					slice.Endpoints = append(slice.Endpoints, ep)
				}
			}
		}
		add("addresses", sub.Addresses, true)
		add("notReadyAddresses", sub.NotReadyAddresses, false)
		out = append(out, slice)
	}
	if !o.Failed {
		o.d.in.Slices = append(o.d.in.Slices, out...)
	}
}

func sliceEndpoint(namespace, address string, ports map[string]uint32) *mesh.Endpoint {
	e := &mesh.Endpoint{Workload: workloadName(address), Namespace: namespace, Address: address, Ports: map[uint32]uint32{}}
	for _, p := range ports {
		e.Ports[p] = p
	}
	return e
}
