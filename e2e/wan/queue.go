package wan

import (
	"container/heap"
	"context"
	"errors"
	"os"
	"sync"
	"time"
)

// item is a packet on its way.
type item struct {
	due    time.Time
	seq    uint64 // of two that are due at once the first one comes first
	packet []byte
	link   *link // nil for the emulator's own answers
}

type items []item

func (q items) Len() int { return len(q) }
func (q items) Less(i, j int) bool {
	if !q[i].due.Equal(q[j].due) {
		return q[i].due.Before(q[j].due)
	}
	return q[i].seq < q[j].seq
}
func (q items) Swap(i, j int) { q[i], q[j] = q[j], q[i] }
func (q *items) Push(x any)   { *q = append(*q, x.(item)) }
func (q *items) Pop() any {
	old := *q
	x := old[len(old)-1]
	old[len(old)-1] = item{}
	*q = old[:len(old)-1]
	return x
}

// queue holds the packets for one port in the order in which they are due.
type queue struct {
	limit int
	wake  chan struct{} // the first packet is another one

	mu    sync.Mutex
	items items
	seq   uint64
}

func newQueue(limit int) *queue { return &queue{limit: limit, wake: make(chan struct{}, 1)} }

// push reports false when the queue is full.
func (q *queue) push(x item) bool {
	q.mu.Lock()
	if len(q.items) >= q.limit {
		q.mu.Unlock()
		return false
	}
	q.seq++
	x.seq = q.seq
	heap.Push(&q.items, x)
	first := q.items[0].seq == x.seq
	q.mu.Unlock()
	if first {
		select {
		case q.wake <- struct{}{}:
		default:
		}
	}
	return true
}

// pop returns the first packet if it is due, else how long to wait; a negative wait means that there is none.
func (q *queue) pop(now time.Time) (x item, wait time.Duration, ok bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.items) == 0 {
		return item{}, -1, false
	}
	if wait := q.items[0].due.Sub(now); wait > 0 {
		return item{}, wait, false
	}
	return heap.Pop(&q.items).(item), 0, true
}

// deliver writes the packets of a port when they are due, until ctx ends.
func (p *port) deliver(ctx context.Context) error {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		x, wait, ok := p.queue.pop(time.Now())
		if ok {
			// A device that is down or gone takes nothing: the packet is lost, as on a cable that was pulled.
			if _, err := p.file.Write(x.packet); errors.Is(err, os.ErrClosed) {
				return nil
			} else if err == nil && x.link != nil {
				x.link.passed.Add(1)
			}
			continue
		}
		if wait < 0 {
			wait = time.Hour
		}
		timer.Reset(wait)
		select {
		case <-timer.C:
		case <-p.queue.wake:
		case <-ctx.Done():
			return nil
		}
	}
}
