package main

import (
	"context"
	"encoding/json"
	"fmt"
	"html/template"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/isthmus-mesh/isthmus/e2e/apps/internal/xfcc"
)

// service is one running application. It is not changed after start.
type service struct {
	app, version, pod, stars string
	client                   *http.Client
}

// who says who answered, and whom it saw calling.
type who struct {
	App     string `json:"app"`
	Version string `json:"version"`
	Pod     string `json:"pod"`
	Caller  string `json:"caller"` // SPIFFE id of the peer, from X-Forwarded-Client-Cert
}

func (s *service) who(r *http.Request) who {
	return who{s.app, s.version, s.pod, xfcc.Caller(r.Header.Get(xfcc.Header))}
}

func (s *service) handler() (http.Handler, error) {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /health", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	switch s.app {
	case "productpage":
		mux.HandleFunc("GET /productpage", s.page)
		mux.HandleFunc("GET /api/v1/products", func(w http.ResponseWriter, _ *http.Request) {
			reply(w, http.StatusOK, []map[string]any{{"id": 0, "title": "The Comedy of Errors"}})
		})
		mux.HandleFunc("GET /api/v1/products/{id}/reviews", s.pass(s.reviewsURL))
		mux.HandleFunc("GET /api/v1/products/{id}/ratings", s.pass(s.ratingsURL))
		mux.HandleFunc("GET /{$}", s.self)
	case "details", "ratings":
		mux.HandleFunc("GET /", s.self)
	case "reviews":
		mux.HandleFunc("GET /", s.reviews)
	case "helloworld":
		mux.HandleFunc("GET /hello", func(w http.ResponseWriter, _ *http.Request) {
			fmt.Fprintf(w, "Hello version: %s, instance: %s\n", s.version, s.pod)
		})
	case "httpbin":
		s.httpbin(mux)
	default:
		return nil, fmt.Errorf("no sample %q", s.app)
	}
	return mux, nil
}

func (s *service) self(w http.ResponseWriter, r *http.Request) {
	a := map[string]any{"id": 0}
	if s.app == "ratings" {
		a["ratings"] = map[string]int{"Reviewer1": 5, "Reviewer2": 4}
	}
	s.say(w, r, http.StatusOK, a)
}

// say answers with what a says, and who said it.
func (s *service) say(w http.ResponseWriter, r *http.Request, status int, a map[string]any) {
	me := s.who(r)
	a["app"], a["version"], a["pod"], a["caller"] = me.App, me.Version, me.Pod, me.Caller
	reply(w, status, a)
}

func host(variable, otherwise string) string {
	h := first(os.Getenv(variable), otherwise)
	if d := os.Getenv("SERVICES_DOMAIN"); d != "" {
		h += "." + d
	}
	return net.JoinHostPort(h, "9080")
}

func (s *service) detailsURL() string {
	return "http://" + host("DETAILS_HOSTNAME", "details") + "/details/0"
}
func (s *service) reviewsURL() string {
	return "http://" + host("REVIEWS_HOSTNAME", "reviews") + "/reviews/0"
}
func (s *service) ratingsURL() string {
	return "http://" + host("RATINGS_HOSTNAME", "ratings") + "/ratings/0"
}

func (s *service) reviews(w http.ResponseWriter, r *http.Request) {
	a := map[string]any{"id": "0"}
	if s.stars != "" {
		ctx, cancel := context.WithTimeout(r.Context(), 10*time.Second)
		defer cancel()
		status, body, err := s.call(r.WithContext(ctx), s.ratingsURL())
		switch {
		case err != nil:
			a["error"] = "Ratings service is currently unavailable: " + err.Error()
		case status != http.StatusOK || !json.Valid(body):
			a["error"] = fmt.Sprintf("Ratings service is currently unavailable: status %d", status)
		default:
			a["ratings"], a["color"] = json.RawMessage(body), s.stars
		}
	}
	s.say(w, r, http.StatusOK, a)
}

