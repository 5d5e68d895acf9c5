package store

import (
	"cmp"
	"maps"
	"reflect"
	"slices"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/store/lists"
)

// change is what a source said under one key when the last Snapshot was built, and what it says now.
type change struct{ old, now mesh.Input }

// memo is what the last build was made of, as the short path of a change looks it up. It is made when it is first
// asked for after a build, and kept up to date by the short path.
type memo struct {
	seen       map[mesh.ClusterID]map[objectKey]int // how often each object is reported
	described  map[mesh.ClusterID]bool              // clusters that an input describes, or the local one
	bySelector map[mesh.ClusterID]map[labelKey][]*mesh.ServiceDecl
	bySlices   map[sliceKey][]*mesh.ServiceDecl
	byEndpoint map[addressKey][]sliceKey // slices with the address
}

type addressKey struct {
	cluster mesh.ClusterID
	address string
}

// next builds the Snapshot after the changes: by the short path, which costs what the changes touch, or anew from all
// inputs. Both give the same, but for Delta.
func (b *builder) next(changes []change, all func() []mesh.Input, missing []string) *mesh.Snapshot {
	if b.draft != nil && b.assigned != nil && b.cfg.Local == b.configured && slices.Equal(missing, b.missing) {
		if b.memo == nil {
			b.memo = b.remember(b.inputs)
			b.inputs = nil
		}
		if snap := b.patch(changes); snap != nil {
			return snap
		}
	}
	return b.build(all(), missing)
}

func (b *builder) remember(inputs []mesh.Input) *memo {
	m := &memo{seen: map[mesh.ClusterID]map[objectKey]int{}, described: map[mesh.ClusterID]bool{"": true, b.cfg.Local.ID: true},
		bySelector: map[mesh.ClusterID]map[labelKey][]*mesh.ServiceDecl{}, bySlices: map[sliceKey][]*mesh.ServiceDecl{}, byEndpoint: map[addressKey][]sliceKey{}}
	for i := range inputs {
		m.count(b, &inputs[i], 1)
		for _, c := range inputs[i].Clusters {
			m.described[c.ID] = true
		}
	}
	for _, decl := range b.draft.decls {
		cluster := b.clusterOf(decl.Cluster)
		if len(decl.Selector) == 0 {
			key := sliceKey{cluster, decl.Object.Namespace, decl.Object.Name}
			m.bySlices[key] = append(m.bySlices[key], decl)
			continue
		}
		if m.bySelector[cluster] == nil {
			m.bySelector[cluster] = map[labelKey][]*mesh.ServiceDecl{}
		}
		k := slices.Sorted(maps.Keys(decl.Selector))[0]
		key := labelKey{decl.Object.Namespace, k, decl.Selector[k]}
		m.bySelector[cluster][key] = append(m.bySelector[cluster][key], decl)
	}
	for key, list := range b.draft.slices {
		for _, s := range list {
			m.point(key, s, true)
		}
	}
	return m
}

// count adds to how often the objects of an input are reported.
func (m *memo) count(b *builder, in *mesh.Input, n int) {
	each(in, func(cluster mesh.ClusterID, o mesh.ObjectRef) {
		cluster = b.clusterOf(cluster)
		if m.seen[cluster] == nil {
			m.seen[cluster] = map[objectKey]int{}
		}
		id := objectKey{o.Kind, o.Namespace, o.Name}
		if m.seen[cluster][id] += n; m.seen[cluster][id] == 0 {
			delete(m.seen[cluster], id)
		}
	})
}

// each visits the objects of an input that may be reported twice.
func each(in *mesh.Input, f func(mesh.ClusterID, mesh.ObjectRef)) {
	for _, x := range in.Slices {
		f(x.Cluster, x.Object)
	}
	for _, x := range in.Services {
		f(x.Cluster, x.Object)
	}
	for _, x := range in.Workloads {
		f(x.Cluster, x.Object)
	}
	for _, x := range in.Exports {
		f("", x.Object)
	}
	for _, k := range carried {
		for _, o := range k.refs(in) {
			f("", o)
		}
	}
}

