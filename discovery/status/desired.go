package status

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	mcsv1beta1 "sigs.k8s.io/mcs-api/pkg/apis/v1beta1"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// Names on what this package writes.
const (
	// labelManagedBy marks objects of ours; those without it are left alone.
	labelManagedBy = "app.kubernetes.io/managed-by"
	managedBy      = "isthmus"
	// sliceManagedBy is the value of endpointslice.kubernetes.io/managed-by.
	sliceManagedBy = "isthmus.io"
)

// desired is what the objects of the API should say. It follows from a Snapshot and its Problems alone.
type desired struct {
	// roots is the PEM of the trust domain's root certificates.
	roots   string
	imports map[types.NamespacedName]*mcsv1beta1.ServiceImport
	slices  map[types.NamespacedName]*discoveryv1.EndpointSlice
	exports map[types.NamespacedName][]metav1.Condition
	// problems of objects that can carry a condition of Istio's, by kind.
	problems map[string]map[types.NamespacedName][]mesh.Problem
	events   []mesh.Problem
	statuses map[resource]map[types.NamespacedName]*mesh.ObjectStatus
	objects  map[resource]map[types.NamespacedName]*mesh.WantedObject

	local *mesh.Cluster
	names map[types.NamespacedName]*name // what was made of each exported name
}

// compute derives what should be written. It is pure: equal inputs give equal results. before, which may be nil, is the
// result for an earlier Snapshot; what it was made of is compared by pointer, and saves work alone.
func compute(snap *mesh.Snapshot, problems []mesh.Problem, before *desired) *desired {
	d := &desired{
		roots: string(snap.Local.Roots), imports: map[types.NamespacedName]*mcsv1beta1.ServiceImport{}, slices: map[types.NamespacedName]*discoveryv1.EndpointSlice{},
		exports: map[types.NamespacedName][]metav1.Condition{}, problems: map[string]map[types.NamespacedName][]mesh.Problem{},
		local: snap.Local, names: map[types.NamespacedName]*name{}, statuses: statusesOf(snap), objects: objectsOf(snap),
	}
	if before == nil || before.local != snap.Local {
		before = &desired{}
	}
	for _, key := range exportedNames(snap) {
		n := newName(snap, key)
		if old := before.names[key]; old != nil && old.same(n) {
			n = old
		} else {
			n.make(snap, key)
		}
		d.names[key], d.imports[key] = n, n.object
		for _, s := range n.slices {
			d.slices[types.NamespacedName{Namespace: s.Namespace, Name: s.Name}] = s
		}
	}
	for _, x := range snap.Exports {
		d.exports[keyOf(x.Object)] = exportConditions(snap, x, d.names[keyOf(x.Object)])
	}
	for _, p := range deduplicated(problems) {
		if !localObject(snap, p.Object) {
			continue
		}
		key := keyOf(p.Object)
		if p.Object.Kind == "ServiceExport" && d.exports[key] == nil { // one that could not be read
			d.exports[key] = invalidExport(0, mcsv1beta1.ServiceExportConditionReason(p.Reason), text(p))
		}
		if _, ok := istioKinds[p.Object.Kind]; ok {
			if d.problems[p.Object.Kind] == nil {
				d.problems[p.Object.Kind] = map[types.NamespacedName][]mesh.Problem{}
			}
			d.problems[p.Object.Kind][key] = append(d.problems[p.Object.Kind][key], p)
		}
		d.events = append(d.events, p)
	}
	return d
}

// name is what one exported name was made of, and what came of it.
type name struct {
	global    *mesh.Service
	exporters []mesh.Exporter
	pods      bool // some of its pods have hosts of their own, which are looked at, too

	merged merged
	object *mcsv1beta1.ServiceImport
	slices []*discoveryv1.EndpointSlice
}

func newName(snap *mesh.Snapshot, key types.NamespacedName) *name {
	n := &name{global: snap.Service(mesh.GlobalHost(key.Name, key.Namespace)), exporters: snap.Exporters(key.Name, key.Namespace)}
	for _, e := range n.exporters {
		n.pods = n.pods || snap.Service(string(e.Cluster)+"."+mesh.GlobalHost(key.Name, key.Namespace)) != nil
	}
	return n
}

func (n *name) same(o *name) bool {
	return n.global == o.global && slices.Equal(n.exporters, o.exporters) && !n.pods && !o.pods
}

func (n *name) make(snap *mesh.Snapshot, key types.NamespacedName) {
	n.merged = merge(n.exporters)
	n.object = serviceImport(snap, key, n.merged)
	n.slices = endpointSlices(snap, key, n.exporters)
}

// exportedNames lists what the local cluster or any peer exports, each once.
func exportedNames(snap *mesh.Snapshot) []types.NamespacedName {
	seen := map[types.NamespacedName]bool{}
	for _, s := range snap.Services {
		if s.Exported && s.Host == mesh.LocalHost(s.Name, s.Namespace) {
			seen[types.NamespacedName{Namespace: s.Namespace, Name: s.Name}] = true
		}
	}
	for _, i := range snap.Imports {
		seen[types.NamespacedName{Namespace: i.Namespace, Name: i.Name}] = true
	}
	return slices.SortedFunc(maps.Keys(seen), compareKeys)
}

