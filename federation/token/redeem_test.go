package token

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	federationv1 "github.com/isthmus-mesh/isthmus/api/federation/v1"
)

func TestRedeemCluster(t *testing.T) {
	w := newWorld(t)
	token, grant := w.issue(func(c *IssueConfig) { c.AutoApprove = true })
	birch := clusterJoin(t, "birch")
	for range 2 { // the second time as if the first reply was lost
		result, err := w.redeem(token, birch)
		if err != nil || result.GetPending() {
			t.Fatalf("redeem: %v, %v", result, err)
		}
	}
	g := w.stored(grant.ID)
	if len(g.Redemptions) != 1 || g.Redemptions[0].Name != "birch" || g.Redemptions[0].From == "" || g.Redemptions[0].At.IsZero() || g.State(w.now()) != Redeemed {
		t.Errorf("grant %+v", g)
	}
	_, err := w.redeem(token, clusterJoin(t, "birch"))
	refused := wantRefused(t, err, ReasonSpent)
	for _, part := range []string{`"birch"`, "127.0.0.1", stamp(g.Redemptions[0].At), "isthmus token create --for birch"} {
		if !strings.Contains(refused, part) {
			t.Errorf("%q does not say %q", refused, part)
		}
	}
	w.set(func() {
		if w.reuses != 1 {
			t.Errorf("%d alarms of reuse, want 1", w.reuses)
		}
	})
}

func TestRedeemMachine(t *testing.T) {
	w := newWorld(t)
	token, grant := w.issueVM(func(c *IssueConfig) { c.Uses = 2 })
	dune := machineJoin(t, "dune")
	for _, join := range []proto.Message{dune, machineJoin(t, "dune2"), dune} {
		if _, err := w.redeem(token, join); err != nil {
			t.Fatal(err)
		}
	}
	_, err := w.redeem(token, machineJoin(t, "dune3"))
	wantRefused(t, err, ReasonSpent)
	if g := w.stored(grant.ID); len(g.Redemptions) != 2 || g.Machine.Ports["http"] != 9080 {
		t.Errorf("grant %+v", g)
	}
}

func wantRefused(t *testing.T, err error, reason string) string {
	t.Helper()
	var r *Refused
	if !errors.As(err, &r) || r.Reason != reason {
		t.Fatalf("got %v, want reason %s", err, reason)
	}
	return r.Message
}

