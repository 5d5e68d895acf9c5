package main

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/isthmus-mesh/isthmus/api/admin"
)

// gatewayTest stands for an east-west gateway: it splices connections to a control plane, or refuses them.
type gatewayTest struct {
	listener net.Listener
	wg       sync.WaitGroup

	mu     sync.Mutex
	target string // empty: connections are refused
	conns  map[net.Conn]bool
}

func newGateway(t *testing.T, target string) *gatewayTest {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	g := &gatewayTest{listener: l, target: target, conns: map[net.Conn]bool{}}
	g.wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			g.wg.Go(func() { g.splice(c) })
		}
	})
	t.Cleanup(func() {
		l.Close()
		g.lead("")
		g.wg.Wait()
	})
	return g
}

func (g *gatewayTest) addr() string { return g.listener.Addr().String() }

// lead sends new connections to the target and cuts those there are.
func (g *gatewayTest) lead(target string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.target = target
	for c := range g.conns {
		c.Close()
	}
}

// take notes a connection that lead must cut.
func (g *gatewayTest) take(c net.Conn) (target string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.conns[c] = true
	return g.target
}

func (g *gatewayTest) drop(c net.Conn) {
	c.Close()
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.conns, c)
}

func (g *gatewayTest) splice(in net.Conn) {
	defer g.drop(in)
	target := g.take(in)
	if target == "" {
		return
	}
	out, err := net.Dial("tcp", target)
	if err != nil {
		return
	}
	defer g.drop(out)
	if g.take(out) != target {
		return
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = io.Copy(out, in)
		out.Close()
	}()
	_, _ = io.Copy(in, out)
	in.Close()
	<-done
}

// member is a cluster of the federation with a gateway of its own.
func member(t *testing.T, name string, change func(*Config)) (*daemonTest, *gatewayTest) {
	t.Helper()
	cfg := testConfig(t, name)
	g := newGateway(t, cfg.Listen)
	cfg.Gateways = []string{g.addr()}
	cfg.Federation.AutoApprove = true
	cfg.Federation.LateAfter = 1500 * time.Millisecond
	if change != nil {
		change(&cfg)
	}
	writeObjects(t, cfg, "namespace.yaml", namespaceYAML)
	writeObjects(t, cfg, "reviews.yaml", exportedYAML(name))
	return start(t, cfg), g
}

// exportedYAML is the service that each cluster exports, with two pods of its own.
func exportedYAML(cluster string) string {
	return strings.NewReplacer("metadata: {name: reviews, namespace: default}", `metadata: {name: reviews, namespace: default, labels: {isthmus.io/export: "true"}}`,
		"reviews-v1", cluster+"-v1", "reviews-v2", cluster+"-v2").Replace(reviewsYAML)
}

const globalHost = "reviews.default.global"

func (d *daemonTest) tokenFor(t *testing.T, r admin.TokenRequest) admin.TokenReply {
	t.Helper()
	if r.Kind == "" {
		r.Kind = "cluster"
	}
	var reply admin.TokenReply
	if err := d.call("POST", "/v1/tokens", r, &reply); err != nil {
		t.Fatalf("token of %s for %s: %v", d.cfg.Cluster, r.Name, err)
	}
	return reply
}

func (d *daemonTest) join(token string) (admin.JoinReply, error) {
	var reply admin.JoinReply
	err := d.call("POST", "/v1/join", admin.JoinRequest{Token: token}, &reply)
	return reply, err
}

// mustJoin joins by a new token of the issuer.
func (d *daemonTest) mustJoin(t *testing.T, issuer *daemonTest) admin.JoinReply {
	t.Helper()
	reply, err := d.join(issuer.tokenFor(t, admin.TokenRequest{Name: d.cfg.Cluster}).Token)
	if err != nil {
		t.Fatalf("%s joins %s: %v", d.cfg.Cluster, issuer.cfg.Cluster, err)
	}
	return reply
}

