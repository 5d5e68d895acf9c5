package xds

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"text/template"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	routerv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/isthmus-mesh/isthmus/internal/envoytest"
)

// TestEnvoy serves a real Envoy: two clusters, a listener and its routes; then it changes them under it, and restarts.
func TestEnvoy(t *testing.T) {
	envoytest.Path(t)
	for _, api := range []string{"DELTA_GRPC", "GRPC"} {
		t.Run(api, func(t *testing.T) { testEnvoy(t, api) })
	}
}

func testEnvoy(t *testing.T, api string) {
	backend := func(answer string) uint32 {
		s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, answer) }))
		t.Cleanup(s.Close)
		return uint32(s.Listener.Addr().(*net.TCPAddr).Port)
	}
	one, two, three := backend("one"), backend("two"), backend("three")
	feed := newMemory(nil) // Envoy connects before anything is known
	reg := prometheus.NewRegistry()
	cfg := Config{Reg: reg, Feed: func(Client) (Feed, func(), error) { return feed, nil, nil }}
	xds := serveTCP(t, cfg, "127.0.0.1:0")
	e := startEnvoy(t, api, xds.port)
	eventually(t, "Envoy connects", func() bool { return len(xds.srv.Clients()) == 1 })

	feed.publish(envoySet(t, map[string]uint32{"a": one, "b": two}, time.Second))
	e.serves("/a", "one")
	e.serves("/b", "two")
	eventually(t, "Envoy has accepted everything", xds.synced(4))

	// An endpoint changes.
	before := counted(t, reg)
	feed.publish(envoySet(t, map[string]uint32{"a": three, "b": two}, time.Second))
	e.serves("/a", "three")
	e.serves("/b", "two")
	if got := counted(t, reg) - before; got != 1 {
		t.Errorf("%v resources sent for one endpoint, want 1", got)
	}

	// A cluster changes: Envoy builds it anew and waits for its endpoints, for 15 s if they do not come.
	changed := time.Now()
	feed.publish(envoySet(t, map[string]uint32{"a": three, "b": two}, 2*time.Second))
	eventually(t, "the changed clusters are in use", func() bool {
		return strings.Count(e.admin("/config_dump"), `"connect_timeout": "2s"`) == 2 && e.warming() == 0
	})
	if took := time.Since(changed); took > 10*time.Second {
		t.Errorf("the changed clusters were in use after %v", took)
	}
	e.serves("/a", "three")

	// A cluster comes with its route, and goes.
	feed.publish(envoySet(t, map[string]uint32{"a": three, "b": two, "c": one}, 2*time.Second))
	e.serves("/c", "one")
	e.addUnderLoad(feed, map[string]uint32{"a": three, "b": two}, one)
	feed.publish(envoySet(t, map[string]uint32{"a": three, "b": two}, 2*time.Second))
	eventually(t, "the cluster is gone", func() bool { return !strings.Contains(e.admin("/clusters"), "c::") })
	eventually(t, "Envoy has accepted everything", xds.synced(4))
	for _, typ := range xds.srv.Clients()[0].Types {
		if typ.Nacks != 0 {
			t.Errorf("%s was refused: %s", shortName(typ.TypeURL), typ.Nack)
		}
	}

	// The server restarts: traffic goes on, and delta sends nothing again.
	addr := fmt.Sprintf("127.0.0.1:%d", xds.port)
	xds.stop()
	e.serves("/a", "three")
	reg = prometheus.NewRegistry()
	cfg.Reg = reg
	xds = serveTCP(t, cfg, addr)
	eventually(t, "Envoy is back", func() bool { return len(xds.srv.Clients()) == 1 && len(xds.srv.Clients()[0].Types) == 4 })
	feed.publish(envoySet(t, map[string]uint32{"a": one, "b": two}, 2*time.Second))
	e.serves("/a", "one")
	if got := counted(t, reg); api == "DELTA_GRPC" && got != 1 {
		t.Errorf("%v resources sent after a restart and one change, want 1", got)
	}
}