// point notes the addresses of a slice, or forgets them.
func (m *memo) point(key sliceKey, s *mesh.EndpointSlice, there bool) {
	for _, e := range s.Endpoints {
		k := addressKey{key.cluster, e.Address}
		if there {
			m.byEndpoint[k] = append(m.byEndpoint[k], key)
		} else if i := slices.Index(m.byEndpoint[k], key); i >= 0 {
			if m.byEndpoint[k] = slices.Delete(m.byEndpoint[k], i, i+1); len(m.byEndpoint[k]) == 0 {
				delete(m.byEndpoint, k)
			}
		}
	}
}

// patch is the short path: workloads, EndpointSlices and carried objects came, went or changed, nothing else. It returns
// nil when that does not do: then what the builder remembers of them is dropped, and built anew.
func (b *builder) patch(changes []change) *mesh.Snapshot {
	for _, c := range changes {
		if !onlyOf(c, "Workloads", "Slices") {
			return nil
		}
	}
	if !b.single(changes) {
		return nil
	}
	p := &patch{b: b, snap: new(mesh.Snapshot), decls: map[*mesh.ServiceDecl]bool{}}
	*p.snap = *b.prev
	p.snap.Revision++
	p.snap.Delta = &mesh.Delta{From: b.prev.Revision}
	p.snap.VirtualServices = b.draft.routes
	for _, k := range carried {
		p.rules = k.patch(p.snap, changes) || p.rules
	}
	p.derive()
	for _, c := range changes {
		if !p.workloads(lists.Differences(c.old.Workloads, c.now.Workloads)) || !p.slices(lists.Differences(c.old.Slices, c.now.Slices)) {
			return b.drop()
		}
	}
	b.draft.Snapshot, b.draft.routes = p.snap, p.snap.VirtualServices
	if p.rules {
		p.handover()
	} else {
		p.snap.VirtualServices = b.prev.VirtualServices
	}
	p.snap.Workloads = lists.Patched(p.snap.Workloads, p.gone, p.come, b.compareWorkloads)
	if !p.services() {
		return b.drop()
	}
	p.snap.Delta.Config = p.rules
	p.problems()
	b.prev, b.draft.Snapshot = p.snap, p.snap
	b.short++
	return p.snap
}

// drop forgets what a short path that was left half-way may have changed.
func (b *builder) drop() *mesh.Snapshot {
	b.draft, b.memo, b.index, b.joined, b.placed, b.combined, b.merged = nil, nil, nil, nil, nil, nil, nil
	return nil
}

// onlyOf reports whether the change is in the named fields and in carried kinds alone.
func onlyOf(c change, names ...string) bool {
	was, now := reflect.ValueOf(&c.old).Elem(), reflect.ValueOf(&c.now).Elem()
	for i := range was.NumField() {
		name := was.Type().Field(i).Name
		if slices.Contains(names, name) || carries(name) {
			continue
		}
		x, y := was.Field(i), now.Field(i)
		if x.Kind() != reflect.Slice {
			if !reflect.DeepEqual(x.Interface(), y.Interface()) {
				return false
			}
			continue
		}
		if x.Len() != y.Len() {
			return false
		}
		if x.Len() > 0 && x.Pointer() == y.Pointer() {
			continue
		}
		for j := range x.Len() {
			if !x.Index(j).Comparable() || !x.Index(j).Equal(y.Index(j)) {
				return false
			}
		}
	}
	return true
}

// carries reports whether the field of mesh.Input is that of a carried kind.
func carries(field string) bool {
	return slices.ContainsFunc(carried, func(k carrier) bool { return k.field() == field })
}

// single reports whether every object that came, went or changed is reported once at most, before and after. It leaves
// the counts as they are after.
func (b *builder) single(changes []change) bool {
	m := b.memo
	once := func() bool {
		for i := range changes {
			for _, in := range []*mesh.Input{&changes[i].old, &changes[i].now} {
				twice := false
				each(in, func(cluster mesh.ClusterID, o mesh.ObjectRef) {
					twice = twice || m.seen[b.clusterOf(cluster)][objectKey{o.Kind, o.Namespace, o.Name}] > 1
				})
				if twice {
					return false
				}
			}
		}
		return true
	}
	ok := once()
	for i := range changes {
		m.count(b, &changes[i].old, -1)
		m.count(b, &changes[i].now, 1)
	}
	return once() && ok
}

