package token

import (
	"context"
	"crypto/ed25519"
	"crypto/tls"
	"errors"
	"io"
	mrand "math/rand/v2"
	"net"
	"os"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	federationv1 "github.com/isthmus-mesh/isthmus/api/federation/v1"
)

// number reads how much a test is to do: make attack wants more than make test.
func number(t testing.TB, name string, n int) int {
	t.Helper()
	if v := os.Getenv(name); v != "" {
		var err error
		if n, err = strconv.Atoi(v); err != nil {
			t.Fatalf("%s=%q: %v", name, v, err)
		}
	}
	return n
}

// TestMutatedJoins changes a good join in every way, on its own connection and on others. None is accepted that does not
// say exactly what the good one says, and nothing is written.
func TestMutatedJoins(t *testing.T) {
	w := newWorld(t)
	token, grant := w.issue(nil)
	p, _ := Parse(token)
	mine, other := make([]byte, 32), make([]byte, 32)
	other[0] = 1
	body, _ := proto.Marshal(clusterJoin(t, "birch"))
	good := &federationv1.JoinRequest{Token: p.Reference(), Body: body, Proof: ed25519.Sign(p.Seed.key(), bound(requestLabel, mine, body))}
	frame, _ := proto.Marshal(good)
	joins := number(t, "ATTACK_JOINS", 4000)
	begin := time.Now()
	var next, accepted atomic.Int64
	var wg sync.WaitGroup
	for n := range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			rng := mrand.New(mrand.NewPCG(uint64(n), 7))
			for next.Add(1) <= int64(joins) {
				exp, m := mine, mutate(rng, good, frame)
				if rng.IntN(4) == 0 {
					exp = other
				}
				var got federationv1.JoinRequest
				if proto.Unmarshal(m, &got) == nil && got.Token == good.Token && string(got.Body) == string(good.Body) && string(got.Proof) == string(good.Proof) && exp[0] == 0 {
					continue // the same request
				}
				result, err := w.issuer.answer(context.Background(), m, exp, "attack")
				var refused *Refused
				if result != nil || !errors.As(err, &refused) {
					accepted.Add(1)
					t.Errorf("accepted, or failed: %v, %v: %x", result, err, m)
				}
			}
		})
	}
	wg.Wait()
	took := time.Since(begin)
	t.Logf("%d mutated joins in %s, %.0f a second: %d accepted", joins, took.Round(time.Millisecond), float64(joins)/took.Seconds(), accepted.Load())
	if g := w.stored(grant.ID); len(g.Redemptions) != 0 {
		t.Errorf("something was written: %+v", g)
	}
	if _, err := w.issuer.answer(context.Background(), frame, mine, "honest"); err != nil {
		t.Errorf("the good one is not good any more: %v", err)
	}
}

// mutate changes a request in its fields or in its bytes.
func mutate(rng *mrand.Rand, good *federationv1.JoinRequest, frame []byte) []byte {
	noise := func(b []byte) []byte {
		out := append([]byte(nil), b...)
		for range 1 + rng.IntN(3) {
			switch at := rng.IntN(max(1, len(out))); rng.IntN(5) {
			case 0:
				out = out[:at]
			case 1:
				out = append(out[:at:at], append([]byte{byte(rng.Uint32())}, out[at:]...)...)
			case 2:
				out = append(out, out[at:]...)
			default:
				if len(out) > 0 {
					out[at] ^= 1 << rng.IntN(8)
				}
			}
		}
		return out
	}
	m := &federationv1.JoinRequest{Token: good.Token, Body: good.Body, Proof: good.Proof}
	switch rng.IntN(6) {
	case 0:
		return noise(frame)
	case 1:
		m.Token = string(noise([]byte(good.Token)))
	case 2:
		m.Body = noise(good.Body)
	case 3:
		m.Proof = noise(good.Proof)
	case 4:
		_, key, _ := ed25519.GenerateKey(nil)
		m.Proof = ed25519.Sign(key, good.Body)
	case 5:
		m.Body, m.Proof = noise(good.Body), noise(good.Proof)
	}
	out, err := proto.Marshal(m)
	if err != nil { // not UTF-8
		return noise(frame)
	}
	return out
}