// pass answers with what another service answered, so that a client sees status and version of the call behind.
func (s *service) pass(url func() string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		status, body, err := s.call(r, url())
		if err != nil {
			reply(w, http.StatusBadGateway, map[string]string{"error": err.Error()})
			return
		}
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(status)
		_, _ = w.Write(body)
	}
}

var pageTemplate = template.Must(template.New("page").Parse(`<!DOCTYPE html>
<html><head><title>Simple Bookstore App</title></head>
<body><h1>The Comedy of Errors</h1>
<h4>Book Details</h4>
{{.Details}}
<h4>Book Reviews</h4>
{{.Reviews}}
</body></html>
`))

func (s *service) page(w http.ResponseWriter, r *http.Request) {
	fetch := func(what, url string) string {
		status, body, err := s.call(r, url)
		if err != nil || status != http.StatusOK {
			return "Error fetching product " + what + "! Sorry, product " + what + " are currently unavailable for this book."
		}
		return string(body)
	}
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	_ = pageTemplate.Execute(w, map[string]string{"Details": fetch("details", s.detailsURL()), "Reviews": fetch("reviews", s.reviewsURL())})
}

// propagated are the request headers that a service passes on: the user, and those that join traces.
func propagated(name string) bool {
	name = strings.ToLower(name)
	switch name {
	case "end-user", "user-agent", "cookie", "authorization", "x-request-id", "traceparent", "tracestate", "b3", "baggage":
		return true
	}
	return strings.HasPrefix(name, "x-b3-")
}

func (s *service) call(in *http.Request, url string) (int, []byte, error) {
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

// httpbin serves the part of httpbin that the guides of service meshes use.
func (s *service) httpbin(mux *http.ServeMux) {
	about := func(w http.ResponseWriter, r *http.Request) {
		headers := map[string]string{"Host": r.Host}
		for k, v := range r.Header {
			headers[k] = strings.Join(v, ",")
		}
		body, _ := io.ReadAll(io.LimitReader(r.Body, 1<<20))
		s.say(w, r, http.StatusOK, map[string]any{"headers": headers, "method": r.Method, "url": "http://" + r.Host + r.URL.String(), "args": r.URL.Query(), "data": string(body), "origin": r.RemoteAddr})
	}
	for _, p := range []string{"/get", "/headers", "/post", "/anything", "/anything/", "/ip", "/user-agent"} {
		mux.HandleFunc(p, about)
	}
	mux.HandleFunc("GET /{$}", about)
	mux.HandleFunc("/status/{code}", func(w http.ResponseWriter, r *http.Request) {
		code, err := strconv.Atoi(r.PathValue("code"))
		if err != nil || code < 200 || code > 599 {
			http.Error(w, "no such status", http.StatusBadRequest)
			return
		}
		s.say(w, r, code, map[string]any{})
	})
	mux.HandleFunc("/delay/{seconds}", func(w http.ResponseWriter, r *http.Request) {
		d, err := strconv.ParseFloat(r.PathValue("seconds"), 64)
		if err != nil || d < 0 {
			http.Error(w, "no such delay", http.StatusBadRequest)
			return
		}
		select {
		case <-time.After(min(time.Duration(d*float64(time.Second)), 10*time.Second)):
			about(w, r)
		case <-r.Context().Done():
		}
	})
	mux.HandleFunc("GET /bytes/{n}", func(w http.ResponseWriter, r *http.Request) {
		n, err := strconv.ParseInt(r.PathValue("n"), 10, 64)
		if err != nil || n < 0 || n > 100<<20 {
			http.Error(w, "no such size", http.StatusBadRequest)
			return
		}
		w.Header().Set("Content-Length", strconv.FormatInt(n, 10))
		_, _ = io.CopyN(w, zeros{}, n)
	})
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

func reply(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(v)
}
