package views

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/structpb"
	networking "istio.io/api/networking/v1"
	envoyfilter "istio.io/api/networking/v1alpha3"
	"pgregory.net/rapid"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/discovery/xds"
	"github.com/isthmus-mesh/isthmus/internal/envoytest"
	"github.com/isthmus-mesh/isthmus/internal/porttest"
)

// luaFilter puts a script in front of the router of gateways.
func luaFilter(t testing.TB, name, script string) *mesh.EnvoyFilter {
	t.Helper()
	value, err := structpb.NewStruct(map[string]any{"name": name, "typed_config": map[string]any{
		"@type": "type.googleapis.com/envoy.extensions.filters.http.lua.v3.Lua", "default_source_code": map[string]any{"inline_string": script},
	}})
	if err != nil {
		t.Fatal(err)
	}
	return &mesh.EnvoyFilter{Object: mesh.ObjectRef{Kind: "EnvoyFilter", Namespace: "shop", Name: name}, Spec: &envoyfilter.EnvoyFilter{
		ConfigPatches: []*envoyfilter.EnvoyFilter_EnvoyConfigObjectPatch{{
			ApplyTo: envoyfilter.EnvoyFilter_HTTP_FILTER,
			Match:   &envoyfilter.EnvoyFilter_EnvoyConfigObjectMatch{Context: envoyfilter.EnvoyFilter_GATEWAY},
			Patch:   &envoyfilter.EnvoyFilter_Patch{Operation: envoyfilter.EnvoyFilter_Patch_INSERT_FIRST, Value: value},
		}},
	}}
}

// edge is a world with a gateway that listens on the port.
func edge(port uint32, filters ...*mesh.EnvoyFilter) *mesh.Snapshot {
	snap := world(0, 0)
	snap.Gateways = []*mesh.Gateway{{Object: mesh.ObjectRef{Kind: "Gateway", Namespace: "shop", Name: "edge"}, Spec: &networking.Gateway{
		Selector: map[string]string{"istio": "ingressgateway"}, Servers: []*networking.Server{{Port: &networking.Port{Number: port, Protocol: "HTTP", Name: "http"}, Hosts: []string{"*"}}},
	}}}
	snap.EnvoyFilters = filters
	return snap
}

func gatewayNode(t testing.TB, name string) *corev3.Node {
	t.Helper()
	meta, err := structpb.NewStruct(map[string]any{"LABELS": map[string]any{"istio": "ingressgateway"}})
	if err != nil {
		t.Fatal(err)
	}
	return &corev3.Node{Id: "router~10.9.0.1~" + name + ".shop~shop.svc.cluster.local", Metadata: meta}
}

// TestTrials: whichever filters a client refuses, those and no others are out in the end.
func TestTrials(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		var filters []*mesh.EnvoyFilter
		bad := map[string]bool{}
		for i := range rapid.IntRange(1, 5).Draw(rt, "filters") {
			name := fmt.Sprintf("filter-%d", i)
			bad[name] = rapid.Bool().Draw(rt, "bad")
			filters = append(filters, luaFilter(t, name, "-- "+name))
		}
		vs, _ := views(edge(8080, filters...))
		f, _, err := vs.Feed(gatewayNode(t, "edge"), "")
		if err != nil {
			rt.Fatal(err)
		}
		answer := func() (refused bool) {
			set, _ := f.Latest()
			for r := range set[xds.ListenerType].All() {
				var refusal *string
				for n, isBad := range bad {
					if isBad && strings.Contains(string(r.Body.Value), n) {
						text := "Error adding/updating listener(s) " + r.Name + ": no good"
						refusal = &text
					}
				}
				f.(xds.Judge).Answered(xds.ListenerType, []*xds.Resource{r}, refusal)
				refused = refused || refusal != nil
			}
			vs.mu.Lock()
			vs.judge()
			vs.mu.Unlock()
			return refused
		}
		for range 4 * len(filters) {
			answer()
		}
		if answer() {
			rt.Fatal("something bad is still served")
		}
		set, _ := f.Latest()
		body := ""
		for r := range set[xds.ListenerType].All() {
			body += string(r.Body.Value)
		}
		out := map[string]bool{}
		for _, p := range vs.Problems() {
			if p.Reason == "RefusedByEnvoy" && strings.Contains(p.Message, "no good") {
				out[p.Object.Name] = true
			}
		}
		for name, isBad := range bad {
			if strings.Contains(body, name) == isBad || out[name] != isBad {
				rt.Fatalf("%s: bad %v, reported %v, served %v", name, isBad, out[name], !isBad)
			}
		}
	})
}