// TestFlood: hundreds that hold connections and say nothing, or garbage, do not keep an honest joiner out, nor cost memory.
func TestFlood(t *testing.T) {
	w := newWorld(t)
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	var came atomic.Int64
	for n := range 40 {
		wg.Go(func() {
			for ctx.Err() == nil {
				var held []net.Conn
				for i := 0; i < 10 && ctx.Err() == nil; i++ {
					conn, err := (&net.Dialer{Timeout: time.Second}).DialContext(ctx, "tcp", w.addr)
					if err != nil {
						continue
					}
					came.Add(1)
					held = append(held, conn)
					switch n % 4 {
					case 0: // garbage in place of TLS
						_, _ = conn.Write([]byte("GET / HTTP/1.1\r\n\r\n"))
					case 1: // a session, and a request that never ends
						c := tls.Client(conn, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{ALPN}, ServerName: "join.amber.mesh"})
						_ = c.SetDeadline(time.Now().Add(time.Second))
						_, _ = c.Write([]byte{0, 0, 0xff, 0xff, 1})
					case 2: // a request that is none
						c := tls.Client(conn, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{ALPN}, ServerName: "join.amber.mesh"})
						_ = c.SetDeadline(time.Now().Add(time.Second))
						_ = writeFrame(c, make([]byte, MaxRequest))
					}
				}
				select {
				case <-ctx.Done():
				case <-time.After(200 * time.Millisecond):
				}
				for _, c := range held {
					c.Close()
				}
			}
		})
	}
	for came.Load() < 400 {
		time.Sleep(5 * time.Millisecond) // until the flood is there
	}
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	best := time.Hour
	for range 5 {
		token, _ := w.issue(nil)
		begin := time.Now()
		_, err := w.redeem(token, clusterJoin(t, "birch"))
		if err != nil {
			t.Errorf("the honest joiner: %v", err)
		}
		best = min(best, time.Since(begin))
	}
	runtime.ReadMemStats(&after)
	t.Logf("an honest join takes %s in a flood of %d connections", best.Round(time.Millisecond), came.Load())
	if best > 2*time.Second {
		t.Errorf("an honest join takes %s", best)
	}
	if after.HeapInuse > before.HeapInuse+(64<<20) {
		t.Errorf("%d MiB in use, %d before", after.HeapInuse>>20, before.HeapInuse>>20)
	}
}

// TestPlaces: whoever floods loses its own places, and nobody loses one that is being decided on.
func TestPlaces(t *testing.T) {
	conn := func(source string) net.Conn { return from{addr: source + ":1"} }
	p := places{limit: 4}
	honest, busy := p.take(conn("192.0.2.1")), p.take(conn("192.0.2.2"))
	if !p.asks(busy) {
		t.Fatal("no place")
	}
	first := p.take(conn("192.0.2.3"))
	for range 10 {
		if p.take(conn("192.0.2.3")) == nil {
			t.Fatal("no place")
		}
	}
	if p.asks(first) {
		t.Error("the oldest of the flood keeps its place")
	}
	if !p.asks(honest) || !p.asks(busy) || len(p.order) != 4 {
		t.Error("others lost theirs")
	}
	for _, x := range p.order {
		x.asked = true
	}
	if p.take(conn("192.0.2.4")) != nil {
		t.Error("a place, where all are being decided on")
	}
	p.leave(busy)
	if p.take(conn("192.0.2.4")) == nil {
		t.Error("no place, where one is free")
	}
}

// from is a connection from somewhere.
type from struct {
	net.Conn
	addr string
}

// RemoteAddr implements net.Conn.
func (f from) RemoteAddr() net.Addr { a, _ := net.ResolveTCPAddr("tcp", f.addr); return a }

// Close implements net.Conn.
func (from) Close() error { return nil }

// TestIssuerKilled: the issuer dies after it bound the token, and before, and after, the joiner became a member. Another
// process on the same store lets the same key in, with the same answer, and no other.
func TestIssuerKilled(t *testing.T) {
	for name, late := range map[string]bool{"before it admits": false, "before it answers": true} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			ctx, kill := context.WithCancel(t.Context())
			dying := w.newIssuer()
			admit := dying.AdmitCluster
			dying.AdmitCluster = func(actx context.Context, g Grant, j *federationv1.ClusterJoin) (*federationv1.JoinResult, error) {
				if late {
					_, _ = admit(actx, g, j)
				}
				kill()
				return nil, context.Canceled
			}
			addr := w.listen(w.ca.leaf(t, nil, issuerID), func(_ context.Context, c *tls.Conn) { dying.Serve(ctx, c) })
			token, grant := w.issue(func(c *IssueConfig) { c.Endpoints = []string{addr} })
			birch := clusterJoin(t, "birch")
			_, err := w.redeem(token, birch)
			if err == nil {
				t.Fatal("it answered")
			}
			again := func(_ context.Context, _ string) (net.Conn, error) { return net.Dial("tcp", w.addr) }
			redeem := func(j *federationv1.ClusterJoin) (*federationv1.JoinResult, error) {
				return Redeem(t.Context(), token, RedeemConfig{Body: j, Dial: again})
			}
			_, err = redeem(clusterJoin(t, "birch"))
			wantRefused(t, err, ReasonSpent)
			one, err := redeem(birch)
			if err != nil {
				t.Fatalf("the same key: %v", err)
			}
			two, err := redeem(birch)
			if err != nil || !proto.Equal(one, two) {
				t.Errorf("first %v, then %v, %v", one, two, err)
			}
			if g := w.stored(grant.ID); len(g.Redemptions) != 1 {
				t.Errorf("grant %+v", g)
			}
		})
	}
}