// patch is a Snapshot in the making out of the one before.
type patch struct {
	b          *builder
	snap       *mesh.Snapshot
	gone, come []*mesh.Workload // placed
	decls      map[*mesh.ServiceDecl]bool
	rules      bool // carried objects differ
	checked    bool // services differ in what Check may read
}

func (b *builder) compareWorkloads(x, y *mesh.Workload) int {
	return cmp.Or(compareObjects(&x.Object, &y.Object), b.draft.localFirst(b.clusterOf(x.Cluster), b.clusterOf(y.Cluster)))
}

// workloads takes workloads out of the index and puts others in.
func (p *patch) workloads(gone, come []*mesh.Workload) bool {
	b := p.b
	managed := b.draft.managed()
	for _, w := range gone {
		if !b.memo.described[w.Cluster] {
			return false
		}
		placed := w
		if x := b.placed[w]; x != nil {
			placed = x
			delete(b.placed, w)
		}
		if !b.index.remove(b, placed) {
			return false
		}
		p.gone = append(p.gone, placed)
		p.touch(placed)
	}
	for _, w := range come {
		if !b.memo.described[w.Cluster] || !managed && b.clusterOf(w.Cluster) != b.cfg.Local.ID {
			return false
		}
		placed := w
		if b.placed != nil {
			if x := b.placeOne(w); x != w {
				b.placed[w], placed = x, x
			}
		}
		if !b.index.insert(b, placed) {
			return false
		}
		p.come = append(p.come, placed)
		p.touch(placed)
	}
	return true
}

// touch marks the declarations that a workload is, or was, an endpoint of.
func (p *patch) touch(w *mesh.Workload) {
	m, cluster := p.b.memo, p.b.clusterOf(w.Cluster)
	for k, v := range w.Labels {
		for _, decl := range m.bySelector[cluster][labelKey{w.Namespace, k, v}] {
			p.decls[decl] = true
		}
	}
	for _, a := range w.Addresses {
		for _, key := range m.byEndpoint[addressKey{cluster, a}] {
			for _, decl := range m.bySlices[key] {
				p.decls[decl] = true
			}
		}
	}
}

// slices replaces EndpointSlices, and adds the first or removes one of a Service.
func (p *patch) slices(gone, come []*mesh.EndpointSlice) bool {
	b := p.b
	of := b.draft.slices
	for _, s := range gone {
		if !b.memo.described[s.Cluster] {
			return false
		}
		key := sliceKey{b.clusterOf(s.Cluster), s.Object.Namespace, s.Service}
		i := slices.Index(of[key], s)
		if i < 0 {
			return false
		}
		b.memo.point(key, s, false)
		of[key] = slices.Delete(slices.Clone(of[key]), i, i+1)
		if len(of[key]) == 0 {
			delete(of, key)
		} else if len(come) > 0 {
			return false // where the new one belongs depends on all the inputs
		}
		for _, decl := range b.memo.bySlices[key] {
			p.decls[decl] = true
		}
	}
	for _, s := range come {
		key := sliceKey{b.clusterOf(s.Cluster), s.Object.Namespace, s.Service}
		if !b.memo.described[s.Cluster] || len(of[key]) > 0 {
			return false
		}
		b.memo.point(key, s, true)
		of[key] = []*mesh.EndpointSlice{s}
		for _, decl := range b.memo.bySlices[key] {
			p.decls[decl] = true
		}
	}
	return true
}

