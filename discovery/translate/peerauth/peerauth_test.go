package peerauth_test

import (
	"testing"

	security "istio.io/api/security/v1"
	typev1beta1 "istio.io/api/type/v1beta1"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/translate/peerauth"
)

func object(namespace, name string, mode peerauth.Mode, app string, ports map[uint32]peerauth.Mode) *mesh.PeerAuthentication {
	spec := &security.PeerAuthentication{Mtls: &security.PeerAuthentication_MutualTLS{Mode: mode}, PortLevelMtls: map[uint32]*security.PeerAuthentication_MutualTLS{}}
	if app != "" {
		spec.Selector = &typev1beta1.WorkloadSelector{MatchLabels: map[string]string{"app": app}}
	}
	for p, m := range ports {
		spec.PortLevelMtls[p] = &security.PeerAuthentication_MutualTLS{Mode: m}
	}
	return &mesh.PeerAuthentication{Object: mesh.ObjectRef{Kind: "PeerAuthentication", Namespace: namespace, Name: name}, Spec: spec}
}

func TestFor(t *testing.T) {
	all := object("istio-system", "all", peerauth.Strict, "", nil)
	foo := object("foo", "default", peerauth.Permissive, "", nil)
	second := object("foo", "second", peerauth.Disable, "", nil)
	unset := object("foo", "web", peerauth.Unset, "web", map[uint32]peerauth.Mode{80: peerauth.Disable, 81: peerauth.Unset})
	for _, c := range []struct {
		name           string
		list           []*mesh.PeerAuthentication
		namespace, app string
		port           uint32
		want           peerauth.Mode
	}{
		{"nothing", nil, "foo", "web", 80, peerauth.Permissive},
		{"of the mesh", []*mesh.PeerAuthentication{all}, "foo", "web", 80, peerauth.Strict},
		{"of the namespace", []*mesh.PeerAuthentication{foo, all}, "foo", "web", 80, peerauth.Permissive},
		{"of another namespace", []*mesh.PeerAuthentication{foo, all}, "bar", "web", 80, peerauth.Strict},
		{"the first of two", []*mesh.PeerAuthentication{foo, second}, "foo", "web", 80, peerauth.Permissive},
		{"of the workload, port", []*mesh.PeerAuthentication{unset, all}, "foo", "web", 80, peerauth.Disable},
		{"of the workload, port unset", []*mesh.PeerAuthentication{unset, all}, "foo", "web", 81, peerauth.Strict},
		{"of the workload, other port", []*mesh.PeerAuthentication{unset, all}, "foo", "web", 82, peerauth.Strict},
		{"of another workload", []*mesh.PeerAuthentication{unset, all}, "foo", "db", 80, peerauth.Strict},
		{"in the root namespace itself", []*mesh.PeerAuthentication{all}, "istio-system", "web", 80, peerauth.Strict},
	} {
		if got := peerauth.For(c.list, c.namespace, map[string]string{"app": c.app}).At(c.port); got != c.want {
			t.Errorf("%s: got %s, want %s", c.name, got, c.want)
		}
	}
}

// TestCombinations: every mode, or none, at every level at once. The nearest that says something counts.
func TestCombinations(t *testing.T) {
	modes := []peerauth.Mode{-1, peerauth.Unset, peerauth.Disable, peerauth.Permissive, peerauth.Strict} // -1: no object
	n := 0
	for _, root := range modes {
		for _, namespace := range modes {
			for _, workload := range modes {
				for _, port := range modes {
					var list []*mesh.PeerAuthentication
					want := peerauth.Permissive
					if root >= 0 {
						list = append(list, object("istio-system", "default", root, "", nil))
					}
					if namespace >= 0 {
						list = append(list, object("foo", "default", namespace, "", nil))
					}
					if workload >= 0 || port >= 0 {
						ports := map[uint32]peerauth.Mode{}
						if port >= 0 {
							ports[8080] = port
						}
						list = append(list, object("foo", "web", max(workload, peerauth.Unset), "web", ports))
					}
					for _, level := range []peerauth.Mode{root, namespace, workload} {
						if level > peerauth.Unset {
							want = level
						}
					}
					other := want
					if port > peerauth.Unset {
						want = port
					}
					p := peerauth.For(list, "foo", map[string]string{"app": "web"})
					if got := p.At(8080); got != want {
						t.Errorf("mesh %d, namespace %d, workload %d, port %d: got %s, want %s", root, namespace, workload, port, got, want)
					}
					if got := p.At(9090); got != other {
						t.Errorf("mesh %d, namespace %d, workload %d, another port: got %s, want %s", root, namespace, workload, got, other)
					}
					n++
				}
			}
		}
	}
	if n != 625 {
		t.Errorf("%d combinations", n)
	}
}

func TestTurnsOff(t *testing.T) {
	for name, c := range map[string]struct {
		list []*mesh.PeerAuthentication
		want bool
	}{
		"nothing": {nil, false}, "strict": {[]*mesh.PeerAuthentication{object("a", "b", peerauth.Strict, "", nil)}, false},
		"all":    {[]*mesh.PeerAuthentication{object("a", "b", peerauth.Disable, "", nil)}, true},
		"a port": {[]*mesh.PeerAuthentication{object("a", "b", peerauth.Strict, "x", map[uint32]peerauth.Mode{1: peerauth.Disable})}, true},
	} {
		if got := peerauth.TurnsOff(c.list); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}
