// Package webhook serves discovery/inject to API servers: it answers AdmissionReviews, keeps the injector's ConfigMaps
// and the labels of namespaces in view, and keeps the certificate authority in the webhook configurations.
package webhook

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
	admissionv1 "k8s.io/api/admission/v1"

	"github.com/isthmus-mesh/isthmus/discovery/inject"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

// MaxBody is the largest review that is read: an API server takes objects of 3 MiB, and sends the old one, too.
const MaxBody = 8 << 20

// maxReviews bounds how many reviews are under way at once; more wait.
const maxReviews = 64

// requestTimeout is the longest that one review takes; API servers wait for 10 s by default.
const requestTimeout = 8 * time.Second

// Injector gives the configuration in force.
type Injector interface {
	Current() *inject.Config
}

// Namespaces gives the labels of a namespace of the local cluster; false when it is not known.
type Namespaces interface {
	Labels(name string) (map[string]string, bool)
}

// Validator says what is wrong with an object of Istio's APIs: one line each, with the field and the reason. raw is its
// JSON.
type Validator func(raw []byte) []string

// Config is what a Server needs.
type Config struct {
	Listener    net.Listener
	Certificate func(*tls.ClientHelloInfo) (*tls.Certificate, error)
	Injector    Injector
	Namespaces  Namespaces // nil: the selectors of the webhook configuration decide alone
	Cluster     string     // of Namespaces; a path that names another cluster is not looked up there
	// Proxies gives the objects of kind ProxyConfig; nil: there are none.
	Proxies  func() []*mesh.ProxyConfig
	Validate Validator // nil: /validate lets all pass
	Log      *slog.Logger
	Reg      prometheus.Registerer
}

// Server answers reviews over HTTPS: /inject, /inject/cluster/NAME/net/NAME and /validate.
type Server struct {
	c       Config
	reviews chan struct{}
	answers *prometheus.CounterVec
}

// New returns a Server; it starts nothing.
func New(c Config) *Server {
	return &Server{c: c, reviews: make(chan struct{}, maxReviews), answers: promauto.With(c.Reg).NewCounterVec(prometheus.CounterOpts{
		Namespace: "isthmus", Subsystem: "webhook", Name: "reviews_total",
		Help: "Admission reviews answered, by what was asked (inject, validate) and answer (patched, passed, refused, bad).",
	}, []string{"review", "answer"})}
}

// Run serves until ctx ends; reviews under way are answered first.
func (s *Server) Run(ctx context.Context) error {
	srv := &http.Server{
		Handler: s.Handler(), ReadHeaderTimeout: 10 * time.Second, ReadTimeout: 20 * time.Second, WriteTimeout: 30 * time.Second,
		IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 32 << 10, ErrorLog: slog.NewLogLogger(s.c.Log.Handler(), slog.LevelDebug),
		TLSConfig: &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: s.c.Certificate},
	}
	done := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(done)
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		if srv.Shutdown(end) != nil {
			srv.Close()
		}
	})
	err := srv.ServeTLS(s.c.Listener, "", "")
	if !stop() {
		<-done
	}
	if err != nil && !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve admission webhooks: %w", err)
	}
	return nil
}

// Handler returns the HTTP handler alone.
func (s *Server) Handler() http.Handler {
	mux := http.NewServeMux()
	inject := s.answer("inject", s.inject)
	mux.Handle("POST /inject", inject)
	mux.Handle("POST /inject/", inject)
	mux.Handle("POST /validate", s.answer("validate", s.validate))
	mux.HandleFunc("GET /ready", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ready") })
	return mux
}

type review func(r *http.Request, q *admissionv1.AdmissionRequest) *admissionv1.AdmissionResponse

func (s *Server) answer(webhook string, f review) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), requestTimeout)
		defer cancel()
		select {
		case s.reviews <- struct{}{}:
			defer func() { <-s.reviews }()
		case <-ctx.Done():
			http.Error(w, "too many reviews are under way", http.StatusServiceUnavailable)
			return
		}
		q, status, err := readReview(w, r)
		if err != nil {
			s.answers.WithLabelValues(webhook, "bad").Inc()
			http.Error(w, err.Error(), status)
			return
		}
		a := f(r, q)
		body, err := inject.EncodeReview(q, a)
		if err != nil {
			s.answers.WithLabelValues(webhook, "bad").Inc()
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		s.answers.WithLabelValues(webhook, kindOf(a)).Inc()
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write(body) // an API server that went away needs no answer
	})
}

