// Command bookstore is the four services of the demo's bookstore, one a role: productpage, details, reviews, ratings.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"html/template"
	"io"
	"log/slog"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/isthmus-mesh/isthmus/e2e/apps/internal/xfcc"
)

func main() {
	role := flag.String("role", "", "productpage, details, reviews or ratings")
	port := flag.Int("port", 9080, "port to listen on, IPv4 and IPv6")
	flag.Usage = func() {
		fmt.Fprint(flag.CommandLine.Output(), "bookstore --role ROLE [--port PORT]\n\n",
			"Environment: VERSION, POD_NAME (default HOSTNAME), REVIEWS_URL and DETAILS_URL (productpage), RATINGS_URL (reviews; empty: no stars)\n\n")
		flag.PrintDefaults()
	}
	flag.Parse()
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	s := service{
		app: *role, version: os.Getenv("VERSION"), pod: first(os.Getenv("POD_NAME"), os.Getenv("HOSTNAME")),
		reviews: os.Getenv("REVIEWS_URL"), details: os.Getenv("DETAILS_URL"), ratings: os.Getenv("RATINGS_URL"),
		client: &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{MaxIdleConnsPerHost: 64, IdleConnTimeout: 30 * time.Second}},
	}
	handler, err := s.handler()
	if err == nil {
		err = serve(ctx, fmt.Sprintf(":%d", *port), handler, log.With("role", *role))
	}
	if err != nil {
		log.Error("bookstore ended", "err", err)
		os.Exit(1)
	}
}

func first(a, b string) string {
	if a != "" {
		return a
	}
	return b
}

func serve(ctx context.Context, address string, h http.Handler, log *slog.Logger) error {
	server := &http.Server{Addr: address, Handler: h, ReadHeaderTimeout: 10 * time.Second}
	done := make(chan error, 1)
	go func() {
		<-ctx.Done()
		end, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()
		done <- server.Shutdown(end)
	}()
	log.Info("listening", "address", address)
	if err := server.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return <-done
}

// service is one running role. It is not changed after start.
type service struct {
	app, version, pod         string
	reviews, details, ratings string // URLs
	client                    *http.Client
}

// answer is what every role but productpage's page says: who answered, and whom it saw calling.
type answer struct {
	App     string          `json:"app"`
	Version string          `json:"version"`
	Pod     string          `json:"pod"`
	Caller  string          `json:"caller"` // SPIFFE id of the peer, from X-Forwarded-Client-Cert
	XFCC    string          `json:"xfcc"`
	Ratings json.RawMessage `json:"ratings,omitempty"`
	Error   string          `json:"error,omitempty"` // why ratings are missing
}

func (s service) handler() (http.Handler, error) {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /health", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	switch s.app {
	case "productpage":
		if s.reviews == "" {
			return nil, errors.New("productpage: REVIEWS_URL is not set")
		}
		mux.HandleFunc("GET /productpage", s.page)
		mux.HandleFunc("GET /reviews-call", s.relay)
		mux.HandleFunc("GET /{$}", s.self)
	case "reviews":
		mux.HandleFunc("GET /", s.review)
	case "details", "ratings":
		mux.HandleFunc("GET /", s.self)
	default:
		return nil, fmt.Errorf("role %q: choose productpage, details, reviews or ratings", s.app)
	}
	return mux, nil
}

func (s service) answer(r *http.Request) answer {
	header := r.Header.Get(xfcc.Header)
	return answer{App: s.app, Version: s.version, Pod: s.pod, Caller: xfcc.Caller(header), XFCC: header}
}

func (s service) self(w http.ResponseWriter, r *http.Request) { reply(w, http.StatusOK, s.answer(r)) }

func (s service) review(w http.ResponseWriter, r *http.Request) {
	a := s.answer(r)
	if s.ratings != "" {
		ctx, cancel := context.WithTimeout(r.Context(), time.Second) // a review without stars is better than none
		defer cancel()
		status, body, err := s.call(r.WithContext(ctx), s.ratings)
		switch {
		case err != nil:
			a.Error = err.Error()
		case status != http.StatusOK || !json.Valid(body):
			a.Error = fmt.Sprintf("ratings answered status %d: %.200s", status, body)
		default:
			a.Ratings = body
		}
	}
	reply(w, http.StatusOK, a)
}

// relay answers with what reviews answered, so that a client sees status and version of the call behind.
func (s service) relay(w http.ResponseWriter, r *http.Request) {
	status, body, err := s.call(r, s.reviews)
	if err != nil {
		reply(w, http.StatusBadGateway, map[string]string{"error": err.Error()})
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = w.Write(body)
}

var pageTemplate = template.Must(template.New("page").Parse(`<!DOCTYPE html>
<html><head><title>Simple Bookstore App</title></head>
<body><h1>Simple Bookstore App</h1>
<p>productpage {{.Version}} on {{.Pod}}</p>
<h2>Details</h2><pre>{{.Details}}</pre>
<h2>Reviews</h2><pre>{{.Reviews}}</pre>
</body></html>
`))

func (s service) page(w http.ResponseWriter, r *http.Request) {
	fetch := func(url string) string {
		if url == "" {
			return "not asked"
		}
		status, body, err := s.call(r, url)
		if err != nil {
			return "Sorry, not available: " + err.Error()
		}
		if status != http.StatusOK {
			return fmt.Sprintf("Sorry, not available: status %d", status)
		}
		return string(body)
	}
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	_ = pageTemplate.Execute(w, map[string]string{
		"Version": s.version, "Pod": s.pod, "Details": fetch(s.details), "Reviews": fetch(s.reviews),
	})
}

// propagated are the request headers that a service passes on: the user, and those that join traces.
func propagated(name string) bool {
	name = strings.ToLower(name)
	switch name {
	case "end-user", "x-request-id", "traceparent", "tracestate", "b3", "baggage", "x-ot-span-context", "x-cloud-trace-context":
		return true
	}
	return strings.HasPrefix(name, "x-b3-")
}

func (s service) call(in *http.Request, url string) (int, []byte, error) {
	req, err := http.NewRequestWithContext(in.Context(), http.MethodGet, url, nil)
	if err != nil {
		return 0, nil, err
	}
	for name, values := range in.Header {
		if propagated(name) {
			req.Header[name] = values
		}
	}
	resp, err := s.client.Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	return resp.StatusCode, body, err
}

func reply(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(v)
}
