package protocol

import (
	"testing"
	"time"

	"github.com/isthmus-mesh/isthmus/federation/protocol/body"
)

// TestDrain: a drain is kept over a restart and by a replica, is told to nobody, and ends with undo or with the member.
func TestDrain(t *testing.T) {
	c := amberWith(t, "birch", "cedar")
	ramp := body.Ramp{Begun: time.UnixMilli(1700000000000), Over: time.Minute}
	digest := c.OwnDigest().String()
	wantActions(t, "drain birch", c.Step(0, Drain{Name: "birch", Ramp: ramp}), "persist amber/drain/birch")
	drained := func(what string, c *Core, want bool) {
		t.Helper()
		got, ok := c.Drains()["birch"]
		if ok != want || ok && (!got.Begun.Equal(ramp.Begun) || got.Over != ramp.Over) {
			t.Errorf("%s: %+v, %v", what, got, ok)
		}
		for _, p := range c.Peers() {
			if p.Drain.Begun.IsZero() == (want && p.Name == "birch") {
				t.Errorf("%s: %s shows %+v", what, p.Name, p.Drain)
			}
		}
	}
	drained("begun", c, true)
	if got := c.OwnDigest().String(); got != digest {
		t.Errorf("the digest changed from %s to %s", digest, got)
	}
	for _, r := range append(c.Records(), c.RecordsFor("birch")...) {
		if r.Kind == KindDrain {
			t.Errorf("%s is told", ResourceName(r))
		}
	}
	if Visible(c.self.entries[drainSlot("birch")].rec, "birch") {
		t.Error("it is visible")
	}
	drained("after a restart", New(testConfig("amber"), c.State()), true)

	follower := New(testConfig("amber"), State{})
	for _, r := range c.State().Records {
		follower.Step(0, Replicate{Record: r})
	}
	drained("at a replica", follower, true)
	follower.Step(0, Replicate{Gone: "amber/drain/birch"})
	drained("undone at a replica", follower, false)

	ramp.Over = time.Hour
	c.Step(0, Drain{Name: "birch", Ramp: ramp})
	drained("anew", c, true)
	wantActions(t, "undo", c.Step(0, Drain{Name: "birch", Undo: true}), "remove amber/drain/birch")
	drained("undone", c, false)

	c.Step(0, Drain{Name: "birch", Ramp: ramp})
	c.Step(0, Evict{Name: "birch"})
	drained("evicted", c, false)
	for _, r := range c.State().Records {
		if r.Kind == KindDrain {
			t.Errorf("%s is held after the eviction", ResourceName(r))
		}
	}
	for _, e := range []Drain{{Name: "birch", Ramp: ramp}, {Name: "elm", Ramp: ramp}, {Name: "amber", Ramp: ramp}, {Name: "cedar", Undo: true}} {
		refused := false
		for _, a := range c.Step(0, e) {
			r, ok := a.(Reject)
			refused = refused || ok && r.Reason == ReasonUnknownPeer
		}
		if !refused {
			t.Errorf("%+v is taken", e)
		}
	}
}
