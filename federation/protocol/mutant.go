package protocol

import federationv1 "github.com/isthmus-mesh/isthmus/api/federation/v1"

// mutant is a rule of the core that is broken on purpose. Only tests of the simulation set one, through an unexported
// field of Config, to see that the simulation notices.
type mutant uint8

const (
	sound          mutant = iota
	everyAudience         // takes what is not for us
	oldWins               // a lower (epoch, seq) replaces a higher one
	tombsPass             // a tombstone does not hold off what it covers
	banForgotten          // an evicted name is let in by others' word
	silenceDeletes        // what an expired origin said is dropped
	neverAsks             // differing digests are not acted upon
	epochStays            // a loss of state does not begin an epoch
	marksLost             // a start counts from one again
)

// dropSilent is what silenceDeletes does.
func (c *Core) dropSilent(o *origin) {
	for _, s := range o.sorted() {
		if s.kind == KindEndpoints {
			c.remove(o, s)
		}
	}
}

// judge is the merge rule of an origin, unless it is broken.
func (c *Core) judge(o *origin, s slot, r *federationv1.Record) verdict {
	v := o.judge(s, r)
	held := o.entries[s]
	switch {
	case v != stale:
	case c.cfg.mutant == oldWins && held != nil, c.cfg.mutant == tombsPass && held == nil:
		return newer
	}
	return v
}
