package workload

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/isthmus-mesh/isthmus/discovery/mesh"
)

type sink struct {
	mu sync.Mutex
	in map[string]mesh.Input
}

func newSink() *sink { return &sink{in: map[string]mesh.Input{}} }

func (s *sink) Report(key string, in mesh.Input) { s.mu.Lock(); defer s.mu.Unlock(); s.in[key] = in }
func (s *sink) Forget(key string)                { s.mu.Lock(); defer s.mu.Unlock(); delete(s.in, key) }
func (*sink) Synced()                            {}

func (s *sink) workloads(key string) []*mesh.Workload {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.in[key].Workloads
}

func (s *sink) len() int { s.mu.Lock(); defer s.mu.Unlock(); return len(s.in) }

func ratings() Machine {
	return Machine{Name: "ratings", Namespace: "default", ServiceAccount: "ratings", Labels: map[string]string{"app": "ratings"}, Addresses: []string{"10.9.0.5"}}
}

func start(t *testing.T, dir string, out *sink) (*Source, func()) {
	t.Helper()
	s, err := New(Config{Dir: dir, Sink: out, Grace: 10 * time.Second, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Run(ctx) }()
	synctest.Wait()
	return s, func() { cancel(); <-done }
}

func TestLife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		out, dir := newSink(), t.TempDir()
		s, stop := start(t, dir, out)
		if _, err := s.Connect("default", "ratings", "ratings", nil); !errors.Is(err, ErrUnknown) {
			t.Errorf("a stranger connects: %v", err)
		}
		if err := s.Admit(ratings()); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Connect("default", "ratings", "other", nil); !errors.Is(err, ErrUnknown) {
			t.Errorf("another service account connects: %v", err)
		}
		if _, err := s.Connect("default", "ratings", "ratings", []string{"127.0.0.1"}); err == nil {
			t.Error("a loopback address is taken")
		}
		gone, err := s.Connect("default", "ratings", "ratings", []string{"10.9.0.6"})
		if err != nil {
			t.Fatal(err)
		}
		w := out.workloads("default.ratings")
		if len(w) != 1 || w[0].Addresses[0] != "10.9.0.6" || !w[0].TLS || !w[0].VM {
			t.Fatalf("workload: %+v", w)
		}

		gone(false)
		time.Sleep(9 * time.Second)
		synctest.Wait()
		if out.len() != 1 {
			t.Error("taken out within the grace time")
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if out.len() != 0 {
			t.Error("still there after the grace time")
		}

		if _, err := s.Connect("default", "ratings", "ratings", nil); err != nil {
			t.Fatal(err)
		}
		stop()
		out = newSink()
		s, stop = start(t, dir, out)
		if out.len() != 1 {
			t.Error("a restart of the control plane took the machine out")
		}
		gone, err = s.Connect("default", "ratings", "ratings", nil)
		if err != nil {
			t.Fatal(err)
		}
		gone(true)
		if out.len() != 0 || len(s.List()) != 0 {
			t.Error("still there after its goodbye")
		}
		stop()
	})
}