// services makes anew the services of the declarations that are touched.
func (p *patch) services() bool {
	b := p.b
	hosts := map[string]bool{}
	for decl := range p.decls {
		old := b.joined[decl]
		j := b.join(b.draft, decl)
		if b.joined[decl] = j; j == old {
			continue
		}
		for _, h := range decl.Hosts {
			parts := b.draft.shared[h]
			if i := slices.IndexFunc(parts, func(x part) bool { return x.decl == decl }); i >= 0 {
				parts = slices.Clone(parts)
				parts[i].joined = j
				b.draft.shared[h] = parts
				hosts[h] = true
			} else if b.draft.decl[h] == decl {
				hosts[h] = true
			}
		}
	}
	for _, h := range slices.Sorted(maps.Keys(hosts)) {
		ends := b.joined[b.draft.decl[h]].endpoints
		if parts := b.draft.shared[h]; parts != nil {
			b.combined[h] = b.combine(h, parts)
			ends = b.combined[h].ends
		}
		old := p.snap.Service(h)
		if old == nil {
			return false
		}
		s := p.replace(old, ends)
		if s != old && s.Exported && !p.global(s) {
			return false
		}
	}
	slices.SortFunc(p.snap.Delta.Services, func(x, y mesh.ServiceDelta) int { return cmp.Compare(x.Now.Host, y.Now.Host) })
	return true
}

// replace puts a service with other endpoints in the place of old, unless they are the same.
func (p *patch) replace(old *mesh.Service, ends []*mesh.Endpoint) *mesh.Service {
	if slices.EqualFunc(old.Endpoints, ends, func(x, y *mesh.Endpoint) bool { return x == y || reflect.DeepEqual(x, y) }) {
		return old
	}
	s := *old
	s.Endpoints = ends
	if len(p.snap.Delta.Services) == 0 {
		p.snap.Services = slices.Clone(p.snap.Services)
	}
	i, _ := slices.BinarySearchFunc(p.snap.Services, old.Host, func(x *mesh.Service, host string) int { return cmp.Compare(x.Host, host) })
	p.snap.Services[i] = &s
	p.snap.Delta.Services = append(p.snap.Delta.Services, mesh.ServiceDelta{Was: old, Now: &s})
	p.checked = p.checked || s.Resolution == mesh.DNS || !alike(old.Endpoints, ends)
	return &s
}

// alike reports whether two lists of endpoints hold the same clusters, networks and labels: Config.Check reads no more.
func alike(a, b []*mesh.Endpoint) bool {
	within := func(a, b []*mesh.Endpoint) bool {
		for _, x := range a {
			if !slices.ContainsFunc(b, func(y *mesh.Endpoint) bool {
				return x == y || x.Cluster == y.Cluster && x.Network == y.Network && maps.Equal(x.Labels, y.Labels)
			}) {
				return false
			}
		}
		return true
	}
	return within(a, b) && within(b, a)
}

// global makes anew the ".global" service of an exported one. Hosts of single clusters and pods must stay the same.
func (p *patch) global(s *mesh.Service) bool {
	b, host := p.b, mesh.GlobalHost(s.Name, s.Namespace)
	if b.draft.decl[host] != nil {
		return true
	}
	was, old := b.merged[host], p.snap.Service(host)
	if was == nil || old == nil {
		return false
	}
	m := &merged{cluster: was.cluster, local: s, ends: s.Endpoints, imports: was.imports}
	m.merge(host)
	b.merged[host] = m
	g := p.replace(old, m.service.Endpoints)
	before, after := b.parts(b.draft, old), b.parts(b.draft, g)
	if len(before) != len(after) {
		return false
	}
	for _, x := range after {
		have := p.snap.Service(x.Host)
		if have == nil || !slices.ContainsFunc(before, func(y *mesh.Service) bool { return x.Host == y.Host }) {
			return false
		}
		p.replace(have, x.Endpoints)
	}
	return true
}

// handover joins VirtualServices with their delegates.
func (p *patch) handover() { p.b.handover = p.b.draft.apart(p.b.delegates) }

// problems finds those anew that may be others.
func (p *patch) problems() {
	b := p.b
	if found := b.draft.apart(b.checkNetworks); !slices.Equal(found, b.network) {
		b.network, p.checked = found, true
	}
	if !p.rules && !p.checked {
		p.snap.Problems = b.prev.Problems
		return
	}
	b.finish(p.snap)
}
