package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/isthmus-mesh/isthmus/api/admin"
	"github.com/isthmus-mesh/isthmus/internal/porttest"
	"github.com/isthmus-mesh/isthmus/internal/xdsclient"
)

func TestMain(m *testing.M) {
	if path := os.Getenv(replicaEnv); path != "" { // this process is a replica that a test kills
		runReplica(path)
		return
	}
	goleak.VerifyTestMain(m, klogFlush, goleak.IgnoreTopFunction("github.com/hashicorp/memberlist.(*Memberlist).probeNode")) // a probe under way ends by itself
}

// patience is how long a condition may take to come true.
const patience = 60 * time.Second

// eventually waits until check returns nil.
func eventually(t *testing.T, what string, check func() error) {
	t.Helper()
	started := time.Now()
	defer func() {
		if took := time.Since(started); took > time.Second {
			t.Logf("%s: after %v", what, took.Round(time.Millisecond))
		}
	}()
	deadline, tick := time.After(patience), time.NewTicker(10*time.Millisecond)
	defer tick.Stop()
	for {
		err := check()
		if err == nil {
			return
		}
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("%s: not within %v: %v", what, patience, err)
		}
	}
}

// freeAddr returns a loopback address that nobody listens on.
func freeAddr(t *testing.T) string { return fmt.Sprintf("127.0.0.1:%d", porttest.Take(t)) }

// daemonTest is one isthmusd in this process.
type daemonTest struct {
	cfg    Config
	reg    *prometheus.Registry
	log    *logBuffer
	cancel context.CancelFunc
	done   chan struct{}
	err    error  // of run, when done is closed
	ca     []byte // root in PEM, where it is not in a file
}

// logBuffer keeps what was logged, for the output of a failed test.
type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// testConfig makes a configuration with folders of its own, and ports that are free.
func testConfig(t *testing.T, cluster string) Config {
	t.Helper()
	dir, err := os.MkdirTemp("", "isthmusd") // t.TempDir is too long for a socket's path
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	cfg := defaultConfig()
	cfg.Cluster, cfg.TrustDomain, cfg.Network = cluster, cluster+".mesh", cluster
	cfg.DataDir, cfg.Source.Dir, cfg.Admin.Socket = filepath.Join(dir, "data"), filepath.Join(dir, "objects"), filepath.Join(dir, "admin.sock")
	cfg.Listen, cfg.Metrics, cfg.Audit.File = freeAddr(t), "", filepath.Join(dir, "audit.jsonl")
	cfg.Advertise = []string{cfg.Listen}
	cfg.allowLoopback = true
	if err := os.MkdirAll(cfg.Source.Dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := cfg.validate(); err != nil {
		t.Fatal(err)
	}
	return cfg
}

// start runs an isthmusd and waits for its first snapshot. The test's end stops it.
func start(t *testing.T, cfg Config) *daemonTest {
	t.Helper()
	d := launch(cfg)
	t.Cleanup(func() {
		d.stop(t)
		if t.Failed() {
			t.Logf("log of %s:\n%s", cfg.Cluster, d.log)
		}
	})
	eventually(t, cfg.Cluster+" is ready", func() error {
		select {
		case <-d.done:
			t.Fatalf("isthmusd of %s ended: %v", cfg.Cluster, d.err)
		default:
		}
		var s admin.Status
		if err := d.call("GET", "/v1/status", nil, &s); err != nil {
			return err
		}
		if !s.Ready {
			return errors.New("no snapshot yet")
		}
		return nil
	})
	return d
}

func launch(cfg Config) *daemonTest {
	ctx, cancel := context.WithCancel(context.Background())
	d := &daemonTest{cfg: cfg, reg: prometheus.NewRegistry(), log: &logBuffer{}, cancel: cancel, done: make(chan struct{})}
	log := slog.New(slog.NewTextHandler(d.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	go func() {
		defer close(d.done)
		d.err = run(ctx, cfg, log, d.reg)
	}()
	return d
}

// stop ends it and waits.
func (d *daemonTest) stop(t *testing.T) {
	t.Helper()
	d.cancel()
	select {
	case <-d.done:
		if d.err != nil {
			t.Errorf("isthmusd of %s ended with: %v", d.cfg.Cluster, d.err)
		}
	case <-time.After(patience):
		t.Errorf("isthmusd of %s does not end", d.cfg.Cluster)
	}
}

// call talks to the admin socket as the operator's tool does.
func (d *daemonTest) call(method, path string, in, out any) error {
	transport := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", d.cfg.Admin.Socket)
	}}
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return err
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequest(method, "http://isthmusd"+path, body)
	if err != nil {
		return err
	}
	resp, err := (&http.Client{Transport: transport, Timeout: patience}).Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		e := new(admin.Error)
		if err := json.NewDecoder(resp.Body).Decode(e); err != nil {
			return fmt.Errorf("%s: %w", resp.Status, err)
		}
		return e
	}
	if out == nil {
		return nil
	}
	return json.NewDecoder(resp.Body).Decode(out)
}

func (d *daemonTest) status(t *testing.T) admin.Status {
	t.Helper()
	var s admin.Status
	if err := d.call("GET", "/v1/status", nil, &s); err != nil {
		t.Fatal(err)
	}
	return s
}

// write puts objects into the folder as an editor does: all at once.
func (d *daemonTest) write(t *testing.T, name, content string) { writeObjects(t, d.cfg, name, content) }

func writeObjects(t *testing.T, cfg Config, name, content string) {
	t.Helper()
	tmp := filepath.Join(cfg.Source.Dir, "."+name+".new")
	if err := errors.Join(os.WriteFile(tmp, []byte(content), 0o644), os.Rename(tmp, filepath.Join(cfg.Source.Dir, name))); err != nil {
		t.Fatal(err)
	}
}