func TestIssuerRefuses(t *testing.T) {
	resign := func(w *world, change func(*payloadJSON)) func(string) string {
		return func(token string) string {
			raw, _, _ := split(token)
			j, err := decode(raw)
			if err != nil {
				t.Fatal(err)
			}
			change(&j)
			edited, _ := j.encode()
			return join(edited, ed25519.Sign(w.key, edited))
		}
	}
	cases := map[string]struct {
		join    func() proto.Message
		before  func(w *world, id string)
		edit    func(w *world) func(string) string
		reason  string
		text    string
		machine bool
	}{
		"unknown":       {reason: ReasonUnknown, text: "isthmus token create --for birch", before: func(w *world, id string) { _ = w.grants.Delete(id) }},
		"revoked":       {reason: ReasonRevoked, text: "was revoked at", before: func(w *world, id string) { _, _ = w.grants.Revoke(context.Background(), id, "ann", w.now()) }},
		"expired":       {reason: ReasonExpired, text: "by the clock of amber.mesh", before: func(w *world, _ string) { w.set(func() { w.clock = time.Hour }) }},
		"not yet valid": {reason: ReasonNotYetValid, text: "is valid from", before: func(w *world, _ string) { w.set(func() { w.clock = -time.Hour }) }},
		"foreign": {reason: ReasonForeign, text: "issued by amber.mesh, this is other.mesh", before: func(w *world, _ string) {
			w.issuer.TrustDomain = "other.mesh"
		}},
		"edited": {reason: ReasonEdited, text: "copy the whole line", edit: func(w *world) func(string) string {
			return resign(w, func(j *payloadJSON) { j.Sub = "cedar" })
		}, join: func() proto.Message { return clusterJoin(t, "cedar") }},
		"other seed": {reason: ReasonProof, text: "isthmus token create", edit: func(w *world) func(string) string {
			return func(token string) string { // the right reference with a wrong seed cannot be a token: see TestProof
				return token
			}
		}, before: func(w *world, id string) {
			_, err := w.grants.update(context.Background(), id, func(g *Grant) (bool, error) {
				g.SeedPublic = make([]byte, ed25519.PublicKeySize)
				g.SeedPublic[3] = 7
				return true, nil
			})
			if err != nil {
				t.Error(err)
			}
		}},
		"name":              {reason: ReasonName, text: `is for cluster birch, not for "cedar"`, join: func() proto.Message { return clusterJoin(t, "cedar") }},
		"no record":         {reason: ReasonRecord, text: "no cluster record", join: func() proto.Message { return &federationv1.ClusterJoin{Name: "birch"} }},
		"record of another": {reason: ReasonRecord, text: "no cluster record", join: func() proto.Message { c := clusterJoin(t, "cedar"); c.Name = "birch"; return c }},
		"record of a kind":  {reason: ReasonRecord, text: "no cluster record", join: func() proto.Message { c := clusterJoin(t, "birch"); c.Cluster.Kind = "service"; return c }},
		"record unsigned":   {reason: ReasonRecord, text: "not signed", join: func() proto.Message { c := clusterJoin(t, "birch"); c.Cluster.Signature = nil; return c }},
		"record no key": {reason: ReasonRecord, text: "no federation key", join: func() proto.Message {
			c := clusterJoin(t, "birch")
			c.Cluster.Body = nil
			return c
		}},
		"too large": {reason: "", text: "at most 65536", join: func() proto.Message {
			c := clusterJoin(t, "birch")
			c.Cluster.Signature = make([]byte, MaxRequest)
			return c
		}},
		"name taken": {reason: "NameTaken", text: "birch is taken", before: func(w *world, _ string) {
			w.set(func() { w.admit = func(Grant) error { return &Refused{"NameTaken", "birch is taken"} } })
		}},
		"broken": {reason: ReasonInternal, text: "run the same command again", before: func(w *world, _ string) { w.set(func() { w.admit = func(Grant) error { return io.ErrNoProgress } }) }},
		"no CSR": {machine: true, reason: ReasonRequest, text: "no certificate request", join: func() proto.Message { return &federationv1.MachineJoin{} }},
		"garbage CSR": {machine: true, reason: ReasonRequest, text: "does not parse", join: func() proto.Message {
			return &federationv1.MachineJoin{CsrPem: "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n"}
		}},
		"long host":   {machine: true, reason: ReasonRequest, text: "253", join: func() proto.Message { m := machineJoin(t, strings.Repeat("a", 254)); return m }},
		"no machines": {machine: true, reason: ReasonRequest, text: "does not admit", before: func(w *world, _ string) { w.issuer.AdmitMachine = nil }},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			token, grant := w.issue(nil)
			join := func() proto.Message { return clusterJoin(t, "birch") }
			if c.machine {
				token, grant = w.issueVM(nil)
				join = func() proto.Message { return machineJoin(t, "dune") }
			}
			good := token
			if c.join != nil {
				join = c.join
			}
			if c.before != nil {
				c.before(w, grant.ID)
			}
			if c.edit != nil {
				token = c.edit(w)(token)
			}
			_, err := w.redeem(token, join())
			text := ""
			if c.reason == "" {
				text = err.Error()
			} else {
				text = wantRefused(t, err, c.reason)
			}
			if !strings.Contains(text, c.text) {
				t.Errorf("%q does not say %q", text, c.text)
			}
			if name == "broken" || name == "unknown" || name == "other seed" {
				return
			}
			if g := w.stored(grant.ID); len(g.Redemptions) != 0 {
				t.Errorf("the refusal spent the token: %+v", g)
			}
			if c.before == nil { // nothing but the request was wrong
				right := proto.Message(clusterJoin(t, "birch"))
				if c.machine {
					right = machineJoin(t, "dune")
				}
				if _, err := w.redeem(good, right); err != nil {
					t.Errorf("the token is not good any more: %v", err)
				}
			}
		})
	}
}

func TestRefusalLeavesTokenToTheRightJoiner(t *testing.T) {
	w := newWorld(t)
	token, grant := w.issue(nil)
	w.set(func() { w.admit = func(Grant) error { return &Refused{"NameTaken", "birch is taken"} } })
	_, err := w.redeem(token, clusterJoin(t, "birch"))
	wantRefused(t, err, "NameTaken")
	w.set(func() { w.admit = nil })
	if _, err := w.redeem(token, clusterJoin(t, "birch")); err != nil {
		t.Fatal(err)
	}
	if g := w.stored(grant.ID); len(g.Redemptions) != 1 {
		t.Errorf("grant %+v", g)
	}
}