func kindOf(a *admissionv1.AdmissionResponse) string {
	switch {
	case !a.Allowed:
		return "refused"
	case a.Patch != nil:
		return "patched"
	}
	return "passed"
}

func readReview(w http.ResponseWriter, r *http.Request) (*admissionv1.AdmissionRequest, int, error) {
	if ct, _, _ := strings.Cut(r.Header.Get("Content-Type"), ";"); ct != "application/json" {
		return nil, http.StatusUnsupportedMediaType, fmt.Errorf("content type %.64q: application/json is wanted", ct)
	}
	if r.ContentLength > MaxBody {
		return nil, http.StatusRequestEntityTooLarge, fmt.Errorf("the review has over %d bytes", MaxBody)
	}
	var body bytes.Buffer
	if _, err := io.Copy(&body, http.MaxBytesReader(w, r.Body, MaxBody)); err != nil {
		var long *http.MaxBytesError
		if errors.As(err, &long) {
			return nil, http.StatusRequestEntityTooLarge, fmt.Errorf("the review has over %d bytes", MaxBody)
		}
		return nil, http.StatusBadRequest, fmt.Errorf("read the review: %w", err)
	}
	q, err := inject.DecodeReview(body.Bytes())
	if err != nil {
		return nil, http.StatusBadRequest, err
	}
	return q, 0, nil
}

func (s *Server) inject(r *http.Request, q *admissionv1.AdmissionRequest) *admissionv1.AdmissionResponse {
	to, err := parsePath(r.URL.Path)
	if err != nil {
		return inject.Refuse("isthmus: %v", err)
	}
	if s.c.Namespaces != nil && (to.Cluster == "" || to.Cluster == s.c.Cluster) {
		to.Namespace.Labels, to.Namespace.Known = s.c.Namespaces.Labels(q.Namespace)
	}
	if s.c.Proxies != nil {
		to.Proxies = s.c.Proxies()
	}
	a, d := s.c.Injector.Current().Review(q, to)
	switch {
	case !a.Allowed:
		s.c.Log.Warn("pod refused", "namespace", q.Namespace, "name", q.Name, "reason", d.Reason, "err", a.Result.Message)
	default:
		s.c.Log.Debug("pod reviewed", "namespace", q.Namespace, "name", q.Name, "injected", d.Inject, "reason", d.Reason)
	}
	return a
}

// parsePath reads the pairs behind /inject, by which a webhook configuration in another cluster says where it is; a
// slash in a value is written --slash--, as in Istio's.
func parsePath(path string) (inject.Request, error) {
	var r inject.Request
	rest := strings.Trim(strings.TrimPrefix(path, "/inject"), "/")
	if rest == "" {
		return r, nil
	}
	parts := strings.Split(rest, "/")
	if len(parts)%2 != 0 || len(parts) > 16 {
		return r, fmt.Errorf("the webhook's path %.256q is not /inject/KEY/VALUE...", path)
	}
	for i := 0; i < len(parts); i += 2 {
		value := strings.ReplaceAll(parts[i+1], "--slash--", "/")
		switch strings.ToLower(parts[i]) {
		case "cluster", "istio_meta_cluster_id":
			r.Cluster = value
		case "net", "istio_meta_network":
			r.Network = value
		}
	}
	return r, nil
}

func (s *Server) validate(_ *http.Request, q *admissionv1.AdmissionRequest) *admissionv1.AdmissionResponse {
	if s.c.Validate == nil || q.SubResource != "" || q.Operation != admissionv1.Create && q.Operation != admissionv1.Update {
		return &admissionv1.AdmissionResponse{Allowed: true}
	}
	if wrong := s.c.Validate(q.Object.Raw); len(wrong) > 0 {
		return inject.Refuse("%s", strings.Join(wrong, "; "))
	}
	return &admissionv1.AdmissionResponse{Allowed: true}
}