func (d *daemonTest) peers(t *testing.T) map[string]admin.Peer {
	t.Helper()
	var list []admin.Peer
	if err := d.call("GET", "/v1/peers", nil, &list); err != nil {
		t.Fatal(err)
	}
	out := map[string]admin.Peer{}
	for _, p := range list {
		out[p.Name] = p
	}
	return out
}

// knows checks that exactly these are approved, fresh, and heard directly.
func (d *daemonTest) knows(t *testing.T, names ...string) error {
	t.Helper()
	peers := d.peers(t)
	for _, name := range names {
		p, ok := peers[name]
		switch {
		case !ok:
			return fmt.Errorf("%s does not know %s", d.cfg.Cluster, name)
		case p.State != "approved" || p.Freshness != "fresh" || !strings.HasPrefix(p.Path, "direct 127.0.0.1:") || p.Alive != "alive" || p.LastHeard.IsZero() || !p.StaleSince.IsZero():
			return fmt.Errorf("%s sees %+v", d.cfg.Cluster, p)
		case p.TrustDomain != name+".mesh" || p.Network != name || p.Topology == "" || len(p.Gateways) != 1:
			return fmt.Errorf("%s sees %+v", d.cfg.Cluster, p)
		}
	}
	for name, p := range peers {
		if p.State != "evicted" && p.State != "left" && !slices.Contains(names, name) {
			return fmt.Errorf("%s sees %+v", d.cfg.Cluster, p)
		}
	}
	return nil
}

// global returns what a cluster knows of the service that all export.
func (d *daemonTest) global(t *testing.T) admin.Service {
	t.Helper()
	for _, s := range d.status(t).Imports {
		if s.Host == globalHost {
			return s
		}
	}
	return admin.Service{}
}

// serves checks that the service has two endpoints in each of the clusters.
func (d *daemonTest) serves(t *testing.T, names ...string) error {
	t.Helper()
	want := map[string]int{}
	for _, name := range names {
		want[name] = 2
	}
	if got := d.global(t).Endpoints; !maps.Equal(got, want) {
		return fmt.Errorf("%s has endpoints %v, want %v", d.cfg.Cluster, got, want)
	}
	return nil
}

// settled waits until all know each other and serve each other's endpoints under one address.
func settled(t *testing.T, all ...*daemonTest) {
	t.Helper()
	var names []string
	for _, d := range all {
		names = append(names, d.cfg.Cluster)
	}
	eventually(t, "one mesh of "+strings.Join(names, ", "), func() error {
		var errs []error
		for _, d := range all {
			others := slices.DeleteFunc(slices.Clone(names), func(n string) bool { return n == d.cfg.Cluster })
			errs = append(errs, d.knows(t, others...), d.serves(t, names...))
			if got, want := d.global(t).Addresses, all[0].global(t).Addresses; !slices.Equal(got, want) || len(got) == 0 {
				errs = append(errs, fmt.Errorf("%s has addresses %v, %s %v", d.cfg.Cluster, got, names[0], want))
			}
		}
		return errors.Join(errs...)
	})
}

// quiet checks that a cluster reports no problems.
func (d *daemonTest) quiet(t *testing.T) {
	t.Helper()
	eventually(t, d.cfg.Cluster+" has no problem", func() error { // one of a connection stays until the next one is up
		if got := d.status(t).Problems; len(got) > 0 {
			return fmt.Errorf("problems: %+v", got)
		}
		return nil
	})
}

