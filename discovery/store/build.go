package store

import (
	"cmp"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/dns/vip"
)

func compareKeys(a, b inputKey) int {
	return cmp.Or(strings.Compare(a.source, b.source), strings.Compare(a.key, b.key))
}

// builder makes each Snapshot from the inputs and the Snapshot before. What it remembers only saves work: the result
// is the same as that of a builder that remembers nothing but held addresses.
type builder struct {
	cfg  Config
	prev *mesh.Snapshot
	held map[string][]netip.Addr
	err  error // reading the memory failed

	index     indexes // of prev.Workloads
	places    *places // the last ones
	placed    map[*mesh.Workload]*mesh.Workload
	combined  map[string]*combined          // services of several clusters by host
	joined    map[*mesh.ServiceDecl]*joined // endpoints of each declaration
	merged    map[string]*merged            // ".global" services by host
	assigned  *assignment                   // the last one
	gone      map[string]time.Time          // since when hosts of held want nothing
	delegated map[*mesh.VirtualService]*delegation
	derived   *mesh.Derived

	// What the last Snapshot was made of, for the short path (patch.go). A nil draft: there is none, build anew.
	draft                   *draft
	inputs                  []mesh.Input // until the memo is made of them
	memo                    *memo
	configured              *mesh.Cluster
	missing                 []string
	base, network, handover []mesh.Problem // without those of Check; those of networks and of delegates are apart
	short                   int            // Snapshots made by the short path
}

func newBuilder(cfg Config) *builder {
	held, err := cfg.Memory.Load()
	return &builder{cfg: cfg, prev: &mesh.Snapshot{}, held: held, err: err, places: &places{}}
}

// draft is a Snapshot in the making.
type draft struct {
	*mesh.Snapshot
	decls   []*mesh.ServiceDecl
	slices  map[sliceKey][]*mesh.EndpointSlice // by cluster, namespace and name of the Service
	exports []*mesh.Export
	byHost  map[string]*mesh.Service
	decl    map[string]*mesh.ServiceDecl // by host; of several clusters the first
	claims  map[string][]vip.Claim       // by ".global" host
	shared  map[string][]part            // hosts that other clusters declare
	routes  []*mesh.VirtualService       // as declared, before delegates
	// podRanges of the local cluster
	podRanges []netip.Prefix
}

type objectKey struct{ kind, namespace, name string }

// sliceKey is the Service of an EndpointSlice.
type sliceKey struct {
	cluster         mesh.ClusterID
	namespace, name string
}

// build makes a Snapshot from nothing but the inputs. It is a pure function of the inputs, the Snapshot before and the held addresses, but for keeping new addresses.
func (b *builder) build(inputs []mesh.Input, missing []string) *mesh.Snapshot {
	d := &draft{
		Snapshot: &mesh.Snapshot{Revision: b.prev.Revision + 1, Local: b.cfg.Local},
		slices:   map[sliceKey][]*mesh.EndpointSlice{}, claims: map[string][]vip.Claim{},
		byHost: make(map[string]*mesh.Service, len(b.prev.Services)), decl: make(map[string]*mesh.ServiceDecl, len(b.prev.Services)),
	}
	for _, name := range missing {
		d.problem(mesh.Problem{Object: mesh.ObjectRef{Kind: "Source", Name: name}, Reason: "NotSynced", Message: "has not reported yet; its objects are missing"})
	}
	if b.err != nil {
		d.problem(mesh.Problem{Object: mesh.ObjectRef{Kind: "Store", Name: "virtual-addresses"}, Reason: "Unreadable", Message: b.err.Error(), Remedy: "remove the file; addresses are derived anew"})
	}
	d.clusters(inputs)
	d.collect(inputs)
	d.meshConfig(inputs)
	d.routes = d.VirtualServices
	b.handover = d.apart(b.delegates)
	if p := d.networks(inputs); !reflect.DeepEqual(p, b.places) {
		b.places, b.joined = p, nil // every endpoint may be on another network
	}
	b.place(d)
	b.network = d.apart(b.checkNetworks)
	if b.index == nil || !slices.Equal(d.Workloads, b.prev.Workloads) {
		b.index = newIndexes(d.Workloads, b.clusterOf)
	}
	b.declare(d)
	b.reach(d)
	b.checkRanges(d)
	b.export(d)
	d.Exports = d.exports
	b.global(d)
	b.addresses(d)
	b.derive(d)
	b.share(d)
	b.base = d.Problems
	b.finish(d.Snapshot)
	d.byHost, d.exports, d.claims = nil, nil, nil
	b.prev, b.draft, b.inputs, b.memo, b.configured, b.missing = d.Snapshot, d, inputs, nil, b.cfg.Local, missing
	return d.Snapshot
}

// apart returns the problems that f adds, and takes them out of the draft.
func (d *draft) apart(f func(*draft)) []mesh.Problem {
	kept := d.Problems
	d.Problems = nil
	f(d)
	found := d.Problems
	d.Problems = kept
	return found
}

// finish completes a Snapshot with everything that is wrong in it.
func (b *builder) finish(snap *mesh.Snapshot) {
	problems := slices.Concat(b.base, b.network, b.handover, b.derivedProblems())
	if b.cfg.Check != nil {
		problems = append(problems, b.cfg.Check(snap)...)
	}
	slices.SortStableFunc(problems, func(x, y mesh.Problem) int { return strings.Compare(x.String(), y.String()) })
	snap.Problems = slices.Compact(problems)
}

func (d *draft) problem(p mesh.Problem) { d.Problems = append(d.Problems, p) }