func TestLateRetry(t *testing.T) {
	w := newWorld(t)
	token, _ := w.issue(nil)
	birch := clusterJoin(t, "birch")
	if _, err := w.redeem(token, birch); err != nil {
		t.Fatal(err)
	}
	w.set(func() { w.clock = DefaultLifetime + time.Minute })
	if _, err := w.redeem(token, birch); err != nil {
		t.Errorf("the key that redeemed comes again: %v", err)
	}
	_, err := w.redeem(token, clusterJoin(t, "birch"))
	wantRefused(t, err, ReasonSpent)
	w.set(func() { w.clock = 3 * DefaultLifetime })
	_, err = w.redeem(token, birch)
	wantRefused(t, err, ReasonExpired)
}

func TestJoinerClock(t *testing.T) {
	w := newWorld(t)
	for name, ahead := range map[string]time.Duration{"behind": -90 * 24 * time.Hour, "ahead": 90 * 24 * time.Hour} {
		t.Run(name, func(t *testing.T) {
			token, _ := w.issue(nil)
			var log bytes.Buffer
			_, err := Redeem(t.Context(), token, RedeemConfig{
				Body: clusterJoin(t, "birch"), Now: func() time.Time { return time.Now().Add(ahead) }, Log: slog.New(slog.NewTextHandler(&log, nil)),
			})
			if err != nil {
				t.Errorf("a wrong clock keeps the joiner out: %v", err)
			}
			if !strings.Contains(log.String(), "issuer's clock decides") {
				t.Errorf("no warning in %q", log.String())
			}
		})
	}
}

func TestWrongKindOfJoiner(t *testing.T) {
	w := newWorld(t)
	cluster, _ := w.issue(nil)
	machine, _ := w.issueVM(nil)
	for token, join := range map[string]proto.Message{cluster: machineJoin(t, "dune"), machine: clusterJoin(t, "birch")} {
		if _, err := w.redeem(token, join); err == nil || !strings.Contains(err.Error(), "join TOKEN") {
			t.Errorf("%T: %v", join, err)
		}
	}
	if _, err := w.redeem(cluster, nil); err == nil {
		t.Error("redeemed without a body")
	}
}

// TestManInTheMiddle puts other certificates behind the token's address.
func TestManInTheMiddle(t *testing.T) {
	w := newWorld(t)
	other := newAuthority(t)
	genuine := w.ca.leaf(t, nil, issuerID)
	self := ecKey(t)
	selfSigned := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour), URIs: []*url.URL{{Scheme: "spiffe", Host: "amber.mesh", Path: "/isthmus/join"}}}
	cases := map[string]tls.Certificate{
		"self-signed":          {Certificate: [][]byte{sign(t, selfSigned, selfSigned, &self.PublicKey, self).Raw}, PrivateKey: self},
		"public CA":            other.leaf(t, nil),
		"right name, other CA": other.leaf(t, nil, issuerID),
		"another identity":     w.ca.leaf(t, nil, "spiffe://amber.mesh/ns/default/sa/reviews"),
		"peer's identity":      w.ca.leaf(t, nil, "spiffe://amber.mesh/isthmus/peer"),
		"another member":       w.ca.leaf(t, nil, "spiffe://birch.mesh/isthmus/join"),
		"two identities":       w.ca.leaf(t, nil, issuerID, "spiffe://amber.mesh/isthmus/peer"),
		"no identity":          w.ca.leaf(t, nil),
		"client certificate":   w.ca.leaf(t, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth} }, issuerID),
		"long expired": w.ca.leaf(t, func(c *x509.Certificate) {
			c.NotBefore, c.NotAfter = time.Now().Add(-50*time.Minute), time.Now().Add(-40*time.Minute)
		}, issuerID),
		"CA appended, not its child": func() tls.Certificate { c := other.leaf(t, nil, issuerID); c.Certificate[1] = w.ca.cert.Raw; return c }(),
		"genuine certificate":        {Certificate: genuine.Certificate, PrivateKey: ecKey(t)}, // without its key
	}
	for name, cert := range cases {
		t.Run(name, func(t *testing.T) {
			var mu sync.Mutex
			var got []byte
			var finished bool
			addr := w.listen(cert, func(ctx context.Context, conn *tls.Conn) {
				defer conn.Close()
				_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
				err := conn.HandshakeContext(ctx)
				b, _ := io.ReadAll(conn)
				mu.Lock()
				defer mu.Unlock()
				finished, got = err == nil, append(got, b...)
			})
			token, grant := w.issue(func(c *IssueConfig) { c.Endpoints = []string{addr} })
			birch := clusterJoin(t, "birch")
			_, err := w.redeem(token, birch)
			if name == "genuine certificate" {
				if err == nil || errors.Is(err, ErrReply) {
					t.Errorf("got %v", err)
				}
			} else if !errors.Is(err, ErrPin) || !strings.Contains(err.Error(), addr) || !strings.Contains(err.Error(), "not the issuer") {
				t.Errorf("got %v, want ErrPin", err)
			}
			mu.Lock()
			if finished || len(got) > 0 {
				t.Errorf("the other side has a session (%t) and %d bytes", finished, len(got))
			}
			mu.Unlock()
			if g := w.stored(grant.ID); g.State(w.now()) != Issued {
				t.Errorf("grant %+v", g)
			}
			// The way is clear again: the same token joins.
			dial := func(ctx context.Context, _ string) (net.Conn, error) {
				return new(net.Dialer).DialContext(ctx, "tcp", w.addr)
			}
			if _, err := Redeem(t.Context(), token, RedeemConfig{Body: birch, Dial: dial}); err != nil {
				t.Errorf("the token is not good any more: %v", err)
			}
		})
	}
}

