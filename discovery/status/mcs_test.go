package status

import (
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"pgregory.net/rapid"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

var epoch = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

func at(seconds int) time.Time { return epoch.Add(time.Duration(seconds) * time.Second) }

// facts of an ordinary Service that was exported at that second.
func facts(second int, change ...func(*mesh.Facts)) *mesh.Facts {
	f := &mesh.Facts{Created: at(second), Ports: []mesh.ExportedPort{{Name: "http", Number: 9080, Protocol: "TCP"}}}
	for _, c := range change {
		c(f)
	}
	return f
}

// world is a Snapshot of amber with the exports of reviews.shop by each cluster; amber's own is local.
func world(exports map[mesh.ClusterID]*mesh.Facts) *mesh.Snapshot {
	snap := &mesh.Snapshot{Local: &mesh.Cluster{ID: "amber", Network: "amber", Roots: []byte("-----BEGIN CERTIFICATE-----\n")}}
	global := &mesh.Service{Host: "reviews.shop.global", Name: "reviews", Namespace: "shop", Global: true, VIPs: addrs("240.0.0.7", "fd69::7"),
		Ports: []mesh.Port{{Name: "http", Number: 9080, Protocol: mesh.HTTP}}}
	for id, f := range exports {
		e := &mesh.Endpoint{Workload: "reviews-" + string(id), Namespace: "shop", Cluster: id, Network: mesh.NetworkID(id), Ports: map[uint32]uint32{9080: 9080}, TLS: true, Ready: true}
		if id == "amber" {
			e.Address = "10.0.0.1"
			snap.Exports = []*mesh.Export{{Object: ref("ServiceExport", "reviews"), Generation: 3}}
			snap.Services = append(snap.Services, &mesh.Service{Host: "reviews.shop.svc.cluster.local", Name: "reviews", Namespace: "shop", Object: ref("Service", "reviews"),
				Exported: true, Facts: f, Endpoints: []*mesh.Endpoint{e}})
		} else {
			snap.Imports = append(snap.Imports, &mesh.Import{Cluster: id, Namespace: "shop", Name: "reviews", Facts: f, Endpoints: []*mesh.Endpoint{e}})
		}
		global.Endpoints = append(global.Endpoints, e)
	}
	if len(exports) > 0 {
		snap.Services = append(snap.Services, global)
	}
	slices.SortFunc(snap.Services, func(a, b *mesh.Service) int { return strings.Compare(a.Host, b.Host) })
	slices.SortFunc(snap.Imports, func(a, b *mesh.Import) int { return strings.Compare(string(a.Cluster), string(b.Cluster)) })
	slices.SortFunc(global.Endpoints, func(a, b *mesh.Endpoint) int { return strings.Compare(string(a.Cluster), string(b.Cluster)) })
	return snap
}

func ref(kind, name string) mesh.ObjectRef {
	return mesh.ObjectRef{Kind: kind, Namespace: "shop", Name: name}
}

func show(cs []metav1.Condition) string {
	var out []string
	for _, c := range cs {
		out = append(out, strings.TrimSpace(fmt.Sprintf("%s=%s %s %s", c.Type, c.Status, c.Reason, c.Message)))
	}
	return strings.Join(out, "\n")
}

// conditionsOf are those of the one ServiceExport.
func conditionsOf(snap *mesh.Snapshot) []metav1.Condition {
	return compute(snap, nil, nil).exports[keyOf(snap.Exports[0].Object)]
}

func TestConflicts(t *testing.T) {
	port := func(name string, n uint32, protocol string) mesh.ExportedPort {
		return mesh.ExportedPort{Name: name, Number: n, Protocol: protocol}
	}
	for _, c := range []struct {
		name         string
		amber, birch *mesh.Facts
		reason       string
		message      string // part of it
		ports        string // of the import
	}{
		{"alike", facts(1), facts(2), "NoConflicts", "", "http 9080/TCP"},
		{"a peer that tells nothing", facts(1), nil, "NoConflicts", "", "http 9080/TCP"},
		{"order of ports is no difference",
			facts(1, func(f *mesh.Facts) { f.Ports = []mesh.ExportedPort{port("a", 1, "TCP"), port("b", 2, "TCP")} }),
			facts(2, func(f *mesh.Facts) { f.Ports = []mesh.ExportedPort{port("b", 2, "TCP"), port("a", 1, "TCP")} }), "NoConflicts", "", "a 1/TCP, b 2/TCP"},
		{"more ports add up", facts(1), facts(2, func(f *mesh.Facts) { f.Ports = append(f.Ports, port("sctp", 142, "SCTP")) }),
			"PortConflict", "cluster amber (of 2026-01-02T03:04:06Z); Port of birch: http 9080/TCP, sctp 142/SCTP instead of http 9080/TCP", "http 9080/TCP, sctp 142/SCTP"},
		{"one name, two numbers", facts(1), facts(2, func(f *mesh.Facts) { f.Ports[0].Number = 9081 }), "PortConflict", "http 9081/TCP instead of http 9080/TCP", "http 9080/TCP"},
		{"one number, two names", facts(1), facts(2, func(f *mesh.Facts) { f.Ports[0].Name = "web" }), "PortConflict", "web 9080/TCP instead of", "http 9080/TCP"},
		{"one number, two protocols", facts(1), facts(2, func(f *mesh.Facts) { f.Ports = []mesh.ExportedPort{port("udp", 9080, "UDP")} }),
			"PortConflict", "", "http 9080/TCP, udp 9080/UDP"},
		{"application protocol", facts(1), facts(2, func(f *mesh.Facts) { f.Ports[0].AppProtocol = "grpc" }), "PortConflict", "http 9080/TCP (grpc)", "http 9080/TCP"},
		{"the peer's is older", facts(5, func(f *mesh.Facts) { f.Ports[0].Number = 9081 }), facts(2), "PortConflict", "that of cluster birch", "http 9080/TCP"},
		{"of one age the name decides", facts(1, func(f *mesh.Facts) { f.Ports[0].Number = 9081 }), facts(1), "PortConflict", "that of cluster amber", "http 9081/TCP"},
		{"an unknown age is the youngest", &mesh.Facts{Ports: []mesh.ExportedPort{port("http", 9081, "TCP")}}, facts(9), "PortConflict", "that of cluster birch", "http 9080/TCP"},
		{"type", facts(1), facts(2, func(f *mesh.Facts) { f.Headless = true }), "TypeConflict", "Headless instead of ClusterSetIP", "http 9080/TCP"},
		{"affinity", facts(1), facts(2, func(f *mesh.Facts) { f.SessionAffinity, f.AffinitySeconds = "ClientIP", 10 }), "SessionAffinityConflict", "ClientIP instead of None", "http 9080/TCP"},
		{"affinity said and not said", facts(1), facts(2, func(f *mesh.Facts) { f.SessionAffinity = "None" }), "NoConflicts", "", "http 9080/TCP"},
		{"affinity seconds", facts(1, func(f *mesh.Facts) { f.SessionAffinity, f.AffinitySeconds = "ClientIP", 20 }),
			facts(2, func(f *mesh.Facts) { f.SessionAffinity, f.AffinitySeconds = "ClientIP", 10 }), "SessionAffinityConfigConflict", "10 s instead of 20 s", "http 9080/TCP"},
		{"internal traffic", facts(1), facts(2, func(f *mesh.Facts) { f.InternalTrafficPolicy = "Local" }), "InternalTrafficPolicyConflict", "Local instead of Cluster", "http 9080/TCP"},
		{"distribution", facts(1), facts(2, func(f *mesh.Facts) { f.TrafficDistribution = "PreferClose" }), "TrafficDistributionConflict", "PreferClose instead of none", "http 9080/TCP"},
		{"labels", facts(1, func(f *mesh.Facts) { f.Labels = map[string]string{"a": "1"} }), facts(2), "LabelsConflict", "none instead of a=1", "http 9080/TCP"},
		{"annotations", facts(1), facts(2, func(f *mesh.Facts) { f.Annotations = map[string]string{"a": "1"} }), "AnnotationsConflict", "a=1 instead of none", "http 9080/TCP"},
		{"several", facts(1), facts(2, func(f *mesh.Facts) { f.Headless, f.Ports[0].Number = true, 1 }), "PortConflict,TypeConflict", "", "http 9080/TCP"},
	} {
		t.Run(c.name, func(t *testing.T) {
			snap := world(map[mesh.ClusterID]*mesh.Facts{"amber": c.amber, "birch": c.birch})
			got := conditionsOf(snap)[0]
			wantStatus := metav1.ConditionTrue
			if c.reason == "NoConflicts" {
				wantStatus = metav1.ConditionFalse
			}
			if got.Type != "Conflict" || got.Status != wantStatus || got.Reason != c.reason || !strings.Contains(got.Message, c.message) {
				t.Errorf("condition is\n%s\nwant %s with %q", show([]metav1.Condition{got}), c.reason, c.message)
			}
			var ports []string
			for _, p := range compute(snap, nil, nil).imports[types.NamespacedName{Namespace: "shop", Name: "reviews"}].Spec.Ports {
				ports = append(ports, fmt.Sprintf("%s %d/%s", p.Name, p.Port, p.Protocol))
			}
			slices.Sort(ports)
			if got := strings.Join(ports, ", "); got != c.ports {
				t.Errorf("ports are %s, want %s", got, c.ports)
			}
		})
	}
}

// TestEveryClusterSettlesAlike: whoever looks, and in whatever order exports became known, the import is the same.
func TestEveryClusterSettlesAlike(t *testing.T) {
	names := []mesh.ClusterID{"amber", "birch", "cedar", "dune"}
	rapid.Check(t, func(t *rapid.T) {
		all := map[mesh.ClusterID]*mesh.Facts{}
		for _, id := range names {
			f := &mesh.Facts{Headless: rapid.Bool().Draw(t, "headless"), SessionAffinity: rapid.SampledFrom([]string{"", "None", "ClientIP"}).Draw(t, "affinity")}
			if s := rapid.IntRange(0, 2).Draw(t, "age"); s > 0 {
				f.Created = at(s)
			}
			for n := range rapid.IntRange(1, 3).Draw(t, "ports") {
				f.Ports = append(f.Ports, mesh.ExportedPort{Name: rapid.SampledFrom([]string{"", "a", "b", "c"}).Draw(t, "name"), Number: uint32(rapid.IntRange(1, 3).Draw(t, "number") + n), Protocol: rapid.SampledFrom([]string{"TCP", "UDP"}).Draw(t, "protocol")})
			}
			all[id] = f
		}
		var first *merged
		for _, viewer := range names {
			// The viewer is local, the others are peers.
			snap := world(map[mesh.ClusterID]*mesh.Facts{})
			snap.Local = &mesh.Cluster{ID: viewer}
			for _, id := range rapid.Permutation(names).Draw(t, "order") {
				if id == viewer {
					snap.Services = []*mesh.Service{{Host: "reviews.shop.svc.cluster.local", Name: "reviews", Namespace: "shop", Exported: true, Facts: all[id]}}
				} else {
					snap.Imports = append(snap.Imports, &mesh.Import{Cluster: id, Namespace: "shop", Name: "reviews", Facts: all[id]})
				}
			}
			m := merge(snap.Exporters("reviews", "shop"))
			if first == nil {
				first = &m
				if m.exporters[0].Facts.Created.IsZero() && slices.ContainsFunc(names, func(id mesh.ClusterID) bool { return !all[id].Created.IsZero() }) {
					t.Fatal("an export of unknown age wins over a known one")
				}
			} else if !reflect.DeepEqual(*first, m) {
				t.Fatalf("%s settles\n%+v\nand amber\n%+v", viewer, m, *first)
			}
		}
	})
}

func TestExportConditions(t *testing.T) {
	mod := func(change func(*mesh.Snapshot)) *mesh.Snapshot {
		snap := world(map[mesh.ClusterID]*mesh.Facts{"amber": facts(1)})
		change(snap)
		return snap
	}
	local := func(s *mesh.Snapshot) *mesh.Service { return s.Service("reviews.shop.svc.cluster.local") }
	for _, c := range []struct {
		name string
		snap *mesh.Snapshot
		want string
	}{
		{"exported", mod(func(*mesh.Snapshot) {}), "Conflict=False NoConflicts\nReady=True Exported told to every cluster of the mesh\nValid=True Valid"},
		{"to some", mod(func(s *mesh.Snapshot) {
			s.Exports[0].ExportTo, local(s).ExportTo = []mesh.ClusterID{"cedar", "birch"}, []mesh.ClusterID{"birch", "cedar"}
		}), "Conflict=False NoConflicts\nReady=True Exported told to birch, cedar\nValid=True Valid"},
		{"no endpoint yet", mod(func(s *mesh.Snapshot) { local(s).Endpoints = nil }), "Conflict=False NoConflicts\nReady=True Exported told to every cluster of the mesh\nValid=True Valid"},
		{"not in the mesh", mod(func(s *mesh.Snapshot) { local(s).Endpoints[0].TLS = false }),
			"Conflict=False NoConflicts\nReady=False Pending none of its 1 endpoints has a proxy, so no other cluster can reach one; label the namespace istio-injection=enabled and restart its pods\nValid=True Valid"},
		{"no service", mod(func(s *mesh.Snapshot) { s.Services = nil }),
			"Conflict=False NoConflicts\nReady=False Failed not exported: it is not valid\nValid=False NoService there is no Service shop/reviews; create it, or remove the ServiceExport"},
		{"external name", mod(func(s *mesh.Snapshot) { local(s).External, local(s).Exported = true, false }),
			"Conflict=False NoConflicts\nReady=False Failed not exported: it is not valid\nValid=False InvalidServiceType Service shop/reviews is an ExternalName; export a Service that has endpoints"},
	} {
		got := conditionsOf(c.snap)
		if show(got) != c.want {
			t.Errorf("%s:\n%s\nwant\n%s", c.name, show(got), c.want)
		}
		for _, x := range got {
			if x.ObservedGeneration != 3 {
				t.Errorf("%s: %s is of generation %d", c.name, x.Type, x.ObservedGeneration)
			}
		}
	}
	unread := mesh.Problem{Object: ref("ServiceExport", "broken"), Field: "metadata.annotations[isthmus.io/export-to]", Reason: "InvalidValue", Message: `"A" is not a cluster name; it is exported to none`, Remedy: "write cluster names"}
	d := compute(world(nil), []mesh.Problem{unread, unread}, nil)
	if got := show(d.exports[keyOf(unread.Object)][2:]); got != `Valid=False InvalidValue metadata.annotations[isthmus.io/export-to]: "A" is not a cluster name; it is exported to none; write cluster names` {
		t.Errorf("a ServiceExport that cannot be read: %s", got)
	}
	if len(d.events) != 1 {
		t.Errorf("%d events of one problem", len(d.events))
	}
}

func TestServiceImport(t *testing.T) {
	key := types.NamespacedName{Namespace: "shop", Name: "reviews"}
	get := func(exports map[mesh.ClusterID]*mesh.Facts) *desired { return compute(world(exports), nil, nil) }
	d := get(map[mesh.ClusterID]*mesh.Facts{
		"birch": facts(1, func(f *mesh.Facts) {
			f.SessionAffinity, f.AffinitySeconds, f.TrafficDistribution, f.InternalTrafficPolicy = "ClientIP", 10, "PreferClose", "Cluster"
			f.Labels, f.Annotations = map[string]string{"team": "a", labelManagedBy: "them"}, map[string]string{"note": "b"}
		}),
		"amber": facts(2),
	})
	i := d.imports[key]
	if i.Spec.Type != "ClusterSetIP" || !slices.Equal(i.Spec.IPs, []string{"240.0.0.7", "fd69::7"}) || !slices.Equal(i.Spec.IPFamilies, []corev1.IPFamily{"IPv4", "IPv6"}) {
		t.Errorf("type and addresses: %+v", i.Spec)
	}
	if i.Spec.SessionAffinity != "ClientIP" || *i.Spec.SessionAffinityConfig.ClientIP.TimeoutSeconds != 10 || *i.Spec.TrafficDistribution != "PreferClose" || *i.Spec.InternalTrafficPolicy != "Cluster" {
		t.Errorf("what the oldest says: %+v", i.Spec)
	}
	if i.Labels["team"] != "a" || i.Labels[labelManagedBy] != managedBy || i.Annotations["note"] != "b" {
		t.Errorf("labels %v, annotations %v", i.Labels, i.Annotations)
	}
	if c := i.Status.Clusters; len(c) != 2 || c[0].Cluster != "amber" || c[1].Cluster != "birch" {
		t.Errorf("clusters: %v", c)
	}
	if got := show(i.Status.Conditions); got != "Ready=True Ready" {
		t.Errorf("conditions: %s", got)
	}
	if len(d.slices) != 2 {
		t.Fatalf("%d slices", len(d.slices))
	}
	for _, s := range d.slices {
		switch s.Labels["multicluster.kubernetes.io/source-cluster"] {
		case "amber":
			if len(s.Endpoints) != 1 || s.Endpoints[0].Addresses[0] != "10.0.0.1" || s.Annotations != nil {
				t.Errorf("amber: %+v", s)
			}
		case "birch": // another network
			if len(s.Endpoints) != 0 || s.Annotations[annotationBehind] != "1" {
				t.Errorf("birch: %+v", s)
			}
		}
		if s.Labels["kubernetes.io/service-name"] != "" || s.Labels["endpointslice.kubernetes.io/managed-by"] != sliceManagedBy || s.Labels["multicluster.kubernetes.io/service-name"] != "reviews" {
			t.Errorf("labels: %v", s.Labels)
		}
	}
	if i := get(map[mesh.ClusterID]*mesh.Facts{"birch": facts(1, func(f *mesh.Facts) { f.Headless = true })}).imports[key]; i.Spec.Type != "Headless" || i.Spec.IPs != nil {
		t.Errorf("headless: %+v", i.Spec)
	}
	if i := get(map[mesh.ClusterID]*mesh.Facts{"birch": nil}).imports[key]; len(i.Spec.Ports) != 1 || i.Spec.Ports[0].Port != 9080 {
		t.Errorf("of a cluster that tells nothing: %+v", i.Spec)
	}
	if d := get(nil); len(d.imports) != 0 || len(d.slices) != 0 {
		t.Error("imports of nothing")
	}
}

func TestSettleConditions(t *testing.T) {
	old, now := metav1.NewTime(at(1)), metav1.NewTime(at(9))
	have := []metav1.Condition{{Type: "Theirs", Status: "True", Reason: "X"}, {Type: "Valid", Status: "True", Reason: "Valid", ObservedGeneration: 1, LastTransitionTime: old}}
	want := func(status metav1.ConditionStatus, reason string, generation int64) []metav1.Condition {
		return []metav1.Condition{{Type: "Valid", Status: status, Reason: reason, ObservedGeneration: generation}}
	}
	for _, c := range []struct {
		name    string
		want    []metav1.Condition
		changed bool
		time    metav1.Time
	}{
		{"the same", want("True", "Valid", 1), false, old},
		{"a new generation", want("True", "Valid", 2), true, old},
		{"another reason", want("True", "Good", 1), true, old},
		{"another status", want("False", "NoService", 1), true, now},
		{"the object's generation", want("True", "Valid", 0), true, old},
	} {
		got, changed := settle(have, c.want, 7, now)
		if changed != c.changed || len(got) != 2 || got[0].Type != "Theirs" || got[1].LastTransitionTime != c.time {
			t.Errorf("%s: %v %v", c.name, got, changed)
		}
		if c.want[0].ObservedGeneration == 0 && got[1].ObservedGeneration != 7 {
			t.Errorf("%s: generation %d", c.name, got[1].ObservedGeneration)
		}
		if again, changed := settle(got, c.want, 7, metav1.NewTime(at(20))); changed || !reflect.DeepEqual(again, got) {
			t.Errorf("%s: not settled", c.name)
		}
	}
}

// TestComputeAgain: what an earlier result saves changes nothing but work.
func TestComputeAgain(t *testing.T) {
	key := types.NamespacedName{Namespace: "shop", Name: "reviews"}
	first := world(map[mesh.ClusterID]*mesh.Facts{"amber": facts(1), "birch": facts(2)})
	a := compute(first, nil, nil)
	if b := compute(first, nil, a); b.imports[key] != a.imports[key] {
		t.Error("the same Snapshot made another import")
	}
	rapid.Check(t, func(t *rapid.T) {
		next := world(map[mesh.ClusterID]*mesh.Facts{"amber": facts(1), "birch": facts(2)})
		next.Local = first.Local
		for i, s := range next.Services { // unchanged values keep their pointers
			if rapid.Bool().Draw(t, "same") {
				next.Services[i] = first.Services[i]
			} else if s.Global {
				s.VIPs = addrs("240.0.0.9")
			}
		}
		if rapid.Bool().Draw(t, "same imports") {
			next.Imports = first.Imports
		} else {
			next.Imports[0].Facts.Headless = true
			next.Imports[0].Facts.Created = at(0)
		}
		if rapid.Bool().Draw(t, "pods") {
			next.Services = append(next.Services, &mesh.Service{Host: "birch.reviews.shop.global"}, &mesh.Service{Host: "reviews-birch.birch.reviews.shop.global", VIPs: addrs("240.0.0.8")})
			slices.SortFunc(next.Services, func(a, b *mesh.Service) int { return strings.Compare(a.Host, b.Host) })
		}
		fresh, again := compute(next, nil, nil), compute(next, nil, a)
		if !reflect.DeepEqual(fresh.imports, again.imports) || !reflect.DeepEqual(fresh.slices, again.slices) || !reflect.DeepEqual(fresh.exports, again.exports) {
			t.Fatalf("anew\n%+v\nand after an earlier one\n%+v", fresh.imports[key], again.imports[key])
		}
	})
}

func BenchmarkCompute(b *testing.B) {
	snap := &mesh.Snapshot{Local: &mesh.Cluster{ID: "amber", Network: "amber"}}
	for i := range 2000 {
		name := fmt.Sprintf("s%04d", i)
		global := &mesh.Service{Host: mesh.GlobalHost(name, "shop"), Name: name, Namespace: "shop", Global: true, VIPs: addrs("240.0.0.7"), Ports: []mesh.Port{{Number: 80}}}
		for _, id := range []mesh.ClusterID{"birch", "cedar"} {
			imp := &mesh.Import{Cluster: id, Namespace: "shop", Name: name, Facts: facts(i)}
			for j := range 5 {
				global.Endpoints = append(global.Endpoints, &mesh.Endpoint{Workload: fmt.Sprintf("%s-%d", name, j), Cluster: id, Network: "amber", Address: "10.0.0.1", Ready: true})
			}
			snap.Imports = append(snap.Imports, imp)
		}
		snap.Services = append(snap.Services, global)
	}
	var last *desired
	for b.Loop() {
		last = compute(snap, nil, last)
	}
}
