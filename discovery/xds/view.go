package xds

import (
	"context"
	"math/bits"
	"slices"
	"sync"
)

// view is one Feed and the streams that read it.
type view struct {
	feed   Feed
	cancel context.CancelFunc
	done   chan struct{}

	mu      sync.RWMutex // taken before a stream's mu
	set     Set          // the newest; nil before the first
	sorted  map[string][]string
	index   map[string]*watchers
	streams []*stream // by slot; nil is free
	live    int
}

// watchers is the inverted index of one type.
type watchers struct {
	all   slots            // wildcard
	named map[string]slots // by resource name
}

func newView(feed Feed) *view {
	ctx, cancel := context.WithCancel(context.Background())
	v := &view{feed: feed, cancel: cancel, done: make(chan struct{}), index: map[string]*watchers{}}
	go v.run(ctx)
	return v
}

func (v *view) run(ctx context.Context) {
	defer close(v.done)
	for {
		set, outdated := v.feed.Latest()
		if set != nil {
			v.publish(set)
		}
		select {
		case <-outdated:
		case <-ctx.Done():
			return
		}
	}
}

func (v *view) stop() {
	v.cancel()
	<-v.done
}

// publish makes set the newest and marks what differs on the streams that watch it.
func (v *view) publish(set Set) {
	v.mu.Lock()
	defer v.mu.Unlock()
	old := v.set
	v.set, v.sorted = set, nil
	var touched slots
	for typ, w := range v.index {
		names := diff(old[typ], set[typ])
		if len(names) == 0 {
			continue
		}
		w.all.each(func(slot int) {
			v.streams[slot].mark(typ, names)
			touched.add(slot)
		})
		for i, name := range names {
			w.named[name].each(func(slot int) {
				v.streams[slot].mark(typ, names[i:i+1])
				touched.add(slot)
			})
		}
	}
	for slot, st := range v.streams {
		if st != nil && (old == nil || touched.has(slot)) {
			st.notify()
		}
	}
}

// names returns the sorted names of a type in the newest set. The caller holds mu for writing.
func (v *view) names(typ string) []string {
	if names, ok := v.sorted[typ]; ok {
		return names
	}
	names := make([]string, 0, v.set[typ].Len())
	for r := range v.set[typ].All() {
		names = append(names, r.Name)
	}
	slices.Sort(names)
	if v.sorted == nil {
		v.sorted = map[string][]string{}
	}
	v.sorted[typ] = names
	return names
}

func (v *view) join(st *stream) int {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.live++
	if slot := slices.Index(v.streams, nil); slot >= 0 {
		v.streams[slot] = st
		return slot
	}
	v.streams = append(v.streams, st)
	return len(v.streams) - 1
}

// leave forgets the stream and says whether it was the last.
func (v *view) leave(st *stream) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	st.mu.Lock()
	defer st.mu.Unlock()
	st.closed = true
	if st.timer != nil {
		st.timer.Stop()
	}
	for typ, s := range st.subs {
		if s.wildcard {
			v.unwatchAll(typ, st.slot)
		}
		for name, e := range s.entries {
			if e.named {
				v.unwatch(typ, name, st.slot)
			}
		}
	}
	v.streams[st.slot] = nil
	v.live--
	return v.live == 0
}

func (v *view) watchersOf(typ string) *watchers {
	w := v.index[typ]
	if w == nil {
		w = &watchers{named: map[string]slots{}}
		v.index[typ] = w
	}
	return w
}

func (v *view) watchAll(typ string, slot int) { v.watchersOf(typ).all.add(slot) }

func (v *view) watch(typ, name string, slot int) {
	w := v.watchersOf(typ)
	s := w.named[name]
	s.add(slot)
	w.named[name] = s
}

func (v *view) unwatchAll(typ string, slot int) {
	if w := v.index[typ]; w != nil {
		w.all.remove(slot)
		v.trim(typ, w)
	}
}

func (v *view) unwatch(typ, name string, slot int) {
	w := v.index[typ]
	if w == nil {
		return
	}
	s := w.named[name]
	s.remove(slot)
	if s.empty() {
		delete(w.named, name)
		v.trim(typ, w)
	}
}

// trim forgets a type that nobody watches: type URLs are the client's words.
func (v *view) trim(typ string, w *watchers) {
	if len(w.named) == 0 && w.all.empty() {
		delete(v.index, typ)
	}
}

// slots is a set of small numbers: the streams of a view.
type slots []uint64

func (s *slots) add(n int) {
	for len(*s) <= n/64 {
		*s = append(*s, 0)
	}
	(*s)[n/64] |= 1 << (n % 64)
}

func (s slots) remove(n int) {
	if n/64 < len(s) {
		s[n/64] &^= 1 << (n % 64)
	}
}

func (s slots) has(n int) bool { return n/64 < len(s) && s[n/64]&(1<<(n%64)) != 0 }

func (s slots) empty() bool {
	for _, w := range s {
		if w != 0 {
			return false
		}
	}
	return true
}

func (s slots) each(f func(int)) {
	for i, w := range s {
		for ; w != 0; w &= w - 1 {
			f(i*64 + bits.TrailingZeros64(w))
		}
	}
}
