package views

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	networking "istio.io/api/networking/v1"
	security "istio.io/api/security/v1"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/xds"
	"github.com/isthmus-mesh/isthmus/internal/envoytest"
)

// live is a sidecar's Envoy under views, with a listener for the services of a world.
type live struct {
	t      *testing.T
	source *moving
	vs     *Views
	srv    *xds.Server
	addr   string
	client *http.Client
}

// startLive serves the snapshot, whose services have the port, to an Envoy that listens there.
func startLive(t *testing.T, snap *mesh.Snapshot, port int) *live {
	t.Helper()
	envoy := envoytest.Path(t)
	snap.Sidecars = []*mesh.SidecarConfig{{Object: mesh.ObjectRef{Kind: "Sidecar", Namespace: "shop", Name: "own"}, Spec: &networking.Sidecar{Egress: []*networking.IstioEgressListener{{
		Port: &networking.SidecarPort{Number: uint32(port), Protocol: "HTTP", Name: "http"}, Bind: "127.0.0.1", CaptureMode: networking.CaptureMode_NONE, Hosts: []string{"*/*"},
	}}}}}
	snap.PeerAuthentications = []*mesh.PeerAuthentication{{Object: mesh.ObjectRef{Kind: "PeerAuthentication", Namespace: "shop", Name: "off"}, // no certificates are waited for
		Spec: &security.PeerAuthentication{Mtls: &security.PeerAuthentication_MutualTLS{Mode: security.PeerAuthentication_MutualTLS_DISABLE}}}}
	x := &live{t: t, source: &moving{snap: snap, changed: make(chan struct{})}, addr: fmt.Sprintf("127.0.0.1:%d", port)}
	x.vs = New(x.source, slog.New(slog.DiscardHandler), prometheus.NewRegistry())
	ctx, cancel := context.WithCancel(t.Context())
	ran := make(chan struct{})
	go func() { x.vs.Run(ctx); close(ran) }()
	x.srv = xds.New(xds.Config{Reg: prometheus.NewRegistry(), Feed: func(c xds.Client) (xds.Feed, func(), error) { return x.vs.Feed(c.Node, c.Identity) }})
	gs := grpc.NewServer(xds.ServerOptions()...)
	x.srv.Register(gs)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go gs.Serve(l)
	t.Cleanup(func() { gs.Stop(); cancel(); <-ran })
	startProxy(t, envoy, map[string]any{"id": node("client").Id, "cluster": "client", "metadata": map[string]any{"LABELS": map[string]any{"app": "client"}}}, l.Addr().(*net.TCPAddr).Port)
	transport := &http.Transport{MaxIdleConnsPerHost: 16}
	x.client = &http.Client{Timeout: 20 * time.Second, Transport: transport}
	t.Cleanup(transport.CloseIdleConnections)
	return x
}

// get asks for a host, and returns the status, 0 for none, and the body.
func (x *live) get(host string) (int, string) {
	req, err := http.NewRequest(http.MethodGet, "http://"+x.addr+"/", nil)
	if err != nil {
		return 0, err.Error()
	}
	req.Host = host
	resp, err := x.client.Do(req)
	if err != nil {
		return 0, err.Error()
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return 0, err.Error()
	}
	return resp.StatusCode, string(body)
}

func (x *live) until(what string, ok func() bool) {
	x.t.Helper()
	for deadline := time.Now().Add(90 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			x.t.Fatalf("never: %s; %v", what, x.vs.Problems())
		}
	}
}

// versioned is a service whose workloads answer with their version.
func versioned(t *testing.T, port int, versions ...string) *mesh.Service {
	s := &mesh.Service{Host: mesh.LocalHost("web", "shop"), Name: "web", Namespace: "shop", Object: mesh.ObjectRef{Kind: "Service", Namespace: "shop", Name: "web"},
		Ports: []mesh.Port{{Name: "http", Number: uint32(port), Protocol: mesh.HTTP}}}
	for _, version := range versions {
		b := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, version) }))
		t.Cleanup(b.Close)
		s.Endpoints = append(s.Endpoints, &mesh.Endpoint{Workload: "web-" + version, Namespace: "shop", Cluster: "amber", Network: "amber", Address: "127.0.0.1",
			Ports: map[uint32]uint32{uint32(port): uint32(b.Listener.Addr().(*net.TCPAddr).Port)}, Labels: map[string]string{"version": version}, Ready: true})
	}
	return s
}