// envoySet is a listener with a route to each cluster by the cluster's name, and each cluster's one endpoint.
func envoySet(t *testing.T, ports map[string]uint32, timeout time.Duration) Set {
	t.Helper()
	pack := func(m proto.Message) *anypb.Any {
		a, err := anypb.New(m)
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	ads := &corev3.ConfigSource{ResourceApiVersion: corev3.ApiVersion_V3, ConfigSourceSpecifier: &corev3.ConfigSource_Ads{Ads: &corev3.AggregatedConfigSource{}}}
	address := func(port uint32) *corev3.Address {
		return &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
			Address: "127.0.0.1", PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: port}}}}
	}
	host := &routev3.VirtualHost{Name: "all", Domains: []string{"*"}}
	msgs := []proto.Message{
		&listenerv3.Listener{Name: "main", Address: address(0), FilterChains: []*listenerv3.FilterChain{{Filters: []*listenerv3.Filter{{
			Name: "envoy.filters.network.http_connection_manager",
			ConfigType: &listenerv3.Filter_TypedConfig{TypedConfig: pack(&hcmv3.HttpConnectionManager{
				StatPrefix:     "main",
				RouteSpecifier: &hcmv3.HttpConnectionManager_Rds{Rds: &hcmv3.Rds{ConfigSource: ads, RouteConfigName: "routes"}},
				HttpFilters: []*hcmv3.HttpFilter{{Name: "envoy.filters.http.router",
					ConfigType: &hcmv3.HttpFilter_TypedConfig{TypedConfig: pack(&routerv3.Router{})}}},
			})},
		}}}}},
		&routev3.RouteConfiguration{Name: "routes", VirtualHosts: []*routev3.VirtualHost{host}},
	}
	for _, name := range slices.Sorted(maps.Keys(ports)) {
		port := ports[name]
		host.Routes = append(host.Routes, &routev3.Route{
			Match:  &routev3.RouteMatch{PathSpecifier: &routev3.RouteMatch_Prefix{Prefix: "/" + name}},
			Action: &routev3.Route_Route{Route: &routev3.RouteAction{ClusterSpecifier: &routev3.RouteAction_Cluster{Cluster: name}}},
		})
		msgs = append(msgs,
			&clusterv3.Cluster{Name: name, ConnectTimeout: durationpb.New(timeout),
				ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_EDS},
				EdsClusterConfig:     &clusterv3.Cluster_EdsClusterConfig{EdsConfig: ads}},
			&endpointv3.ClusterLoadAssignment{ClusterName: name, Endpoints: []*endpointv3.LocalityLbEndpoints{{
				LbEndpoints: []*endpointv3.LbEndpoint{{HostIdentifier: &endpointv3.LbEndpoint_Endpoint{
					Endpoint: &endpointv3.Endpoint{Address: address(port)}}}}}}})
	}
	set, err := Encode(msgs...)
	if err != nil {
		t.Fatal(err)
	}
	return set
}

func counted(t *testing.T, reg *prometheus.Registry) float64 {
	return (&world{t: t, reg: reg}).sum("isthmus_xds_resources_sent_total")
}

// tcpServer is a server on a loopback port.
type tcpServer struct {
	srv  *Server
	port int
	stop func()
}

func serveTCP(t *testing.T, cfg Config, addr string) *tcpServer {
	t.Helper()
	lis, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	s := &tcpServer{srv: New(cfg), port: lis.Addr().(*net.TCPAddr).Port}
	g := grpc.NewServer(grpc.MaxRecvMsgSize(MaxRequestBytes), grpc.WaitForHandlers(true))
	s.srv.Register(g)
	done := make(chan struct{})
	go func() { defer close(done); g.Serve(lis) }()
	s.stop = func() { g.Stop(); <-done }
	t.Cleanup(s.stop)
	return s
}

// synced says that the one client has accepted what was sent last of that many types.
func (s *tcpServer) synced(types int) func() bool {
	return func() bool {
		clients := s.srv.Clients()
		if len(clients) != 1 || len(clients[0].Types) != types {
			return false
		}
		for _, typ := range clients[0].Types {
			if typ.Sent == "" || typ.Sent != typ.Acked || typ.Pending > 0 {
				return false
			}
		}
		return true
	}
}

type envoy struct {
	t         *testing.T
	adminAddr string
	addr      string
	client    *http.Client
}

var bootstrap = template.Must(template.New("").Parse(`
node: {id: sidecar~127.0.0.1~test.default~default.svc.cluster.local, cluster: test}
admin: {address: {socket_address: {address: 127.0.0.1, port_value: 0}}}
dynamic_resources:
  ads_config: {api_type: {{.API}}, transport_api_version: V3, set_node_on_first_message_only: true, grpc_services: [{envoy_grpc: {cluster_name: xds}}]}
  cds_config: {ads: {}, resource_api_version: V3}
  lds_config: {ads: {}, resource_api_version: V3}
static_resources:
  clusters:
  - name: xds
    type: STATIC
    connect_timeout: 1s
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {http2_protocol_options: {}}
    load_assignment:
      cluster_name: xds
      endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: 127.0.0.1, port_value: {{.Port}}}}}}]}]
`))

