package protocol

import (
	"crypto/ed25519"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	federationv1 "github.com/isthmus-mesh/isthmus/api/federation/v1"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"
)

func meshID(s string) mesh.ClusterID { return mesh.ClusterID(s) }

func testKey(name string) ed25519.PrivateKey { return testPrivate(name[0]) }

func testPublic(name string) ed25519.PublicKey { return testKey(name).Public().(ed25519.PublicKey) }

func testConfig(name string) Config {
	return Config{
		Name: meshID(name), TrustDomain: mesh.TrustDomain(name + ".mesh"), PublicKey: testPublic(name), Sign: signer(testKey(name)),
		Beat: 1000, Seed: 1,
	}
}

func testMember(name string) *federationv1.Member {
	return &federationv1.Member{Name: name, TrustDomain: name + ".mesh", FederationKey: testPublic(name)}
}

func must(m proto.Message) []byte {
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		panic(err)
	}
	return b
}

func signed(origin, kind, key string, epoch, seq uint64, body []byte) *federationv1.Record {
	r := &federationv1.Record{Origin: origin, Kind: kind, Key: key, Epoch: epoch, Seq: seq, TtlSeconds: 600, Body: body}
	Sign(r, signer(testKey(origin)))
	return r
}

func testCluster(name string) *federationv1.Cluster {
	return &federationv1.Cluster{TrustDomain: name + ".mesh", Network: name, Gateways: []string{"192.0.2.1:15443"}, FederationKey: testPublic(name)}
}

func clusterRecord(name string, seq uint64) *federationv1.Record {
	return signed(name, KindCluster, "", 1, seq, must(testCluster(name)))
}

func service(exportTo ...string) []byte {
	return must(&federationv1.Service{Vips: []string{"240.0.0.1"}, ExportTo: exportTo})
}

// show prints actions in one line each.
func show(actions []Action) string {
	var out []string
	for _, a := range actions {
		switch a := a.(type) {
		case Persist:
			out = append(out, "persist "+ResourceName(a.Record))
		case Remove:
			out = append(out, fmt.Sprintf("remove %s/%s/%s", a.Origin, a.Kind, a.Key))
		case Broadcast:
			out = append(out, "broadcast "+ResourceName(a.Record))
		case Connect:
			out = append(out, fmt.Sprintf("connect %s %v %s", a.Peer, a.Gateways, a.TrustDomain))
		case Disconnect:
			out = append(out, "disconnect "+string(a.Peer))
		case Resync:
			out = append(out, fmt.Sprintf("resync %s of %s", a.Origin, a.Peer))
		case FreshnessChanged:
			out = append(out, fmt.Sprintf("%s %s since %s", a.Origin, a.Freshness, a.Since))
		case Reject:
			out = append(out, fmt.Sprintf("reject %s from %s: %s", a.Record, a.From, a.Reason))
		}
	}
	return strings.Join(out, "\n")
}

func wantActions(t *testing.T, what string, got []Action, want ...string) {
	t.Helper()
	if show(got) != strings.Join(want, "\n") {
		t.Errorf("%s: got\n%s\nwant\n%s", what, show(got), strings.Join(want, "\n"))
	}
}

// amberWith returns amber's core with the members admitted.
func amberWith(t *testing.T, names ...string) *Core {
	t.Helper()
	c := New(testConfig("amber"), State{})
	for _, name := range names {
		c.Step(0, Admit{Member: testMember(name), ClusterRecord: clusterRecord(name, 1)})
		if c.members[meshID(name)] == nil {
			t.Fatalf("%s is no member", name)
		}
	}
	return c
}

