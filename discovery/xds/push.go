package xds

import (
	"cmp"
	"slices"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

// batch is one response.
type batch struct {
	sub     *sub
	adds    []*Resource
	removed []string
	flight  flight
}

// work is what one push has to look at for one type.
type work struct {
	sub     *sub
	entries []*entry
	answer  bool
	urgent  bool
}

// push sends what has changed, all of it from one set: first every type in order, then what must go last. Listeners and
// routes may have to wait for the client to warm new clusters.
// Removals within a type go with its changes, except those of clusters and endpoints.
func (st *stream) push(send func(batch) error) error {
	set, todo, waiting := st.take()
	if set == nil {
		return nil
	}
	for _, w := range todo {
		if st.putBack(set, w) {
			waiting = true
			continue
		}
		for next, first := 0, true; next < len(w.entries) || first && w.answer; first = false {
			b, due := batch{}, false
			if b, next, due = st.collect(set, w, next, first && w.answer); !due {
				continue
			}
			if err := send(b); err != nil {
				return err
			}
		}
	}
	for !waiting { // what the client has may still refer to what is gone
		b, due := st.collectGone(set, todo)
		if !due {
			return nil
		}
		if err := send(b); err != nil {
			return err
		}
	}
	return nil
}

// take claims the dirty lists, together with the set they belong to. A type that must wait for the client's answer holds
// back those after it, which may refer to its news. It says whether listeners or routes wait for endpoints.
func (st *stream) take() (set Set, todo []work, waiting bool) {
	st.view.mu.RLock()
	defer st.view.mu.RUnlock()
	st.mu.Lock()
	defer st.mu.Unlock()
	if set = st.view.set; set == nil {
		return nil, nil, false
	}
	for _, s := range st.order {
		if !s.pending() {
			continue
		}
		if !st.ready(s) {
			break
		}
		if st.waits(set, s) {
			waiting = true
			continue
		}
		for _, e := range s.dirty {
			e.dirty = false
		}
		if set[s.typ] != nil || rank(s.typ) < 5 {
			s.label = shortName(s.typ)
		}
		todo = append(todo, work{s, s.dirty, s.answer, s.urgent})
		s.dirty, s.answer, s.urgent = nil, false, false
	}
	return set, todo, waiting
}

// collect makes one response from the entries from next on, and says where the following one begins and whether this
// one is to be sent.
func (st *stream) collect(set Set, w work, next int, answer bool) (batch, int, bool) {
	st.mu.Lock()
	defer st.mu.Unlock()
	s, b, resources := w.sub, batch{sub: w.sub}, set[w.sub.typ]
	changed := answer
	for bytes := 0; next < len(w.entries) && (!st.delta || bytes < maxBatchBytes); next++ {
		e := w.entries[next]
		if e.dead {
			continue
		}
		r, force := resources.Get(e.name), e.force
		e.force = false
		switch {
		case r != nil && !force && e.sent != nil && e.sent.Version == r.Version:
			e.sent = r
		case r != nil:
			size := len(r.Body.GetValue()) + len(r.Name) + 128
			if bytes > 0 && bytes+size > maxBatchBytes && st.delta {
				e.force = force
				return st.seal(set, b, changed || len(b.adds) > 0, next)
			}
			bytes += size
			s.hold(e, r)
			e.missing = false
			b.adds = append(b.adds, r)
			st.warm(set, r)
		case e.sent != nil || force || e.named && !e.missing:
			if removedLast(s.typ) {
				if !e.leaving {
					e.leaving = true
					s.gone = append(s.gone, e)
				}
				continue
			}
			bytes += len(e.name) + 8
			b.removed = append(b.removed, e.name)
			s.remove(e)
		default:
			s.settle(e)
		}
	}
	changed = changed || len(b.adds) > 0 || len(b.removed) > 0 && (st.delta || s.full())
	return st.seal(set, b, changed, next)
}

// collectGone makes one response that removes, of the last type that has any, unless listeners or routes wait.
func (st *stream) collectGone(set Set, todo []work) (batch, bool) {
	st.mu.Lock()
	defer st.mu.Unlock()
	if slices.ContainsFunc(st.order, func(s *sub) bool { return s.pending() && st.waits(set, s) }) {
		return batch{}, false
	}
	for _, s := range slices.Backward(st.order) {
		pushed := st.delta && slices.ContainsFunc(todo, func(w work) bool { return w.sub == s })
		if len(s.gone) == 0 || !pushed && !st.ready(s) {
			continue
		}
		b := batch{sub: s}
		n := 0
		for bytes := 0; n < len(s.gone) && bytes < maxBatchBytes; n++ {
			e := s.gone[n]
			e.leaving = false
			if e.dead || set[s.typ].Get(e.name) != nil {
				continue // no longer subscribed, or back again
			}
			bytes += len(e.name) + 8
			b.removed = append(b.removed, e.name)
			s.remove(e)
		}
		s.gone = slices.Delete(s.gone, 0, n)
		b, _, due := st.seal(set, b, len(b.removed) > 0 && (st.delta || s.full()), 0)
		if due {
			return b, true
		}
	}
	return batch{}, false
}

// remove accounts for a resource that the client is told to forget.
func (s *sub) remove(e *entry) {
	e.missing = true
	s.hold(e, nil)
	s.settle(e)
}

// settle forgets an entry that has nothing to say, unless a newer set has already marked it again.
func (s *sub) settle(e *entry) {
	if !e.named && !e.dirty {
		s.drop(e)
	}
}

// warm sends the endpoints of a changed cluster again: Envoy builds such a cluster anew and waits for them.
func (st *stream) warm(set Set, cluster *Resource) {
	if cluster.warms == "" {
		return
	}
	s := st.subs[EndpointType]
	if s == nil {
		if st.delta {
			st.warmed[cluster.warms] = true
		}
		return
	}
	if e := s.entries[cluster.warms]; e != nil && e.sent != nil && set[EndpointType].Get(e.name) != nil {
		e.force = true
		s.touch(e)
		st.notify()
	}
}

// seal completes a response that is to be sent. The caller holds mu.
func (st *stream) seal(set Set, b batch, due bool, next int) (batch, int, bool) {
	s := b.sub
	if due && !st.delta && s.full() {
		b.adds = s.held()
		came := s.resume
		s.resume = ""
		if came != "" && s.wildcard && came == s.version() {
			s.status.Sent, s.status.Acked = came, came
			due = false // the client has exactly this from an earlier stream
		}
	}
	if due {
		known := s.known()
		b.flight = st.launch(s)
		if st.judge != nil {
			s.flights[len(s.flights)-1].sent = b.adds
		}
		st.launched(set, b, known)
	}
	return b, next, due
}

// held returns everything that the client is to have, sorted by name.
func (s *sub) held() []*Resource {
	out := make([]*Resource, 0, s.status.Held)
	for _, e := range s.entries {
		if e.sent != nil && e.sent.Body != nil {
			out = append(out, e.sent)
		}
	}
	slices.SortFunc(out, func(a, b *Resource) int { return cmp.Compare(a.Name, b.Name) })
	return out
}

func (b batch) deltaResponse() *discoveryv3.DeltaDiscoveryResponse {
	r := &discoveryv3.DeltaDiscoveryResponse{
		SystemVersionInfo: b.flight.version,
		TypeUrl:           b.sub.typ,
		Nonce:             b.flight.nonce,
		RemovedResources:  b.removed,
		Resources:         make([]*discoveryv3.Resource, len(b.adds)),
	}
	for i, a := range b.adds {
		r.Resources[i] = a.delta()
	}
	return r
}

func (b batch) sotwResponse() *discoveryv3.DiscoveryResponse {
	r := &discoveryv3.DiscoveryResponse{
		VersionInfo: b.flight.version,
		TypeUrl:     b.sub.typ,
		Nonce:       b.flight.nonce,
		Resources:   make([]*anypb.Any, len(b.adds)),
	}
	for i, a := range b.adds {
		r.Resources[i] = a.Body
	}
	return r
}

// count adds a response to the metrics.
func (s *sub) count(m *metrics, response proto.Message, resources int) {
	m.responses.WithLabelValues(s.metricLabel()).Inc()
	m.resources.WithLabelValues(s.metricLabel()).Add(float64(resources))
	m.bytes.Add(float64(proto.Size(response)))
}
