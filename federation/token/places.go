package token

import (
	"net"
	"slices"
	"sync"
)

// places bounds the joins that are served at once. Whoever comes when all places are taken gets one all the same: the
// source that holds most of them gives up its oldest that has not asked for anything yet. So a flood, which must hold
// its places to keep others out, loses them, and an honest joiner, who asks at once, does not. Joins that come through
// one gateway are one source: among them the oldest goes.
type places struct {
	limit int

	mu    sync.Mutex
	order []*place // oldest first
}

// place is one connection's.
type place struct {
	source string
	conn   net.Conn
	asked  bool // it is being decided on: it keeps its place
}

// take gives the connection a place, or nil when all are being decided on.
func (p *places) take(conn net.Conn) *place {
	source, _, err := net.SplitHostPort(conn.RemoteAddr().String())
	if err != nil {
		source = conn.RemoteAddr().String()
	}
	mine := &place{source: source, conn: conn}
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.order) >= p.limit {
		i := p.victim()
		if i < 0 {
			return nil
		}
		go p.order[i].conn.Close() // may wait to send an alert
		p.order = slices.Delete(p.order, i, i+1)
	}
	p.order = append(p.order, mine)
	return mine
}

// victim is the oldest idle place of the source that has most of them; -1: there is none. The caller holds mu.
func (p *places) victim() int {
	idle := map[string]int{}
	for _, x := range p.order {
		if !x.asked {
			idle[x.source]++
		}
	}
	best := -1
	for i, x := range p.order {
		if !x.asked && (best < 0 || idle[x.source] > idle[p.order[best].source]) {
			best = i
		}
	}
	return best
}

// asks keeps the place until it is given back; false: it is lost already.
func (p *places) asks(x *place) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	x.asked = slices.Contains(p.order, x)
	return x.asked
}

// leave gives the place back.
func (p *places) leave(x *place) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if i := slices.Index(p.order, x); i >= 0 {
		p.order = slices.Delete(p.order, i, i+1)
	}
}