func TestDeclare(t *testing.T) {
	c := New(testConfig("amber"), State{})
	cluster := Statement{Kind: KindCluster, Body: must(testCluster("amber"))}
	one := Statement{KindService, "default/reviews", service()}
	wantActions(t, "first", c.Step(0, Declare{[]Statement{one, cluster}}),
		"persist amber/cluster/", "broadcast amber/cluster/", "persist amber/service/default/reviews", "broadcast amber/service/default/reviews")
	before := c.Mark("amber")
	wantActions(t, "the same again", c.Step(0, Declare{[]Statement{cluster, one}}))
	if c.Mark("amber") != before {
		t.Error("nothing was said, but the mark rose")
	}
	one.Body = service("birch", "cedar")
	wantActions(t, "narrowed", c.Step(0, Declare{[]Statement{cluster, one}}),
		"persist amber/tombstone/service/default/reviews", "remove amber/service/default/reviews",
		"broadcast amber/tombstone/service/default/reviews", "persist amber/service/default/reviews")
	one.Body = service("birch", "cedar", "dune")
	wantActions(t, "widened", c.Step(0, Declare{[]Statement{cluster, one}}), "persist amber/service/default/reviews")
	wantActions(t, "gone", c.Step(0, Declare{}),
		"persist amber/tombstone/service/default/reviews", "remove amber/service/default/reviews", "broadcast amber/tombstone/service/default/reviews")
	wantActions(t, "bad", c.Step(0, Declare{[]Statement{
		{KindService, "Default/x", nil}, {KindMember, "x", nil}, {KindService, "default/big", make([]byte, MaxBody+1)}, {KindCluster, "", nil},
		{KindService, "default/good", nil},
	}}),
		"reject amber/service/Default/x from amber: BadStatement", "reject amber/member/x from amber: BadStatement",
		"reject amber/service/default/big from amber: BadStatement", "reject amber/cluster/ from amber: BadStatement",
		"persist amber/service/default/good", "broadcast amber/service/default/good")
}

func TestTrust(t *testing.T) {
	c := amberWith(t, "birch")
	member := func(origin, name, key, td string, seq uint64) *federationv1.Record {
		return signed(origin, KindMember, name, 1, seq, must(&federationv1.Member{Name: name, TrustDomain: td, FederationKey: testPublic(key)}))
	}
	forged := signed("mallory", KindService, "default/a", 1, 9, service())
	forged.Origin = "birch"
	for _, s := range []struct {
		name string
		rec  *federationv1.Record
		want string
	}{
		{"unknown origin", signed("cedar", KindService, "default/a", 1, 1, service()), "UnknownOrigin"},
		{"wrong key", forged, "BadSignature"},
		{"our own name", member("birch", "amber", "mallory", "amber.mesh", 10), "KeyChanged"},
		{"key of the origin", member("birch", "birch", "mallory", "birch.mesh", 11), "KeyChanged"},
		{"our trust domain", member("birch", "cedar", "cedar", "amber.mesh", 12), "TrustDomainTaken"},
		{"trust domain of a member", member("birch", "cedar", "cedar", "birch.mesh", 13), "TrustDomainTaken"},
		{"bad trust domain", member("birch", "cedar", "cedar", "Cedar mesh", 14), "BadName"},
		{"another name in the body", signed("birch", KindMember, "cedar", 1, 15, must(testMember("dune"))), "BadName"},
		{"cluster record with our trust domain", signed("birch", KindCluster, "", 1, 16, must(testCluster("amber"))), "ClusterMismatch"},
		{"not for us", signed("birch", KindService, "default/a", 1, 17, service("cedar")), "NotExported"},
		{"broken body", signed("birch", KindService, "default/a", 1, 18, []byte{0xff}), "Malformed"},
		{"our own record by another key", func() *federationv1.Record {
			r := signed("birch", KindService, "default/a", 9, 1, service())
			r.Origin = "amber"
			return r
		}(), "BadSignature"},
		{"huge sequence", signed("birch", KindService, "default/a", 1, 1<<63, service()), "BadSequence"},
	} {
		got := c.Step(0, Received{From: "birch", Way: Stream, Record: s.rec})
		if len(got) != 1 || !strings.HasSuffix(show(got), ": "+s.want) {
			t.Errorf("%s: got %s, want %s", s.name, show(got), s.want)
		}
	}
	if p := c.Peers(); len(p) != 1 || p[0].Refused["UnknownOrigin"] == 0 || p[0].LastProblem == "" {
		t.Errorf("peers do not show it: %+v", p)
	}
	wantActions(t, "no record", c.Step(0, Received{From: "birch"}), "reject // from birch: Malformed")

	// birch introduces cedar, cedar introduces dune; the key stays.
	wantActions(t, "introduce", c.Step(0, Received{From: "birch", Record: member("birch", "cedar", "cedar", "cedar.mesh", 20)}), "persist birch/member/cedar")
	wantActions(t, "chain", c.Step(0, Received{From: "birch", Record: member("cedar", "dune", "dune", "dune.mesh", 1)}), "persist cedar/member/dune")
	wantActions(t, "describe", c.Step(0, Received{From: "birch", Record: clusterRecord("dune", 1)}),
		"persist dune/cluster/", "connect dune [192.0.2.1:15443] dune.mesh")
	wantActions(t, "other key", c.Step(0, Received{From: "birch", Record: member("birch", "cedar", "mallory", "cedar.mesh", 21)}),
		"reject birch/member/cedar from birch: KeyChanged")
	// birch takes its word back: cedar is out, and dune with it.
	wantActions(t, "withdraw", c.Step(0, Received{From: "birch", Record: signed("birch", KindTombstone, "member/cedar", 1, 22, nil)}),
		"persist birch/tombstone/member/cedar", "remove birch/member/cedar",
		"remove cedar/member/dune", "remove dune/cluster/", "disconnect dune")
	// dune's word about birch is no more than a stranger's.
	wantActions(t, "stranger", c.Step(0, Received{From: "dune", Record: signed("dune", KindTombstone, "member/birch", 1, 2, nil)}),
		"reject dune/tombstone/member/birch from dune: UnknownOrigin")
}