func TestPinOfLeaf(t *testing.T) {
	w := newWorld(t)
	cert := w.ca.leaf(t, nil, issuerID)
	cert.Certificate = cert.Certificate[:1]
	addr := w.listen(cert, w.issuer.Serve)
	token, _ := w.issue(func(c *IssueConfig) { c.Endpoints, c.Pins = []string{addr}, []Pin{{9}, PinOf(cert.Leaf)} })
	if _, err := w.redeem(token, clusterJoin(t, "birch")); err != nil {
		t.Fatal(err)
	}
}

// TestNothingOfTheSeedIsSent is the issuer itself and looks at all it gets.
func TestNothingOfTheSeedIsSent(t *testing.T) {
	w := newWorld(t)
	requests := make(chan []byte, 1)
	addr := w.listen(w.ca.leaf(t, nil, issuerID), func(_ context.Context, conn *tls.Conn) {
		defer conn.Close()
		_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
		frame, _ := readFrame(conn, MaxRequest)
		requests <- frame
		_ = writeFrame(conn, []byte{}) // an empty reply: not signed
	})
	token, _ := w.issue(func(c *IssueConfig) { c.Endpoints = []string{addr} })
	_, err := w.redeem(token, clusterJoin(t, "birch"))
	if !errors.Is(err, ErrReply) || !errors.Is(err, ErrUnreachable) {
		t.Errorf("a reply that is not signed: %v", err)
	}
	p, _ := Parse(token)
	frame := <-requests
	var req federationv1.JoinRequest
	if err := proto.Unmarshal(frame, &req); err != nil || req.GetToken() != p.Reference() {
		t.Fatalf("request %v, %v", &req, err)
	}
	raw, _, err := split(req.GetToken())
	if err != nil || bytes.Contains(raw, []byte("seed")) {
		t.Fatalf("payload %s, %v", raw, err)
	}
	for _, form := range forms(p.Seed.bytes()) {
		for what, text := range map[string]string{"frame": string(frame), "payload": string(raw), "error": err2(w.redeem(token, nil))} {
			if strings.Contains(text, form) {
				t.Errorf("the %s holds the seed", what)
			}
		}
	}
	// Whoever recorded it cannot use it: proof and reply hold for that connection only.
	raw2, err := tls.Dial("tcp", w.addr, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{ALPN}, ServerName: "join.amber.mesh"})
	if err != nil {
		t.Fatal(err)
	}
	defer raw2.Close()
	_ = raw2.SetDeadline(time.Now().Add(5 * time.Second))
	if err := writeFrame(raw2, frame); err != nil {
		t.Fatal(err)
	}
	result := readResult(t, raw2)
	if result.GetErrorReason() != ReasonProof {
		t.Errorf("a replay is answered with %v", result)
	}
}

func err2(_ any, err error) string { return err.Error() }

func readResult(t *testing.T, conn net.Conn) *federationv1.JoinResult {
	t.Helper()
	b, err := readFrame(conn, MaxReply)
	if err != nil {
		t.Fatal(err)
	}
	var reply federationv1.JoinReply
	var result federationv1.JoinResult
	if err := errors.Join(proto.Unmarshal(b, &reply), proto.Unmarshal(reply.GetBody(), &result)); err != nil {
		t.Fatal(err)
	}
	return &result
}

