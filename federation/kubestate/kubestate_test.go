package kubestate_test

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	federationv1 "github.com/isthmus-mesh/isthmus/api/federation/v1"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/federation/kubestate"
	"github.com/isthmus-mesh/isthmus/federation/protocol"
	"github.com/isthmus-mesh/isthmus/federation/token"
	"github.com/isthmus-mesh/isthmus/internal/kubetest"
)

const patience = 30 * time.Second

// api is one API server with our resources, for all tests of a run.
func api(t *testing.T) *kubetest.Server {
	t.Helper()
	s := kubetest.APIServer(t)
	s.CRDs("../../deploy/helm/isthmus/files/crds/isthmus.yaml")
	_, err := s.Client().CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "istio-system"}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func client(t *testing.T, s *kubetest.Server) *kubestate.Client {
	t.Helper()
	c, err := kubestate.NewClient(s.REST(), "istio-system")
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func eventually(t *testing.T, what string, check func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !check(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within %s", what, patience)
		}
	}
}

// TestReal runs all that needs a real API server on one.
func TestReal(t *testing.T) {
	s := api(t)
	t.Run("secret", func(t *testing.T) { secretRace(t, s) })
	t.Run("grant", func(t *testing.T) { grantRoundTrip(t, s) })
	t.Run("redeem", func(t *testing.T) { redeemRace(t, s) })
	t.Run("ledger", func(t *testing.T) { ledgerSurvives(t, s) })
	t.Run("election", func(t *testing.T) { election(t, s) })
}

// secretRace: replicas that race to make a Secret all return the same one, and what is there is never changed.
func secretRace(t *testing.T, s *kubetest.Server) {
	for round := range 10 {
		name := fmt.Sprintf("keys-%d", round)
		var wg sync.WaitGroup
		got := make([]string, 8)
		for i := range got {
			c := client(t, s)
			wg.Go(func() {
				data, err := c.EnsureSecret(t.Context(), name, func(held map[string][]byte) (map[string][]byte, error) {
					out := map[string][]byte{}
					for _, k := range []string{"a", "b"} {
						if len(held[k]) == 0 {
							out[k] = fmt.Appendf(nil, "%s of %d", k, i)
						}
					}
					return out, nil
				})
				if err != nil {
					t.Error(err)
				}
				got[i] = string(data["a"]) + "," + string(data["b"])
			})
		}
		wg.Wait()
		for _, g := range got {
			if g != got[0] || g == "," {
				t.Fatalf("round %d: replicas hold different keys: %q", round, got)
			}
		}
	}
}

