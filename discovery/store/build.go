package store

import (
	"cmp"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/dns/vip"
)

func compareKeys(a, b inputKey) int {
	return cmp.Or(strings.Compare(a.source, b.source), strings.Compare(a.key, b.key))
}

// builder makes each Snapshot from the inputs and the Snapshot before.
type builder struct {
	cfg  Config
	prev *mesh.Snapshot
	held map[string][]netip.Addr
	err  error // reading the memory failed; said once
}

func newBuilder(cfg Config) *builder {
	held, err := cfg.Memory.Load()
	return &builder{cfg: cfg, prev: &mesh.Snapshot{}, held: held, err: err}
}

// draft is a Snapshot in the making.
type draft struct {
	*mesh.Snapshot
	decls   []*mesh.ServiceDecl
	slices  map[string][]*mesh.EndpointSlice // by NAMESPACE/SERVICE
	exports []*mesh.Export
	byHost  map[string]*mesh.Service
	decl    map[string]*mesh.ServiceDecl // by host
}

// build is a pure function of the inputs, the Snapshot before and the held addresses, but for keeping new addresses.
func (b *builder) build(inputs []mesh.Input, missing []string) *mesh.Snapshot {
	d := &draft{
		Snapshot: &mesh.Snapshot{Revision: b.prev.Revision + 1, Local: b.cfg.Local},
		slices:   map[string][]*mesh.EndpointSlice{}, byHost: map[string]*mesh.Service{}, decl: map[string]*mesh.ServiceDecl{},
	}
	for _, name := range missing {
		d.problem(mesh.Problem{Object: mesh.ObjectRef{Kind: "Source", Name: name}, Reason: "NotSynced", Message: "has not reported yet; its objects are missing"})
	}
	if b.err != nil {
		d.problem(mesh.Problem{Object: mesh.ObjectRef{Kind: "Store", Name: "virtual-addresses"}, Reason: "Unreadable", Message: b.err.Error(), Remedy: "remove the file; addresses are derived anew"})
	}
	d.collect(inputs)
	d.declare()
	d.export()
	d.global()
	b.addresses(d)
	b.share(d)
	if b.cfg.Check != nil {
		d.Problems = append(d.Problems, b.cfg.Check(d.Snapshot)...)
	}
	slices.SortStableFunc(d.Problems, func(x, y mesh.Problem) int { return strings.Compare(x.String(), y.String()) })
	d.Problems = slices.Compact(d.Problems)
	b.prev = d.Snapshot
	return d.Snapshot
}

func (d *draft) problem(p mesh.Problem) { d.Problems = append(d.Problems, p) }

// collect gathers the inputs, refusing what is said twice.
func (d *draft) collect(inputs []mesh.Input) {
	d.Clusters = []*mesh.Cluster{d.Local}
	seen := map[string]string{} // object -> source
	first := func(o mesh.ObjectRef) bool {
		id := o.String()
		if other, twice := seen[id]; twice && other != o.Source { // one object may give several values
			d.problem(mesh.Problem{Object: o, Reason: "Duplicate", Message: "is also declared at " + other, Remedy: "remove one of the two"})
			return false
		}
		seen[id] = o.Source
		return true
	}
	for _, in := range inputs {
		d.Problems = append(d.Problems, in.Problems...)
		for _, c := range in.Clusters {
			if !slices.ContainsFunc(d.Clusters, func(x *mesh.Cluster) bool { return x.ID == c.ID }) {
				d.Clusters = append(d.Clusters, c)
			}
		}
		for _, s := range in.Services {
			if first(s.Object) {
				d.decls = append(d.decls, s)
			}
		}
		for _, w := range in.Workloads {
			if first(w.Object) {
				d.Workloads = append(d.Workloads, w)
			}
		}
		for _, s := range in.Slices {
			if first(s.Object) {
				key := s.Object.Namespace + "/" + s.Service
				d.slices[key] = append(d.slices[key], s)
			}
		}
		d.exports = append(d.exports, keep(in.Exports, func(x *mesh.Export) bool { return first(x.Object) })...)
		d.VirtualServices = append(d.VirtualServices, keep(in.VirtualServices, func(x *mesh.VirtualService) bool { return first(x.Object) })...)
		d.DestinationRules = append(d.DestinationRules, keep(in.DestinationRules, func(x *mesh.DestinationRule) bool { return first(x.Object) })...)
		d.Gateways = append(d.Gateways, keep(in.Gateways, func(x *mesh.Gateway) bool { return first(x.Object) })...)
		d.PeerAuthentications = append(d.PeerAuthentications, keep(in.PeerAuthentications, func(x *mesh.PeerAuthentication) bool { return first(x.Object) })...)
		d.Imports = append(d.Imports, in.Imports...)
	}
	slices.SortFunc(d.Clusters, func(a, b *mesh.Cluster) int { return cmp.Compare(a.ID, b.ID) })
	byObject(d.decls, func(x *mesh.ServiceDecl) mesh.ObjectRef { return x.Object })
	byObject(d.Workloads, func(x *mesh.Workload) mesh.ObjectRef { return x.Object })
	byObject(d.exports, func(x *mesh.Export) mesh.ObjectRef { return x.Object })
	byObject(d.VirtualServices, func(x *mesh.VirtualService) mesh.ObjectRef { return x.Object })
	byObject(d.DestinationRules, func(x *mesh.DestinationRule) mesh.ObjectRef { return x.Object })
	byObject(d.Gateways, func(x *mesh.Gateway) mesh.ObjectRef { return x.Object })
	byObject(d.PeerAuthentications, func(x *mesh.PeerAuthentication) mesh.ObjectRef { return x.Object })
	slices.SortFunc(d.Imports, func(a, b *mesh.Import) int {
		return cmp.Or(strings.Compare(a.Namespace, b.Namespace), strings.Compare(a.Name, b.Name), cmp.Compare(a.Cluster, b.Cluster))
	})
}