// TestMesh joins three clusters by tokens of the first, loses one and puts one out.
func TestMesh(t *testing.T) {
	whole := t
	amber, _ := member(t, "amber", nil)
	birch, _ := member(t, "birch", nil)
	cedar, cedarGateway := member(t, "cedar", nil)

	reply := birch.mustJoin(t, amber)
	if reply.Issuer != "amber" || reply.Pending || !slices.Equal(reply.Members, []string{"amber", "birch"}) {
		t.Errorf("birch joins: %+v", reply)
	}
	settled(t, amber, birch)
	before := amber.global(t).Addresses
	reply = cedar.mustJoin(t, amber)
	if !slices.Equal(reply.Members, []string{"amber", "birch", "cedar"}) {
		t.Errorf("cedar joins: %+v", reply)
	}
	settled(t, amber, birch, cedar)
	if got := cedar.global(t).Addresses; !slices.Equal(got, before) {
		t.Errorf("a third cluster changed the addresses from %v to %v", before, got)
	}
	for _, d := range []*daemonTest{amber, birch, cedar} {
		d.quiet(t)
	}

	t.Run("change travels", func(t *testing.T) {
		birch.write(t, "reviews.yaml", exportedYAML("birch")+strings.ReplaceAll(strings.ReplaceAll("---"+podYAML, "reviews-v", "more-v"), "10.1.0.", "10.1.9."))
		want := map[string]int{"amber": 2, "birch": 4, "cedar": 2}
		eventually(t, "four endpoints in birch", func() error {
			for _, d := range []*daemonTest{amber, cedar} {
				if got := d.global(t).Endpoints; !maps.Equal(got, want) {
					return fmt.Errorf("%s has %v", d.cfg.Cluster, got)
				}
			}
			return nil
		})
		birch.write(t, "reviews.yaml", strings.Replace(exportedYAML("birch"), `isthmus.io/export: "true"`, "a: b", 1))
		eventually(t, "no export of birch", func() error { return errors.Join(amber.serves(t, "amber", "cedar"), cedar.serves(t, "amber", "cedar")) })
		birch.write(t, "reviews.yaml", exportedYAML("birch"))
		settled(t, amber, birch, cedar)
	})

	t.Run("restart", func(t *testing.T) {
		birch.stop(t)
		gone := time.Now()
		eventually(t, "birch is missed", func() error {
			for _, d := range []*daemonTest{amber, cedar} {
				if err := d.serves(t, "amber", "birch", "cedar"); err != nil {
					t.Fatalf("while birch is away: %v", err)
				}
				if p := d.peers(t)["birch"]; p.Freshness != "late" || p.StaleSince.IsZero() || p.StaleSince.After(gone.Add(time.Second)) || p.Path != "down" {
					return fmt.Errorf("%s sees %+v, gone at %s", d.cfg.Cluster, p, gone)
				}
			}
			return nil
		})
		amber.quiet(t)
		cedar.write(t, "reviews.yaml", strings.ReplaceAll(exportedYAML("cedar"), "10.1.0.", "10.3.0.")) // it must catch up on this
		again := start(whole, birch.cfg)
		if err := again.serves(t, "amber", "birch", "cedar"); err != nil {
			t.Errorf("the first snapshot after a restart: %v", err)
		}
		if got := again.global(t).Addresses; !slices.Equal(got, before) {
			t.Errorf("a restart changed the addresses from %v to %v", before, got)
		}
		birch = again
		settled(t, amber, birch, cedar)
		if n := birch.metric(t, "isthmus_peering_rejected_total"); n > 0 {
			t.Errorf("%v records were rejected after the restart", n)
		}
	})

	t.Run("cut off", func(t *testing.T) {
		cedarGateway.lead("")
		// Links go both ways: cedar still reaches the others, they do not reach it.
		eventually(t, "cedar is not heard directly", func() error {
			for _, d := range []*daemonTest{amber, birch} {
				if err := d.serves(t, "amber", "birch", "cedar"); err != nil {
					t.Fatalf("while cedar is cut off: %v", err)
				}
				if p := d.peers(t)["cedar"]; strings.HasPrefix(p.Path, "direct") {
					return fmt.Errorf("%s sees %+v", d.cfg.Cluster, p)
				}
			}
			return nil
		})
		cedarGateway.lead(cedar.cfg.Listen)
		settled(t, amber, birch, cedar)
	})

	t.Run("evict", func(t *testing.T) {
		if err := amber.call("POST", "/v1/peers/cedar/evict", nil, nil); err != nil {
			t.Fatal(err)
		}
		eventually(t, "cedar is out", func() error {
			return errors.Join(amber.knows(t, "birch"), birch.knows(t, "amber"), amber.serves(t, "amber", "birch"), birch.serves(t, "amber", "birch"))
		})
		if p := amber.peers(t)["cedar"]; p.State != "evicted" {
			t.Errorf("amber sees %+v", p)
		}
		eventually(t, "cedar hears nobody", func() error {
			for name, p := range cedar.peers(t) {
				if p.Freshness == "fresh" {
					return fmt.Errorf("cedar sees %s: %+v", name, p)
				}
			}
			return nil
		})
		cedar.mustJoin(t, amber) // with a new token it is in again
		settled(t, amber, birch, cedar)
	})

	t.Run("evict by one alone", func(t *testing.T) {
		if err := birch.call("POST", "/v1/peers/cedar/evict", nil, nil); err != nil {
			t.Fatal(err)
		}
		eventually(t, "cedar uses nothing of birch and says why", func() error {
			if err := cedar.serves(t, "amber", "cedar"); err != nil {
				return err
			}
			for _, p := range cedar.status(t).Problems {
				if p.Reason == "EvictedByPeer" && p.Object == "Peer/birch" {
					return nil
				}
			}
			return fmt.Errorf("problems %+v", cedar.status(t).Problems)
		})
		if p := cedar.peers(t)["birch"]; p.Problem != "it has evicted this cluster" {
			t.Errorf("cedar sees %+v", p)
		}
		cedar.mustJoin(t, birch)
		settled(t, amber, birch, cedar)
	})

	t.Run("leave", func(t *testing.T) {
		var plan, done admin.LeaveReply
		if err := cedar.call("POST", "/v1/leave", admin.LeaveRequest{DryRun: true}, &plan); err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(plan.Members, []string{"amber", "birch"}) || len(plan.Exports) != 1 || !slices.Equal(plan.Imports, []string{globalHost}) || !plan.DryRun || len(plan.Heard) > 0 {
			t.Errorf("cedar would leave %+v", plan)
		}
		if err := cedar.knows(t, "amber", "birch"); err != nil {
			t.Errorf("a dry run left the mesh: %v", err)
		}
		if err := cedar.call("POST", "/v1/leave", admin.LeaveRequest{}, &done); err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(done.Heard, []string{"amber", "birch"}) || len(done.Unheard) > 0 || done.DryRun {
			t.Errorf("cedar left: %+v", done)
		}
		eventually(t, "cedar is out", func() error {
			return errors.Join(amber.knows(t, "birch"), birch.knows(t, "amber"), amber.serves(t, "amber", "birch"), birch.serves(t, "amber", "birch"), cedar.serves(t))
		})
		if len(cedar.peers(t)) != 0 {
			t.Errorf("cedar still sees %+v", cedar.peers(t))
		}
		for _, d := range []*daemonTest{amber, birch} {
			if p := d.peers(t)["cedar"]; p.State != "left" || p.Problem != "" {
				t.Errorf("%s sees %+v", d.cfg.Cluster, p)
			}
		}
		var e *admin.Error
		if err := cedar.call("POST", "/v1/leave", admin.LeaveRequest{}, nil); !errors.As(err, &e) || e.Reason != "UnknownPeer" || e.Hint == "" {
			t.Errorf("cedar leaves again: %v", err)
		}
		cedar.mustJoin(t, birch) // anyone's token lets it in again
		settled(t, amber, birch, cedar)
	})

	t.Run("evict nobody", func(t *testing.T) {
		for _, name := range []string{"amber", "No.Name"} {
			var e *admin.Error
			if err := amber.call("POST", "/v1/peers/"+name+"/evict", nil, nil); !errors.As(err, &e) || e.Reason != "UnknownPeer" {
				t.Errorf("evict %s: %v", name, err)
			}
		}
	})
}

