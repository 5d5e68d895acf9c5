package appstatus_test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"

	"github.com/isthmus-mesh/isthmus/cmd/isthmus-agent/internal/appstatus"
	"github.com/isthmus-mesh/isthmus/cmd/isthmus-agent/internal/config"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func newServer(t *testing.T, c appstatus.Config) http.Handler {
	t.Helper()
	c.Address, c.Reg, c.Log = "127.0.0.1", prometheus.NewRegistry(), slog.New(slog.DiscardHandler)
	if c.Port == 0 {
		c.Port = 15020
	}
	c.Ready = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ready") })
	return appstatus.New(c).Handler()
}

func portOf(t *testing.T, l net.Listener) int { return l.Addr().(*net.TCPAddr).Port }

func app(t *testing.T, tls bool, f http.HandlerFunc) int {
	t.Helper()
	s := httptest.NewUnstartedServer(f)
	s.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	if tls {
		s.StartTLS()
	} else {
		s.Start()
	}
	t.Cleanup(s.Close)
	return portOf(t, s.Listener)
}

func closedPort(t *testing.T) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return portOf(t, l)
}

func get(h http.Handler, path string, header ...string) *httptest.ResponseRecorder {
	r := httptest.NewRequest(http.MethodGet, path, nil)
	for i := 0; i+1 < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w
}

func TestProbes(t *testing.T) {
	plain := app(t, false, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/ok":
			if r.Host != "web.example" || r.Header.Get("X-Probe") != "app" || r.Header.Get("User-Agent") != "kube-probe/1.36" || r.URL.RawQuery != "full=1" {
				t.Errorf("host %s, headers %v, query %s", r.Host, r.Header, r.URL.RawQuery)
			}
			_, _ = w.Write(make([]byte, 1<<20)) // more than is read
		case "/sick":
			http.Error(w, "sick", http.StatusServiceUnavailable)
		case "/here":
			http.Redirect(w, r, "/sick", http.StatusFound)
		case "/away":
			http.Redirect(w, r, "http://192.0.2.1/", http.StatusFound)
		case "/slow":
			select {
			case <-r.Context().Done():
			case <-time.After(time.Minute):
			}
		}
	})
	secure := app(t, true, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusAccepted) })
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	healthy := health.NewServer()
	healthy.SetServingStatus("bad", grpc_health_v1.HealthCheckResponse_NOT_SERVING)
	with, without := grpc.NewServer(), grpc.NewServer()
	grpc_health_v1.RegisterHealthServer(with, healthy)
	go func() { _ = with.Serve(l) }()
	t.Cleanup(with.Stop)
	l2, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = without.Serve(l2) }()
	t.Cleanup(without.Stop)

	var probes map[string]config.Probe
	text := fmt.Sprintf(`{
		"/app-health/a/ok": {"httpGet": {"path": "/ok?full=1", "port": %[1]d, "httpHeaders": [{"name": "host", "value": "web.example"}, {"name": "X-Probe", "value": "app"}]}},
		"/app-health/a/sick": {"httpGet": {"path": "sick", "port": %[1]d}},
		"/app-health/a/here": {"httpGet": {"path": "/here", "port": %[1]d}},
		"/app-health/a/away": {"httpGet": {"path": "/away", "port": %[1]d}},
		"/app-health/a/slow": {"httpGet": {"path": "/slow", "port": %[1]d}, "timeoutSeconds": 1},
		"/app-health/a/closed": {"httpGet": {"path": "/", "port": %[3]d}},
		"/app-health/a/tls": {"httpGet": {"path": "/", "port": %[2]d, "scheme": "HTTPS"}},
		"/app-health/a/tcp": {"tcpSocket": {"port": %[1]d}},
		"/app-health/a/tcp-closed": {"tcpSocket": {"port": %[3]d}},
		"/app-health/a/grpc": {"grpc": {"port": %[4]d}},
		"/app-health/a/grpc-bad": {"grpc": {"port": %[4]d, "service": "bad"}},
		"/app-health/a/grpc-unknown": {"grpc": {"port": %[4]d, "service": "unknown"}},
		"/app-health/a/grpc-none": {"grpc": {"port": %[5]d}},
		"/app-lifecycle/a/prestopz": {"httpGet": {"path": "/here-not", "port": %[1]d}}
	}`, plain, secure, closedPort(t), portOf(t, l), portOf(t, l2))
	if err := json.Unmarshal([]byte(text), &probes); err != nil {
		t.Fatal(err)
	}
	h := newServer(t, appstatus.Config{Probes: probes})
	for path, want := range map[string]int{
		"/app-health/a/ok": 200, "/app-health/a/sick": 503, "/app-health/a/here": 503, "/app-health/a/away": 302, "/app-health/a/slow": 500, "/app-health/a/closed": 500,
		"/app-health/a/tls": 202, "/app-health/a/tcp": 200, "/app-health/a/tcp-closed": 500, "/app-health/a/grpc": 200, "/app-health/a/grpc-bad": 503, "/app-health/a/grpc-unknown": 500,
		"/app-health/a/grpc-none": 500, "/app-lifecycle/a/prestopz": 200, "/app-health/a/other": 404, "/app-health/": 404, "/healthz/ready": 200, "/": 404,
	} {
		t.Run(path, func(t *testing.T) {
			w := get(h, path, "X-Probe", "kubelet", "User-Agent", "kube-probe/1.36", "Connection", "close")
			if w.Code != want {
				t.Errorf("%d %s, want %d", w.Code, w.Body, want)
			}
			if w.Body.Len() > 1<<10 {
				t.Errorf("an answer of %d bytes", w.Body.Len())
			}
		})
	}
}

