package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	mdns "github.com/miekg/dns"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"

	dnsv1 "github.com/isthmus-mesh/isthmus/api/dns/v1"
	"github.com/isthmus-mesh/isthmus/cmd/isthmus-agent/internal/catest"
	"github.com/isthmus-mesh/isthmus/cmd/isthmus-agent/internal/config"
	"github.com/isthmus-mesh/isthmus/internal/diag"
	"github.com/isthmus-mesh/isthmus/internal/envoytest"
	"github.com/isthmus-mesh/isthmus/internal/porttest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// control answers every first request of a type: with one host for names, with nothing else for all others.
type control struct {
	discoveryv3.UnimplementedAggregatedDiscoveryServiceServer
	mu      sync.Mutex
	ids     map[string]bool // identities of callers
	nodes   map[string]bool // node ids
	streams int             // opened
	left    int             // machine streams that ended cleanly
	broken  int             // machine streams that did not
}

func (c *control) DeltaAggregatedResources(s discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) error {
	id := catest.PeerID(s.Context())
	if id == "" {
		return status.Error(codes.Unauthenticated, "no certificate")
	}
	c.mu.Lock()
	c.ids[id] = true
	c.streams++
	c.mu.Unlock()
	seen, machine := map[string]bool{}, false
	for {
		r, err := s.Recv()
		if err != nil {
			c.mu.Lock()
			defer c.mu.Unlock()
			switch {
			case machine && errors.Is(err, io.EOF):
				c.left++
			case machine:
				c.broken++
			}
			return nil
		}
		if r.GetNode() != nil {
			c.mu.Lock()
			c.nodes[r.GetNode().GetId()] = true
			c.mu.Unlock()
			machine = machine || r.GetNode().GetMetadata().GetFields()["ISTHMUS_MACHINE"].GetStringValue() == "true"
		}
		if seen[r.GetTypeUrl()] {
			continue
		}
		seen[r.GetTypeUrl()] = true
		reply := &discoveryv3.DeltaDiscoveryResponse{TypeUrl: r.GetTypeUrl(), Nonce: "1"}
		if r.GetTypeUrl() == hostType {
			body, _ := anypb.New(&dnsv1.Host{Name: "reviews.default.global", Addresses: []string{"240.1.2.3"}})
			reply.Resources = []*discoveryv3.Resource{{Name: "reviews.default.global", Version: "1", Resource: body}}
		}
		if err := s.Send(reply); err != nil {
			return err
		}
	}
}

func (c *control) counts() (streams, left, broken int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.streams, c.left, c.broken
}

const spiffe = "spiffe://amber.mesh/ns/default/sa/web"

func freePort(t *testing.T) int { return porttest.Take(t) }

