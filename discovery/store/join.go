package store

import (
	"bytes"
	"cmp"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"strings"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// indexes are the workloads of each cluster.
type indexes map[mesh.ClusterID]*index

// index finds the workloads of a selector or of an address without looking at all of them. Nil is that of a cluster
// without workloads.
type index struct {
	byLabel   map[labelKey][]*mesh.Workload
	byAddress map[string]*mesh.Workload
	several   map[string]bool // addresses of more than one workload, the first of which counts
}

type labelKey struct{ namespace, key, value string }

func newIndexes(workloads []*mesh.Workload, clusterOf func(mesh.ClusterID) mesh.ClusterID) indexes {
	out := indexes{}
	for _, w := range workloads {
		x := out[clusterOf(w.Cluster)]
		if x == nil {
			x = &index{byLabel: map[labelKey][]*mesh.Workload{}, byAddress: make(map[string]*mesh.Workload, len(workloads)), several: map[string]bool{}}
			out[clusterOf(w.Cluster)] = x
		}
		for k, v := range w.Labels {
			key := labelKey{w.Namespace, k, v}
			x.byLabel[key] = append(x.byLabel[key], w)
		}
		for _, a := range w.Addresses {
			if x.byAddress[a] == nil {
				x.byAddress[a] = w
			} else if x.byAddress[a] != w {
				x.several[a] = true
			}
		}
	}
	return out
}

// remove takes a workload out. It returns false when it cannot tell what the index would be without it.
func (x indexes) remove(b *builder, w *mesh.Workload) bool {
	of := x[b.clusterOf(w.Cluster)]
	if of == nil {
		return false
	}
	for _, a := range w.Addresses {
		if of.several[a] {
			return false
		}
		delete(of.byAddress, a)
	}
	for k, v := range w.Labels {
		key := labelKey{w.Namespace, k, v}
		i := slices.Index(of.byLabel[key], w)
		if i < 0 {
			return false
		}
		if len(of.byLabel[key]) == 1 {
			delete(of.byLabel, key)
		} else {
			of.byLabel[key] = slices.Delete(of.byLabel[key], i, i+1)
		}
	}
	return true
}

// insert puts a workload in. It returns false when it cannot tell what the index would be with it.
func (x indexes) insert(b *builder, w *mesh.Workload) bool {
	of := x[b.clusterOf(w.Cluster)]
	if of == nil {
		return false
	}
	for _, a := range w.Addresses {
		if have := of.byAddress[a]; have != nil && have != w {
			return false
		}
		of.byAddress[a] = w
	}
	for k, v := range w.Labels {
		key := labelKey{w.Namespace, k, v}
		i, taken := slices.BinarySearchFunc(of.byLabel[key], w, func(a, b *mesh.Workload) int { return compareObjects(&a.Object, &b.Object) })
		if taken {
			return false
		}
		of.byLabel[key] = slices.Insert(of.byLabel[key], i, w)
	}
	return true
}

// at returns the workload with the address, or nil.
func (x *index) at(address string) *mesh.Workload {
	if x == nil {
		return nil
	}
	return x.byAddress[address]
}

// selected returns the workloads of the namespace that have all the labels and an address, in order of name.
func (x *index) selected(namespace string, selector map[string]string) []*mesh.Workload {
	if x == nil {
		return nil
	}
	var fewest []*mesh.Workload
	for i, k := range slices.Sorted(maps.Keys(selector)) {
		if ws := x.byLabel[labelKey{namespace, k, selector[k]}]; i == 0 || len(ws) < len(fewest) {
			fewest = ws
		}
	}
	return keep(fewest, func(w *mesh.Workload) bool {
		if len(w.Addresses) == 0 {
			return false
		}
		for k, v := range selector {
			if w.Labels[k] != v {
				return false
			}
		}
		return true
	})
}

// joined is what a declaration's endpoints were made from, and the endpoints.
type joined struct {
	workloads []*mesh.Workload // selected, or behind the slices' addresses
	slices    []*mesh.EndpointSlice
	ports     []mesh.Port
	endpoints []*mesh.Endpoint
}

// declare turns the declarations of every host into a Service, with its endpoints.
func (b *builder) declare(d *draft) {
	next := make(map[*mesh.ServiceDecl]*joined, len(d.decls))
	shared := map[string][]part{} // hosts that other clusters declare
	for _, decl := range d.decls {
		j := b.join(d, decl)
		next[decl] = j
		for _, host := range decl.Hosts {
			if other := d.decl[host]; other != nil {
				parts := shared[host]
				if parts == nil {
					parts = []part{{other, next[other]}}
				}
				if b.joins(parts, decl) {
					shared[host] = append(parts, part{decl, j})
					continue
				}
				d.problem(mesh.Problem{Object: decl.Object, Field: "spec.hosts", Reason: "HostTaken", Message: host + " is already declared by " + other.Object.String(), Remedy: "remove the host from one of the two"})
				continue
			}
			d.decl[host] = decl
			if b.clusterOf(decl.Cluster) != b.cfg.Local.ID {
				shared[host] = []part{{decl, j}}
			}
			d.byHost[host] = &mesh.Service{
				Host: host, Name: decl.Object.Name, Namespace: decl.Object.Namespace, Object: decl.Object,
				Ports: j.ports, VIPs: decl.Addresses, Resolution: decl.Resolution,
				External: decl.External, Headless: decl.Headless, Endpoints: j.endpoints,
				Global: strings.HasSuffix(host, mesh.GlobalSuffix), VisibleTo: decl.VisibleTo, SubjectAltNames: decl.SubjectAltNames, Ranges: decl.Ranges, OneAddress: decl.OneAddress,
			}
		}
	}
	b.joined = next
	combined := make(map[string]*combined, len(shared))
	for _, host := range slices.Sorted(maps.Keys(shared)) {
		c := b.combine(host, shared[host])
		combined[host] = c
		s := d.byHost[host]
		s.Ports, s.VIPs, s.ClusterVIPs, s.Endpoints = c.ports, c.vips, c.cluster, c.ends
		d.Problems = append(d.Problems, c.problems...)
	}
	b.combined, d.shared = combined, shared
}

// join finds what a declaration's endpoints are made from, and makes them when that is not what it was.
func (b *builder) join(d *draft, decl *mesh.ServiceDecl) *joined {
	j := &joined{}
	cluster := b.clusterOf(decl.Cluster)
	if len(decl.Selector) > 0 {
		j.workloads = b.index[cluster].selected(decl.Object.Namespace, decl.Selector)
	} else {
		j.slices = d.slices[sliceKey{cluster, decl.Object.Namespace, decl.Object.Name}]
		for _, s := range j.slices {
			for _, e := range s.Endpoints {
				j.workloads = append(j.workloads, b.index[cluster].at(e.Address))
			}
		}
	}
	if old := b.joined[decl]; old != nil && slices.Equal(old.workloads, j.workloads) && slices.Equal(old.slices, j.slices) {
		return old
	}
	j.ports = sortedPorts(decl.Ports)
	j.endpoints = b.endpoints(decl, j)
	return j
}

func sortedPorts(ports []mesh.Port) []mesh.Port {
	ports = slices.Clone(ports)
	slices.SortFunc(ports, func(a, b mesh.Port) int { return cmp.Compare(a.Number, b.Number) })
	return ports
}

// endpoints makes the inline endpoints of a declaration, and those of the selected workloads or of the slices.
func (b *builder) endpoints(decl *mesh.ServiceDecl, j *joined) []*mesh.Endpoint {
	var out []*mesh.Endpoint
	for _, e := range decl.Endpoints {
		e := *e
		e.Ports = portsOf(decl.Ports, func(p mesh.Port) (uint32, bool) { n, ok := e.Ports[p.Number]; return n, ok })
		out = append(out, b.complete(&e, decl, decl.Object.Namespace))
	}
	if len(decl.Selector) > 0 {
		for _, w := range j.workloads {
			e := &mesh.Endpoint{Address: w.Addresses[0], Weight: w.Weight, Ready: w.Ready || decl.PublishNotReady, Ports: portsOf(decl.Ports, func(p mesh.Port) (uint32, bool) {
				if n, ok := w.Ports[p.TargetName]; ok {
					return n, true
				}
				n, ok := w.Ports[p.Name] // a WorkloadEntry names its ports after the service's
				return n, ok && w.VM
			})}
			b.adopt(e, w)
			out = append(out, b.complete(e, decl, w.Namespace))
		}
	}
	i := 0
	for _, s := range j.slices {
		for _, e := range s.Endpoints {
			e := *e
			e.Ports = portsOf(decl.Ports, func(p mesh.Port) (uint32, bool) { n, ok := s.PortNames[p.Name]; return n, ok })
			if w := j.workloads[i]; w != nil {
				b.adopt(&e, w)
			}
			i++
			out = append(out, b.complete(&e, decl, decl.Object.Namespace))
		}
	}
	sortEndpoints(out)
	return out
}

// adopt fills in what the workload behind an address says about itself.
func (b *builder) adopt(e *mesh.Endpoint, w *mesh.Workload) {
	e.Workload, e.Namespace, e.Labels, e.TLS, e.Locality, e.Network = w.Name, w.Namespace, w.Labels, w.TLS, cmp.Or(e.Locality, w.Locality), cmp.Or(e.Network, w.Network)
	if w.ServiceAccount != "" {
		e.Identity = mesh.SPIFFE(cmp.Or(w.TrustDomain, b.cfg.Local.TrustDomain), w.Namespace, w.ServiceAccount)
	}
}

// complete gives an endpoint what its declaration left out. An address that a ServiceEntry names is on no network
// unless a rule or the entry says so: everyone calls it directly.
func (b *builder) complete(e *mesh.Endpoint, decl *mesh.ServiceDecl, namespace string) *mesh.Endpoint {
	e.Cluster = cmp.Or(e.Cluster, b.clusterOf(decl.Cluster))
	if e.Network == "" {
		e.Network = b.places.of(e.Cluster, e.Address, len(decl.Endpoints) > 0)
	}
	e.Namespace = cmp.Or(e.Namespace, namespace)
	if e.Workload == "" {
		e.Workload = strings.NewReplacer(".", "-", ":", "-").Replace(strings.ToLower(e.Address))
	}
	return e
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

func compareEndpoints(a, b *mesh.Endpoint) int {
	if c := cmp.Compare(a.Cluster, b.Cluster); c != 0 {
		return c
	}
	return cmp.Or(strings.Compare(a.Namespace, b.Namespace), strings.Compare(a.Workload, b.Workload), strings.Compare(a.Address, b.Address))
}

func sortEndpoints(es []*mesh.Endpoint) { slices.SortFunc(es, compareEndpoints) }

// equalService compares by value; endpoints that are the same pointer are not looked into.
func equalService(a, b *mesh.Service) bool {
	return a.Host == b.Host && a.Name == b.Name && a.Namespace == b.Namespace && a.Object == b.Object && a.Resolution == b.Resolution &&
		a.External == b.External && a.Headless == b.Headless && a.Global == b.Global && a.Exported == b.Exported &&
		reflect.DeepEqual(a.Facts, b.Facts) && slices.Equal(a.Ports, b.Ports) && slices.Equal(a.VIPs, b.VIPs) && slices.Equal(a.ExportTo, b.ExportTo) && slices.Equal(a.VisibleTo, b.VisibleTo) && slices.Equal(a.SubjectAltNames, b.SubjectAltNames) && slices.Equal(a.Ranges, b.Ranges) && a.OneAddress == b.OneAddress &&
		maps.EqualFunc(a.ClusterVIPs, b.ClusterVIPs, slices.Equal[[]netip.Addr]) &&
		slices.EqualFunc(a.Endpoints, b.Endpoints, func(x, y *mesh.Endpoint) bool { return x == y || reflect.DeepEqual(x, y) })
}

func equalCluster(a, b *mesh.Cluster) bool {
	return a == b || a.ID == b.ID && a.TrustDomain == b.TrustDomain && a.Network == b.Network && a.Managed == b.Managed && a.Freshness == b.Freshness && a.LastHeard.Equal(b.LastHeard) &&
		slices.Equal(a.PodRanges, b.PodRanges) && slices.Equal(a.ServiceRanges, b.ServiceRanges) &&
		slices.Equal(a.Gateways, b.Gateways) && slices.Equal(a.ControlPlane, b.ControlPlane) && bytes.Equal(a.Roots, b.Roots) &&
		maps.EqualFunc(a.Trusts, b.Trusts, bytes.Equal) && a.Evictions == b.Evictions
}
