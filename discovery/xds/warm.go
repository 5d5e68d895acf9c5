package xds

import (
	"maps"
	"slices"
	"time"
)

// Make before break. Envoy asks for the endpoints of a new cluster only when it has the cluster, and does not use the
// cluster before it has them; a new route is in use at once. So listeners and routes wait until the client has taken in
// the endpoints of every cluster that it was sent before them.
const (
	// warmTime is how long listeners and routes wait for a client that does not ask for a new cluster's endpoints, or
	// does not answer when it gets them, counted from the response with the cluster.
	warmTime = time.Second
	// warmTimes times warmTime is how long they wait at most while new clusters keep coming.
	warmTimes = 3
)

// cold is a wait for the endpoints of one cluster.
type cold struct {
	until     time.Time
	cluster   string // nonce of the response with the cluster
	endpoints string // nonce of the response with its endpoints; empty before it
}

// known says that the client has an earlier version of the type, from this stream or the one before.
func (s *sub) known() bool { return s.came || s.status.Responses > 0 }

// launched notes what a response, about to be sent, says about clusters and endpoints. The caller holds mu.
func (st *stream) launched(set Set, b batch, known bool) {
	switch b.sub.typ {
	case ClusterType:
		if known {
			st.expect(set, b)
		}
	case EndpointType:
		for _, r := range b.adds {
			if c, ok := st.cold[r.Name]; ok && c.endpoints == "" {
				c.endpoints = b.flight.nonce
				st.cold[r.Name] = c
			}
		}
		if len(b.removed) > 0 {
			st.forsaken(b.sub, func(name string) bool { return slices.Contains(b.removed, name) })
		}
	}
}

// expect starts to wait for the endpoints of the clusters in a response that the client was never sent. Nobody waits
// twice for a name that the client did not ask for, nor again for a client that does not ask for endpoints at all.
func (st *stream) expect(set Set, b batch) {
	now := time.Now()
	st.expire(now)
	maps.DeleteFunc(st.ignored, func(name string, _ bool) bool { return set[EndpointType].Get(name) == nil })
	s := st.subs[EndpointType]
	if s == nil && len(st.ignored) > 0 {
		return
	}
	for _, r := range b.adds {
		name := r.warms
		if name == "" || set[EndpointType].Get(name) == nil || st.ignored[name] {
			continue
		}
		if _, ok := st.cold[name]; ok {
			continue
		}
		if s != nil && s.held.Get(name) != nil {
			continue
		}
		if len(st.cold) == 0 {
			st.coldSince = now
		}
		until := now.Add(st.warmTime)
		if last := st.coldSince.Add(warmTimes * st.warmTime); until.After(last) {
			until = last
		}
		st.cold[name] = cold{until: until, cluster: b.flight.nonce}
	}
}

// expire ends the waits that have lasted too long.
func (st *stream) expire(now time.Time) {
	for name, c := range st.cold {
		if now.Before(c.until) {
			continue
		}
		delete(st.cold, name)
		if s := st.subs[EndpointType]; s == nil || !s.wants(name) {
			st.ignored[name] = true
		}
	}
}

// settled ends the waits that the client's answer to these responses ends.
func (st *stream) settled(s *sub, answered []flight, refused bool) {
	if len(st.cold) == 0 || s.typ != EndpointType && (s.typ != ClusterType || !refused) {
		return
	}
	maps.DeleteFunc(st.cold, func(_ string, c cold) bool {
		nonce := c.endpoints
		if s.typ == ClusterType {
			nonce = c.cluster
		}
		return slices.ContainsFunc(answered, func(f flight) bool { return f.nonce == nonce })
	})
	if len(st.cold) == 0 {
		st.notify()
	}
}

// forsaken ends the waits for endpoints that the client no longer wants, or was told are gone.
func (st *stream) forsaken(s *sub, gone func(name string) bool) {
	if s.typ != EndpointType || len(st.cold) == 0 {
		return
	}
	maps.DeleteFunc(st.cold, func(name string, _ cold) bool { return gone(name) })
	if len(st.cold) == 0 {
		st.notify()
	}
}

// waits says that changes of the type must wait for endpoints, and sees to it that the sender looks again in time.
// The first response of a type never waits: the client has nothing that could break.
func (st *stream) waits(set Set, s *sub) bool {
	if s.typ != ListenerType && s.typ != RouteType || len(st.cold) == 0 || !s.known() {
		return false
	}
	now := time.Now()
	st.expire(now)
	next := time.Time{}
	for name, c := range st.cold {
		if set[EndpointType].Get(name) == nil {
			delete(st.cold, name) // gone again
		} else if next.IsZero() || c.until.Before(next) {
			next = c.until
		}
	}
	if len(st.cold) == 0 {
		return false
	}
	if st.timer == nil {
		st.timer = time.AfterFunc(next.Sub(now), st.notify)
	} else {
		st.timer.Reset(next.Sub(now))
	}
	return true
}

// putBack returns claimed work that must wait for endpoints, because of a cluster in the same push.
func (st *stream) putBack(set Set, w work) bool {
	st.mu.Lock()
	defer st.mu.Unlock()
	s := w.sub
	if !st.waits(set, s) {
		return false
	}
	s.answer, s.urgent = s.answer || w.answer, s.urgent || w.urgent
	s.dirty = append(s.dirty, w.marks...)
	return true
}