// TestPending lets a cluster wait for the issuer's operator.
func TestPending(t *testing.T) {
	amber, _ := member(t, "amber", func(c *Config) { c.Federation.AutoApprove = false })
	birch, _ := member(t, "birch", nil)
	token := amber.tokenFor(t, admin.TokenRequest{Name: "birch"})
	if reply, err := birch.join(token.Token); err != nil || !reply.Pending || reply.Issuer != "amber" {
		t.Fatalf("birch joins: %+v, %v", reply, err)
	}
	eventually(t, "birch waits", func() error {
		if p := amber.peers(t)["birch"]; p.State != "pending" || p.TrustDomain != "birch.mesh" {
			return fmt.Errorf("amber sees %+v", p)
		}
		return nil
	})
	if got := amber.global(t); len(got.Endpoints) > 0 {
		t.Errorf("a pending cluster is believed: %+v", got)
	}
	eventually(t, "birch knows why there is no stream", func() error {
		if p := birch.peers(t)["amber"]; p.Path != "down" || !strings.Contains(p.Problem, "waits for approval") {
			return fmt.Errorf("birch sees %+v", p)
		}
		return nil
	})
	// It waits over a restart of either side.
	amber.stop(t)
	amber = start(t, amber.cfg)
	if p := amber.peers(t)["birch"]; p.State != "pending" {
		t.Errorf("after a restart amber sees %+v", p)
	}
	if err := amber.call("POST", "/v1/peers/cedar/approve", nil, nil); err == nil {
		t.Error("a cluster that nobody knows is approved")
	}
	if err := amber.call("POST", "/v1/peers/birch/approve", nil, nil); err != nil {
		t.Fatal(err)
	}
	settled(t, amber, birch)
	if err := amber.call("POST", "/v1/peers/birch/evict", nil, nil); err != nil {
		t.Fatal(err)
	}
	amber.wrote(t, "token.create "+token.ID+" operator socket done", "peer.standing birch   pending", "token.redeem "+token.ID+" cluster birch 127.0.0.1 done",
		"peer.approve cedar operator socket UnknownPeer", "peer.standing birch cluster amber  approved", "peer.approve birch operator socket done",
		"token.revoke "+token.ID+" operator socket done", "peer.standing birch cluster amber  evicted", "peer.evict birch operator socket done")
	birch.wrote(t, "peer.standing amber cluster birch  approved", "mesh.join amber operator socket done")
	for _, d := range []*daemonTest{amber, birch} {
		if text := d.audit(t); strings.Contains(text, token.Token[len("isth1_"):60]) {
			t.Errorf("the token is written down by %s", d.cfg.Cluster)
		}
	}
}