// workloadToken is what a kubelet would mount.
func (d *daemonTest) workloadToken(t *testing.T, namespace, account, pod string) string {
	t.Helper()
	var reply admin.TokenReply
	if err := d.call("POST", "/v1/workload-tokens", admin.WorkloadTokenRequest{Namespace: namespace, ServiceAccount: account, Pod: pod}, &reply); err != nil {
		t.Fatal(err)
	}
	return reply.Token
}

// roots of the cluster, as its workloads are given them.
func (d *daemonTest) roots(t *testing.T) *x509.CertPool {
	t.Helper()
	data, err := os.ReadFile(d.cfg.data("root-cert.pem"))
	pool := x509.NewCertPool()
	if err != nil || !pool.AppendCertsFromPEM(data) {
		t.Fatalf("root certificate: %v", err)
	}
	return pool
}

// bearer is a token on every call.
type bearer string

func (b bearer) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	return map[string]string{"authorization": "Bearer " + string(b)}, nil
}

func (bearer) RequireTransportSecurity() bool { return true }

// dialOptions are those of a workload with a token, a certificate, both or neither.
func (d *daemonTest) dialOptions(t *testing.T, token string, certs ...tls.Certificate) []grpc.DialOption {
	t.Helper()
	out := []grpc.DialOption{grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{
		RootCAs: d.roots(t), ServerName: "xds." + d.cfg.TrustDomain, MinVersion: tls.VersionTLS13, Certificates: certs,
	}))}
	if token != "" {
		out = append(out, grpc.WithPerRPCCredentials(bearer(token)))
	}
	return out
}

// dial connects to the TLS port.
func (d *daemonTest) dial(t *testing.T, options []grpc.DialOption) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient(d.cfg.Listen, options...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// sent sums the resources sent since the start, without those of federation links.
func (d *daemonTest) sent(t *testing.T) float64 {
	t.Helper()
	return d.metric(t, "isthmus_xds_resources_sent_total")
}

func (d *daemonTest) metric(t *testing.T, name string) (sum float64) {
	t.Helper()
	families, err := d.reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == name {
			for _, m := range f.GetMetric() {
				sum += m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
		}
	}
	return sum
}

func sidecar(t *testing.T, cfg Config, name, namespace string) *corev3.Node {
	t.Helper()
	meta, err := structpb.NewStruct(map[string]any{
		"CLUSTER_ID": cfg.Cluster, "NAMESPACE": namespace, "NETWORK": cfg.Network, "LABELS": map[string]any{"app": name},
	})
	if err != nil {
		t.Fatal(err)
	}
	return &corev3.Node{Id: "sidecar~10.1.0.9~" + name + "." + namespace + "~" + namespace + ".svc.cluster.local", Cluster: name, Metadata: meta}
}

// proxy is an xDS client that remembers what it holds.
type proxy struct {
	client *xdsclient.Client
	cancel context.CancelFunc
	done   chan struct{}

	mu      sync.Mutex
	held    map[string]map[string][]byte // type URL -> name -> body
	changes []string                     // "+CDS NAME" and "-CDS NAME" since the last look
	states  []error
}

// connect starts a client; the test's end stops it.
func connect(t *testing.T, d *daemonTest, node *corev3.Node, options []grpc.DialOption, resume map[string]map[string]string) *proxy {
	t.Helper()
	p := &proxy{done: make(chan struct{}), held: map[string]map[string][]byte{}}
	subscribe := map[string][]string{}
	for _, typ := range types {
		subscribe[typ] = nil
	}
	p.client = xdsclient.New(xdsclient.Config{
		Targets: []string{d.cfg.Listen}, DialOptions: options, Node: node, Subscribe: subscribe, Resume: resume, OnUpdate: p.update,
		OnState: func(up bool, err error) {
			p.mu.Lock()
			defer p.mu.Unlock()
			if !up {
				p.states = append(p.states, err)
			}
		},
	})
	var ctx context.Context
	ctx, p.cancel = context.WithCancel(context.Background())
	go func() {
		defer close(p.done)
		_ = p.client.Run(ctx)
	}()
	t.Cleanup(p.stop)
	return p
}

func (p *proxy) stop() { p.cancel(); <-p.done }

func (p *proxy) update(u xdsclient.Update) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	held := p.held[u.TypeURL]
	if held == nil {
		held = map[string][]byte{}
		p.held[u.TypeURL] = held
	}
	short := u.TypeURL[strings.LastIndexByte(u.TypeURL, '.')+1:]
	for _, r := range u.Added {
		held[r.GetName()] = r.GetResource().GetValue()
		p.changes = append(p.changes, "+"+short+" "+r.GetName())
	}
	for _, name := range u.Removed {
		delete(held, name)
		p.changes = append(p.changes, "-"+short+" "+name)
	}
	return nil
}

// resource returns the body of a resource, or nil.
func (p *proxy) resource(typ, name string) []byte {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.held[typ][name]
}

// forget returns the changes since the last call.
func (p *proxy) forget() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	out := p.changes
	p.changes = nil
	return out
}

// failure returns why the newest stream ended.
func (p *proxy) failure() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.states) == 0 {
		return nil
	}
	return p.states[len(p.states)-1]
}

// waitFor waits for a resource whose body satisfies is.
func (p *proxy) waitFor(t *testing.T, typ, name string, is func(body []byte) error) {
	t.Helper()
	eventually(t, name, func() error {
		body := p.resource(typ, name)
		if body == nil {
			return fmt.Errorf("%s is not there; last failure: %v", name, p.failure())
		}
		if is == nil {
			return nil
		}
		return is(body)
	})
}
