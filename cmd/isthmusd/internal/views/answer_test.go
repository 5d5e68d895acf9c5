package views

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/types/known/structpb"

	dnsv1 "github.com/isthmus-mesh/isthmus/api/dns/v1"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/store"
	"github.com/isthmus-mesh/isthmus/discovery/xds"
	"github.com/isthmus-mesh/isthmus/dns/zone"
)

// hostsOf reads what a DNS server is served.
func hostsOf(t *testing.T, set xds.Set) map[string]*dnsv1.Host {
	t.Helper()
	out := map[string]*dnsv1.Host{}
	for _, named := range set {
		for r := range named.All() {
			h := new(dnsv1.Host)
			if err := r.Body.UnmarshalTo(h); err != nil {
				t.Fatal(err)
			}
			out[r.Name] = h
		}
	}
	return out
}

// asker asks what a DNS server would answer, from the store to the zone.
type asker struct {
	t    *testing.T
	feed xds.Feed
}

// until waits for an answer with so many addresses, -1: no such name, and returns them.
func (a asker) until(name string, want int) []string {
	a.t.Helper()
	deadline := time.After(20 * time.Second)
	for {
		set, changed := a.feed.Latest()
		m, _ := zone.New(hostsOf(a.t, set), zone.Options{Zones: []string{"global"}}).Answer(new(dns.Msg).SetQuestion(name, dns.TypeA))
		if m.Rcode == dns.RcodeNameError && want < 0 || m.Rcode == dns.RcodeSuccess && len(m.Answer) == want {
			var out []string
			for _, rr := range m.Answer {
				out = append(out, rr.(*dns.A).A.String())
			}
			return out
		}
		select {
		case <-changed:
		case <-deadline:
			a.t.Fatalf("%s: %v", name, m)
		}
	}
}

// TestAnswersFollowTheStore: what is reported is answered, what is deleted does not exist, and a peer that is cut off
// keeps its names as long as its records are there.
func TestAnswersFollowTheStore(t *testing.T) {
	const services = 1000
	s := store.New(store.DefaultConfig(&mesh.Cluster{ID: "amber", Network: "amber", TrustDomain: "amber.mesh"}), slog.New(slog.DiscardHandler), prometheus.NewRegistry())
	vs := New(s, slog.New(slog.DiscardHandler), prometheus.NewRegistry())
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 2)
	go func() { done <- s.Run(ctx) }()
	go func() { done <- vs.Run(ctx) }()
	defer func() { cancel(); <-done; <-done }()
	meta, err := structpb.NewStruct(map[string]any{"GENERATOR": "dns"})
	if err != nil {
		t.Fatal(err)
	}
	feed, end, err := vs.Feed(&corev3.Node{Id: "dns~test", Metadata: meta}, "")
	if err != nil {
		t.Fatal(err)
	}
	defer end()
	ask := asker{t, feed}
	entry := func(host string, address string) mesh.Input {
		return mesh.Input{Services: []*mesh.ServiceDecl{{
			Object: mesh.ObjectRef{Kind: "ServiceEntry", Namespace: "shop", Name: host}, Hosts: []string{host}, Resolution: mesh.Static,
			Ports: []mesh.Port{{Name: "http", Number: 80, Protocol: mesh.HTTP}}, Addresses: []netip.Addr{netip.MustParseAddr(address)},
		}}}
	}
	sink := s.Sink("file")
	for i := range services {
		sink.Report(fmt.Sprint("many", i), entry(fmt.Sprintf("s%d.shop.global", i), fmt.Sprintf("127.3.%d.%d", i/250, i%250+1)))
	}
	peer := mesh.Input{Clusters: []*mesh.Cluster{{ID: "birch", Network: "birch", TrustDomain: "birch.mesh"}}, Imports: []*mesh.Import{{
		Cluster: "birch", Namespace: "shop", Name: "far", Ports: []mesh.Port{{Name: "http", Number: 80, Protocol: mesh.HTTP}},
		Endpoints: []*mesh.Endpoint{{Workload: "far-1", Namespace: "shop", Cluster: "birch", Network: "birch", TLS: true, Ready: true, Ports: map[uint32]uint32{80: 80}}},
	}}}
	s.Sink("federation").Report("birch", peer)
	ask.until("s999.shop.global.", 1)
	far := ask.until("far.shop.global.", 1)
	var times []time.Duration
	for i := range 20 {
		_, changed := s.Latest()
		sink.Report("many7", entry(fmt.Sprintf("new%d.shop.global", i), "127.9.0.1"))
		<-changed
		stored := time.Now()
		_, outdated := feed.Latest()
		if set, _ := feed.Latest(); set != nil && hostsOf(t, set)[fmt.Sprintf("new%d.shop.global", i)] == nil {
			<-outdated
		}
		times = append(times, time.Since(stored))
		ask.until(fmt.Sprintf("new%d.shop.global.", i), 1)
		if i > 0 {
			ask.until(fmt.Sprintf("new%d.shop.global.", i-1), -1)
		}
	}
	slices.Sort(times)
	t.Logf("from the store to what is served, %d names: median %v, longest %v", services, times[len(times)/2], times[len(times)-1])
	if times[len(times)/2] > time.Second {
		t.Errorf("the median is %v", times[len(times)/2])
	}
	for _, fresh := range []mesh.Freshness{mesh.Late, mesh.Expired} {
		cut := mesh.Input{Clusters: []*mesh.Cluster{{ID: "birch", Network: "birch", TrustDomain: "birch.mesh", Freshness: fresh}}, Imports: peer.Imports}
		_, changed := s.Latest()
		s.Sink("federation").Report("birch", cut)
		<-changed
		if got := ask.until("far.shop.global.", 1); !slices.Equal(got, far) {
			t.Errorf("%s: %v, was %v", fresh, got, far)
		}
	}
	s.Sink("federation").Forget("birch")
	ask.until("far.shop.global.", -1)
}
