package xds

import (
	"context"
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
	streams []*stream    // by slot; nil is free
	live    int
}

func newView(feed Feed) *view {
	ctx, cancel := context.WithCancel(context.Background())
	v := &view{feed: feed, cancel: cancel, done: make(chan struct{})}
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

// publish makes set the newest and marks what differs on the streams that ask for it.
func (v *view) publish(set Set) {
	v.mu.Lock()
	defer v.mu.Unlock()
	old := v.set
	v.set = set
	differ := map[string][]string{}
	for _, st := range v.streams {
		if st != nil && (st.follow(old, set, differ) || old == nil) {
			st.notify()
		}
	}
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
	v.streams[st.slot] = nil
	v.live--
	return v.live == 0
}
