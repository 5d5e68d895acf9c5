package xds

import (
	"cmp"
	"maps"
	"slices"
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
	sub    *sub
	marks  []mark
	answer bool
	urgent bool
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
		for next, first := 0, true; next < len(w.marks) || first && w.answer; first = false {
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
		if set[s.typ] != nil || rank(s.typ) < 5 {
			s.label = shortName(s.typ)
		}
		todo = append(todo, work{s, s.claim(set[s.typ]), s.answer, s.urgent})
		s.answer, s.urgent = false, false
	}
	return set, todo, waiting
}

// collect makes one response from the marks from next on, and says where the following one begins and whether this one is
// to be sent.
func (st *stream) collect(set Set, w work, next int, answer bool) (batch, int, bool) {
	st.mu.Lock()
	defer st.mu.Unlock()
	s, b, resources := w.sub, batch{sub: w.sub}, set[w.sub.typ]
	for bytes := 0; next < len(w.marks) && (!st.delta || bytes < maxBatchBytes); next++ {
		m := w.marks[next]
		if !s.wants(m.name) {
			continue
		}
		r, have := resources.Get(m.name), s.held.Get(m.name)
		switch {
		case r != nil && !m.force && have != nil && have.Version == r.Version:
		case r != nil:
			size := len(r.Body.GetValue()) + len(r.Name) + 128
			if bytes > 0 && bytes+size > maxBatchBytes && st.delta {
				return st.seal(set, b, true, next)
			}
			bytes += size
			b.adds = append(b.adds, r)
			st.warm(set, r)
		case have == nil && !m.force:
		case removedLast(s.typ):
			if s.gone == nil {
				s.gone = map[string]bool{}
			}
			s.gone[m.name] = true
		default:
			bytes += len(m.name) + 8
			b.removed = append(b.removed, m.name)
		}
	}
	changed := answer || len(b.adds) > 0 || len(b.removed) > 0 && (st.delta || s.full())
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
		bytes := 0
		for _, name := range slices.Sorted(maps.Keys(s.gone)) {
			if bytes >= maxBatchBytes {
				break
			}
			delete(s.gone, name)
			if !s.wants(name) || set[s.typ].Get(name) != nil {
				continue // no longer subscribed, or back again
			}
			bytes += len(name) + 8
			b.removed = append(b.removed, name)
		}
		b, _, due := st.seal(set, b, len(b.removed) > 0 && (st.delta || s.full()), 0)
		if due {
			return b, true
		}
	}
	return batch{}, false
}

// warm sends the endpoints of a changed cluster again: Envoy builds such a cluster anew and waits for them.
func (st *stream) warm(set Set, cluster *Resource) {
	if cluster.warms == "" {
		return
	}
	s := st.subs[EndpointType]
	if s == nil {
		if c := st.subs[ClusterType]; st.delta && c.came {
			if st.warmed == nil {
				st.warmed = map[string]bool{}
			}
			st.warmed[cluster.warms] = true
		}
		return
	}
	if s.held.Get(cluster.warms) != nil && set[EndpointType].Get(cluster.warms) != nil {
		s.touch(cluster.warms, true)
		st.notify()
	}
}

// seal completes a response that is to be sent. The caller holds mu.
func (st *stream) seal(set Set, b batch, due bool, next int) (batch, int, bool) {
	s := b.sub
	s.hold(set[s.typ], b.adds, b.removed)
	if due && !st.delta && s.full() {
		b.adds = s.state()
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

// state returns everything that the client is to have, sorted by name.
func (s *sub) state() []*Resource {
	out := make([]*Resource, 0, s.held.Len())
	for r := range s.held.All() {
		out = append(out, r)
	}
	slices.SortFunc(out, func(a, b *Resource) int { return cmp.Compare(a.Name, b.Name) })
	return out
}

// count adds a response to the metrics.
func (s *sub) count(m *metrics, r *response) {
	m.responses.WithLabelValues(s.metricLabel()).Inc()
	m.resources.WithLabelValues(s.metricLabel()).Add(float64(len(r.batch.adds)))
	m.bytes.Add(float64(r.size()))
}
