// Package appstatus answers the status port of a Pod's agent: it runs the kubelet's probes of the application, gives the
// metrics of the application, of Envoy and of the agent as one, and ends the agent on request from inside the Pod.
package appstatus

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"github.com/isthmus-mesh/isthmus/cmd/isthmus-agent/internal/config"
	"github.com/isthmus-mesh/isthmus/internal/diag"
)

// Config is what a Server needs.
type Config struct {
	Port      int
	Address   string                  // of the Pod: where the application is asked
	Probes    map[string]config.Probe // by path
	Scrape    *config.Scrape          // nil: the application has no metrics
	StatsPort int                     // Envoy's; 0: there is no Envoy
	Ready     http.Handler            // for /healthz/ready
	Quit      func()                  // ends the agent cleanly
	Reg       *prometheus.Registry    // the agent's own metrics
	Log       *slog.Logger
}

// Server answers the status port.
type Server struct {
	c        Config
	scrapes  chan struct{}
	failures *prometheus.CounterVec
}

// New returns a Server; it starts nothing.
func New(c Config) *Server {
	return &Server{c: c, scrapes: make(chan struct{}, maxScrapes), failures: promauto.With(c.Reg).NewCounterVec(prometheus.CounterOpts{
		Namespace: "isthmus", Subsystem: "appstatus", Name: "scrape_failures_total",
		Help: "Scrapes of which a part is missing, by source (application, envoy, agent).",
	}, []string{"source"})}
}

// Handler returns the HTTP handler alone.
func (s *Server) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /healthz/ready", s.c.Ready)
	mux.HandleFunc("GET /app-health/", s.probe)
	mux.HandleFunc("GET /app-lifecycle/", s.probe)
	mux.HandleFunc("GET /stats/prometheus", s.metrics)
	mux.HandleFunc("GET /metrics", s.metrics)
	mux.HandleFunc("POST /quitquitquit", s.quit)
	return mux
}

// quit ends the agent: a Job's container calls it so that its Pod completes.
func (s *Server) quit(w http.ResponseWriter, r *http.Request) {
	from, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil || !from.Addr().Unmap().IsLoopback() {
		http.Error(w, "only from inside the pod, by localhost", http.StatusForbidden)
		return
	}
	// A page in a browser of the Pod cannot forge this name.
	host := r.Host
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	if a, err := netip.ParseAddr(strings.Trim(host, "[]")); host != "localhost" && (err != nil || !a.IsLoopback()) {
		http.Error(w, "only by localhost", http.StatusForbidden)
		return
	}
	s.c.Log.Info("asked to end")
	fmt.Fprintln(w, "OK")
	s.c.Quit()
}

// Run serves until ctx ends.
func (s *Server) Run(ctx context.Context) error {
	l, err := net.Listen("tcp", fmt.Sprintf(":%d", s.c.Port))
	if err != nil {
		return diag.Hint(fmt.Errorf("listen on the status port: %w", err), "the application uses port %d: set the annotation status.sidecar.istio.io/port to another", s.c.Port)
	}
	srv := &http.Server{
		Handler: s.Handler(), ReadHeaderTimeout: 3 * time.Second, ReadTimeout: 5 * time.Second, WriteTimeout: 5 * time.Minute,
		IdleTimeout: 30 * time.Second, MaxHeaderBytes: 32 << 10, ErrorLog: slog.NewLogLogger(s.c.Log.Handler(), slog.LevelDebug),
	}
	stop := context.AfterFunc(ctx, func() { srv.Close() })
	defer stop()
	if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve the status port: %w", err)
	}
	return nil
}
