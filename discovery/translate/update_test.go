package translate_test

import (
	"testing"

	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/translate"
)

// mutate changes some endpoints of some services, at times in ways that change more than assignments.
func mutate(t *rapid.T, old *mesh.Snapshot) *mesh.Snapshot {
	snap := *old
	snap.Services = append([]*mesh.Service(nil), old.Services...)
	for range rapid.IntRange(1, 3).Draw(t, "changes") {
		i := rapid.IntRange(0, len(snap.Services)-1).Draw(t, "service")
		s := *snap.Services[i]
		s.Endpoints = append([]*mesh.Endpoint(nil), s.Endpoints...)
		snap.Services[i] = &s
		if len(s.Endpoints) == 0 {
			continue
		}
		at := rapid.IntRange(0, len(s.Endpoints)-1).Draw(t, "endpoint")
		e := *s.Endpoints[at]
		switch rapid.IntRange(0, 7).Draw(t, "kind") {
		case 0:
			e.Ready = !e.Ready
		case 1:
			e.Address = "10.0.0.99"
		case 2:
			e.Freshness = mesh.Late
		case 3:
			e.Weight = 7
		case 4:
			e.Identity = "spiffe://amber.mesh/ns/default/sa/another"
		case 5:
			e.TLS = !e.TLS
		case 6:
			s.Endpoints = append(s.Endpoints[:at], s.Endpoints[at+1:]...)
			continue
		case 7:
			e.Labels = map[string]string{"version": "v9"}
		}
		s.Endpoints[at] = &e
	}
	return &snap
}

// The short path must give what the long one gives.
func TestEndpointsEqualsTranslate(t *testing.T) {
	short := 0
	rapid.Check(t, func(t *rapid.T) {
		old := bookstore()
		snap := mutate(t, old)
		pairs, ok := translate.Changed(old, snap)
		if !ok {
			t.Fatal("only services changed, and Changed says more")
		}
		for name, p := range proxies() {
			changed, ok := translate.Endpoints(old, snap, p, pairs)
			if !ok {
				continue
			}
			short++
			was, _ := translate.Translate(old, p)
			want, _ := translate.Translate(snap, p)
			got := map[string]proto.Message{}
			for _, a := range was.Endpoints {
				got[a.ClusterName] = a
			}
			for _, a := range changed {
				got[a.ClusterName] = a
			}
			if len(got) != len(want.Endpoints) {
				t.Fatalf("%s: %d assignments, want %d", name, len(got), len(want.Endpoints))
			}
			for _, a := range want.Endpoints {
				if !proto.Equal(got[a.ClusterName], a) {
					t.Fatalf("%s: assignment %s: %v, want %v", name, a.ClusterName, got[a.ClusterName], a)
				}
			}
			was.Endpoints, want.Endpoints = nil, nil
			if !equal(was, want) {
				t.Fatalf("%s: more than assignments changed", name)
			}
		}
	})
	if short == 0 {
		t.Error("the short path was never taken")
	}
}

func equal(a, b translate.Resources) bool {
	return same(a.Clusters, b.Clusters) && same(a.Listeners, b.Listeners) && same(a.Routes, b.Routes) && same(a.Secrets, b.Secrets)
}

func same[T proto.Message](a, b []T) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if !proto.Equal(a[i], b[i]) {
			return false
		}
	}
	return true
}

// One cluster may have a port that another has not yet: only endpoints that have it are offered for it.
func TestEndpointsWithoutThePortAreNotOffered(t *testing.T) {
	snap := bookstore()
	var host string
	for i, s := range snap.Services {
		if !s.Global || len(s.Endpoints) < 2 {
			continue
		}
		s := *s
		s.Ports = append(append([]mesh.Port(nil), s.Ports...), mesh.Port{Name: "http-new", Number: 8088, Protocol: mesh.HTTP})
		s.Endpoints = append([]*mesh.Endpoint(nil), s.Endpoints...)
		for j := range s.Endpoints {
			e := *s.Endpoints[j]
			e.Ports = map[uint32]uint32{9080: 9080}
			if j == 0 {
				e.Ports[8088] = 8089
			}
			s.Endpoints[j] = &e
		}
		snap.Services[i], host = &s, s.Host
		break
	}
	for _, p := range proxies() {
		if p.Type != mesh.Sidecar {
			continue
		}
		r, _ := translate.Translate(snap, p)
		for _, a := range r.Endpoints {
			n := 0
			for _, l := range a.Endpoints {
				n += len(l.LbEndpoints)
			}
			if a.ClusterName == "outbound|8088||"+host && n != 1 {
				t.Errorf("%s has %d endpoints, one has the port", a.ClusterName, n)
			}
		}
	}
	if host == "" {
		t.Fatal("no service to try it on")
	}
}
