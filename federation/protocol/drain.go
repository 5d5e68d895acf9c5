package protocol

import (
	federationv1 "github.com/isthmus-mesh/isthmus/api/federation/v1"
	"github.com/isthmus-mesh/isthmus/discovery/mesh"
	"github.com/isthmus-mesh/isthmus/federation/protocol/body"
)

// private reports whether records of the kind stay within the local cluster, neither signed nor numbered.
func private(kind string) bool { return kind == KindPending || kind == KindDrain }

func drainSlot(name mesh.ClusterID) slot { return slot{KindDrain, string(name)} }

// drain begins, replaces or undoes a drain.
func (c *Core) drain(e Drain) {
	switch held := c.self.entries[drainSlot(e.Name)]; {
	case e.Undo && held == nil:
		c.reject(c.cfg.Name, "", quote(string(e.Name)), refuse(ReasonUnknownPeer, "cluster %s is not drained", quote(string(e.Name))))
	case e.Undo:
		c.undrain(e.Name)
	case c.members[e.Name] == nil:
		c.reject(c.cfg.Name, "", quote(string(e.Name)), refuse(ReasonUnknownPeer, "cluster %s is no member", quote(string(e.Name))))
	default:
		if x, ref := newEntry(&federationv1.Record{Origin: string(c.cfg.Name), Kind: KindDrain, Key: string(e.Name), Body: e.Ramp.Body()}); ref == nil {
			c.apply(c.self, x)
		}
	}
}

func (c *Core) undrain(name mesh.ClusterID) {
	if c.self.entries[drainSlot(name)] != nil {
		c.remove(c.self, drainSlot(name))
	}
}

// Drains returns the members whose traffic is taken away.
func (c *Core) Drains() map[mesh.ClusterID]body.Ramp {
	out := map[mesh.ClusterID]body.Ramp{}
	for name := range c.members {
		if e := c.self.entries[drainSlot(name)]; e != nil {
			out[name] = body.RampOf(e.rec.Body)
		}
	}
	return out
}
