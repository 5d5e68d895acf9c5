package store

import (
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/dns/vip"
)

// merged is what a ".global" service was made from, and the service, without its addresses.
type merged struct {
	cluster  mesh.ClusterID
	local    *mesh.Service // as declared; nil when the local cluster does not export it
	ends     []*mesh.Endpoint
	imports  []*mesh.Import
	service  mesh.Service
	problems []mesh.Problem
}

func (m *merged) equal(o *merged) bool {
	if (m.local == nil) != (o.local == nil) || m.local != nil && (m.local.Object != o.local.Object || !reflect.DeepEqual(m.local.Facts, o.local.Facts) || !slices.Equal(m.local.Ports, o.local.Ports)) {
		return false
	}
	return slices.Equal(m.ends, o.ends) && slices.Equal(m.imports, o.imports)
}

// global merges the local export and every import of one name into its ".global" host. A hand-made object wins.
func (b *builder) global(d *draft) {
	next := map[string]*merged{}
	of := func(name, namespace string) *merged {
		host := mesh.GlobalHost(name, namespace)
		if d.decl[host] != nil {
			return nil
		}
		m := next[host]
		if m == nil {
			m = &merged{cluster: b.cfg.Local.ID}
			next[host] = m
		}
		return m
	}
	for _, s := range d.byHost {
		if !s.Exported {
			continue
		}
		if m := of(s.Name, s.Namespace); m != nil {
			m.local, m.ends = s, s.Endpoints
		}
	}
	for _, i := range d.Imports {
		if m := of(i.Name, i.Namespace); m != nil {
			m.imports = append(m.imports, i)
			host := mesh.GlobalHost(i.Name, i.Namespace)
			for _, a := range i.VIPs {
				d.claims[host] = append(d.claims[host], vip.Claim{Addr: a, Since: exportedSince(i.Facts)})
			}
		}
	}
	for host, m := range next {
		if old := b.merged[host]; old != nil && old.equal(m) {
			next[host], m = old, old
		} else {
			m.merge(host)
		}
		d.Problems = append(d.Problems, m.problems...)
		s := m.service
		d.byHost[host] = &s
		for _, p := range b.parts(d, &s) {
			d.byHost[p.Host] = p
		}
	}
	b.merged = next
	d.Services = make([]*mesh.Service, 0, len(d.byHost))
	for _, host := range slices.Sorted(maps.Keys(d.byHost)) {
		d.Services = append(d.Services, d.byHost[host])
	}
}

// merge makes the service. Of one port number with two protocols the local cluster's counts, else the first exporter's.
func (m *merged) merge(host string) {
	m.service = mesh.Service{Host: host, Global: true}
	take := func(object mesh.ObjectRef, ports []mesh.Port, endpoints []*mesh.Endpoint) {
		if m.service.Object == (mesh.ObjectRef{}) {
			m.service.Object, m.service.Name, m.service.Namespace = object, object.Name, object.Namespace
		}
		for _, p := range ports {
			have, ok := m.service.Port(p.Number)
			if !ok {
				p.Target, p.TargetName = 0, ""
				m.service.Ports = append(m.service.Ports, p)
			} else if have.Protocol != p.Protocol {
				m.problems = append(m.problems, mesh.Problem{Object: object, Reason: "PortConflict",
					Message: host + " port " + strconv.FormatUint(uint64(p.Number), 10) + " is " + string(have.Protocol) + " in " + m.service.Object.String() + " and " + string(p.Protocol) + " here",
					Remedy:  "give the port one protocol in every cluster"})
			}
		}
		m.service.Endpoints = append(m.service.Endpoints, endpoints...)
	}
	if m.local != nil {
		take(m.local.Object, m.local.Ports, m.ends)
	}
	for _, i := range m.imports {
		take(mesh.ObjectRef{Kind: "ServiceImport", Namespace: i.Namespace, Name: i.Name, Source: "cluster " + string(i.Cluster)}, i.Ports, i.Endpoints)
	}
	m.service.Ports = sortedPorts(m.service.Ports)
	sortEndpoints(m.service.Endpoints)
	m.service.Facts = m.facts()
}

// assignment is who wanted an address, and what came of it.
type assignment struct {
	wants    []vip.Want
	vips     [][]netip.Addr
	problems []mesh.Problem
}

// exportedSince returns when an export was made, in seconds since 1970; 0: unknown.
func exportedSince(f *mesh.Facts) int64 {
	if f == nil || f.Created.IsZero() {
		return 0
	}
	return f.Created.Unix()
}

// wantOf returns what one service wants.
func (b *builder) wantOf(d *draft, s *mesh.Service) vip.Want {
	w := vip.Want{Name: s.Host, Shared: s.Global, Given: s.VIPs, Claims: d.claims[s.Host],
		Needs: !s.Headless && s.Resolution != mesh.None && len(s.Ranges) == 0 && !strings.HasPrefix(s.Host, "*")}
	if m := b.merged[s.Host]; m != nil && m.local != nil {
		w.Exported, w.Since = true, exportedSince(m.local.Facts)
	}
	return w
}

// addresses gives every host without an address of its own a virtual one and keeps it.
func (b *builder) addresses(d *draft) {
	a := &assignment{wants: make([]vip.Want, len(d.Services))}
	for i, s := range d.Services {
		a.wants[i] = b.wantOf(d, s)
	}
	if b.assigned != nil && slices.EqualFunc(a.wants, b.assigned.wants, vip.Want.Equal) {
		a = b.assigned
	} else {
		b.assign(d, a)
		if b.assigned = a; len(a.problems) > 0 {
			b.assigned = nil // what was settled is not a problem the next time
		}
	}
	for i, s := range d.Services {
		s.VIPs = a.vips[i]
	}
	d.Problems = append(d.Problems, a.problems...)
}

func (b *builder) assign(d *draft, a *assignment) {
	problem := func(p mesh.Problem) { a.problems = append(a.problems, p) }
	settled := vip.Settle(a.wants, vip.Table{Held: b.held, Gone: b.gone}, b.cfg.Ranges, b.cfg.Now())
	a.vips, b.gone = settled.Addresses, settled.Table.Gone
	for _, x := range settled.InUse {
		problem(mesh.Problem{Object: d.Services[x.Want].Object, Field: "spec.addresses", Reason: "AddressInUse", Message: x.Addr.String() + " is the virtual address of " + x.Holder, Remedy: "leave addresses out, or choose one outside of " + b.cfg.Ranges.V4.String()})
	}
	for _, c := range settled.Conflicts {
		problem(mesh.Problem{Object: mesh.ObjectRef{Kind: "Host", Name: c.Host}, Reason: "AddressConflict", Message: c.String(), Remedy: "it is given another address; connections to the old one are not moved"})
	}
	if maps.EqualFunc(b.held, settled.Table.Held, slices.Equal[[]netip.Addr]) {
		return
	}
	b.held = settled.Table.Held
	if err := b.cfg.Memory.Save(b.held); err != nil {
		problem(mesh.Problem{Object: mesh.ObjectRef{Kind: "Store", Name: "virtual-addresses"}, Reason: "NotKept", Message: err.Error(), Remedy: "make the data directory writable"})
	}
}