func keep[T any](xs []T, ok func(T) bool) []T {
	var out []T
	for _, x := range xs {
		if ok(x) {
			out = append(out, x)
		}
	}
	return out
}

func byObject[T any](xs []T, ref func(T) mesh.ObjectRef) {
	slices.SortFunc(xs, func(a, b T) int {
		x, y := ref(a), ref(b)
		return cmp.Or(strings.Compare(x.Namespace, y.Namespace), strings.Compare(x.Name, y.Name), strings.Compare(x.Kind, y.Kind))
	})
}

// declare turns every declaration into a Service for each of its hosts, with its endpoints.
func (d *draft) declare() {
	for _, decl := range d.decls {
		endpoints := d.endpointsOf(decl)
		for _, host := range decl.Hosts {
			if other := d.decl[host]; other != nil {
				d.problem(mesh.Problem{Object: decl.Object, Field: "spec.hosts", Reason: "HostTaken", Message: host + " is already declared by " + other.Object.String(), Remedy: "remove the host from one of the two"})
				continue
			}
			d.decl[host] = decl
			d.byHost[host] = &mesh.Service{
				Host: host, Name: decl.Object.Name, Namespace: decl.Object.Namespace, Object: decl.Object,
				Ports: sortedPorts(decl.Ports), VIPs: decl.Addresses, Resolution: decl.Resolution,
				External: decl.External, Headless: decl.Headless, Endpoints: endpoints,
				Global: strings.HasSuffix(host, mesh.GlobalSuffix),
			}
		}
	}
}

func sortedPorts(ports []mesh.Port) []mesh.Port {
	ports = slices.Clone(ports)
	slices.SortFunc(ports, func(a, b mesh.Port) int { return cmp.Compare(a.Number, b.Number) })
	return ports
}

// endpointsOf joins the selected workloads, the slices and the inline endpoints of a declaration.
func (d *draft) endpointsOf(decl *mesh.ServiceDecl) []*mesh.Endpoint {
	var out []*mesh.Endpoint
	for _, e := range decl.Endpoints {
		e := *e
		e.Ports = portsOf(decl.Ports, func(p mesh.Port) (uint32, bool) { n, ok := e.Ports[p.Number]; return n, ok })
		d.complete(&e, decl.Object.Namespace)
		out = append(out, &e)
	}
	if len(decl.Selector) > 0 {
		for _, w := range d.Workloads {
			if w.Namespace != decl.Object.Namespace || len(w.Addresses) == 0 || !selects(decl.Selector, w.Labels) {
				continue
			}
			e := &mesh.Endpoint{
				Workload: w.Name, Namespace: w.Namespace, Network: w.Network, Address: w.Addresses[0], Labels: w.Labels,
				Locality: w.Locality, Weight: w.Weight, TLS: w.TLS, Ready: w.Ready,
				Ports: portsOf(decl.Ports, func(p mesh.Port) (uint32, bool) {
					if n, ok := w.Ports[p.TargetName]; ok {
						return n, true
					}
					n, ok := w.Ports[p.Name] // a WorkloadEntry names its ports after the service's
					return n, ok && w.VM
				}),
			}
			if w.ServiceAccount != "" {
				e.Identity = mesh.SPIFFE(cmp.Or(w.TrustDomain, d.Local.TrustDomain), w.Namespace, w.ServiceAccount)
			}
			d.complete(e, w.Namespace)
			out = append(out, e)
		}
	} else {
		for _, slice := range d.slices[decl.Object.Namespace+"/"+decl.Object.Name] {
			for _, e := range slice.Endpoints {
				e := *e
				e.Ports = portsOf(decl.Ports, func(p mesh.Port) (uint32, bool) { n, ok := slice.PortNames[p.Name]; return n, ok })
				d.adopt(&e)
				d.complete(&e, decl.Object.Namespace)
				out = append(out, &e)
			}
		}
	}
	sortEndpoints(out)
	return out
}