func setUp(t *testing.T, role config.Role) (*config.Config, *control, *catest.Server) {
	t.Helper()
	root := catest.New(t)
	c := &control{ids: map[string]bool{}, nodes: map[string]bool{}}
	srv := root.Serve(t, "xds.amber.mesh", spiffe, "secret", func(s *grpc.Server) { discoveryv3.RegisterAggregatedDiscoveryServiceServer(s, c) })
	dir := t.TempDir()
	token := filepath.Join(dir, "token")
	if err := os.WriteFile(token, []byte("secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	resolv := filepath.Join(dir, "resolv.conf")
	if err := os.WriteFile(resolv, []byte("nameserver 127.0.0.1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	envoy := "envoy"
	if role != config.Relay {
		envoy = envoytest.Path(t)
	}
	text := fmt.Sprintf(`
role: %s
name: web-1
serviceAccount: web
cluster: amber
trustDomain: amber.mesh
addresses: [127.0.0.1]
controlPlane: {addresses: ["127.0.0.1:1", %q]}
rootCert: %s
tokenFile: %s
dataDir: %s
listenHealth: %d
envoy: {path: %s, concurrency: 1, adminPort: %d, statsPort: %d, logFile: %s, drainTime: 200ms}
dns: {port: %d, resolvConf: %s}
relay: {listen: "127.0.0.1:0", drainTime: 100ms}
`, role, srv.Address, root.RootFile(t), token, filepath.Join(dir, "data"), freePort(t), envoy, freePort(t), freePort(t), filepath.Join(dir, "envoy.log"), freePort(t), resolv)
	conf, err := config.Parse("agent.yaml", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return conf, c, srv
}

func start(t *testing.T, c *config.Config) (stop func() error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- Run(ctx, c, slog.New(slog.NewTextHandler(t.Output(), nil))) }()
	stop = sync.OnceValue(func() error {
		cancel()
		select {
		case err := <-done:
			return err
		case <-time.After(20 * time.Second):
			return errors.New("Run does not end")
		}
	})
	t.Cleanup(func() { _ = stop() })
	return stop
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(15 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within 15 s", what)
		}
		<-time.After(20 * time.Millisecond)
	}
}

func get(port int, path string) (int, string) {
	client := http.Client{Timeout: 2 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	r, err := client.Get("http://127.0.0.1:" + strconv.Itoa(port) + path)
	if err != nil {
		return 0, err.Error()
	}
	defer r.Body.Close()
	data, _ := io.ReadAll(r.Body)
	return r.StatusCode, string(data)
}

func ready(c *config.Config) func() bool {
	return func() bool { code, _ := get(c.ListenHealth, "/healthz/ready"); return code == http.StatusOK }
}

func TestSidecar(t *testing.T) {
	c, control, srv := setUp(t, config.Sidecar)
	stop := start(t, c)
	eventually(t, "ready", ready(c))
	if _, info := get(c.Envoy.AdminPort, "/server_info"); !strings.Contains(info, "sidecar~127.0.0.1~web-1.default~default.svc.cluster.local") {
		t.Errorf("server info: %.300s", info)
	}
	if code, body := get(c.Envoy.StatsPort, "/stats/prometheus"); code != 200 || !strings.Contains(body, "envoy_server_live") {
		t.Errorf("statistics: %d %.100s", code, body)
	}
	if code, _ := get(c.Envoy.StatsPort, "/quitquitquit"); code != 404 {
		t.Errorf("the statistics port answers %d to an admin path", code)
	}
	if _, body := get(c.ListenHealth, "/metrics"); !strings.Contains(body, "isthmus_agent_xds_streams 1") {
		t.Errorf("metrics: %s", body)
	}
	control.mu.Lock()
	if !control.ids[spiffe] || !control.nodes["sidecar~127.0.0.1~web-1.default~default.svc.cluster.local"] {
		t.Errorf("callers %v, nodes %v", control.ids, control.nodes)
	}
	control.mu.Unlock()
	if srv.Tokens.Load() != 1 {
		t.Errorf("token used %d times", srv.Tokens.Load())
	}
	if err := Run(t.Context(), c, slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), "another isthmus-agent") {
		t.Errorf("a second agent: %v", err)
	}
	pid := RunningPID(c.DataDir)
	if pid != os.Getpid() {
		t.Errorf("the agent is process %d by its file", pid)
	}
	// Envoy dies: readiness follows, and it is started again.
	data, err := os.ReadFile(filepath.Join(c.DataDir, "envoy.pid"))
	if err != nil {
		t.Fatal(err)
	}
	envoy, _ := strconv.Atoi(string(bytes.TrimSpace(data)))
	if err := syscall.Kill(envoy, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "not ready", func() bool { return !ready(c)() })
	eventually(t, "ready again", ready(c))
	if err := stop(); err != nil {
		t.Error(err)
	}
	if RunningPID(c.DataDir) != 0 {
		t.Error("the lock is held on")
	}
}

func TestMachine(t *testing.T) {
	c, control, _ := setUp(t, config.Machine)
	stop := start(t, c)
	eventually(t, "ready", ready(c))
	ask := func(network string) *mdns.Msg {
		client := mdns.Client{Net: network, Timeout: time.Second}
		r, _, err := client.Exchange(new(mdns.Msg).SetQuestion("reviews.default.global.", mdns.TypeA), "127.0.0.1:"+strconv.Itoa(c.DNS.Port))
		if err != nil {
			return new(mdns.Msg)
		}
		return r
	}
	for _, network := range []string{"udp", "tcp"} {
		eventually(t, "answer over "+network, func() bool {
			r := ask(network)
			return len(r.Answer) == 1 && strings.Contains(r.Answer[0].String(), "240.1.2.3")
		})
	}
	info, err := os.Stat(filepath.Join(c.DataDir, "identity.pem"))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("kept certificate: %v, %v", info, err)
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
	if _, left, broken := control.counts(); left != 1 || broken != 0 {
		t.Errorf("%d clean and %d broken ends of the registration, want 1 and 0", left, broken)
	}
}

func TestRelay(t *testing.T) {
	c, control, _ := setUp(t, config.Relay)
	stop := start(t, c)
	eventually(t, "ready", ready(c))
	control.mu.Lock()
	if !control.nodes["router~127.0.0.1~web-1.default~default.svc.cluster.local"] {
		t.Errorf("nodes %v", control.nodes)
	}
	control.mu.Unlock()
	if err := stop(); err != nil {
		t.Error(err)
	}
}

func TestRefusals(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*config.Config)
		want   string
	}{
		"root":      {func(c *config.Config) { c.RootCert = "/nowhere.pem" }, "root certificate"},
		"token":     {func(c *config.Config) { c.TokenFile = "/nowhere" }, "read token"},
		"envoy":     {func(c *config.Config) { c.Envoy.Path = "/nowhere/envoy" }, `no Envoy at "/nowhere/envoy"`},
		"bootstrap": {func(c *config.Config) { c.Envoy.CustomBootstrap = "/nowhere.json" }, "custom bootstrap"},
	} {
		conf, _, _ := setUp(t, config.Sidecar)
		c.change(conf)
		err := Run(t.Context(), conf, slog.New(slog.DiscardHandler))
		if err == nil || !strings.Contains(err.Error(), c.want) || diag.HintOf(err) == "" || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v (%s)", name, err, diag.HintOf(err))
		}
	}
}

