package store

import (
	"context"
	"log/slog"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/dns/vip"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func local() *mesh.Cluster {
	return &mesh.Cluster{ID: "amber", TrustDomain: "amber.mesh", Network: "amber"}
}

func service(name string, ports ...mesh.Port) *mesh.ServiceDecl {
	return &mesh.ServiceDecl{
		Object: mesh.ObjectRef{Kind: "Service", Namespace: "shop", Name: name}, Hosts: []string{mesh.LocalHost(name, "shop")},
		Ports: ports, Selector: map[string]string{"app": name},
	}
}

func pod(name, app, ip string) *mesh.Workload {
	return &mesh.Workload{
		Object: mesh.ObjectRef{Kind: "Pod", Namespace: "shop", Name: name}, Name: name, Namespace: "shop", Addresses: []string{ip},
		Labels: map[string]string{"app": app}, ServiceAccount: app, TLS: true, Ready: true, Ports: map[string]uint32{"web": 8080},
	}
}

func reviews(cluster mesh.ClusterID, vips ...string) *mesh.Import {
	i := &mesh.Import{Cluster: cluster, Namespace: "shop", Name: "reviews", Ports: []mesh.Port{{Name: "http", Number: 9080, Protocol: mesh.HTTP}},
		Endpoints: []*mesh.Endpoint{{Workload: "reviews-" + string(cluster), Namespace: "shop", Cluster: cluster, Network: mesh.NetworkID(cluster), TLS: true, Ready: true, Ports: map[uint32]uint32{9080: 9080}}}}
	for _, v := range vips {
		i.VIPs = append(i.VIPs, netip.MustParseAddr(v))
	}
	return i
}

// claimed is an address that reviews.shop.global may have, but not the one that it gets alone.
func claimed(i int) string {
	return vip.Follow("reviews.shop.global", true, 3, vip.DefaultRanges())[i].String()
}

func build(t *testing.T, in ...mesh.Input) *mesh.Snapshot {
	t.Helper()
	return newBuilder(DefaultConfig(local())).build(in, nil)
}

func TestSelectorJoinsReadyWorkloads(t *testing.T) {
	decl := service("reviews", mesh.Port{Name: "http", Number: 9080, Protocol: mesh.HTTP, TargetName: "web"})
	snap := build(t, mesh.Input{Services: []*mesh.ServiceDecl{decl}}, mesh.Input{Workloads: []*mesh.Workload{pod("b", "reviews", "10.0.0.2"), pod("a", "reviews", "10.0.0.1"), pod("c", "other", "10.0.0.3")}})
	s := snap.Service("reviews.shop.svc.cluster.local")
	if s == nil || len(s.Endpoints) != 2 {
		t.Fatalf("service: %+v", s)
	}
	e := s.Endpoints[0]
	if e.Workload != "a" || e.Ports[9080] != 8080 || e.Identity != "spiffe://amber.mesh/ns/shop/sa/reviews" || e.Network != "amber" {
		t.Errorf("endpoint: %+v", e)
	}
	if len(s.VIPs) != 2 {
		t.Errorf("virtual addresses: %v", s.VIPs)
	}
}

func TestGlobalMergesExportersAndNotSecrets(t *testing.T) {
	decl := service("reviews", mesh.Port{Name: "http", Number: 9080, Protocol: mesh.HTTP})
	in := mesh.Input{Services: []*mesh.ServiceDecl{decl}, Workloads: []*mesh.Workload{pod("a", "reviews", "10.0.0.1")}}
	imports := mesh.Input{Imports: []*mesh.Import{reviews("cedar"), reviews("birch")}}
	if got := len(build(t, in, imports).Service("reviews.shop.global").Endpoints); got != 2 {
		t.Errorf("a service that is not exported adds its own endpoints: %d", got)
	}
	export := mesh.Input{Exports: []*mesh.Export{{Object: mesh.ObjectRef{Kind: "ServiceExport", Namespace: "shop", Name: "reviews"}}}}
	g := build(t, in, imports, export).Service("reviews.shop.global")
	var clusters []string
	for _, e := range g.Endpoints {
		clusters = append(clusters, string(e.Cluster))
	}
	if strings.Join(clusters, " ") != "amber birch cedar" {
		t.Errorf("endpoints in %v", clusters)
	}
}

func TestClaimedAddressIsUsedEverywhere(t *testing.T) {
	g := build(t, mesh.Input{Imports: []*mesh.Import{reviews("birch", claimed(0), claimed(1))}}).Service("reviews.shop.global")
	if g.VIPs[0].String() != claimed(0) || g.VIPs[1].String() != claimed(1) {
		t.Errorf("virtual addresses: %v", g.VIPs)
	}
}

func TestHandMadeGlobalWins(t *testing.T) {
	mine := &mesh.ServiceDecl{Object: mesh.ObjectRef{Kind: "ServiceEntry", Namespace: "shop", Name: "mine"}, Hosts: []string{"reviews.shop.global"}, Ports: []mesh.Port{{Number: 9080, Protocol: mesh.HTTP}},
		Addresses: []netip.Addr{netip.MustParseAddr("127.255.0.3")}, Endpoints: []*mesh.Endpoint{{Address: "172.31.0.9"}}}
	s := build(t, mesh.Input{Services: []*mesh.ServiceDecl{mine}, Imports: []*mesh.Import{reviews("birch")}}).Service("reviews.shop.global")
	if len(s.Endpoints) != 1 || s.Endpoints[0].Address != "172.31.0.9" || s.VIPs[0].String() != "127.255.0.3" {
		t.Errorf("service: %+v", s)
	}
}

