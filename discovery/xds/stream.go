package xds

import (
	"fmt"
	"log/slog"
	"slices"
	"strconv"
	"strings"
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
	sets   *nameSets
	warmed map[string]bool // of a client that came with clusters: those sent before it named any endpoints; nil afterwards

	warmTime  time.Duration
	cold      map[string]cold // endpoints that listeners and routes wait for, see warm.go
	coldSince time.Time       // when the first of them began, while there was always one
	ignored   map[string]bool // waited for in vain: the client did not ask for them
	timer     *time.Timer     // wakes the sender when a wait ends; nil before the first
}

// sub is the subscription of one stream to one type, with the account of what was sent. What is large in it is shared with
// the view and with other streams that ask for the same and have got as far.
type sub struct {
	typ      string
	wildcard bool
	implicit bool            // nothing was ever named: the wildcard is the old, unspoken one
	named    *nameSet        // subscribed by name
	held     *Named          // what the client has: a part of what it asks for; without bodies where it came with it
	dirty    []mark          // to be looked at in the next push; a name may be there twice
	marks    int             // dirty is put in order when it has grown to twice that
	whole    bool            // everything is to be looked at in the next push
	gone     map[string]bool // held, to be removed at the end of a push
	answer   bool            // a response is due even if it is empty
	urgent   bool            // the client has just asked: do not wait for its answers to earlier responses
	flights  []flight        // sent and not answered, oldest first
	came     bool            // the client has resources from an earlier stream
	resume   string          // state of the world: the version the client came with
	asked    uint64          // state of the world: hash of the names of the last request
	label    string          // metric label; empty until known
	status   TypeStatus
}

// mark is a name to be looked at.
type mark struct {
	name  string
	force bool // send it even if the client has it, or say that it is not there
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

// follow marks what differs between two sets and is asked for, and says whether there is any. differ remembers the
// differences of a type. The caller holds the view's mu.
func (st *stream) follow(old, set Set, differ map[string][]string) (marked bool) {
	st.mu.Lock()
	defer st.mu.Unlock()
	for typ, s := range st.subs {
		if old[typ] == set[typ] {
			continue
		}
		names, known := differ[typ]
		if !known {
			names = diff(old[typ], set[typ])
			differ[typ] = names
		}
		if len(names) == 0 && s.held == old[typ] {
			s.held = set[typ]
			continue
		}
		if s.wildcard && (old == nil || len(names) > set[typ].Len()/4+64) {
			s.whole, marked = true, true
			continue
		}
		for _, name := range names {
			if s.wants(name) {
				s.touch(name, false)
				marked = true
			}
		}
	}
	return marked
}

// wants says that the name is subscribed to.
func (s *sub) wants(name string) bool { return s.wildcard || s.named.has(name) }

// touch marks a name. The list is bounded by what there is to ask for, however long the client does not read.
func (s *sub) touch(name string, force bool) {
	if s.dirty = append(s.dirty, mark{name, force}); len(s.dirty) > 2*s.marks+64 {
		s.order()
	}
}

// order sorts what is dirty, each name once.
func (s *sub) order() {
	slices.SortFunc(s.dirty, func(a, b mark) int { return strings.Compare(a.name, b.name) })
	out := s.dirty[:0]
	for _, m := range s.dirty {
		if last := len(out) - 1; last >= 0 && out[last].name == m.name {
			out[last].force = out[last].force || m.force
		} else {
			out = append(out, m)
		}
	}
	s.dirty, s.marks = out, len(out)
}

// claim takes over what is dirty of a set.
func (s *sub) claim(resources *Named) []mark {
	if s.whole {
		for _, name := range diff(s.held, resources) {
			s.dirty = append(s.dirty, mark{name, false})
		}
	}
	s.order()
	out := s.dirty
	s.dirty, s.marks, s.whole = nil, 0, false
	return out
}

// hold accounts for what the client is about to have more and less. Where that is just what the set has, it is the set.
func (s *sub) hold(resources *Named, more []*Resource, less []string) {
	if len(more)+len(less) == 0 {
		return
	}
	sum, n := s.held.hash(), s.held.Len()
	for _, r := range more {
		if was := s.held.Get(r.Name); was != nil {
			sum, n = sum-was.contentHash(), n-1
		}
		sum, n = sum+r.contentHash(), n+1
	}
	for _, name := range less {
		if was := s.held.Get(name); was != nil {
			sum, n = sum-was.contentHash(), n-1
		}
	}
	if sum == resources.hash() && n == resources.Len() {
		s.held = resources
		return
	}
	s.held = s.held.With(more...).without(less...)
}

// drop forgets what the client holds and no longer asks for.
func (s *sub) drop(names []string) { s.held = s.held.without(names...) }

// version is the content hash of what the client holds.
func (s *sub) version() string { return fmt.Sprintf("%016x", s.held.hash()) }

// full says that a state-of-the-world response must carry everything the client is to have.
func (s *sub) full() bool { return s.wildcard || s.typ == ClusterType || s.typ == ListenerType }

// pending says that there are changes to send, apart from removals that wait for others.
func (s *sub) pending() bool { return len(s.dirty) > 0 || s.whole || s.answer }

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
	s := &sub{typ: typ}
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
		s.order()
		t.TypeURL, t.Wildcard, t.Names, t.Held, t.Pending = s.typ, s.wildcard, s.named.len(), s.held.Len(), len(s.dirty)+len(s.gone)
		out.Types = append(out.Types, t)
	}
	return out
}

// accepted reports whether the client asks for the resource, and whether it has accepted this version of it.
func (st *stream) accepted(typ, name, version string) (asks, has bool) {
	st.mu.Lock()
	defer st.mu.Unlock()
	s := st.subs[typ]
	if s == nil || !s.wants(name) {
		return false, false
	}
	r := s.held.Get(name)
	return true, r != nil && r.Version == version && len(s.flights) == 0 && s.status.Nack == ""
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
