package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

func server(t *testing.T) string {
	var n atomic.Int64
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		i := n.Add(1)
		if i%5 == 0 {
			w.WriteHeader(http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintf(w, `{"version":"v%d","pod":"p","caller":%q}`, 1+i%2, r.Header.Get("end-user"))
	}))
	t.Cleanup(s.Close)
	return s.URL
}

func TestClosedLoop(t *testing.T) {
	s := run(t.Context(), options{url: server(t), n: 100, concurrency: 4, timeout: time.Second, keepAlive: true, header: http.Header{"End-User": {"jason"}}})
	if s.Requests != 100 || s.Failed != 20 || s.Status["200"] != 80 || s.Version["v1"]+s.Version["v2"] != 80 || s.Caller["jason"] != 80 {
		t.Errorf("got %v", s)
	}
	if s.Latency["p50"] <= 0 || s.Latency["max"] < s.Latency["p50"] {
		t.Errorf("latency %v", s.Latency)
	}
}

func TestOpenLoop(t *testing.T) {
	var out bytes.Buffer
	s := run(t.Context(), options{url: server(t), rate: 200, duration: 250 * time.Millisecond, timeout: time.Second, keepAlive: true, each: &out})
	lines := strings.Split(strings.TrimSpace(out.String()), "\n")
	if s.Requests != 50 || len(lines) != 50 {
		t.Fatalf("%d requests, %d lines", s.Requests, len(lines))
	}
	for _, line := range lines {
		var r result
		if err := json.Unmarshal([]byte(line), &r); err != nil || r.End.Before(r.Start) || r.Status == 0 {
			t.Errorf("%v: %s", err, line)
		}
	}
}

func TestUntilEOF(t *testing.T) {
	in, out := io.Pipe()
	sent := make(chan struct{}, 1)
	slow := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		select {
		case sent <- struct{}{}:
		default:
		}
		time.Sleep(50 * time.Millisecond)
	}))
	defer slow.Close()
	go func() {
		<-sent
		_ = out.Close()
	}()
	s := run(t.Context(), options{url: slow.URL, rate: 50, duration: time.Minute, timeout: 5 * time.Second, enough: ended(in)})
	if s.Requests == 0 || s.Requests > 1000 || s.Failed > 0 { // the one under way is waited for
		t.Errorf("got %v", s)
	}
}

func TestFailures(t *testing.T) {
	gone := httptest.NewServer(http.NotFoundHandler())
	gone.Close()
	s := run(t.Context(), options{url: gone.URL, n: 3, concurrency: 1, timeout: time.Second})
	if s.Failed != 3 || len(s.Error) != 1 {
		t.Errorf("got %v", s)
	}
	hold := make(chan struct{})
	slow := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { <-hold }))
	defer slow.Close()
	defer close(hold)
	s = run(t.Context(), options{url: slow.URL, n: 1, concurrency: 1, timeout: 20 * time.Millisecond})
	if s.Error["timeout"] != 1 {
		t.Errorf("got %v", s)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if s = run(ctx, options{url: slow.URL, n: 5, concurrency: 1, timeout: time.Second}); s.Failed != 0 {
		t.Errorf("ended by the caller, but counted: %v", s)
	}
}
