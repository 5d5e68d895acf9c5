package store

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	networking "istio.io/api/networking/v1"
	"pgregory.net/rapid"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// randomInput is one source's word: few names, so that things meet.
func randomInput(t *rapid.T) mesh.Input {
	name := rapid.SampledFrom([]string{"a", "b", "c"})
	clusters := rapid.SampledFrom([]mesh.ClusterID{"", "amber", "dune"})
	var in mesh.Input
	for range rapid.IntRange(0, 2).Draw(t, "services") {
		decl := service(name.Draw(t, "service"), mesh.Port{Name: "http", Number: 80, Protocol: mesh.HTTP, TargetName: "web"})
		if rapid.Bool().Draw(t, "no selector") {
			decl.Selector = nil
		}
		decl.Export = rapid.Bool().Draw(t, "export")
		decl.Cluster = clusters.Draw(t, "of")
		if rapid.Bool().Draw(t, "tcp") {
			decl.Ports[0].Protocol = mesh.TCP
		}
		decl.Addresses = []netip.Addr{netip.MustParseAddr(rapid.SampledFrom([]string{"10.96.0.1", "10.96.0.2"}).Draw(t, "cluster ip"))}
		decl.Object.Source = rapid.SampledFrom([]string{"x", "y"}).Draw(t, "source")
		in.Services = append(in.Services, decl)
	}
	for range rapid.IntRange(0, 3).Draw(t, "pods") {
		p := pod(name.Draw(t, "pod"), name.Draw(t, "app"), "10.0.0."+rapid.SampledFrom([]string{"1", "2", "3"}).Draw(t, "ip"))
		p.Cluster, p.Network = clusters.Draw(t, "runs in"), rapid.SampledFrom([]mesh.NetworkID{"", "", "n9"}).Draw(t, "network")
		p.Ready = rapid.Bool().Draw(t, "ready")
		in.Workloads = append(in.Workloads, p)
	}
	if rapid.Bool().Draw(t, "slice") {
		in.Slices = append(in.Slices, &mesh.EndpointSlice{
			Object: mesh.ObjectRef{Kind: "EndpointSlice", Namespace: "shop", Name: name.Draw(t, "slice name")}, Cluster: clusters.Draw(t, "slice in"), Service: name.Draw(t, "slice of"),
			PortNames: map[string]uint32{"http": 8080}, Endpoints: []*mesh.Endpoint{{Address: "10.0.0.1", Ready: true}},
		})
	}
	for range rapid.IntRange(0, 2).Draw(t, "networks") {
		n := &mesh.Network{ID: rapid.SampledFrom([]mesh.NetworkID{"n1", "n2"}).Draw(t, "id")}
		n.Registries = []mesh.ClusterID{rapid.SampledFrom([]mesh.ClusterID{"Kubernetes", "dune", "nowhere"}).Draw(t, "registry")}
		n.CIDRs = []netip.Prefix{netip.MustParsePrefix(rapid.SampledFrom([]string{"10.0.0.2/32", "10.0.0.0/24"}).Draw(t, "cidr"))}
		in.Networks = append(in.Networks, n)
	}
	for range rapid.IntRange(0, 2).Draw(t, "imports") {
		i := reviews(rapid.SampledFrom([]mesh.ClusterID{"birch", "cedar"}).Draw(t, "cluster"), rapid.SampledFrom([]string{"240.0.0.9", "241.1.2.3"}).Draw(t, "claim"))
		i.Name = name.Draw(t, "import")
		in.Imports = append(in.Imports, i)
	}
	return in
}