func TestOneBadObjectStopsNoOther(t *testing.T) {
	decl := service("reviews", mesh.Port{Number: 9080, Protocol: mesh.HTTP})
	twin := service("reviews", mesh.Port{Number: 9080, Protocol: mesh.HTTP})
	twin.Object.Source = "other.yaml:1"
	snap := build(t, mesh.Input{Services: []*mesh.ServiceDecl{decl, twin}}, mesh.Input{Exports: []*mesh.Export{{Object: mesh.ObjectRef{Kind: "ServiceExport", Namespace: "shop", Name: "nothing"}}}})
	if snap.Service("reviews.shop.svc.cluster.local") == nil {
		t.Error("the good service is missing")
	}
	var reasons []string
	for _, p := range snap.Problems {
		reasons = append(reasons, p.Reason)
	}
	if !slices.Contains(reasons, "Duplicate") || !slices.Contains(reasons, "NoSuchService") {
		t.Errorf("problems: %v", reasons)
	}
}

func TestUnchangedValuesAreShared(t *testing.T) {
	b := newBuilder(DefaultConfig(local()))
	in := mesh.Input{Services: []*mesh.ServiceDecl{service("a", mesh.Port{Number: 1, Protocol: mesh.TCP}), service("b", mesh.Port{Number: 1, Protocol: mesh.TCP})}}
	first := b.build([]mesh.Input{in}, nil)
	second := b.build([]mesh.Input{in, {Workloads: []*mesh.Workload{pod("x", "b", "10.0.0.9")}}}, nil)
	if first.Services[0] != second.Services[0] {
		t.Error("the untouched service was copied")
	}
	if first.Services[1] == second.Services[1] {
		t.Error("the changed service was shared")
	}
}

func TestAddressesOutliveARestart(t *testing.T) {
	cfg := DefaultConfig(local())
	cfg.Memory = FileMemory(filepath.Join(t.TempDir(), "addresses.json"))
	in := []mesh.Input{{Imports: []*mesh.Import{reviews("birch", claimed(0))}}}
	newBuilder(cfg).build(in, nil)
	in[0].Imports[0] = reviews("birch")
	if got := newBuilder(cfg).build(in, nil).Service("reviews.shop.global").VIPs[0].String(); got != claimed(0) {
		t.Errorf("after a restart: %s", got)
	}
}

func TestAddressInUseIsNotTakenAway(t *testing.T) {
	b := newBuilder(DefaultConfig(local()))
	imports := mesh.Input{Imports: []*mesh.Import{reviews("birch", claimed(0))}}
	b.build([]mesh.Input{imports}, nil)
	thief := &mesh.ServiceDecl{Object: mesh.ObjectRef{Kind: "ServiceEntry", Namespace: "shop", Name: "thief"}, Hosts: []string{"thief.example"}, Ports: []mesh.Port{{Number: 80, Protocol: mesh.HTTP}},
		Addresses: []netip.Addr{netip.MustParseAddr(claimed(0))}}
	snap := b.build([]mesh.Input{imports, {Services: []*mesh.ServiceDecl{thief}}}, nil)
	if got := snap.Service("reviews.shop.global").VIPs[0].String(); got != claimed(0) {
		t.Errorf("reviews moved to %s", got)
	}
	if got := snap.Service("thief.example").VIPs; slices.Contains(got, netip.MustParseAddr(claimed(0))) || len(got) != 2 {
		t.Errorf("the thief has %v", got)
	}
	if len(snap.Problems) != 1 || snap.Problems[0].Reason != "AddressInUse" {
		t.Errorf("problems: %v", snap.Problems)
	}
}

func TestRunWaitsForSourcesAndPublishesChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cfg := DefaultConfig(local())
		cfg.Await = []string{"file"}
		s := New(cfg, slog.New(slog.DiscardHandler), prometheus.NewRegistry())
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- s.Run(ctx) }()
		sink := s.Sink("file")
		sink.Report("a.yaml", mesh.Input{Services: []*mesh.ServiceDecl{service("a")}})
		synctest.Wait()
		if snap, _ := s.Latest(); snap != nil {
			t.Error("a snapshot before the source was synced")
		}
		_, changed := s.Latest()
		sink.Synced()
		<-changed
		snap, changed := s.Latest()
		if snap.Revision != 1 || len(snap.Services) != 1 {
			t.Errorf("first snapshot: %+v", snap)
		}
		sink.Forget("a.yaml")
		<-changed
		if snap, _ := s.Latest(); len(snap.Services) != 0 {
			t.Errorf("after the file is gone: %+v", snap.Services)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func TestRunGoesOnWithoutALostSource(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cfg := DefaultConfig(local())
		cfg.Await = []string{"file"}
		s := New(cfg, slog.New(slog.DiscardHandler), prometheus.NewRegistry())
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- s.Run(ctx) }()
		_, changed := s.Latest()
		start := time.Now()
		<-changed
		if waited := time.Since(start); waited != cfg.AwaitAtMost {
			t.Errorf("waited %s", waited)
		}
		if snap, _ := s.Latest(); len(snap.Problems) != 1 || snap.Problems[0].Reason != "NotSynced" {
			t.Errorf("problems: %v", snap.Problems)
		}
		cancel()
		<-done
	})
}