// Envoy takes each renewed certificate without a restart.
func TestRotation(t *testing.T) {
	c, _, srv := setUp(t, config.Sidecar)
	srv.TTL = 3 * time.Second
	custom := filepath.Join(t.TempDir(), "custom.yaml")
	if err := os.WriteFile(custom, []byte(`
static_resources:
  clusters:
  - name: peer
    type: STATIC
    load_assignment: {cluster_name: peer, endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: 127.0.0.1, port_value: 1}}}}]}]}
    transport_socket:
      name: envoy.transport_sockets.tls
      typed_config:
        "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext
        common_tls_context:
          tls_certificate_sds_secret_configs:
          - name: default
            sds_config: {resource_api_version: V3, api_config_source: {api_type: GRPC, transport_api_version: V3, grpc_services: [{envoy_grpc: {cluster_name: sds-grpc}}]}}
`), 0o600); err != nil {
		t.Fatal(err)
	}
	c.Envoy.CustomBootstrap = custom
	stop := start(t, c)
	eventually(t, "ready", ready(c))
	serials, pids := map[string]bool{}, map[string]bool{}
	eventually(t, "three serial numbers", func() bool {
		var certs struct {
			Certificates []struct {
				Chain []struct {
					Serial string `json:"serial_number"`
				} `json:"cert_chain"`
			} `json:"certificates"`
		}
		_, body := get(c.Envoy.AdminPort, "/certs")
		_ = json.Unmarshal([]byte(body), &certs)
		for _, cert := range certs.Certificates {
			for _, leaf := range cert.Chain {
				serials[leaf.Serial] = true
			}
		}
		pid, _ := os.ReadFile(filepath.Join(c.DataDir, "envoy.pid"))
		pids[string(pid)] = true
		return len(serials) >= 3
	})
	if len(pids) != 1 {
		t.Errorf("Envoy was restarted: %v", pids)
	}
	if srv.Tokens.Load() != 1 || srv.Certs.Load() < 2 {
		t.Errorf("%d certificates by token, %d by certificate", srv.Tokens.Load(), srv.Certs.Load())
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
}
