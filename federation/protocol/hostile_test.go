package protocol

import (
	"testing"
	"time"

	federationv1 "github.com/isthmus-mesh/isthmus/api/federation/v1"
)

// TestGossipKillsEverybody: for ten minutes somebody says ten times a second that all others are dead. Their streams beat,
// so they stay fresh, and nothing of theirs goes.
func TestGossipKillsEverybody(t *testing.T) {
	c := amberWith(t, "birch", "cedar", "dune")
	for _, name := range []string{"birch", "cedar", "dune"} {
		c.Step(0, Received{From: meshID(name), Way: Stream, Record: signed(name, KindService, "default/a", 1, 10, service())})
	}
	held := len(c.Records())
	for at, beat := time.Duration(0), uint64(1); at < 10*time.Minute; at += 100 * time.Millisecond {
		for _, name := range []string{"birch", "cedar", "dune"} {
			var events []Event
			if at%time.Second == 0 {
				events = append(events, Heard{Origin: meshID(name), From: meshID(name), Digest: &federationv1.Digest{Origin: name, Beat: beat, Epoch: 1, Seq: 10, Hash: c.hash(c.origins[meshID(name)])}})
			}
			events = append(events, MemberDead{meshID(name)}, Tick{})
			for _, ev := range events {
				if got := c.Step(at, ev); len(got) != 0 {
					t.Fatalf("at %s %T of %s: %s", at, ev, name, show(got))
				}
			}
		}
		if at%time.Second == 0 {
			beat++
		}
	}
	if len(c.Records()) != held {
		t.Errorf("%d records of %d are left", len(c.Records()), held)
	}
	// One that really is silent becomes late, then expired, and keeps what it said.
	for at := 10 * time.Minute; at < 25*time.Minute; at += time.Second {
		c.Step(at, MemberDead{"birch"})
		c.Step(at, Tick{})
	}
	if len(c.Records()) != held {
		t.Errorf("after the lease %d records of %d are left", len(c.Records()), held)
	}
}

// TestJump: numbers that no cluster reaches are kept out, until the operator approves the cluster.
func TestJump(t *testing.T) {
	for name, c := range map[string]struct{ epoch, seq uint64 }{
		"epoch": {1 << 20, 1}, "number": {1, 1 << 41}, "number of the next epoch": {2, 1 << 41},
	} {
		t.Run(name, func(t *testing.T) {
			core := amberWith(t, "birch")
			far := signed("birch", KindService, "default/a", c.epoch, c.seq, service())
			for range 2 {
				wantActions(t, "a jump", core.Step(0, Received{From: "birch", Way: Stream, Record: far}), "reject birch/service/default/a from birch: SequenceJump")
			}
			if got := core.Mark("birch"); got != (Mark{1, 1}) {
				t.Errorf("birch is at %v", got)
			}
			wantActions(t, "what is near", core.Step(0, Received{From: "birch", Way: Stream, Record: signed("birch", KindService, "default/b", 2, 1<<30, service())}), "persist birch/service/default/b")
			core.Step(0, Approve{"birch"})
			wantActions(t, "approved", core.Step(0, Received{From: "birch", Way: Stream, Record: signed("birch", KindService, "default/a", c.epoch+3, c.seq, service())}), "persist birch/service/default/a")
			wantActions(t, "approved once", core.Step(0, Received{From: "birch", Way: Stream, Record: signed("birch", KindService, "default/a", c.epoch+1<<20, 1, service())}), "reject birch/service/default/a from birch: SequenceJump")
			if p := core.Peers()[0]; p.Refused[ReasonJump] != 3 {
				t.Errorf("counted %v", p.Refused)
			}
			// Our own key, used by somebody else.
			wantActions(t, "ours", core.Step(0, Received{From: "birch", Way: Stream, Record: signed("amber", KindService, "default/x", 1<<30, 1, service())}), "reject amber/service/default/x from birch: SequenceJump")
		})
	}
}

// TestUnfolded: what would be a hundred times as large in memory is refused before it is decoded.
func TestUnfolded(t *testing.T) {
	core := amberWith(t, "birch")
	many := make([]byte, 0, 2*(MaxFields+1))
	for range MaxFields + 1 {
		many = append(many, 0x0a, 0)
	}
	for _, kind := range []string{KindService, KindEndpoints} {
		got := core.Step(0, Received{From: "birch", Way: Stream, Record: signed("birch", kind, "default/a", 1, 9, many)})
		wantActions(t, kind, got, "reject birch/"+kind+"/default/a from birch: TooLarge")
	}
	core.Step(0, Received{From: "birch", Way: Stream, Record: signed("birch", KindEndpoints, "default/a", 1, 9, many[2:])})
	if core.origins["birch"].counts[KindEndpoints] != 1 {
		t.Error("as many as are allowed are not taken")
	}
}