// TestTokenAutoApproves is about a token that says so itself.
func TestTokenAutoApproves(t *testing.T) {
	amber, _ := member(t, "amber", func(c *Config) { c.Federation.AutoApprove = false })
	birch, _ := member(t, "birch", nil)
	token := amber.tokenFor(t, admin.TokenRequest{Name: "birch", AutoApprove: true})
	var dry admin.JoinReply
	if err := birch.call("POST", "/v1/join", admin.JoinRequest{Token: token.Token, DryRun: true}, &dry); err != nil || !dry.DryRun || dry.Issuer != "amber.mesh" {
		t.Errorf("dry run: %+v, %v", dry, err)
	}
	if len(birch.peers(t)) > 0 {
		t.Error("a dry run joins")
	}
	if reply, err := birch.join(token.Token); err != nil || reply.Pending {
		t.Fatalf("%+v, %v", reply, err)
	}
	settled(t, amber, birch)
	var list []admin.Token
	if err := amber.call("GET", "/v1/tokens", nil, &list); err != nil || len(list) != 1 || list[0].State != "redeemed" || list[0].RedeemedBy != "birch" || list[0].From == "" {
		t.Errorf("tokens %+v, %v", list, err)
	}
	for _, d := range []*daemonTest{amber, birch} {
		if strings.Contains(d.log.String(), token.Token[len("isth1_"):60]) {
			t.Errorf("the token stands in the log of %s", d.cfg.Cluster)
		}
	}
	if _, err := birch.join(token.Token); err != nil {
		t.Errorf("the cluster that redeemed it runs the command again: %v", err)
	}
}

