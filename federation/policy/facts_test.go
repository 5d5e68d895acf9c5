package policy

import (
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	federationv1 "github.com/isthmus-mesh/isthmus/api/federation/v1"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"google.golang.org/protobuf/proto"
)

func sampleFacts() *mesh.Facts {
	return &mesh.Facts{
		Created: time.Unix(1_700_000_000, 0).UTC(), Headless: true,
		Ports:           []mesh.ExportedPort{{Name: "b", Number: 42, Protocol: "UDP"}, {Name: "a", Number: 42, Protocol: "TCP", AppProtocol: "kubernetes.io/h2c"}},
		SessionAffinity: "ClientIP", AffinitySeconds: 10, InternalTrafficPolicy: "Cluster", TrafficDistribution: "PreferClose",
		Labels: map[string]string{"example.com/team": "a"}, Annotations: map[string]string{"note": "any text, with spaces"},
	}
}

// imported sends the export through the wire's bytes and reads it as a peer does.
func imported(t *testing.T, x *federationv1.Export) (*mesh.Facts, []string) {
	t.Helper()
	body := encode(&federationv1.Service{Ports: []*federationv1.Port{{Name: "http", Number: 80, Protocol: "HTTP"}}, Export: x})
	statement := Exports(testSnapshot())[1]
	statement.Body = body
	origins, problems := Imports(&mesh.Cluster{ID: "amber", Network: "amber-net"},
		append(records("birch", statement), records("birch", ClusterStatement(&mesh.Cluster{ID: "birch", TrustDomain: "birch.mesh", Network: "birch-net"}, nil, nil))...), nil, Options{})
	var reasons []string
	for _, p := range problems {
		reasons = append(reasons, p.Field+" "+p.Reason)
	}
	if len(origins) != 1 || len(origins[0].Input.Imports) != 1 {
		t.Fatalf("the import is gone: %v", problems)
	}
	if got := origins[0].Input.Imports[0]; len(got.Ports) != 1 {
		t.Errorf("bad facts change what traffic needs: %+v", got)
	}
	return origins[0].Input.Imports[0].Facts, reasons
}

func TestFactsTravel(t *testing.T) {
	want := sampleFacts()
	got, problems := imported(t, exportBody(want))
	if !reflect.DeepEqual(got, want) || len(problems) != 0 {
		t.Errorf("got  %+v, problems %v\nwant %+v", got, problems, want)
	}
	if got, _ := imported(t, nil); got != nil {
		t.Errorf("of a peer that tells none: %+v", got)
	}
	if exportBody(nil) != nil {
		t.Error("facts of nothing")
	}
}

// TestRelaysKeepWhatTheyDoNotKnow: a field of a later version is in the bytes of the body, which no relay writes anew.
func TestRelaysKeepWhatTheyDoNotKnow(t *testing.T) {
	later := encode(&federationv1.Service{Export: exportBody(sampleFacts())})
	later = append(later, 0xfa, 0x01, 0x03, 'n', 'e', 'w') // field 31
	r := &federationv1.Record{Origin: "birch", Body: later}
	wire, err := proto.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	again := &federationv1.Record{}
	if err := proto.Unmarshal(wire, again); err != nil || string(again.Body) != string(later) {
		t.Errorf("the body has changed: %v", err)
	}
}

func TestFactsRefused(t *testing.T) {
	many := map[string]string{}
	for i := range maxExported + 1 {
		many[fmt.Sprintf("k%d", i)] = ""
	}
	for _, c := range []struct {
		name   string
		change func(*federationv1.Export)
		want   string
		undone func(*mesh.Facts)
	}{
		{"port", func(x *federationv1.Export) { x.Ports[0].Number = 70000 }, "export.ports[0] BadPort", func(f *mesh.Facts) { f.Ports = f.Ports[1:] }},
		{"port name", func(x *federationv1.Export) { x.Ports[0].Name = "Ä" }, "export.ports[0] BadName", func(f *mesh.Facts) { f.Ports = f.Ports[1:] }},
		{"protocol", func(x *federationv1.Export) { x.Ports[0].Protocol = "tcp" }, "export.ports[0] BadProtocol", func(f *mesh.Facts) { f.Ports = f.Ports[1:] }},
		{"application protocol", func(x *federationv1.Export) { x.Ports[0].AppProtocol = "a b" }, "export.ports[0] BadProtocol", func(f *mesh.Facts) { f.Ports = f.Ports[1:] }},
		{"ports", func(x *federationv1.Export) {
			x.Ports = slices.Repeat([]*federationv1.ExportedPort{{Number: 1, Protocol: "TCP"}}, maxPorts+5)
		}, "export.ports TooManyPorts", func(f *mesh.Facts) {
			f.Ports = slices.Repeat([]mesh.ExportedPort{{Number: 1, Protocol: "TCP"}}, maxPorts)
		}},
		{"affinity", func(x *federationv1.Export) { x.SessionAffinity = "Sticky" }, "export.sessionAffinity BadValue", func(f *mesh.Facts) { f.SessionAffinity = "" }},
		{"policy", func(x *federationv1.Export) { x.InternalTrafficPolicy = "Any" }, "export.internalTrafficPolicy BadValue", func(f *mesh.Facts) { f.InternalTrafficPolicy = "" }},
		{"distribution", func(x *federationv1.Export) { x.TrafficDistribution = strings.Repeat("a", 64) }, "export.trafficDistribution BadValue", func(f *mesh.Facts) { f.TrafficDistribution = "" }},
		{"many labels", func(x *federationv1.Export) { x.Labels = many }, "export.labels TooMany", func(f *mesh.Facts) { f.Labels = nil }},
		{"label key", func(x *federationv1.Export) { x.Labels["-a"] = "" }, "export.labels BadName", func(f *mesh.Facts) { f.Labels = nil }},
		{"label value", func(x *federationv1.Export) { x.Labels["a"] = "b c" }, "export.labels BadName", func(f *mesh.Facts) { f.Labels = nil }},
		{"annotation key", func(x *federationv1.Export) { x.Annotations["Ex ample/a"] = "" }, "export.annotations BadName", func(f *mesh.Facts) { f.Annotations = nil }},
		{"big annotation", func(x *federationv1.Export) { x.Annotations["a"] = strings.Repeat("x", maxExportedBytes) }, "export.annotations TooMany", func(f *mesh.Facts) { f.Annotations = nil }},
	} {
		x, want := exportBody(sampleFacts()), sampleFacts()
		x.Labels, x.Annotations = maps.Clone(x.Labels), maps.Clone(x.Annotations)
		c.change(x)
		c.undone(want)
		got, problems := imported(t, x)
		if !reflect.DeepEqual(got, want) {
			t.Errorf("%s: took %+v", c.name, got)
		}
		if !slices.Contains(problems, c.want) {
			t.Errorf("%s: problems %v, want %s", c.name, problems, c.want)
		}
	}
	if got, _ := imported(t, &federationv1.Export{AffinitySeconds: 1 << 31, Created: -5}); got.AffinitySeconds != maxAffinity || !got.Created.IsZero() {
		t.Errorf("took %+v", got)
	}
}