// What a builder remembers must not show in what it builds.
func TestRememberingChangesNothing(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		b := newBuilder(DefaultConfig(local()))
		inputs := make([]mesh.Input, 3)
		for range rapid.IntRange(1, 6).Draw(t, "steps") {
			inputs[rapid.IntRange(0, 2).Draw(t, "which")] = randomInput(t)
			fresh := newBuilder(DefaultConfig(local()))
			fresh.held = maps.Clone(b.held)
			got, want := b.build(inputs, nil), fresh.build(inputs, nil)
			if !reflect.DeepEqual(got.Services, want.Services) {
				t.Fatalf("services differ:\n%s\n%s", show(got.Services), show(want.Services))
			}
			if !reflect.DeepEqual(got.Networks, want.Networks) || !reflect.DeepEqual(got.Clusters, want.Clusters) || !reflect.DeepEqual(got.Workloads, want.Workloads) {
				t.Fatalf("networks, clusters or workloads differ:\n%+v\n%+v", got, want)
			}
			if !slices.Equal(got.Problems, want.Problems) {
				t.Fatalf("problems differ:\n%v\n%v", got.Problems, want.Problems)
			}
		}
	})
}

// vary is an input with one thing changed: what the short path is for.
func vary(t *rapid.T, in mesh.Input) mesh.Input {
	name := rapid.SampledFrom([]string{"a", "b", "c", "d"})
	switch rapid.IntRange(0, 4).Draw(t, "vary") {
	case 0:
		p := pod(name.Draw(t, "pod"), name.Draw(t, "app"), "10.0.0."+rapid.SampledFrom([]string{"1", "2", "3", "4"}).Draw(t, "ip"))
		in.Workloads = append(slices.Clone(in.Workloads), p)
	case 1:
		if len(in.Workloads) > 0 {
			in.Workloads = slices.Clone(in.Workloads[1:])
		}
	case 2:
		if len(in.Workloads) > 0 {
			w := *in.Workloads[0]
			w.Ready, w.Addresses = !w.Ready, []string{"10.0.0." + rapid.SampledFrom([]string{"1", "2", "5"}).Draw(t, "ip")}
			w.Labels = map[string]string{"app": name.Draw(t, "app")}
			in.Workloads = append([]*mesh.Workload{&w}, in.Workloads[1:]...)
		}
	case 3:
		if len(in.Slices) > 0 && rapid.Bool().Draw(t, "there") {
			s := *in.Slices[0]
			s.Endpoints = []*mesh.Endpoint{{Address: "10.0.0." + rapid.SampledFrom([]string{"1", "2", "5"}).Draw(t, "ip"), Ready: rapid.Bool().Draw(t, "ready")}}
			in.Slices = []*mesh.EndpointSlice{&s}
		} else {
			in.Slices = nil
		}
	case 4:
		spec := &networking.VirtualService{Hosts: []string{name.Draw(t, "host")}}
		if rapid.Bool().Draw(t, "hands over") {
			spec.Http = []*networking.HTTPRoute{{Delegate: &networking.Delegate{Name: name.Draw(t, "to"), Namespace: "shop"}}}
		} else if rapid.Bool().Draw(t, "is handed") {
			spec.Hosts, spec.Http = nil, []*networking.HTTPRoute{{DirectResponse: &networking.HTTPDirectResponse{Status: 200}}}
		}
		in.VirtualServices = []*mesh.VirtualService{{Object: mesh.ObjectRef{Kind: "VirtualService", Namespace: "shop", Name: name.Draw(t, "rule")}, Spec: spec}}
		in.DestinationRules = rapid.SampledFrom([][]*mesh.DestinationRule{nil, {{Object: mesh.ObjectRef{Kind: "DestinationRule", Namespace: "shop", Name: "d"}, Spec: &networking.DestinationRule{Host: "a"}}}}).Draw(t, "destination rules")
	}
	return in
}