func TestAdmitApproveEvict(t *testing.T) {
	c := New(testConfig("amber"), State{})
	wantActions(t, "pending", c.Step(0, Admit{Member: testMember("birch"), ClusterRecord: clusterRecord("birch", 5), Pending: true}),
		"persist amber/pending/birch", "persist birch/cluster/")
	if len(c.Records()) != 0 || len(c.Digests()) != 1 {
		t.Errorf("a pending cluster is served: %v", c.Records())
	}
	wantActions(t, "pending says more", c.Step(0, Received{From: "birch", Record: signed("birch", KindService, "default/a", 1, 6, service())}),
		"reject birch/service/default/a from birch: NotApproved")
	mallory := &federationv1.Member{Name: "birch", TrustDomain: "birch.mesh", FederationKey: testPublic("mallory")}
	if err := c.CanAdmit(mallory); err == nil || !strings.Contains(err.Error(), "NameTaken") {
		t.Errorf("name of a pending cluster: got %v, want NameTaken", err)
	}

	// It waits on over a restart.
	c = New(testConfig("amber"), stateOf(c))
	if p := c.Peers(); len(p) != 1 || p[0].State != Pending || p[0].Cluster == nil {
		t.Fatalf("after a restart: %+v", p)
	}
	wantActions(t, "approve", c.Step(0, Approve{"birch"}),
		"persist amber/member/birch", "broadcast amber/member/birch", "remove amber/pending/birch", "connect birch [192.0.2.1:15443] birch.mesh")
	wantActions(t, "approve again", c.Step(0, Approve{"birch"}))
	wantActions(t, "approve nobody", c.Step(0, Approve{"elm"}), "reject elm from amber: UnknownPeer")
	wantActions(t, "same key again", c.Step(0, Admit{Member: testMember("birch"), ClusterRecord: clusterRecord("birch", 5), Pending: true}))
	wantActions(t, "another key", c.Step(0, Admit{Member: mallory}), "reject amber/member/birch from amber: NameTaken")
	c.Step(0, Received{From: "birch", Record: signed("birch", KindService, "default/a", 1, 6, service())})

	wantActions(t, "evict", c.Step(0, Evict{"birch"}),
		"persist amber/tombstone/member/birch", "remove amber/member/birch", "broadcast amber/tombstone/member/birch",
		"remove birch/cluster/", "remove birch/service/default/a", "disconnect birch")
	wantActions(t, "evicted", c.Step(0, Received{From: "birch", Record: clusterRecord("birch", 9)}), "reject birch/cluster/ from birch: Evicted")
	c = New(testConfig("amber"), stateOf(c))
	if p := c.Peers(); len(p) != 1 || p[0].State != Evicted || p[0].Name != "birch" {
		t.Errorf("after a restart: %+v", p)
	}
	// Its tombstone outlasts every TTL.
	c.Step(0, Tick{})
	c.Step(365*24*time.Hour, Tick{})
	if !c.banned("birch") {
		t.Error("the eviction was forgotten")
	}
	// Admitted anew, with a new key.
	got := c.Step(365*24*time.Hour, Admit{Member: mallory})
	wantActions(t, "anew", got, "persist amber/member/birch", "broadcast amber/member/birch")
	wantActions(t, "itself", c.Step(0, Evict{"amber"}), `reject "amber" from amber: UnknownPeer`)
}