// collect gathers the inputs, refusing what is said twice.
func (d *draft) collect(inputs []mesh.Input) {
	byCluster := map[mesh.ClusterID]map[objectKey]string{} // object -> source
	firstIn := func(cluster mesh.ClusterID, o mesh.ObjectRef) bool {
		cluster = cmp.Or(cluster, d.Local.ID)
		seen := byCluster[cluster]
		if seen == nil {
			seen = map[objectKey]string{}
			byCluster[cluster] = seen
		}
		id := objectKey{o.Kind, o.Namespace, o.Name}
		if other, twice := seen[id]; twice && other != o.Source { // one object may give several values
			d.problem(mesh.Problem{Object: o, Reason: "Duplicate", Message: "is also declared at " + other, Remedy: "remove one of the two"})
			return false
		}
		seen[id] = o.Source
		return true
	}
	first := func(o mesh.ObjectRef) bool { return firstIn("", o) }
	for _, in := range inputs {
		d.Problems = append(d.Problems, in.Problems...)
		for _, s := range in.Slices {
			if firstIn(s.Cluster, s.Object) {
				key := sliceKey{cmp.Or(s.Cluster, d.Local.ID), s.Object.Namespace, s.Service}
				d.slices[key] = append(d.slices[key], s)
			}
		}
		d.decls = append(d.decls, keep(in.Services, func(x *mesh.ServiceDecl) bool { return firstIn(x.Cluster, x.Object) })...)
		d.Workloads = append(d.Workloads, keep(in.Workloads, func(x *mesh.Workload) bool { return firstIn(x.Cluster, x.Object) })...)
		d.exports = append(d.exports, keep(in.Exports, func(x *mesh.Export) bool { return first(x.Object) })...)
		for _, k := range carried {
			k.collect(d.Snapshot, &in, first)
		}
		d.Imports = append(d.Imports, in.Imports...)
	}
	if d.managed() {
		slices.SortStableFunc(d.decls, func(a, b *mesh.ServiceDecl) int { return d.localFirst(a.Cluster, b.Cluster) })
		slices.SortStableFunc(d.Workloads, func(a, b *mesh.Workload) int { return d.localFirst(a.Cluster, b.Cluster) })
	}
	byObject(d.decls, func(x *mesh.ServiceDecl) *mesh.ObjectRef { return &x.Object })
	byObject(d.Workloads, func(x *mesh.Workload) *mesh.ObjectRef { return &x.Object })
	byObject(d.exports, func(x *mesh.Export) *mesh.ObjectRef { return &x.Object })
	for _, k := range carried {
		k.sort(d.Snapshot)
	}
	slices.SortFunc(d.Imports, func(a, b *mesh.Import) int {
		return cmp.Or(strings.Compare(a.Namespace, b.Namespace), strings.Compare(a.Name, b.Name), cmp.Compare(a.Cluster, b.Cluster))
	})
}

// localFirst orders clusters: the local one, then by name.
func (d *draft) localFirst(a, b mesh.ClusterID) int {
	rank := func(id mesh.ClusterID) mesh.ClusterID {
		if id == d.Local.ID {
			return ""
		}
		return id
	}
	return cmp.Compare(rank(a), rank(b))
}

func keep[T any](xs []T, ok func(T) bool) []T {
	out := make([]T, 0, len(xs))
	for _, x := range xs {
		if ok(x) {
			out = append(out, x)
		}
	}
	return out
}

// byObject sorts stably, so that values of one object keep their order.
func byObject[T any](xs []T, ref func(T) *mesh.ObjectRef) {
	slices.SortStableFunc(xs, func(a, b T) int { return compareObjects(ref(a), ref(b)) })
}

// export marks the local services that ServiceExports and labels name. Only the local cluster's objects count.
func (b *builder) export(d *draft) {
	for _, decl := range d.decls {
		if decl.Export && exportable(decl) && b.clusterOf(decl.Cluster) == b.cfg.Local.ID {
			d.markExported(decl.Hosts, decl.ExportTo)
			d.stateFacts(decl, nil)
		}
	}
	for _, x := range d.exports {
		host := mesh.LocalHost(x.Object.Name, x.Object.Namespace)
		if decl := d.decl[host]; decl != nil && !exportable(decl) {
			d.problem(mesh.Problem{Object: x.Object, Reason: "InvalidServiceType", Message: decl.Object.String() + " only names a host outside; it is not exported", Remedy: "export a Service that has endpoints"})
			continue
		}
		if d.byHost[host] == nil {
			d.problem(mesh.Problem{Object: x.Object, Reason: "NoSuchService", Message: "there is no Service " + x.Object.Namespace + "/" + x.Object.Name + " to export", Remedy: "create the Service or remove the ServiceExport"})
			continue
		}
		d.markExported([]string{host}, x.ExportTo)
		d.stateFacts(d.decl[host], x)
	}
}

func (d *draft) markExported(hosts []string, to []mesh.ClusterID) {
	for _, h := range hosts {
		if s := d.byHost[h]; s != nil && h == mesh.LocalHost(s.Name, s.Namespace) {
			s.Exported, s.ExportTo = true, slices.Sorted(slices.Values(to))
		}
	}
}

// share replaces every value that equals the one in the Snapshot before by that one.
func (b *builder) share(d *draft) {
	for i, s := range d.Services {
		if old := b.prev.Service(s.Host); old != nil && equalService(old, s) {
			d.Services[i] = old
		}
	}
	for i, n := range d.Networks {
		if old := b.prev.Network(n.ID); old != nil && equalNetwork(old, n) {
			d.Networks[i] = old
		}
	}
	for i, c := range d.Clusters {
		if old := b.prev.Cluster(c.ID); old != nil && equalCluster(old, c) {
			d.Clusters[i] = old
		}
	}
}