// adopt fills in what the pod behind a slice's address says about it.
func (d *draft) adopt(e *mesh.Endpoint) {
	for _, w := range d.Workloads {
		if !slices.Contains(w.Addresses, e.Address) {
			continue
		}
		e.Workload, e.Namespace, e.Labels, e.TLS, e.Locality, e.Network = w.Name, w.Namespace, w.Labels, w.TLS, cmp.Or(e.Locality, w.Locality), cmp.Or(e.Network, w.Network)
		if w.ServiceAccount != "" {
			e.Identity = mesh.SPIFFE(cmp.Or(w.TrustDomain, d.Local.TrustDomain), w.Namespace, w.ServiceAccount)
		}
		return
	}
}

// complete gives an endpoint of the local cluster what its declaration left out.
func (d *draft) complete(e *mesh.Endpoint, namespace string) {
	e.Cluster = cmp.Or(e.Cluster, d.Local.ID)
	e.Network = cmp.Or(e.Network, d.Local.Network)
	e.Namespace = cmp.Or(e.Namespace, namespace)
	if e.Workload == "" {
		e.Workload = strings.NewReplacer(".", "-", ":", "-").Replace(strings.ToLower(e.Address))
	}
}

// portsOf maps each service port to a number at the endpoint: what look gives, else the target, else the same number.
func portsOf(ports []mesh.Port, look func(mesh.Port) (uint32, bool)) map[uint32]uint32 {
	out := make(map[uint32]uint32, len(ports))
	for _, p := range ports {
		if n, ok := look(p); ok {
			out[p.Number] = n
		} else if p.TargetName == "" {
			out[p.Number] = cmp.Or(p.Target, p.Number)
		}
	}
	return out
}

func selects(selector, labels map[string]string) bool {
	for k, v := range selector {
		if labels[k] != v {
			return false
		}
	}
	return true
}

func sortEndpoints(es []*mesh.Endpoint) {
	slices.SortFunc(es, func(a, b *mesh.Endpoint) int {
		return cmp.Or(cmp.Compare(a.Cluster, b.Cluster), strings.Compare(a.Namespace, b.Namespace), strings.Compare(a.Workload, b.Workload), strings.Compare(a.Address, b.Address))
	})
}

// export marks the local services that ServiceExports and labels name.
func (d *draft) export() {
	for _, decl := range d.decls {
		if decl.Export {
			d.markExported(decl.Hosts, decl.ExportTo)
		}
	}
	for _, x := range d.exports {
		host := mesh.LocalHost(x.Object.Name, x.Object.Namespace)
		if d.byHost[host] == nil {
			d.problem(mesh.Problem{Object: x.Object, Reason: "NoSuchService", Message: "there is no Service " + x.Object.Namespace + "/" + x.Object.Name + " to export", Remedy: "create the Service or remove the ServiceExport"})
			continue
		}
		d.markExported([]string{host}, x.ExportTo)
	}
}

func (d *draft) markExported(hosts []string, to []mesh.ClusterID) {
	for _, h := range hosts {
		if s := d.byHost[h]; s != nil && h == mesh.LocalHost(s.Name, s.Namespace) {
			s.Exported, s.ExportTo = true, slices.Sorted(slices.Values(to))
		}
	}
}

