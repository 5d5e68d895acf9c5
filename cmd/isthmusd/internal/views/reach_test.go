package views

import (
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"testing"
	"time"

	networking "istio.io/api/networking/v1"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// TestChangesReachEnvoy changes what a VirtualService answers, one change after another and then a hundred a second, until a
// real Envoy answers by it: none is lost, none comes after a later one. How fast it is, bench/xds measures on a machine at rest.
func TestChangesReachEnvoy(t *testing.T) {
	port := freePort(t)
	snap := world(50, 1)
	snap.Services = append(snap.Services, versioned(t, port, "v1"))
	host := snap.Services[50].Host
	x := startLive(t, snap, port)
	change := func(n int) {
		next := *x.source.snap
		next.VirtualServices = []*mesh.VirtualService{{Object: mesh.ObjectRef{Kind: "VirtualService", Namespace: "shop", Name: "rule"}, Spec: &networking.VirtualService{Hosts: []string{host},
			Http: []*networking.HTTPRoute{{DirectResponse: &networking.HTTPDirectResponse{Status: 200, Body: &networking.HTTPBody{Specifier: &networking.HTTPBody_String_{String_: strconv.Itoa(n)}}}}}}}}
		x.source.set(&next)
	}
	last := -1
	answered := func(n int) bool {
		status, body := x.get(host)
		got, err := strconv.Atoi(body)
		if status != http.StatusOK || err != nil {
			if last >= 0 {
				t.Fatalf("after change %d: %d %s", last, status, body)
			}
			return false
		}
		if got < last {
			t.Fatalf("answered by change %d after %d", got, last)
		}
		last = got
		return got >= n
	}
	change(0)
	x.until("the first change answers", func() bool { return answered(0) })
	var times []time.Duration
	for n := 1; n <= 20; n++ {
		began := time.Now()
		change(n)
		x.until(fmt.Sprintf("change %d answers", n), func() bool { return answered(n) })
		times = append(times, time.Since(began))
	}
	slices.Sort(times)
	t.Logf("from a change to the first request: p50 %s, worst %s", times[10], times[19])
	if times[10] > 2*time.Second {
		t.Errorf("a change takes %s", times[10])
	}
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for n := 21; n <= 220; n++ {
		<-tick.C
		change(n)
		answered(n)
	}
	x.until("the last of many changes answers", func() bool { return answered(220) })
}