// TestBadJoins is each join that must fail: one line that says why and what to do, and nothing is changed.
func TestBadJoins(t *testing.T) {
	amber, amberGateway := member(t, "amber", nil)
	birch, _ := member(t, "birch", nil)
	impostor, _ := member(t, "birch", nil) // the same name, another key
	thief, _ := member(t, "elm", func(c *Config) { c.TrustDomain = "birch.mesh" })
	other, _ := member(t, "amber", nil) // another mesh whose first cluster has the same name
	dune, _ := member(t, "dune", nil)

	forBirch := func() string { return amber.tokenFor(t, admin.TokenRequest{Name: "birch"}).Token }
	spent, second := forBirch(), forBirch()
	if _, err := birch.join(spent); err != nil {
		t.Fatal(err)
	}
	settled(t, amber, birch)

	short := amber.tokenFor(t, admin.TokenRequest{Name: "dune", TTL: "1s"})
	revoked := amber.tokenFor(t, admin.TokenRequest{Name: "dune"})
	if err := amber.call("DELETE", "/v1/tokens/"+revoked.ID, nil, nil); err != nil {
		t.Fatal(err)
	}
	good := amber.tokenFor(t, admin.TokenRequest{Name: "dune"}).Token
	edited := []byte(good)
	edited[len("isth1_")+40] ^= 1
	cases := []struct {
		name   string
		who    *daemonTest
		token  string
		reason string // of a refusal by the issuer
		text   []string
		before func() (after func())
	}{
		{name: "cut", who: dune, token: good[:len(good)-20], text: []string{"cut short", "copy the whole line"}},
		{name: "cut in the middle", who: dune, token: good[:len(good)/2], text: []string{"cut short", "copy the whole line"}},
		{name: "edited", who: dune, token: string(edited), text: []string{"token", "copy the whole line"}},
		{name: "no token", who: dune, token: "hello", text: []string{"not a join token"}},
		{name: "nothing", who: dune, token: "", text: []string{"token"}},
		{name: "for another cluster", who: dune, token: amber.tokenFor(t, admin.TokenRequest{Name: "cedar"}).Token, text: []string{"is for cluster cedar", "this cluster is dune", "--for dune"}},
		{name: "for a machine", who: dune, token: amber.tokenFor(t, admin.TokenRequest{Kind: "vm", Name: "ratings", Namespace: "default", ServiceAccount: "ratings"}).Token, text: []string{"is for machine", "isthmus-agent join"}},
		{name: "of its own", who: amber, token: good, text: []string{"this very cluster", "dune"}},
		{name: "spent", who: impostor, token: spent, reason: "TokenSpent", text: []string{"was redeemed by", "isthmus token create --for birch"}},
		{name: "name taken", who: impostor, token: second, reason: "NameTaken", text: []string{"birch", "taken", "isthmus peer evict birch"}},
		{name: "trust domain taken", who: thief, token: amber.tokenFor(t, admin.TokenRequest{Name: "elm"}).Token, reason: "TrustDomainTaken", text: []string{"birch.mesh", "set another trustDomain"}},
		{name: "revoked", who: dune, token: revoked.Token, reason: "TokenRevoked", text: []string{"was revoked", "isthmus token create --for dune"}},
		{name: "expired", who: dune, token: short.Token, reason: "TokenExpired", text: []string{"expired at", "isthmus token create --for dune"}, before: func() func() {
			eventually(t, "the token expires", func() error {
				if left := time.Until(short.Expires); left > -10*time.Millisecond {
					return fmt.Errorf("%v left", left)
				}
				return nil
			})
			return func() {}
		}},
		{name: "unreachable", who: dune, token: good, text: []string{amberGateway.addr(), "no endpoint of the token gave an answer", "check that", "run the same command again"}, before: func() func() {
			amberGateway.lead("")
			return func() { amberGateway.lead(amber.cfg.Listen) }
		}},
		{name: "wrong key behind the endpoint", who: dune, token: good, text: []string{amberGateway.addr(), "does not match the token's pin", "still good"}, before: func() func() {
			amberGateway.lead(other.cfg.Listen)
			return func() { amberGateway.lead(amber.cfg.Listen) }
		}},
		{name: "another mesh with a name we know", who: birch, token: other.tokenFor(t, admin.TokenRequest{Name: "birch"}).Token, text: []string{"amber.mesh", "a member here", "isthmus peer evict amber"}},
		{name: "another mesh with our own trust domain", who: other, token: good, text: []string{"another cluster with our trust domain, amber.mesh", "trustDomain"}},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			after := func() {}
			if c.before != nil {
				after = c.before()
			}
			was, issuer := names(c.who.peers(t)), names(amber.peers(t))
			reply, err := c.who.join(c.token)
			after()
			var e *admin.Error
			if !errors.As(err, &e) {
				t.Fatalf("got %+v, %v", reply, err)
			}
			t.Logf("%s: %s | %s", e.Reason, e.Message, e.Hint)
			if c.reason != "" && e.Reason != c.reason {
				t.Errorf("reason %s, want %s", e.Reason, c.reason)
			}
			said := e.Message + " " + e.Hint
			for _, part := range c.text {
				if !strings.Contains(said, part) {
					t.Errorf("%q does not say %q", said, part)
				}
			}
			if strings.Contains(said, "\n") {
				t.Errorf("%q is more than one line", said)
			}
			if c.token != "" && len(c.token) > 40 && strings.Contains(said, c.token[10:40]) {
				t.Errorf("%q shows the token", said)
			}
			if got := names(c.who.peers(t)); !slices.Equal(got, was) {
				t.Errorf("the peers became %v, were %v", got, was)
			}
			if got := names(amber.peers(t)); !slices.Equal(got, issuer) {
				t.Errorf("the issuer's peers became %v, were %v", got, issuer)
			}
		})
	}
	if got := other.peers(t); len(got) > 0 {
		t.Errorf("the other mesh has taken %v in", got)
	}
	// Nothing of that has spent the good token, nor hurt the mesh.
	if _, err := dune.join(good); err != nil {
		t.Fatalf("the good token is not good any more: %v", err)
	}
	settled(t, amber, birch, dune)

	t.Run("token for a member", func(t *testing.T) {
		for name, want := range map[string]string{"birch": "taken", "amber": "this cluster", "No Name": "must be a DNS label"} {
			var e *admin.Error
			if err := amber.call("POST", "/v1/tokens", admin.TokenRequest{Kind: "cluster", Name: name}, nil); !errors.As(err, &e) || !strings.Contains(e.Message, want) {
				t.Errorf("%s: %v", name, err)
			}
		}
	})
	t.Run("unknown token", func(t *testing.T) {
		var e *admin.Error
		if err := amber.call("DELETE", "/v1/tokens/nope", nil, nil); !errors.As(err, &e) || e.Hint == "" {
			t.Errorf("got %v", err)
		}
	})
}

// names are the peers with their states.
func names(peers map[string]admin.Peer) []string {
	var out []string
	for name, p := range peers {
		out = append(out, name+" "+p.State+" "+p.TrustDomain)
	}
	slices.Sort(out)
	return out
}
