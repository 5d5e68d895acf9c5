package ca_test

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"

	"github.com/isthmus-mesh/isthmus/cmd/isthmus-agent/internal/ca"
	"github.com/isthmus-mesh/isthmus/cmd/isthmus-agent/internal/catest"
	"github.com/isthmus-mesh/isthmus/cmd/isthmus-agent/internal/upstream"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const id = "spiffe://amber.mesh/ns/default/sa/web"

var quiet = slog.New(slog.DiscardHandler)

func TestRenewAt(t *testing.T) {
	from := time.Unix(1000, 0)
	for _, c := range []struct {
		life          time.Duration
		ratio, random float64
		want          time.Duration
	}{
		{60 * time.Second, 0.5, 0.5, 30 * time.Second},
		{60 * time.Second, 0.5, 0, 33 * time.Second},
		{60 * time.Second, 0.5, 1, 27 * time.Second},
		{24 * time.Hour, 0.25, 0.5, 18 * time.Hour},
	} {
		if got := ca.RenewAt(from, from.Add(c.life), c.ratio, c.random).Sub(from).Round(time.Millisecond); got != c.want {
			t.Errorf("%+v: got %s", c, got)
		}
	}
}

// Renewal happens at about half of the life; failures keep the last good certificate and are tried again.
func TestRunRenews(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		root := catest.New(t) // made here, as the clock inside stands at the year 2000
		var times []time.Duration
		start := time.Now()
		fail := 0
		m, err := ca.New(ca.Config{
			ID: id, TTL: time.Minute, Log: quiet, Roots: func() (*x509.CertPool, error) { return root.Pool(), nil },
			Sign: func(_ context.Context, csr []byte, ttl time.Duration, current *ca.Certificate) ([]string, error) {
				if len(times) > 0 && current == nil {
					t.Error("a renewal without the current certificate")
				}
				if len(times) == 2 && fail < 3 {
					fail++
					return nil, errors.New("away")
				}
				times = append(times, time.Since(start))
				return root.Sign(csr, id, ttl)
			},
		})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- m.Run(ctx) }()
		_, changed := m.Current()
		<-changed
		first, changed := m.Current()
		if !m.Ready() {
			t.Error("not ready with a certificate")
		}
		<-changed
		second, changed := m.Current()
		if first.Leaf.SerialNumber.Cmp(second.Leaf.SerialNumber) == 0 {
			t.Error("same serial")
		}
		<-changed
		if !m.Ready() {
			t.Error("not ready after failures")
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if gap := times[1] - times[0]; gap < 27*time.Second || gap > 33*time.Second {
			t.Errorf("renewed after %s of a life of 1m", gap)
		}
		if fail != 3 {
			t.Errorf("%d failures", fail)
		}
		if gap := times[2] - times[1]; gap > 45*time.Second {
			t.Errorf("three failures cost %s", gap)
		}
	})
}

func TestAccept(t *testing.T) {
	root, other := catest.New(t), catest.New(t)
	key, csr, err := ca.NewRequest(id)
	if err != nil {
		t.Fatal(err)
	}
	key2, _, _ := ca.NewRequest(id)
	chain := func(a *catest.Authority, id string) []string {
		c, err := a.Sign(csr, id, time.Minute)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	good, err := ca.Accept(chain(root, id), key, id, root.Pool())
	if err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(string(good.Chain), "BEGIN"); n != 1 {
		t.Errorf("%d certificates in the chain, want the leaf alone", n)
	}
	if s := fmt.Sprintf("%s %v %#v", good.Key, good.Key, good.Key); strings.Contains(s, "PRIVATE") {
		t.Errorf("the key prints: %s", s)
	}
	long := chain(root, id)
	for range 20 {
		long = append(long, long[1])
	}
	for name, err := range map[string]error{
		"another key":  second(ca.Accept(chain(root, id), key2, id, root.Pool())),
		"another id":   second(ca.Accept(chain(root, "spiffe://amber.mesh/ns/default/sa/b"), key, id, root.Pool())),
		"another root": second(ca.Accept(chain(other, id), key, id, root.Pool())),
		"nothing":      second(ca.Accept(nil, key, id, root.Pool())),
		"junk":         second(ca.Accept([]string{"junk"}, key, id, root.Pool())),
		"too long":     second(ca.Accept(long, key, id, root.Pool())),
	} {
		if err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func second(_ *ca.Certificate, err error) error { return err }

func TestKeepsOverRestart(t *testing.T) {
	root, dir := catest.New(t), t.TempDir()
	config := ca.Config{
		ID: id, TTL: time.Hour, Log: quiet, Dir: dir, Roots: func() (*x509.CertPool, error) { return root.Pool(), nil },
		Sign: func(_ context.Context, csr []byte, ttl time.Duration, _ *ca.Certificate) ([]string, error) {
			return root.Sign(csr, id, ttl)
		},
	}
	m, err := ca.New(config)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Obtain(t.Context()); err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(filepath.Join(dir, ca.StateFile))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	was, _ := m.Current()
	again, err := ca.New(config)
	if err != nil {
		t.Fatal(err)
	}
	is, _ := again.Current()
	if is == nil || !is.Leaf.Equal(was.Leaf) || string(is.Key) != string(was.Key) || string(is.Chain) != string(was.Chain) {
		t.Error("another certificate after the restart")
	}
	if err := os.WriteFile(filepath.Join(dir, ca.StateFile), []byte("junk"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ca.New(config); err == nil {
		t.Error("junk taken for a certificate")
	}
}

// The token is used once, the certificate afterwards.
func TestIstio(t *testing.T) {
	root := catest.New(t)
	srv := root.Serve(t, "xds.amber.mesh", id, "secret", nil)
	token := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(token, []byte("secret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	var m *ca.Manager
	up := upstream.Config{Addresses: []string{"127.0.0.1:1", srv.Address}, ServerName: "xds.amber.mesh", Roots: upstream.RootsFile(root.RootFile(t))}
	plain := upstream.New(up)
	connect := func(ctx context.Context, with bool) (*grpc.ClientConn, error) {
		if !with {
			return plain.Connect(ctx)
		}
		up.Certificate = m.TLS
		return upstream.New(up).Connect(ctx)
	}
	m, err := ca.New(ca.Config{ID: id, TTL: time.Hour, Log: quiet, Roots: up.Roots, Sign: ca.Istio(connect, token, false)})
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := m.Obtain(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if srv.Tokens.Load() != 1 || srv.Certs.Load() != 1 {
		t.Errorf("token used %d times, certificate %d times", srv.Tokens.Load(), srv.Certs.Load())
	}
	up.ServerName = "xds.birch.mesh"
	if _, err := upstream.New(up).Connect(t.Context()); err == nil || !strings.Contains(err.Error(), "xds.birch.mesh") {
		t.Errorf("another server name: %v", err)
	}
}