func stateOf(c *Core) State {
	s := State{Marks: map[mesh.ClusterID]Mark{}}
	for id, o := range c.origins {
		s.Marks[id] = o.mark
		for _, sl := range o.sorted() {
			s.Records = append(s.Records, o.entries[sl].rec)
		}
	}
	return s
}

func TestJoined(t *testing.T) {
	c := New(testConfig("cedar"), State{})
	records := []*federationv1.Record{
		signed("birch", KindCluster, "", 1, 1, must(testCluster("birch"))), // before the record that introduces it
		clusterRecord("amber", 1),
		signed("amber", KindMember, "birch", 1, 2, must(testMember("birch"))),
		signed("amber", KindMember, "cedar", 1, 3, must(testMember("cedar"))),
		signed("dune", KindCluster, "", 1, 1, must(testCluster("dune"))),
	}
	wantActions(t, "joined", c.Step(0, Joined{Issuer: testMember("amber"), Records: records}),
		"persist cedar/member/amber", "broadcast cedar/member/amber",
		"persist amber/cluster/", "persist amber/member/birch", "persist amber/member/cedar", "persist birch/cluster/",
		"reject dune/cluster/ from amber: UnknownOrigin",
		"connect amber [192.0.2.1:15443] amber.mesh", "connect birch [192.0.2.1:15443] birch.mesh")
	wantActions(t, "no issuer", c.Step(0, Joined{}), "reject  from cedar: NoIssuer")
	c = New(testConfig("cedar"), State{})
	c.Step(0, Joined{Records: records[1:]})
	if c.members["amber"] == nil || c.members["birch"] == nil {
		t.Error("the issuer is not taken from its cluster record")
	}
}

func TestMergeCases(t *testing.T) {
	c := amberWith(t, "birch")
	take := func(r *federationv1.Record) []Action {
		return c.Step(0, Received{From: "birch", Way: Stream, Record: r})
	}
	wantActions(t, "new", take(signed("birch", KindService, "default/a", 1, 5, service())), "persist birch/service/default/a")
	wantActions(t, "again", take(signed("birch", KindService, "default/a", 1, 5, service())))
	wantActions(t, "older", take(signed("birch", KindService, "default/a", 1, 4, nil)))
	wantActions(t, "two tongues", take(signed("birch", KindService, "default/a", 1, 5, nil)), "reject birch/service/default/a from birch: Equivocation")
	wantActions(t, "deleted", take(signed("birch", KindTombstone, "service/default/a", 1, 7, nil)),
		"persist birch/tombstone/service/default/a", "remove birch/service/default/a")
	wantActions(t, "raised from the dead", take(signed("birch", KindService, "default/a", 1, 6, service())))
	wantActions(t, "same number", take(signed("birch", KindService, "default/a", 1, 7, service())), "reject birch/service/default/a from birch: Equivocation")
	wantActions(t, "made anew", take(signed("birch", KindService, "default/a", 1, 8, service())), "persist birch/service/default/a")
	wantActions(t, "next epoch", take(signed("birch", KindService, "default/a", 2, 1, service())), "persist birch/service/default/a")
	c.cfg.MaxRecords = len(c.origins["birch"].entries)
	wantActions(t, "too many", take(signed("birch", KindService, "default/b", 2, 2, service())), "reject birch/service/default/b from birch: OriginOverCap")
	wantActions(t, "a deletion fits", take(signed("birch", KindTombstone, "service/default/a", 2, 3, nil)),
		"persist birch/tombstone/service/default/a", "remove birch/service/default/a")
}

