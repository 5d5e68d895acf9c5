package status

import (
	"log/slog"
	"testing"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/discovery"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// answers is the discovery of an API server that says the same of every version.
type answers struct {
	discovery.DiscoveryInterface
	list *metav1.APIResourceList
	err  error
}

func (a *answers) ServerResourcesForGroupVersion(string) (*metav1.APIResourceList, error) {
	return a.list, a.err
}

// TestForbiddenWhileStarting: a server that starts forbids everything for a moment. That is said, and no longer once it
// answers, also where what is asked for is not there.
func TestForbiddenWhileStarting(t *testing.T) {
	gvr := schema.GroupVersionResource{Group: groupGatewayAPI, Resource: "httproutes"}
	missing := apierrors.NewNotFound(schema.GroupResource{}, "")
	for name, later := range map[string]answers{
		"not there": {err: missing},
		"there":     {list: &metav1.APIResourceList{APIResources: []metav1.APIResource{{Name: "httproutes"}}}},
	} {
		a := &answers{err: apierrors.NewForbidden(schema.GroupResource{}, "", nil)}
		s := &server{program: &Status{problems: map[string]mesh.Problem{}, log: slog.New(slog.DiscardHandler)}, served: a}
		c := choice{kind: kind{gvr: gvr}, versions: []string{"v1", "v1beta1"}}
		if _, ok := s.version(c); ok || len(s.program.problems) != 1 {
			t.Fatalf("%s: while it is forbidden: %v, %v", name, ok, s.program.problems)
		}
		*a = later
		if _, ok := s.version(c); ok != (later.list != nil) || len(s.program.problems) != 0 {
			t.Errorf("%s: %v, still said: %v", name, ok, s.program.problems)
		}
	}
}
