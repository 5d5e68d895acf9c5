package xds

import (
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/genproto/googleapis/rpc/status"
)

const everything = "*"

// deltaRequest takes in one request of a delta stream: subscription, resumption and answer in any mixture.
func (st *stream) deltaRequest(req *discoveryv3.DeltaDiscoveryRequest) error {
	typ, subscribe, unsubscribe := req.GetTypeUrl(), req.GetResourceNamesSubscribe(), req.GetResourceNamesUnsubscribe()
	if err := checkNames(typ, subscribe, unsubscribe); err != nil {
		return err
	}
	if len(subscribe) == 0 && len(unsubscribe) == 0 && st.deltaAnswer(req) {
		return nil
	}
	st.view.mu.Lock()
	defer st.view.mu.Unlock()
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.closed {
		return nil
	}
	s, first, err := st.subscription(typ)
	if err != nil {
		return err
	}
	var has map[string]string
	if first {
		s.implicit = len(subscribe) == 0
		has = req.GetInitialResourceVersions()
	} else {
		st.answered(s, req.GetResponseNonce(), refusal(req.GetErrorDetail()))
	}
	names, all := sortedNames(subscribe)
	if all || first && s.implicit {
		st.subscribeAll(s)
	}
	if err := st.subscribe(s, names, has); err != nil {
		return err
	}
	if names, all = sortedNames(unsubscribe); all {
		st.unsubscribeAll(s)
	}
	st.unsubscribe(s, names)
	if first {
		if err := st.resumeFrom(s, has); err != nil {
			return err
		}
	}
	if s.pending() {
		s.urgent = true
		st.notify()
	}
	return nil
}

// deltaAnswer takes in a request that only answers, without the view's lock. It returns false for a first request.
func (st *stream) deltaAnswer(req *discoveryv3.DeltaDiscoveryRequest) bool {
	st.mu.Lock()
	defer st.mu.Unlock()
	s := st.subs[req.GetTypeUrl()]
	if s != nil {
		st.answered(s, req.GetResponseNonce(), refusal(req.GetErrorDetail()))
	}
	return s != nil
}

// resumeFrom believes the client about what it has: only differences will be sent, and what it waits for.
func (st *stream) resumeFrom(s *sub, versions map[string]string) error {
	waits := st.waiting(s, len(versions))
	if len(versions) > MaxHeld {
		return limitError(s.typ, "initial_resource_versions", len(versions), MaxHeld)
	}
	s.came = len(versions) > 0
	has := make([]*Resource, 0, len(versions))
	for name, version := range versions {
		if n := max(len(name), len(version)); n > MaxNameBytes {
			return limitError(s.typ, "length of a name or version", n, MaxNameBytes)
		}
		if !s.wants(name) {
			continue // held, but not asked for
		}
		r := st.view.set[s.typ].Get(name)
		if r == nil || r.Version != version {
			r = &Resource{Name: name, Version: version, hash: hashOf(name, version)}
		}
		has = append(has, r)
		if waits[name] {
			s.touch(name, true)
		}
	}
	s.hold(st.view.set[s.typ], has, nil)
	return nil
}

// waiting returns the endpoints that the client waits for, whatever it has of them: those of clusters that it was sent
// before it first asked for any.
func (st *stream) waiting(s *sub, has int) map[string]bool {
	if s.typ != EndpointType {
		return nil
	}
	warmed := st.warmed
	st.warmed = nil
	c := st.subs[ClusterType]
	if has == 0 || c == nil || c.came {
		return warmed
	}
	out := map[string]bool{}
	for r := range c.held.All() {
		out[r.warms] = true
	}
	return out
}