func TestFreshness(t *testing.T) {
	c := amberWith(t, "birch", "cedar")
	sec := func(n float64) time.Duration { return time.Duration(n * float64(time.Second)) }
	beat := func(at float64, from string, n uint64) []Action {
		return c.Step(sec(at), Heard{Origin: "birch", From: meshID(from), Digest: &federationv1.Digest{Origin: "birch", Beat: n, Hash: c.hash(c.origins["birch"]), Epoch: 1, Seq: 1}})
	}
	keep := func(at float64) {
		c.Step(sec(at), Heard{Origin: "cedar", From: "cedar", Digest: &federationv1.Digest{Hash: c.hash(c.origins["cedar"])}})
	}
	wantActions(t, "grace", c.Step(sec(3), Tick{}))
	keep(3)
	wantActions(t, "never heard", c.Step(sec(3.1), Tick{}), "birch late since 0s")
	wantActions(t, "beat", beat(4, "birch", 10), "birch fresh since 4s")
	wantActions(t, "relayed, first word", beat(5, "cedar", 11))
	keep(6)
	wantActions(t, "relayed, the same", beat(6, "cedar", 11))
	wantActions(t, "relayed, newer", beat(6.5, "cedar", 12))
	wantActions(t, "still fresh", c.Step(sec(9), Tick{}))
	keep(9)
	wantActions(t, "late", c.Step(sec(9.6), Tick{}), "birch late since 6.5s")
	wantActions(t, "old beat", beat(10, "birch", 10))
	c.Step(sec(10), Link{Peer: "birch", Up: true, Path: "direct"})
	wantActions(t, "started again with a lower beat", beat(10, "birch", 2), "birch fresh since 10s")
	keep(11)
	wantActions(t, "gossip's opinion against a beat", c.Step(sec(11), MemberDead{"birch"}))
	keep(11.6)
	wantActions(t, "gossip's opinion and no beat", c.Step(sec(11.6), Tick{}), "birch late since 10s")
	wantActions(t, "expired", c.Step(sec(611), Tick{}), "birch expired since 10s", "cedar late since 11.6s")
	if n := c.origins["birch"].counts[KindCluster]; n != 1 {
		t.Errorf("lost became empty: %d cluster records", n)
	}
	// A cold start gives grace, and remembers.
	s := stateOf(c)
	s.LastHeard = map[mesh.ClusterID]time.Duration{"birch": -sec(50)}
	c = New(testConfig("amber"), s)
	wantActions(t, "cold", c.Step(0, Tick{}),
		"connect birch [192.0.2.1:15443] birch.mesh", "connect cedar [192.0.2.1:15443] cedar.mesh")
	if p := c.Peers()[0]; p.Freshness != mesh.Fresh || p.LastHeard != -sec(50) {
		t.Errorf("after a cold start: %+v", p)
	}
	wantActions(t, "after the grace", c.Step(sec(3.5), Tick{}), "birch late since -50s", "cedar late since 0s")
}

