package main

import (
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

func start(t *testing.T, s service) string {
	t.Helper()
	s.client = http.DefaultClient
	h, err := s.handler()
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewServer(h)
	t.Cleanup(server.Close)
	return server.URL
}

func get(t *testing.T, url string, header http.Header) (int, string) {
	t.Helper()
	req, err := http.NewRequest(http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header = header
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(body)
}

func TestBookstore(t *testing.T) {
	ratings := start(t, service{app: "ratings", version: "v1", pod: "dune"})
	reviews := start(t, service{app: "reviews", version: "v2", pod: "reviews-v2-a", ratings: ratings})
	page := start(t, service{app: "productpage", version: "v1", pod: "p", reviews: reviews})

	_, body := get(t, reviews+"/", http.Header{"X-Forwarded-Client-Cert": {
		`By=spiffe://birch.mesh/ns/default/sa/bookstore-reviews;Hash=ab;Subject="";URI=spiffe://amber.mesh/ns/default/sa/bookstore-productpage`}})
	var a answer
	if err := json.Unmarshal([]byte(body), &a); err != nil {
		t.Fatalf("%v: %s", err, body)
	}
	if a.Version != "v2" || a.Pod != "reviews-v2-a" || a.Caller != "spiffe://amber.mesh/ns/default/sa/bookstore-productpage" ||
		!strings.Contains(string(a.Ratings), "dune") {
		t.Errorf("got %+v", a)
	}
	if status, body := get(t, page+"/productpage", nil); status != 200 || !strings.Contains(body, "<title>Simple Bookstore App</title>") || !strings.Contains(body, "reviews-v2-a") {
		t.Errorf("productpage: %d %s", status, body)
	}
	if status, body := get(t, page+"/reviews-call", nil); status != 200 || !strings.Contains(body, `"version":"v2"`) {
		t.Errorf("reviews-call: %d %s", status, body)
	}
}

func TestHeadersArePassedOn(t *testing.T) {
	seen := make(chan http.Header, 1)
	behind := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { seen <- r.Header }))
	defer behind.Close()
	page := start(t, service{app: "productpage", reviews: behind.URL})
	get(t, page+"/reviews-call", http.Header{"End-User": {"jason"}, "X-B3-Traceid": {"1"}, "X-Forwarded-Client-Cert": {"x"}})
	h := <-seen
	if h.Get("end-user") != "jason" || h.Get("x-b3-traceid") != "1" || h.Get("x-forwarded-client-cert") != "" {
		t.Errorf("got %v", h)
	}
}

func TestUnknownRole(t *testing.T) {
	if _, err := (service{app: "shop"}).handler(); err == nil || !strings.Contains(err.Error(), `"shop"`) {
		t.Errorf("got %v", err)
	}
}