// sotwRequest takes in one request of a state-of-the-world stream: the whole list of names, every time.
func (st *stream) sotwRequest(req *discoveryv3.DiscoveryRequest) error {
	typ, names := req.GetTypeUrl(), req.GetResourceNames()
	if err := checkNames(typ, names); err != nil {
		return err
	}
	if st.sotwAnswer(req) {
		return nil
	}
	st.view.mu.Lock()
	defer st.view.mu.Unlock()
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.closed {
		return nil
	}
	s, first, err := st.subscription(typ)
	if err != nil {
		return err
	}
	if first {
		s.implicit, s.resume, s.came = true, req.GetVersionInfo(), req.GetVersionInfo() != ""
	} else if nonce := req.GetResponseNonce(); nonce != "" {
		if !st.answered(s, nonce, refusal(req.GetErrorDetail())) && len(s.flights) > 0 {
			return nil // overtaken by a response that is on its way: the client will repeat what it wants
		}
	}
	s.asked = hashOfList(names)
	sorted, all := sortedNames(names)
	if len(names) > 0 {
		s.implicit = false
	} else if s.implicit {
		all = true
	}
	st.unsubscribe(s, (&nameSet{sorted}).missing(s.named.all()))
	if all {
		st.subscribeAll(s)
	} else {
		st.unsubscribeAll(s)
	}
	if err := st.subscribe(s, s.named.missing(sorted), nil); err != nil {
		return err
	}
	if s.pending() {
		st.notify()
	}
	return nil
}

// sotwAnswer takes in a request that asks for what the last one asked for, without the view's lock.
func (st *stream) sotwAnswer(req *discoveryv3.DiscoveryRequest) bool {
	st.mu.Lock()
	defer st.mu.Unlock()
	s := st.subs[req.GetTypeUrl()]
	if s == nil || s.asked != hashOfList(req.GetResourceNames()) {
		return false
	}
	st.answered(s, req.GetResponseNonce(), refusal(req.GetErrorDetail()))
	return true
}

// subscribeAll starts the wildcard. The caller holds both locks, as for the three below.
func (st *stream) subscribeAll(s *sub) {
	if s.wildcard {
		return
	}
	s.wildcard, s.answer, s.whole = true, true, true
	if s.typ == EndpointType {
		clear(st.ignored)
	}
}

func (st *stream) unsubscribeAll(s *sub) {
	if !s.wildcard {
		return
	}
	if s.whole {
		for _, name := range s.named.all() {
			s.touch(name, false)
		}
	}
	s.wildcard, s.whole = false, false
	var rest []string
	for r := range s.held.All() {
		if !s.named.has(r.Name) {
			rest = append(rest, r.Name)
		}
	}
	st.forget(s, rest)
}

// subscribe adds sorted names. A client that names what it already has may have forgotten it, so it is sent again, unless
// the client says in the same breath that it has it.
func (st *stream) subscribe(s *sub, names []string, has map[string]string) error {
	if len(names) == 0 {
		return nil
	}
	resources := st.view.set[s.typ]
	for i, name := range names {
		if r := resources.Get(name); r != nil {
			names[i] = r.Name // one copy of the text for all streams
		}
		_, had := has[name]
		s.touch(names[i], !had)
		if s.typ == EndpointType {
			delete(st.ignored, name)
		}
	}
	if fresh := s.named.missing(names); len(fresh) > 0 {
		if n := s.named.len() + len(fresh); n > MaxNames {
			return limitError(s.typ, "resource names", n, MaxNames)
		}
		s.named = st.sets.of(merged(s.named.all(), fresh))
	}
	return nil
}

// unsubscribe takes sorted names back. Under a wildcard the client cannot know whether it keeps the resource: it is told.
func (st *stream) unsubscribe(s *sub, names []string) {
	left := (&nameSet{names}).missing(s.named.all())
	if len(left) == s.named.len() {
		return
	}
	was := s.named
	s.named = st.sets.of(left)
	if !s.wildcard {
		st.forget(s, names)
		return
	}
	for _, name := range names {
		if was.has(name) {
			s.touch(name, true)
		}
	}
}

// forget drops what is no longer subscribed to.
func (st *stream) forget(s *sub, names []string) {
	s.drop(names)
	st.forsaken(s, func(name string) bool { return !s.wants(name) })
}

func checkNames(typ string, lists ...[]string) error {
	for _, names := range lists {
		if len(names) > MaxNames {
			return limitError(trim(typ, 256), "resource names", len(names), MaxNames)
		}
		for _, name := range names {
			if len(name) > MaxNameBytes {
				return limitError(trim(typ, 256), "length of a name", len(name), MaxNameBytes)
			}
		}
	}
	return nil
}

func refusal(s *status.Status) *string {
	if s == nil {
		return nil
	}
	text := s.GetMessage()
	return &text
}