func TestResync(t *testing.T) {
	c := amberWith(t, "birch")
	c.Step(0, Link{Peer: "birch", Up: true})
	ahead := &federationv1.Digest{Origin: "birch", Epoch: 1, Seq: 9, Hash: []byte("another"), Beat: 1}
	wantActions(t, "heard", c.Step(0, Heard{"birch", ahead, "birch"}))
	wantActions(t, "not yet", c.Step(400*time.Millisecond, Tick{}))
	wantActions(t, "now", c.Step(600*time.Millisecond, Tick{}), "resync birch of birch")
	wantActions(t, "not at once again", c.Step(700*time.Millisecond, Tick{}))
	same := &federationv1.Digest{Origin: "birch", Epoch: 1, Seq: 9, Hash: c.hash(c.origins["birch"]), Beat: 2}
	c.Step(time.Second, Heard{"birch", same, "birch"})
	wantActions(t, "equal", c.Step(3*time.Second, Tick{}))
}

func TestLostState(t *testing.T) {
	c := amberWith(t, "birch")
	say := func(body []byte) {
		c.Step(0, Declare{[]Statement{{KindService, "default/a", body}, {KindService, "default/b", service()}}})
	}
	say(service("birch"))
	copied := stateOf(c)
	c.Step(0, Evict{"elm"})
	say(service())
	newest := c.self.entries[slot{KindService, "default/a"}].rec
	gone := c.self.entries[slot{KindTombstone, "member/elm"}].rec

	restored := New(testConfig("amber"), copied)
	restored.self.mark = Mark{1, c.self.mark.Seq - 1} // whatever was skipped at the start
	restored.Step(0, Tick{})
	before := restored.Mark("amber")
	restored.Step(0, Received{From: "birch", Way: Stream, Record: newest})
	if at := restored.Mark("amber"); at.Epoch != before.Epoch+1 {
		t.Errorf("mark is %v after %v, want the next epoch", at, before)
	}
	for _, r := range restored.Records() {
		if r.Origin == "amber" && r.Epoch != 2 && r != restored.self.entries[slot{KindService, "default/a"}].rec {
			t.Errorf("%s %s was not signed anew", ResourceName(r), Version(r))
		}
	}
	restored.Step(0, Received{From: "birch", Way: Stream, Record: gone})
	if !restored.banned("elm") {
		t.Error("the lost eviction was not taken back")
	}
	// What comes back goes away again when it is not wanted.
	restored.Step(0, Declare{})
	old := signed("amber", KindEndpoints, "default/z", 1, 3, nil)
	wantActions(t, "forgotten", restored.Step(0, Received{From: "birch", Way: Stream, Record: old}),
		"persist amber/endpoints/default/z", "persist amber/tombstone/endpoints/default/z", "remove amber/endpoints/default/z",
		"broadcast amber/tombstone/endpoints/default/z")
	// Two statements under one number: the next epoch settles it.
	restored.Step(0, Declare{[]Statement{{KindService, "default/q", service()}}})
	held := restored.self.entries[slot{KindService, "default/q"}].rec
	restored.Step(0, Received{From: "birch", Way: Stream, Record: signed("amber", KindService, "default/q", held.Epoch, held.Seq, nil)})
	if now := restored.self.entries[slot{KindService, "default/q"}].rec; now.Epoch != held.Epoch+1 {
		t.Errorf("after an equivocation of our own: %s", Version(now))
	}
}

func TestTombstoneTTL(t *testing.T) {
	c := New(testConfig("amber"), State{})
	c.Step(0, Declare{[]Statement{{KindService, "default/a", nil}}})
	c.Step(0, Declare{})
	c.Step(6*24*time.Hour, Tick{})
	if c.self.counts[KindTombstone] != 1 {
		t.Error("forgotten too soon")
	}
	wantActions(t, "at the end", c.Step(8*24*time.Hour, Tick{}), "remove amber/tombstone/service/default/a")
}