// global merges the local export and every import of one name into its ".global" host. A hand-made object wins.
func (d *draft) global() {
	merged := map[string]*mesh.Service{}
	take := func(name, namespace string, object mesh.ObjectRef, ports []mesh.Port, endpoints []*mesh.Endpoint) {
		host := mesh.GlobalHost(name, namespace)
		if d.decl[host] != nil {
			return
		}
		s := merged[host]
		if s == nil {
			s = &mesh.Service{Host: host, Name: name, Namespace: namespace, Object: object, Global: true}
			merged[host] = s
		}
		for _, p := range ports {
			have, ok := s.Port(p.Number)
			if !ok {
				p.Target, p.TargetName = 0, ""
				s.Ports = append(s.Ports, p)
			} else if have.Protocol != p.Protocol {
				d.problem(mesh.Problem{Object: object, Reason: "PortConflict", Message: host + " port " + strconv.FormatUint(uint64(p.Number), 10) + " is " + string(have.Protocol) + " in " + s.Object.String() + " and " + string(p.Protocol) + " here", Remedy: "give the port one protocol in every cluster"})
			}
		}
		s.Endpoints = append(s.Endpoints, endpoints...)
	}
	for _, host := range slices.Sorted(maps.Keys(d.byHost)) {
		if s := d.byHost[host]; s.Exported {
			take(s.Name, s.Namespace, s.Object, s.Ports, s.Endpoints)
		}
	}
	for _, i := range d.Imports {
		ref := mesh.ObjectRef{Kind: "ServiceImport", Namespace: i.Namespace, Name: i.Name, Source: "cluster " + string(i.Cluster)}
		take(i.Name, i.Namespace, ref, i.Ports, i.Endpoints)
	}
	for host, s := range merged {
		s.Ports = sortedPorts(s.Ports)
		sortEndpoints(s.Endpoints)
		d.byHost[host] = s
	}
	for _, host := range slices.Sorted(maps.Keys(d.byHost)) {
		d.Services = append(d.Services, d.byHost[host])
	}
}

// addresses gives every host without an address of its own a virtual one and keeps it.
func (b *builder) addresses(d *draft) {
	claims := map[string][]netip.Addr{}
	for _, i := range d.Imports {
		host := mesh.GlobalHost(i.Name, i.Namespace)
		claims[host] = append(claims[host], i.VIPs...)
	}
	inUse := map[netip.Addr]string{}
	for _, s := range d.Services {
		if len(s.VIPs) == 0 {
			for _, a := range slices.Concat(claims[s.Host], b.held[s.Host]) {
				inUse[a] = s.Host
			}
		}
	}
	reserved := map[netip.Addr]string{}
	var hosts []vip.Host
	for _, s := range d.Services {
		s.VIPs = slices.DeleteFunc(slices.Clone(s.VIPs), func(a netip.Addr) bool {
			holder, used := inUse[a]
			if used {
				d.problem(mesh.Problem{Object: s.Object, Field: "spec.addresses", Reason: "AddressInUse", Message: a.String() + " is the virtual address of " + holder, Remedy: "leave addresses out, or choose one outside of " + b.cfg.Ranges.V4.String()})
			}
			return used
		})
		for _, a := range s.VIPs {
			reserved[a] = s.Host
		}
		if len(s.VIPs) == 0 && !s.Headless && !strings.HasPrefix(s.Host, "*") {
			hosts = append(hosts, vip.Host{Name: s.Host, Shared: s.Global, Claims: claims[s.Host], Held: b.held[s.Host]})
		}
	}
	assigned, conflicts := vip.Assign(hosts, reserved, b.cfg.Ranges)
	for _, c := range conflicts {
		d.problem(mesh.Problem{Object: mesh.ObjectRef{Kind: "Host", Name: c.Host}, Reason: "AddressConflict", Message: c.String(), Remedy: "it is given another address; connections to the old one are not moved"})
	}
	for _, s := range d.Services {
		if v, ok := assigned[s.Host]; ok {
			s.VIPs = v
		}
	}
	if maps.EqualFunc(b.held, assigned, slices.Equal[[]netip.Addr]) {
		return
	}
	b.held = assigned
	if err := b.cfg.Memory.Save(assigned); err != nil {
		d.problem(mesh.Problem{Object: mesh.ObjectRef{Kind: "Store", Name: "virtual-addresses"}, Reason: "NotKept", Message: err.Error(), Remedy: "make the data directory writable"})
	}
}

// share replaces every value that equals the one in the Snapshot before by that one.
func (b *builder) share(d *draft) {
	for i, s := range d.Services {
		if old := b.prev.Service(s.Host); old != nil && reflect.DeepEqual(old, s) {
			d.Services[i] = old
		}
	}
	for i, c := range d.Clusters {
		if old := b.prev.Cluster(c.ID); old != nil && reflect.DeepEqual(old, c) {
			d.Clusters[i] = old
		}
	}
}
