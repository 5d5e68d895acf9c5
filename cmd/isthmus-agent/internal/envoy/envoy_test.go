package envoy

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/isthmus-mesh/isthmus/cmd/isthmus-agent/internal/bootstrap"
	"github.com/isthmus-mesh/isthmus/internal/diag"
	"github.com/isthmus-mesh/isthmus/internal/envoytest"
	"github.com/isthmus-mesh/isthmus/internal/porttest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func freePort(t *testing.T) int { return porttest.Take(t) }

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(15 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within 15 s", what)
		}
		<-time.After(20 * time.Millisecond)
	}
}

func newConfig(t *testing.T) Config {
	t.Helper()
	dir := t.TempDir()
	p := bootstrap.Params{
		Node:      bootstrap.Node{Type: "sidecar", Name: "web", Namespace: "default", Cluster: "amber", Addresses: []string{"127.0.0.1"}},
		AdminPort: freePort(t), StatsPort: freePort(t), XDSSocket: filepath.Join(dir, "xds.sock"), MaxConnections: 100,
		// Nothing serves xDS here: not waiting for it makes Envoy live.
		Custom: []byte(`{"dynamic_resources": {"cds_config": {"initial_fetch_timeout": "0.1s"}, "lds_config": {"initial_fetch_timeout": "0.1s"}}}`),
	}
	data, err := bootstrap.Build(p)
	if err != nil {
		t.Fatal(err)
	}
	return Config{
		Path: envoytest.Path(t), Dir: dir, Bootstrap: data, NodeID: p.Node.ID(), AdminPort: p.AdminPort, Concurrency: 1, LogLevel: "error",
		LogFile: filepath.Join(dir, "envoy.log"), DrainTime: 200 * time.Millisecond, Log: slog.New(slog.DiscardHandler),
	}
}

// start runs a Supervisor and returns it with what stops it cleanly.
func start(t *testing.T, c Config) (*Supervisor, func() error) {
	t.Helper()
	s, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	stopped := false
	stop := func() error {
		stopped = true
		cancel()
		select {
		case err := <-done:
			return err
		case <-time.After(20 * time.Second):
			return errors.New("Run does not end")
		}
	}
	t.Cleanup(func() {
		if !stopped {
			_ = stop()
		}
	})
	return s, stop
}

func ready(s *Supervisor) func() bool {
	return func() bool { return s.Ready(context.Background()) == nil }
}

func alive(pid int) bool { return syscall.Kill(pid, 0) == nil }

func TestRestartsAndStops(t *testing.T) {
	c := newConfig(t)
	s, stop := start(t, c)
	eventually(t, "ready", ready(s))
	first := s.PID()
	if data, err := os.ReadFile(filepath.Join(c.Dir, PIDFile)); err != nil || strings.TrimSpace(string(data)) == "" {
		t.Errorf("pid file: %q, %v", data, err)
	}
	if err := syscall.Kill(first, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "another process", func() bool { return s.PID() != 0 && s.PID() != first && s.Ready(context.Background()) == nil })
	if s.Restarts() != 1 {
		t.Errorf("%d restarts", s.Restarts())
	}
	second := s.PID()
	if err := stop(); err != nil {
		t.Error(err)
	}
	if alive(second) {
		t.Error("Envoy lives on")
	}
	if _, err := os.Stat(filepath.Join(c.Dir, PIDFile)); err == nil {
		t.Error("the pid file is left")
	}
}

// leave starts Envoy as a killed agent leaves it: running, with its files.
func leave(t *testing.T, c Config) *process {
	t.Helper()
	s, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	p, err := s.start()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.signal(syscall.SIGKILL)
		<-p.done
	})
	return p
}

func TestTakesOver(t *testing.T) {
	c := newConfig(t)
	old := leave(t, c)
	s, stop := start(t, c)
	eventually(t, "ready", ready(s))
	if s.PID() != old.pid {
		t.Errorf("process %d, not the one left, %d", s.PID(), old.pid)
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
	<-old.done
}

func TestAnotherBootstrapIsNotTakenOver(t *testing.T) {
	c := newConfig(t)
	old := leave(t, c)
	c.Bootstrap = append(c.Bootstrap, '\n')
	s, stop := start(t, c)
	eventually(t, "ready", ready(s))
	if s.PID() == old.pid {
		t.Error("taken over with another bootstrap")
	}
	<-old.done
	if err := stop(); err != nil {
		t.Error(err)
	}
}

func TestMissingAndBusy(t *testing.T) {
	_, err := New(Config{Path: "/nowhere/envoy", Log: slog.New(slog.DiscardHandler)})
	if err == nil || diag.HintOf(err) == "" || strings.Contains(err.Error(), "\n") {
		t.Errorf("missing Envoy: %v", err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	s, err := New(Config{Path: os.Args[0], Dir: t.TempDir(), AdminPort: l.Addr().(*net.TCPAddr).Port, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("port in use: %v", err)
	}
}

func TestCountConnections(t *testing.T) {
	stats := "listener.0.0.0.0_15001.downstream_cx_active: 3\nlistener.0.0.0.0_15001.worker_0.downstream_cx_active: 3\n" +
		"listener.admin.downstream_cx_active: 1\nlistener.stats.downstream_cx_active: 1\nlistener.[__]_15006.downstream_cx_active: 2\njunk\n"
	if n := countConnections([]byte(stats)); n != 5 {
		t.Errorf("got %d", n)
	}
}

func FuzzParseStartTime(f *testing.F) {
	f.Add([]byte("1 (a) b) S 1 1 1 0 -1 1 1 1 1 1 1 1 1 1 20 0 1 0 4242 1 1"))
	f.Add([]byte(")"))
	f.Add([]byte(""))
	f.Fuzz(func(t *testing.T, data []byte) { _, _ = parseStartTime(data) })
}

func TestParseStartTime(t *testing.T) {
	if n, err := parseStartTime([]byte("1 (a) b) S 1 1 1 0 -1 1 1 1 1 1 1 1 1 1 20 0 1 0 4242 1 1")); err != nil || n != 4242 {
		t.Errorf("got %d, %v", n, err)
	}
}
