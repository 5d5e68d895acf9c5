package authority

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/isthmus-mesh/isthmus/discovery/identity"
	"github.com/isthmus-mesh/isthmus/internal/diag"
)

// Parts of a rotation under way, beside those of the CA.
const (
	partNext     = "next-" // before the names of the parts of the root that comes
	partRotation = "rotation.json"
	partCross    = "cross-cert.pem"
)

// rotation is what is noted of a rotation under way.
type rotation struct {
	Started time.Time     `json:"started"`
	By      string        `json:"by,omitempty"`
	Overlap time.Duration `json:"overlap"` // 0: as configured
}

// takeNext reads the root that comes out of the parts.
func (a *Authority) takeNext(parts map[string][]byte) {
	var r rotation
	m := nextOf(parts)
	if len(m.Cert) == 0 || json.Unmarshal(parts[partRotation], &r) != nil {
		if a.own != nil {
			a.next, a.own = nil, nil // it signs, or was given up
		}
		return
	}
	next, err := a.ca.Parse("of a rotation", m)
	if err != nil {
		a.cfg.Log.Error("the root of a rotation cannot be used", "part", "ca", "err", err)
		return
	}
	if a.next == nil || a.next.ID() != next.ID() {
		a.next, a.since = next, time.Now()
	}
	a.own = &r
	if r.Overlap > 0 {
		a.overlapFor[next.ID()] = r.Overlap
	}
}

func nextOf(parts map[string][]byte) identity.Material {
	return identity.Material{Cert: parts[partNext+PartCert], Key: parts[partNext+PartKey], Root: parts[partNext+PartRoot], Chain: parts[partNext+PartChain], Cross: parts[partNext+partCross]}
}

// promote makes the root that comes the one that signs, for all replicas.
func (a *Authority) promote(ctx context.Context) error {
	next, by := a.next, a.own.By
	parts, err := a.keeper.Own(ctx, func(parts map[string][]byte) (bool, error) {
		m := nextOf(parts)
		held, err := a.ca.Parse("of a rotation", m)
		if err != nil {
			return false, err
		}
		if held.ID() != next.ID() {
			return false, errors.New("another rotation has begun")
		}
		delete(parts, partCross)
		for name, data := range m.Data() {
			parts[name] = data
			delete(parts, partNext+name)
		}
		if a.overlapFor[next.ID()] > 0 && a.overlapFor[next.ID()] <= urgentOverlap {
			delete(parts, partCross) // the old root is to be forgotten soon
		}
		delete(parts, partRotation)
		return true, nil
	})
	if err != nil {
		return err
	}
	a.next, a.own, a.lags, a.used = nil, nil, nil, parts
	a.audit("switch", by, map[string]string{"authority": next.ID(), "overlap": a.overlap(next.ID()).String()})
	return a.switchTo(ctx, next)
}

func (a *Authority) audit(verb, who string, facts map[string]string) {
	if a.l.Note != nil {
		a.l.Note(verb, who, facts)
	}
}

// Options of a rotation.
type Options struct {
	// Now has the new root sign at once: the old one is known to others, or lost.
	Now bool
	// Overlap is how long the old root is trusted after the new one signs; nil: as configured, and a minute with Now.
	Overlap *time.Duration
	By      string // who asked
}

// Rotate makes a new root and begins to tell it to everybody; with one on its way it changes nothing but, with Now, the
// waiting. An error says what stands against it.
func (a *Authority) Rotate(ctx context.Context, o Options) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.runs {
		return errors.New("isthmusd is still starting")
	}
	if a.given != nil {
		return diag.Hint(fmt.Errorf("the CA is given %s: its root is not made here", a.from), "put the next CA there: it is told to everybody for ca.settle, then signs, and the old root is trusted for ca.overlap")
	}
	if n := len(a.roots); a.next == nil && n > maxOld {
		return diag.Hint(fmt.Errorf("%d old roots are trusted still", n-1), "wait for their time to end: isthmus trust show")
	}
	r := rotation{Started: time.Now().UTC(), By: o.By}
	switch {
	case o.Overlap != nil:
		r.Overlap = max(*o.Overlap, time.Nanosecond)
	case o.Now:
		r.Overlap = urgentOverlap
	}
	m, err := identity.MakeRoot(a.cfg.identity())
	if err != nil {
		return err
	}
	if !o.Now { // a key that others have vouches for nothing
		if m.Cross, err = a.ca.Authority().Cross(m.Cert); err != nil {
			return err
		}
	}
	begun := a.next == nil
	parts, err := a.keeper.Own(ctx, func(parts map[string][]byte) (bool, error) {
		if len(nextOf(parts).Cert) > 0 {
			begun = false
			var held rotation
			if json.Unmarshal(parts[partRotation], &held) != nil || r.Overlap == 0 {
				return false, nil
			}
			r.Started = held.Started
		} else {
			for name, data := range m.Data() {
				parts[partNext+name] = data
			}
		}
		text, err := json.Marshal(r)
		parts[partRotation] = text
		return true, err
	})
	if err != nil {
		return err
	}
	a.takeNext(parts)
	if a.next == nil {
		return errors.New("the new root is not kept")
	}
	if begun {
		a.cfg.Log.Info("a new root is told to everybody before it signs", "part", "ca", "authority", a.next.ID(), "by", o.By)
		a.audit("rotate", o.By, map[string]string{"authority": a.next.ID()})
	}
	before, by := a.ca.Roots(), a.ca.Authority()
	if err := a.ca.Use(by, a.others(by)); err != nil {
		return err
	}
	a.tell(before)
	if o.Now {
		return a.promote(ctx)
	}
	a.nudge()
	return nil
}

// Cancel gives up a rotation whose root does not sign yet.
func (a *Authority) Cancel(ctx context.Context, by string) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.own == nil {
		return diag.Hint(errors.New("no new root is on its way"), "isthmus trust show says which roots are trusted")
	}
	id := a.next.ID()
	parts, err := a.keeper.Own(ctx, func(parts map[string][]byte) (bool, error) {
		for _, name := range []string{PartCert, PartKey, PartRoot, PartChain, partCross} {
			delete(parts, partNext+name)
		}
		delete(parts, partRotation)
		return true, nil
	})
	if err != nil {
		return err
	}
	a.takeNext(parts)
	a.audit("cancel", by, map[string]string{"authority": id})
	a.nudge()
	return nil
}

func (a *Authority) nudge() {
	select {
	case a.wake <- struct{}{}:
	default:
	}
}
