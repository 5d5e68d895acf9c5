package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"github.com/isthmus-mesh/isthmus/cmd/isthmus-agent/internal/catest"
	"github.com/isthmus-mesh/isthmus/internal/envoytest"
)

// noteControl answers as quietControl and remembers who asked.
type noteControl struct {
	quietControl
	mu   sync.Mutex
	node map[string]any
	id   string
	from []string
}

func (n *noteControl) DeltaAggregatedResources(s discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) error {
	md, _ := metadata.FromIncomingContext(s.Context())
	n.mu.Lock()
	n.from = md.Get("clusterid")
	n.mu.Unlock()
	return n.quietControl.DeltaAggregatedResources(&noteStream{s, n})
}

type noteStream struct {
	discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesServer
	n *noteControl
}

func (s *noteStream) Recv() (*discoveryv3.DeltaDiscoveryRequest, error) {
	r, err := s.AggregatedDiscoveryService_DeltaAggregatedResourcesServer.Recv()
	if err == nil && r.GetNode().GetId() != "" {
		s.n.mu.Lock()
		defer s.n.mu.Unlock()
		s.n.node, s.n.id = r.GetNode().GetMetadata().AsMap(), r.GetNode().GetId()
	}
	return r, err
}

// TestProxyInAPod runs the agent as injection does: by its environment alone. The files that a kubelet would mount come
// late, as they may.
func TestProxyInAPod(t *testing.T) {
	envoy := envoytest.Path(t)
	const id = "spiffe://amber.mesh/ns/shop/sa/web"
	root, control := catest.New(t), &noteControl{}
	srv := root.Serve(t, "istiod.istio-system.svc", id, "secret", func(s *grpc.Server) {
		discoveryv3.RegisterAggregatedDiscoveryServiceServer(s, control)
	})
	app := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.URL.Path == "/metrics":
			fmt.Fprint(w, "# TYPE app_requests counter\napp_requests 7\n# EOF\n")
		case r.URL.Path == "/live" && r.URL.RawQuery == "q=1" && r.Host == "web.shop" && r.Header.Get("X-Probe") == "yes":
			w.WriteHeader(http.StatusNoContent)
		default:
			http.NotFound(w, r)
		}
	}))
	t.Cleanup(app.Close)
	_, port, _ := net.SplitHostPort(app.Listener.Addr().String())

	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	write := func(name, text string) {
		if err := os.WriteFile(path(name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("labels", "app=\"web\"\nversion=\"v1\"\n")
	write("annotations", "note=\"a \\\"quoted\\\" word\"\nsidecar.istio.io/status=\"{}\"\n")
	write("bootstrap.json", `{"stats_flush_interval": "7s"}`)
	status, admin := freePort(t), freePort(t)
	env := map[string]string{
		"POD_NAME": "web-1", "POD_NAMESPACE": "shop", "SERVICE_ACCOUNT": "web", "INSTANCE_IP": "127.0.0.1", "TRUST_DOMAIN": "amber.mesh",
		"CA_ADDR": srv.Address, "PROXY_CONFIG": fmt.Sprintf(`{"discoveryAddress":%q,"proxyAdminPort":%d,"statusPort":%d,"concurrency":1,"terminationDrainDuration":"0.2s"}`, srv.Address, admin, status),
		"ISTIO_META_CLUSTER_ID": "east", "ISTIO_META_NETWORK": "east-net", "ISTIO_META_WORKLOAD_NAME": "web", "ISTIO_META_OWNER": "kubernetes://apis/apps/v1/namespaces/shop/deployments/web",
		"ISTIO_META_INTERCEPTION_MODE": "REDIRECT", "ISTIO_META_APP_CONTAINERS": "web", "ISTHMUS_CONTROL_PLANE_NAME": "istiod.istio-system.svc", "ENVOY": envoy,
		"ISTIO_BOOTSTRAP_OVERRIDE":     path("bootstrap.json"),
		"ISTIO_KUBE_APP_PROBERS":       `{"/app-health/web/livez":{"httpGet":{"path":"/live?q=1","port":` + port + `,"httpHeaders":[{"name":"Host","value":"web.shop"},{"name":"X-Probe","value":"yes"}]},"timeoutSeconds":2}}`,
		"ISTIO_PROMETHEUS_ANNOTATIONS": `{"scrape":"true","path":"/metrics","port":"` + port + `"}`,
		"ISTHMUS_ROOT_CERT":            path("root-cert.pem"), "ISTHMUS_TOKEN_FILE": path("token"), "ISTHMUS_POD_LABELS": path("labels"), "ISTHMUS_POD_ANNOTATIONS": path("annotations"), "ISTHMUS_DATA_DIR": path("data"),
	}
	cmd := program("proxy", "sidecar", "--domain", "$(POD_NAMESPACE).svc.cluster.local", "--proxyLogLevel=warning", "--proxyComponentLogLevel=misc:error", "--log_output_level=default:info")
	for k, v := range env {
		cmd.Env = append(cmd.Env, k+"="+v)
	}
	cmd.Stdout, cmd.Stderr = t.Output(), t.Output()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	t.Cleanup(func() { _ = cmd.Process.Signal(syscall.SIGTERM); <-ended; ended <- nil })

	base := "http://127.0.0.1:" + strconv.Itoa(status)
	client := http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	get := func(path string) (int, string) {
		r, err := client.Get(base + path)
		if err != nil {
			return 0, err.Error()
		}
		defer r.Body.Close()
		text, _ := io.ReadAll(r.Body)
		return r.StatusCode, string(text)
	}
	write("token", "secret\n")
	write("root-cert.pem", string(root.PEM))
	eventually(t, "ready", func() bool { code, _ := get("/healthz/ready"); return code == http.StatusOK })

	control.mu.Lock()
	node, nodeID, from := control.node, control.id, control.from
	control.mu.Unlock()
	if nodeID != "sidecar~127.0.0.1~web-1.shop~shop.svc.cluster.local" || len(from) != 1 || from[0] != "east" {
		t.Errorf("node %s from cluster %v", nodeID, from)
	}
	for key, want := range map[string]string{"CLUSTER_ID": "east", "NETWORK": "east-net", "NAMESPACE": "shop", "SERVICE_ACCOUNT": "web", "WORKLOAD_NAME": "web",
		"INTERCEPTION_MODE": "REDIRECT", "APP_CONTAINERS": "web", "INSTANCE_IPS": "127.0.0.1", "OWNER": env["ISTIO_META_OWNER"]} {
		if node[key] != want {
			t.Errorf("metadata %s is %v, want %s", key, node[key], want)
		}
	}
	labels, _ := json.Marshal(node["LABELS"])
	annotations, _ := json.Marshal(node["ANNOTATIONS"])
	if string(labels) != `{"app":"web","version":"v1"}` || string(annotations) != `{"note":"a \"quoted\" word"}` {
		t.Errorf("labels %s, annotations %s", labels, annotations)
	}
	if code, _ := get("/app-health/web/livez"); code != http.StatusNoContent {
		t.Errorf("probe: %d", code)
	}
	if code, _ := get("/app-health/web/readyz"); code != http.StatusNotFound {
		t.Errorf("a probe that is none: %d", code)
	}
	data, err := os.ReadFile(path("data/envoy.json"))
	if err != nil || !strings.Contains(string(data), `"stats_flush_interval": "7s"`) {
		t.Errorf("the bootstrap override is not in it: %v", err)
	}
	_, text := get("/stats/prometheus")
	for _, want := range []string{"app_requests 7\n", "isthmus_agent_certificate_expiry_timestamp_seconds ", "envoy_server_live"} {
		if !strings.Contains(text, want) {
			t.Errorf("merged metrics have no %q", want)
		}
	}
	if strings.Contains(text, "# EOF") {
		t.Error("merged metrics have a mark of their end in the middle")
	}
	r, err := client.Post(base+"/quitquitquit", "", nil)
	if err != nil || r.StatusCode != http.StatusOK {
		t.Fatalf("quit: %v %v", r, err)
	}
	r.Body.Close()
	select {
	case err := <-ended:
		if err != nil {
			t.Errorf("end: %v", err)
		}
		ended <- nil
	case <-time.After(30 * time.Second):
		t.Error("it does not end")
	}
}

func TestInitRules(t *testing.T) {
	for _, c := range []struct {
		args []string
		code int
		want []string
	}{
		{[]string{"-p", "15001", "-z", "15006", "-u", "1337", "-m", "REDIRECT", "-i", "*", "-x", "10.0.0.0/8,fd00::/8", "-b", "*", "-d", "15090,15021,15020,22", "--dry-run"}, 0,
			[]string{"meta skuid 1337 return", "meta skgid 1337 return", "ip daddr 10.0.0.0/8 return", "ip6 daddr fd00::/8 return", "tcp dport 22 return", "jump ISTIO_IN_REDIRECT"}},
		{[]string{"-m", "TPROXY", "-b", "80", "-o", "3306", "-q", "443", "-i", "", "-n"}, 0, []string{"tproxy to :15006", "tcp dport 80 jump ISTIO_TPROXY", "tcp dport 3306 return", "tcp dport 443 jump ISTIO_REDIRECT"}},
		{[]string{"-i", "10.0.0", "-n"}, 1, []string{"-i:", "10.0.0", "hint:"}},
		{[]string{"-d", "http", "-n"}, 1, []string{"-d:", "http"}},
		{[]string{"-u", "proxy", "-n"}, 1, []string{"-u:", "proxy"}},
		{[]string{"-m", "NONE", "-n"}, 1, []string{"-m:", "NONE"}},
	} {
		out, _ := program(append([]string{"init"}, c.args...)...).CombinedOutput()
		for _, want := range c.want {
			if !strings.Contains(string(out), want) {
				t.Errorf("%v: no %q in\n%s", c.args, want, out)
			}
		}
		if failed := strings.HasPrefix(string(out), "isthmus-agent:"); failed != (c.code != 0) {
			t.Errorf("%v: %s", c.args, out)
		}
	}
}
