package main

import (
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

func TestSamples(t *testing.T) {
	if _, err := (&service{app: "nosuch"}).handler(); err == nil {
		t.Error("an unknown sample was taken")
	}
	for _, c := range []struct {
		s      *service
		path   string
		status int
		has    []string
	}{
		{&service{app: "helloworld", version: "v2", pod: "h"}, "/hello", 200, []string{"Hello version: v2, instance: h\n"}},
		{&service{app: "reviews", version: "v1", pod: "r"}, "/reviews/0", 200, []string{`"version":"v1"`, `"pod":"r"`, `"caller":"spiffe://td/ns/a/sa/b"`}},
		{&service{app: "reviews", version: "v3", stars: "red"}, "/reviews/0", 200, []string{"unavailable"}},
		{&service{app: "httpbin"}, "/status/418", 418, nil},
		{&service{app: "httpbin"}, "/status/x", 400, nil},
		{&service{app: "httpbin"}, "/headers", 200, []string{`"X-Forwarded-Client-Cert"`}},
		{&service{app: "httpbin"}, "/delay/0.01", 200, []string{`"url"`}},
		{&service{app: "productpage"}, "/productpage", 200, []string{"<title>", "Error fetching product reviews!"}},
		{&service{app: "productpage"}, "/api/v1/products/0/reviews", 502, nil},
	} {
		t.Setenv("RATINGS_HOSTNAME", "127.0.0.1")
		t.Setenv("REVIEWS_HOSTNAME", "127.0.0.1")
		t.Setenv("DETAILS_HOSTNAME", "127.0.0.1")
		url := serveTest(t, c.s) + c.path
		req, err := http.NewRequest(http.MethodGet, url, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("X-Forwarded-Client-Cert", "By=spiffe://x;Hash=y;URI=spiffe://td/ns/a/sa/b")
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if resp.StatusCode != c.status {
			t.Errorf("%s %s: status %d, want %d", c.s.app, c.path, resp.StatusCode, c.status)
		}
		for _, h := range c.has {
			if !strings.Contains(string(body), h) {
				t.Errorf("%s %s: no %s in %s", c.s.app, c.path, h, body)
			}
		}
	}
}

func serveTest(t *testing.T, s *service) string {
	t.Helper()
	s.client = http.DefaultClient
	h, err := s.handler()
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewServer(h)
	t.Cleanup(srv.Close)
	return srv.URL
}