func startEnvoy(t *testing.T, api string, port int) *envoy {
	t.Helper()
	binary := envoytest.Path(t)
	dir := t.TempDir()
	var config bytes.Buffer
	if err := bootstrap.Execute(&config, map[string]any{"API": api, "Port": port}); err != nil {
		t.Fatal(err)
	}
	configPath, adminPath := filepath.Join(dir, "envoy.yaml"), filepath.Join(dir, "admin")
	if err := os.WriteFile(configPath, config.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	logFile, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(binary, "-c", configPath, "--admin-address-path", adminPath, "--use-dynamic-base-id", "--concurrency", "1", "--log-level", "warning")
	cmd.Stdout, cmd.Stderr = logFile, logFile
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	e := &envoy{t: t, client: &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		logFile.Close()
		if t.Failed() {
			text, _ := os.ReadFile(logFile.Name())
			t.Logf("Envoy's log:\n%s", text)
		}
	})
	eventually(t, "Envoy's admin port", func() bool {
		addr, err := os.ReadFile(adminPath)
		e.adminAddr = string(addr)
		return err == nil && e.adminAddr != ""
	})
	return e
}

// get returns the body, or an empty string if there was no answer of 200.
func (e *envoy) get(addr, path string) string {
	r, err := e.client.Get("http://" + addr + path)
	if err != nil {
		return ""
	}
	defer r.Body.Close()
	body, err := io.ReadAll(r.Body)
	if err != nil || r.StatusCode != http.StatusOK {
		return ""
	}
	return string(body)
}

func (e *envoy) admin(path string) string { return e.get(e.adminAddr, path) }

// warming counts the clusters that Envoy has and does not use yet.
func (e *envoy) warming() int {
	var stats struct{ Stats []struct{ Value int } }
	if json.Unmarshal([]byte(e.admin("/stats?format=json&filter=cluster_manager.warming_clusters")), &stats) != nil || len(stats.Stats) != 1 {
		return -1
	}
	return stats.Stats[0].Value
}

// serves waits for the answer to a path through the listener.
func (e *envoy) serves(path, want string) {
	e.t.Helper()
	eventually(e.t, path+" is answered by "+want, func() bool {
		if e.addr == "" {
			_, e.addr, _ = strings.Cut(strings.TrimSpace(e.admin("/listeners")), "::")
		}
		return e.addr != "" && e.get(e.addr, path) == want
	})
}

// addUnderLoad adds clusters with their routes 20 times while requests for them are on their way. They are answered by
// 404 before the route is there, and never by 503.
func (e *envoy) addUnderLoad(feed *memory, ports map[string]uint32, port uint32) {
	e.t.Helper()
	var fine, failed atomic.Int32
	var path atomic.Pointer[string]
	nowhere := "/nowhere"
	path.Store(&nowhere)
	stop := make(chan struct{})
	var clients sync.WaitGroup
	for range 4 {
		clients.Go(func() {
			for transport := (&http.Transport{}); ; {
				select {
				case <-stop:
					transport.CloseIdleConnections()
					return
				default:
				}
				r, err := (&http.Client{Transport: transport, Timeout: patience}).Get("http://" + e.addr + *path.Load())
				if err != nil {
					failed.Add(1)
					continue
				}
				io.Copy(io.Discard, r.Body)
				r.Body.Close()
				switch r.StatusCode {
				case http.StatusOK:
					fine.Add(1)
				case http.StatusNotFound:
				default:
					failed.Add(1)
				}
			}
		})
	}
	for round := range 20 {
		next := maps.Clone(ports)
		for n := range 10 {
			next[fmt.Sprintf("new%d-%d", round, n)] = port
		}
		wanted, before := fmt.Sprintf("/new%d-9", round), fine.Load()
		path.Store(&wanted)
		feed.publish(envoySet(e.t, next, 2*time.Second))
		eventually(e.t, wanted+" is answered", func() bool { return fine.Load() > before+20 })
	}
	close(stop)
	clients.Wait()
	if failed.Load() > 0 {
		e.t.Errorf("%d requests failed, %d were answered", failed.Load(), fine.Load())
	}
}