func TestServed(t *testing.T) {
	c := amberWith(t, "birch", "cedar")
	c.Step(0, Declare{[]Statement{{KindService, "default/a", service("birch")}, {KindService, "default/b", service()}}})
	names := func(records []*federationv1.Record) string {
		var out []string
		for _, r := range records {
			out = append(out, ResourceName(r))
		}
		if !slices.IsSorted(out) {
			t.Errorf("not sorted: %v", out)
		}
		return strings.Join(out, " ")
	}
	if got, want := names(c.RecordsFor("cedar")), "amber/member/birch amber/member/cedar amber/service/default/b birch/cluster/ cedar/cluster/"; got != want {
		t.Errorf("for cedar: %s, want %s", got, want)
	}
	if got := names(c.RecordsFor("birch")); !strings.Contains(got, "default/a") {
		t.Errorf("for birch: %s", got)
	}
	all := c.Records()
	for _, d := range c.Digests() {
		if want := Digest(meshID(d.Origin), all); string(want.Hash) != string(d.Hash) || want.Epoch != d.Epoch || want.Seq != d.Seq {
			t.Errorf("digest of %s is %v, want %v", d.Origin, d, want)
		}
	}
	if a, b := c.OwnDigest(), func() *federationv1.Digest { c.Step(time.Second, Tick{}); return c.OwnDigest() }(); b.Beat != a.Beat+1 {
		t.Errorf("beat went from %d to %d in a second", a.Beat, b.Beat)
	}
}

func TestConfigValidate(t *testing.T) {
	if err := testConfig("amber").Validate(); err != nil {
		t.Error(err)
	}
	for _, change := range []func(*Config){
		func(c *Config) { c.Name = "Amber" }, func(c *Config) { c.TrustDomain = "" },
		func(c *Config) { c.PublicKey = nil }, func(c *Config) { c.Sign = nil },
	} {
		c := testConfig("amber")
		change(&c)
		if c.Validate() == nil {
			t.Errorf("%+v is taken", c)
		}
	}
}

// TestMergeProperties: whatever the order, the grouping and the repetition of what arrives, the outcome is the same.
func TestMergeProperties(t *testing.T) {
	var pool []*federationv1.Record
	for seq := uint64(1); seq <= 24; seq++ {
		kind, key := KindService, fmt.Sprintf("default/s%d", seq%3)
		if seq%4 == 0 {
			kind, key = KindTombstone, KindService+"/"+key
		}
		pool = append(pool, signed("birch", kind, key, 1+seq/20, seq, nil))
	}
	outcome := func(c *Core) string {
		var out []string
		for _, r := range c.Records() {
			if r.Origin == "birch" {
				out = append(out, ResourceName(r)+" "+Version(r))
			}
		}
		return strings.Join(out, "\n")
	}
	base := stateOf(amberWith(t, "birch"))
	merge := func(start State, records ...*federationv1.Record) *Core {
		c := New(testConfig("amber"), start)
		for _, r := range records {
			c.Step(0, Received{From: "birch", Way: Stream, Record: r})
		}
		return c
	}
	rapid.Check(t, func(t *rapid.T) {
		some := rapid.SliceOfN(rapid.SampledFrom(pool), 0, 20).Draw(t, "some")
		want := outcome(merge(base, some...))
		if got := outcome(merge(base, rapid.Permutation(some).Draw(t, "order")...)); got != want {
			t.Fatalf("not commutative:\n%s\nwant\n%s", got, want)
		}
		if got := outcome(merge(base, slices.Concat(some, some)...)); got != want {
			t.Fatalf("not idempotent:\n%s\nwant\n%s", got, want)
		}
		// What two groups come to by themselves, merged, is what all come to.
		cut := rapid.IntRange(0, len(some)).Draw(t, "cut")
		second := merge(base, some[cut:]...)
		var learnt []*federationv1.Record
		for _, r := range second.Records() {
			if r.Origin == "birch" {
				learnt = append(learnt, r)
			}
		}
		if got := outcome(merge(stateOf(merge(base, some[:cut]...)), learnt...)); got != want {
			t.Fatalf("not associative:\n%s\nwant\n%s", got, want)
		}
		if again := outcome(New(testConfig("amber"), stateOf(merge(base, some...)))); again != want {
			t.Fatalf("a restart changes it:\n%s\nwant\n%s", again, want)
		}
	})
}