// However a Snapshot came about, it is what a builder that never saw another makes, and it says what changed.
func TestShortPathChangesNothing(t *testing.T) {
	short := 0
	rapid.Check(t, func(t *rapid.T) {
		cfg := DefaultConfig(local())
		cfg.PodNames = rapid.Bool().Draw(t, "pod names")
		cfg.Check = func(s *mesh.Snapshot) (out []mesh.Problem) {
			for _, v := range s.VirtualServices {
				out = append(out, mesh.Problem{Object: v.Object, Reason: "Seen"})
			}
			for _, s := range s.Services {
				for _, e := range s.Endpoints {
					out = append(out, mesh.Problem{Object: s.Object, Reason: "Has", Message: fmt.Sprint(e.Cluster, e.Network, e.Labels)})
				}
			}
			return out
		}
		b := newBuilder(cfg)
		inputs := make([]mesh.Input, 3)
		for i := range inputs {
			inputs[i] = randomInput(t)
		}
		prev := b.build(slices.Clone(inputs), nil)
		for range rapid.IntRange(1, 8).Draw(t, "steps") {
			var changes []change
			now := slices.Clone(inputs)
			for i := range now {
				if !rapid.Bool().Draw(t, "changes") {
					continue
				}
				if rapid.IntRange(0, 9).Draw(t, "how") == 0 {
					now[i] = sharing(now[i], randomInput(t))
				} else {
					now[i] = vary(t, now[i])
				}
				changes = append(changes, change{inputs[i], now[i]})
			}
			inputs = now
			fresh := newBuilder(cfg)
			fresh.held = maps.Clone(b.held)
			got := b.next(changes, func() []mesh.Input { return slices.Clone(inputs) }, nil)
			want := fresh.build(inputs, nil)
			compareSnapshots(t, got, want)
			if d, ok := got.Since(prev); ok {
				checkDelta(t, prev, got, d)
			}
			prev = got
		}
		short += b.short
	})
	if short == 0 {
		t.Error("the short path was never taken")
	}
}

