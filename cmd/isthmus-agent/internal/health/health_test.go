package health

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/isthmus-mesh/isthmus/internal/diag"
)

func TestReady(t *testing.T) {
	var why error
	h := New(Config{Log: slog.New(slog.DiscardHandler), Checks: []Check{func(context.Context) error { return why }}}).Handler()
	get := func(path string) (int, string) {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest("GET", path, nil))
		return w.Code, w.Body.String()
	}
	if code, _ := get("/healthz/ready"); code != 200 {
		t.Errorf("ready: %d", code)
	}
	why = errors.New("no valid certificate")
	if code, body := get("/healthz/ready"); code != 503 || !strings.Contains(body, "no valid certificate") {
		t.Errorf("not ready: %d %s", code, body)
	}
	if code, _ := get("/healthz/live"); code != 200 {
		t.Errorf("live: %d", code)
	}
	if code, _ := get("/"); code != 404 {
		t.Errorf("another path: %d", code)
	}
}

func TestPortInUse(t *testing.T) {
	l, err := net.Listen("tcp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	err = New(Config{Port: l.Addr().(*net.TCPAddr).Port, Log: slog.New(slog.DiscardHandler)}).Run(t.Context())
	if err == nil || diag.HintOf(err) == "" {
		t.Errorf("got %v", err)
	}
}