func issue(t *testing.T, key ed25519.PrivateKey) token.Grant {
	t.Helper()
	_, g, err := token.Issue(token.IssueConfig{
		Kind: token.Cluster, TrustDomain: "amber.mesh", Key: key, Pins: []token.Pin{{1}}, Endpoints: []string{"192.0.2.1:15443"},
		Lifetime: 15 * time.Minute, Subject: "birch", CreatedBy: "operator",
	})
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// grantRoundTrip: a grant comes back as it was given, and only the one whose version is right writes.
func grantRoundTrip(t *testing.T, s *kubetest.Server) {
	_, key, _ := ed25519.GenerateKey(nil)
	grants := token.NewGrants(client(t, s).Grants())
	g := issue(t, key)
	g.Machine = &token.Machine{Name: "db", Namespace: "shop", ServiceAccount: "db", Labels: map[string]string{"app": "db"}, Ports: map[string]uint32{"tcp": 5432}, Network: "n1"}
	if err := grants.Put(g); err != nil {
		t.Fatal(err)
	}
	if err := grants.Put(g); !errors.Is(err, token.ErrExists) {
		t.Errorf("a grant is put twice: %v", err)
	}
	got, err := grants.Get(g.ID)
	if err != nil {
		t.Fatal(err)
	}
	if fmt.Sprint(got) == fmt.Sprint(token.Grant{}) || fmt.Sprintf("%+v", *got.Machine) != fmt.Sprintf("%+v", *g.Machine) || got.ID != g.ID ||
		!got.Expires.Equal(g.Expires) || !got.SeedPublic.Equal(g.SeedPublic) || string(got.Reference) != string(g.Reference) || got.Uses != g.Uses {
		t.Errorf("got %+v, want %+v", got, g)
	}
	revoked, err := grants.Revoke(t.Context(), g.ID, "operator", time.Now())
	if err != nil || revoked.State(time.Now()) != token.Revoked {
		t.Errorf("revoke: %v, %+v", err, revoked)
	}
	if all, err := grants.List(); err != nil || len(all) != 1 || all[0].State(time.Now()) != token.Revoked {
		t.Errorf("list: %v, %+v", err, all)
	}
	if err := errors.Join(grants.Delete(g.ID), grants.Delete(g.ID)); err != nil {
		t.Error(err)
	}
	if _, err := grants.Get(g.ID); !errors.Is(err, token.ErrNoGrant) {
		t.Errorf("deleted grant: %v", err)
	}
}

// redeemRace: of many that redeem one grant at two replicas at the same time, exactly one is written.
func redeemRace(t *testing.T, s *kubetest.Server) {
	_, key, _ := ed25519.GenerateKey(nil)
	a, b := client(t, s).Grants(), client(t, s).Grants()
	for round := range 24 {
		g := issue(t, key)
		if err := token.NewGrants(a).Put(g); err != nil {
			t.Fatal(err)
		}
		var mu sync.Mutex
		var wg sync.WaitGroup
		won := 0
		value, version, err := b.Get("grant/" + g.ID)
		if err != nil {
			t.Fatal(err)
		}
		for i := range 64 {
			store := []*kubestate.Grants{a, b}[i%2]
			wg.Go(func() {
				err := store.CAS("grant/"+g.ID, fmt.Appendf(nil, `%s,"redemptions":[{"key":"AQ==","name":"j%d","from":"x","at":"2026-01-01T00:00:00Z"}]}`, value[:len(value)-1], i), version)
				mu.Lock()
				defer mu.Unlock()
				if err == nil {
					won++
				} else if !errors.Is(err, kubestate.ErrVersion) {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if won != 1 {
			t.Fatalf("round %d: %d winners", round, won)
		}
		if got, err := token.NewGrants(a).Get(g.ID); err != nil || len(got.Redemptions) != 1 {
			t.Fatalf("round %d: %+v, %v", round, got, err)
		}
	}
}

type noCache struct{}

func (noCache) Commit([]protocol.Action) error           { return nil }
func (noCache) Heard(map[mesh.ClusterID]time.Time) error { return nil }
func record(origin, kind, key string, seq uint64) *federationv1.Record {
	return &federationv1.Record{Origin: origin, Kind: kind, Key: key, Epoch: 1, Seq: seq, Body: []byte{}, Signature: make([]byte, 64)}
}

// ledgerSurvives: what must outlive the replicas does, the epoch never falls, and a deposed leader writes nothing.
func ledgerSurvives(t *testing.T, s *kubetest.Server) {
	pub, _, _ := ed25519.GenerateKey(nil)
	ledger := func() *kubestate.Ledger {
		return kubestate.NewLedger(kubestate.LedgerConfig{
			Client: client(t, s), Local: "amber", TrustDomain: "amber.mesh", FederationKey: pub, Cache: noCache{}, Log: slog.New(slog.DiscardHandler),
			Peers: func() []protocol.Peer {
				return []protocol.Peer{{Name: "birch", TrustDomain: "birch.mesh", State: protocol.Approved}}
			},
		})
	}
	first, second := ledger(), ledger()
	epoch, err := first.Claim(t.Context(), 0)
	if err != nil || epoch != 1 {
		t.Fatalf("first epoch %d, %v", epoch, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- first.Run(ctx) }()
	if err := first.Commit([]protocol.Action{
		protocol.Persist{Record: record("amber", protocol.KindMember, "birch", 7)},
		protocol.Persist{Record: record("amber", protocol.KindTombstone, "member/cedar", 8)},
		protocol.Persist{Record: record("birch", protocol.KindCluster, "", 9)},
		protocol.Persist{Record: record("birch", protocol.KindEndpoints, "default/reviews", 40)},
		protocol.Persist{Record: record("birch", protocol.KindTombstone, "service/default/ratings", 41)},
	}); err != nil {
		t.Fatal(err)
	}
	// What this cluster says of members is there when Commit returns.
	held, _, err := second.Load(t.Context())
	if err != nil || len(held.Records) != 2 {
		t.Fatalf("after the commit: %v, %v", held.Records, err)
	}
	cancel() // a clean stop writes the rest
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	held, _, err = second.Load(t.Context())
	if err != nil || len(held.Records) != 4 || held.Marks["birch"] != (protocol.Mark{Epoch: 1, Seq: 41}) {
		t.Fatalf("after the stop: %v, marks %v, %v", held.Records, held.Marks, err)
	}

	next, err := second.Claim(t.Context(), 0)
	if err != nil || next != 2 {
		t.Fatalf("second epoch %d, %v", next, err)
	}
	if err := second.Commit([]protocol.Action{protocol.Persist{Record: record("amber", protocol.KindTombstone, "member/birch", 20)}, protocol.Remove{Origin: "amber", Kind: protocol.KindMember, Key: "birch"}}); err != nil {
		t.Fatal(err)
	}
	if err := first.Commit([]protocol.Action{protocol.Persist{Record: record("amber", protocol.KindMember, "dogwood", 9)}}); err != nil {
		t.Fatal(err)
	}
	held, _, err = ledger().Load(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range held.Records {
		if r.Origin == "amber" && r.Kind == protocol.KindMember {
			t.Errorf("a deposed leader wrote %s %s", r.Kind, r.Key)
		}
	}
	if at := held.Marks["amber"]; at.Epoch != 2 {
		t.Errorf("own mark %v", at)
	}
	if again, err := ledger().Claim(t.Context(), 10); err != nil || again != 11 {
		t.Errorf("epoch over what is held: %d, %v", again, err)
	}
	// Racing claims are all different.
	var mu sync.Mutex
	var wg sync.WaitGroup
	seen := map[uint64]bool{}
	for range 8 {
		l := ledger()
		wg.Go(func() {
			e, err := l.Claim(t.Context(), 0)
			mu.Lock()
			defer mu.Unlock()
			if err != nil || seen[e] {
				t.Errorf("epoch %d is claimed twice, or %v", e, err)
			}
			seen[e] = true
		})
	}
	wg.Wait()
}

type candidate struct {
	*kubestate.Election
	stop func()
}

func stand(t *testing.T, s *kubetest.Server, name string) candidate {
	t.Helper()
	cfg := kubestate.DefaultElection()
	cfg.Client, cfg.Identity, cfg.Log = client(t, s), kubestate.Identity(name, netip.MustParseAddrPort("192.0.2.1:15012")), slog.New(slog.DiscardHandler)
	cfg.Duration, cfg.Renew, cfg.Retry = 3*time.Second, 2*time.Second, 200*time.Millisecond
	e := kubestate.NewElection(cfg)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- e.Run(ctx) }()
	stop := sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(stop)
	return candidate{e, stop}
}

// election: one leads, the other knows where it is; a clean stop hands over; an API that is away ends no leadership.
func election(t *testing.T, s *kubetest.Server) {
	a := stand(t, s, "a")
	eventually(t, "a leads", func() bool { now, _ := a.Current(); return now.Leading && now.Number == 1 })
	b := stand(t, s, "b")
	eventually(t, "b follows a", func() bool {
		now, _ := b.Current()
		return now.Known && !now.Leading && now.Leader == "a@192.0.2.1:15012" && now.Address().Port() == 15012
	})
	s.Freeze()
	time.Sleep(4 * time.Second) // longer than the lease: that is what is tested
	if now, _ := a.Current(); !now.Leading {
		t.Error("a stopped leading while the API was away")
	}
	if now, _ := b.Current(); now.Leading {
		t.Error("b leads although the API is away")
	}
	s.Thaw()
	eventually(t, "exactly one leads", func() bool {
		x, _ := a.Current()
		y, _ := b.Current()
		return x.Leading != y.Leading
	})
	first, second := a, b
	if now, _ := b.Current(); now.Leading {
		first, second = b, a
	}
	started := time.Now()
	first.stop()
	eventually(t, "the other leads", func() bool { now, _ := second.Current(); return now.Leading })
	if took := time.Since(started); took > 10*time.Second {
		t.Errorf("a clean hand-over took %s", took)
	}
}
