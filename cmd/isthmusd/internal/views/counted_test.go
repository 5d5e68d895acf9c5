package views

import (
	"fmt"
	"slices"
	"testing"

	networking "istio.io/api/networking/v1"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/xds"
)

// differing names the resources that are other pointers: what was made anew.
func differing(before, after xds.Set) (out []string) {
	for typ, named := range after {
		for r := range named.All() {
			if before[typ].Get(r.Name) != r {
				out = append(out, typ+" "+r.Name)
			}
		}
	}
	slices.Sort(out)
	return out
}

func held(f xds.Feed) xds.Set {
	set, _ := f.Latest()
	return set
}

func renew(vs *Views, n *newest, snap *mesh.Snapshot) {
	n.snap = snap
	vs.mu.Lock()
	defer vs.mu.Unlock()
	vs.renew(snap)
}

func TestOneEndpointIsOneResource(t *testing.T) {
	snap := world(10_000, 1)
	vs, n := views(snap)
	feeds := []xds.Feed{open(t, vs, "client-a"), open(t, vs, "client-b"), open(t, vs, "svc-00003-0")}
	var before []xds.Set
	for _, f := range feeds {
		before = append(before, held(f))
	}
	renew(vs, n, flip(snap, 7, 0, func(e *mesh.Endpoint) { e.Address = "10.77.0.1" }))
	for i, f := range feeds {
		if got := differing(before[i], held(f)); len(got) != 1 {
			t.Errorf("client %d: %d resources were made anew: %v", i, len(got), got[:min(5, len(got))])
		}
	}
	if a, b := held(feeds[0]), held(feeds[1]); len(differing(a, b)) != 0 {
		t.Error("equal proxies do not share what changed")
	}
}

func TestOneVirtualServiceIsThreeResourcesAtMost(t *testing.T) {
	rule := func(body string) []*mesh.VirtualService {
		host := mesh.LocalHost("svc-00007", "shop")
		return []*mesh.VirtualService{{Object: mesh.ObjectRef{Kind: "VirtualService", Namespace: "shop", Name: "rule"}, Spec: &networking.VirtualService{Hosts: []string{host}, Http: []*networking.HTTPRoute{
			{DirectResponse: &networking.HTTPDirectResponse{Status: 200, Body: &networking.HTTPBody{Specifier: &networking.HTTPBody_String_{String_: body}}}}}}}}
	}
	snap := world(2000, 2)
	snap.VirtualServices = rule("one")
	vs, n := views(snap)
	var feeds []xds.Feed
	var before []xds.Set
	for i := range 5 {
		f := open(t, vs, fmt.Sprint("client-", i))
		feeds, before = append(feeds, f), append(before, held(f))
	}
	vs.parts.Counts()
	next := *snap
	next.Revision++
	next.VirtualServices = rule("two")
	renew(vs, n, &next)
	if made, used := vs.parts.Counts(); made > 3 || used < 2000 {
		t.Errorf("%d parts were translated anew, %d are as they were", made, used)
	}
	for i, f := range feeds {
		if got := differing(before[i], held(f)); len(got) == 0 || len(got) > 3 {
			t.Errorf("client %d: %d resources are others: %v", i, len(got), got[:min(5, len(got))])
		}
		if len(differing(held(feeds[0]), held(f))) != 0 {
			t.Error("equal proxies do not share what changed")
		}
	}
	if len(vs.scopes) != 1 {
		t.Errorf("equal proxies were translated for %d times", len(vs.scopes))
	}
}

// A kind of sidecars that comes later, with other labels, costs hardly a translation.
func TestAnotherScopeSharesTranslations(t *testing.T) {
	vs, _ := views(world(2000, 2))
	first := held(open(t, vs, "client-a"))
	vs.parts.Counts()
	second := held(openAs(t, vs, "client-b", "another"))
	if made, used := vs.parts.Counts(); made > 3 || used < 2000 || len(vs.scopes) != 2 {
		t.Errorf("%d parts were translated anew for a second scope of %d, %d are shared", made, len(vs.scopes), used)
	}
	if got := differing(first, second); len(got) > 0 {
		t.Errorf("%d resources are not shared: %v", len(got), got[:min(5, len(got))])
	}
}

// A sidecar shares with others like it all but what is for its own workload: its inbound listener and clusters, and the
// endpoints of the services it belongs to.
func TestSidecarsShareAllButTheirOwn(t *testing.T) {
	snap := world(50, 2)
	vs, _ := views(snap)
	client, server := held(open(t, vs, "client")), held(open(t, vs, "svc-00003-0"))
	for _, name := range differing(client, server) {
		t.Log(name)
	}
	if got := differing(client, server); len(got) > 4 {
		t.Errorf("%d resources of a sidecar are its own: %v", len(got), got)
	}
}
