package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/isthmus-mesh/isthmus/api/admin"
	"github.com/isthmus-mesh/isthmus/discovery/identity"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/federation/trust"
)

// asPeer opens a connection to a control plane as that of another cluster.
func asPeer(from, to *daemonTest, proto string) (*tls.Conn, error) {
	ca, err := identity.LoadOrCreate(identity.Config{Dir: from.cfg.DataDir, TrustDomain: mesh.TrustDomain(from.cfg.TrustDomain)})
	if err != nil {
		return nil, err
	}
	cert, err := ca.Issue("spiffe://"+from.cfg.TrustDomain+pathPeer, nil, time.Hour)
	if err != nil {
		return nil, err
	}
	other, err := identity.LoadOrCreate(identity.Config{Dir: to.cfg.DataDir, TrustDomain: mesh.TrustDomain(to.cfg.TrustDomain)})
	if err != nil {
		return nil, err
	}
	var bundles trust.Bundles
	if err := bundles.Set(map[mesh.TrustDomain][]byte{mesh.TrustDomain(to.cfg.TrustDomain): other.Roots()}); err != nil {
		return nil, err
	}
	cfg := trust.ClientConfig(trust.Config{Local: func() (*tls.Certificate, error) { return &cert, nil }, Bundles: &bundles, Authorize: trust.Path(pathPeer)})
	cfg.ServerName, cfg.NextProtos = "peer."+to.cfg.TrustDomain, []string{proto}
	conn, err := tls.Dial("tcp", to.cfg.Listen, cfg)
	if err != nil {
		return nil, err
	}
	// The server judges a client after the client is done: a refusal comes as the first thing that is read.
	if err := conn.SetReadDeadline(time.Now().Add(500 * time.Millisecond)); err != nil {
		return nil, err
	}
	if _, err := conn.Read(make([]byte, 1)); err != nil && !strings.Contains(err.Error(), "timeout") {
		conn.Close()
		return nil, err
	}
	return conn, conn.SetReadDeadline(time.Time{})
}

// TestEvictEverywhere: an eviction by the cluster that let another in holds everywhere: within two seconds no handshake of
// it is taken, its connections with control planes are closed, and what its workloads hold does not matter to others.
func TestEvictEverywhere(t *testing.T) {
	amber, _ := member(t, "amber", nil)
	birch, _ := member(t, "birch", nil)
	cedar, _ := member(t, "cedar", nil)
	birch.mustJoin(t, amber)
	cedar.mustJoin(t, amber)
	settled(t, amber, birch, cedar)
	a, b, c := newCaller(t, amber), newCaller(t, birch), newCaller(t, cedar)
	ctx, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer stop()
	for _, w := range []*caller{a, b, c} {
		wg.Go(func() { _ = w.follow(ctx) })
	}
	if err := errors.Join(c.call(a), c.call(b), a.call(b), b.call(a)); err != nil {
		t.Fatal(err)
	}
	var open []*tls.Conn
	for _, to := range []*daemonTest{amber, birch} {
		for _, proto := range []string{"h2", alpnGossip} {
			conn, err := asPeer(cedar, to, proto)
			if err != nil {
				t.Fatalf("%s at %s: %v", proto, to.cfg.Cluster, err)
			}
			defer conn.Close()
			open = append(open, conn)
		}
	}
	var failed, calls atomic.Int64
	wg.Go(func() {
		for ctx.Err() == nil {
			calls.Add(2)
			if err := errors.Join(a.call(b), b.call(a)); err != nil {
				failed.Add(1)
			}
			time.Sleep(20 * time.Millisecond) // the load's pace
		}
	})

	began := time.Now()
	var reply admin.EvictReply
	if err := amber.call("POST", "/v1/peers/cedar/evict", nil, &reply); err != nil {
		t.Fatal(err)
	}
	eventually(t, "cedar is refused everywhere", func() error {
		if c.call(a) == nil || c.call(b) == nil || a.call(c) == nil || b.call(c) == nil {
			return errors.New("a workload of cedar is taken")
		}
		for _, to := range []*daemonTest{amber, birch} {
			if conn, err := asPeer(cedar, to, alpnGossip); err == nil {
				conn.Close()
				return fmt.Errorf("its control plane is taken at %s", to.cfg.Cluster)
			}
		}
		return nil
	})
	if took := time.Since(began); took > 5*time.Second { // two on a machine that does nothing else
		t.Errorf("cedar was refused everywhere after %s", took)
	}
	for i, conn := range open {
		if err := conn.SetReadDeadline(began.Add(10 * time.Second)); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 4096)
		for {
			if _, err := conn.Read(buf); err != nil {
				if strings.Contains(err.Error(), "timeout") {
					t.Errorf("connection %d of cedar is open after ten seconds", i)
				}
				break
			}
		}
	}
	eventually(t, "the others are one mesh", func() error {
		return errors.Join(amber.serves(t, "amber", "birch"), birch.serves(t, "amber", "birch"), amber.knows(t, "birch"), birch.knows(t, "amber"))
	})
	stop()
	wg.Wait()
	if n := failed.Load(); n > 0 {
		t.Errorf("%d of %d calls of the others failed", n, calls.Load())
	}
}
