// Package health answers whether the workload may be sent traffic.
package health

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/isthmus-mesh/isthmus/internal/diag"
)

// Check says why something is not ready; nil means it is.
type Check func(ctx context.Context) error

// Config is what a Server needs.
type Config struct {
	Port   int
	Checks []Check             // all must pass
	Gather prometheus.Gatherer // for /metrics; nil: not served
	Log    *slog.Logger
}

// Server answers GET /healthz/ready, /healthz/live for the agent itself, and /metrics.
type Server struct{ c Config }

// New returns a Server; it starts nothing.
func New(c Config) *Server { return &Server{c} }

// Handler returns the HTTP handler alone.
func (s *Server) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz/live", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "live") })
	if s.c.Gather != nil {
		mux.Handle("GET /metrics", promhttp.HandlerFor(s.c.Gather, promhttp.HandlerOpts{MaxRequestsInFlight: 4}))
	}
	mux.HandleFunc("GET /healthz/ready", func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), 3*time.Second)
		defer cancel()
		for _, check := range s.c.Checks {
			if err := check(ctx); err != nil {
				http.Error(w, "not ready: "+err.Error(), http.StatusServiceUnavailable)
				return
			}
		}
		fmt.Fprintln(w, "ready")
	})
	return mux
}

// Run serves until ctx ends.
func (s *Server) Run(ctx context.Context) error {
	l, err := net.Listen("tcp", fmt.Sprintf(":%d", s.c.Port))
	if err != nil {
		return diag.Hint(fmt.Errorf("listen for health checks: %w", err), "stop the program that uses port %d, or set listenHealth", s.c.Port)
	}
	srv := &http.Server{
		Handler: s.Handler(), ReadHeaderTimeout: 3 * time.Second, ReadTimeout: 5 * time.Second, WriteTimeout: 10 * time.Second,
		IdleTimeout: 30 * time.Second, MaxHeaderBytes: 16 << 10, ErrorLog: slog.NewLogLogger(s.c.Log.Handler(), slog.LevelDebug),
	}
	stop := context.AfterFunc(ctx, func() { srv.Close() })
	defer stop()
	if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve health checks: %w", err)
	}
	return nil
}
