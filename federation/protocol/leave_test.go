package protocol

import (
	"testing"
	"time"

	federationv1 "github.com/isthmus-mesh/isthmus/api/federation/v1"
	"google.golang.org/protobuf/proto"
)

// tell gives to all that from holds and to may see.
func tell(from, to *Core) {
	for _, r := range from.RecordsFor(to.cfg.Name) {
		to.Step(0, Received{From: from.cfg.Name, Way: Stream, Record: r})
	}
}

// three are amber, who let birch in, and birch, who let cedar in. Each exports a service.
func three(t *testing.T) (amber, birch, cedar *Core) {
	t.Helper()
	join := func(issuer, joiner *Core) {
		t.Helper()
		name := string(joiner.cfg.Name)
		issuer.Step(0, Admit{Member: testMember(name), ClusterRecord: own(t, joiner)})
		joiner.Step(0, Joined{Records: reply(issuer)})
	}
	all := map[string]*Core{}
	for _, name := range []string{"amber", "birch", "cedar"} {
		c := New(testConfig(name), State{})
		c.Step(0, Declare{[]Statement{{Kind: KindCluster, Body: must(testCluster(name))}, {KindService, "default/" + name, service()}, {KindService, "default/secret", service("amber")}}})
		all[name] = c
	}
	amber, birch, cedar = all["amber"], all["birch"], all["cedar"]
	join(amber, birch)
	join(birch, cedar)
	mingle(amber, birch, cedar)
	for _, c := range all {
		if len(c.members) != 2 {
			t.Fatalf("%s knows %v", c.cfg.Name, c.members)
		}
	}
	return amber, birch, cedar
}

func mingle(all ...*Core) {
	for range 3 {
		for _, from := range all {
			for _, to := range all {
				if from != to {
					tell(from, to)
				}
			}
		}
	}
}

// reply is what an issuer answers: what it says itself comes first.
func reply(c *Core) []*federationv1.Record {
	var first, rest []*federationv1.Record
	for _, r := range c.Records() {
		if r.Origin == string(c.cfg.Name) {
			first = append(first, r)
		} else {
			rest = append(rest, r)
		}
	}
	return append(first, rest...)
}

func states(c *Core) map[string]PeerState {
	out := map[string]PeerState{}
	for _, p := range c.Peers() {
		out[string(p.Name)] = p.State
	}
	return out
}

// services counts what is held of another cluster's exports.
func services(c *Core, of string) int {
	n := 0
	for _, r := range c.Records() {
		if r.Origin == of && r.Kind == KindService {
			n++
		}
	}
	return n
}

func own(t *testing.T, c *Core) *federationv1.Record {
	t.Helper()
	return proto.Clone(c.self.entries[slot{KindCluster, ""}].rec).(*federationv1.Record)
}