// A source may read all of its file again: what is the same is not looked at twice.
func TestFileReadAgainTakesTheShortPath(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := New(DefaultConfig(local()), slog.New(slog.DiscardHandler), prometheus.NewRegistry())
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- s.Run(ctx) }()
		sink := s.Sink("file")
		read := func(ready bool) mesh.Input {
			p := pod("a-1", "a", "10.0.0.1")
			p.Ready = ready
			return mesh.Input{Services: []*mesh.ServiceDecl{service("a"), service("b")}, Workloads: []*mesh.Workload{p, pod("b-1", "b", "10.0.0.2")}}
		}
		report := func(ready bool) *mesh.Snapshot {
			time.Sleep(time.Second) // the build before is over
			sink.Report("a.yaml", read(ready))
			synctest.Wait()
			snap, _ := s.Latest()
			return snap
		}
		before := report(true)
		after := report(false)
		d, ok := after.Since(before)
		if !ok || len(d.Services) != 1 || d.Config || d.Services[0].Now != after.Services[0] || after.Services[0].Endpoints[0].Ready || after.Services[1] != before.Services[1] {
			t.Errorf("delta %+v of %s", d, show(after.Services))
		}
		if _, ok := after.Since(nil); ok {
			t.Error("a difference to nothing")
		}
		same := report(false)
		if d, ok := same.Since(after); !ok || len(d.Services) != 0 {
			t.Errorf("the same again differs: %+v", d)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// Ranges of addresses are not what the short path knows; the same ones again are no change.
func TestOnlyOf(t *testing.T) {
	with := func(p string) mesh.Input {
		return mesh.Input{PodRanges: []netip.Prefix{netip.MustParsePrefix(p)}, Problems: []mesh.Problem{{Reason: "Same"}}}
	}
	if !onlyOf(change{with("10.0.0.0/8"), with("10.0.0.0/8")}) || onlyOf(change{with("10.0.0.0/8"), with("10.0.0.0/9")}) || onlyOf(change{mesh.Input{}, with("10.0.0.0/8")}) {
		t.Error("changed ranges are not told from the same ones")
	}
}

// Every carried kind stands under its own name in the inputs and in the Snapshot.
func TestCarriedKinds(t *testing.T) {
	for _, k := range carried {
		in, snap := reflect.TypeFor[mesh.Input](), reflect.TypeFor[mesh.Snapshot]()
		x, ok := in.FieldByName(k.field())
		y, also := snap.FieldByName(k.field())
		if !ok || !also || x.Type != y.Type {
			t.Errorf("%s is not a field of both mesh.Input and mesh.Snapshot", k.field())
			continue
		}
		input, out := mesh.Input{}, mesh.Snapshot{}
		list := reflect.ValueOf(&input).Elem().FieldByName(k.field())
		list.Set(reflect.Append(list, reflect.New(x.Type.Elem().Elem())))
		k.collect(&out, &input, func(mesh.ObjectRef) bool { return true })
		if reflect.ValueOf(out).FieldByName(k.field()).Len() != 1 || len(k.refs(&input)) != 1 {
			t.Errorf("%s is read from, or put into, another field", k.field())
		}
	}
}

func compareSnapshots(t *rapid.T, got, want *mesh.Snapshot) {
	a, b := reflect.ValueOf(*got), reflect.ValueOf(*want)
	for i := range a.NumField() {
		name := a.Type().Field(i).Name
		if name == "Revision" || name == "Delta" {
			continue
		}
		if x, y := a.Field(i), b.Field(i); x.Kind() == reflect.Slice && x.Len()+y.Len() == 0 || reflect.DeepEqual(x.Interface(), y.Interface()) {
			continue
		}
		if name == "Services" {
			t.Fatalf("services differ:\n%s\n%s", show(got.Services), show(want.Services))
		}
		t.Fatalf("%s differ:\n%s\n%s", name, values(a.Field(i)), values(b.Field(i)))
	}
}

func values(list reflect.Value) (out string) {
	if list.Kind() != reflect.Slice {
		return fmt.Sprintf("%+v", list)
	}
	for i := range list.Len() {
		out += fmt.Sprintf("%+v\n", reflect.Indirect(list.Index(i)))
	}
	return out
}

func checkDelta(t *rapid.T, prev, got *mesh.Snapshot, d *mesh.Delta) {
	now := slices.Clone(prev.Services)
	for _, x := range d.Services {
		i := slices.Index(now, x.Was)
		if i < 0 {
			t.Fatalf("%s was not there", x.Was.Host)
		}
		now[i] = x.Now
	}
	if !slices.Equal(now, got.Services) {
		t.Fatalf("services that changed: %d, and others besides", len(d.Services))
	}
	if !d.Config && (!slices.Equal(prev.VirtualServices, got.VirtualServices) || !slices.Equal(prev.DestinationRules, got.DestinationRules)) {
		t.Fatal("configuration changed")
	}
}

func show(ss []*mesh.Service) string {
	out := ""
	for _, s := range ss {
		out += fmt.Sprintf("%+v\n", *s)
		for _, e := range s.Endpoints {
			out += fmt.Sprintf("   %+v\n", *e)
		}
	}
	return out
}

// BenchmarkOneEndpoint changes one pod of one service.
func BenchmarkOneEndpoint(b *testing.B) {
	for _, n := range []int{1000, 10000} {
		b.Run(fmt.Sprintf("%d services", n), func(b *testing.B) {
			var inputs []mesh.Input
			for i := range n {
				name := fmt.Sprintf("svc-%d", i)
				in := mesh.Input{Services: []*mesh.ServiceDecl{service(name, mesh.Port{Name: "http", Number: 80, Protocol: mesh.HTTP})}}
				for j := range 10 {
					in.Workloads = append(in.Workloads, pod(fmt.Sprintf("%s-%d", name, j), name, fmt.Sprintf("10.%d.%d.%d", i/256, i%256, j)))
				}
				inputs = append(inputs, in)
			}
			builder := newBuilder(DefaultConfig(local()))
			builder.build(inputs, nil)
			builder.memo = builder.remember(builder.inputs)
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				old := inputs[7]
				w := *old.Workloads[3]
				w.Ready = i%2 == 1
				inputs[7].Workloads = slices.Clone(old.Workloads)
				inputs[7].Workloads[3] = &w
				if snap := builder.next([]change{{old, inputs[7]}}, func() []mesh.Input { return inputs }, nil); len(snap.Delta.Services) != 1 {
					b.Fatalf("services that changed: %d", len(snap.Delta.Services))
				}
			}
		})
	}
}
