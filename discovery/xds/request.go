package xds

import (
	"slices"

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
	if first {
		s.implicit = len(subscribe) == 0
		if s.implicit {
			st.subscribeAll(s)
		}
	} else {
		st.answered(s, req.GetResponseNonce(), refusal(req.GetErrorDetail()))
	}
	for _, name := range subscribe {
		if name == everything {
			st.subscribeAll(s)
		} else if err := st.subscribe(s, name); err != nil {
			return err
		}
	}
	for _, name := range unsubscribe {
		if name == everything {
			st.unsubscribeAll(s)
		} else {
			st.unsubscribe(s, name)
		}
	}
	if first {
		warmed := map[string]bool(nil)
		if typ == EndpointType {
			warmed, st.warmed = st.warmed, nil
		}
		if err := s.resumeFrom(req.GetInitialResourceVersions(), warmed); err != nil {
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
func (s *sub) resumeFrom(versions map[string]string, waits map[string]bool) error {
	if len(versions) > MaxHeld {
		return limitError(s.typ, "initial_resource_versions", len(versions), MaxHeld)
	}
	s.came = len(versions) > 0
	for name, version := range versions {
		if n := max(len(name), len(version)); n > MaxNameBytes {
			return limitError(s.typ, "length of a name or version", n, MaxNameBytes)
		}
		e := s.entries[name]
		if e == nil {
			if !s.wildcard {
				continue // held, but not asked for
			}
			e = s.entry(name)
			s.touch(e)
		}
		e.force = waits[name]
		s.hold(e, &Resource{Name: e.name, Version: version, hash: hashOf(e.name, version)})
	}
	return nil
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
	s.asked = names
	if len(names) > 0 {
		s.implicit = false
	} else if s.implicit {
		names = []string{everything}
	}
	wanted := make(map[string]bool, len(names))
	for _, name := range names {
		wanted[name] = true
	}
	for name, e := range s.entries {
		if e.named && !wanted[name] {
			st.unsubscribe(s, name)
		}
	}
	if s.wildcard && !wanted[everything] {
		st.unsubscribeAll(s)
	}
	for _, name := range names {
		if name == everything {
			st.subscribeAll(s)
		} else if e := s.entries[name]; e == nil || !e.named {
			if err := st.subscribe(s, name); err != nil {
				return err
			}
		}
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
	if s == nil || !slices.Equal(s.asked, req.GetResourceNames()) {
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
	s.wildcard, s.answer = true, true
	if s.typ == EndpointType {
		clear(st.ignored)
	}
	st.view.watchAll(s.typ, st.slot)
	for _, name := range st.view.names(s.typ) {
		s.touch(s.entry(name))
	}
}

func (st *stream) unsubscribeAll(s *sub) {
	if !s.wildcard {
		return
	}
	s.wildcard = false
	st.view.unwatchAll(s.typ, st.slot)
	for _, e := range s.entries {
		if !e.named {
			st.forsaken(s, e.name)
			s.drop(e)
		}
	}
}

// subscribe adds a name. A client that names what it already has may have forgotten it, so it is sent again.
func (st *stream) subscribe(s *sub, name string) error {
	if r := st.view.set[s.typ].Get(name); r != nil {
		name = r.Name // one copy of the string for all streams
	}
	e := s.entry(name)
	if !e.named {
		if s.named++; s.named > MaxNames {
			return limitError(s.typ, "resource names", s.named, MaxNames)
		}
		e.named = true
		st.view.watch(s.typ, name, st.slot)
	}
	if s.typ == EndpointType {
		delete(st.ignored, name)
	}
	e.force = true
	s.touch(e)
	return nil
}

// unsubscribe takes a name back. Under a wildcard the client cannot know whether it keeps the resource: it is told.
func (st *stream) unsubscribe(s *sub, name string) {
	e := s.entries[name]
	if e == nil || !e.named {
		return
	}
	e.named = false
	s.named--
	st.view.unwatch(s.typ, name, st.slot)
	if s.wildcard {
		e.force = true
		s.touch(e)
	} else {
		st.forsaken(s, name)
		s.drop(e)
	}
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