// TestTrialForeign: what one client refuses stays with others that are served something else, and an old refusal does nothing.
func TestTrialForeign(t *testing.T) {
	filter := luaFilter(t, "one", "-- one")
	vs, _ := views(edge(8080, filter))
	a, _, _ := vs.Feed(gatewayNode(t, "a"), "")
	b, release, _ := vs.Feed(gatewayNode(t, "b"), "") // a gateway is served for itself
	set, _ := a.Latest()
	old := set[xds.ListenerType].Get("0.0.0.0_8080")
	text := "no"
	refuse := func(f xds.Feed) {
		f.(xds.Judge).Answered(xds.ListenerType, []*xds.Resource{old}, &text)
		vs.mu.Lock()
		vs.judge()
		vs.mu.Unlock()
	}
	has := func(f xds.Feed) bool {
		set, _ := f.Latest()
		return strings.Contains(string(set[xds.ListenerType].Get("0.0.0.0_8080").Body.Value), "one")
	}
	refuse(a)
	if has(a) || !has(b) {
		t.Fatalf("a has the filter: %v, b: %v", has(a), has(b))
	}
	refuse(a) // of what is served no longer
	if n := len(vs.Problems()); n != 1 {
		t.Errorf("%d problems", n)
	}
	release()
	refuse(b) // gone
	if len(vs.trials) != 1 {
		t.Errorf("%d trials", len(vs.trials))
	}
}

// moving is a mesh.Snapshots that moves.
type moving struct {
	mu      sync.Mutex
	snap    *mesh.Snapshot
	changed chan struct{}
}

func (m *moving) Latest() (*mesh.Snapshot, <-chan struct{}) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.snap, m.changed
}

func (m *moving) set(snap *mesh.Snapshot) {
	m.mu.Lock()
	defer m.mu.Unlock()
	snap.Revision = m.snap.Revision + 1
	m.snap = snap
	close(m.changed)
	m.changed = make(chan struct{})
}

