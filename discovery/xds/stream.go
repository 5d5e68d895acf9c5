package xds

import (
	"fmt"
	"log/slog"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

// stream is one client's connection.
type stream struct {
	client       Client
	delta        bool
	since        time.Time
	log          *slog.Logger
	metrics      *metrics
	view         *view
	judge        Judge // nil: the feed does not care
	slot         int
	release      func()
	disconnected func(clean bool)
	clean        atomic.Bool   // the client closed the stream
	wake         chan struct{} // holds one: there may be something to send

	mu     sync.Mutex // taken after the view's
	closed bool
	subs   map[string]*sub
	order  []*sub // in push order
	nonce  uint64
	warmed map[string]bool // clusters sent before the client named any endpoints; nil afterwards

	warmTime  time.Duration
	cold      map[string]cold // endpoints that listeners and routes wait for, see warm.go
	coldSince time.Time       // when the first of them began, while there was always one
	ignored   map[string]bool // waited for in vain: the client did not ask for them
	timer     *time.Timer     // wakes the sender when a wait ends; nil before the first
}

// sub is the subscription of one stream to one type, with the account of what was sent.
type sub struct {
	typ      string
	wildcard bool
	implicit bool // nothing was ever named: the wildcard is the old, unspoken one
	named    int
	entries  map[string]*entry
	dirty    []*entry // to be looked at in the next push
	gone     []*entry // to be removed at the end of a push
	answer   bool     // a response is due even if it is empty
	urgent   bool     // the client has just asked: do not wait for its answers to earlier responses
	flights  []flight // sent and not answered, oldest first
	came     bool     // the client has resources from an earlier stream
	resume   string   // state of the world: the version the client came with
	asked    []string // state of the world: the names of the last request
	sum      uint64   // over what the client holds, see hashOf
	label    string   // metric label; empty until known
	status   TypeStatus
}

// entry is one resource name as one stream knows it.
type entry struct {
	name    string
	sent    *Resource // what the client has; without a body when it came with it
	named   bool      // subscribed by name
	dirty   bool      // in sub.dirty
	leaving bool      // in sub.gone
	force   bool      // send it even if the client has it
	missing bool      // the client has been told that it does not exist
	dead    bool      // no longer in sub.entries
}

type flight struct {
	nonce, version string
	sent           []*Resource // kept for a Judge only
}

// notify wakes the sender.
func (st *stream) notify() {
	select {
	case st.wake <- struct{}{}:
	default:
	}
}

// mark puts the names on the dirty list. The caller holds the view's mu and notifies when all is marked.
func (st *stream) mark(typ string, names []string) {
	st.mu.Lock()
	defer st.mu.Unlock()
	if s := st.subs[typ]; s != nil {
		for _, name := range names {
			s.touch(s.entry(name))
		}
	}
}

func (s *sub) entry(name string) *entry {
	e := s.entries[name]
	if e == nil {
		e = &entry{name: name}
		s.entries[name] = e
	}
	return e
}

func (s *sub) touch(e *entry) {
	if !e.dirty {
		e.dirty = true
		s.dirty = append(s.dirty, e)
	}
}

// hold accounts for a resource that the client has, nil for none.
func (s *sub) hold(e *entry, r *Resource) {
	if e.sent != nil {
		s.sum -= e.sent.contentHash()
		s.status.Held--
	}
	if r != nil {
		s.sum += r.contentHash()
		s.status.Held++
	}
	e.sent = r
}

// drop forgets an entry that is neither subscribed nor held.
func (s *sub) drop(e *entry) {
	s.hold(e, nil)
	e.dead = true
	delete(s.entries, e.name)
}

// version is the content hash of what the client holds.
func (s *sub) version() string { return fmt.Sprintf("%016x", s.sum) }

// full says that a state-of-the-world response must carry everything the client is to have.
func (s *sub) full() bool { return s.wildcard || s.typ == ClusterType || s.typ == ListenerType }

// pending says that there are changes to send, apart from removals that wait for others.
func (s *sub) pending() bool { return len(s.dirty) > 0 || s.answer }

// ready says that a response may be sent before the client has answered the earlier ones.
func (st *stream) ready(s *sub) bool {
	if st.delta {
		return s.urgent || len(s.flights) < maxInFlight
	}
	return len(s.flights) == 0
}

// subscription returns the stream's subscription to a type and whether this is the first request for it.
func (st *stream) subscription(typ string) (*sub, bool, error) {
	if s := st.subs[typ]; s != nil {
		return s, false, nil
	}
	if typ == "" || len(typ) > MaxNameBytes {
		return nil, false, limitError("type_url", "length", len(typ), MaxNameBytes)
	}
	if len(st.subs) >= MaxTypes {
		return nil, false, limitError(typ, "resource types on one stream", len(st.subs)+1, MaxTypes)
	}
	s := &sub{typ: typ, entries: map[string]*entry{}}
	st.subs[typ] = s
	at, _ := slices.BinarySearchFunc(st.order, s, func(a, b *sub) int { return comparePush(a.typ, b.typ) })
	st.order = slices.Insert(st.order, at, s)
	return s, true, nil
}

// launch records a response that is about to be sent.
func (st *stream) launch(s *sub) flight {
	st.nonce++
	f := flight{nonce: strconv.FormatUint(st.nonce, 16), version: s.version()}
	s.flights = append(s.flights, f)
	if len(s.flights) > 4*maxInFlight { // a client that asks and never answers
		s.flights = slices.Delete(s.flights, 0, maxInFlight)
	}
	s.status.Responses++
	s.status.Sent = f.version
	return f
}

// answered settles the response with that nonce. Earlier ones without an answer are settled with it: the client has
// read past them. It returns false for a nonce that is not in flight.
func (st *stream) answered(s *sub, nonce string, refusal *string) bool {
	at := slices.IndexFunc(s.flights, func(f flight) bool { return f.nonce == nonce })
	if at < 0 {
		return false
	}
	f := s.flights[at]
	st.settled(s, s.flights[:at+1], refusal != nil)
	if st.judge != nil && len(f.sent) > 0 {
		st.judge.Answered(s.typ, f.sent, refusal)
	}
	s.flights = slices.Delete(s.flights, 0, at+1)
	if refusal == nil {
		s.status.Acks++
		s.status.Acked, s.status.Nack = f.version, ""
		st.metrics.answers.WithLabelValues(s.metricLabel(), "ack").Inc()
	} else {
		s.status.Nacks++
		st.metrics.answers.WithLabelValues(s.metricLabel(), "nack").Inc()
		text := trim(*refusal, maxNackBytes)
		if text != s.status.Nack {
			st.log.Warn("xds client refused resources", "node", st.client.Node.GetId(), "type", shortName(s.typ), "version", f.version, "err", text)
		}
		s.status.Nack = text
	}
	if s.pending() || len(s.gone) > 0 {
		st.notify()
	}
	return true
}

func (st *stream) status() ClientStatus {
	st.mu.Lock()
	defer st.mu.Unlock()
	out := ClientStatus{Client: st.client, Delta: st.delta, Since: st.since}
	for _, s := range st.order {
		t := s.status
		t.TypeURL, t.Wildcard, t.Names, t.Pending = s.typ, s.wildcard, s.named, len(s.dirty)+len(s.gone)
		out.Types = append(out.Types, t)
	}
	return out
}

// trim cuts text at n bytes, between runes.
func trim(text string, n int) string {
	if len(text) <= n {
		return text
	}
	for n > 0 && text[n]&0xc0 == 0x80 {
		n--
	}
	return text[:n]
}