// TestRulesInAnyOrder applies and removes a VirtualService and DestinationRules with their subsets in any order, while
// requests are on their way: none fails.
func TestRulesInAnyOrder(t *testing.T) {
	const requests = 10_000
	port := freePort(t)
	snap := world(20, 1)
	web := versioned(t, port, "v1", "v2", "v3")
	snap.Services = append(snap.Services, web)
	x := startLive(t, snap, port)
	x.until("the service answers", func() bool { status, _ := x.get(web.Host); return status == http.StatusOK })

	var sent, failed atomic.Int64
	var first atomic.Pointer[string]
	stop := make(chan struct{})
	var clients sync.WaitGroup
	for range 4 {
		clients.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				status, body := x.get(web.Host)
				if sent.Add(1); status != http.StatusOK {
					failed.Add(1)
					text := fmt.Sprintf("request %d: %d %s", sent.Load(), status, body)
					first.CompareAndSwap(nil, &text)
				}
			}
		})
	}
	r := rand.New(rand.NewPCG(uint64(time.Now().UnixNano()), 1))
	var history []string
	rounds, fine := 0, time.Now()
	for deadline := time.Now().Add(60 * time.Second); (sent.Load() < requests || rounds < 60) && time.Now().Before(deadline) && failed.Load() == 0; rounds++ {
		next := *x.source.snap
		name := []string{"a", "b"}[r.IntN(2)]
		subsets := []string{"v1", "v2", "v3"}[r.IntN(3):]
		switch what := r.IntN(6); what {
		case 0, 1:
			next.VirtualServices = []*mesh.VirtualService{routeTo("rule", web.Host, subsets[0])}
			history = append(history, "route to "+subsets[0])
		case 2:
			next.VirtualServices = nil
			history = append(history, "no route")
		case 3, 4:
			d := subsetRule(name, web.Host, subsets...)
			d.Spec.TrafficPolicy = &networking.TrafficPolicy{ConnectionPool: &networking.ConnectionPoolSettings{Tcp: &networking.ConnectionPoolSettings_TCPSettings{MaxConnections: int32(1000 + r.IntN(3))}}}
			next.DestinationRules = replacedIn(next.DestinationRules, d, func(x *mesh.DestinationRule) string { return x.Object.Name })
			history = append(history, fmt.Sprint("rule ", name, " ", subsets))
		case 5:
			next.DestinationRules = slices.DeleteFunc(slices.Clone(next.DestinationRules), func(x *mesh.DestinationRule) bool { return x.Object.Name == name })
			history = append(history, "no rule "+name)
		}
		x.source.set(&next)
		before := sent.Load()
		pause := time.Duration(r.IntN(120)) * time.Millisecond
		for until := time.Now().Add(pause); time.Now().Before(until) || sent.Load() < before+int64(r.IntN(100)); {
			time.Sleep(time.Millisecond)
			if failed.Load() > 0 || time.Now().After(deadline) {
				break
			}
		}
		// A mistake that lasts takes effect: here nobody is that slow.
		if !leading(x.source.snap) {
			fine = time.Now()
		} else if time.Since(fine) > 2*patience {
			mended := next
			mended.VirtualServices = nil
			x.source.set(&mended)
			history = append(history, "mended")
		}
	}
	close(stop)
	clients.Wait()
	if failed.Load() > 0 {
		t.Errorf("%d of %d requests failed, the first: %s; after %v", failed.Load(), sent.Load(), *first.Load(), history[max(0, len(history)-12):])
	}
	t.Logf("%d requests, %d changes, %d failed", sent.Load(), rounds, failed.Load())
	if sent.Load() < 1000 {
		t.Errorf("only %d requests", sent.Load())
	}
	for _, c := range x.srv.Clients() {
		for _, typ := range c.Types {
			if typ.Nacks > 0 {
				t.Errorf("%s was refused: %s", typ.TypeURL, typ.Nack)
			}
		}
	}
}

// leading reports whether a route leads to a subset that is not defined.
func leading(snap *mesh.Snapshot) bool {
	defined := subsetsIn(snap.DestinationRules)
	return slices.ContainsFunc(snap.VirtualServices, func(vs *mesh.VirtualService) bool { return leadsNowhere(snap, vs, defined) })
}