// TestRecordedJoin plays a join that was accepted again, on many connections.
func TestRecordedJoin(t *testing.T) {
	w := newWorld(t)
	addr := w.addr
	token, grant := w.issue(nil)
	p, _ := Parse(token)
	conn, err := tls.Dial("tcp", addr, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{ALPN}, ServerName: "join.amber.mesh"})
	if err != nil {
		t.Fatal(err)
	}
	exp, err := exporter(conn.ConnectionState())
	if err != nil {
		t.Fatal(err)
	}
	body, _ := proto.Marshal(clusterJoin(t, "birch"))
	recorded, _ := proto.Marshal(&federationv1.JoinRequest{Token: p.Reference(), Body: body, Proof: ed25519.Sign(p.Seed.key(), bound(requestLabel, exp, body))})
	_ = writeFrame(conn, recorded)
	if r := readResult(t, conn); r.GetErrorReason() != "" {
		t.Fatalf("the join itself: %v", r)
	}
	conn.Close()
	for range 20 {
		replay, err := tls.Dial("tcp", addr, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{ALPN}, ServerName: "join.amber.mesh"})
		if err != nil {
			t.Fatal(err)
		}
		_ = writeFrame(replay, recorded)
		if r := readResult(t, replay); r.GetErrorReason() != ReasonProof {
			t.Errorf("a replay is answered with %v", r)
		}
		_, _ = io.Copy(io.Discard, replay)
		replay.Close()
	}
	if g := w.stored(grant.ID); len(g.Redemptions) != 1 {
		t.Errorf("grant %+v", g)
	}
}

// dying is a store that dies at one of its writes: with the write done, or not. Until it is restarted nothing works.
type dying struct {
	Store
	mu    sync.Mutex
	left  int  // writes until it dies
	after bool // the last write is done
	dead  bool
}

var errDead = errors.New("the store is gone")

func (d *dying) Get(key string) ([]byte, uint64, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.dead {
		return nil, 0, errDead
	}
	return d.Store.Get(key)
}

func (d *dying) CAS(key string, value []byte, version uint64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.dead {
		return errDead
	}
	if d.left--; d.left < 0 {
		d.dead = true
		if d.after {
			_ = d.Store.CAS(key, value, version)
		}
		return errDead
	}
	return d.Store.CAS(key, value, version)
}

func (d *dying) restart() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.dead, d.left = false, 1<<30
}

// TestRaceStoreKilled lets 64 keys redeem one token while the store dies on the way, and again when it is back. One key
// wins, and no other, however the first round ended.
func TestRaceStoreKilled(t *testing.T) {
	w := newWorld(t)
	rounds := number(t, "ATTACK_TOKENS", 9)
	var bodies [][]byte
	for range 64 {
		body, _ := proto.Marshal(clusterJoin(t, "birch"))
		bodies = append(bodies, body)
	}
	exp := make([]byte, 32)
	for round := range rounds {
		store := &dying{Store: new(Memory), left: 1 << 30, after: round%2 == 0}
		w.grants = NewGrants(store)
		issuers := []*Issuer{w.newIssuer(), w.newIssuer()}
		token, grant := w.issue(nil)
		p, _ := Parse(token)
		store.left = round % 3
		race := func() (winners map[int]bool) {
			winners = map[int]bool{}
			var mu sync.Mutex
			var wg sync.WaitGroup
			for n, body := range bodies {
				frame, _ := proto.Marshal(&federationv1.JoinRequest{Token: p.Reference(), Body: body, Proof: ed25519.Sign(p.Seed.key(), bound(requestLabel, exp, body))})
				wg.Go(func() {
					if _, err := issuers[n%2].answer(t.Context(), frame, exp, "test"); err == nil {
						mu.Lock()
						winners[n] = true
						mu.Unlock()
					}
				})
			}
			wg.Wait()
			return winners
		}
		first := race()
		store.restart()
		second := race()
		for n := range first {
			if !second[n] {
				t.Errorf("round %d: %d won, and lost when it came again", round, n)
			}
		}
		if g := w.stored(grant.ID); len(second) != 1 || len(first) > 1 || len(g.Redemptions) != 1 {
			t.Fatalf("round %d: %d winners, then %d; %d redemptions", round, len(first), len(second), len(g.Redemptions))
		}
	}
}
