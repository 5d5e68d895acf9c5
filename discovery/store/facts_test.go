package store

import (
	"testing"
	"time"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

func TestFactsOfExports(t *testing.T) {
	decl := service("reviews", mesh.Port{Name: "http", Number: 9080, Protocol: mesh.HTTP})
	decl.Facts = &mesh.Facts{Created: time.Unix(1, 0), SessionAffinity: "ClientIP"}
	outside := service("outside", mesh.Port{Number: 80, Protocol: mesh.HTTP})
	outside.External, outside.Export, outside.Facts = true, true, &mesh.Facts{}
	export := func(name string) *mesh.Export {
		return &mesh.Export{Object: mesh.ObjectRef{Kind: "ServiceExport", Namespace: "shop", Name: name}, Created: time.Unix(9, 0), Labels: map[string]string{"a": "b"}}
	}
	host := "reviews.shop.svc.cluster.local"
	if f := build(t, mesh.Input{Services: []*mesh.ServiceDecl{decl}}).Service(host).Facts; f != nil {
		t.Errorf("of a Service that is not exported: %+v", f)
	}
	snap := build(t, mesh.Input{Services: []*mesh.ServiceDecl{decl, outside}, Exports: []*mesh.Export{export("reviews"), export("outside")}})
	f := snap.Service(host).Facts
	if f == nil || !f.Created.Equal(time.Unix(9, 0)) || f.SessionAffinity != "ClientIP" || f.Labels["a"] != "b" {
		t.Errorf("of a ServiceExport: %+v", f)
	}
	if !decl.Facts.Created.Equal(time.Unix(1, 0)) {
		t.Error("the declaration was written to")
	}
	if snap.Service("outside.shop.svc.cluster.local").Exported || snap.Service("outside.shop.global") != nil {
		t.Error("an ExternalName is exported")
	}
	if len(snap.Exports) != 2 || len(snap.Problems) != 1 || snap.Problems[0].Reason != "InvalidServiceType" {
		t.Errorf("exports %v, problems %v", snap.Exports, snap.Problems)
	}
	decl.Export = true
	if f := build(t, mesh.Input{Services: []*mesh.ServiceDecl{decl}}).Service(host).Facts; f == nil || !f.Created.Equal(time.Unix(1, 0)) {
		t.Errorf("of a label: %+v", f)
	}
	// One that changes is another Service: status and peers see it.
	b := newBuilder(DefaultConfig(local()))
	in := []mesh.Input{{Services: []*mesh.ServiceDecl{decl}, Exports: []*mesh.Export{export("reviews")}}}
	first := b.build(in, nil).Service(host)
	if b.build(in, nil).Service(host) != first {
		t.Error("the same facts made another Service")
	}
	later := export("reviews")
	later.Labels = nil
	in[0].Exports = []*mesh.Export{later}
	if b.build(in, nil).Service(host) == first {
		t.Error("other facts made the same Service")
	}
}