func compareKeys(a, b types.NamespacedName) int {
	return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
}

// serviceImport is the object that stands for one name in every cluster that has its namespace.
func serviceImport(snap *mesh.Snapshot, key types.NamespacedName, m merged) *mcsv1beta1.ServiceImport {
	out := &mcsv1beta1.ServiceImport{
		TypeMeta:   metav1.TypeMeta{Kind: mcsv1beta1.ServiceImportKindName},
		ObjectMeta: metav1.ObjectMeta{Namespace: key.Namespace, Name: key.Name, Labels: map[string]string{}},
		Spec:       mcsv1beta1.ServiceImportSpec{Type: mcsv1beta1.ServiceImportType(typeOf(&m.facts)), Ports: []mcsv1beta1.ServicePort{}},
	}
	maps.Copy(out.Labels, m.facts.Labels)
	out.Labels[labelManagedBy] = managedBy
	if len(m.facts.Annotations) > 0 {
		out.Annotations = maps.Clone(m.facts.Annotations)
	}
	for _, p := range importPorts(snap, key, m) {
		port := mcsv1beta1.ServicePort{Name: p.Name, Port: int32(p.Number), Protocol: corev1.Protocol(p.Protocol)}
		if p.AppProtocol != "" {
			port.AppProtocol = &p.AppProtocol
		}
		out.Spec.Ports = append(out.Spec.Ports, port)
	}
	if !m.facts.Headless {
		virtual(snap, key, &out.Spec)
	}
	out.Spec.SessionAffinity = corev1.ServiceAffinity(affinityOf(&m.facts))
	if n := int32(m.facts.AffinitySeconds); n > 0 && out.Spec.SessionAffinity == corev1.ServiceAffinityClientIP {
		out.Spec.SessionAffinityConfig = &corev1.SessionAffinityConfig{ClientIP: &corev1.ClientIPConfig{TimeoutSeconds: &n}}
	}
	if p := corev1.ServiceInternalTrafficPolicy(m.facts.InternalTrafficPolicy); p != "" {
		out.Spec.InternalTrafficPolicy = &p
	}
	if d := m.facts.TrafficDistribution; d != "" {
		out.Spec.TrafficDistribution = &d
	}
	for _, e := range m.exporters {
		out.Status.Clusters = append(out.Status.Clusters, mcsv1beta1.ClusterStatus{Cluster: string(e.Cluster)})
	}
	slices.SortFunc(out.Status.Clusters, func(a, b mcsv1beta1.ClusterStatus) int { return cmp.Compare(a.Cluster, b.Cluster) })
	out.Status.EndpointSliceObjects = mcsv1beta1.EndpointSliceObjectsPresent
	out.Status.Conditions = importConditions(out.Spec.Type, out.Spec.IPs)
	return out
}

// virtual fills in the addresses under which clients of this cluster call the name.
func virtual(snap *mesh.Snapshot, key types.NamespacedName, spec *mcsv1beta1.ServiceImportSpec) {
	svc := snap.Service(mesh.GlobalHost(key.Name, key.Namespace))
	if svc == nil {
		return
	}
	for _, family := range []struct {
		is  func(netip.Addr) bool
		has corev1.IPFamily
	}{{netip.Addr.Is4, corev1.IPv4Protocol}, {netip.Addr.Is6, corev1.IPv6Protocol}} {
		if i := slices.IndexFunc(svc.VIPs, family.is); i >= 0 {
			spec.IPs = append(spec.IPs, svc.VIPs[i].String())
			spec.IPFamilies = append(spec.IPFamilies, family.has)
		}
	}
}

// importPorts are the merged ports or, where no exporter tells its own, those that traffic has.
func importPorts(snap *mesh.Snapshot, key types.NamespacedName, m merged) []mesh.ExportedPort {
	if len(m.facts.Ports) > 0 {
		return m.facts.Ports
	}
	var out []mesh.ExportedPort
	if svc := snap.Service(mesh.GlobalHost(key.Name, key.Namespace)); svc != nil {
		for _, p := range svc.Ports {
			protocol := corev1.ProtocolTCP
			if p.Protocol == mesh.UDP {
				protocol = corev1.ProtocolUDP
			}
			out = append(out, mesh.ExportedPort{Name: p.Name, Number: p.Number, Protocol: string(protocol)})
		}
	}
	return out
}

// localObject reports whether the object is in the local cluster's API: others report their own.
func localObject(snap *mesh.Snapshot, o mesh.ObjectRef) bool {
	return o.Namespace != "" && o.Name != "" && (o.Source == "" || o.Source == "cluster "+string(snap.Local.ID))
}

// text is a Problem without its object, for conditions and Events.
func text(p mesh.Problem) string {
	s := p.Message
	if p.Field != "" {
		s = p.Field + ": " + s
	}
	if p.Remedy != "" {
		s += "; " + p.Remedy
	}
	if len(s) > 1000 {
		s = s[:997] + "..."
	}
	return s
}