func TestUnreachable(t *testing.T) {
	w := newWorld(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed := l.Addr().String()
	_ = l.Close()
	silent := w.listen(tls.Certificate{}, func(ctx context.Context, conn *tls.Conn) { <-ctx.Done(); _ = conn.Close() })
	token, _ := w.issue(func(c *IssueConfig) { c.Endpoints = []string{closed, silent} })
	_, err = Redeem(t.Context(), token, RedeemConfig{Body: clusterJoin(t, "birch"), Timeout: 200 * time.Millisecond})
	if !errors.Is(err, ErrUnreachable) {
		t.Fatalf("got %v", err)
	}
	for _, part := range []string{closed + ": ", "connection refused", silent + ": ", "no answer in time", "run the same command again"} {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("%q does not say %q", err, part)
		}
	}
	token, _ = w.issue(func(c *IssueConfig) { c.Endpoints = []string{closed, w.addr} })
	if _, err := w.redeem(token, clusterJoin(t, "birch")); err != nil {
		t.Errorf("the second endpoint was not tried: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	token, _ = w.issue(nil)
	if _, err := Redeem(ctx, token, RedeemConfig{Body: clusterJoin(t, "birch")}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

func TestIssuerLimits(t *testing.T) {
	w := newWorld(t)
	dial := func() *tls.Conn {
		conn, err := tls.Dial("tcp", w.addr, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{ALPN}, ServerName: "join.amber.mesh"})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
		return conn
	}
	conn := dial()
	if _, err := conn.Write(binary.BigEndian.AppendUint32(nil, MaxRequest+1)); err != nil {
		t.Fatal(err)
	}
	if r := readResult(t, conn); r.GetErrorReason() != ReasonTooLarge {
		t.Errorf("oversized: %v", r)
	}
	conn = dial()
	if err := writeFrame(conn, []byte("garbage")); err != nil {
		t.Fatal(err)
	}
	if r := readResult(t, conn); r.GetErrorReason() != ReasonRequest {
		t.Errorf("garbage: %v", r)
	}
	hasty := w.newIssuer()
	hasty.Timeout = 50 * time.Millisecond
	w.addr = w.listen(w.ca.leaf(t, nil, issuerID), hasty.Serve)
	conn = dial() // sends nothing
	if _, err := io.ReadAll(conn); err != nil {
		t.Errorf("a silent joiner: %v, want the end", err)
	}
}

func TestConnectionLimit(t *testing.T) {
	w := newWorld(t)
	busy := &place{source: "192.0.2.9", asked: true}
	w.issuer.places.mu.Lock()
	w.issuer.places.limit, w.issuer.places.order = 1, []*place{busy}
	w.issuer.places.mu.Unlock()
	token, _ := w.issue(nil)
	if _, err := w.redeem(token, clusterJoin(t, "birch")); !errors.Is(err, ErrUnreachable) {
		t.Errorf("got %v", err)
	}
	w.issuer.places.leave(busy)
	if _, err := w.redeem(token, clusterJoin(t, "birch")); err != nil {
		t.Errorf("a free place: %v", err)
	}
}

// TestRace lets 64 keys redeem one token at the same time, through several issuers over one store.
func TestRace(t *testing.T) {
	w := newWorld(t)
	const racers, issuers = 64, 4
	rounds := number(t, "ATTACK_TOKENS", 30)
	all := make([]*Issuer, issuers)
	for n := range all {
		all[n] = w.newIssuer()
	}
	type racer struct {
		key  ed25519.PrivateKey
		body []byte
	}
	var rs []racer
	for range racers {
		body, err := proto.Marshal(clusterJoin(t, "birch"))
		if err != nil {
			t.Fatal(err)
		}
		rs = append(rs, racer{body: body})
	}
	exp := make([]byte, 32)
	_, _ = rand.Read(exp)
	for round := range rounds {
		token, grant := w.issue(nil)
		p, _ := Parse(token)
		var wg sync.WaitGroup
		var mu sync.Mutex
		won, start := 0, make(chan struct{})
		for n, r := range rs {
			frame, err := proto.Marshal(&federationv1.JoinRequest{Token: p.Reference(), Body: r.body, Proof: ed25519.Sign(p.Seed.key(), bound(requestLabel, exp, r.body))})
			if err != nil {
				t.Fatal(err)
			}
			wg.Go(func() {
				<-start
				_, err := all[n%issuers].answer(t.Context(), frame, exp, "test")
				var refused *Refused
				mu.Lock()
				defer mu.Unlock()
				if err == nil {
					won++
				} else if !errors.As(err, &refused) || refused.Reason != ReasonSpent {
					t.Errorf("racer %d: %v", n, err)
				}
			})
		}
		close(start)
		wg.Wait()
		if g := w.stored(grant.ID); won != 1 || len(g.Redemptions) != 1 {
			t.Fatalf("round %d: %d winners, %d redemptions", round, won, len(g.Redemptions))
		}
	}
	w.set(func() {
		if len(w.admits) != rounds || w.reuses != rounds*(racers-1) {
			t.Errorf("%d admitted and %d alarms in %d rounds", len(w.admits), w.reuses, rounds)
		}
	})
}

// failing is a store that breaks on its way.
type failing struct {
	Store
	mu    sync.Mutex
	after bool // the write is done, its answer lost
	fail  bool
}

func (f *failing) CAS(key string, value []byte, version uint64) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.fail {
		return f.Store.CAS(key, value, version)
	}
	f.fail = false
	if f.after {
		_ = f.Store.CAS(key, value, version)
	}
	return errors.New("disk on fire")
}

func TestStoreKilled(t *testing.T) {
	for _, after := range []bool{false, true} {
		w := newWorld(t)
		store := &failing{Store: new(Memory), after: after}
		w.issuer.Grants = NewGrants(store)
		w.grants = w.issuer.Grants
		token, grant := w.issue(nil)
		store.mu.Lock()
		store.fail = true
		store.mu.Unlock()
		birch := clusterJoin(t, "birch")
		_, err := w.redeem(token, birch)
		if after { // the change is seen when it is read again
			if err != nil {
				t.Errorf("answer lost: %v", err)
			}
		} else {
			wantRefused(t, err, ReasonInternal)
		}
		if _, err := w.redeem(token, birch); err != nil {
			t.Errorf("the same key comes again: %v", err)
		}
		if g := w.stored(grant.ID); len(g.Redemptions) != 1 {
			t.Errorf("grant %+v", g)
		}
	}
}

func FuzzRequest(f *testing.F) {
	w := newWorld(f)
	token, grant := w.issue(nil)
	p, _ := Parse(token)
	exp := make([]byte, 32)
	body, _ := proto.Marshal(clusterJoin(f, "birch"))
	good, _ := proto.Marshal(&federationv1.JoinRequest{Token: p.Reference(), Body: body, Proof: make([]byte, 64)})
	f.Add(good)
	f.Add([]byte{})
	f.Add([]byte("\x0a\x06isth1_"))
	f.Fuzz(func(t *testing.T, frame []byte) {
		result, err := w.issuer.answer(context.Background(), frame, exp, "fuzz")
		var refused *Refused
		if result != nil || !errors.As(err, &refused) {
			t.Fatalf("answered with %v, %v", result, err)
		}
		if g, err := w.grants.Get(grant.ID); err != nil || len(g.Redemptions) != 0 {
			t.Fatalf("grant %+v, %v", g, err)
		}
	})
}

// FuzzBody reaches behind the proof.
func FuzzBody(f *testing.F) {
	w := newWorld(f)
	_, cluster := w.issue(nil)
	_, machine := w.issueVM(nil)
	body, _ := proto.Marshal(clusterJoin(f, "birch"))
	f.Add(body)
	body, _ = proto.Marshal(machineJoin(f, "dune"))
	f.Add(body)
	f.Fuzz(func(t *testing.T, body []byte) {
		for _, g := range []Grant{cluster, machine} {
			if j, err := w.issuer.joiner(g, body); err == nil && len(j.Key) != 32 {
				t.Errorf("joiner %+v", j)
			}
		}
	})
}

func FuzzFrame(f *testing.F) {
	f.Add([]byte{0, 0, 0, 2, 1, 2})
	f.Add([]byte{255, 255, 255, 255})
	f.Fuzz(func(t *testing.T, b []byte) {
		if frame, err := readFrame(bytes.NewReader(b), 64); err == nil && (len(frame) > 64 || !bytes.Equal(frame, b[4:4+len(frame)])) {
			t.Errorf("frame %x of %x", frame, b)
		}
	})
}