// TestLeave: whoever hears it drops the cluster at once, whoever it hears it from; nobody bans it.
func TestLeave(t *testing.T) {
	amber, birch, cedar := three(t)
	before := cedar.Records()
	cedar.Step(0, Leave{})
	cedar.Step(0, Declare{[]Statement{{Kind: KindCluster, Body: must(testCluster("cedar"))}, {KindService, "default/cedar", service()}}})
	tell(cedar, birch)
	if got := services(birch, "cedar"); states(birch)["cedar"] != Gone || got != 0 {
		t.Fatalf("birch, who let cedar in, sees %v and holds %d services", states(birch), got)
	}
	cedar.Step(0, Left{})
	if len(cedar.Peers()) != 0 || services(cedar, "cedar") != 2-1 {
		t.Errorf("cedar sees %v and says %d services", states(cedar), services(cedar, "cedar"))
	}
	tell(birch, amber) // cedar itself is not heard any more
	if got := services(amber, "cedar"); states(amber)["cedar"] == Approved || got != 0 {
		t.Errorf("amber sees %v and holds %d services", states(amber), got)
	}
	// What is still on its way, or held by one that was away, brings nothing back, nor is it a complaint.
	for _, r := range before {
		wantActions(t, "late", birch.Step(0, Received{From: "amber", Way: Stream, Record: r}))
		amber.Step(0, Received{From: "birch", Way: Stream, Record: r})
	}
	if services(amber, "cedar")+services(birch, "cedar") != 0 {
		t.Error("services of cedar are back")
	}
	// A restart knows it.
	again := New(testConfig("birch"), stateOf(birch))
	if states(again)["cedar"] != Gone {
		t.Errorf("after a restart birch sees %v", states(again))
	}

	// A new token of anyone lets it in again, everywhere, also at those who vouched for it before.
	amber.Step(0, Admit{Member: testMember("cedar"), ClusterRecord: own(t, cedar)})
	cedar.Step(0, Joined{Records: reply(amber)})
	mingle(amber, birch, cedar)
	for _, c := range []*Core{amber, birch, cedar} {
		for name, s := range states(c) {
			if s != Approved || len(states(c)) != 2 {
				t.Errorf("%s sees %s %s, after cedar joined again", c.cfg.Name, name, s)
			}
		}
	}
	if services(amber, "cedar") != 1 || services(birch, "cedar") != 1 || services(cedar, "birch") != 1 {
		t.Errorf("%d, %d and %d services", services(amber, "cedar"), services(birch, "cedar"), services(cedar, "birch"))
	}
	// Amber alone vouches for cedar now. When it leaves, the others keep each other, and amber has banned nobody.
	amber.Step(0, Leave{})
	mingle(amber, birch, cedar)
	amber.Step(0, Left{})
	if b, c := states(birch), states(cedar); b["cedar"] != Approved || c["birch"] != Approved || b["amber"] != Gone || c["amber"] != Gone {
		t.Errorf("without amber birch sees %v, cedar %v", b, c)
	}
	if len(amber.Peers()) != 0 {
		t.Errorf("amber sees %v", states(amber))
	}
	birch.Step(0, Admit{Member: testMember("amber"), ClusterRecord: own(t, amber)})
	amber.Step(0, Joined{Records: reply(birch)})
	mingle(amber, birch, cedar)
	if s := states(amber); s["birch"] != Approved || s["cedar"] != Approved {
		t.Errorf("amber, who let both in once, sees %v", s)
	}
}

// TestLeaveAndEvict: an eviction of a cluster that left bans it; the departure of one with another key is not its own.
func TestLeaveAndEvict(t *testing.T) {
	amber, birch, cedar := three(t)
	cedar.Step(0, Leave{})
	mingle(amber, birch, cedar)
	amber.Step(0, Evict{"cedar"})
	if s := states(amber); s["cedar"] != Evicted {
		t.Fatalf("amber sees %v", s)
	}
	cedar.Step(0, Left{})
	birch.Step(0, Admit{Member: testMember("cedar"), ClusterRecord: own(t, cedar)})
	mingle(amber, birch)
	if s := states(amber); s["cedar"] != Evicted || states(birch)["cedar"] != Approved {
		t.Errorf("amber sees %v, birch %v", s, states(birch))
	}

	// What cedar's key signed is not said by whoever has the name next.
	other := testMember("cedar")
	other.FederationKey = testPublic("dahlia")
	birch.Step(0, Evict{"cedar"})
	cluster := testCluster("cedar")
	cluster.FederationKey = other.FederationKey
	r := clusterRecord("cedar", 1)
	r.Body = must(cluster)
	Sign(r, signer(testKey("dahlia")))
	birch.Step(0, Admit{Member: other, ClusterRecord: r})
	birch.Step(0, Received{From: "cedar", Way: Stream, Record: cedar.self.entries[farewell("cedar")].rec})
	if s := states(birch); s["cedar"] != Approved {
		t.Errorf("birch sees %v", s)
	}
}

// TestLeaveCutShort: a cluster that ended while it left is out when it runs again.
func TestLeaveCutShort(t *testing.T) {
	_, _, cedar := three(t)
	cedar.Step(0, Leave{})
	again := New(testConfig("cedar"), stateOf(cedar))
	again.Step(0, Declare{[]Statement{{Kind: KindCluster, Body: must(testCluster("cedar"))}, {KindService, "default/cedar", service()}}})
	if len(again.Peers()) != 0 || services(again, "cedar") != 1 || again.self.departure() != nil {
		t.Errorf("it sees %v", states(again))
	}
}

// TestPutAway: what is known of a cluster that left goes like other deletions.
func TestPutAway(t *testing.T) {
	_, birch, cedar := three(t)
	cedar.Step(0, Leave{})
	tell(cedar, birch)
	birch.Step(6*24*time.Hour, Tick{})
	if states(birch)["cedar"] != Gone {
		t.Errorf("after six days birch sees %v", states(birch))
	}
	birch.Step(8*24*time.Hour, Tick{})
	if s := states(birch); s["cedar"] != "" {
		t.Errorf("after eight days birch sees %v", s)
	}
}