// TestEnvoyRefuses: of three filters the one that a real Envoy refuses is taken back, and comes when it is corrected.
func TestEnvoyRefuses(t *testing.T) {
	envoy := envoytest.Path(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := freePort(t)
	source := &moving{snap: edge(uint32(port)), changed: make(chan struct{})}
	vs := New(source, slog.New(slog.DiscardHandler), prometheus.NewRegistry())
	ctx, cancel := context.WithCancel(t.Context())
	ran := make(chan struct{})
	go func() { vs.Run(ctx); close(ran) }()
	srv := xds.New(xds.Config{Reg: prometheus.NewRegistry(), Feed: func(c xds.Client) (xds.Feed, func(), error) { return vs.Feed(c.Node, c.Identity) }})
	gs := grpc.NewServer(grpc.MaxRecvMsgSize(xds.MaxRequestBytes))
	srv.Register(gs)
	go gs.Serve(l)
	t.Cleanup(func() { gs.Stop(); cancel(); <-ran })
	startGateway(t, envoy, l.Addr().(*net.TCPAddr).Port)

	header := func(name string) string {
		return `function envoy_on_response(h) h:headers():add("x-` + name + `", "yes") end`
	}
	get := func() (http.Header, bool) {
		resp, err := (&http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}).Get(fmt.Sprintf("http://127.0.0.1:%d/", port))
		if err != nil {
			return nil, false
		}
		resp.Body.Close()
		return resp.Header, resp.StatusCode == http.StatusNotFound
	}
	wait := func(what string, ok func() bool) {
		t.Helper()
		for deadline := time.Now().Add(60 * time.Second); !ok(); time.Sleep(50 * time.Millisecond) {
			if time.Now().After(deadline) {
				h, up := get()
				t.Fatalf("never: %s; up %v, headers %v, problems %v", what, up, h, vs.Problems())
			}
		}
	}
	wait("the gateway listens", func() bool { _, up := get(); return up })
	good, better := luaFilter(t, "good", header("good")), luaFilter(t, "better", header("better"))
	source.set(edge(uint32(port), better, luaFilter(t, "broken", "this is no Lua"), good))
	wait("both good filters work and the broken one is reported", func() bool {
		h, up := get()
		return up && h.Get("x-good") != "" && h.Get("x-better") != "" && slices.ContainsFunc(vs.Problems(), func(p mesh.Problem) bool {
			return p.Object.Name == "broken" && p.Reason == "RefusedByEnvoy" && strings.Contains(p.Message, "script load error")
		})
	})
	if n := len(vs.Problems()); n != 1 {
		t.Errorf("%d problems: %v", n, vs.Problems())
	}
	source.set(edge(uint32(port), better, luaFilter(t, "broken", header("mended")), good))
	wait("the mended filter works", func() bool {
		h, _ := get()
		return h.Get("x-mended") != "" && h.Get("x-good") != "" && len(vs.Problems()) == 0
	})
}

func freePort(t *testing.T) int { return porttest.Take(t) }

// startGateway runs Envoy as a gateway of the control plane at the port.
func startGateway(t *testing.T, envoy string, port int) {
	t.Helper()
	startProxy(t, envoy, map[string]any{"id": gatewayNode(t, "edge").Id, "cluster": "edge", "metadata": map[string]any{"LABELS": map[string]any{"istio": "ingressgateway"}}}, port)
}

// startProxy runs Envoy as that node of the control plane at the port.
func startProxy(t *testing.T, envoy string, node map[string]any, port int) {
	t.Helper()
	grpcService := []any{map[string]any{"envoy_grpc": map[string]any{"cluster_name": "xds"}}}
	ads := map[string]any{"ads": map[string]any{}, "resource_api_version": "V3"}
	text, err := json.Marshal(map[string]any{
		"node": node,
		"dynamic_resources": map[string]any{
			"ads_config": map[string]any{"api_type": "DELTA_GRPC", "transport_api_version": "V3", "grpc_services": grpcService}, "cds_config": ads, "lds_config": ads,
		},
		"static_resources": map[string]any{"clusters": []any{map[string]any{
			"name": "xds", "type": "STATIC", "connect_timeout": "1s",
			"typed_extension_protocol_options": map[string]any{"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": map[string]any{
				"@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions", "explicit_http_config": map[string]any{"http2_protocol_options": map[string]any{}},
			}},
			"load_assignment": map[string]any{"cluster_name": "xds", "endpoints": []any{map[string]any{"lb_endpoints": []any{map[string]any{"endpoint": map[string]any{
				"address": map[string]any{"socket_address": map[string]any{"address": "127.0.0.1", "port_value": port}},
			}}}}}},
		}, map[string]any{"name": "sds-grpc", "type": "STATIC", "load_assignment": map[string]any{"cluster_name": "sds-grpc"}}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "envoy.json")
	if err := os.WriteFile(path, text, 0o600); err != nil {
		t.Fatal(err)
	}
	log, err := os.Create(path + ".log")
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(envoy, "-c", path, "--concurrency", "1", "--use-dynamic-base-id", "--disable-hot-restart", "-l", "warning")
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if t.Failed() {
			out, _ := os.ReadFile(log.Name())
			t.Logf("envoy says:\n%s", out[max(0, len(out)-4000):])
		}
	})
}