func TestMetrics(t *testing.T) {
	answer := "# TYPE app_requests_total counter\napp_requests_total 3\n# EOF\n"
	port := app(t, false, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/m" || !strings.HasPrefix(r.Header.Get("Accept"), "text/plain") {
			http.NotFound(w, r)
			return
		}
		_, _ = io.WriteString(w, answer)
	})
	stats := app(t, false, func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, "# TYPE envoy_istio_requests_total counter\nenvoy_istio_requests_total{a=\"b\"} 1\n# TYPE envoy_server_live gauge\nenvoy_server_live 1\n")
	})
	scrape := func(c appstatus.Config) string {
		h := newServer(t, c)
		w := get(h, "/stats/prometheus")
		if w.Code != 200 || !strings.HasPrefix(w.Header().Get("Content-Type"), "text/plain; version=0.0.4") {
			t.Errorf("%d %v", w.Code, w.Header())
		}
		return w.Body.String()
	}
	ok := &config.Scrape{Scrape: "true", Path: "m", Port: fmt.Sprint(port)}
	want := "# TYPE istio_requests_total counter\nistio_requests_total{a=\"b\"} 1\n# TYPE envoy_server_live gauge\nenvoy_server_live 1\n# TYPE app_requests_total counter\napp_requests_total 3\n"
	if got := scrape(appstatus.Config{Scrape: ok, StatsPort: stats}); got != want {
		t.Errorf("merged:\n%s", got)
	}
	for name, x := range map[string]struct {
		c      appstatus.Config
		source string
	}{
		"application away": {appstatus.Config{Scrape: &config.Scrape{Scrape: "true", Port: fmt.Sprint(closedPort(t))}, StatsPort: stats}, "application"},
		"wrong path":       {appstatus.Config{Scrape: &config.Scrape{Scrape: "true", Path: "/x", Port: fmt.Sprint(port)}, StatsPort: stats}, "application"},
		"itself":           {appstatus.Config{Scrape: &config.Scrape{Scrape: "true", Port: "15020"}, StatsPort: stats}, "application"},
		"no port":          {appstatus.Config{Scrape: &config.Scrape{Scrape: "true", Port: "x@192.0.2.1"}, StatsPort: stats}, "application"},
		"envoy away":       {appstatus.Config{Scrape: ok, StatsPort: closedPort(t)}, "envoy"},
	} {
		got := scrape(x.c)
		if !strings.Contains(got, `isthmus_appstatus_scrape_failures_total{source="`+x.source+`"} 1`) {
			t.Errorf("%s: not counted:\n%s", name, got)
		}
		if rest := map[string]string{"application": "envoy_server_live 1", "envoy": "app_requests_total 3"}[x.source]; !strings.Contains(got, rest) {
			t.Errorf("%s: the other source is missing:\n%s", name, got)
		}
	}
	if got := scrape(appstatus.Config{Scrape: &config.Scrape{Scrape: "false", Port: fmt.Sprint(port)}}); got != "" {
		t.Errorf("without any source: %s", got)
	}
}

func TestQuit(t *testing.T) {
	quits := 0
	h := newServer(t, appstatus.Config{Quit: func() { quits++ }})
	for _, x := range []struct {
		method, from, host string
		code               int
	}{
		{"POST", "127.0.0.1:1", "localhost:15020", 200}, {"POST", "[::1]:1", "[::1]:15020", 200}, {"POST", "10.1.2.3:1", "localhost:15020", 403},
		{"POST", "127.0.0.1:1", "evil.example", 403}, {"GET", "127.0.0.1:1", "localhost", 405},
	} {
		r := httptest.NewRequest(x.method, "/quitquitquit", nil)
		r.RemoteAddr, r.Host = x.from, x.host
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		if w.Code != x.code {
			t.Errorf("%+v: %d", x, w.Code)
		}
	}
	if quits != 2 {
		t.Errorf("quit %d times", quits)
	}
}

func TestListening(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	open, closed := uint16(portOf(t, l)), uint16(closedPort(t))
	if err := appstatus.Listening("127.0.0.1", []uint16{open})(context.Background()); err != nil {
		t.Error(err)
	}
	if err := appstatus.Listening("127.0.0.1", []uint16{open, closed})(context.Background()); err == nil || !strings.Contains(err.Error(), fmt.Sprint(closed)) {
		t.Errorf("a closed port: %v", err)
	}
}

// TestRun: the port is open while Run runs, and a port in use says what to do.
func TestRun(t *testing.T) {
	l, err := net.Listen("tcp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	s := appstatus.New(appstatus.Config{Port: portOf(t, l), Reg: prometheus.NewRegistry(), Log: slog.New(slog.DiscardHandler), Ready: http.NotFoundHandler()})
	if err := s.Run(t.Context()); err == nil {
		t.Error("the port was taken twice")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	s = appstatus.New(appstatus.Config{Port: closedPort(t), Reg: prometheus.NewRegistry(), Log: slog.New(slog.DiscardHandler), Ready: http.NotFoundHandler()})
	if err := s.Run(ctx); err != nil {
		t.Error(err)
	}
}
